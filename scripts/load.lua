-- wrk's side of scripts/load: PUTs of 128 bytes to random ones of 100,000 keys, then one line of figures.

local keys = 100000
local value = string.rep("v", 128)

function init()
    math.randomseed(os.time())
end

function request()
    return wrk.format("PUT", "/key-" .. math.random(keys), nil, value)
end

-- Requests, microseconds, requests without a 204 or without an answer, median and 99th percentile in microseconds.
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.status + errors.connect + errors.read + errors.write + errors.timeout
    print(string.format("figures %d %d %d %d %d", summary.requests, summary.duration, failed,
        latency:percentile(50), latency:percentile(99)))
end
