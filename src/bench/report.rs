//! The figures of a run: what the table shows, what the JSON holds, and what `plot` draws.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::tally::Tally;
use super::{Arrivals, Consistency, Course, Distribution, Plan, Protocol};

/// Above this share of its threads' time, the generator and not the server may be what was measured.
const BUSY: f64 = 0.9;

#[derive(Debug, Serialize)]
pub struct Report {
    pub load: Shape,
    /// From the end of the warm-up to the last answer or failure, and no shorter than asked for, unless the number of
    /// operations ended it.
    pub seconds: f64,
    /// That succeeded.
    pub operations: u64,
    pub operations_per_second: f64,
    pub writes: Option<Kind>,
    pub reads: Option<Kind>,
    /// Reads of keys that are not there.
    pub missing: u64,
    /// An open loop's wait at the client, which the latencies hold too.
    pub lateness: Option<Latency>,
    pub failed: u64,
    pub failures: BTreeMap<String, u64>,
    /// Operations that succeeded in each second.
    pub throughput: Vec<f64>,
    pub generator: Generator,
}

/// The load, as it was asked for.
#[derive(Debug, Serialize)]
pub struct Shape {
    pub endpoints: Vec<String>,
    pub protocol: Protocol,
    pub connections: usize,
    pub pipeline: usize,
    /// None for a closed loop.
    pub rate: Option<f64>,
    pub arrivals: Option<&'static str>,
    pub reads_percent: u8,
    pub consistency: &'static str,
    pub value_bytes: usize,
    pub keys: u64,
    pub distribution: &'static str,
    pub warm_up_seconds: f64,
    pub seed: u64,
}

#[derive(Debug, Serialize)]
pub struct Generator {
    pub threads: usize,
    /// Its warm-up included.
    pub cpu_seconds: f64,
    /// Whether it had hardly any time to spare: then it is itself what was measured.
    pub busy: bool,
}

/// Reads or writes.
#[derive(Debug, Serialize)]
pub struct Kind {
    pub count: u64,
    pub per_second: f64,
    /// Of an open loop: from the instant at which it was to be sent. Of a closed loop: from sending.
    pub latency: Latency,
    /// A closed loop's latencies with those that its stalls kept from being measured.
    pub corrected: Option<Corrected>,
    /// (Percentile, microseconds), as far as there are operations to tell.
    pub curve: Vec<(f64, f64)>,
}

#[derive(Debug, Serialize)]
pub struct Corrected {
    /// A client's mean time from one request to the next: what would have been sent into a stall, one each interval.
    pub interval_us: f64,
    #[serde(flatten)]
    pub latency: Latency,
    pub curve: Vec<(f64, f64)>,
}

/// Microseconds.
#[derive(Debug, Serialize)]
pub struct Latency {
    pub mean_us: f64,
    pub p50_us: f64,
    pub p90_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub max_us: f64,
}

impl Report {
    pub(super) fn new(plan: &Plan, tally: Tally, course: &Course) -> Self {
        let from = course.window.from;
        let seconds = seconds(plan, &tally, course);
        let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let clients = (plan.connections * plan.pipeline) as f64;
        let kind = |latencies: &Histogram<u64>| {
            let count = latencies.len();
            (count > 0).then(|| Kind {
                count,
                per_second: per_second(count),
                latency: Latency::new(latencies),
                corrected: plan.rate.is_none().then(|| Corrected::new(latencies, seconds * clients / count as f64)),
                curve: curve(latencies),
            })
        };
        let operations = tally.writes.len() + tally.reads.len();
        let threads = plan.threads.min(plan.connections);
        let running = plan.warm_up.as_secs_f64() + seconds;
        Report {
            load: Shape::new(plan),
            seconds,
            operations,
            operations_per_second: per_second(operations),
            writes: kind(&tally.writes),
            reads: kind(&tally.reads),
            missing: tally.missing,
            lateness: (plan.rate.is_some() && operations > 0).then(|| Latency::new(&tally.lateness)),
            failed: tally.failures.values().sum(),
            failures: tally.failures.iter().map(|(failure, count)| (failure.to_string(), *count)).collect(),
            throughput: throughput(&tally.seconds, seconds, course.window.until.duration_since(from).as_secs_f64()),
            generator: Generator {
                threads,
                cpu_seconds: course.cpu_seconds,
                busy: course.cpu_seconds > BUSY * running * threads as f64,
            },
        }
    }
}

