//! Writes that wait for their outcome. Each is resolved exactly once: *applied*, when its entry comes back committed;
//! *rejected*, when it surely never reached a log; *unknown*, when time is up and it may be in one. Until then it is
//! proposed again and again under the same request ID: the service skips what it has seen, so a copy costs nothing.
//! Pure: time is counted in ticks.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::channel::{self, Failure, Rejection, Reply, RequestId};

/// Writes in flight at one node. More than this are rejected as busy.
const TICKETS_MAX: usize = 16_384;

/// Bytes of command in flight at one node.
const BYTES_MAX: usize = 64 << 20;

/// A write and the client that waits for it.
struct Ticket<A> {
    command: Bytes,
    reply: Reply<A>,
    /// The tick at which it is given up.
    deadline: u64,
    /// Tries to bring it into a log of which nobody has proved that they did not: it may be there once for each.
    open_tries: u32,
    /// It stands in `waiting`.
    waits: bool,
}

/// The writes that this node took in this life and that are not resolved.
pub struct Pending<A> {
    node: u64,
    boot: u64,
    /// By counter, which is also the order of their deadlines.
    tickets: BTreeMap<u64, Ticket<A>>,
    last_counter: u64,
    /// To be proposed, oldest first. May name tickets that were resolved meanwhile.
    waiting: VecDeque<u64>,
    bytes: usize,
}

impl<A> Pending<A> {
    pub fn new(node: u64, boot: u64) -> Self {
        Pending { node, boot, tickets: BTreeMap::new(), last_counter: 0, waiting: VecDeque::new(), bytes: 0 }
    }

    pub fn len(&self) -> usize {
        self.tickets.len()
    }

    /// Bytes of command held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// To be proposed, and perhaps some that were resolved meanwhile.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes a write, or rejects it at once if too many are in flight. Deadlines never go back from call to call.
    pub fn admit(&mut self, command: Bytes, reply: Reply<A>, deadline: u64) {
        if self.tickets.len() >= TICKETS_MAX || self.bytes + command.len() > BYTES_MAX {
            channel::answer(reply, Err(Failure::Rejected(Rejection::Busy)));
            return;
        }
        self.last_counter += 1;
        self.bytes += command.len();
        self.waiting.push_back(self.last_counter);
        self.tickets.insert(self.last_counter, Ticket { command, reply, deadline, open_tries: 0, waits: true });
    }

    /// The oldest writes that wait to be proposed: at most `count`, and at most `bytes` unless the first is larger.
    /// Each is a try, open until [`Pending::not_proposed`] or [`Pending::refused`] closes it.
    pub fn take(&mut self, count: usize, bytes: usize) -> Vec<Proposed> {
        let mut taken = Vec::with_capacity(count.min(self.waiting.len()));
        let mut size = 0;
        while let Some(counter) = self.waiting.front() {
            let Some(ticket) = self.tickets.get_mut(counter) else {
                self.waiting.pop_front();
                continue;
            };
            size += ticket.command.len();
            if taken.len() == count || (size > bytes && !taken.is_empty()) {
                break;
            }
            let request = RequestId { node: self.node, boot: self.boot, counter: *counter };
            taken.push(Proposed { request, command: ticket.command.clone() });
            ticket.open_tries += 1;
            ticket.waits = false;
            self.waiting.pop_front();
        }
        taken
    }

    /// This try surely reached no log: the write waits again, at its place.
    pub fn not_proposed(&mut self, proposed: &[Proposed]) {
        for Proposed { request, .. } in proposed.iter().rev() {
            if let Some(ticket) = self.tickets.get_mut(&request.counter) {
                ticket.open_tries -= 1;
            }
            self.wait_again(request.counter);
        }
    }

    /// This try was refused, and surely reached no log. The write is rejected, unless another try may have brought it
    /// into one: then it waits again.
    pub fn refused(&mut self, proposed: &Proposed, rejection: Rejection) {
        let counter = proposed.request.counter;
        let Some(ticket) = self.tickets.get_mut(&counter) else {
            return;
        };
        ticket.open_tries -= 1;
        if ticket.open_tries > 0 {
            self.wait_again(counter);
        } else if let Some(ticket) = self.remove(counter) {
            channel::answer(ticket.reply, Err(Failure::Rejected(rejection)));
        }
    }

