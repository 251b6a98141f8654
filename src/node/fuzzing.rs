//! A node's core among peers that may say anything, at any time, on a disk that is slow and may lose power: whatever
//! they send, what [`admit`] lets through raft survives, and nothing committed changes. Called by `crate::fuzzing`; not
//! in any binary that ships.

mod choices;

use std::collections::{BTreeMap, VecDeque};

use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{Entry, HardState, Message, MessageType};

use self::choices::{any_change, any_message};
use super::NONCE_BYTES;
use super::admit::{Refusal, admit};
use super::core::{Core, FOUNDING, Start, Turn, Write};
use super::members::{LoggedChange, Members, Verdict};
use super::snapshots::{conf_state, metadata};
use crate::channel::{Change, RequestId, Writes};
use crate::cluster::{Introduction, Member, PeerUrl, URLS_MAX};
use crate::wal::snapshot::Meta;

const ID: u64 = 1;

/// A core in some state, and messages through [`admit`] into it.
pub fn admit_step(bytes: &[u8]) {
    // The run is over when the choices are.
    run(&mut Unstructured::new(bytes)).ok();
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let cluster: u8 = u.arbitrary()?;
    let mut machine = Machine::new(1 + u64::from(cluster % 5), u64::from(cluster / 5 % 2));
    while !u.is_empty() {
        if machine.act(u)?.is_stopped() {
            break;
        }
    }
    Ok(())
}

/// Whether the node goes on.
enum Life {
    Goes,
    /// As the node does when it hears of data that it lost, or of its removal.
    Stopped,
}

impl Life {
    fn is_stopped(&self) -> bool {
        matches!(self, Life::Stopped)
    }
}

/// What survives a loss of power.
#[derive(Clone)]
struct Disk {
    base: (u64, u64),
    snapshot: Meta,
    hard_state: HardState,
    entries: Vec<Entry>,
}

/// What is on its way to the disk, in order.
enum Writing {
    Ready(Write, Option<Box<Meta>>),
    Compaction(u64),
}

/// A node around its core, without tasks.
struct Machine {
    core: Core,
    members: Members,
    disk: Disk,
    writing: VecDeque<Writing>,
    /// Index of the last entry committed here, or restored.
    published: u64,
    /// Terms of what was committed here, in any life.
    committed: BTreeMap<u64, u64>,
    /// A snapshot that was stepped and is not durable in the log.
    received: Option<Meta>,
    /// One of its own that is being written.
    taking: Option<Meta>,
    /// What any log ever held.
    logs: Logs,
    requests: u64,
}

/// Entries by index and term, each with the term of the one before. Raft's log matching: two logs that agree on index
/// and term of an entry agree on that entry and on all before it, which a member that crashes may rely on, and one that
/// lies breaks. Nor is any leader without what was committed. Peers say anything here but that.
#[derive(Default)]
struct Logs(BTreeMap<(u64, u64), (u64, Entry)>);

impl Logs {
    fn matches(&self, mut before: u64, entries: &[Entry]) -> bool {
        entries.iter().all(|entry| {
            let before = std::mem::replace(&mut before, entry.term);
            self.0.get(&(entry.index, entry.term)).is_none_or(|known| (known.0, &known.1) == (before, entry))
        })
    }

    fn learn(&mut self, mut before: u64, entries: &[Entry]) {
        for entry in entries {
            let before = std::mem::replace(&mut before, entry.term);
            self.0.insert((entry.index, entry.term), (before, entry.clone()));
        }
    }
}

impl Machine {
    fn new(voters: u64, learners: u64) -> Self {
        let url = |id| PeerUrl::parse(&format!("http://a:{id}")).expect("a URL");
        let member = |id| Member { id, urls: vec![url(id)] };
        let founders: Vec<Member> = (1..=voters).map(member).collect();
        let mut snapshot = Meta::founding(&founders);
        for id in voters + 1..=voters + learners {
            snapshot.learners.push(id);
            snapshot.members.push(member(id));
        }
        let disk = Disk { base: FOUNDING, snapshot, hard_state: HardState::default(), entries: Vec::new() };
        let (core, members) = disk.start();
        Machine {
            core,
            members,
            disk,
            writing: VecDeque::new(),
            published: FOUNDING.0,
            committed: BTreeMap::new(),
            received: None,
            taking: None,
            logs: Logs::default(),
            requests: 0,
        }
    }

