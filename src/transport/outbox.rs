//! What waits to be sent to one peer. The node puts messages in and never waits; the peer's stream takes them out, or
//! the pipeline while no stream is attached. It refuses what exceeds its bounds: the message is dropped, and raft
//! repeats what still matters.
//!
//! Heartbeats, votes and acknowledgements go ahead of entries: a leader must stay leader while it ships bulk.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::task::Waker;
use std::time::Instant;

use raft::eraftpb::{Message, MessageType};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{IO_TIMEOUT, locked};

/// Messages that wait for a stream.
pub const QUEUED_MESSAGES_MAX: usize = 4096;
/// Their bytes. On top of it one batch is on its way through the connection.
pub const QUEUED_BYTES_MAX: usize = 32 << 20;
/// Messages that wait for the pipeline.
pub const PIPELINE_MESSAGES_MAX: usize = 64;
/// Concurrent posts of the pipeline.
pub const PIPELINE_WORKERS: usize = 4;
/// A stream takes this much at once, or one message.
const BATCH_BYTES: usize = 256 << 10;

#[derive(Default)]
pub struct Outbox {
    queues: Mutex<Queues>,
    /// Wakes the pipeline's workers.
    pub pipeline: Notify,
}

#[derive(Default)]
struct Queues {
    urgent: VecDeque<Message>,
    bulk: VecDeque<Message>,
    bytes: usize,
    /// Of the last message that was numbered; the first is 1.
    sequence: u64,
    /// Counts the streams that were attached; only the newest is served.
    generation: u64,
    stream: Option<Stream>,
    closed: bool,
}

struct Stream {
    /// Set while the stream has nothing to write.
    waker: Option<Waker>,
    /// Cuts its connection.
    connection: CancellationToken,
    /// When the stream last took something, or last had nothing to take.
    progress: Instant,
}

/// What a stream finds.
pub enum Taken {
    /// Numbered from `sequence` on.
    Messages { sequence: u64, messages: Vec<Message> },
    /// Nothing: the waker is kept.
    Nothing,
    /// A newer stream took over, or the peer is gone.
    Detached,
}

impl Outbox {
    /// Queues messages and wakes who sends them, once. Returns how many were dropped because the queue is full.
    pub fn push(&self, messages: impl Iterator<Item = Message>) -> usize {
        let mut queues = self.lock();
        let (empty, mut dropped, mut queued) = (queues.is_empty(), 0, 0);
        let messages_max = if queues.stream.is_some() { QUEUED_MESSAGES_MAX } else { PIPELINE_MESSAGES_MAX };
        for message in messages {
            let weight = weight(&message);
            let full = queues.len() >= messages_max || queues.bytes + weight > QUEUED_BYTES_MAX;
            if full || queues.closed {
                dropped += 1;
                continue;
            }
            queues.bytes += weight;
            queued += 1;
            match message.msg_type {
                MessageType::MsgAppend | MessageType::MsgSnapshot => queues.bulk.push_back(message),
                _ => queues.urgent.push_back(message),
            }
        }
        let Some(stream) = &mut queues.stream else {
            drop(queues);
            (0..queued.min(PIPELINE_WORKERS)).for_each(|_| self.pipeline.notify_one());
            return dropped;
        };
        if empty {
            stream.progress = Instant::now();
        } else if stream.progress.elapsed() > IO_TIMEOUT {
            // The peer vanished without a word, and only TCP still waits for it.
            stream.connection.cancel();
        }
        let waker = stream.waker.take();
        drop(queues);
        if let Some(waker) = waker {
            waker.wake();
        }
        dropped
    }

    /// Makes a new stream the one that is served and ends the one before. Returns its generation.
    pub fn attach(&self, connection: CancellationToken) -> u64 {
        let mut queues = self.lock();
        queues.generation += 1;
        let stream = Stream { waker: None, connection, progress: Instant::now() };
        if queues.closed {
            stream.connection.cancel();
        } else if let Some(old) = queues.stream.replace(stream) {
            old.connection.cancel();
        }
        queues.generation
    }

    /// The stream of `generation` has ended. What waits for it is dropped and counted, for its age is unknown by the
    /// time another comes; `None` if a newer one took over.
    pub fn detach(&self, generation: u64) -> Option<usize> {
        let mut queues = self.lock();
        if queues.generation != generation || queues.stream.take().is_none() {
            return None;
        }
        Some(queues.clear())
    }

    /// Takes all that waits, up to one batch, for the stream of `generation`.
    pub fn take(&self, generation: u64, waker: &Waker) -> Taken {
        let mut queues = self.lock();
        if queues.generation != generation {
            return Taken::Detached;
        }
        let empty = queues.is_empty();
        let Some(stream) = &mut queues.stream else { return Taken::Detached };
        stream.progress = Instant::now();
        if empty {
            stream.waker = Some(waker.clone());
            return Taken::Nothing;
        }
        let sequence = queues.sequence + 1;
        let (mut messages, mut bytes) = (Vec::with_capacity(queues.len().min(64)), 0);
        while bytes < BATCH_BYTES
            && let Some((message, weight)) = queues.pop()
        {
            bytes += weight;
            messages.push(message);
        }
        Taken::Messages { sequence, messages }
    }

    /// Takes one message for the pipeline, with its sequence number; `None` while a stream is attached.
    pub fn take_for_pipeline(&self) -> Option<(u64, Message)> {
        let mut queues = self.lock();
        if queues.stream.is_some() {
            return None;
        }
        let (message, _) = queues.pop()?;
        Some((queues.sequence, message))
    }

