//! The command line of `raftkv bench`: flags become a [`Plan`] and where its figures go, or one line that says what is
//! wrong. Flags only: no variable sets the load.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};

use super::{Exit, bytes, duration, number, one_line, two_dashes, value};
use crate::bench::{Arrivals, Consistency, Distribution, Format, KEYS_MAX, Output, Plan, Protocol};
use crate::cluster::PeerUrl;
use crate::config::VALUE_BYTES_MAX;

const DURATION: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(7 * 24 * 3600);
const WARM_UP: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(3600);
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(600);
const DURATION_DEFAULT: Duration = Duration::from_secs(10);
const CONNECTIONS_MAX: u64 = 50_000;
const PIPELINE_MAX: u64 = 10_000;
const RATE_MAX: u64 = 100_000_000;

/// The first argument that asks for a load and not for a server.
pub const NAME: &str = "bench";

/// Reads the arguments behind `raftkv bench`.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<(Plan, Output), Exit> {
    let args = two_dashes(["raftkv bench".into()].into_iter().chain(args));
    let command = Flags::command();
    let flags = command.clone().try_get_matches_from(&args).and_then(|matches| Flags::from_arg_matches(&matches));
    let flags = flags.map_err(|error| match error.kind() {
        clap::error::ErrorKind::DisplayHelp => Exit::Shown(error),
        _ => Exit::Usage(one_line(&error, &command, &args)),
    })?;
    flags.into_plan().map_err(Exit::Usage)
}

const ABOUT: &str = "\
    Loads servers with writes and reads, and tells how many they answered and how long they took. Without --rate each \
    connection asks again as soon as it has its answer (a closed loop): it finds out what a server can do. With --rate \
    requests are sent at that rate, however slow the answers, and their latency counts from when they were to be sent \
    (an open loop): it finds out how long users wait. Each of these is dealt to a connection beforehand, and waits for \
    that one while others may be free: with --pipeline 1, behind every earlier answer on it.";

const EXAMPLES: &str = "\
Examples:
  What the node at http://127.0.0.1:9121 takes, 64 clients, ten seconds:
    raftkv bench
  How long users of three nodes wait at 5000 requests a second, nine reads for each write; every key is there:
    raftkv bench --preload --rate 5000 --reads 90 --duration 30s --svg wait.svg \\
        http://127.0.0.1:12380 http://127.0.0.1:22380 http://127.0.0.1:32380
  One client, one write at a time; figures for another program:
    raftkv bench --connections 1 --output json
  A million keys, each written once:
    raftkv bench --keys 1000000 --distribution sequential --stop-after 1000000 --warm-up 0s
  The same load on an etcd over gRPC: 64 clients share four HTTP/2 connections:
    raftkv bench --protocol etcd --connections 4 --pipeline 16 http://127.0.0.1:2379

Exit codes: 0 figures are there, whatever failed beside them; 1 nothing succeeded, or no connection at the start; 2 these \
flags cannot be used.";

#[derive(Debug, Parser)]
#[command(name = "raftkv bench", about = ABOUT, after_help = EXAMPLES)]
#[command(args_override_self = true, allow_negative_numbers = true, max_term_width = 120)]
struct Flags {
    /// Servers; connections are dealt to them in turn
    #[arg(value_name = "ENDPOINT", default_value = "http://127.0.0.1:9121", value_parser = value(endpoint))]
    endpoints: Vec<String>,

    /// What they speak: raftkv's http, etcd over gRPC, etcd-json (its gateway), or plain: as http, and any 2xx will do
    #[arg(long, value_name = "PROTOCOL", default_value = "http", value_parser = value(protocol))]
    protocol: Protocol,

    /// Connections, all servers together
    #[arg(long, value_name = "N", default_value = "64", help_heading = "Load")]
    #[arg(value_parser = value(|text| number(text, 1..=CONNECTIONS_MAX)))]
    connections: u64,

