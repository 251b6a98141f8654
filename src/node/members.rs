//! Who takes part: the members with their addresses, which data directory each was met with, and whether this node may
//! vote yet. A member whose directory was wiped has forgotten its votes; it must not vote again under its old ID. So
//! each directory has a nonce, and the first one seen under an ID is the only one ever accepted. Pure.

use std::collections::{BTreeMap, BTreeSet};

use raft::eraftpb::Message;

use crate::cluster::Member;

/// What a handshake finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acquaintance {
    /// This directory is the one known under that ID.
    Known,
    /// None was known: this one is from now on, and must be made durable before its messages count.
    New,
    /// Another directory is known under that ID.
    Other,
    Stranger,
}

/// The membership as this node knows it.
#[derive(Debug)]
pub struct Members {
    id: u64,
    members: Vec<Member>,
    nonces: BTreeMap<u64, u64>,
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
    pub fn new(id: u64, members: Vec<Member>, nonces: BTreeMap<u64, u64>, fresh: bool) -> Self {
        Members {
            id,
            members,
            nonces,
            suspects: BTreeMap::new(),
            fresh,
            accepted_by: BTreeSet::new(),
            leaderless: BTreeSet::new(),
            attached: BTreeSet::new(),
            held_votes: BTreeMap::new(),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.iter()
    }

    /// A peer shows itself with the nonce of its data directory.
    pub fn meet(&mut self, peer: u64, nonce: u64) -> Acquaintance {
        if peer == self.id || !self.members.iter().any(|member| member.id == peer) {
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

    /// Whether this node may vote, for itself too: it took part before, or so many others took its handshake that one
    /// of them would most likely know an earlier life of it. Not surely: where all that met it then are down, nobody is
    /// left to tell.
    pub fn may_vote(&self) -> bool {
        !self.fresh || self.is_quorum(self.accepted_by.len() + 1)
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

    /// The node that should stand for election at once, where a quorum is connected and none of it knows a leader:
    /// waiting for a time-out would serve nobody.
    pub fn first_candidate(&self) -> Option<u64> {
        let connected: Vec<u64> = self.attached.intersection(&self.leaderless).copied().chain([self.id]).collect();
        self.is_quorum(connected.len()).then(|| connected.into_iter().min()).flatten()
    }

    /// Whether no member has a lower ID.
    pub fn is_lowest(&self) -> bool {
        self.members.iter().all(|member| member.id >= self.id)
    }

    fn is_quorum(&self, count: usize) -> bool {
        count > self.members.len() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::PeerUrl;

    fn members(id: u64, count: u64, fresh: bool) -> Members {
        let url = |id| PeerUrl::parse(&format!("http://127.0.0.1:{}", 9000 + id)).unwrap();
        let members = (1..=count).map(|id| Member { id, urls: vec![url(id)] }).collect();
        Members::new(id, members, BTreeMap::new(), fresh)
    }

    #[test]
    fn the_first_directory_met_is_the_only_one() {
        let mut members = members(1, 3, false);
        assert_eq!(members.meet(2, 77), Acquaintance::New);
        assert_eq!(members.meet(2, 77), Acquaintance::Known);
        assert_eq!(members.meet(2, 78), Acquaintance::Other, "wiped, or a copy of another");
        assert_eq!(members.meet(4, 77), Acquaintance::Stranger);
        assert_eq!(members.meet(1, 77), Acquaintance::Stranger, "our own ID from outside");
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
}
