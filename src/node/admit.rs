//! What may reach raft: every message of a peer passes here first, because raft believes what it is told, and panics or
//! silently goes wrong on what no sane peer sends. Pure; whatever the message, the answer is a word, never a panic.

use std::collections::BTreeSet;

use raft::eraftpb::{Entry, EntryType, Message, MessageType};

use super::NONCE_BYTES;
use super::core::{Core, FOUNDING};
use crate::channel::{COMMAND_BYTES_MAX, RequestId, Writes};

/// How far ahead of ours a term may be. It stops a damaged number from using up all terms there are; a member that was
/// away for as many elections can only be replaced.
const TERM_LEAP_MAX: u64 = 1 << 20;

/// Bytes of context in a heartbeat or a vote.
const CONTEXT_BYTES_MAX: usize = 64;

/// Why a message is kept from raft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Malformed or impossible; the word is for logs and metrics.
    Senseless(&'static str),
    /// The leader knows entries committed that this node acknowledged and no longer has: its disk lost them.
    DataLost { commit: u64, last: u64 },
}

/// Tells whether `message` may be stepped.
pub fn admit(message: &Message, core: &Core) -> Result<(), Refusal> {
    let at = core.position();
    let refuse = |word| Err(Refusal::Senseless(word));
    let kind = message.get_msg_type();
    if message.to != at.id {
        return refuse("receiver");
    }
    // A member that was away does not know who joined meanwhile, and needs their word to learn of it. What answers a
    // question of ours comes from members only.
    if message.from == at.id || message.from == 0 || (is_answer(kind) && !core.is_member(message.from)) {
        return refuse("sender");
    }
    // A question for the read index is the one message between peers that carries no term.
    if (message.term == 0) != (kind == MessageType::MsgReadIndex) || message.term > at.term + TERM_LEAP_MAX {
        return refuse("term");
    }
    if message.context.len() > CONTEXT_BYTES_MAX {
        return refuse("context");
    }
    if message.request_snapshot != 0 || message.has_snapshot() != (kind == MessageType::MsgSnapshot) {
        return refuse("snapshot");
    }
    if !message.entries.is_empty()
        && !matches!(kind, MessageType::MsgAppend | MessageType::MsgReadIndex | MessageType::MsgReadIndexResp)
    {
        return refuse("entries");
    }
    if [message.index, message.commit, message.log_term, message.reject_hint, message.commit_term].contains(&u64::MAX) {
        return refuse("number");
    }
    match kind {
        MessageType::MsgAppend => append(message, core),
        MessageType::MsgAppendResponse => {
            // Only of this term: an older answer is ignored by raft, a newer one ends our leadership.
            let ours = message.term == at.term && core.is_leader();
            if ours && (message.index > at.last || message.reject_hint > at.last) {
                return refuse("response index");
            }
            Ok(())
        }
        MessageType::MsgHeartbeat => {
            if message.term == at.term && at.leader != 0 && at.leader != message.from {
                return refuse("two leaders");
            }
            // A leader tells each follower a commit index that it has acknowledged to be durable.
            if message.term >= at.term && message.commit > at.last {
                return Err(Refusal::DataLost { commit: message.commit, last: at.last });
            }
            Ok(())
        }
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => match message.entries.as_ref() {
            [question] if question.data.len() == RequestId::BYTES => Ok(()),
            _ => refuse("read context"),
        },
        MessageType::MsgTimeoutNow => {
            if message.from != at.leader {
                return refuse("not the leader");
            }
            // Who is alone wins at once. The leader hands over to a member that told it of a durable log.
            if !core.log_is_durable() {
                return refuse("log not durable");
            }
            Ok(())
        }
        // A node asks for votes when its log is durable, and raft asserts that a winner's is.
        MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse if !core.log_is_durable() => {
            refuse("vote that was not asked for")
        }
        MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgHeartbeatResponse => Ok(()),
        MessageType::MsgSnapshot => snapshot(message, core),
        // Proposals are forwarded outside raft, the rest never leaves a node.
        MessageType::MsgPropose
        | MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum
        | MessageType::MsgTransferLeader => refuse("type"),
    }
}

fn is_answer(kind: MessageType) -> bool {
    matches!(
        kind,
        MessageType::MsgAppendResponse
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVoteResponse
    )
}