    /// Requests in flight on each connection, at most; with etcd these are clients that share it
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Load")]
    #[arg(value_parser = value(|text| number(text, 1..=PIPELINE_MAX)))]
    pipeline: u64,

    /// Requests a second in an open loop, all connections together
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = value(|text| number(text, 1..=RATE_MAX)))]
    rate: Option<u64>,

    /// How an open loop spaces them: poisson, as many users do, or fixed
    #[arg(long, value_name = "poisson|fixed", default_value = "poisson", help_heading = "Load")]
    #[arg(value_parser = value(arrivals))]
    arrivals: Arrivals,

    /// Threads that make the load
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Load")]
    #[arg(value_parser = value(|text| number(text, 1..=1024)))]
    threads: u64,

    /// Time that counts [default: 10s, or until --stop-after]
    #[arg(long, value_name = "TIME", help_heading = "Load", value_parser = value(|text| duration(text, DURATION)))]
    duration: Option<Duration>,

    /// Time before it, which does not
    #[arg(long, value_name = "TIME", default_value = "1s", help_heading = "Load")]
    #[arg(value_parser = value(|text| duration(text, WARM_UP)))]
    warm_up: Duration,

    /// Ends after so many operations behind the warm-up; sooner if the servers are gone for --timeout
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = value(|text| number(text, 1..=u64::MAX)))]
    stop_after: Option<u64>,

    /// Time after which an answer is given up
    #[arg(long, value_name = "TIME", default_value = "10s", help_heading = "Load")]
    #[arg(value_parser = value(|text| duration(text, TIMEOUT)))]
    timeout: Duration,

    /// Share of reads, in percent; the others are writes
    #[arg(long, value_name = "PERCENT", default_value = "0", help_heading = "Operations")]
    #[arg(value_parser = value(|text| number(text, 0..=100)))]
    reads: u64,

    /// What reads ask for
    #[arg(long, value_name = "linearizable|stale", default_value = "linearizable", help_heading = "Operations")]
    #[arg(value_parser = value(consistency))]
    consistency: Consistency,

    /// Size of a value
    #[arg(long, value_name = "BYTES", default_value = "128", help_heading = "Operations")]
    #[arg(value_parser = value(|text| bytes(text, 0..=VALUE_BYTES_MAX)))]
    value_bytes: u64,

    /// Number of keys
    #[arg(long, value_name = "N", default_value = "100000", help_heading = "Operations")]
    #[arg(value_parser = value(|text| number(text, 1..=KEYS_MAX)))]
    keys: u64,

    /// How keys are chosen: uniform, zipf (a few take most), or sequential
    #[arg(long, value_name = "DISTRIBUTION", default_value = "uniform", help_heading = "Operations")]
    #[arg(value_parser = value(distribution))]
    distribution: Distribution,

    /// Write each key before anything else; what fails is written again, until nothing has succeeded for --timeout
    #[arg(long, help_heading = "Operations")]
    preload: bool,

    /// Draws the same operations again where it is the same
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Operations")]
    #[arg(value_parser = value(|text| number(text, 0..=u64::MAX)))]
    seed: u64,

    /// What is written to stdout
    #[arg(long, value_name = "table|json", default_value = "table", help_heading = "Output")]
    #[arg(value_parser = value(format))]
    output: Format,

    /// File for the figures as JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    json: Option<PathBuf>,

    /// File for a picture: latency by percentile, and operations a second over time
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    svg: Option<PathBuf>,
}