/// What rates are by.
fn seconds(plan: &Plan, tally: &Tally, course: &Course) -> f64 {
    let settled = tally.last_outcome.map_or(0.0, |last| (last - course.window.from).as_secs_f64());
    let asked = plan.duration.filter(|_| !course.ended_by_number).unwrap_or_default();
    settled.max(asked.as_secs_f64())
}

impl Shape {
    fn new(plan: &Plan) -> Self {
        Shape {
            endpoints: plan.endpoints.clone(),
            protocol: plan.protocol,
            connections: plan.connections,
            pipeline: plan.pipeline,
            rate: plan.rate,
            arrivals: plan.rate.map(|_| match plan.arrivals {
                Arrivals::Poisson => "poisson",
                Arrivals::Fixed => "fixed",
            }),
            reads_percent: plan.reads_percent,
            consistency: match plan.consistency {
                Consistency::Linearizable => "linearizable",
                Consistency::Stale => "stale",
            },
            value_bytes: plan.value_bytes,
            keys: plan.keys,
            distribution: match plan.distribution {
                Distribution::Uniform => "uniform",
                Distribution::Zipf => "zipf",
                Distribution::Sequential => "sequential",
            },
            warm_up_seconds: plan.warm_up.as_secs_f64(),
            seed: plan.seed,
        }
    }
}

impl Latency {
    fn new(nanos: &Histogram<u64>) -> Self {
        let at = |quantile| nanos.value_at_quantile(quantile) as f64 / 1e3;
        Latency {
            mean_us: nanos.mean() / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: nanos.max() as f64 / 1e3,
        }
    }
}

impl Corrected {
    fn new(nanos: &Histogram<u64>, interval_seconds: f64) -> Self {
        let corrected = nanos.clone_correct((interval_seconds * 1e9) as u64);
        Corrected { interval_us: interval_seconds * 1e6, latency: Latency::new(&corrected), curve: curve(&corrected) }
    }
}

/// Points at which the distance to 100 % halves, a few between, up to the last operation.
fn curve(nanos: &Histogram<u64>) -> Vec<(f64, f64)> {
    let mut points = Vec::new();
    let mut beyond = 1.0;
    while beyond * nanos.len() as f64 >= 1.0 {
        points.push((100.0 * (1.0 - beyond), nanos.value_at_quantile(1.0 - beyond) as f64 / 1e3));
        beyond /= 2.0_f64.powf(0.25);
    }
    points
}

/// Rates by the second up to where sending ends: behind it there are only stragglers.
fn throughput(counts: &[u64], seconds: f64, until: f64) -> Vec<f64> {
    let end = seconds.min(until);
    let rates = counts.iter().enumerate().filter_map(|(second, count)| {
        let length = (end - second as f64).min(1.0);
        // Of a sliver there is no rate, unless there is nothing else.
        (length > 0.1 || (second == 0 && length > 0.0)).then_some(*count as f64 / length)
    });
    rates.collect()
}

/// Failures by kind, in one line.
pub fn failures_line<K: fmt::Display>(failures: &BTreeMap<K, u64>) -> String {
    if failures.is_empty() {
        return "no failures".to_owned();
    }
    let kinds: Vec<_> = failures.iter().map(|(failure, count)| format!("{failure}: {count}")).collect();
    kinds.join(", ")
}

impl fmt::Display for Report {
    /// The table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = &self.load;
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        write!(f, "{} connection{}", load.connections, plural(load.connections))?;
        write!(f, " to {} with {} in flight on each, ", load.endpoints.join(", "), load.pipeline)?;
        match (load.rate, load.arrivals) {
            (Some(rate), Some(arrivals)) => write!(f, "open loop of {rate}/s ({arrivals})")?,
            (_, _) => write!(f, "closed loop")?,
        }
        writeln!(
            f,
            "; {} keys ({}), values of {} bytes, {} % reads ({})",
            load.keys, load.distribution, load.value_bytes, load.reads_percent, load.consistency
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "{:<18}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "", "count", "/s", "mean ms", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"
        )?;
        for (name, kind) in [("writes", &self.writes), ("reads", &self.reads)] {
            let Some(kind) = kind else { continue };
            let mut row = String::new();
            write!(row, "{name:<18}{:>10}{:>10.0}", kind.count, kind.per_second)?;
            writeln!(f, "{row}{}", kind.latency)?;
            if let Some(corrected) = &kind.corrected {
                writeln!(f, "{:<38}{}", "  corrected", corrected.latency)?;
            }
        }
        if let Some(lateness) = &self.lateness {
            writeln!(f, "{:<38}{lateness}", "  sent late by")?;
        }
        writeln!(f)?;
        writeln!(f, "{:.2} s, {}", self.seconds, failures_line(&self.failures))?;
        if self.missing > 0 {
            writeln!(f, "{} reads found no key (--preload writes them all)", self.missing)?;
        }
        if self.load.rate.is_none() {
            writeln!(
                f,
                "closed loop: a stall keeps requests from being sent, and hides them; `corrected` adds one for each \
                 mean interval of a client"
            )?;
        } else {
            writeln!(f, "open loop: latencies count from when a request was to be sent")?;
        }
        if self.generator.busy {
            writeln!(f, "the generator had no CPU to spare: it may be what was measured; try --threads")?;
        }
        Ok(())
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = [self.mean_us, self.p50_us, self.p90_us, self.p99_us, self.p999_us, self.max_us];
        figures.iter().try_for_each(|micros| write!(f, "{:>10.3}", micros / 1e3))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::super::source::{self, Operation, Window};
    use super::super::tally::{Answered, Failure};
    use super::*;

