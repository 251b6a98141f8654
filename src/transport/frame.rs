//! One raft message on the wire. Pure: bytes in, frames out. It refuses what is too long, too short, damaged or no
//! message, and never panics on any bytes; `stream`, `pipeline` and `listener` carry the frames.
//!
//! ```text
//! 0        length    u64   bytes that follow; 0 is a keep-alive and nothing follows
//! 8        boot      u64   the sender's start, rises with each
//! 16       sequence  u64   within that start and this receiver, from 1; a repeat has the number of the original
//! 24       checksum  u32   CRC32C of boot, sequence and message
//! 28       message   eraftpb.Message in protobuf
//! ```
//!
//! All numbers are big-endian. The version of this map is the `X-Raft-Version` of the connection.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use protobuf::{CodedOutputStream, Message as _};
use raft::eraftpb::Message;

/// The most that a frame's length may say. Equal on all nodes, whatever their flags.
pub const FRAME_BYTES_MAX: usize = 8 << 20;
/// Entries in one frame. An empty entry is 2 bytes here and about 110 in memory, so the count is bounded before the
/// message is parsed.
pub const FRAME_ENTRIES_MAX: usize = 1 << 16;
/// Bytes of a frame that are not its message.
pub const FRAME_OVERHEAD_BYTES: usize = LENGTH_BYTES + HEAD_BYTES;
/// Written into a silent stream, so that the other end can tell silence from death.
pub const KEEP_ALIVE: [u8; LENGTH_BYTES] = [0; LENGTH_BYTES];

const LENGTH_BYTES: usize = 8;
const HEAD_BYTES: usize = 8 + 8 + 4;
/// The decoder gives a buffer back that one large frame made larger than this.
const KEPT_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    pub boot: u64,
    pub sequence: u64,
    pub message: Message,
}

/// Why bytes are no frame that we take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes, more than {FRAME_BYTES_MAX}")]
    TooLong(u64),
    #[error("a frame of {0} bytes, less than its head")]
    TooShort(u64),
    #[error("more than {FRAME_ENTRIES_MAX} entries in a frame")]
    TooManyEntries,
    #[error("a frame with a wrong checksum")]
    Checksum,
    #[error("a frame that holds no raft message")]
    Undecodable,
    #[error("a frame that was cut, or not exactly one")]
    Truncated,
    #[error("a message from {0}, who is not the sender")]
    WrongSender(u64),
    #[error("a message to {0}, who is not this member")]
    WrongReceiver(u64),
    #[error("a frame of start {0}, older than one already seen")]
    OldBoot(u64),
}

impl FrameError {
    /// A short word for the metrics.
    pub fn token(self) -> &'static str {
        match self {
            FrameError::TooLong(_) => "frame-too-long",
            FrameError::TooShort(_) => "frame-too-short",
            FrameError::TooManyEntries => "frame-too-many-entries",
            FrameError::Checksum => "frame-checksum",
            FrameError::Undecodable => "frame-undecodable",
            FrameError::Truncated => "frame-truncated",
            FrameError::WrongSender(_) => "frame-wrong-sender",
            FrameError::WrongReceiver(_) => "frame-wrong-receiver",
            FrameError::OldBoot(_) => "frame-old-boot",
        }
    }
}

/// Appends one frame to `buffer`. Asserts that the message fits: who makes messages bounds them.
pub fn encode(buffer: &mut BytesMut, boot: u64, sequence: u64, message: &Message) {
    let size = message.compute_size() as usize;
    let length = HEAD_BYTES + size;
    assert!(length <= FRAME_BYTES_MAX, "a {:?} of {size} bytes does not fit a frame", message.msg_type);
    assert!(message.entries.len() <= FRAME_ENTRIES_MAX, "{} entries do not fit a frame", message.entries.len());
    let start = buffer.len();
    buffer.reserve(LENGTH_BYTES + length);
    buffer.put_u64(length as u64);
    buffer.put_u64(boot);
    buffer.put_u64(sequence);
    buffer.put_u32(0);
    let body = buffer.len();
    buffer.resize(body + size, 0);
    let mut output = CodedOutputStream::bytes(&mut buffer[body..]);
    message.write_to_with_cached_sizes(&mut output).expect("a slice of the computed size takes the message");
    output.check_eof();
    let checksum = checksum(&buffer[start + LENGTH_BYTES..]);
    buffer[body - 4..body].copy_from_slice(&checksum.to_be_bytes());
}

/// CRC32C over boot, sequence and message of `frame`, which begins behind the length.
fn checksum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..HEAD_BYTES - 4]), &frame[HEAD_BYTES..])
}

/// Decodes exactly one frame, the body of a `POST /raft`.
pub fn decode_one(bytes: &[u8]) -> Result<Frame, FrameError> {
    match length(bytes)? {
        Some(0) => Err(FrameError::TooShort(0)),
        Some(length) if bytes.len() == LENGTH_BYTES + length => open(&bytes[LENGTH_BYTES..]),
        _ => Err(FrameError::Truncated),
    }
}

