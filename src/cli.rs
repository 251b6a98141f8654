//! The command line: flags and `RAFTKV_…` variables become a checked [`Config`], or one line that says what is wrong
//! and what would be right. Flag over environment over default; an empty variable counts as not set, as in etcd.
//!
//! Called by `main` only. Starts nothing and touches no file: whether `--id` must be in `--cluster` depends on the
//! data directory, so that is the server's to ask ([`Config::check_founding`]).

pub mod bench;

use std::env;
use std::ffi::OsString;
use std::fmt::{self, Display};
use std::io::{self, ErrorKind::BrokenPipe, Write};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};

use crate::cluster::{Member, PeerUrl, URLS_MAX};
use crate::config::{
    CLUSTER_DEFAULT, Config, LogFormat, VALUE_BYTES_MAX, WAL_SEGMENT_BYTES_MAX, WAL_SEGMENT_BYTES_MIN,
};

const TICK: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(10);
/// Fewer than three, and one delayed heartbeat starts an election.
const ELECTION_TICKS: RangeInclusive<u64> = 3..=1000;
const SNAPSHOT_INTERVAL: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(7 * 24 * 3600);
const REQUEST_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);

/// What the user asked for.
#[derive(Debug)]
pub struct Args {
    pub config: Config,
    pub log_format: LogFormat,
}

/// Reads the process's arguments, the program's name first, and its environment.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Args, Exit> {
    let args = two_dashes(args);
    let command = Flags::command().mut_args(|arg| match arg.get_env().and_then(env::var_os) {
        Some(value) if value.is_empty() => arg.env(None),
        _ => arg,
    });
    let flags = command.clone().try_get_matches_from(&args).and_then(|matches| Flags::from_arg_matches(&matches));
    match flags {
        Ok(flags) => Ok(flags.into_args()),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            Err(Exit::Shown(error))
        }
        Err(error) => Err(Exit::Usage(one_line(&error, &command, &args))),
    }
}

/// Why no server is to be started.
#[derive(Debug)]
pub enum Exit {
    /// The user asked for the help or the version, and this is it.
    Shown(clap::Error),
    /// What the user typed cannot be used; one line without the program's name.
    Usage(String),
}

impl Exit {
    /// Writes what there is to say where it belongs, and tells the exit code: 0, 2, or 1 if it could not be written.
    pub fn report(self) -> ExitCode {
        match self {
            Exit::Shown(text) => match text.print().and_then(|()| io::stdout().flush()) {
                Ok(()) => ExitCode::SUCCESS,
                // The reader has seen enough: `raftkv --help | head -1`.
                Err(error) if error.kind() == BrokenPipe => ExitCode::SUCCESS,
                Err(error) => complain(format_args!("write to stdout: {error}"), 1),
            },
            Exit::Usage(line) => complain(line, 2),
        }
    }
}

/// Writes one line to stderr, after the program's name, and returns the exit code.
pub fn complain(line: impl Display, code: u8) -> ExitCode {
    // Not `eprintln!`, which panics where stderr is closed; then nobody is left to tell, and the code says enough.
    writeln!(io::stderr(), "raftkv: {line}").ok();
    ExitCode::from(code)
}

const ABOUT: &str = "\
    A replicated key-value server, used with curl. A write is acknowledged when it is on the disks of a majority of the \
    members. While a majority runs, every member takes writes and reads, and nothing that was acknowledged is lost.";

const EXAMPLES: &str = "\
Every flag can also be set in the environment, as RAFTKV_ and its name. A flag goes before the environment, the \
environment before the default. Flags with one dash work too: -id 1. RUST_LOG chooses what is logged: info, debug, or \
warn,raftkv::node=debug.

