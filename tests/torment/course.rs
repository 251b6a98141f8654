//! What the threads of one run share: where the members are, what was counted, what was done when, and when it is over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::dice::Dice;
use crate::harness::{Answer, request_with};

/// The course of a run.
pub struct Course {
    pub began: Instant,
    /// IDs of the members that clients may ask, and their ports.
    roll: Mutex<Vec<(u64, u16)>>,
    tally: Mutex<BTreeMap<&'static str, u64>>,
    journal: Mutex<File>,
    /// No more faults.
    pub calm: Bell,
    /// No more requests.
    pub quiet: Bell,
}

impl Course {
    pub fn new(home: &Path) -> anyhow::Result<Self> {
        Ok(Course {
            began: Instant::now(),
            roll: Mutex::default(),
            tally: Mutex::default(),
            journal: Mutex::new(File::create(home.join("journal.txt"))?),
            calm: Bell::default(),
            quiet: Bell::default(),
        })
    }

    pub fn micros(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    pub fn roll(&self) -> Vec<(u64, u16)> {
        self.roll.lock().unwrap().clone()
    }

    pub fn enrol(&self, id: u64, port: u16) {
        self.roll.lock().unwrap().push((id, port));
    }

    pub fn strike_off(&self, id: u64) {
        self.roll.lock().unwrap().retain(|(other, _)| *other != id);
    }

    /// A member that says that it leads. A paused one says nothing.
    pub fn leader(&self) -> Option<u64> {
        let leads = |port: u16| status(port).is_some_and(|status| status["role"] == "leader");
        self.roll().into_iter().find(|(_, port)| leads(*port)).map(|(id, _)| id)
    }

    /// The leader half of the time, if it is known, else any.
    pub fn victim(&self, dice: &mut Dice) -> u64 {
        let ids: Vec<u64> = self.roll().into_iter().map(|(id, _)| id).collect();
        let (prefers, any) = (dice.chance(50), dice.pick(&ids));
        if prefers { self.leader().unwrap_or(any) } else { any }
    }

    pub fn count(&self, what: &'static str, by: u64) {
        *self.tally.lock().unwrap().entry(what).or_default() += by;
    }

    pub fn counted(&self, what: &'static str) -> u64 {
        self.tally.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    /// What was done, and when, for whoever reads the logs of a run that failed.
    pub fn note(&self, text: &str) {
        let line = format!("{} {:>9.3} s  {text}\n", wall_clock(), self.began.elapsed().as_secs_f64());
        self.journal.lock().unwrap().write_all(line.as_bytes()).expect("write the journal");
    }
}

/// Time of day in UTC, as in the members' logs.
fn wall_clock() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, since.subsec_millis())
}

/// Rung once; whoever rests is woken by it.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<bool>,
    wake: Condvar,
}

impl Bell {
    pub fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.wake.notify_all();
    }

    /// Waits for so long, or until the bell rings; false once it has.
    pub fn rest(&self, time: Duration) -> bool {
        let rung = self.rung.lock().unwrap();
        !*self.wake.wait_timeout_while(rung, time, |rung| !*rung).unwrap().0
    }
}

/// Polls until there is something. An error says what was waited for.
pub fn poll<T>(what: &str, time: Duration, mut condition: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(found) = condition() {
            return Ok(found);
        }
        anyhow::ensure!(Instant::now() < deadline, "not within {} s: {what}", time.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One request on a connection of its own, with a bound.
pub fn ask(method: &str, port: u16, path: &str, body: &[u8], time: Duration) -> Result<Answer, ureq::Error> {
    request_with(&agent(time), method, port, path, body)
}

pub fn agent(time: Duration) -> ureq::Agent {
    ureq::Agent::config_builder().timeout_global(Some(time)).http_status_as_error(false).max_redirects(0).build().into()
}

pub fn status(port: u16) -> Option<serde_json::Value> {
    let answer = ask("GET", port, "/status", b"", Duration::from_secs(1)).ok()?;
    (answer.status == 200).then(|| answer.json())
}
