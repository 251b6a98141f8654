//! What a torment is asked for: the command line, the faults by name, and the command that repeats a run. It takes
//! libtest's own arguments too, for `cargo test` passes them to every test target.

use std::time::Duration;

use clap::{Parser, ValueEnum};

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Fault {
    /// kill -9 of a member, the leader, a majority, or all at once; started again
    Kill,
    /// SIGSTOP and, up to 4 s later, SIGCONT of a member, the leader or a majority
    Pause,
    /// Members in groups that do not hear each other
    Partition,
    /// A member that is not heard, or hears nobody
    OneWay,
    /// Links with a delay of up to 300 ms, one or all
    Slow,
    /// Connections that break in the middle
    Loss,
    /// Links that pass a few bytes at a time
    Trickle,
    /// Packets that are lost, some or all, one way or both. Needs root and nftables, in a network of our own
    Packets,
    /// A directory that is lost: the member must refuse to run, and is replaced
    Wipe,
    /// A bit flipped in the log or a snapshot: the member recovers, or refuses with the file and is replaced
    Flip,
    /// Members that come and go, leaders too
    Churn,
    /// A sync of the log that fails once: the member must stop by itself. Needs a C compiler
    Fsync,
    /// A disk without room: writes are refused until there is some. Needs root
    DiskFull,
    /// Power cuts of one, a majority or all: what was not synced is gone. Needs root and a C compiler
    PowerCut,
}

impl Fault {
    /// What is done to the links rather than to a member.
    pub fn is_of_the_network(self) -> bool {
        matches!(self, Fault::Partition | Fault::OneWay | Fault::Slow | Fault::Loss | Fault::Trickle | Fault::Packets)
    }

    pub fn needs_disks(self) -> bool {
        matches!(self, Fault::DiskFull | Fault::PowerCut)
    }

    pub fn needs_root(self) -> bool {
        self.needs_disks() || self == Fault::Packets
    }

    pub fn needs_c_compiler(self) -> bool {
        matches!(self, Fault::Fsync | Fault::PowerCut)
    }

    /// A member that is lost can be replaced where the others are a majority.
    pub fn nodes_min(self) -> u64 {
        if matches!(self, Fault::Wipe | Fault::Flip) { 3 } else { 1 }
    }

    /// How often it is chosen, against the others of its kind.
    pub fn weight(self) -> usize {
        match self {
            Fault::Kill => 12,
            Fault::Partition | Fault::PowerCut => 6,
            Fault::Pause | Fault::Packets => 4,
            Fault::OneWay | Fault::Loss | Fault::Slow => 2,
            Fault::Fsync | Fault::Churn => 2,
            Fault::Trickle | Fault::Wipe | Fault::Flip | Fault::DiskFull => 1,
        }
    }

    /// As on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no fault is hidden").get_name().to_owned()
    }
}

/// Torments a cluster of real processes while clients write and read through every member, heals it, and checks that
/// nothing that was acknowledged is lost and that every answer was linearizable.
#[derive(Debug, Clone, Parser)]
#[command(name = "scripts/torment", bin_name = "scripts/torment", max_term_width = 100, after_help = EXAMPLES)]
pub struct Options {
    /// Members that found the cluster
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    pub nodes: u64,
    /// Repeats the faults and the requests of a run, as far as processes can be repeated; chosen at random if not given
    #[arg(long)]
    pub seed: Option<u64>,
    /// How long, at most; without --kills and --partitions exactly so long [default: 0.3, or no bound with those]
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Goes on until so many processes were killed with -9
    #[arg(long)]
    pub kills: Option<u64>,
    /// Goes on until the members were parted so often
    #[arg(long)]
    pub partitions: Option<u64>,
    /// These faults only [default: all that need no root]
    #[arg(long, value_delimiter = ',', value_name = "FAULT,…")]
    pub only: Vec<Fault>,
    /// Without these faults
    #[arg(long, value_delimiter = ',', value_name = "FAULT,…", hide_possible_values = true)]
    pub without: Vec<Fault>,
    /// All faults, those that need root too
    #[arg(long, conflicts_with = "only")]
    pub all: bool,
    /// Clients, each with one request at a time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub clients: u64,
    /// Requests a second, all clients together
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub rate: u64,
    /// Keeps logs, data and history of a good run too
    #[arg(long)]
    pub keep: bool,
    #[command(flatten)]
    libtest: Libtest,
}