Examples:
  One durable node, a write and a read:
    cargo run --release
    curl -L http://127.0.0.1:9121/my-key -XPUT -d hello
    curl -L http://127.0.0.1:9121/my-key

  Three members, each started with the same list and its own place in it:
    members=http://127.0.0.1:12379,http://127.0.0.1:22379,http://127.0.0.1:32379
    cargo run --release -- --id 1 --cluster $members --port 12380
    cargo run --release -- --id 2 --cluster $members --port 22380
    cargo run --release -- --id 3 --cluster $members --port 32380
  Any of them takes writes and reads:
    curl -L http://127.0.0.1:12380/my-key -XPUT -d hello
    curl -L http://127.0.0.1:32380/my-key
    curl -L http://127.0.0.1:22380/status

Load, on this server or any other; raftkv bench --help tells more:
    raftkv bench http://127.0.0.1:9121

Exit codes: 0 stopped as asked, 1 stopped by a fault, 2 cannot start with these flags.";

#[derive(Debug, Parser)]
#[command(name = "raftkv", version, about = ABOUT, after_help = EXAMPLES)]
#[command(args_override_self = true, allow_negative_numbers = true, max_term_width = 120)]
struct Flags {
    /// This member: its place in --cluster, the first is 1
    #[arg(long, env = "RAFTKV_ID", value_name = "ID", default_value = "1", hide_env_values = true)]
    #[arg(help_heading = "Membership", value_parser = value(id))]
    id: u64,

    /// The founding members' peer URLs, comma-separated, the same on each; URLs of one member are joined by +. Read on
    /// the first start only: afterwards the data directory knows the members
    #[arg(long, env = "RAFTKV_CLUSTER", value_name = "URL,URL", default_value = CLUSTER_DEFAULT)]
    #[arg(help_heading = "Membership", hide_env_values = true, value_parser = value(founders))]
    cluster: Founders,

    /// Join the cluster that --cluster lists, to which this member was added with POST; on the first start only
    #[arg(long, env = "RAFTKV_JOIN", value_name = "true|false", default_value = "false", hide_env_values = true)]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(help_heading = "Membership", value_parser = value(switch))]
    join: bool,

    /// Port for clients, on all interfaces; 0 takes a free one
    #[arg(long, env = "RAFTKV_PORT", value_name = "PORT", default_value = "9121", hide_env_values = true)]
    #[arg(help_heading = "Addresses", value_parser = value(port))]
    port: u16,

    /// Address for clients, instead of all interfaces at --port
    #[arg(long, env = "RAFTKV_LISTEN", value_name = "HOST:PORT", hide_env_values = true)]
    #[arg(help_heading = "Addresses", value_parser = value(host_port))]
    listen: Option<String>,

    /// Address for peers, where it differs from this member's own URLs in --cluster, which the others dial
    #[arg(long, env = "RAFTKV_LISTEN_PEER", value_name = "HOST:PORT", hide_env_values = true)]
    #[arg(help_heading = "Addresses", value_parser = value(host_port))]
    listen_peer: Option<String>,

    /// Directory of this member's log and identity; never share or copy it [default: raftkv-ID]
    #[arg(long, env = "RAFTKV_DATA_DIR", value_name = "DIR", hide_env_values = true, help_heading = "Storage")]
    data_dir: Option<PathBuf>,

    /// Size of a log segment; a spare is made ready in time
    #[arg(long, env = "RAFTKV_WAL_SEGMENT_BYTES", value_name = "BYTES", default_value = "64MiB")]
    #[arg(help_heading = "Storage", hide_env_values = true)]
    #[arg(value_parser = value(|text| bytes(text, WAL_SEGMENT_BYTES_MIN..=WAL_SEGMENT_BYTES_MAX)))]
    wal_segment_bytes: u64,

    /// Entries since the last snapshot that make one due; one of several writes counts as so many
    #[arg(long, env = "RAFTKV_SNAPSHOT_COUNT", value_name = "ENTRIES", default_value = "10000")]
    #[arg(help_heading = "Snapshots", hide_env_values = true, value_parser = value(|text| number(text, 1..=u64::MAX)))]
    snapshot_count: u64,