    fn act(&mut self, u: &mut Unstructured<'_>) -> Result<Life> {
        let (what, which): (u8, u8) = u.arbitrary()?;
        let peer = u64::from(which % 8);
        match what {
            // Most of all, messages.
            0..=127 => {
                let message = any_message(u, what, which, self)?;
                if self.deliver(message).is_stopped() {
                    return Ok(Life::Stopped);
                }
            }
            128..=143 => {
                let len: u8 = u.arbitrary()?;
                let bytes = u.bytes(usize::from(len).min(u.len()))?;
                if let Ok(message) = Message::parse_from_bytes(bytes)
                    && self.deliver(message).is_stopped()
                {
                    return Ok(Life::Stopped);
                }
            }
            144..=175 => self.persist(1 + usize::from(which % 4)),
            176..=191 => (0..which % 24).for_each(|_| self.core.tick()),
            192..=197 => self.core.campaign(),
            198..=199 => self.core.end_lease(),
            200..=207 => {
                let proposals: Vec<_> =
                    (0..which % 4).map(|_| (self.request(), Bytes::from_static(b"command"))).collect();
                let alone = proposals.iter().map(|(request, command)| Writes::one(*request, command.clone()));
                let entries = if which < 204 { alone.collect() } else { Writes::pack(&proposals) };
                // Refused or not, it survives.
                self.core.propose(entries).ok();
            }
            208..=215 => {
                // Refused or not, it survives.
                self.core.propose_change(any_change(u)?).ok();
            }
            216..=219 => {
                let context = self.request();
                self.core.read_index(context);
            }
            220..=223 => {
                self.core.hand_over();
            }
            224..=227 => self.core.report_unreachable(peer),
            228..=231 => self.core.report_snapshot(peer, which & 0x80 != 0),
            232..=235 => self.core.propose_nonce(peer, u64::from(which)),
            236..=243 => self.take_snapshot(),
            244..=249 => self.finish_snapshot(u64::from(which)),
            250..=251 => self.core.forget_snapshot(),
            252..=253 => self.lose_power(),
            _ => self.persist(usize::MAX),
        }
        // Several things happen between two turns.
        if what % 4 == 0 { Ok(Life::Goes) } else { Ok(self.turn()) }
    }

