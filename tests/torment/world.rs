//! The members: processes, directories, ports and disks, and what is asked of them as an operator would. `faults` does to
//! them what it must; a member that ends where nobody ended it is an error here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::course::{Course, ask, poll, status};
use crate::dice::Dice;
use crate::disk::Disk;
use crate::harness::{Answer, free_port, raftkv};
use crate::helpers::Helpers;
use crate::network::Network;

/// Longer than anything takes, with the network failing all the time.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Elections within a second, snapshots every few seconds, and an answer before the clients give up.
const FLAGS: &[&str] = &[
    "--tick=50ms",
    "--request-timeout=2s",
    "--wal-segment-bytes=16MiB",
    "--snapshot-count=500",
    "--snapshot-catchup-entries=100",
    "--snapshot-catchup-bytes=1MiB",
];

pub struct Member {
    pub id: u64,
    pub port: u16,
    pub disk: Option<Disk>,
    /// Where the others reach it: at the proxy.
    url: String,
    flags: Vec<String>,
    home: PathBuf,
    log: PathBuf,
    process: Option<Child>,
}

impl Member {
    pub fn data_dir(&self) -> PathBuf {
        self.home.join("data")
    }

    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn last_line(&self) -> String {
        self.log().lines().last().unwrap_or_default().to_owned()
    }

    /// Where a file must be for the next sync to fail.
    pub fn trigger(&self) -> PathBuf {
        self.home.with_extension("fail")
    }

    fn start(&mut self, helpers: &Helpers) -> anyhow::Result<()> {
        assert!(self.process.is_none(), "member {} runs already", self.id);
        let mut command = raftkv(&[]);
        command.args(&self.flags).arg("--data-dir").arg(self.data_dir());
        if let Some(library) = &helpers.fail_once {
            command.env("LD_PRELOAD", library).env("TORMENT_FAIL", self.trigger());
        }
        let log = File::options().create(true).append(true).open(&self.log)?;
        self.process = Some(command.stdout(Stdio::null()).stderr(log).spawn().context("start a member")?);
        Ok(())
    }

    /// Of a machine that is gone only its log stays.
    fn give_up(mut self, logs: &mut Vec<PathBuf>) -> anyhow::Result<()> {
        logs.push(self.log.clone());
        if self.disk.take().is_some() {
            fs::remove_file(self.home.with_extension("img"))?;
        }
        Ok(fs::remove_dir_all(&self.home)?)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let process = self.process.as_ref().expect("a member that runs");
        Ok(kill_process(Pid::from_child(process), signal)?)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().and_then(|()| process.wait()).ok();
        }
    }
}

pub struct World<'a> {
    pub members: Vec<Member>,
    pub course: &'a Course,
    pub helpers: Helpers,
    network: &'a Network,
    home: &'a Path,
    has_disks: bool,
    /// Of everyone who ever was a member, in the order of their IDs: a list that is stale, as lists are.
    urls: Vec<String>,
    /// Of members that are gone.
    past_logs: Vec<PathBuf>,
}

impl<'a> World<'a> {
    /// A cluster of `count` members that run and serve.
    pub fn found(
        count: u64,
        home: &'a Path,
        course: &'a Course,
        network: &'a Network,
        helpers: Helpers,
        has_disks: bool,
    ) -> anyhow::Result<Self> {
        let members = Vec::new();
        let mut world =
            World { members, course, helpers, network, home, has_disks, urls: Vec::new(), past_logs: Vec::new() };
        let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
        world.urls = ports.iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
        for (id, port) in (1..).zip(&ports) {
            let member = world.machine(id, *port, false)?;
            world.members.push(member);
        }
        for at in 0..world.members.len() {
            world.start(at)?;
            course.enrol(world.members[at].id, world.members[at].port);
        }
        world.wait_ready()?;
        Ok(world)
    }

    fn machine(&self, id: u64, port: u16, joins: bool) -> anyhow::Result<Member> {
        let (client_port, listen) = (free_port(), free_port());
        let listen = self.network.lay_cable(id, port, listen)?;
        let home = self.home.join(format!("member-{id}"));
        let disk = if self.has_disks { Some(Disk::new(home.with_extension("img"), &home)?) } else { None };
        fs::create_dir_all(&home)?;
        let mut flags: Vec<String> = FLAGS.iter().map(ToString::to_string).collect();
        flags.push(format!("--id={id}"));
        flags.push(self.list());
        flags.push(format!("--listen=127.0.0.1:{client_port}"));
        flags.push(format!("--listen-peer={listen}"));
        if joins {
            flags.push("--join".to_owned());
        }
        let url = self.urls[id as usize - 1].clone();
        let log = home.with_extension("log");
        Ok(Member { id, port: client_port, disk, url, flags, home, log, process: None })
    }