    /// Time since the last snapshot that makes one due, if there are enough new entries; 0s turns it off
    #[arg(long, env = "RAFTKV_SNAPSHOT_INTERVAL", value_name = "TIME", default_value = "0s", hide_env_values = true)]
    #[arg(help_heading = "Snapshots", value_parser = value(|text| duration(text, SNAPSHOT_INTERVAL)))]
    snapshot_interval: Duration,

    /// New entries that --snapshot-interval asks for
    #[arg(long, env = "RAFTKV_SNAPSHOT_MIN_ENTRIES", value_name = "ENTRIES", default_value = "1000")]
    #[arg(help_heading = "Snapshots", hide_env_values = true, value_parser = value(|text| number(text, 1..=u64::MAX)))]
    snapshot_min_entries: u64,

    /// Bytes of log since the last snapshot that make one due
    #[arg(long, env = "RAFTKV_SNAPSHOT_LOG_BYTES", value_name = "BYTES", default_value = "64MiB")]
    #[arg(help_heading = "Snapshots", hide_env_values = true)]
    #[arg(value_parser = value(|text| bytes(text, 1 << 20..=1 << 40)))]
    snapshot_log_bytes: u64,

    /// Snapshot files kept
    #[arg(long, env = "RAFTKV_SNAPSHOT_KEEP", value_name = "FILES", default_value = "2", hide_env_values = true)]
    #[arg(help_heading = "Snapshots", value_parser = value(|text| number(text, 1..=1000)))]
    snapshot_keep: u64,

    /// Entries kept in the log, at least, for followers that are slow or away for a moment
    #[arg(long, env = "RAFTKV_SNAPSHOT_CATCHUP_ENTRIES", value_name = "ENTRIES", default_value = "10000")]
    #[arg(help_heading = "Snapshots", hide_env_values = true, value_parser = value(|text| number(text, 0..=u64::MAX)))]
    snapshot_catchup_entries: u64,

    /// Bytes that these may take at most
    #[arg(long, env = "RAFTKV_SNAPSHOT_CATCHUP_BYTES", value_name = "BYTES", default_value = "64MiB")]
    #[arg(help_heading = "Snapshots", hide_env_values = true, value_parser = value(|text| bytes(text, 0..=1 << 40)))]
    snapshot_catchup_bytes: u64,

    /// Time between heartbeats of the leader
    #[arg(long, env = "RAFTKV_TICK", value_name = "TIME", default_value = "100ms", hide_env_values = true)]
    #[arg(help_heading = "Timing", value_parser = value(|text| duration(text, TICK)))]
    tick: Duration,

    /// Ticks without a heartbeat after which a follower stands for election
    #[arg(long, env = "RAFTKV_ELECTION_TICKS", value_name = "TICKS", default_value = "10", hide_env_values = true)]
    #[arg(help_heading = "Timing", value_parser = value(|text| number(text, ELECTION_TICKS)))]
    election_ticks: u64,

    /// Time that a request may wait for a leader and for its commit
    #[arg(long, env = "RAFTKV_REQUEST_TIMEOUT", value_name = "TIME", default_value = "5s", hide_env_values = true)]
    #[arg(help_heading = "Timing", value_parser = value(|text| duration(text, REQUEST_TIMEOUT)))]
    request_timeout: Duration,

    /// Largest value that a client may write; 4MiB at most
    #[arg(long, env = "RAFTKV_MAX_VALUE_BYTES", value_name = "BYTES", default_value = "1MiB", hide_env_values = true)]
    #[arg(help_heading = "Limits and logs", value_parser = value(|text| bytes(text, 1..=VALUE_BYTES_MAX)))]
    max_value_bytes: u64,

    /// How log lines are written to stderr
    #[arg(long, env = "RAFTKV_LOG_FORMAT", value_name = "text|json", default_value = "text", hide_env_values = true)]
    #[arg(help_heading = "Limits and logs", value_parser = value(log_format))]
    log_format: LogFormat,
}

