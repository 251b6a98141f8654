//! Who takes part: the members with their addresses, those that were removed, which data directory each was met with,
//! and whether this node may vote yet. A member whose directory was wiped has forgotten its votes; it must not vote
//! again under its old ID. So each directory has a nonce, and the first one seen under an ID is the only one ever
//! accepted. An ID that was removed is never used again. Pure.

use std::collections::{BTreeMap, BTreeSet};

use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, Message};
use serde::{Deserialize, Serialize};

use crate::channel::{Change, ChangeFailure, RequestId};
use crate::cluster::{Introduction, Member, URLS_MAX};
use crate::wal::snapshot::Meta;

/// What a handshake finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acquaintance {
    /// This directory is the one known under that ID.
    Known,
    /// None was known: this one is from now on, and must be made durable before its messages count.
    New,
    /// Another directory is known under that ID.
    Other,
    /// Once a member, and no longer.
    Removed,
    /// Not a member, as far as is known here.
    Stranger,
}

/// What is to be done about a change that somebody asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The members are as the change would have them.
    AlreadySo,
    /// It removes the leader, who must hand over first.
    HandOver,
    Propose(ConfChangeV2),
}

/// A change as it stands in the log, inside of raft's own record of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoggedChange {
    pub request: RequestId,
    pub change: Change,
}

impl LoggedChange {
    /// What a change in the log says beyond raft's part of it. `None` if it says nothing that this version can read.
    pub fn of(change: &ConfChangeV2) -> Option<Self> {
        let logged: LoggedChange = serde_json::from_slice(change.get_context()).ok()?;
        // ID 0 means nobody: raft passes such a change over, and no snapshot could be written of such a member.
        let (Change::Add(Member { id, .. }) | Change::Remove(id) | Change::Promote(id)) = &logged.change;
        (*id != 0).then_some(logged)
    }

    fn to_raft(&self, kind: ConfChangeType, id: u64) -> ConfChangeV2 {
        let mut single = ConfChangeSingle { node_id: id, ..ConfChangeSingle::default() };
        single.set_change_type(kind);
        let context = serde_json::to_vec(self).expect("a change is plain data");
        ConfChangeV2 { changes: vec![single].into(), context: context.into(), ..ConfChangeV2::default() }
    }
}

/// The members, and those that these entries add or move.
pub fn members_with<'a>(members: Vec<Member>, entries: impl Iterator<Item = &'a Entry>) -> Vec<Member> {
    let mut members: BTreeMap<u64, Member> = members.into_iter().map(|member| (member.id, member)).collect();
    for entry in entries.filter(|entry| entry.get_entry_type() == EntryType::EntryConfChangeV2) {
        let mut change = ConfChangeV2::default();
        if change.merge_from_bytes(&entry.data).is_err() {
            continue;
        }
        match LoggedChange::of(&change).map(|logged| logged.change) {
            Some(Change::Add(member)) => drop(members.insert(member.id, member)),
            Some(Change::Remove(_) | Change::Promote(_)) | None => {}
        }
    }
    members.into_values().collect()
}

/// The membership as this node knows it.
#[derive(Debug)]
pub struct Members {
    id: u64,
    founders: Vec<Member>,
    /// By ID.
    members: BTreeMap<u64, Member>,
    voters: BTreeSet<u64>,
    removed: BTreeSet<u64>,
    nonces: BTreeMap<u64, u64>,
    /// Members whose nonce all others have from the log.
    replicated: BTreeSet<u64>,
    /// The last directory that a member was refused with.
    suspects: BTreeMap<u64, u64>,
    /// This node never took part: whether it is new or its directory was wiped, only the others know.
    fresh: bool,
    /// Peers that took our handshake in this life, and those among them that knew no leader then.
    accepted_by: BTreeSet<u64>,
    leaderless: BTreeSet<u64>,
    /// Peers that listen to us.
    attached: BTreeSet<u64>,
    /// Vote requests that came before this node may vote: the newest of each candidate.
    held_votes: BTreeMap<u64, Message>,
}

