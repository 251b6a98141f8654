//! The network between the hosts: who reaches whom and how slowly, what is lost, repeated and overtaken; handshakes as
//! the transport makes them; forwarded requests; snapshots on their way. It stands in for `transport` below the line
//! where that drops repeats, and holds the oracle's ear: what leaves a node is what the others may rely on.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};
use raftkv::channel::{Rejection, RequestId};
use raftkv::cluster::Member;
use raftkv::transport::{Answer, Event, Meeting, PeerStatus, Peers, Position, ProposeError, Refusal};
use raftkv::window::{Seen, Window};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;

use crate::world::{Millis, Shared, World, lock};

/// Frames that may overtake each other and still be told from repeats.
const WINDOW_FRAMES: usize = 8192;
/// Between two tries to open a stream.
const DIAL_MILLIS: Millis = 150;
/// After this long without an answer a forwarded request is given up, as the transport does it.
const ANSWER_MILLIS: Millis = 5000;
/// A full queue is tried again after so long.
const ROOM_MILLIS: Millis = 1;
/// A connection on which nothing moves for so long is given up.
const STALLED_MILLIS: Millis = 5000;

/// What the weather makes of it. Chances are per mille.
#[derive(Debug, Clone)]
pub struct Network {
    pub latency: Millis,
    pub jitter: Millis,
    pub loss: u32,
    pub duplicates: u32,
    /// Directed pairs that nothing passes.
    pub cut: BTreeSet<(u64, u64)>,
    /// Open streams, by who listens and who speaks: the lives of both when it was opened.
    streams: BTreeMap<(u64, u64), (u64, u64)>,
    /// Messages of these kinds are lost, for a script.
    pub lost_kinds: BTreeSet<i32>,
    pub snapshots_lost: bool,
}

impl Default for Network {
    fn default() -> Self {
        Network {
            latency: 1,
            jitter: 0,
            loss: 0,
            duplicates: 0,
            cut: BTreeSet::new(),
            streams: BTreeMap::new(),
            lost_kinds: BTreeSet::new(),
            snapshots_lost: false,
        }
    }
}

impl Network {
    pub fn reaches(&self, from: u64, to: u64) -> bool {
        !self.cut.contains(&(from, to))
    }
}

/// What a process knows of its peers' processes, as the transport's hub does.
#[derive(Default)]
pub struct Acquaintances {
    /// Whom to connect to.
    pub peers: BTreeSet<u64>,
    /// Who introduced itself and is not listed.
    visitors: BTreeSet<u64>,
    /// The nonce that the node accepted for each.
    met: BTreeMap<u64, u64>,
    /// The newest start of each that was heard of, and its frames.
    heard: BTreeMap<u64, (u64, Window)>,
    /// The last frame sent to each.
    sent: BTreeMap<u64, u64>,
    /// What the node has no room to hear yet, and since when.
    waiting: VecDeque<(Millis, Event)>,
    /// Transfers of snapshots under way.
    sending: BTreeSet<u64>,
    /// The leader that others are told of.
    pub leader: u64,
}

impl Acquaintances {
    /// Notes a peer's start, and refuses an older one than was met.
    fn greet(&mut self, peer: u64, boot: u64) -> Option<Refusal> {
        let heard = self.heard.entry(peer).or_insert_with(|| (boot, Window::new(WINDOW_FRAMES)));
        if boot > heard.0 {
            *heard = (boot, Window::new(WINDOW_FRAMES));
        }
        (boot < heard.0).then_some(Refusal::Superseded)
    }
}

/// A process's way to its peers.
pub struct Wire {
    pub world: Shared,
    pub id: u64,
    pub life: u64,
}

impl Wire {
    fn with(&self, act: impl FnOnce(&mut World)) {
        let mut world = lock(&self.world);
        // What a dead process still says, nobody hears.
        if world.process(self.id, self.life).is_some() && !world.hosts[&self.id].disk.has_stopped() {
            act(&mut world);
        }
    }
}