impl Flags {
    fn into_args(self) -> Args {
        let config = Config {
            id: self.id,
            cluster: self.cluster.0,
            listen: self.listen,
            port: self.port,
            listen_peer: self.listen_peer,
            data_dir: self.data_dir.unwrap_or_else(|| PathBuf::from(format!("raftkv-{}", self.id))),
            tick: self.tick,
            election_ticks: usize::try_from(self.election_ticks).expect("its bound fits"),
            request_timeout: self.request_timeout,
            max_value_bytes: self.max_value_bytes,
            wal_segment_bytes: self.wal_segment_bytes,
            join: self.join,
            snapshot_count: self.snapshot_count,
            snapshot_interval: self.snapshot_interval,
            snapshot_min_entries: self.snapshot_min_entries,
            snapshot_log_bytes: self.snapshot_log_bytes,
            snapshot_keep: usize::try_from(self.snapshot_keep).expect("its bound fits"),
            snapshot_catchup_entries: self.snapshot_catchup_entries,
            snapshot_catchup_bytes: self.snapshot_catchup_bytes,
        };
        Args { config, log_format: self.log_format }
    }
}

/// Go's flags have one dash or two; ours have two, and one-letter flags have one.
fn two_dashes(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut open = true;
    args.enumerate()
        .map(|(place, arg)| {
            let bytes = arg.as_encoded_bytes();
            open &= bytes != b"--";
            let one_dash = place > 0 && open && bytes.len() > 2 && bytes[0] == b'-' && bytes[1].is_ascii_alphabetic();
            if !one_dash {
                return arg;
            }
            let mut long = OsString::from("-");
            long.push(arg);
            long
        })
        .collect()
}

/// What is wrong and what would be right, without the usage that clap would print below.
fn one_line(error: &clap::Error, command: &clap::Command, args: &[OsString]) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    // clap names a flag with its value's name behind it: `--tick <TIME>`.
    let arg = context(ContextKind::InvalidArg);
    let flag = arg.split(' ').next().unwrap_or(arg);
    let value = context(ContextKind::InvalidValue);
    match error.kind() {
        ErrorKind::ValueValidation => {
            let name = variable(flag, command, args).unwrap_or_else(|| flag.to_owned());
            let why = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            // A positional one is shown as `[ENDPOINT]...`.
            let name = if name.starts_with('-') || name.starts_with("RAFTKV_") { name } else { "endpoint".to_owned() };
            format!("{name} {value:?}: {why}")
        }
        ErrorKind::InvalidValue => format!("{flag} has no value; use {arg}"),
        ErrorKind::TooManyValues => format!("{flag} takes no value, but has {value:?}"),
        ErrorKind::UnknownArgument if !arg.starts_with('-') => {
            format!("unexpected argument {arg:?}: everything is set by flags, see --help")
        }
        ErrorKind::UnknownArgument => match context(ContextKind::SuggestedArg) {
            "" => format!("unknown flag {arg:?}; --help lists them"),
            nearest => format!("unknown flag {arg:?}; did you mean {nearest}?"),
        },
        // None of the others can come of flags that are all optional and stand alone.
        kind => format!("{kind}: {arg} {value}"),
    }
}

/// The variable that a flag's value came from, if it did.
fn variable(flag: &str, command: &clap::Command, args: &[OsString]) -> Option<String> {
    let given = args.iter().any(|arg| {
        let rest = arg.as_encoded_bytes().strip_prefix(flag.as_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'=')
    });
    if given {
        return None;
    }
    let arg = command.get_arguments().find(|arg| arg.get_long() == flag.strip_prefix("--"))?;
    Some(arg.get_env()?.to_string_lossy().into_owned())
}

/// A clap parser of `parse`, whose error says what would be right.
fn value<T>(
    parse: impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static,
) -> impl TypedValueParser<Value = T>
where
    T: Clone + Send + Sync + 'static,
{
    OsStringValueParser::new().try_map(move |raw| match raw.to_str() {
        Some(text) => parse(text),
        None => Err("is not UTF-8".to_owned()),
    })
}

/// `--cluster`, as a type of its own: clap reads a bare `Vec` as a flag that repeats.
#[derive(Debug, Clone)]
struct Founders(Vec<Member>);