impl Members {
    /// `nonces` are those met, besides what `meta` knows; `own_nonce` is of this node's directory.
    pub fn new(id: u64, own_nonce: u64, meta: &Meta, nonces: BTreeMap<u64, u64>, fresh: bool) -> Self {
        let mut members = Members {
            id,
            founders: meta.founders.clone(),
            members: BTreeMap::new(),
            voters: BTreeSet::new(),
            removed: BTreeSet::new(),
            nonces,
            replicated: BTreeSet::new(),
            suspects: BTreeMap::new(),
            fresh,
            accepted_by: BTreeSet::new(),
            leaderless: BTreeSet::new(),
            attached: BTreeSet::new(),
            held_votes: BTreeMap::new(),
        };
        members.nonces.insert(id, own_nonce);
        members.restore(meta);
        members
    }

    /// The membership as a snapshot has it.
    pub fn restore(&mut self, meta: &Meta) {
        self.members = meta.members.iter().map(|member| (member.id, member.clone())).collect();
        self.voters = meta.voters.iter().copied().collect();
        self.removed = meta.removed.clone();
        self.replicated = meta.nonces.keys().copied().collect();
        for (id, nonce) in &meta.nonces {
            self.nonces.entry(*id).or_insert(*nonce);
        }
    }

    /// The membership for a snapshot at that place in the log.
    pub fn meta(&self, index: u64, term: u64, conf_state: &ConfState) -> Meta {
        Meta {
            index,
            term,
            voters: conf_state.voters.clone(),
            voters_outgoing: conf_state.voters_outgoing.clone(),
            learners: conf_state.learners.clone(),
            learners_next: conf_state.learners_next.clone(),
            auto_leave: conf_state.auto_leave,
            members: self.members.values().cloned().collect(),
            founders: self.founders.clone(),
            nonces: self.nonces.iter().filter(|(id, _)| self.replicated.contains(id)).map(|(k, v)| (*k, *v)).collect(),
            removed: self.removed.clone(),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    pub fn list(&self) -> Vec<Member> {
        self.members.values().cloned().collect()
    }

    pub fn is_removed(&self, id: u64) -> bool {
        self.removed.contains(&id)
    }

    pub fn removed(&self) -> impl Iterator<Item = u64> {
        self.removed.iter().copied()
    }

    /// What somebody who wants to join is told, if it was added with these URLs.
    pub fn introduce(&self, cluster: u64, newcomer: &Member) -> Result<Introduction, Option<String>> {
        if self.removed.contains(&newcomer.id) {
            return Err(None);
        }
        match self.members.get(&newcomer.id) {
            Some(known) if known.urls.iter().any(|url| newcomer.urls.contains(url)) => {
                Ok(Introduction { cluster, founders: self.founders.clone(), members: self.list() })
            }
            Some(known) => {
                let urls: Vec<String> = known.urls.iter().map(ToString::to_string).collect();
                Err(Some(format!("member {} was added with {}", newcomer.id, urls.join(" and "))))
            }
            None => Err(Some(format!("member {} was not added here", newcomer.id))),
        }
    }

    /// A peer shows itself with the nonce of its data directory.
    pub fn meet(&mut self, peer: u64, nonce: u64) -> Acquaintance {
        if self.removed.contains(&peer) {
            return Acquaintance::Removed;
        }
        if peer == self.id || !self.members.contains_key(&peer) {
            return Acquaintance::Stranger;
        }
        match self.nonces.get(&peer) {
            Some(known) if *known == nonce => Acquaintance::Known,
            Some(_) => Acquaintance::Other,
            None => {
                self.nonces.insert(peer, nonce);
                Acquaintance::New
            }
        }
    }

    /// The log says which directory a member has. Whom this node met first, stays.
    pub fn learn_nonce(&mut self, member: u64, nonce: u64) {
        self.nonces.entry(member).or_insert(nonce);
        self.replicated.insert(member);
    }

    /// A nonce that the others should learn from the log.
    pub fn nonce_to_replicate(&self) -> Option<(u64, u64)> {
        let new = |(id, _): &(&u64, &u64)| !self.replicated.contains(id) && self.members.contains_key(id);
        self.nonces.iter().find(new).map(|(id, nonce)| (*id, *nonce))
    }

    /// Whether a change may be made, and how; `active` tells which members were heard of lately.
    pub fn judge(
        &self,
        logged: &LoggedChange,
        conf_state: &ConfState,
        active: impl Fn(u64) -> bool,
    ) -> Result<Verdict, ChangeFailure> {
        let conflict = |why: String| Err(ChangeFailure::Conflict(why));
        let keeps_quorum = |voters: &[u64]| {
            let up = voters.iter().filter(|id| **id == self.id || active(**id)).count();
            up > voters.len() / 2
        };
        match &logged.change {
            // A front end refuses it in its own words; this is for members of another version, or out of order: no
            // snapshot could be written of such a membership, or no peer would talk to the newcomer.
            Change::Add(newcomer) if newcomer.id == 0 || !(1..=URLS_MAX).contains(&newcomer.urls.len()) => {
                let why = format!("a member has an ID from 1 on, and 1 to {URLS_MAX} URLs");
                Err(ChangeFailure::Invalid(why))
            }
            Change::Add(newcomer) => {
                let id = newcomer.id;
                if self.removed.contains(&id) {
                    return conflict(format!("ID {id} was removed, and an ID is never used again: take a new one"));
                }
                for (other, url) in
                    self.members.values().flat_map(|member| member.urls.iter().map(move |url| (member.id, url)))
                {
                    if other != id && newcomer.urls.contains(url) {
                        return conflict(format!("{url} is the address of member {other}"));
                    }
                }
                let kind = match self.members.get(&id) {
                    Some(known) if known == newcomer => return Ok(Verdict::AlreadySo),
                    Some(_) if conf_state.voters.contains(&id) => ConfChangeType::AddNode,
                    Some(_) | None => ConfChangeType::AddLearnerNode,
                };
                Ok(Verdict::Propose(logged.to_raft(kind, id)))
            }
            Change::Remove(id) => {
                if !self.members.contains_key(id) {
                    return conflict(format!("there is no member {id}"));
                }
                let left: Vec<u64> = conf_state.voters.iter().copied().filter(|voter| voter != id).collect();
                if left.is_empty() {
                    return conflict(format!("member {id} is the last that votes: a cluster needs one"));
                }
                if conf_state.voters.contains(id) && !keeps_quorum(&left) {
                    return conflict(format!(
                        "without member {id} too few of the others are up for a quorum: the cluster would be lost"
                    ));
                }
                if *id == self.id {
                    return Ok(Verdict::HandOver);
                }
                Ok(Verdict::Propose(logged.to_raft(ConfChangeType::RemoveNode, *id)))
            }
            Change::Promote(id) => {
                if conf_state.voters.contains(id) {
                    return Ok(Verdict::AlreadySo);
                }
                let voters = [conf_state.voters.as_slice(), &[*id]].concat();
                if !conf_state.learners.contains(id) || !keeps_quorum(&voters) {
                    return conflict(format!("member {id} cannot vote now"));
                }
                Ok(Verdict::Propose(logged.to_raft(ConfChangeType::AddNode, *id)))
            }
        }
    }

    /// A change that is committed, and that raft has made.
    pub fn apply(&mut self, change: &Change, conf_state: &ConfState) {
        match change {
            Change::Add(member) => {
                self.members.insert(member.id, member.clone());
            }
            Change::Remove(id) => {
                self.members.remove(id);
                self.removed.insert(*id);
                self.nonces.remove(id);
                self.replicated.remove(id);
            }
            Change::Promote(_) => {}
        }
        self.voters = conf_state.voters.iter().copied().collect();
    }

    /// Whether `peer` was not seen with this foreign directory before.
    pub fn is_new_suspect(&mut self, peer: u64, nonce: u64) -> bool {
        self.suspects.insert(peer, nonce) != Some(nonce)
    }

    /// `peer` took our handshake; it knew `leader`, 0 for none.
    pub fn accepted(&mut self, peer: u64, leader: u64) {
        self.accepted_by.insert(peer);
        if leader == 0 {
            self.leaderless.insert(peer);
        } else {
            self.leaderless.remove(&peer);
        }
    }

    /// `peer` listens to us.
    pub fn attached(&mut self, peer: u64) {
        self.attached.insert(peer);
    }

    /// The connection to `peer` broke.
    pub fn unreachable(&mut self, peer: u64) {
        self.attached.remove(&peer);
        self.leaderless.remove(&peer);
    }

    /// Whether this node takes part for the first time, as far as it knows.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Whether this node may vote, for itself too: it took part before, or so many others took its handshake that one
    /// of them would most likely know an earlier life of it. Not surely: where all that met it then are down, nobody is
    /// left to tell.
    pub fn may_vote(&self) -> bool {
        let known_to = |id: &&u64| **id == self.id || self.accepted_by.contains(id);
        !self.fresh || self.voters.iter().filter(known_to).count() > self.voters.len() / 2
    }

    /// Keeps a vote request for the time when this node may vote.
    pub fn hold_vote(&mut self, request: Message) {
        self.held_votes.insert(request.from, request);
    }

    /// The requests kept, once this node may vote.
    pub fn release_votes(&mut self) -> Vec<Message> {
        if self.held_votes.is_empty() || !self.may_vote() {
            return Vec::new();
        }
        std::mem::take(&mut self.held_votes).into_values().collect()
    }

    /// The voter that should stand for election at once, where a quorum is connected and none of it knows a leader:
    /// waiting for a time-out would serve nobody.
    pub fn first_candidate(&self) -> Option<u64> {
        let connected = |id: &u64| *id == self.id || (self.attached.contains(id) && self.leaderless.contains(id));
        let connected: Vec<u64> = self.voters.iter().copied().filter(connected).collect();
        (connected.len() > self.voters.len() / 2).then(|| connected[0])
    }

    /// Whether no voter has a lower ID.
    pub fn is_lowest(&self) -> bool {
        self.voters.first() == Some(&self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::PeerUrl;

    fn member(id: u64, port: u64) -> Member {
        Member { id, urls: vec![PeerUrl::parse(&format!("http://127.0.0.1:{port}")).unwrap()] }
    }

    fn members(id: u64, count: u64, fresh: bool) -> Members {
        let founders: Vec<Member> = (1..=count).map(|id| member(id, 9000 + id)).collect();
        let meta = Meta::founding(&founders);
        Members::new(id, 10 + id, &meta, BTreeMap::new(), fresh)
    }

    #[test]
    fn the_first_directory_met_is_the_only_one() {
        let mut members = members(1, 3, false);
        assert_eq!(members.meet(2, 77), Acquaintance::New);
        assert_eq!(members.meet(2, 77), Acquaintance::Known);
        assert_eq!(members.meet(2, 78), Acquaintance::Other, "wiped, or a copy of another");
        assert_eq!(members.meet(4, 77), Acquaintance::Stranger);
        assert_eq!(members.meet(1, 77), Acquaintance::Stranger, "our own ID from outside");
        members.learn_nonce(2, 79);
        members.learn_nonce(3, 80);
        assert_eq!((members.meet(2, 77), members.meet(3, 81)), (Acquaintance::Known, Acquaintance::Other));
        assert_eq!(members.nonce_to_replicate(), Some((1, 11)));
    }

    #[test]
    fn a_fresh_member_votes_once_a_quorum_took_its_handshake() {
        let mut five = members(1, 5, true);
        five.hold_vote(Message { from: 2, term: 2, ..Message::default() });
        five.hold_vote(Message { from: 2, term: 3, ..Message::default() });
        five.accepted(2, 0);
        assert!(!five.may_vote() && five.release_votes().is_empty());
        five.accepted(3, 0);
        assert!(five.may_vote());
        assert_eq!(five.release_votes().iter().map(|vote| vote.term).collect::<Vec<_>>(), [3]);
        assert!(five.release_votes().is_empty());
        assert!(members(1, 1, true).may_vote(), "nobody else could know");
        assert!(members(1, 5, false).may_vote());
    }

    #[test]
    fn the_lowest_of_a_connected_quorum_stands_first_unless_somebody_leads() {
        let mut members = members(2, 3, true);
        assert_eq!(members.first_candidate(), None);
        members.accepted(3, 0);
        assert_eq!(members.first_candidate(), None, "it does not listen to us yet");
        members.attached(3);
        assert_eq!(members.first_candidate(), Some(2));
        members.accepted(1, 0);
        members.attached(1);
        assert_eq!(members.first_candidate(), Some(1));
        members.accepted(3, 1);
        members.accepted(1, 1);
        assert_eq!(members.first_candidate(), None);
    }

    fn judge(members: &Members, change: Change, up: &[u64]) -> Result<Verdict, ChangeFailure> {
        let conf_state = (members.voters.iter().copied().collect::<Vec<_>>(), vec![]).into();
        let logged = LoggedChange { request: RequestId { node: 1, boot: 1, counter: 1 }, change };
        members.judge(&logged, &conf_state, |id| up.contains(&id))
    }

    fn refusal(members: &Members, change: Change, up: &[u64]) -> String {
        match judge(members, change, up) {
            Err(ChangeFailure::Conflict(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_change_that_would_do_harm_is_refused_with_the_reason() {
        let mut three = members(1, 3, false);
        assert!(refusal(&three, Change::Add(member(4, 9002)), &[2, 3]).contains("address of member 2"));
        assert!(refusal(&three, Change::Remove(4), &[2, 3]).contains("no member 4"));
        assert!(refusal(&three, Change::Remove(2), &[2]).contains("quorum"), "3 is down");
        assert!(matches!(judge(&three, Change::Remove(3), &[2]), Ok(Verdict::Propose(_))), "3 is down, 2 is up");
        assert_eq!(judge(&three, Change::Remove(1), &[2, 3]), Ok(Verdict::HandOver));
        assert!(refusal(&members(1, 1, false), Change::Remove(1), &[]).contains("last"));
        three.apply(&Change::Remove(3), &(vec![1, 2], vec![]).into());
        assert!(refusal(&three, Change::Add(member(3, 9003)), &[2]).contains("never used again"));
        assert_eq!(three.meet(3, 1), Acquaintance::Removed);
    }

    /// Another version may send it; no snapshot could be written of such a membership, and no peer would talk to it.
    #[test]
    fn a_newcomer_without_an_id_or_with_no_or_too_many_addresses_is_refused() {
        let three = members(1, 3, false);
        let urls = |count: usize| vec![member(4, 9004).urls[0].clone(); count];
        for (id, count) in [(0, 1), (4, 0), (4, URLS_MAX + 1)] {
            let refused = judge(&three, Change::Add(Member { id, urls: urls(count) }), &[2, 3]);
            assert!(matches!(refused, Err(ChangeFailure::Invalid(_))), "{id}, {count} URLs: {refused:?}");
        }
        assert!(judge(&three, Change::Add(Member { id: 4, urls: urls(URLS_MAX) }), &[2, 3]).is_ok());
    }

    #[test]
    fn a_newcomer_learns_first_and_a_member_may_move() {
        let three = members(1, 3, false);
        assert_eq!(judge(&three, Change::Add(member(2, 9002)), &[]), Ok(Verdict::AlreadySo));
        let kind = |change| match judge(&three, change, &[]) {
            Ok(Verdict::Propose(change)) => change.changes[0].get_change_type(),
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(Change::Add(member(4, 9004))), ConfChangeType::AddLearnerNode);
        assert_eq!(kind(Change::Add(member(2, 9009))), ConfChangeType::AddNode, "a voter stays one");
    }

    #[test]
    fn who_was_added_is_told_where_it_belongs() {
        let three = members(1, 3, false);
        assert_eq!(three.introduce(7, &member(2, 9002)).unwrap().members.len(), 3);
        assert!(three.introduce(7, &member(2, 9009)).unwrap_err().unwrap().contains("http://127.0.0.1:9002"));
        assert!(three.introduce(7, &member(4, 9004)).unwrap_err().unwrap().contains("not added"));
    }

    #[test]
    fn a_snapshot_carries_the_membership() {
        let mut three = members(1, 3, false);
        three.apply(&Change::Remove(3), &(vec![1, 2], vec![]).into());
        three.apply(&Change::Add(member(4, 9004)), &(vec![1, 2], vec![4]).into());
        three.learn_nonce(2, 77);
        let meta = three.meta(9, 2, &(vec![1, 2], vec![4]).into());
        let mut other = members(2, 3, true);
        other.restore(&meta);
        assert_eq!(other.list(), three.list());
        assert_eq!((other.meet(3, 1), other.meet(4, 1)), (Acquaintance::Removed, Acquaintance::New));
        assert_eq!(meta.nonces, BTreeMap::from([(2, 77)]), "what only this node knows is not in it");
    }
}