    fn request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId { node: ID, boot: 1, counter: self.requests }
    }

    fn deliver(&mut self, message: Message) -> Life {
        let is_snapshot = message.has_snapshot();
        let is_append = message.get_msg_type() == MessageType::MsgAppend;
        if is_append && !self.logs.matches(message.log_term, &message.entries)
            || (is_append || is_snapshot) && self.contradicts_committed(&message)
        {
            return Life::Goes;
        }
        // One that came before is being installed still.
        if is_snapshot && self.received.is_some() {
            return Life::Goes;
        }
        match admit(&message, &self.core) {
            Ok(()) if is_snapshot => {
                // What its file says of the members, which were compared with the message.
                let metadata = message.get_snapshot().get_metadata();
                let members = metadata.get_conf_state();
                let meta = Meta {
                    index: metadata.index,
                    term: metadata.term,
                    voters: members.voters.clone(),
                    voters_outgoing: members.voters_outgoing.clone(),
                    learners: members.learners.clone(),
                    learners_next: members.learners_next.clone(),
                    auto_leave: members.auto_leave,
                    ..self.disk.snapshot.clone()
                };
                assert_eq!(&conf_state(&meta), members, "what was admitted is of a simple membership");
                assert_eq!(meta.check(), Ok(()), "what was admitted makes sense");
                self.received = Some(meta);
                self.core.step(message);
            }
            Ok(()) => {
                if is_append {
                    self.logs.learn(message.log_term, &message.entries);
                }
                self.core.step(message);
            }
            Err(Refusal::Senseless(_)) => {}
            Err(Refusal::DataLost { .. }) => return Life::Stopped,
        }
        Life::Goes
    }

    /// Whether a leader says that an entry is another than the one that was committed here, in this life or before.
    fn contradicts_committed(&self, message: &Message) -> bool {
        let snapshot = message.get_snapshot().get_metadata();
        let entries = message.entries.iter().map(|entry| (entry.index, entry.term));
        [(message.index, message.log_term), (snapshot.index, snapshot.term)]
            .into_iter()
            .chain(entries)
            .any(|(index, term)| self.committed.get(&index).is_some_and(|known| *known != term))
    }

    fn turn(&mut self) -> Life {
        let before = self.core.position();
        let Turn { messages, writes, restored, committed, changes, reads: _ } = self.core.turn();
        let after = self.core.position();
        assert!(before.term <= after.term && before.commit <= after.commit, "{before:?} before {after:?}");
        for write in writes {
            if let Some(first) = write.entries.first() {
                let before = self.core.term_at(first.index - 1).expect("the entry before a new one is held");
                // It leads a term that a peer said it had led.
                if !self.logs.matches(before, &write.entries) {
                    return Life::Stopped;
                }
                self.logs.learn(before, &write.entries);
            }
            let restoring =
                write.snapshot.map(|_| Box::new(self.received.clone().expect("raft restores what was stepped")));
            self.writing.push_back(Writing::Ready(write, restoring));
        }
        for message in &messages {
            self.check_durable(message);
        }
        if let Some(metadata) = restored {
            let meta = self.received.take().expect("raft restores what was stepped");
            assert_eq!((meta.index, meta.term), (metadata.index, metadata.term));
            assert!(self.published <= meta.index, "restored {} behind {}", meta.index, self.published);
            self.members.restore(&meta);
            self.committed.insert(meta.index, meta.term);
            self.published = meta.index;
        }
        if !self.core.is_restoring() {
            self.received = None;
        }
        let mut changes = changes.into_iter().peekable();
        for entry in committed {
            assert_eq!(entry.index, self.published + 1, "committed without a gap");
            assert!(self.disk.entries.contains(&entry), "committed here before it is durable here");
            let term = *self.committed.entry(entry.index).or_insert(entry.term);
            assert_eq!(term, entry.term, "entry {} was committed before as another", entry.index);
            self.published = entry.index;
            if let Some((_, change)) = changes.next_if(|(index, _)| *index == entry.index)
                && let Some(LoggedChange { change, .. }) = LoggedChange::of(&change)
            {
                self.members.apply(&change, self.core.conf_state());
                if change == Change::Remove(ID) {
                    return Life::Stopped;
                }
            }
        }
        Life::Goes
    }

    /// Nothing leaves a node before the term and the vote that it relies on are durable.
    fn check_durable(&self, message: &Message) {
        use MessageType::*;
        let durable = &self.disk.hard_state;
        match message.get_msg_type() {
            MsgRequestPreVote | MsgRequestPreVoteResponse | MsgReadIndex | MsgReadIndexResp | MsgTimeoutNow => {}
            kind => {
                let term = durable.term.max(self.disk.snapshot.term);
                assert!(message.term <= term, "{kind:?} of term {}, where {term} is durable", message.term);
            }
        }
        match message.get_msg_type() {
            MsgRequestVoteResponse if !message.reject && message.term == durable.term => {
                assert_eq!(durable.vote, message.to, "a vote that is not durable");
            }
            MsgRequestVote if message.term == durable.term => assert_eq!(durable.vote, ID),
            _ => {}
        }
    }

    fn persist(&mut self, count: usize) {
        for _ in 0..count.min(self.writing.len()) {
            match self.writing.pop_front().expect("it was counted") {
                Writing::Ready(write, meta) => {
                    let number = write.number;
                    self.disk.write(write, meta.map(|meta| *meta));
                    self.core.persisted(number);
                }
                Writing::Compaction(index) => self.disk.compact(index),
            }
        }
    }

    fn take_snapshot(&mut self) {
        if self.core.is_restoring() || self.taking.is_some() || self.published <= self.disk.snapshot.index {
            return;
        }
        let term = self.core.term_at(self.published).expect("the last entry applied is held");
        let meta = self.members.meta(self.published, term, self.core.conf_state());
        assert_eq!(meta.check(), Ok(()), "a snapshot that could not be written: {meta:?}");
        self.taking = Some(meta);
    }

    fn finish_snapshot(&mut self, kept: u64) {
        let Some(meta) = self.taking.take() else { return };
        if self.core.is_restoring() || meta.index <= self.disk.snapshot.index {
            return;
        }
        let keep_from = meta.index.saturating_sub(kept % 8).max(self.core.forgotten());
        if keep_from > self.core.forgotten() {
            self.writing.push_back(Writing::Compaction(keep_from));
        }
        self.core.compact(metadata(&meta), keep_from);
        self.disk.snapshot = meta;
    }

    /// What was not durable is gone, and the node starts again.
    fn lose_power(&mut self) {
        self.writing.clear();
        (self.received, self.taking) = (None, None);
        (self.core, self.members) = self.disk.start();
        self.published = self.disk.snapshot.index;
    }
}

impl Disk {
    fn start(&self) -> (Core, Members) {
        let Disk { base, snapshot, hard_state, entries } = self.clone();
        let members = Members::new(ID, 1, &snapshot, BTreeMap::new(), false);
        let start = Start {
            id: ID,
            base,
            applied: metadata(&snapshot),
            hard_state,
            entries,
            election_ticks: 10,
            seed: 7,
            message_bytes_max: 1 << 20,
        };
        let mut core = Core::new(start);
        if snapshot.index > FOUNDING.0 {
            core.compact(metadata(&snapshot), base.0);
        }
        (core, members)
    }