/// Cuts frames out of a stream that arrives in pieces. It buffers one incomplete frame at most: whole frames are read
/// where the network left them.
#[derive(Default)]
pub struct Decoder {
    chunk: Bytes,
    partial: BytesMut,
}

impl Decoder {
    /// Takes the next bytes of the stream. What came before must have been drained with [`Decoder::next`].
    pub fn push(&mut self, chunk: Bytes) {
        assert!(self.chunk.is_empty(), "{} bytes were not drained", self.chunk.len());
        self.chunk = chunk;
    }

    /// The next frame; `None` when more bytes are needed. After an error the stream is worthless.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if self.partial.is_empty() {
                match length(&self.chunk)? {
                    Some(0) => self.chunk.advance(LENGTH_BYTES),
                    Some(length) if self.chunk.len() - LENGTH_BYTES >= length => {
                        let frame = open(&self.chunk[LENGTH_BYTES..][..length]);
                        self.chunk.advance(LENGTH_BYTES + length);
                        return frame.map(Some);
                    }
                    _ => {
                        self.partial.extend_from_slice(&self.chunk);
                        self.chunk.clear();
                        return Ok(None);
                    }
                }
            } else {
                self.fill(LENGTH_BYTES);
                let Some(length) = length(&self.partial)? else { return Ok(None) };
                self.fill(LENGTH_BYTES + length);
                if self.partial.len() < LENGTH_BYTES + length {
                    return Ok(None);
                }
                let frame = if length == 0 { None } else { Some(open(&self.partial[LENGTH_BYTES..])?) };
                self.partial.clear();
                if self.partial.capacity() > KEPT_BYTES_MAX {
                    self.partial = BytesMut::new();
                }
                if frame.is_some() {
                    return Ok(frame);
                }
            }
        }
    }

    /// What came behind the last frame; to be called when one was returned.
    pub fn rest(self) -> Bytes {
        assert!(self.partial.is_empty(), "{} bytes of an incomplete frame", self.partial.len());
        self.chunk
    }

    /// True between two frames, where a stream may end.
    pub fn is_empty(&self) -> bool {
        self.partial.is_empty() && self.chunk.is_empty()
    }

    /// Moves bytes from the chunk until `partial` has `wanted` of them, or the chunk is used up.
    fn fill(&mut self, wanted: usize) {
        let missing = wanted.saturating_sub(self.partial.len()).min(self.chunk.len());
        self.partial.extend_from_slice(&self.chunk[..missing]);
        self.chunk.advance(missing);
    }
}

/// What the length field at the start of `bytes` says, checked before anything behind it is read or kept.
fn length(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(mut field) = bytes.get(..LENGTH_BYTES) else { return Ok(None) };
    match field.get_u64() {
        0 => Ok(Some(0)),
        length if length > FRAME_BYTES_MAX as u64 => Err(FrameError::TooLong(length)),
        length if length < HEAD_BYTES as u64 => Err(FrameError::TooShort(length)),
        length => Ok(Some(length as usize)),
    }
}

/// Checks and parses one whole frame, which begins behind its length and is no shorter than its head.
fn open(frame: &[u8]) -> Result<Frame, FrameError> {
    let (mut head, message) = frame.split_at(HEAD_BYTES);
    let (boot, sequence) = (head.get_u64(), head.get_u64());
    if head.get_u32() != checksum(frame) {
        return Err(FrameError::Checksum);
    }
    if entries(message).ok_or(FrameError::Undecodable)? > FRAME_ENTRIES_MAX {
        return Err(FrameError::TooManyEntries);
    }
    // From a slice, not from `Bytes`: each entry gets its own copy, so an entry that stays in the log for hours does
    // not keep a whole read buffer alive.
    let message = Message::parse_from_bytes(message).map_err(|_| FrameError::Undecodable)?;
    Ok(Frame { boot, sequence, message })
}