fn founders(text: &str) -> Result<Founders, String> {
    let mut members: Vec<Member> = Vec::new();
    for (id, entry) in (1..).zip(text.split(',')) {
        let mut urls = Vec::new();
        for url in entry.split('+') {
            if url.is_empty() {
                return Err(format!(
                    "entry {id} lacks a URL; a list looks like http://10.0.0.1:12379,http://10.0.0.2:12379"
                ));
            }
            let url = PeerUrl::parse(url).map_err(|error| error.to_string())?;
            if urls.contains(&url) || members.iter().any(|member| member.urls.contains(&url)) {
                return Err(format!("{url} is listed twice; each URL belongs to one member, once"));
            }
            if urls.len() == URLS_MAX {
                return Err(format!("entry {id} has more URLs than a member may have, which is {URLS_MAX}"));
            }
            urls.push(url);
        }
        members.push(Member { id, urls });
    }
    Ok(Founders(members))
}

fn id(text: &str) -> Result<u64, String> {
    match digits(text) {
        Some(id) if id != 0 => Ok(id),
        _ => Err("an ID is a whole number from 1, the place of this member in --cluster".to_owned()),
    }
}

fn port(text: &str) -> Result<u16, String> {
    digits(text).ok_or_else(|| "a port is a whole number up to 65535".to_owned())
}

fn host_port(text: &str) -> Result<String, String> {
    let wrong = |why| format!("{why}; use HOST:PORT, for example 127.0.0.1:9121, 0.0.0.0:9121 or [::1]:9121");
    let (host, port) = text.rsplit_once(':').ok_or_else(|| wrong("no port"))?;
    // The hosts of a URL, so that both can be dialled and bound alike.
    PeerUrl::parse(&format!("http://{host}:1")).map_err(|_| wrong("no valid host"))?;
    digits::<u16>(port).ok_or_else(|| wrong("no valid port"))?;
    Ok(text.to_owned())
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err("use true or false".to_owned()),
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("use text or json".to_owned()),
    }
}

fn number(text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    digits(text)
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("use a whole number from {} to {}", range.start(), range.end()))
}

const TIME_UNITS: &[(&str, u64)] = &[("ms", 1), ("s", 1000), ("m", 60_000)];

fn duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let millis = |duration: &Duration| duration.as_millis() as u64;
    let shown = |duration| Scaled { amount: millis(duration), units: TIME_UNITS };
    scaled(text, TIME_UNITS).map(Duration::from_millis).filter(|duration| range.contains(duration)).ok_or_else(|| {
        format!("use a time like 100ms, 5s or 1m, from {} to {}", shown(range.start()), shown(range.end()))
    })
}

const BYTE_UNITS: &[(&str, u64)] = &[("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

fn bytes(text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    let shown = |amount: &u64| Scaled { amount: *amount, units: BYTE_UNITS };
    scaled(text, BYTE_UNITS).filter(|bytes| range.contains(bytes)).ok_or_else(|| {
        format!("use bytes like 65536, 64KiB or 1MiB, from {} to {}", shown(range.start()), shown(range.end()))
    })
}

/// A whole number with one of the `units` behind it.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    digits::<u64>(number)?.checked_mul(*factor)
}

/// An amount in the largest of the `units`, rising, that divides it.
struct Scaled {
    amount: u64,
    units: &'static [(&'static str, u64)],
}

impl Display for Scaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let largest = self.units.iter().rev().find(|(_, factor)| self.amount.is_multiple_of(*factor));
        let (unit, factor) = largest.expect("the first unit is 1");
        write!(f, "{}{unit}", self.amount / factor)
    }
}