impl Peers for Wire {
    fn send(&self, messages: Vec<Message>) {
        self.with(|world| messages.into_iter().for_each(|message| world.transmit(self.id, self.life, message)));
    }

    fn send_snapshot(&self, message: Message) {
        self.with(|world| world.send_snapshot(self.id, self.life, message));
    }

    fn propose(&self, leader: u64, proposals: Vec<(RequestId, Bytes)>) -> Answer<Vec<Result<Position, Rejection>>> {
        let (id, (reply, answer)) = (self.id, oneshot::channel());
        let question = move |reply| Event::Propose { from: id, proposals: proposals.clone(), reply };
        self.with(|world| world.forward(id, self.life, leader, question, reply));
        Box::pin(async move { answer.await.unwrap_or(Err(unanswered())) })
    }

    fn reconfigure(&self, leader: u64, body: Bytes) -> Answer<Bytes> {
        let (id, (reply, answer)) = (self.id, oneshot::channel());
        let question = move |reply| Event::Reconfigure { from: id, body: body.clone(), reply };
        self.with(|world| world.forward(id, self.life, leader, question, reply));
        Box::pin(async move { answer.await.unwrap_or(Err(unanswered())) })
    }

    fn set_leader(&self, leader: u64) {
        self.with(|world| world.known(self.id).leader = leader);
    }

    fn set_peers(&self, peers: Vec<Member>) {
        self.with(|world| {
            let listed: BTreeSet<u64> = peers.iter().map(|peer| peer.id).filter(|peer| *peer != self.id).collect();
            let known = world.known(self.id);
            let gone: Vec<u64> = known.peers.difference(&listed).copied().collect();
            known.visitors.retain(|visitor| !listed.contains(visitor));
            let new: Vec<u64> = listed.difference(&known.peers).copied().collect();
            known.peers = listed;
            gone.into_iter().for_each(|peer| world.part(self.id, peer));
            new.into_iter().for_each(|peer| world.dial(self.id, self.life, peer));
        });
    }

    fn drop_peer(&self, id: u64) {
        self.with(|world| {
            let known = world.known(self.id);
            known.peers.remove(&id);
            known.visitors.remove(&id);
            world.part(self.id, id);
        });
    }

    fn status(&self) -> Vec<PeerStatus> {
        Vec::new()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {})
    }
}

fn unanswered() -> ProposeError {
    ProposeError::Unknown("no answer".to_owned())
}

impl World {
    fn known(&mut self, id: u64) -> &mut Acquaintances {
        &mut self.hosts.get_mut(&id).and_then(|host| host.process.as_mut()).expect("a running process").known
    }

    fn part(&mut self, id: u64, peer: u64) {
        self.known(id).met.remove(&peer);
        self.net.streams.remove(&(id, peer));
        self.net.streams.remove(&(peer, id));
    }

    fn delay(&mut self) -> Millis {
        self.net.latency + if self.net.jitter > 0 { self.rng.u64(0..=self.net.jitter) } else { 0 }
    }

    fn is_lost(&mut self, from: u64, to: u64) -> bool {
        let loss = self.net.loss;
        !self.net.reaches(from, to) || self.chance(loss)
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.rng.u32(0..1000) < per_mille
    }