const EXAMPLES: &str = "\
Examples:
  scripts/torment --seed 7 --minutes 2
  scripts/torment --nodes 5 --kills 1000 --partitions 200
  scripts/torment --only kill,partition --minutes 5
  sudo -E scripts/torment --all --minutes 10

The last line sums the run up. Exit code: 0 if all is well, 1 if not; then the command that repeats
the run is printed, and under target/torment/SEED/ are the members' logs and data, what was done when,
the history, and a drawing of what is wrong with it.";

/// What `cargo test -- …` may say to every test target.
#[derive(Debug, Clone, clap::Args)]
struct Libtest {
    #[arg(hide = true)]
    filters: Vec<String>,
    #[arg(long, hide = true)]
    skip: Vec<String>,
    #[arg(long, hide = true)]
    exact: bool,
    #[arg(long, hide = true)]
    ignored: bool,
    #[arg(long, hide = true)]
    list: bool,
    #[arg(long, hide = true)]
    include_ignored: bool,
    #[arg(long, hide = true)]
    nocapture: bool,
    #[arg(long, hide = true)]
    no_capture: bool,
    #[arg(long, hide = true)]
    show_output: bool,
    #[arg(long, short, hide = true)]
    quiet: bool,
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
    #[arg(long, hide = true)]
    color: Option<String>,
    #[arg(long, hide = true)]
    format: Option<String>,
    #[arg(short = 'Z', hide = true)]
    unstable: Vec<String>,
}

impl Options {
    /// Whether libtest's arguments leave anything to run; lists the one test where they ask for a list.
    pub fn is_wanted(&self) -> bool {
        const NAME: &str = "torment";
        let asked = &self.libtest;
        let matches = |filter: &String| if asked.exact { NAME == filter } else { NAME.contains(filter.as_str()) };
        let chosen = asked.filters.is_empty() || asked.filters.iter().any(matches);
        let chosen = chosen && !asked.ignored && !asked.skip.iter().any(matches);
        if asked.list && chosen {
            println!("{NAME}: test");
        }
        chosen && !asked.list
    }

    /// The faults that are asked for, in the order of their names' declaration.
    pub fn faults(&self) -> Vec<Fault> {
        let every = Fault::value_variants().iter().copied();
        every
            .filter(
                |fault| {
                    if self.only.is_empty() { self.all || !fault.needs_root() } else { self.only.contains(fault) }
                },
            )
            .filter(|fault| !self.without.contains(fault))
            .collect()
    }

    /// Without any bound, a run ends when it has killed and parted enough.
    pub fn time_max(&self) -> Duration {
        let counted = self.kills.is_some() || self.partitions.is_some();
        let minutes = self.minutes.unwrap_or(if counted { 24.0 * 60.0 } else { 0.3 });
        Duration::from_secs_f64(minutes.max(0.0) * 60.0)
    }

    /// The one command that repeats this run.
    pub fn command(&self, seed: u64) -> String {
        let mut command = format!("scripts/torment --seed {seed} --nodes {}", self.nodes);
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                command.push_str(&format!(" --{name} {value}"));
            }
        };
        add("minutes", self.minutes.map(|minutes| minutes.to_string()));
        add("kills", self.kills.map(|kills| kills.to_string()));
        add("partitions", self.partitions.map(|partitions| partitions.to_string()));
        add("clients", (self.clients != 8).then(|| self.clients.to_string()));
        add("rate", (self.rate != 600).then(|| self.rate.to_string()));
        let faults: Vec<_> = self.faults().into_iter().map(Fault::name).collect();
        add("only", Some(faults.join(",")));
        command
    }
}