    /// The number of a message that goes another way, the snapshot's.
    pub fn next_sequence(&self) -> u64 {
        let mut queues = self.lock();
        queues.sequence += 1;
        queues.sequence
    }

    /// Drops all that waits and cuts the stream: the peer is gone for good.
    pub fn close(&self) {
        let mut queues = self.lock();
        queues.closed = true;
        queues.clear();
        if let Some(stream) = queues.stream.take() {
            stream.connection.cancel();
        }
    }

    pub fn is_attached(&self) -> bool {
        self.lock().stream.is_some()
    }

    /// Messages and bytes that wait.
    pub fn queued(&self) -> (usize, usize) {
        let queues = self.lock();
        (queues.len(), queues.bytes)
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        locked(&self.queues)
    }
}

impl Queues {
    fn len(&self) -> usize {
        self.urgent.len() + self.bulk.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn pop(&mut self) -> Option<(Message, usize)> {
        let message = self.urgent.pop_front().or_else(|| self.bulk.pop_front())?;
        let weight = weight(&message);
        self.bytes -= weight;
        self.sequence += 1;
        Some((message, weight))
    }

    fn clear(&mut self) -> usize {
        let dropped = self.len();
        (self.urgent, self.bulk, self.bytes) = (VecDeque::new(), VecDeque::new(), 0);
        dropped
    }
}

/// About the size of a message in memory, without the walk over every field that its exact size takes: this runs on
/// the node's task.
fn weight(message: &Message) -> usize {
    const MESSAGE_BYTES: usize = 320;
    const ENTRY_BYTES: usize = 112;
    let entries = message.entries.iter().map(|entry| ENTRY_BYTES + entry.data.len() + entry.context.len());
    MESSAGE_BYTES + entries.sum::<usize>() + message.get_snapshot().data.len() + message.context.len()
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;

    fn message(msg_type: MessageType, bytes: usize) -> Message {
        let mut message = Message { msg_type, ..Message::default() };
        message.entries.push(Entry { data: vec![0; bytes].into(), ..Entry::default() });
        message
    }

    fn append(bytes: usize) -> Message {
        message(MessageType::MsgAppend, bytes)
    }

    fn types(taken: Taken) -> Vec<MessageType> {
        match taken {
            Taken::Messages { messages, .. } => messages.iter().map(|message| message.msg_type).collect(),
            Taken::Nothing => Vec::new(),
            Taken::Detached => panic!("detached"),
        }
    }

    #[test]
    fn a_heartbeat_overtakes_bulk_that_waits() {
        let outbox = Outbox::default();
        let stream = outbox.attach(CancellationToken::new());
        outbox.push((0..3).map(|_| append(BATCH_BYTES)));
        assert_eq!(types(outbox.take(stream, Waker::noop())), [MessageType::MsgAppend], "one batch");
        outbox.push([message(MessageType::MsgHeartbeat, 0)].into_iter());
        assert_eq!(
            types(outbox.take(stream, Waker::noop())),
            [MessageType::MsgHeartbeat, MessageType::MsgAppend],
            "ahead of two appends that came first"
        );
    }

    #[test]
    fn a_full_queue_drops_what_comes_last() {
        let outbox = Outbox::default();
        assert_eq!(outbox.push((0..70).map(|_| append(1))), 70 - PIPELINE_MESSAGES_MAX);
        let stream = outbox.attach(CancellationToken::new());
        assert_eq!(outbox.push((0..5000).map(|_| append(1))), 5000 + PIPELINE_MESSAGES_MAX - QUEUED_MESSAGES_MAX);
        assert_eq!(outbox.detach(stream), Some(QUEUED_MESSAGES_MAX));
        outbox.attach(CancellationToken::new());
        assert_eq!(outbox.push((0..33).map(|_| append(1 << 20))), 2, "31 and their weight fit into 32 MiB");
        assert!(outbox.queued().1 <= QUEUED_BYTES_MAX);
    }

    #[test]
    fn a_newer_stream_ends_the_older_and_keeps_what_waits() {
        let outbox = Outbox::default();
        let cut = CancellationToken::new();
        let old = outbox.attach(cut.clone());
        outbox.push([append(1)].into_iter());
        let new = outbox.attach(CancellationToken::new());
        assert!(cut.is_cancelled());
        assert!(matches!(outbox.take(old, Waker::noop()), Taken::Detached));
        assert_eq!(outbox.detach(old), None);
        assert_eq!(types(outbox.take(new, Waker::noop())).len(), 1);
        assert_eq!(outbox.queued(), (0, 0));
    }

    #[test]
    fn every_message_has_its_own_number() {
        let outbox = Outbox::default();
        outbox.push((0..2).map(|_| append(1)));
        assert_eq!(outbox.take_for_pipeline().unwrap().0, 1);
        let stream = outbox.attach(CancellationToken::new());
        assert!(outbox.take_for_pipeline().is_none(), "the stream has taken over");
        outbox.push([append(1)].into_iter());
        let Taken::Messages { sequence, messages } = outbox.take(stream, Waker::noop()) else { panic!("nothing") };
        assert_eq!((sequence, messages.len()), (2, 2));
        outbox.detach(stream);
        outbox.push([append(1)].into_iter());
        assert_eq!(outbox.take_for_pipeline().unwrap().0, 4);
    }
}