    /// Rejects what waits, but for what an earlier try may have brought into a log.
    pub fn reject_waiting(&mut self, rejection: Rejection) {
        for counter in std::mem::take(&mut self.waiting) {
            match self.tickets.get(&counter) {
                Some(ticket) if ticket.open_tries > 0 => self.waiting.push_back(counter),
                Some(_) => {
                    if let Some(ticket) = self.remove(counter) {
                        channel::answer(ticket.reply, Err(Failure::Rejected(rejection)));
                    }
                }
                None => {}
            }
        }
    }

    /// Nobody can tell what became of this try: propose it again.
    pub fn lost(&mut self, proposed: &[Proposed]) {
        for Proposed { request, .. } in proposed.iter().rev() {
            self.wait_again(request.counter);
        }
    }

    /// Another leader may not have what the one before took: propose everything again, oldest first.
    pub fn leader_changed(&mut self) {
        self.waiting = self.tickets.keys().copied().collect();
        self.tickets.values_mut().for_each(|ticket| ticket.waits = true);
    }

    fn wait_again(&mut self, counter: u64) {
        if let Some(ticket) = self.tickets.get_mut(&counter).filter(|ticket| !ticket.waits) {
            ticket.waits = true;
            self.waiting.push_front(counter);
        }
    }

    /// A committed entry came by. The reply is there if this node took that write in this life, the first time.
    pub fn committed(&mut self, request: RequestId) -> Option<Reply<A>> {
        if (request.node, request.boot) != (self.node, self.boot) {
            return None;
        }
        self.remove(request.counter).map(|ticket| ticket.reply)
    }

    /// Gives up what is due: rejected with `why` if it was never proposed, else unknown. Returns how many of each.
    pub fn expire(&mut self, now: u64, why: Rejection) -> (u64, u64) {
        let (mut rejected, mut unknown) = (0, 0);
        while let Some(entry) = self.tickets.first_entry().filter(|entry| entry.get().deadline <= now) {
            let ticket = entry.remove();
            self.bytes -= ticket.command.len();
            let failure = if ticket.open_tries > 0 {
                unknown += 1;
                Failure::Unknown
            } else {
                rejected += 1;
                Failure::Rejected(why)
            };
            channel::answer(ticket.reply, Err(failure));
        }
        (rejected, unknown)
    }

    fn remove(&mut self, counter: u64) -> Option<Ticket<A>> {
        let ticket = self.tickets.remove(&counter)?;
        self.bytes -= ticket.command.len();
        Some(ticket)
    }
}

/// One try to bring a write into the log.
#[derive(Debug, Clone)]
pub struct Proposed {
    pub request: RequestId,
    pub command: Bytes,
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::channel::Applied;

    type Answer = oneshot::Receiver<Result<Applied<()>, Failure>>;

    fn pending() -> Pending<()> {
        Pending::new(1, 7)
    }

    fn write(pending: &mut Pending<()>, command: &'static str, deadline: u64) -> Answer {
        let (reply, answer) = oneshot::channel();
        pending.admit(Bytes::from_static(command.as_bytes()), reply, deadline);
        answer
    }

    fn commands(proposed: &[Proposed]) -> Vec<&[u8]> {
        proposed.iter().map(|proposed| &proposed.command[..]).collect()
    }

    #[test]
    fn what_was_never_proposed_is_rejected_and_what_was_is_unknown() {
        let mut pending = pending();
        let mut proposed = write(&mut pending, "a", 5);
        let mut waiting = write(&mut pending, "b", 5);
        let mut later = write(&mut pending, "c", 6);
        assert_eq!(commands(&pending.take(1, 99)), [b"a"]);
        assert_eq!(pending.expire(4, Rejection::NoLeader), (0, 0));
        assert_eq!(pending.expire(5, Rejection::NoLeader), (1, 1));
        assert_eq!(proposed.try_recv().unwrap(), Err(Failure::Unknown));
        assert_eq!(waiting.try_recv().unwrap(), Err(Failure::Rejected(Rejection::NoLeader)));
        assert!(later.try_recv().is_err());
        assert_eq!((pending.len(), pending.bytes()), (1, 1));
    }