/// A snapshot must be of a membership that makes sense and that this node is part of.
fn snapshot(message: &Message, core: &Core) -> Result<(), Refusal> {
    let at = core.position();
    let metadata = message.get_snapshot().get_metadata();
    let members = metadata.get_conf_state();
    if message.term == at.term && core.is_leader() {
        return Err(Refusal::Senseless("two leaders"));
    }
    if !message.get_snapshot().data.is_empty()
        || metadata.index <= FOUNDING.0
        || metadata.index > u64::MAX / 2
        || metadata.term == 0
        || metadata.term > message.term
    {
        return Err(Refusal::Senseless("snapshot position"));
    }
    // Raft would cut off what follows, as where the log only began.
    if metadata.index <= at.commit && core.term_at(metadata.index).is_some_and(|ours| ours != metadata.term) {
        return Err(Refusal::Senseless("committed entry"));
    }
    let distinct = |ids: &[u64]| ids.iter().collect::<BTreeSet<_>>().len() == ids.len() && !ids.contains(&0);
    let (voters, learners) = (&members.voters, &members.learners);
    let sane = !voters.is_empty()
        // No change of this version goes through a joint configuration.
        && members.voters_outgoing.is_empty()
        && members.learners_next.is_empty()
        && !members.auto_leave
        && distinct(&[voters.as_slice(), learners.as_slice()].concat())
        && (voters.contains(&at.id) || learners.contains(&at.id));
    if sane { Ok(()) } else { Err(Refusal::Senseless("snapshot members")) }
}

/// Entries must follow each other from `index` on, in rising terms, and must not contradict what is committed here.
fn append(message: &Message, core: &Core) -> Result<(), Refusal> {
    let refuse = |word| Err(Refusal::Senseless(word));
    let at = core.position();
    if message.term == at.term && core.is_leader() {
        return refuse("two leaders");
    }
    // Every log starts behind the founding snapshot. Raft takes term 0 for what is beyond the log's end, and would find
    // that it matches.
    if message.index == 0 || message.log_term == 0 {
        return refuse("previous entry");
    }
    let (mut index, mut term) = (message.index, message.log_term);
    for entry in &message.entries {
        index = match index.checked_add(1) {
            Some(next) if next == entry.index && next != u64::MAX => next,
            _ => return refuse("gap"),
        };
        if entry.term < term || entry.term > message.term {
            return refuse("entry term");
        }
        // An entry without content opens a term. Many of them would make messages that no frame can hold.
        if entry.term == term && entry.data.is_empty() && entry.context.is_empty() {
            return refuse("empty entry");
        }
        term = entry.term;
        check_entry(entry)?;
        if index <= at.commit && core.term_at(index).is_some_and(|ours| ours != entry.term) {
            return refuse("committed entry");
        }
    }
    // What raft compares before it appends; a contradiction at a committed index would be fatal there.
    if message.index <= at.commit && core.term_at(message.index).is_some_and(|ours| ours != message.log_term) {
        return refuse("committed entry");
    }
    Ok(())
}

