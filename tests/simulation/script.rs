//! Golden scripts: stories of a cluster in the simulated world, as text. A line that begins with `>` is a command; the
//! lines below it are what it printed, what the nodes logged and what happened meanwhile, with the time since the
//! command. A run writes those lines anew and compares. All oracles listen, and each script ends with `agree`: all is
//! made good, every member serves, and all that the clients saw is linearizable.
//!
//! Commands, IDs being those of members and hosts:
//!
//! ```text
//! cluster N                     found a cluster of N, and wait for its leader
//! run TIME                      let so much time pass: 500ms, 3s
//! wait-for-leader               until there is a leader of a later term than the last one told of
//! status                        how each node sees itself
//! put ID KEY VALUE [BYTES]      write at a member, padded to so many bytes; a last word & does not wait for the answer
//! get ID KEY [stale]            read at a member
//! put-many ID COUNT BYTES       write so many values, one after the other
//! add ID at ID                  add a member, whose host is not started; ask the second one
//! remove ID at ID               remove a member; ask the second one
//! start|stop|kill|freeze|thaw|power-cut|wipe|flip ID
//! tear ID                       cut the power in the middle of the next write of its disk: one sector of it is left
//! slow-disk ID TIME             a write takes so long
//! full-disk ID BYTES|off        the disk takes no more than so many bytes beyond what it holds
//! partition A B | C             nothing passes between the sides
//! cut A -> B                    nothing passes from one to the other
//! lose MESSAGE|nothing          messages of this kind are lost, e.g. MsgHeartbeat
//! lose-snapshots on|off         as it says
//! heal                          the network is well again
//! agree                         all is made good, and checked
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use protobuf::ProtobufEnum as _;
use raft::eraftpb::MessageType;
use raftkv::channel::{Change, ChangeFailure, Role};
use raftkv::kv::{Consistency, Service};
use raftkv::metrics::Metrics;
use raftkv::wal::disk_memory::MemoryDisk;
use raftkv::wal::{Options, Wal};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::Dispatch;
use tracing::subscriber::NoSubscriber;
use tracing_subscriber::layer::SubscriberExt as _;

use crate::host::{State, member};
use crate::narrator::Narrator;
use crate::world::{Limits, Millis, Shared, World, lock, run_until};
use crate::{clients, damage, panics, run, weather};

/// Set to write the scripts anew.
const RECORD: &str = "RAFTKV_RECORD_SCRIPTS";
/// Of what a script leaves to chance: what is random on the disks.
const SEED: u64 = 1;
/// Longer than any answer takes.
const PATIENCE_MILLIS: Millis = 30_000;

/// Runs every script, and panics with the differences; or writes them, if that is wished.
pub fn tell_all() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/simulation/scripts");
    let entries = fs::read_dir(&dir).expect("read the directory of scripts");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("read the directory of scripts").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no scripts in {}", dir.display());
    let mut faults = Vec::new();
    for file in files {
        let name = file.file_name().expect("a listed file").to_string_lossy().into_owned();
        let expected = fs::read_to_string(&file).expect("read a script");
        let (told, outcome) = tell(&expected);
        if let Err(why) = outcome {
            faults.push(format!("{name}: {why}\n{told}"));
        } else if std::env::var_os(RECORD).is_some() {
            fs::write(&file, told).expect("write a script");
        } else if told != expected {
            faults.push(format!("{name} tells another story:\n{}", difference(&expected, &told)));
        }
    }
    assert!(faults.is_empty(), "\n{}\n{RECORD}=1 writes the scripts anew.", faults.join("\n"));
}

/// Runs a script. What it told stands in the same text, whether or not it went well.
fn tell(text: &str) -> (String, Result<(), String>) {
    raftkv::blocking::in_place();
    panics::keep();
    // While only one subscriber exists, `tracing` asks the thread that first comes by a log line whether anybody wants it,
    // for all threads: a simulation beside this one would say no.
    static ANOTHER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::default()));
    LazyLock::force(&ANOTHER);
    let narrator = Narrator::default();
    let subscriber = tracing_subscriber::registry().with(narrator.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let outcome = tracing::subscriber::with_default(subscriber, || {
        runtime.expect("a runtime").block_on(async { Script::new(narrator).tell(text).await })
    });
    panics::print();
    outcome
}