    #[test]
    fn a_try_that_reached_no_log_leaves_no_doubt() {
        let mut pending = pending();
        let mut answer = write(&mut pending, "a", 5);
        let first = pending.take(9, 99);
        pending.not_proposed(&first);
        assert_eq!(pending.expire(5, Rejection::NoLeader), (1, 0));
        assert_eq!(answer.try_recv().unwrap(), Err(Failure::Rejected(Rejection::NoLeader)));
    }

    /// The first try may be in the log of a leader that is gone: no refusal of the second makes that sure.
    #[test]
    fn a_refusal_does_not_undo_an_earlier_try() {
        let mut pending = pending();
        let mut answer = write(&mut pending, "a", 5);
        assert_eq!(pending.take(9, 99).len(), 1);
        pending.leader_changed();
        let again = pending.take(9, 99);
        pending.refused(&again[0], Rejection::Busy);
        assert!(answer.try_recv().is_err(), "still waiting");
        assert!(pending.waiting() > 0);
        assert_eq!(pending.expire(5, Rejection::NoLeader), (0, 1));
        assert_eq!(answer.try_recv().unwrap(), Err(Failure::Unknown));
    }

    /// An answer may come after the next try was made: what it says of the first, it does not say of the second.
    #[test]
    fn a_late_word_on_one_try_says_nothing_of_the_next() {
        type Word = fn(&mut Pending<()>, &[Proposed]);
        let refused: Word = |pending, tries| pending.refused(&tries[0], Rejection::DiskFull);
        let not_proposed: Word = |pending, tries| pending.not_proposed(tries);
        let lost: Word = |pending, tries| pending.lost(tries);
        for word in [refused, not_proposed, lost] {
            let mut pending = pending();
            let mut answer = write(&mut pending, "a", 5);
            let first = pending.take(9, 99);
            pending.leader_changed();
            assert_eq!(pending.take(9, 99).len(), 1);
            word(&mut pending, &first);
            assert!(answer.try_recv().is_err());
            let third = pending.take(9, 99);
            assert_eq!((third.len(), pending.waiting()), (1, 0), "it waits once");
            pending.refused(&third[0], Rejection::Busy);
            pending.expire(5, Rejection::NoLeader);
            assert_eq!(answer.try_recv().unwrap(), Err(Failure::Unknown), "the second try may be in a log");
        }
    }

    #[test]
    fn a_full_disk_rejects_what_is_in_no_log() {
        let mut pending = pending();
        let mut answers = ["tried", "new"].map(|command| write(&mut pending, command, 5));
        pending.take(1, 99);
        pending.leader_changed();
        pending.reject_waiting(Rejection::DiskFull);
        assert!(answers[0].try_recv().is_err(), "it may be in a log");
        assert_eq!(answers[1].try_recv().unwrap(), Err(Failure::Rejected(Rejection::DiskFull)));
        assert_eq!(commands(&pending.take(9, 99)), [b"tried"]);
    }

    #[test]
    fn order_and_limits_hold_when_tries_come_back() {
        let mut pending = pending();
        let _answers = ["a", "b", "c", "d"].map(|command| write(&mut pending, command, 5));
        let first = pending.take(3, 2);
        assert_eq!(commands(&first), [b"a", b"b"], "two bytes");
        pending.not_proposed(&first);
        assert_eq!(commands(&pending.take(3, 99)), [b"a", b"b", b"c"], "three writes");
        pending.leader_changed();
        assert_eq!(commands(&pending.take(9, 99)), [b"a", b"b", b"c", b"d"]);
    }

    #[test]
    fn only_this_life_s_writes_meet_their_tickets_and_only_once() {
        let mut pending = pending();
        let _answer = write(&mut pending, "a", 5);
        let request = pending.take(1, 99)[0].request;
        assert!(pending.committed(RequestId { boot: 6, ..request }).is_none());
        assert!(pending.committed(RequestId { node: 2, ..request }).is_none());
        assert!(pending.committed(request).is_some());
        assert!(pending.committed(request).is_none());
        assert_eq!((pending.len(), pending.bytes()), (0, 0));
    }

    #[test]
    fn a_flood_is_rejected_not_queued() {
        let mut pending = pending();
        let answers: Vec<_> = (0..=TICKETS_MAX).map(|_| write(&mut pending, "a", 5)).collect();
        let mut last = answers.into_iter().next_back().unwrap();
        assert_eq!(last.try_recv().unwrap(), Err(Failure::Rejected(Rejection::Busy)));
    }
}