fn check_entry(entry: &Entry) -> Result<(), Refusal> {
    let is_other = [0, NONCE_BYTES].contains(&entry.context.len()) && entry.data.len() <= COMMAND_BYTES_MAX;
    if !is_other && Writes::read(entry.context.clone(), entry.data.clone()).is_none() {
        return Err(Refusal::Senseless("entry size"));
    }
    match entry.get_entry_type() {
        EntryType::EntryNormal | EntryType::EntryConfChangeV2 => Ok(()),
        // The older kind, which no version writes.
        EntryType::EntryConfChange => Err(Refusal::Senseless("entry type")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::core::{Start, founding};
    use super::*;

    fn core() -> Core {
        let entries = (2..6).map(|index| Entry { index, term: 1 + index / 4, ..Entry::default() }).collect();
        let hard_state = raft::eraftpb::HardState { term: 3, commit: 4, ..Default::default() };
        Core::new(Start {
            id: 1,
            base: FOUNDING,
            applied: founding(&[1, 2, 3], &[]),
            hard_state,
            entries,
            election_ticks: 10,
            seed: 7,
            message_bytes_max: 1 << 20,
        })
    }

    fn message(kind: MessageType) -> Message {
        let mut message = Message { from: 2, to: 1, term: 3, ..Message::default() };
        message.set_msg_type(kind);
        message
    }

    fn refused(message: Message) -> &'static str {
        match admit(&message, &core()) {
            Err(Refusal::Senseless(word)) => word,
            other => panic!("{other:?}"),
        }
    }

    /// Each of these panicked in raft or bricked the node, when they were stepped as they came.
    #[test]
    fn what_raft_would_not_survive_is_refused() {
        use MessageType::*;
        assert_eq!(refused(message(MsgPropose)), "type");
        assert_eq!(refused(Message { term: 0, ..message(MsgReadIndex) }), "read context");
        assert_eq!(refused(Message { to: 2, ..message(MsgAppend) }), "receiver");
        assert_eq!(refused(Message { from: 9, ..message(MsgAppendResponse) }), "sender");
        assert_eq!(refused(Message { from: 1, ..message(MsgAppend) }), "sender");
        assert_eq!(refused(Message { term: u64::MAX, ..message(MsgRequestVote) }), "term");
        assert_eq!(refused(Message { index: u64::MAX, ..message(MsgAppendResponse) }), "number");
        assert_eq!(refused(Message { reject_hint: u64::MAX, ..message(MsgAppendResponse) }), "number");
        let gap = Entry { index: 9, term: 3, ..Entry::default() };
        assert_eq!(refused(Message { index: 5, log_term: 2, entries: vec![gap].into(), ..message(MsgAppend) }), "gap");
        let against = Entry { index: 4, term: 3, ..Entry::default() };
        let against = Message { index: 3, log_term: 1, entries: vec![against].into(), ..message(MsgAppend) };
        assert_eq!(refused(against), "committed entry");
        let mut against = message(MsgSnapshot);
        let metadata = against.mut_snapshot().mut_metadata();
        (metadata.index, metadata.term) = (4, 3);
        metadata.mut_conf_state().voters = vec![1, 2];
        assert_eq!(refused(against), "committed entry");
    }

    /// No peer grants a vote that did not leave, and it leaves only with a durable log, which raft asserts of a winner.
    #[test]
    fn what_would_make_a_winner_without_a_durable_log_is_refused() {
        let mut core = core();
        let entry = Entry { index: 6, term: 3, data: vec![1].into(), ..Entry::default() };
        let append = Message { index: 5, log_term: 2, entries: vec![entry].into(), ..message(MessageType::MsgAppend) };
        assert_eq!(admit(&append, &core), Ok(()));
        core.step(append);
        let refusals = [
            (MessageType::MsgRequestVoteResponse, "vote that was not asked for"),
            (MessageType::MsgRequestPreVoteResponse, "vote that was not asked for"),
            (MessageType::MsgTimeoutNow, "log not durable"),
        ];
        for (kind, word) in refusals {
            assert_eq!(admit(&message(kind), &core), Err(Refusal::Senseless(word)));
        }
        turn(&mut core);
        for (kind, _) in refusals {
            assert_eq!(admit(&message(kind), &core), Ok(()));
        }
    }

    #[test]
    fn a_commit_beyond_our_log_is_lost_data() {
        let heartbeat = Message { commit: 6, ..message(MessageType::MsgHeartbeat) };
        assert_eq!(admit(&heartbeat, &core()), Err(Refusal::DataLost { commit: 6, last: 5 }));
        let delayed = Message { commit: 6, term: 2, ..message(MessageType::MsgHeartbeat) };
        assert_eq!(admit(&delayed, &core()), Ok(()), "an old leader's word counts for nothing");
    }

    prop_compose! {
        fn number()(near in 0u64..9, far in any::<u64>(), pick in 0..12) -> u64 {
            match pick { 0 => far, 1 => u64::MAX, 2 => u64::MAX - 1, _ => near }
        }
    }

    prop_compose! {
        fn any_entry()(
            index in number(),
            term in number(),
            kind in 0..4i32,
            context in prop::sample::select(&[0, 16, 24, 25, 56, 84][..]),
            data in 0..2usize,
        ) -> Entry {
            let mut entry = Entry { index, term, ..Entry::default() };
            entry.set_entry_type(if kind == 3 { EntryType::EntryConfChangeV2 } else { EntryType::EntryNormal });
            entry.context = vec![0; context].into();
            entry.data = vec![0; data * RequestId::BYTES].into();
            entry
        }
    }

    prop_compose! {
        fn any_message()(
            kind in 0..20i32,
            who in (0u64..5, 0u64..3),
            numbers in (number(), number(), number(), number(), number(), number(), number()),
            entries in prop::collection::vec(any_entry(), 0..4),
            follow in any::<bool>(),
            reject in any::<bool>(),
            context in 0..70usize,
        ) -> Message {
            let mut message = Message { from: who.0, to: who.1, reject, ..Message::default() };
            message.set_msg_type(protobuf::ProtobufEnum::from_i32(kind).unwrap_or(MessageType::MsgAppend));
            let (term, log_term, index, commit, commit_term, hint, snapshot) = numbers;
            (message.term, message.log_term, message.index, message.commit) = (term, log_term, index, commit);
            (message.commit_term, message.reject_hint) = (commit_term, hint);
            message.request_snapshot = if snapshot < 8 { 0 } else { snapshot };
            message.context = vec![0; context].into();
            message.entries = entries.into();
            if follow {
                // Half of them nearly right, to get past the first checks.
                for (after, entry) in (1..).zip(message.entries.iter_mut()) {
                    entry.index = index.wrapping_add(after);
                    entry.term = entry.term.max(log_term).min(term);
                }
            }
            message
        }
    }

    proptest! {
        /// Whatever peers send, and in whatever order: what is admitted raft survives, as follower and as leader.
        #[test]
        fn no_message_panics(messages in prop::collection::vec(any_message(), 1..30), leads in any::<bool>()) {
            let mut core = core();
            if leads {
                core.campaign();
                for kind in [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse] {
                    turn(&mut core);
                    core.step(Message { term: 4, ..message(kind) });
                }
                turn(&mut core);
                prop_assert!(core.is_leader());
            }
            for message in messages {
                if admit(&message, &core).is_ok() {
                    core.step(message);
                    turn(&mut core);
                }
            }
        }
    }

    fn turn(core: &mut Core) {
        while let Some(last) = core.turn().writes.last() {
            core.persisted(last.number);
        }
    }
}