/// Digits only: `parse` alone would take a sign.
fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_parse(line: &str) -> Result<Args, String> {
        let args = ["raftkv"].into_iter().chain(line.split(' ').filter(|arg| !arg.is_empty()));
        parse(args.map(OsString::from)).map_err(|exit| match exit {
            Exit::Usage(line) => line,
            Exit::Shown(text) => panic!("{text}"),
        })
    }

    #[test]
    fn the_defaults_are_those_of_raftexample() {
        let Args { config, log_format } = try_parse("").unwrap();
        assert_eq!((config.id, config.port, log_format), (1, 9121, LogFormat::Text));
        assert_eq!(config.cluster.len(), 1);
        assert_eq!(config.cluster[0].id, 1);
        assert_eq!(config.cluster[0].urls, [PeerUrl::parse("http://127.0.0.1:9021").unwrap()]);
        assert_eq!((config.listen, config.listen_peer), (None, None));
        assert_eq!(config.data_dir, PathBuf::from("raftkv-1"));
        assert_eq!((config.tick, config.election_ticks), (Duration::from_millis(100), 10));
        assert_eq!(config.request_timeout, Duration::from_secs(5));
        assert_eq!((config.max_value_bytes, config.wal_segment_bytes), (1 << 20, 64 << 20));
    }

    #[test]
    fn every_flag_is_read() {
        let line = "--id 2 --cluster http://a:1,http://b:2+http://c:3 --port 0 --listen [::1]:80 --listen-peer b:2 \
                    --data-dir d --tick 10s --election-ticks 3 --request-timeout 10m --max-value-bytes 4MiB \
                    --wal-segment-bytes 1GiB --log-format json";
        for line in
            [line.to_owned(), line.replace("--", "-"), line.replace("10s", "10000ms").replace("4MiB", "4194304")]
        {
            let Args { config, log_format } = try_parse(&line).unwrap();
            assert_eq!((config.id, config.port, log_format), (2, 0, LogFormat::Json));
            let urls: Vec<_> = config.cluster.iter().map(|member| (member.id, member.urls.len())).collect();
            assert_eq!(urls, [(1, 1), (2, 2)]);
            assert_eq!(config.listen.as_deref(), Some("[::1]:80"));
            assert_eq!(config.listen_peer.as_deref(), Some("b:2"));
            assert_eq!(config.data_dir, PathBuf::from("d"));
            assert_eq!((config.tick, config.election_ticks), (Duration::from_secs(10), 3));
            assert_eq!(config.request_timeout, Duration::from_secs(600));
            assert_eq!((config.max_value_bytes, config.wal_segment_bytes), (4 << 20, 1 << 30));
            config.check_founding().unwrap();
        }
    }

    #[test]
    fn go_style_flags_are_read_as_go_reads_them() {
        assert_eq!(try_parse("-id 1 -port=12380").unwrap().config.port, 12380);
        assert_eq!(try_parse("-id=3 --id=2").unwrap().config.id, 2, "the last one counts");
        assert_eq!(try_parse("-data-dir=x").unwrap().config.data_dir, PathBuf::from("x"));
    }

    /// Each line names the flag and the value, and says what would be right.
    #[test]
    fn what_cannot_be_used_is_refused_in_one_line() {
        let urls: Vec<String> = (1..18).map(|port| format!("http://a:{port}")).collect();
        let seventeen_urls = format!("--cluster {}", urls.join("+"));
        for (typed, parts) in [
            ("--id 0", ["--id \"0\"", "from 1"]),
            ("--id -1", ["--id \"-1\"", "from 1"]),
            ("--id +1", ["--id \"+1\"", "from 1"]),
            ("--id 99999999999999999999", ["--id \"99999999999999999999\"", "from 1"]),
            ("--id", ["--id has no value", "--id <ID>"]),
            ("--id --port 1", ["--id has no value", "--id <ID>"]),
            ("--cluster=", ["--cluster \"\"", "entry 1 lacks a URL"]),
            ("--cluster http://a:1,", ["--cluster \"http://a:1,\"", "entry 2 lacks a URL"]),
            ("--cluster http://a:1+", ["--cluster \"http://a:1+\"", "entry 1 lacks a URL"]),
            ("--cluster http://a:1,http://A:01", ["--cluster", "http://a:1 is listed twice"]),
            ("--cluster http://a:1+http://a:1", ["--cluster", "http://a:1 is listed twice"]),
            (&seventeen_urls, ["--cluster", "entry 1 has more URLs than a member may have, which is 16"]),
            ("--cluster http://a:1/", ["\"http://a:1/\" has a path", "looks like http://"]),
            ("--cluster a:1", ["\"a:1\" does not start", "looks like http://"]),
            ("--port 65536", ["--port \"65536\"", "up to 65535"]),
            ("--port http", ["--port \"http\"", "up to 65535"]),
            ("--listen 80", ["--listen \"80\": no port", "use HOST:PORT"]),
            ("--listen :80", ["--listen \":80\": no valid host", "0.0.0.0:9121"]),
            ("--listen ::1:80", ["--listen \"::1:80\": no valid host", "[::1]:9121"]),
            ("--listen a:-1", ["--listen \"a:-1\": no valid port", "use HOST:PORT"]),
            ("--listen-peer http://a:1", ["--listen-peer \"http://a:1\": no valid host", "use HOST:PORT"]),
            ("--data-dir=", ["--data-dir has no value", "<DIR>"]),
            ("--tick 100", ["--tick \"100\"", "from 1ms to 10s"]),
            ("--tick 0ms", ["--tick \"0ms\"", "from 1ms to 10s"]),
            ("--tick 11s", ["--tick \"11s\"", "from 1ms to 10s"]),
            ("--tick 1.5s", ["--tick \"1.5s\"", "like 100ms, 5s or 1m"]),
            ("--tick s", ["--tick \"s\"", "like 100ms, 5s or 1m"]),
            ("--tick 18446744073709551615m", ["--tick", "from 1ms to 10s"]),
            ("--election-ticks 2", ["--election-ticks \"2\"", "from 3 to 1000"]),
            ("--election-ticks 1001", ["--election-ticks \"1001\"", "from 3 to 1000"]),
            ("--request-timeout 99ms", ["--request-timeout \"99ms\"", "from 100ms to 10m"]),
            ("--request-timeout 11m", ["--request-timeout \"11m\"", "from 100ms to 10m"]),
            ("--max-value-bytes 0", ["--max-value-bytes \"0\"", "from 1 to 4MiB"]),
            ("--max-value-bytes 4194305", ["--max-value-bytes \"4194305\"", "from 1 to 4MiB"]),
            ("--max-value-bytes 1MB", ["--max-value-bytes \"1MB\"", "64KiB or 1MiB"]),
            ("--wal-segment-bytes 15MiB", ["--wal-segment-bytes \"15MiB\"", "from 16MiB to 1GiB"]),
            ("--log-format xml", ["--log-format \"xml\"", "use text or json"]),
            ("--log-format TEXT\n", ["--log-format \"TEXT\\n\"", "use text or json"]),
            ("--tik 1s", ["unknown flag \"--tik\"", "did you mean --tick?"]),
            ("-prot 1", ["unknown flag \"--prot\"", "did you mean --port?"]),
            ("--qqqq", ["unknown flag \"--qqqq\"", "--help"]),
            ("-x", ["unknown flag \"-x\"", "--help"]),
            ("get my-key", ["unexpected argument \"get\"", "--help"]),
            ("-- id", ["unexpected argument \"id\"", "--help"]),
            ("--help=me", ["--help takes no value", "\"me\""]),
        ] {
            let line = try_parse(typed).expect_err(typed);
            assert!(parts.iter().all(|part| line.contains(part)) && !line.contains('\n'), "{typed}: {line}");
        }
    }

    /// Only a first start needs it: a member that was added later has a place of its own, and restarts with any list.
    #[test]
    fn an_id_outside_the_list_is_left_to_the_server() {
        let config = try_parse("--id 4 --cluster http://a:1,http://b:1").unwrap().config;
        let error = config.check_founding().unwrap_err().to_string();
        assert!(error.contains("--id 4") && error.contains("members 1 to 2"), "{error}");
    }

    #[test]
    fn the_flags_are_well_formed() {
        Flags::command().debug_assert();
    }
}
