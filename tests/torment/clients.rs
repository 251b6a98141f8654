//! The clients: each does one thing at a time, through any member, on few keys at once, and writes down when it asked and
//! what it heard. Keys take turns, so that the history of each stays short enough to be checked and long enough to be
//! contended; old ones are read again, for what was acknowledged must stay.

use std::io::ErrorKind;
use std::time::Duration;

use crate::course::{Course, agent};
use crate::dice::Dice;
use crate::harness::{Answer, request_with};
use crate::history::http::outcome;
use crate::history::{Call, Operation, Outcome};

/// Keys in use at once.
const KEYS: u64 = 5;
/// How long, before others take their turn.
const TURN: Duration = Duration::from_secs(4);
/// More than a member takes to say that it does not know.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Of a large value. The log goes through its segments by these.
const LARGE_BYTES: usize = 24 << 10;

/// Asks until the course is quiet; `pace` is the time between two requests.
pub fn ask_away(course: &Course, client: u64, pace: Duration, mut dice: Dice) -> Vec<Operation> {
    let agent = agent(PATIENCE);
    let mut operations = Vec::new();
    let mut values = 0_u64;
    while course.quiet.rest(dice.millis(pace.as_millis() as u64 / 2..pace.as_millis() as u64 * 3 / 2 + 1)) {
        let members = course.roll();
        if members.is_empty() {
            continue;
        }
        let (_, port) = dice.pick(&members);
        let turn = course.began.elapsed().as_secs() / TURN.as_secs();
        let (turn, call) = match dice.below(100) {
            0..=7 => (dice.next() % (turn + 1), Call::Get),
            8..=47 => (turn, Call::Get),
            _ => {
                values += 1;
                let length = if dice.chance(8) { LARGE_BYTES } else { 0 };
                (turn, Call::Put(format!("{client}-{values}-{length}").into_bytes()))
            }
        };
        let key = format!("k{turn}-{}", dice.next() % KEYS);
        operations.push(ask(course, &agent, client, port, &key, call));
    }
    operations
}

/// All keys that there ever were.
pub fn all_keys(course: &Course) -> Vec<String> {
    let turns = course.began.elapsed().as_secs() / TURN.as_secs();
    (0..=turns).flat_map(|turn| (0..KEYS).map(move |key| format!("k{turn}-{key}"))).collect()
}

/// One request, and what became of it.
pub fn ask(course: &Course, agent: &ureq::Agent, client: u64, port: u16, key: &str, call: Call) -> Operation {
    let (method, body) = match &call {
        Call::Put(value) => ("PUT", at_length(value)),
        Call::Get => ("GET", Vec::new()),
        Call::Delete => unreachable!("no request deletes a key yet"),
    };
    let invoked = course.micros();
    let answer = request_with(agent, method, port, &format!("/{key}"), &body);
    let at = course.micros();
    let outcome = match answer {
        Ok(Answer { status: 200, body, .. }) => outcome(&call, Some((200, &in_short(body))), at),
        Ok(answer) => outcome(&call, Some((answer.status, &answer.body)), at),
        // Nothing was sent.
        Err(ureq::Error::Io(error)) if error.kind() == ErrorKind::ConnectionRefused => Outcome::NotApplied,
        Err(_) => Outcome::Unknown,
    };
    Operation { client, key: key.as_bytes().to_vec(), call, invoked, outcome }
}

/// What is sent for a value: its name, and as many bytes behind it as the name says.
fn at_length(value: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(value);
    let length = text.rsplit('-').next().and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut sent = value.to_vec();
    sent.push(b' ');
    // Bytes that differ from value to value, so that a piece of another is seen.
    let pattern: Vec<u8> = value.iter().copied().cycle().take(length).collect();
    sent.extend(pattern);
    sent
}

/// The name of the value that was read, if all of it is as it was sent; else all of it, which nobody ever wrote.
fn in_short(read: Vec<u8>) -> Vec<u8> {
    let name = read.split(|byte| *byte == b' ').next().unwrap_or_default().to_vec();
    if at_length(&name) == read { name } else { read }
}
