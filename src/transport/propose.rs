//! Writes that a follower forwards to the leader, and what came of them: the encoding of `POST /raft/propose`. Pure;
//! `forward` sends it and `listener` answers.
//!
//! ```text
//! request   version u8 = 1, count u32, then for each:
//!             node u64, boot u64, counter u64 (little-endian, RequestId), length u32, command
//! response  version u8 = 1, count u32, then for each, in the order of the request:
//!             0 u8, term u64, index u64    appended there
//!             1 u8                         rejected: no leader
//!             2 u8                         rejected: busy
//!             3 u8                         rejected: the disk is full
//!             4 u8                         rejected: stopping
//! ```
//!
//! Numbers are big-endian but for the RequestId, which has the same bytes wherever it is written.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::channel::{Rejection, RequestId};

/// The longest body of a request.
pub const PROPOSE_BYTES_MAX: usize = 8 << 20;
/// What one proposal takes beside its command.
const PROPOSAL_OVERHEAD_BYTES: usize = RequestId::BYTES + 4;
const VERSION: u8 = 1;

/// Where the leader appended a proposal. It commits there, or nowhere: another term at that index is another entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub term: u64,
    pub index: u64,
}

/// A proposal's fate at the leader.
pub type Outcome = Result<Position, Rejection>;

/// Asserts that the proposals fit [`PROPOSE_BYTES_MAX`].
pub fn encode_proposals(proposals: &[(RequestId, Bytes)]) -> Bytes {
    let commands: usize = proposals.iter().map(|(_, command)| PROPOSAL_OVERHEAD_BYTES + command.len()).sum();
    let size = 5 + commands;
    assert!(size <= PROPOSE_BYTES_MAX, "{} proposals of {size} bytes do not fit a request", proposals.len());
    let mut body = BytesMut::with_capacity(size);
    body.put_u8(VERSION);
    body.put_u32(proposals.len() as u32);
    for (id, command) in proposals {
        body.put_slice(&id.to_bytes());
        body.put_u32(command.len() as u32);
        body.put_slice(command);
    }
    body.freeze()
}

/// `None` for anything that [`encode_proposals`] does not make. Each command has memory of its own: it may stay in the
/// log for hours, the body should not.
pub fn decode_proposals(mut body: &[u8]) -> Option<Vec<(RequestId, Bytes)>> {
    let count = count(&mut body)?;
    // The count is a claim until the bytes are there.
    let mut proposals = Vec::with_capacity(count.min(body.len() / PROPOSAL_OVERHEAD_BYTES));
    for _ in 0..count {
        let id = RequestId::from_bytes(body.split_off(..RequestId::BYTES)?)?;
        let size = body.try_get_u32().ok()? as usize;
        proposals.push((id, Bytes::copy_from_slice(body.split_off(..size)?)));
    }
    body.is_empty().then_some(proposals)
}

pub fn encode_outcomes(outcomes: &[Outcome]) -> Bytes {
    let mut body = BytesMut::with_capacity(5 + 17 * outcomes.len());
    body.put_u8(VERSION);
    body.put_u32(outcomes.len() as u32);
    for outcome in outcomes {
        match outcome {
            Ok(Position { term, index }) => {
                body.put_u8(0);
                body.put_u64(*term);
                body.put_u64(*index);
            }
            Err(Rejection::NoLeader) => body.put_u8(1),
            Err(Rejection::Busy) => body.put_u8(2),
            Err(Rejection::DiskFull) => body.put_u8(3),
            Err(Rejection::Stopping) => body.put_u8(4),
            Err(Rejection::Behind) => body.put_u8(5),
            Err(Rejection::NotUnderstood) => body.put_u8(6),
        }
    }
    body.freeze()
}

/// `None` for anything that [`encode_outcomes`] does not make.
pub fn decode_outcomes(mut body: &[u8]) -> Option<Vec<Outcome>> {
    let count = count(&mut body)?;
    let mut outcomes = Vec::with_capacity(count.min(body.len()));
    for _ in 0..count {
        outcomes.push(match body.try_get_u8().ok()? {
            0 => Ok(Position { term: body.try_get_u64().ok()?, index: body.try_get_u64().ok()? }),
            1 => Err(Rejection::NoLeader),
            2 => Err(Rejection::Busy),
            3 => Err(Rejection::DiskFull),
            4 => Err(Rejection::Stopping),
            5 => Err(Rejection::Behind),
            6 => Err(Rejection::NotUnderstood),
            _ => return None,
        });
    }
    body.is_empty().then_some(outcomes)
}

fn count(body: &mut &[u8]) -> Option<usize> {
    let version = body.try_get_u8().ok()?;
    (version == VERSION).then(|| body.try_get_u32().ok().map(|count| count as usize))?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The byte maps above: a change of these bytes is a new version.
    #[test]
    fn the_bytes_of_a_request_and_its_response_are_these() {
        let id = RequestId { node: 1, boot: 2, counter: 3 };
        let body = encode_proposals(&[(id, Bytes::from_static(b"cmd"))]);
        let expected = [&[1, 0, 0, 0, 1][..], &id.to_bytes(), &[0, 0, 0, 3], b"cmd"].concat();
        assert_eq!(body[..], expected);
        let body = encode_outcomes(&[Ok(Position { term: 5, index: 6 }), Err(Rejection::Busy)]);
        assert_eq!(body[..], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 6, 2]);
    }

    #[test]
    fn a_count_that_the_bytes_do_not_bear_out_is_refused() {
        assert_eq!(decode_proposals(&[1, 0xff, 0xff, 0xff, 0xff]), None);
        assert_eq!(decode_outcomes(&[1, 0xff, 0xff, 0xff, 0xff]), None);
        assert_eq!(decode_proposals(&[2, 0, 0, 0, 0]), None, "another version");
        assert_eq!(decode_proposals(&[1, 0, 0, 0, 0]), Some(vec![]));
        assert_eq!(decode_proposals(&[1, 0, 0, 0, 0, 0]), None, "a tail");
    }

    proptest! {
        #[test]
        fn proposals_survive_and_any_cut_is_refused(
            commands in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..5),
            cut in any::<prop::sample::Index>(),
        ) {
            let ids = (1..).map(|counter| RequestId { node: 1, boot: 2, counter });
            let proposals: Vec<_> = ids.zip(commands.into_iter().map(Bytes::from)).collect();
            let body = encode_proposals(&proposals);
            prop_assert_eq!(decode_proposals(&body[..cut.index(body.len())]), None);
            prop_assert_eq!(decode_proposals(&body), Some(proposals));
        }

        #[test]
        fn any_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..100)) {
            decode_proposals(&body);
            decode_outcomes(&body);
        }

        #[test]
        fn outcomes_survive(tags in prop::collection::vec(0u8..5, 0..10)) {
            let outcomes: Vec<Outcome> = tags.iter().map(|tag| match tag {
                0 => Ok(Position { term: 1, index: u64::MAX }),
                1 => Err(Rejection::NoLeader),
                2 => Err(Rejection::Busy),
                3 => Err(Rejection::DiskFull),
                _ => Err(Rejection::Stopping),
            }).collect();
            prop_assert_eq!(decode_outcomes(&encode_outcomes(&outcomes)), Some(outcomes));
        }
    }
}
