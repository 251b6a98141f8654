//! Commands to the bytes in the log and back; messages to the bytes between members and back.

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use raft::eraftpb::{Message, MessageType};
use raftkv::command::Command;
use raftkv::transport::frame;

use super::{Run, VALUE, command, entry, key};

pub const COMMANDS: u64 = 64;

pub fn encode_commands() -> Run {
    let keys: Vec<Vec<u8>> = (0..COMMANDS).map(|n| key(n, COMMANDS)).collect();
    Box::new(move || {
        for key in &keys {
            black_box(Command::Put { key: black_box(key), value: black_box(&VALUE) }.encode());
        }
    })
}

pub fn decode_commands() -> Run {
    let commands: Vec<Bytes> = (0..COMMANDS).map(|n| command(n, COMMANDS)).collect();
    Box::new(move || {
        for command in &commands {
            black_box(Command::decode(black_box(command)).expect("a command"));
        }
    })
}

/// The leader's message with so many entries.
fn append(entries: u64) -> Message {
    let entries = (2..2 + entries).map(|index| entry(index, &command(index, COMMANDS)));
    let mut message =
        Message { from: 1, to: 2, term: 1, log_term: 1, index: 1, entries: entries.collect(), ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    message
}

pub fn encode_message(entries: u64) -> Run {
    let message = append(entries);
    let mut buffer = BytesMut::new();
    Box::new(move || {
        buffer.clear();
        frame::encode(&mut buffer, 1, 1, black_box(&message));
        black_box(&buffer);
    })
}

pub fn decode_message(entries: u64) -> Run {
    let mut buffer = BytesMut::new();
    frame::encode(&mut buffer, 1, 1, &append(entries));
    Box::new(move || {
        black_box(frame::decode_one(black_box(&buffer)).expect("a frame"));
    })
}