/// The whole story, with what is not told any more and what is told instead.
fn difference(expected: &str, told: &str) -> String {
    let [before, now]: [Vec<&str>; 2] = [expected, told].map(|text| text.lines().collect());
    // The length of the longest story that both have in common from two lines on.
    let mut common = vec![vec![0; now.len() + 1]; before.len() + 1];
    for (i, one) in before.iter().enumerate().rev() {
        for (j, other) in now.iter().enumerate().rev() {
            let longer = common[i + 1][j].max(common[i][j + 1]);
            common[i][j] = if one == other { 1 + common[i + 1][j + 1] } else { longer };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    while i < before.len() || j < now.len() {
        if i < before.len() && j < now.len() && before[i] == now[j] {
            lines.push(format!("  {}", before[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == now.len() || i < before.len() && common[i + 1][j] >= common[i][j + 1] {
            lines.push(format!("- {}", before[i]));
            i += 1;
        } else {
            lines.push(format!("+ {}", now[j]));
            j += 1;
        }
    }
    lines.join("\n")
}

type Outcome = Result<(), String>;

struct Script {
    world: Shared,
    narrator: Narrator,
    /// Of the last leader that was waited for.
    term: u64,
    keys: BTreeSet<String>,
    /// Requests so far; each is another client's.
    requests: u64,
    /// Requests that nobody waits for yet.
    asked: Vec<JoinHandle<()>>,
}

impl Script {
    fn new(narrator: Narrator) -> Self {
        let limits = Limits { snapshot_count: 20, catchup_entries: 5, ..Limits::default() };
        let world = World::new(SEED, limits);
        lock(&world).scripted = true;
        Script { world, narrator, term: 0, keys: BTreeSet::new(), requests: 0, asked: Vec::new() }
    }

    async fn tell(mut self, text: &str) -> (String, Outcome) {
        let mut told = String::new();
        let mut last = "";
        let mut outcome = Ok(());
        for line in text.lines() {
            let command = line.strip_prefix("> ");
            if command.is_none() && !line.is_empty() && !line.starts_with('#') {
                continue;
            }
            told += &format!("{line}\n");
            let Some(command) = command else { continue };
            last = command;
            self.narrator.begin();
            let words: Vec<&str> = command.split_whitespace().collect();
            outcome = self.command(&words).await.map_err(|why| format!("{command}: {why}"));
            self.narrator.take().iter().for_each(|line| told += &format!("{line}\n"));
            outcome = outcome.and_then(|()| self.oracle_is_content());
            if outcome.is_err() {
                break;
            }
        }
        if outcome.is_ok() && last != "agree" {
            outcome = Err("the last command must be: agree".to_owned());
        }
        // Their tasks would go on in the next script's world.
        lock(&self.world).hosts.clear();
        (told, outcome)
    }

    async fn command(&mut self, words: &[&str]) -> Outcome {
        match *words {
            ["cluster", count] => return self.found(number(count)?).await,
            ["run", time] => {
                let end = lock(&self.world).now() + millis(time)?;
                run_until(&self.world, end).await;
            }
            ["wait-for-leader"] => return self.wait_for_leader().await,
            ["status"] => return self.status().await,
            [ref request @ .., "&"] => {
                let (task, narrator) = (self.request(request)?, self.narrator.clone());
                let what = request.join(" ");
                self.asked.push(tokio::spawn(async move {
                    let answer = task.await.unwrap_or_else(|error| error.to_string());
                    narrator.happens(&format!("{what}: {answer}"));
                }));
            }
            ["put" | "get" | "add" | "remove", ..] => {
                let task = self.request(words)?;
                let answer = self.wait(task).await?;
                self.narrator.answers(answer);
            }
            ["put-many", id, count, bytes] => return self.put_many(id, number(count)?, bytes).await,
            ["agree"] => return self.agree().await,
            ["partition", ref sides @ ..] => {
                let sides: Result<Vec<Vec<u64>>, String> = sides.split(|word| *word == "|").map(numbers).collect();
                let sides = sides?;
                let apart =
                    |one: &u64, other: &u64| !sides.iter().any(|side| side.contains(one) == side.contains(other));
                let ids: Vec<u64> = sides.iter().flatten().copied().collect();
                let pairs = ids.iter().flat_map(|one| ids.iter().map(move |other| (*one, *other)));
                lock(&self.world).net.cut.extend(pairs.filter(|(one, other)| apart(one, other)));
            }
            ["cut", from, "->", to] => {
                lock(&self.world).net.cut.insert((number(from)?, number(to)?));
            }
            ["lose", "nothing"] => lock(&self.world).net.lost_kinds.clear(),
            ["lose", kind] => {
                let mut kinds = MessageType::values().iter();
                let kind = kinds.find(|known| format!("{known:?}") == kind).ok_or("no such message")?;
                lock(&self.world).net.lost_kinds.insert(*kind as i32);
            }
            ["lose-snapshots", on @ ("on" | "off")] => lock(&self.world).net.snapshots_lost = on == "on",
            ["heal"] => lock(&self.world).net.cut.clear(),
            [what, id] => return self.strike(what, number(id)?, None),
            ["full-disk", id, bytes] => return self.strike("full-disk", number(id)?, Some(bytes)),
            ["slow-disk", id, time] => lock(&self.world).host(number(id)?).sync_millis = millis(time)?,
            _ => return Err("no such command".to_owned()),
        }
        Ok(())
    }

    fn oracle_is_content(&self) -> Outcome {
        lock(&self.world).oracle.failure().map_or(Ok(()), |failure| Err(failure.to_owned()))
    }

    /// Waits for an answer while the world goes on.
    async fn wait<T>(&self, task: JoinHandle<T>) -> Result<T, String> {
        let began = lock(&self.world).now();
        while !task.is_finished() {
            let now = lock(&self.world).now();
            if now > began + PATIENCE_MILLIS {
                return Err("no answer".to_owned());
            }
            run_until(&self.world, now + 1).await;
            self.oracle_is_content()?;
        }
        task.await.map_err(|error| error.to_string())
    }

    async fn found(&mut self, count: u64) -> Outcome {
        {
            let mut world = lock(&self.world);
            (1..=count).for_each(|id| world.add_host(id, true));
            world.oracle.founded(1..=count);
            (1..=count).for_each(|id| world.start(id));
        }
        self.wait_for_leader().await?;
        // Each founder's data directory is made known by an entry: a story begins behind them.
        let end = lock(&self.world).now() + 1000;
        run_until(&self.world, end).await;
        self.narrator.take();
        let leader = lock(&self.world).leader_of(self.term).ok_or("the leader is gone at once")?;
        self.narrator.answers(format!("node {leader} leads in term {}", self.term));
        Ok(())
    }

    async fn wait_for_leader(&mut self) -> Outcome {
        let began = lock(&self.world).now();
        loop {
            let now = lock(&self.world).now();
            let newest = lock(&self.world).newest_term();
            if newest > self.term && lock(&self.world).leader_of(newest).is_some() {
                self.term = newest;
                return Ok(());
            }
            if now > began + PATIENCE_MILLIS {
                return Err(format!("no leader of a term behind {}", self.term));
            }
            run_until(&self.world, now + 10).await;
            self.oracle_is_content()?;
        }
    }

    /// Asks a member for something. The answer is a line of text.
    fn request(&mut self, words: &[&str]) -> Result<JoinHandle<String>, String> {
        self.requests += 1;
        let (world, client, began) = (self.world.clone(), self.requests, Instant::now());
        let after = move |answer: String| match began.elapsed().as_secs_f64() {
            short if short < 0.1 => answer,
            long => format!("{answer} (after {long:.1} s)"),
        };
        let id = match *words {
            ["put" | "get", id, ..] | ["add" | "remove", _, "at", id] => number(id)?,
            _ => return Err("no such request".to_owned()),
        };
        let Some(service) = self.service(id) else {
            return Ok(tokio::spawn(async move { format!("no connection: nothing runs on host {id}") }));
        };
        Ok(match *words {
            ["put", _, key, value, ref bytes @ ..] => {
                self.keys.insert(key.to_owned());
                let mut value = value.as_bytes().to_vec();
                if let [bytes] = bytes {
                    value.resize(number(bytes)? as usize, b'.');
                }
                let (key, value) = (key.as_bytes().to_vec(), Bytes::from(value));
                tokio::spawn(async move {
                    let answer = clients::write(&world, client, id, key, value).await;
                    after(answer.map_or_else(|error| error.to_string(), |()| "done".to_owned()))
                })
            }
            ["get", _, key] => {
                let key = key.as_bytes().to_vec();
                tokio::spawn(async move {
                    let answer = clients::read(&world, client, id, key).await;
                    after(answer.map_or_else(|error| error.to_string(), |value| readable(value.as_deref())))
                })
            }
            ["get", _, key, "stale"] => {
                let key = key.as_bytes().to_vec();
                tokio::spawn(async move {
                    let answer = service.get(&key, Consistency::Stale).await;
                    after(answer.map_or_else(
                        |error| error.to_string(),
                        |read| readable(read.entry.as_ref().map(|entry| entry.value())),
                    ))
                })
            }
            ["add", newcomer, ..] => {
                let newcomer = number(newcomer)?;
                if !lock(&world).hosts.contains_key(&newcomer) {
                    lock(&world).add_host(newcomer, false);
                }
                let change = Change::Add(member(newcomer));
                tokio::spawn(async move { after(told(service.reconfigure(change).await)) })
            }
            ["remove", leaver, ..] => {
                let leaver = number(leaver)?;
                lock(&world).leaving.entry(leaver).or_default();
                tokio::spawn(async move {
                    let outcome = service.reconfigure(Change::Remove(leaver)).await;
                    let mut world = lock(&world);
                    match outcome {
                        Ok(()) if world.hosts[&leaver].process.is_none() => world.host(leaver).state = State::Removed,
                        Ok(()) | Err(ChangeFailure::Unknown) => {}
                        // It stays a member, and is to agree with the others.
                        Err(_) => drop(world.leaving.remove(&leaver)),
                    }
                    after(told(outcome))
                })
            }
            _ => return Err("no such request".to_owned()),
        })
    }

    async fn put_many(&mut self, id: &str, count: u64, bytes: &str) -> Outcome {
        let mut answers: Vec<(String, u64)> = Vec::new();
        for nth in 1..=count {
            let (key, value) = (format!("many{}", nth % 10), format!("{nth}.of.{}", self.requests));
            let task = self.request(&["put", id, &key, &value, bytes])?;
            let answer = self.wait(task).await?;
            match answers.last_mut().filter(|(last, _)| *last == answer) {
                Some((_, times)) => *times += 1,
                None => answers.push((answer, 1)),
            }
        }
        answers.into_iter().for_each(|(answer, times)| self.narrator.answers(format!("{times} times: {answer}")));
        Ok(())
    }

    async fn status(&self) -> Outcome {
        let ids: Vec<u64> = lock(&self.world).hosts.keys().copied().collect();
        for id in ids {
            let line = match self.service(id).filter(|_| lock(&self.world).running().contains(&id)) {
                Some(service) => {
                    let task = tokio::spawn(async move { service.status().await });
                    let status = self.wait(task).await?.map_err(|error| error.to_string())?;
                    let (term, leader) = (status.node.term, status.node.leader);
                    let role = match (status.node.role, leader) {
                        (Role::Leader, _) => format!("leads in term {term}"),
                        (Role::Follower, 0) => format!("follows nobody in term {term}"),
                        (Role::Follower, _) => format!("follows {leader} in term {term}"),
                        (Role::Candidate, _) => format!("asks whether it would win an election, in term {term}"),
                        (Role::Learner, _) => format!("learns from {leader} in term {term}"),
                    };
                    let list = |votes| -> String {
                        let members = status.node.members.iter().filter(|member| member.votes == votes);
                        members.map(|member| format!(" {}", member.id)).collect()
                    };
                    let (voters, learners) = (list(true), list(false));
                    let learners = if learners.is_empty() { learners } else { format!(", learners{learners}") };
                    let (commit, applied) = (status.node.commit, status.applied);
                    format!("{role}, {commit} entries committed, {applied} applied, voters{voters}{learners}")
                }
                None => match &lock(&self.world).hosts[&id] {
                    host if host.process.is_some() => "frozen".to_owned(),
                    host => match host.state {
                        State::Well => "down".to_owned(),
                        State::Lost(_) => "down, and must not start again".to_owned(),
                        State::Removed => "down: it was removed".to_owned(),
                    },
                },
            };
            self.narrator.answers(format!("node {id} {line}"));
        }
        Ok(())
    }

    fn service(&self, id: u64) -> Option<Service> {
        lock(&self.world).hosts.get(&id)?.process.as_ref().map(|process| process.service.clone())
    }

    /// Something happens to a host.
    fn strike(&self, what: &str, id: u64, bytes: Option<&str>) -> Outcome {
        let mut world = lock(&self.world);
        let life = world.hosts.get(&id).ok_or("no such host")?.life;
        match (what, bytes) {
            ("start", None) if world.hosts[&id].process.is_some() => return Err("it runs".to_owned()),
            ("start", None) => {
                // Somebody tries it again, which must do no harm.
                if world.hosts[&id].state == State::Removed {
                    world.host(id).state = State::Well;
                }
                world.start(id);
            }
            ("stop", None) => world.stop(id),
            ("kill", None) => world.kill(id, life),
            ("freeze", None) => world.freeze(id),
            ("thaw", None) => world.thaw(id),
            ("power-cut", None) => world.power_is_out(id),
            ("tear", None) => {
                let host = world.host(id);
                host.tears = true;
                host.disk.stop_at(host.disk.operations());
            }
            ("wipe", None) => {
                world.kill(id, life);
                let disk = MemoryDisk::seeded(world.rng.u64(..));
                let host = world.host(id);
                (host.disk, host.wiped) = (disk, true);
                world.note(format_args!("host {id}: its directory is emptied"));
            }
            ("flip", None) => return flip(&mut world, id),
            ("full-disk", Some("off")) => world.host(id).disk.set_capacity(None),
            ("full-disk", Some(bytes)) => {
                let room = number(bytes)?;
                let host = world.host(id);
                host.disk_filled = true;
                host.disk.set_capacity(Some(host.disk.used_bytes() + room));
            }
            _ => return Err("no such command".to_owned()),
        }
        Ok(())
    }

    /// All is made good; then every member serves, all have the same, and what clients saw is linearizable.
    async fn agree(&mut self) -> Outcome {
        {
            let mut world = lock(&self.world);
            world.net.cut.clear();
            world.net.lost_kinds.clear();
            world.net.snapshots_lost = false;
            let ids: Vec<u64> = world.hosts.keys().copied().collect();
            for id in ids {
                world.thaw(id);
                let host = world.host(id);
                host.disk.set_capacity(None);
                host.sync_millis = 1;
            }
        }
        for task in std::mem::take(&mut self.asked) {
            self.wait(task).await?;
        }
        run::calm(&self.world, 1).await;
        self.oracle_is_content()?;
        // How they come together again is told where a script runs on for that.
        self.narrator.take();
        let mut content = String::new();
        let members = weather::expected(&lock(&self.world));
        for id in &members {
            let mut found = String::new();
            for key in self.keys.clone().iter().filter(|key| !key.starts_with("many")) {
                let task = self.request(&["get", &id.to_string(), key])?;
                found += &format!(", {key} is {}", self.wait(task).await?);
            }
            if content.is_empty() {
                content = found;
            } else if content != found {
                return Err(format!("node {id} has{found}, others have{content}"));
            }
        }
        let members: Vec<String> = members.iter().map(u64::to_string).collect();
        self.narrator.answers(format!("members {} agree{content}", members.join(" ")));
        lock(&self.world).history.check().map(drop).map_err(|violation| violation.to_string())
    }
}

impl World {
    fn newest_term(&self) -> u64 {
        let processes = self.hosts.values().filter_map(|host| host.process.as_ref());
        processes.map(|process| process.service.leadership().term).max().unwrap_or(0)
    }

    fn leader_of(&self, term: u64) -> Option<u64> {
        let leads = |id: &u64| {
            let leadership = self.hosts[id].process.as_ref().map(|process| process.service.leadership());
            leadership.is_some_and(|at| at.term == term && at.leader == *id)
        };
        self.running().into_iter().find(leads)
    }
}

/// Flips some bit of a host that is down, where recovery must notice.
fn flip(world: &mut World, id: u64) -> Outcome {
    let segment_bytes = world.limits.segment_bytes;
    let options = Options { dir: "/data/wal".into(), segment_bytes };
    let mut rng = world.rng.fork();
    for _ in 0..1000 {
        let disk = world.hosts[&id].disk.fork();
        let flip = damage::flip(&disk, segment_bytes, &mut rng)?;
        let opened = Wal::open(Arc::new(disk.fork()), &options, 1, Arc::new(Metrics::new()));
        if let (Some(flip), Err(_)) = (flip, opened) {
            world.note(format_args!("host {id}: a bit is flipped, {flip}"));
            let host = world.host(id);
            (host.disk, host.damaged) = (disk, true);
            host.flipped.insert(flip.file);
            return Ok(());
        }
    }
    Err("no bit of it can be flipped".to_owned())
}

fn told<E: ToString>(outcome: Result<(), E>) -> String {
    outcome.map_or_else(|error| error.to_string(), |()| "done".to_owned())
}

/// A value without its padding.
fn readable(value: Option<&[u8]>) -> String {
    value.map_or("nothing".to_owned(), |value| String::from_utf8_lossy(value).trim_end_matches('.').to_owned())
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("{word} is no number"))
}

fn numbers(words: &[&str]) -> Result<Vec<u64>, String> {
    words.iter().map(|word| number(word)).collect()
}

fn millis(word: &str) -> Result<Millis, String> {
    let (count, unit) = word.split_at(word.find(|sign: char| !sign.is_ascii_digit()).ok_or("a time needs its unit")?);
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        _ => return Err(format!("{word} is no time")),
    };
    Ok(number(count)? * unit.as_millis() as Millis)
}

#[test]
fn a_script_that_is_wrong_is_told_apart() {
    let (told, outcome) = tell("# Why.\n> cluster 1\nnode 1 leads in term 9\n> put 1 a one\n> agree\n");
    assert_eq!(outcome, Ok(()));
    let right =
        "# Why.\n> cluster 1\nnode 1 leads in term 2\n> put 1 a one\ndone\n> agree\nmembers 1 agree, a is one\n";
    assert_eq!(told, right);
    let changed = difference("> a\none\n> b\nfour\n", "> a\ntwo\nthree\n> b\nfour\n");
    assert_eq!(changed, "  > a\n- one\n+ two\n+ three\n  > b\n  four");

    let refused = |script: &str| tell(script).1.expect_err(script);
    assert!(refused("> cluster 1\n> put 1 a one\n").contains("the last command must be: agree"));
    assert!(refused("> cluster 1\n> teleport 1\n> agree\n").contains("no such command"));
    // Values tell who wrote them: the oracle finds the second of a kind.
    assert!(refused("> cluster 1\n> put 1 a one\n> put 1 b one\n> agree\n").contains("is applied as"));
}