    #[test]
    fn a_stall_shows_in_the_corrected_latencies() {
        let mut nanos = Histogram::new_with_bounds(100, 3_600_000_000_000, 3).unwrap();
        // Ten seconds of one client that asks each millisecond, and one of which it waits for a single answer.
        nanos.record_n(1_000_000, 9000).unwrap();
        nanos.record(1_000_000_000).unwrap();
        let (measured, corrected) = (Latency::new(&nanos), Corrected::new(&nanos, 0.001));
        assert!(measured.p99_us < 1100.0, "the stall is one of 9001: {measured:?}");
        let p99 = corrected.latency.p99_us;
        assert!((850_000.0..950_000.0).contains(&p99), "a tenth of the time was waiting, up to a second: {p99}");
        assert!((corrected.interval_us - 1000.0).abs() < 1e-6);
    }

    #[test]
    fn a_run_is_as_long_as_asked_for_unless_its_number_ends_it() {
        let begin = Instant::now();
        let after = |millis| begin + Duration::from_millis(millis);
        let window = Window { begin, from: begin, until: after(9000) };
        let mut tally = Tally::new(window, Arc::default());
        let write = Operation { kind: source::Kind::Write, key: 0, intended: begin };
        tally.record(&write, begin, after(1000), Ok(Answered::Written));
        tally.record(&write, begin, after(2000), Err(Failure::TimedOut));
        let length = |duration, ended_by_number| {
            let plan = Plan { duration, stop_after: Some(2), ..plan() };
            seconds(&plan, &tally, &Course { window, cpu_seconds: 0.0, ended_by_number })
        };
        assert_eq!(length(Some(Duration::from_secs(9)), false), 9.0, "the servers were slow");
        assert_eq!(length(Some(Duration::from_secs(9)), true), 2.0, "a failure is part of it");
        assert_eq!(length(None, false), 2.0);
    }

    fn plan() -> Plan {
        Plan {
            endpoints: vec!["a:1".to_owned()],
            protocol: Protocol::Http,
            connections: 1,
            pipeline: 1,
            threads: 1,
            rate: None,
            arrivals: Arrivals::Fixed,
            reads_percent: 0,
            consistency: Consistency::Linearizable,
            value_bytes: 1,
            keys: 1,
            distribution: Distribution::Uniform,
            duration: None,
            warm_up: Duration::ZERO,
            stop_after: None,
            preload: false,
            timeout: Duration::from_secs(1),
            seed: 1,
        }
    }

    #[test]
    fn the_curve_ends_where_the_operations_do() {
        let mut nanos = Histogram::new_with_bounds(100, 3_600_000_000_000, 3).unwrap();
        for milli in 1..=1000 {
            nanos.record(milli * 1_000_000).unwrap();
        }
        let curve = curve(&nanos);
        assert!(curve.windows(2).all(|two| two[0].0 < two[1].0 && two[0].1 <= two[1].1), "{curve:?}");
        let last = curve.last().unwrap();
        assert!((99.8..=99.9).contains(&last.0) && last.1 > 990_000.0, "{last:?}");
        assert!(
            curve.iter().any(
                |(percentile, micros)| (49.0..51.0).contains(percentile) && (490_000.0..510_000.0).contains(micros)
            )
        );
    }

    #[test]
    fn throughput_leaves_out_what_came_when_sending_had_ended() {
        assert_eq!(throughput(&[100, 50], 1.5, 1.5), [100.0, 100.0]);
        assert_eq!(throughput(&[100, 100, 1], 2.01, 2.0), [100.0, 100.0]);
        assert_eq!(throughput(&[10], 0.05, 100.0), [200.0]);
        assert_eq!(throughput(&[], 0.0, 1.0), [0.0; 0]);
    }
}