    /// Where everything of this run is.
    pub fn home(&self) -> &'a Path {
        self.home
    }

    pub fn position(&self, id: u64) -> usize {
        self.members.iter().position(|member| member.id == id).expect("a member that is there")
    }

    pub fn start(&mut self, at: usize) -> anyhow::Result<()> {
        self.members[at].start(&self.helpers)
    }

    /// kill -9.
    pub fn kill(&mut self, at: usize) -> anyhow::Result<()> {
        self.check()?;
        self.kill_in_any_state(at)?;
        self.course.count("kills", 1);
        Ok(())
    }

    /// The same, of one that may be ending by itself.
    pub fn kill_in_any_state(&mut self, at: usize) -> anyhow::Result<()> {
        let mut process = self.members[at].process.take().expect("a member that runs");
        Ok(process.kill().and_then(|()| process.wait()).map(drop)?)
    }

    pub fn pause(&mut self, at: usize) -> anyhow::Result<()> {
        self.members[at].signal(Signal::STOP)
    }

    pub fn resume(&mut self, at: usize) -> anyhow::Result<()> {
        self.members[at].signal(Signal::CONT)
    }

    /// An empty directory, and, for a machine that joined, the list of today: those whom it asked then may be gone. Who
    /// founded the cluster is known by the list that founded it.
    pub fn wipe(&mut self, at: usize) -> anyhow::Result<()> {
        let list = self.list();
        let member = &mut self.members[at];
        if member.flags.iter().any(|flag| flag == "--join") {
            let old = member.flags.iter_mut().find(|flag| flag.starts_with("--cluster=")).expect("a list");
            *old = list;
        }
        Ok(fs::remove_dir_all(member.data_dir())?)
    }

    fn list(&self) -> String {
        format!("--cluster={}", self.urls.join(","))
    }

    /// Nobody has ended who was not told to.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for member in &mut self.members {
            if let Some(process) = &mut member.process
                && let Some(status) = process.try_wait()?
            {
                member.process = None;
                bail!("member {} ended by itself, {status}: {}", member.id, member.last_line());
            }
        }
        Ok(())
    }

    /// Waits until a member ends by itself: its exit code, and the last line of its log.
    pub fn ended(&mut self, at: usize, why: &str) -> anyhow::Result<(Option<i32>, String)> {
        let member = &mut self.members[at];
        let process = member.process.as_mut().expect("a member that runs");
        let what = format!("member {} ends: {why}", member.id);
        let status = poll(&what, PATIENCE, || process.try_wait().transpose())??;
        member.process = None;
        Ok((status.code(), member.last_line()))
    }

    /// Starts a member that may refuse: `None` if it serves, else its exit code and the last line of its log.
    pub fn start_or_refuse(&mut self, at: usize) -> anyhow::Result<Option<(Option<i32>, String)>> {
        self.start(at)?;
        let member = &mut self.members[at];
        let (port, process) = (member.port, member.process.as_mut().expect("just started"));
        let what = format!("member {} serves, or refuses to", member.id);
        let refused = poll(&what, PATIENCE, || match process.try_wait() {
            Ok(None) => is_ready(port).then_some(Ok(None)),
            Ok(Some(status)) => Some(Ok(Some(status))),
            Err(error) => Some(Err(error)),
        })??;
        Ok(refused.map(|status| {
            member.process = None;
            (status.code(), member.last_line())
        }))
    }

    /// Every member that runs serves.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        for at in 0..self.members.len() {
            let (id, port) = (self.members[at].id, self.members[at].port);
            if self.members[at].is_up() {
                poll(&format!("member {id} serves"), PATIENCE, || match self.check() {
                    Ok(()) => is_ready(port).then_some(Ok(())),
                    Err(error) => Some(Err(error)),
                })??;
            }
        }
        Ok(())
    }

    /// A new machine, added, started, and waited for until it votes; killed on its way by chance.
    pub fn add(&mut self, dice: &mut Dice) -> anyhow::Result<()> {
        let (id, port) = (self.urls.len() as u64 + 1, free_port());
        self.urls.push(format!("http://127.0.0.1:{port}"));
        let member = self.machine(id, port, true)?;
        let (url, client_port) = (member.url.clone(), member.port);
        self.change(dice, "POST", id, url.as_bytes(), |answer| answer.status == 204)?;
        self.members.push(member);
        let at = self.members.len() - 1;
        self.start(at)?;
        self.course.enrol(id, client_port);
        if dice.chance(30) {
            self.course.calm.rest(dice.millis(0..500));
            self.kill(at)?;
            self.start(at)?;
        }
        poll(&format!("member {id} votes"), PATIENCE, || {
            if let Err(error) = self.check() {
                return Some(Err(error));
            }
            let members = status(client_port)?["members"].as_array()?.clone();
            members.iter().any(|member| member["id"] == id && member["votes"] == true).then_some(Ok(()))
        })??;
        self.course.count("members added", 1);
        Ok(())
    }

    /// Removes a member. Running, it must say so and leave.
    pub fn remove(&mut self, id: u64, dice: &mut Dice) -> anyhow::Result<()> {
        self.course.strike_off(id);
        self.change(dice, "DELETE", id, b"", |answer| {
            // The last try may have done it without saying so.
            answer.status == 204 || answer.status == 409 && answer.text().contains("no member")
        })?;
        let at = self.position(id);
        if self.members[at].is_up() {
            let (code, last) = self.ended(at, "it was removed")?;
            let said = self.members[at].log().contains("was removed from the cluster");
            ensure!(code == Some(0) && said, "member {id} was removed and ended with {code:?}: {last}");
        }
        self.members.remove(at).give_up(&mut self.past_logs)?;
        self.course.count("members removed", 1);
        Ok(())
    }

    /// Asks one member after the other until one has made the change.
    fn change(
        &mut self,
        dice: &mut Dice,
        method: &str,
        id: u64,
        body: &[u8],
        is_done: impl Fn(&Answer) -> bool,
    ) -> anyhow::Result<()> {
        let mut last = String::new();
        let made = poll(&format!("{method} /{id}"), PATIENCE, || {
            if let Err(error) = self.check() {
                return Some(Err(error));
            }
            let up: Vec<u16> = self.members.iter().filter(|member| member.is_up()).map(|member| member.port).collect();
            match ask(method, dice.pick(&up), &format!("/{id}"), body, Duration::from_secs(5)) {
                Ok(answer) if is_done(&answer) => return Some(Ok(())),
                Ok(answer) => last = format!("{} {}", answer.status, answer.text()),
                Err(error) => last = error.to_string(),
            }
            None
        });
        made.with_context(|| format!("the last answer was {last}"))?
    }

    /// All members run, serve, and hold the same.
    pub fn must_agree(&mut self) -> anyhow::Result<()> {
        for at in 0..self.members.len() {
            if !self.members[at].is_up() {
                self.start(at)?;
            }
        }
        self.wait_ready()?;
        for member in &self.members {
            for (method, expected) in [("PUT", 204), ("GET", 200)] {
                let what = format!("{method} at member {}", member.id);
                poll(&what, PATIENCE, || {
                    let answer = ask(method, member.port, "/after-all", b"x", Duration::from_secs(5)).ok()?;
                    (answer.status == expected).then_some(())
                })?;
            }
        }
        let mut seen: Vec<Vec<String>> = Vec::new();
        let agreed = poll("equal state on all members", PATIENCE, || {
            let what = |status: Value| ["applied", "state_hash", "log_hash"].map(|field| status[field].to_string());
            seen = self
                .members
                .iter()
                .map(|member| status(member.port).map(what).into_iter().flatten().collect())
                .collect();
            seen.windows(2).all(|pair| pair[0] == pair[1]).then_some(())
        });
        agreed.with_context(|| format!("{seen:?}"))?;
        self.check()
    }

    /// TERM, and a clean end, of all.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        for at in 0..self.members.len() {
            self.members[at].signal(Signal::TERM)?;
            let (code, last) = self.ended(at, "it got TERM")?;
            ensure!(code == Some(0), "member {} stopped with {code:?}: {last}", self.members[at].id);
        }
        Ok(())
    }

    /// Ends all that still run, in whatever state they are.
    pub fn end(&mut self) -> anyhow::Result<()> {
        for at in 0..self.members.len() {
            if self.members[at].is_up() {
                self.kill_in_any_state(at)?;
            }
        }
        Ok(())
    }

    /// The logs of all members that there ever were.
    pub fn logs(&self) -> Vec<PathBuf> {
        let present = self.members.iter().map(|member| member.log.clone());
        present.chain(self.past_logs.iter().cloned()).collect()
    }
}

fn is_ready(port: u16) -> bool {
    ask("GET", port, "/readyz", b"", Duration::from_secs(2)).is_ok_and(|answer| answer.status == 200)
}
