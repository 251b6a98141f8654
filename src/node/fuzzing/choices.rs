//! What peers may say, drawn from a fuzzer's bytes: messages that are nearly right, entries, changes of the members.

use arbitrary::{Arbitrary, Result, Unstructured};
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, Entry, EntryType, Message, MessageType};

use super::{ID, LoggedChange, Machine, NONCE_BYTES};
use crate::channel::{Change, RequestId, Writes};
use crate::cluster::{Member, PeerUrl};

/// A message that is nearly right, for most of those that are far from it end in the first checks.
pub(super) fn any_message(u: &mut Unstructured<'_>, what: u8, which: u8, machine: &Machine) -> Result<Message> {
    use MessageType::*;
    const KINDS: [MessageType; 16] = [
        MsgAppend,
        MsgAppend,
        MsgAppend,
        MsgAppendResponse,
        MsgAppendResponse,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
        MsgSnapshot,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgPropose,
    ];
    let at = machine.core.position();
    let kind = KINDS[usize::from(which % 16)];
    let flags: u8 = u.arbitrary()?;
    let mut message = Message { from: 2 + u64::from(which / 16 % 4), to: ID, ..Message::default() };
    message.set_msg_type(kind);
    message.reject = flags & 1 != 0;
    message.term = match kind {
        MsgReadIndex => 0,
        // Granted pre-votes name the term that is to come.
        MsgRequestPreVoteResponse if !message.reject => at.term.saturating_add(1),
        _ => near(u, at.term)?,
    };
    message.index = near(u, if flags & 2 == 0 { at.last } else { at.commit })?;
    message.log_term = match machine.core.term_at(message.index) {
        Some(term) if flags & 4 == 0 => term,
        _ => near(u, at.term)?,
    };
    message.commit = if flags & 8 == 0 { at.commit.min(at.last) } else { near(u, at.last)? };
    if flags & 16 != 0 {
        message.reject_hint = near(u, at.last)?;
        message.commit_term = near(u, at.term)?;
        message.context = vec![what; usize::from(what) % 80].into();
    }
    match kind {
        MsgAppend => {
            let (mut index, mut term) = (message.index, message.log_term);
            for _ in 0..flags >> 5 {
                let entry = any_entry(u, &mut index, &mut term, message.term)?;
                message.entries.push(entry);
            }
        }
        MsgReadIndex | MsgReadIndexResp => {
            let request = RequestId { node: message.from, boot: 1, counter: u64::from(flags) };
            let data = Bytes::copy_from_slice(&request.to_bytes());
            message.entries.push(Entry { data, ..Entry::default() });
        }
        MsgSnapshot => {
            let (ids, outgoing): (u8, u8) = u.arbitrary()?;
            let metadata = message.mut_snapshot().mut_metadata();
            (metadata.index, metadata.term) = (near(u, at.last)?, near(u, at.term)?);
            let members = metadata.mut_conf_state();
            // Two bits for each of four: no member, a voter, a learner, both.
            for id in 1..=4 {
                let part = ids >> (2 * (id - 1)) & 3;
                (part & 1 != 0).then(|| members.voters.push(id));
                (part & 2 != 0).then(|| members.learners.push(id));
            }
            if outgoing > 240 {
                members.voters_outgoing.push(u64::from(outgoing % 4));
            }
            message.log_term = 0;
            message.index = 0;
        }
        _ => {}
    }
    Ok(message)
}

fn any_entry(u: &mut Unstructured<'_>, index: &mut u64, term: &mut u64, term_max: u64) -> Result<Entry> {
    let what: u8 = u.arbitrary()?;
    *index = if what < 248 { index.wrapping_add(1) } else { near(u, *index)? };
    *term = if what & 1 == 0 { *term } else { near(u, term_max)? };
    let mut entry = Entry { index: *index, term: *term, ..Entry::default() };
    match what >> 1 & 7 {
        0 => {}
        1 => {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
            entry.data = any_change(u)?.write_to_bytes().expect("a change is plain data").into();
        }
        2 => {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
            let len: u8 = u.arbitrary()?;
            entry.data = Bytes::copy_from_slice(u.bytes(usize::from(len).min(u.len()))?);
        }
        3 => entry.context = vec![what; NONCE_BYTES].into(),
        4 => {
            let write = |nth: u8| {
                let request = RequestId { node: 2 + u64::from(nth), boot: 1, counter: *index };
                (request, vec![what; usize::from(nth)].into())
            };
            let writes: Vec<_> = (0..2 + what % 4).map(write).collect();
            (entry.context, entry.data) = Writes::pack(&writes).remove(0).into_entry();
        }
        _ => {
            entry.context = RequestId { node: 2, boot: 1, counter: *index }.to_bytes().to_vec().into();
            entry.data = vec![what; usize::from(what)].into();
        }
    }
    Ok(entry)
}

/// A change of the members, such as this version or another may write: of several members at once, too.
pub(super) fn any_change(u: &mut Unstructured<'_>) -> Result<ConfChangeV2> {
    let (count, transition, says): (u8, u8, u8) = u.arbitrary()?;
    let mut change = ConfChangeV2::default();
    for _ in 0..1 + count % 3 {
        let (kind, id): (u8, u8) = u.arbitrary()?;
        let mut single = ConfChangeSingle { node_id: u64::from(id % 6), ..ConfChangeSingle::default() };
        single.set_change_type(match kind % 3 {
            0 => ConfChangeType::AddNode,
            1 => ConfChangeType::AddLearnerNode,
            _ => ConfChangeType::RemoveNode,
        });
        change.changes.push(single);
    }
    if count < 16 {
        change.set_transition(protobuf::ProtobufEnum::from_i32(i32::from(transition % 3)).expect("there are three"));
    }
    // What the log says beside raft's part of it.
    let id = change.changes[0].node_id;
    let urls = (0..says % 3).map(|port| PeerUrl::parse(&format!("http://b:{}", port + 1)).expect("a URL")).collect();
    let logged = match change.changes[0].get_change_type() {
        ConfChangeType::AddNode | ConfChangeType::AddLearnerNode => Change::Add(Member { id, urls }),
        ConfChangeType::RemoveNode => Change::Remove(id),
    };
    let request = RequestId { node: 2, boot: 1, counter: u64::from(says) };
    if says < 200 {
        let context = serde_json::to_vec(&LoggedChange { request, change: logged }).expect("a change is plain data");
        change.context = context.into();
    }
    Ok(change)
}

/// A number close to another one, or any at all.
fn near(u: &mut Unstructured<'_>, number: u64) -> Result<u64> {
    Ok(match u8::arbitrary(u)? {
        0 => u.arbitrary()?,
        1 => u64::MAX,
        2 => u64::MAX - 1,
        far @ 3..16 => number.saturating_sub(u64::from(far)),
        far @ 16..32 => number.saturating_add(u64::from(far - 15)),
        32..64 => number.saturating_sub(1),
        64..96 => number.saturating_add(1),
        _ => number,
    })
}
