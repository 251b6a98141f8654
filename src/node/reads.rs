//! Linearizable reads that wait for their barrier. One question for the leader's commit index serves all that came
//! before it; its context is never used again, for a repeated one can release other reads too early. A question that
//! gets no answer is asked anew, and whichever answer comes first serves. Pure: time is counted in ticks.

use std::collections::VecDeque;

use crate::channel::{self, ReadReply, Rejection, RequestId};

/// Reads in flight at one node. More than this are rejected as busy.
const READS_MAX: usize = 65_536;

/// Questions without an answer that are still remembered.
const QUESTIONS_MAX: usize = 16;

struct Waiting {
    reply: ReadReply,
    deadline: u64,
    /// The first question that may serve it: one that is asked after it came.
    question: u64,
}

/// Reads in the order they came.
pub struct Reads {
    node: u64,
    boot: u64,
    waiting: VecDeque<Waiting>,
    /// Questions asked and not answered: counter and tick, oldest first.
    asked: VecDeque<(u64, u64)>,
    last_question: u64,
    /// Reads whose index is known and not yet published, by index.
    confirmed: VecDeque<(u64, Vec<Waiting>)>,
}

impl Reads {
    pub fn new(node: u64, boot: u64) -> Self {
        Reads {
            node,
            boot,
            waiting: VecDeque::new(),
            asked: VecDeque::new(),
            last_question: 0,
            confirmed: VecDeque::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.waiting.len() + self.confirmed.iter().map(|(_, reads)| reads.len()).sum::<usize>()
    }

    /// Takes a read, or rejects it at once if too many wait. Deadlines never go back from call to call.
    pub fn admit(&mut self, reply: ReadReply, deadline: u64) {
        if self.waiting.len() >= READS_MAX {
            channel::answer(reply, Err(Rejection::Busy));
            return;
        }
        self.waiting.push_back(Waiting { reply, deadline, question: self.last_question + 1 });
    }

    /// The context of a question to ask now, if one is needed. One is open at a time, so that all reads that come
    /// meanwhile share the next; after a tick without an answer it is asked anew. Call [`Reads::asked`] once it is.
    pub fn question(&self, now: u64) -> Option<RequestId> {
        let open = self.asked.back().is_some_and(|(_, tick)| *tick == now);
        let needed = !self.waiting.is_empty() && !open;
        needed.then_some(RequestId { node: self.node, boot: self.boot, counter: self.last_question + 1 })
    }

    /// The question last returned was asked.
    pub fn asked(&mut self, now: u64) {
        self.last_question += 1;
        self.asked.push_back((self.last_question, now));
        if self.asked.len() > QUESTIONS_MAX {
            self.asked.pop_front();
        }
    }

    /// The leader's answer to a question: all reads that came before it may be served at `index`.
    pub fn answered(&mut self, context: &[u8], index: u64) {
        let Some(RequestId { counter, .. }) = RequestId::from_bytes(context)
            .filter(|context| (context.node, context.boot) == (self.node, self.boot))
            .filter(|context| self.asked.iter().any(|(asked, _)| *asked == context.counter))
        else {
            return;
        };
        self.asked.retain(|(asked, _)| *asked > counter);
        let served = self.waiting.partition_point(|waiting| waiting.question <= counter);
        if served > 0 {
            self.confirmed.push_back((index, self.waiting.drain(..served).collect()));
        }
    }

    /// Another leader knows nothing of the questions that its predecessor was asked.
    pub fn leader_changed(&mut self) {
        self.asked.clear();
    }

    /// Reads that may be answered once everything up to `published` is applied.
    pub fn due(&mut self, published: u64) -> Vec<ReadReply> {
        let mut due = Vec::new();
        while self.confirmed.front().is_some_and(|(index, _)| *index <= published) {
            let (_, reads) = self.confirmed.pop_front().expect("looked at above");
            due.extend(reads.into_iter().map(|waiting| waiting.reply));
        }
        due
    }

    /// Rejects what is due: no leader answered, or this node did not catch up in time. Returns how many.
    pub fn expire(&mut self, now: u64) -> u64 {
        let mut expired = 0;
        let mut reject = |waiting: Waiting, why| {
            expired += 1;
            channel::answer(waiting.reply, Err(why));
        };
        while let Some(waiting) = self.waiting.pop_front_if(|waiting| waiting.deadline <= now) {
            reject(waiting, Rejection::NoLeader);
        }
        for (_, reads) in &mut self.confirmed {
            let due = reads.partition_point(|waiting| waiting.deadline <= now);
            reads.drain(..due).for_each(|waiting| reject(waiting, Rejection::Behind));
        }
        self.confirmed.retain(|(_, reads)| !reads.is_empty());
        expired
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;

    type Answer = oneshot::Receiver<Result<(), Rejection>>;

    fn read(reads: &mut Reads, deadline: u64) -> Answer {
        let (reply, answer) = oneshot::channel();
        reads.admit(reply, deadline);
        answer
    }

    fn ask(reads: &mut Reads, now: u64) -> [u8; RequestId::BYTES] {
        let context = reads.question(now).expect("a question is needed");
        reads.asked(now);
        context.to_bytes()
    }

    /// A read that came after the question was asked may be newer than the index that answers it.
    #[test]
    fn an_answer_serves_only_reads_that_came_before_its_question() {
        let mut reads = Reads::new(1, 7);
        let _before = (read(&mut reads, 9), read(&mut reads, 9));
        let first = ask(&mut reads, 0);
        let _after = read(&mut reads, 9);
        assert_eq!(reads.question(0), None, "one question at a time");
        reads.answered(&first, 5);
        assert_eq!(reads.due(4).len(), 0, "not published yet");
        assert_eq!(reads.due(5).len(), 2);
        let second = ask(&mut reads, 0);
        reads.answered(&second, 5);
        assert_eq!(reads.due(5).len(), 1);
        assert_eq!(reads.question(1), None);
    }

    #[test]
    fn a_lost_question_is_asked_anew_and_the_late_answer_still_counts() {
        let mut reads = Reads::new(1, 7);
        let _read = read(&mut reads, 9);
        let first = ask(&mut reads, 0);
        let second = ask(&mut reads, 1);
        assert_ne!(first, second, "a context is never used again");
        reads.answered(&first, 5);
        assert_eq!(reads.due(5).len(), 1);
        reads.answered(&second, 6);
        reads.answered(&second, 6);
        assert_eq!(reads.due(9).len(), 0);
    }

    #[test]
    fn a_stranger_s_answer_serves_nobody() {
        let mut reads = Reads::new(1, 7);
        let _read = read(&mut reads, 9);
        let mine = RequestId::from_bytes(&ask(&mut reads, 0)).unwrap();
        reads.answered(&RequestId { boot: 6, ..mine }.to_bytes(), 5);
        reads.answered(&RequestId { counter: 2, ..mine }.to_bytes(), 5);
        reads.answered(b"", 5);
        assert_eq!((reads.due(9).len(), reads.len()), (0, 1));
    }

    #[test]
    fn a_read_is_rejected_when_nobody_answers_or_the_log_does_not_follow() {
        let mut reads = Reads::new(1, 7);
        let mut confirmed = read(&mut reads, 3);
        let question = ask(&mut reads, 0);
        reads.answered(&question, 5);
        let mut waiting = read(&mut reads, 4);
        assert_eq!(reads.expire(3), 1);
        assert_eq!(confirmed.try_recv().unwrap(), Err(Rejection::Behind));
        assert_eq!(waiting.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(reads.expire(4), 1);
        assert_eq!(waiting.try_recv().unwrap(), Err(Rejection::NoLeader));
        assert_eq!(reads.len(), 0);
    }
}