/// Counts the entries of an encoded message by walking its outermost fields. `None` if it is no protobuf.
fn entries(mut message: &[u8]) -> Option<usize> {
    const ENTRIES_TAG: u64 = 7 << 3 | 2;
    let mut count = 0;
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let skipped = match tag & 7 {
            0 => {
                varint(&mut message)?;
                0
            }
            1 => 8,
            2 => varint(&mut message)?,
            5 => 4,
            _ => return None,
        };
        message = message.get(usize::try_from(skipped).ok()?..)?;
        count += usize::from(tag == ENTRIES_TAG);
    }
    Some(count)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use raft::eraftpb::{Entry, MessageType};

    use super::*;

    fn append(entries: usize, data: &'static [u8]) -> Message {
        let mut message = Message { msg_type: MessageType::MsgAppend, from: 1, to: 2, term: 3, ..Message::default() };
        for index in 1..=entries as u64 {
            let data = Bytes::from_static(data);
            message.entries.push(Entry { index, term: 3, data, ..Entry::default() });
        }
        message
    }

    fn frame(message: &Message) -> BytesMut {
        let mut buffer = BytesMut::new();
        encode(&mut buffer, 7, 9, message);
        buffer
    }

    fn drain(decoder: &mut Decoder) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    /// The byte map above, byte by byte: a change of these bytes is a new protocol version.
    #[test]
    fn the_bytes_of_a_frame_are_these() {
        let message = Message { msg_type: MessageType::MsgHeartbeat, from: 1, to: 2, ..Message::default() };
        let bytes = frame(&message);
        assert_eq!(bytes[..8], 26u64.to_be_bytes());
        assert_eq!(bytes[8..16], 7u64.to_be_bytes());
        assert_eq!(bytes[16..24], 9u64.to_be_bytes());
        assert_eq!(bytes[28..], [0x08, 8, 0x10, 2, 0x18, 1], "msg_type, to, from");
        assert_eq!(bytes[24..28], crc32c::crc32c(&[&bytes[8..24], &bytes[28..]].concat()).to_be_bytes());
        assert_eq!(decode_one(&bytes).unwrap(), Frame { boot: 7, sequence: 9, message });
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_by_its_first_eight_bytes() {
        let mut decoder = Decoder::default();
        decoder.push(Bytes::from((FRAME_BYTES_MAX as u64 + 1).to_be_bytes().to_vec()));
        assert_eq!(decoder.next(), Err(FrameError::TooLong(FRAME_BYTES_MAX as u64 + 1)));
        assert_eq!(decode_one(&u64::MAX.to_be_bytes()), Err(FrameError::TooLong(u64::MAX)));
        assert_eq!(decode_one(&19u64.to_be_bytes()), Err(FrameError::TooShort(19)));
        assert_eq!(decode_one(&KEEP_ALIVE), Err(FrameError::TooShort(0)));
    }

    /// Sealed by hand with a good checksum, so that only the count can refuse it.
    #[test]
    fn a_bomb_of_empty_entries_is_refused_before_it_is_parsed() {
        let seal = |message: &[u8]| {
            let mut bytes = vec![0; FRAME_OVERHEAD_BYTES];
            bytes.extend_from_slice(message);
            let length = (bytes.len() - LENGTH_BYTES) as u64;
            bytes[..8].copy_from_slice(&length.to_be_bytes());
            let checksum = checksum(&bytes[LENGTH_BYTES..]);
            bytes[24..28].copy_from_slice(&checksum.to_be_bytes());
            bytes
        };
        let entries = |count: usize| [7 << 3 | 2, 0].repeat(count);
        assert_eq!(decode_one(&seal(&entries(FRAME_ENTRIES_MAX + 1))), Err(FrameError::TooManyEntries));
        let most = decode_one(&seal(&entries(FRAME_ENTRIES_MAX))).unwrap();
        assert_eq!(most.message.entries.len(), FRAME_ENTRIES_MAX);
        assert_eq!(decode_one(&seal(&[0xff; 40])), Err(FrameError::Undecodable));
    }

    #[test]
    fn a_frame_that_was_cut_or_has_a_tail_is_refused() {
        let bytes = frame(&append(2, b"data"));
        for cut in 0..bytes.len() {
            assert_eq!(decode_one(&bytes[..cut]), Err(FrameError::Truncated), "cut at {cut}");
        }
        assert_eq!(decode_one(&[&bytes[..], b"x"].concat()), Err(FrameError::Truncated));
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let bytes = frame(&append(2, b"data"));
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_one(&bytes).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_never_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..20)) {
            let mut decoder = Decoder::default();
            for piece in pieces {
                decoder.push(piece.into());
                if drain(&mut decoder).is_err() {
                    break;
                }
            }
        }

        /// A checksum is no protection from a peer that computes it over nonsense.
        #[test]
        fn a_sealed_frame_of_any_bytes_never_panics(message in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut frame = vec![0; HEAD_BYTES];
            frame.extend_from_slice(&message);
            let checksum = checksum(&frame);
            frame[16..20].copy_from_slice(&checksum.to_be_bytes());
            if let Ok(frame) = open(&frame) {
                prop_assert_eq!(entries(&message), Some(frame.message.entries.len()));
            }
        }

        #[test]
        fn frames_survive_any_split(counts in prop::collection::vec(0usize..5, 1..6), splits in prop::collection::vec(1usize..70, 1..40)) {
            let mut bytes = BytesMut::new();
            let mut sent = Vec::new();
            for (sequence, count) in (1..).zip(counts) {
                bytes.put_slice(&KEEP_ALIVE);
                let message = append(count, b"some data");
                encode(&mut bytes, 7, sequence, &message);
                sent.push(Frame { boot: 7, sequence, message });
            }
            let mut bytes = bytes.freeze();
            let (mut decoder, mut received) = (Decoder::default(), Vec::new());
            for at in splits.iter().cycle() {
                decoder.push(bytes.split_to((*at).min(bytes.len())));
                received.extend(drain(&mut decoder).unwrap());
                prop_assert_eq!(bytes.is_empty() && received.len() == sent.len(), decoder.is_empty() && bytes.is_empty());
                if bytes.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(received, sent);
        }
    }
}