impl Flags {
    fn into_plan(self) -> Result<(Plan, Output), String> {
        let fits = |number: u64| usize::try_from(number).expect("its bound fits");
        let connections = fits(self.connections);
        if connections < self.endpoints.len() {
            return Err(format!(
                "--connections \"{connections}\": fewer than the endpoints, which are {}",
                self.endpoints.len()
            ));
        }
        let plan = Plan {
            endpoints: self.endpoints,
            protocol: self.protocol,
            connections,
            pipeline: fits(self.pipeline),
            threads: fits(self.threads),
            rate: self.rate.map(|rate| rate as f64),
            arrivals: self.arrivals,
            reads_percent: self.reads as u8,
            consistency: self.consistency,
            value_bytes: fits(self.value_bytes),
            keys: self.keys,
            distribution: self.distribution,
            duration: self.duration.or(self.stop_after.is_none().then_some(DURATION_DEFAULT)),
            warm_up: self.warm_up,
            stop_after: self.stop_after,
            preload: self.preload,
            timeout: self.timeout,
            seed: self.seed,
        };
        Ok((plan, Output { format: self.output, json: self.json, svg: self.svg }))
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    // A client's URL has the form of a peer's; a trailing slash is what people paste.
    let url = PeerUrl::parse(text.strip_suffix('/').unwrap_or(text));
    url.map(|url| url.authority()).map_err(|_| "use http://HOST:PORT, for example http://127.0.0.1:9121".to_owned())
}

fn protocol(text: &str) -> Result<Protocol, String> {
    match text {
        "http" => Ok(Protocol::Http),
        "etcd" => Ok(Protocol::Etcd),
        "etcd-json" => Ok(Protocol::EtcdJson),
        "plain" => Ok(Protocol::Plain),
        _ => Err("use http, etcd, etcd-json or plain".to_owned()),
    }
}

fn arrivals(text: &str) -> Result<Arrivals, String> {
    match text {
        "poisson" => Ok(Arrivals::Poisson),
        "fixed" => Ok(Arrivals::Fixed),
        _ => Err("use poisson or fixed".to_owned()),
    }
}

fn consistency(text: &str) -> Result<Consistency, String> {
    match text {
        "linearizable" => Ok(Consistency::Linearizable),
        "stale" => Ok(Consistency::Stale),
        _ => Err("use linearizable or stale".to_owned()),
    }
}

fn distribution(text: &str) -> Result<Distribution, String> {
    match text {
        "uniform" => Ok(Distribution::Uniform),
        "zipf" => Ok(Distribution::Zipf),
        "sequential" => Ok(Distribution::Sequential),
        _ => Err("use uniform, zipf or sequential".to_owned()),
    }
}

fn format(text: &str) -> Result<Format, String> {
    match text {
        "table" => Ok(Format::Table),
        "json" => Ok(Format::Json),
        _ => Err("use table or json".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_parse(line: &str) -> Result<(Plan, Output), String> {
        let args = line.split(' ').filter(|arg| !arg.is_empty());
        parse(args.map(OsString::from)).map_err(|exit| match exit {
            Exit::Usage(line) => line,
            Exit::Shown(text) => panic!("{text}"),
        })
    }

    #[test]
    fn the_defaults_load_a_lone_node() {
        let (plan, output) = try_parse("").unwrap();
        assert_eq!((&plan.endpoints[..], plan.protocol), (&["127.0.0.1:9121".to_owned()][..], Protocol::Http));
        assert_eq!((plan.connections, plan.pipeline, plan.rate, plan.reads_percent), (64, 1, None, 0));
        assert_eq!((plan.value_bytes, plan.keys, plan.duration), (128, 100_000, Some(DURATION_DEFAULT)));
        assert_eq!((output.format, output.json, output.svg), (Format::Table, None, None));
        assert_eq!(try_parse("--stop-after 5").unwrap().0.duration, None, "the number of operations ends it");
    }

    #[test]
    fn every_flag_is_read() {
        let line = "--protocol etcd --connections 4 --pipeline 16 --rate 1000 --arrivals fixed --threads 2 --duration 3s \
                    --warm-up 0s --stop-after 7 --timeout 5s --reads 90 --consistency stale --value-bytes 1KiB --keys 9 \
                    --distribution zipf --preload --seed 0 --output json --json a --svg b http://a:1/ http://[::1]:2";
        for line in [line.to_owned(), line.replace("--", "-")] {
            let (plan, output) = try_parse(&line).unwrap();
            assert_eq!(plan.endpoints, ["a:1", "[::1]:2"]);
            assert_eq!((plan.protocol, plan.connections, plan.pipeline, plan.threads), (Protocol::Etcd, 4, 16, 2));
            assert_eq!((plan.rate, plan.arrivals, plan.stop_after), (Some(1000.0), Arrivals::Fixed, Some(7)));
            assert_eq!((plan.duration, plan.warm_up), (Some(Duration::from_secs(3)), Duration::ZERO));
            assert_eq!((plan.timeout, plan.reads_percent), (Duration::from_secs(5), 90));
            assert_eq!((plan.consistency, plan.value_bytes, plan.keys), (Consistency::Stale, 1024, 9));
            assert_eq!((plan.distribution, plan.preload, plan.seed), (Distribution::Zipf, true, 0));
            assert_eq!((output.format, output.json, output.svg), (Format::Json, Some("a".into()), Some("b".into())));
        }
    }

    /// Each line names the flag and the value, and says what would be right.
    #[test]
    fn what_cannot_be_used_is_refused_in_one_line() {
        for (typed, parts) in [
            ("--connections 0", ["--connections \"0\"", "from 1 to 50000"]),
            ("--connections 1 http://a:1 http://b:1", ["--connections \"1\"", "endpoints, which are 2"]),
            ("--pipeline -1", ["--pipeline \"-1\"", "from 1 to 10000"]),
            ("--rate fast", ["--rate \"fast\"", "whole number"]),
            ("--arrivals often", ["--arrivals \"often\"", "poisson or fixed"]),
            ("--threads 0", ["--threads \"0\"", "from 1"]),
            ("--duration 10", ["--duration \"10\"", "from 100ms"]),
            ("--warm-up 2h", ["--warm-up \"2h\"", "from 0m to 60m"]),
            ("--stop-after 0", ["--stop-after \"0\"", "from 1"]),
            ("--timeout 0s", ["--timeout \"0s\"", "from 10ms to 10m"]),
            ("--reads 101", ["--reads \"101\"", "from 0 to 100"]),
            ("--consistency strong", ["--consistency \"strong\"", "linearizable or stale"]),
            ("--value-bytes 5MiB", ["--value-bytes \"5MiB\"", "to 4MiB"]),
            ("--keys 0", ["--keys \"0\"", "from 1 to 100000000000"]),
            ("--distribution normal", ["--distribution \"normal\"", "uniform, zipf or sequential"]),
            ("--seed x", ["--seed \"x\"", "whole number"]),
            ("--protocol redis", ["--protocol \"redis\"", "http, etcd, etcd-json or plain"]),
            ("--output svg", ["--output \"svg\"", "table or json"]),
            ("--json", ["--json has no value", "--json <FILE>"]),
            ("--preload=yes", ["--preload takes no value", "\"yes\""]),
            ("127.0.0.1:9121", ["endpoint \"127.0.0.1:9121\"", "use http://HOST:PORT"]),
            ("https://a:1", ["endpoint \"https://a:1\"", "use http://HOST:PORT"]),
            ("http://a:1 http://a/x", ["endpoint \"http://a/x\"", "use http://HOST:PORT"]),
            ("--conections 1", ["unknown flag \"--conections\"", "did you mean --connections?"]),
            ("--qqqq", ["unknown flag \"--qqqq\"", "--help"]),
        ] {
            let line = try_parse(typed).expect_err(typed);
            assert!(parts.iter().all(|part| line.contains(part)) && !line.contains('\n'), "{typed}: {line}");
        }
    }

    #[test]
    fn the_flags_are_well_formed() {
        Flags::command().debug_assert();
    }
}
