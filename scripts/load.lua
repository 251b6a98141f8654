-- wrk's side of scripts/load and scripts/catchup: PUTs, then one line of figures. To random ones of 100,000 keys, with
-- values of 128 bytes; or, with FROM in the environment, to one key after the other from that number on, with values of
-- BYTES.

local keys = 100000
local from = tonumber(os.getenv("FROM"))
local value = string.rep("v", tonumber(os.getenv("BYTES")) or 128)

function init()
    math.randomseed(os.time())
end

function request()
    if from then
        from = from + 1
        return wrk.format("PUT", "/key-" .. from, nil, value)
    end
    return wrk.format("PUT", "/key-" .. math.random(keys), nil, value)
end

-- Requests, microseconds, requests without a 204 or without an answer, median and 99th percentile in microseconds.
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.status + errors.connect + errors.read + errors.write + errors.timeout
    print(string.format("figures %d %d %d %d %d", summary.requests, summary.duration, failed,
        latency:percentile(50), latency:percentile(99)))
end