    fn write(&mut self, write: Write, restored: Option<Meta>) {
        if let Some((base, meta)) = write.snapshot.zip(restored) {
            self.base = base;
            self.snapshot = meta;
            self.entries.clear();
        }
        if let Some(first) = write.entries.first() {
            self.entries.retain(|entry| entry.index < first.index);
            self.entries.extend(write.entries);
        }
        self.hard_state = write.hard_state.unwrap_or(std::mem::take(&mut self.hard_state));
    }

    fn compact(&mut self, index: u64) {
        if let Some(last) = self.entries.iter().find(|entry| entry.index == index) {
            self.base = (index, last.term);
            self.entries.retain(|entry| index < entry.index);
        }
    }
}

/// Any bytes as the description of a snapshot: one that makes sense is a start that raft survives.
pub fn start_from_meta(bytes: &[u8]) {
    let Ok(meta) = serde_json::from_slice::<Meta>(bytes) else { return };
    if meta.check().is_err() {
        return;
    }
    let disk = Disk {
        base: (meta.index, meta.term),
        snapshot: meta.clone(),
        hard_state: HardState::default(),
        entries: Vec::new(),
    };
    let (mut core, members) = disk.start();
    assert_eq!(core.conf_state(), &conf_state(&meta));
    let mut again = members.meta(meta.index, meta.term, core.conf_state());
    again.nonces = meta.nonces.clone();
    assert_eq!(again.check(), Ok(()));
    core.campaign();
    core.turn();
}

/// Any bytes as a change that another member forwards, and as the word to a joiner: what is proposed makes sense, and
/// raft makes it.
pub fn foreign_change(bytes: &[u8]) {
    if let Ok(introduction) = serde_json::from_slice::<Introduction>(bytes) {
        let again = serde_json::to_vec(&introduction).expect("an introduction is plain data");
        assert_eq!(serde_json::from_slice::<Introduction>(&again).ok(), Some(introduction));
    }
    let Ok(logged) = serde_json::from_slice::<LoggedChange>(bytes) else { return };
    let machine = Machine::new(3, 1);
    let Ok(Verdict::Propose(change)) = machine.members.judge(&logged, machine.core.conf_state(), |_| true) else {
        return;
    };
    assert_eq!(LoggedChange::of(&change).as_ref(), Some(&logged), "the log says what was asked for");
    match &logged.change {
        Change::Add(member) => assert!(
            member.id != 0 && (1..=URLS_MAX).contains(&member.urls.len()),
            "a member that nobody can reach: {member:?}"
        ),
        Change::Remove(id) | Change::Promote(id) => assert_ne!(*id, 0),
    }
}

/// Inputs to begin with, made by the encoders themselves: of [`admit_step`], [`start_from_meta`], [`foreign_change`].
#[cfg(test)]
pub fn seeds() -> [Vec<Vec<u8>>; 3] {
    let machine = Machine::new(3, 1);
    let mut life = vec![2, 192, 0];
    for (kind, to_term) in [
        (MessageType::MsgRequestPreVoteResponse, 2),
        (MessageType::MsgRequestVoteResponse, 2),
        (MessageType::MsgAppendResponse, 2),
        (MessageType::MsgHeartbeat, 3),
        (MessageType::MsgAppend, 3),
    ] {
        let mut message = Message { from: 2, to: ID, term: to_term, index: 2, log_term: 2, ..Message::default() };
        message.set_msg_type(kind);
        if kind == MessageType::MsgAppend {
            message.entries.push(Entry { term: 3, index: 3, ..Entry::default() });
        }
        let bytes = message.write_to_bytes().unwrap();
        life.extend([255, 0, 129, 0, bytes.len() as u8]);
        life.extend(bytes);
        life.extend([201, 1, 237, 0, 245, 0]);
    }
    let meta = machine.members.meta(7, 2, machine.core.conf_state());
    let member = |id| Member { id, urls: vec![PeerUrl::parse("http://b:1").unwrap()] };
    let request = RequestId { node: 2, boot: 1, counter: 1 };
    let changes = [Change::Add(member(5)), Change::Remove(2), Change::Promote(4)];
    let mut words: Vec<Vec<u8>> =
        changes.map(|change| serde_json::to_vec(&LoggedChange { request, change }).unwrap()).into();
    let introduction = Introduction { cluster: 7, founders: vec![member(1)], members: vec![member(1), member(2)] };
    words.push(serde_json::to_vec(&introduction).unwrap());
    [vec![life], vec![serde_json::to_vec(&meta).unwrap()], words]
}