    /// Tells a node something. While it has no room this waits, as a connection does, and what comes later behind it.
    /// False where it is gone.
    fn tell(&mut self, id: u64, life: u64, event: Event) -> bool {
        let now = self.now();
        let process = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut());
        let Some(process) = process.filter(|process| process.life == life) else { return false };
        let waiting = &mut process.known.waiting;
        if !waiting.is_empty() {
            waiting.push_back((now, event));
        } else if let Err(TrySendError::Full(event)) = process.peer_events.try_send(event) {
            waiting.push_back((now, event));
            self.after(ROOM_MILLIS, move |world| world.tell_on(id, life));
        }
        true
    }

    /// Tells a node what waits. What has waited for too long is lost with its connection.
    fn tell_on(&mut self, id: u64, life: u64) {
        let now = self.now();
        let process = self.hosts.get_mut(&id).and_then(|host| host.process.as_mut());
        let Some(process) = process.filter(|process| process.life == life) else { return };
        let mut stalled = false;
        while let Some((since, event)) = process.known.waiting.pop_front() {
            if since + STALLED_MILLIS < now {
                stalled = true;
                continue;
            }
            if let Err(TrySendError::Full(event)) = process.peer_events.try_send(event) {
                process.known.waiting.push_front((since, event));
                break;
            }
        }
        if !process.known.waiting.is_empty() {
            self.after(ROOM_MILLIS, move |world| world.tell_on(id, life));
        }
        if stalled {
            // What was said first on it may be among what is lost: that it is open.
            self.net.streams.retain(|(listener, speaker), _| *listener != id && *speaker != id);
        }
    }

    /// Whether frames of `from` reach `to`: its stream is open, and of these two lives.
    fn stream(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        let lives = *self.net.streams.get(&(to, from))?;
        (self.process(to, lives.0).is_some() && self.process(from, lives.1).is_some()).then_some(lives)
    }

    fn transmit(&mut self, from: u64, life: u64, message: Message) {
        self.oracle.sent(from, &message);
        let to = message.to;
        let open = self.stream(from, to).filter(|(_, speaker)| *speaker == life);
        let kind = message.get_msg_type();
        let lost = self.is_lost(from, to) || self.net.lost_kinds.contains(&(kind as i32));
        let Some((to_life, _)) = open.filter(|_| !lost) else {
            // The transport notices some time, and reports once for all.
            if self.scripted || self.chance(100) {
                self.tell(from, life, Event::Unreachable { peer: to });
            }
            return;
        };
        let sent = self.known(from).sent.entry(to).or_default();
        *sent += 1;
        let sequence = *sent;
        let boot = self.process(from, life).expect("the wire asked").boot;
        let duplicates = self.net.duplicates;
        let twice = self.chance(duplicates);
        for copy in if twice { vec![message.clone(), message] } else { vec![message] } {
            let delay = self.delay();
            self.after(delay, move |world| world.deliver((from, boot), (to, to_life), sequence, copy));
        }
    }

    fn deliver(&mut self, (from, boot): (u64, u64), (to, to_life): (u64, u64), sequence: u64, message: Message) {
        if !self.net.reaches(from, to) || self.process(to, to_life).is_none() {
            return;
        }
        // Repeats, and what an earlier start said.
        let Some((newest, window)) = self.known(to).heard.get_mut(&from) else { return };
        if *newest != boot || window.mark(sequence) != Seen::New {
            return;
        }
        let kind = message.get_msg_type() as u64;
        self.mark(&[from, to, kind, message.term, message.index, message.commit, message.entries.len() as u64]);
        let now = self.now();
        self.mark(&[now]);
        self.tell(to, to_life, Event::Message(message));
    }

    /// Tries to open a process's stream of a peer's messages, again and again as long as it is a peer.
    pub fn dial(&mut self, id: u64, life: u64, peer: u64) {
        let Some(process) = self.process(id, life) else { return };
        if !process.known.peers.contains(&peer) && !process.known.visitors.contains(&peer) {
            return;
        }
        if self.stream(peer, id).is_none() {
            let delay = self.delay();
            let lost = self.is_lost(id, peer);
            match self.hosts.get(&peer).and_then(|host| host.process.as_ref()).map(|process| process.life) {
                Some(peer_life) if !lost => {
                    self.after(delay, move |world| world.introduce((id, life), (peer, peer_life)));
                }
                // A machine without power says nothing, one without the process that nobody listens.
                None if !lost && !self.scripted && self.rng.bool() => {
                    self.tell(id, life, Event::NobodyListens { peer });
                }
                // So does a firewall, of a process that is there.
                Some(_) if lost && !self.scripted && self.chance(100) => {
                    self.tell(id, life, Event::NobodyListens { peer });
                }
                _ => {
                    self.tell(id, life, Event::Unreachable { peer });
                }
            }
        }
        let pause = DIAL_MILLIS + if self.scripted { 0 } else { self.rng.u64(0..DIAL_MILLIS) };
        self.after(pause, move |world| world.dial(id, life, peer));
    }

    /// The caller stands at the peer's door.
    fn introduce(&mut self, caller: (u64, u64), peer: (u64, u64)) {
        self.meet(peer, caller, move |world, refusal| {
            let delay = world.delay();
            if !world.net.reaches(peer.0, caller.0) {
                return;
            }
            if let Some(refusal) = refusal {
                world.after(delay, move |world| {
                    world.tell(caller.0, caller.1, Event::Refused { peer: peer.0, refusal });
                });
                return;
            }
            if world.process(peer.0, peer.1).is_some_and(|process| !process.known.peers.contains(&caller.0)) {
                world.known(peer.0).visitors.insert(caller.0);
                world.dial(peer.0, peer.1, caller.0);
            }
            world.after(delay, move |world| {
                world.meet(caller, peer, move |world, refusal| {
                    if refusal.is_none() {
                        world.open(caller, peer);
                    }
                });
            });
        });
    }

    fn open(&mut self, listener: (u64, u64), speaker: (u64, u64)) {
        // Whoever was parted from meanwhile is to introduce itself again.
        let knows = |(id, life), (other, _)| {
            let known = self.process(id, life).map(|process| &process.known);
            known.is_some_and(|known| known.peers.contains(&other) || known.visitors.contains(&other))
        };
        if !knows(listener, speaker) || !knows(speaker, listener) {
            return;
        }
        let leader = self.known(speaker.0).leader;
        if self.tell(listener.0, listener.1, Event::Accepted { peer: speaker.0, leader })
            && self.tell(speaker.0, speaker.1, Event::Attached { peer: listener.0 })
        {
            self.mark(&[1, listener.0, speaker.0]);
            self.net.streams.insert((listener.0, speaker.0), (listener.1, speaker.1));
        }
    }

    /// A process decides about one that shows itself, and `then` hears of it; it hears nothing where no word is found.
    fn meet(
        &mut self,
        (id, life): (u64, u64),
        (stranger, stranger_life): (u64, u64),
        then: impl FnOnce(&mut World, Option<Refusal>) + Send + 'static,
    ) {
        let Some(other) = self.process(stranger, stranger_life) else { return };
        let (boot, nonce) = (other.boot, other.nonce);
        if self.process(id, life).is_none() {
            return;
        }
        if self.known(id).met.get(&stranger) == Some(&nonce) {
            let refusal = self.known(id).greet(stranger, boot);
            return then(self, refusal);
        }
        let (reply, answer) = oneshot::channel();
        if !self.tell(id, life, Event::Meet { peer: stranger, nonce, reply }) {
            return;
        }
        let world = self.shared();
        tokio::spawn(async move {
            let Ok(meeting) = answer.await else { return };
            let mut world = lock(&world);
            if world.process(id, life).is_none() {
                return;
            }
            let refusal = match meeting {
                Meeting::Known => {
                    world.known(id).met.insert(stranger, nonce);
                    world.witnesses.insert((id, stranger));
                    world.known(id).greet(stranger, boot)
                }
                Meeting::OtherNonce => Some(Refusal::OtherNonce),
                Meeting::NotAMember => Some(Refusal::NotAMember),
                Meeting::Removed => Some(Refusal::Removed),
            };
            then(&mut world, refusal);
        });
    }

    /// Brings a question to the leader, and its answer back; both may be lost, and the question may come twice.
    fn forward<T: Send + 'static>(
        &mut self,
        id: u64,
        life: u64,
        leader: u64,
        question: impl Fn(oneshot::Sender<T>) -> Event + Send + 'static,
        reply: oneshot::Sender<Result<T, ProposeError>>,
    ) {
        let Some(leader_life) = self.stream(leader, id).map(|(_, speaker)| speaker) else {
            // Whoever asked may have gone.
            reply.send(Err(ProposeError::NotSent("not connected".to_owned()))).ok();
            return;
        };
        if self.is_lost(id, leader) {
            return self.after(ANSWER_MILLIS, move |_| drop(reply));
        }
        let delay = self.delay();
        self.after(delay, move |world| {
            let (answer_in, answer) = oneshot::channel();
            let now = world.now();
            world.mark(&[2, id, leader, now]);
            if world.process(id, life).is_none() || !world.tell(leader, leader_life, question(answer_in)) {
                return world.after(ANSWER_MILLIS, move |_| drop(reply));
            }
            let duplicates = world.net.duplicates;
            if world.chance(duplicates) {
                // Nobody waits for what the copy is answered.
                let copy = question(oneshot::channel().0);
                // A change of the members that was refused must not come again later: nothing sends a POST by itself
                // that was answered.
                let delay = if let Event::Reconfigure { .. } = copy { 0 } else { world.delay() };
                world.after(delay, move |world| {
                    world.tell(leader, leader_life, copy);
                });
            }
            let shared = world.shared();
            tokio::spawn(async move {
                let answer = answer.await;
                let mut world = lock(&shared);
                let (delay, lost) = (world.delay(), world.is_lost(leader, id));
                match answer {
                    Ok(answer) if !lost => {
                        // Whoever asked may have gone.
                        world.after(delay, move |_| drop(reply.send(Ok(answer))));
                    }
                    _ => world.after(ANSWER_MILLIS, move |_| drop(reply)),
                }
            });
        });
    }

    fn send_snapshot(&mut self, from: u64, life: u64, message: Message) {
        assert_eq!(message.get_msg_type(), MessageType::MsgSnapshot);
        self.oracle.sent(from, &message);
        let to = message.to;
        if !self.known(from).sending.insert(to) {
            return self.snapshot_sent(from, life, to, false);
        }
        let delay = self.delay() * 5;
        self.after(delay, move |world| {
            let delivered = world.carry_snapshot(from, life, message);
            if world.process(from, life).is_some() {
                world.known(from).sending.remove(&to);
            }
            let delay = world.delay();
            world.after(delay, move |world| world.snapshot_sent(from, life, to, delivered));
        });
    }

    /// Copies the file from host to host, and hands over the message. False where any of it fails.
    fn carry_snapshot(&mut self, from: u64, life: u64, message: Message) -> bool {
        let to = message.to;
        let lost = self.is_lost(from, to) || self.is_lost(to, from) || self.net.snapshots_lost;
        if self.net.snapshots_lost {
            self.note(format_args!("a snapshot from {from} to {to} is lost"));
        }
        let Some((to_life, _)) = self.stream(from, to).filter(|_| !lost) else { return false };
        let (Some(sender), Some(receiver)) = (self.process(from, life), self.process(to, to_life)) else {
            return false;
        };
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let file = sender.snapshots.open_file(index, term);
        let mut bytes = Vec::new();
        let read =
            file.map_err(|_| ()).and_then(|mut file| std::io::Read::read_to_end(&mut file, &mut bytes).map_err(drop));
        if read.is_err() || self.hosts[&from].disk.has_stopped() {
            return false;
        }
        let snapshots = receiver.snapshots.clone();
        let loss = self.net.loss;
        let damaged = self.chance(loss);
        if damaged {
            let at = self.rng.usize(0..bytes.len());
            bytes[at] ^= 1;
        }
        let outcome = snapshots.receive().and_then(|mut incoming| {
            incoming.write(&bytes)?;
            incoming.finish()
        });
        if self.hosts[&to].disk.has_stopped() {
            return false;
        }
        if damaged && outcome.is_ok() {
            self.oracle.fail(format!("host {to} took a damaged snapshot of entry {index}"));
        }
        let now = self.now();
        self.mark(&[3, from, to, index, now]);
        if outcome.is_err() {
            return false;
        }
        self.note(format_args!("snapshot {index} goes from {from} to {to}"));
        self.tell(to, to_life, Event::Snapshot { message })
    }

    fn snapshot_sent(&mut self, id: u64, life: u64, peer: u64, delivered: bool) {
        self.tell(id, life, Event::SnapshotSent { peer, delivered });
    }
}
