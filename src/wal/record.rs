//! Records and frames as bytes. Pure: no disk, no clock; the same bytes for the same input. A frame is what one
//! append writes and syncs; its payload is records, one behind the other. The byte maps are in `docs/formats.md`.
//! All numbers are little endian. Decoding takes any bytes without a panic.

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, HardState};

use crate::cluster::{Member, PeerUrl};

/// The longest frame, its header included. Above every flag: the same on all nodes.
pub const FRAME_BYTES_MAX: u64 = 8 << 20;
/// Length u32, CRC32C u32, sequence u64.
pub const FRAME_HEADER_BYTES: usize = 16;
/// Frames begin at multiples of this.
pub const FRAME_ALIGN: usize = 8;

/// Type u8, length u32.
const RECORD_HEADER_BYTES: usize = 5;
/// Term u64, index u64, type u8, context length u32, data length u32.
const ENTRY_FIXED_BYTES: usize = 25;
/// A normal entry with a longer context than this has a type of its own here: it holds several writes, and versions that do
/// not know of that must not pass it over.
const LONE_CONTEXT_BYTES_MAX: usize = 24;

const FOUNDING: u8 = 1;
const ENTRY: u8 = 2;
const HARD_STATE: u8 = 3;
const BOOT: u8 = 4;
const NONCE: u8 = 5;
const COMPACTED: u8 = 6;

/// One thing that the log remembers.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// The founding members: the snapshot at index 1, term 1 that every founder starts from.
    Founding(Vec<Member>),
    Entry(Entry),
    HardState(HardState),
    /// The number of a start of this node; higher each time.
    Boot(u64),
    /// The nonce of another member's data directory, as it was first seen.
    Nonce {
        member: u64,
        nonce: u64,
    },
    /// Entries up to `index` (whose term is `term`) are no longer needed; the log holds what lies above it, up to `last`.
    /// Where `last` is `index`, a snapshot took the place of the whole log.
    Compacted {
        index: u64,
        term: u64,
        last: u64,
    },
}

/// Why a payload with a right checksum is no list of records: written by a newer version, or by a broken machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(&'static str);

/// The CRC that every frame of a segment starts from, so that frames of an earlier life of its file never match.
pub fn frame_seed(segment: u64, salt: u64) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&segment.to_le_bytes()), &salt.to_le_bytes())
}

/// Makes `frame` an empty frame, to put records in.
pub fn begin_frame(frame: &mut Vec<u8>) {
    frame.clear();
    frame.resize(FRAME_HEADER_BYTES, 0);
}

/// Writes the header over the place left by [`begin_frame`] and pads the end.
pub fn seal_frame(frame: &mut Vec<u8>, seed: u32, sequence: u64) {
    let payload = &frame[FRAME_HEADER_BYTES..];
    let len = payload.len();
    let crc = crc32c::crc32c_append(head_crc(seed, sequence, len), payload);
    frame[0..4].copy_from_slice(&(len as u32).to_le_bytes());
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    frame[8..16].copy_from_slice(&sequence.to_le_bytes());
    frame.resize(frame.len().next_multiple_of(FRAME_ALIGN), 0);
}

/// A frame found in a segment.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub sequence: u64,
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Bytes from its start to the place of the next one.
    pub fn size_bytes(&self) -> usize {
        (FRAME_HEADER_BYTES + self.payload.len()).next_multiple_of(FRAME_ALIGN)
    }
}

/// What bytes say of themselves if they are the header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Of the payload.
    pub len: usize,
    pub sequence: u64,
    pub crc: u32,
}

/// The checksum of a frame up to its payload.
pub fn head_crc(seed: u32, sequence: u64, len: usize) -> u32 {
    let len = u32::try_from(len).expect("a frame is at most FRAME_BYTES_MAX");
    let mut head = [0; 12];
    head[..8].copy_from_slice(&sequence.to_le_bytes());
    head[8..].copy_from_slice(&len.to_le_bytes());
    crc32c::crc32c_append(seed, &head)
}

/// The length of payload that `bytes` claim, if they are the header of a frame and no frame is too long for it.
pub fn frame_len(bytes: &[u8]) -> Option<usize> {
    let len = u32::from_le_bytes(array(bytes.get(..4)?)) as usize;
    (len < FRAME_BYTES_MAX as usize).then_some(len)
}

/// What the header of a frame claims that `bytes` begin with; `None` where the frame would not fit `room_bytes`.
pub fn frame_claim(bytes: &[u8], room_bytes: u64) -> Option<Claim> {
    let header = bytes.get(..FRAME_HEADER_BYTES)?;
    let len = frame_len(header)?;
    let (crc, sequence) = (u32::from_le_bytes(array(&header[4..8])), u64::from_le_bytes(array(&header[8..16])));
    let fits = len != 0 && (FRAME_HEADER_BYTES + len) as u64 <= room_bytes;
    fits.then_some(Claim { len, sequence, crc })
}

/// The frame at the start of `bytes`, if there is a whole one with a right checksum.
pub fn read_frame(bytes: &[u8], seed: u32) -> Option<Frame<'_>> {
    let claim = frame_claim(bytes, bytes.len() as u64)?;
    let payload = &bytes[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + claim.len];
    let crc = crc32c::crc32c_append(head_crc(seed, claim.sequence, claim.len), payload);
    (crc == claim.crc).then_some(Frame { sequence: claim.sequence, payload })
}

/// Bytes that [`put_entry`] adds.
pub fn entry_bytes(entry: &Entry) -> usize {
    RECORD_HEADER_BYTES + ENTRY_FIXED_BYTES + entry.context.len() + entry.data.len()
}

/// Bytes that [`put_hard_state`] adds.
pub const HARD_STATE_BYTES: usize = RECORD_HEADER_BYTES + 24;
/// Bytes that [`put_nonce`] adds.
pub const NONCE_BYTES: usize = RECORD_HEADER_BYTES + 16;
/// Bytes that [`put_compacted`] adds.
pub const COMPACTED_BYTES: usize = RECORD_HEADER_BYTES + 24;

pub fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    put_header(out, ENTRY, entry_bytes(entry) - RECORD_HEADER_BYTES);
    put_u64(out, entry.term);
    put_u64(out, entry.index);
    out.push(match entry.entry_type {
        EntryType::EntryNormal if entry.context.len() > LONE_CONTEXT_BYTES_MAX => 3,
        EntryType::EntryNormal => 0,
        EntryType::EntryConfChange => 1,
        EntryType::EntryConfChangeV2 => 2,
    });
    put_len(out, entry.context.len());
    put_len(out, entry.data.len());
    out.extend_from_slice(&entry.context);
    out.extend_from_slice(&entry.data);
}

pub fn put_hard_state(out: &mut Vec<u8>, state: &HardState) {
    put_header(out, HARD_STATE, 24);
    put_u64(out, state.term);
    put_u64(out, state.vote);
    put_u64(out, state.commit);
}

pub fn put_boot(out: &mut Vec<u8>, number: u64) {
    put_header(out, BOOT, 8);
    put_u64(out, number);
}

pub fn put_nonce(out: &mut Vec<u8>, member: u64, nonce: u64) {
    put_header(out, NONCE, 16);
    put_u64(out, member);
    put_u64(out, nonce);
}

pub fn put_compacted(out: &mut Vec<u8>, index: u64, term: u64, last: u64) {
    put_header(out, COMPACTED, 24);
    put_u64(out, index);
    put_u64(out, term);
    put_u64(out, last);
}

pub fn put_founding(out: &mut Vec<u8>, founders: &[Member]) {
    let start = out.len();
    put_header(out, FOUNDING, 0);
    put_len(out, founders.len());
    for member in founders {
        put_u64(out, member.id);
        put_len(out, member.urls.len());
        for url in &member.urls {
            let text = url.to_string();
            put_len(out, text.len());
            out.extend_from_slice(text.as_bytes());
        }
    }
    let len = (out.len() - start - RECORD_HEADER_BYTES) as u32;
    out[start + 1..start + RECORD_HEADER_BYTES].copy_from_slice(&len.to_le_bytes());
}

fn put_header(out: &mut Vec<u8>, kind: u8, len: usize) {
    out.push(kind);
    put_len(out, len);
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&u32::try_from(len).expect("a length below FRAME_BYTES_MAX").to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// The records of a payload, in order; after an error there are no more.
pub fn records(payload: &[u8]) -> impl Iterator<Item = Result<Record, Malformed>> {
    let mut rest = Reader(payload);
    std::iter::from_fn(move || {
        if rest.0.is_empty() {
            return None;
        }
        let record = rest.record();
        if record.is_err() {
            rest.0 = &[];
        }
        Some(record)
    })
}

/// What is left to decode.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn record(&mut self) -> Result<Record, Malformed> {
        let kind = self.u8()?;
        let len = self.len()?;
        let mut body = Reader(self.take(len)?);
        let record = match kind {
            FOUNDING => Record::Founding(body.founders()?),
            ENTRY => Record::Entry(body.entry()?),
            HARD_STATE => {
                let mut state = HardState::new();
                (state.term, state.vote, state.commit) = (body.u64()?, body.u64()?, body.u64()?);
                Record::HardState(state)
            }
            BOOT => Record::Boot(body.u64()?),
            NONCE => Record::Nonce { member: body.u64()?, nonce: body.u64()? },
            COMPACTED => Record::Compacted { index: body.u64()?, term: body.u64()?, last: body.u64()? },
            _ => return Err(Malformed("a record of a type that this version does not know")),
        };
        if body.0.is_empty() { Ok(record) } else { Err(Malformed("a record is longer than its type allows")) }
    }

    fn entry(&mut self) -> Result<Entry, Malformed> {
        let mut entry = Entry::new();
        entry.term = self.u64()?;
        entry.index = self.u64()?;
        let kind = self.u8()?;
        entry.entry_type = match kind {
            0 | 3 => EntryType::EntryNormal,
            1 => EntryType::EntryConfChange,
            2 => EntryType::EntryConfChangeV2,
            _ => return Err(Malformed("an entry of a type that this version does not know")),
        };
        let (context, data) = (self.len()?, self.len()?);
        if entry.entry_type == EntryType::EntryNormal && (kind == 3) != (context > LONE_CONTEXT_BYTES_MAX) {
            return Err(Malformed("an entry whose context does not fit its type"));
        }
        let mut both = Bytes::copy_from_slice(self.take(context + data)?);
        entry.context = both.split_to(context);
        entry.data = both;
        Ok(entry)
    }

    fn founders(&mut self) -> Result<Vec<Member>, Malformed> {
        // Nothing is reserved by a count: it is not to be believed before the bytes were seen.
        let mut founders = Vec::new();
        for _ in 0..self.len()? {
            let id = self.u64()?;
            let mut urls = Vec::new();
            for _ in 0..self.len()? {
                let len = self.len()?;
                let text = std::str::from_utf8(self.take(len)?).ok();
                let url = text.and_then(|text| PeerUrl::parse(text).ok());
                urls.push(url.ok_or(Malformed("a founding member's URL is none"))?);
            }
            if id == 0 {
                return Err(Malformed("a founding member has the ID 0"));
            }
            founders.push(Member { id, urls });
        }
        Ok(founders)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Malformed("a record is cut short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.take(1)?[0])
    }

    fn len(&mut self) -> Result<usize, Malformed> {
        Ok(u32::from_le_bytes(array(self.take(4)?)) as usize)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(array(self.take(8)?)))
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("a slice of the length asked for")
}

#[cfg(test)]
mod tests {
    //! What was put in comes out; the bytes never change by accident; any bytes are taken without a panic.

    use proptest::prelude::*;

    use super::*;

    fn put(out: &mut Vec<u8>, record: &Record) {
        match record {
            Record::Founding(founders) => put_founding(out, founders),
            Record::Entry(entry) => put_entry(out, entry),
            Record::HardState(state) => put_hard_state(out, state),
            Record::Boot(number) => put_boot(out, *number),
            Record::Nonce { member, nonce } => put_nonce(out, *member, *nonce),
            Record::Compacted { index, term, last } => put_compacted(out, *index, *term, *last),
        }
    }

    fn entry(term: u64, index: u64, kind: u8, context: Vec<u8>, data: Vec<u8>) -> Entry {
        let mut entry = Entry::new();
        (entry.term, entry.index) = (term, index);
        entry.entry_type =
            [EntryType::EntryNormal, EntryType::EntryConfChange, EntryType::EntryConfChangeV2][usize::from(kind)];
        (entry.context, entry.data) = (context.into(), data.into());
        entry
    }

    fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
        let mut state = HardState::new();
        (state.term, state.vote, state.commit) = (term, vote, commit);
        state
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
        let urls = proptest::collection::vec((1u16..).prop_map(|port| format!("http://a.b:{port}")), 0..3);
        let member = (1u64.., urls)
            .prop_map(|(id, urls)| Member { id, urls: urls.iter().map(|url| PeerUrl::parse(url).unwrap()).collect() });
        prop_oneof![
            proptest::collection::vec(member, 0..4).prop_map(Record::Founding),
            (any::<u64>(), any::<u64>(), 0..3u8, bytes(), bytes())
                .prop_map(|(term, index, kind, context, data)| Record::Entry(entry(term, index, kind, context, data))),
            any::<[u64; 3]>().prop_map(|[term, vote, commit]| Record::HardState(hard_state(term, vote, commit))),
            any::<u64>().prop_map(Record::Boot),
            any::<[u64; 2]>().prop_map(|[member, nonce]| Record::Nonce { member, nonce }),
            any::<[u64; 3]>().prop_map(|[index, term, last]| Record::Compacted { index, term, last }),
        ]
    }

    proptest! {
        #[test]
        fn what_goes_into_a_frame_comes_out(
            written in proptest::collection::vec(any_record(), 1..8), segment: u64, salt: u64, sequence: u64,
        ) {
            let mut frame = Vec::new();
            begin_frame(&mut frame);
            written.iter().for_each(|record| put(&mut frame, record));
            seal_frame(&mut frame, frame_seed(segment, salt), sequence);
            prop_assert_eq!(frame.len() % FRAME_ALIGN, 0);

            let read = read_frame(&frame, frame_seed(segment, salt)).unwrap();
            prop_assert_eq!((read.sequence, read.size_bytes()), (sequence, frame.len()));
            let records: Result<Vec<Record>, Malformed> = records(read.payload).collect();
            prop_assert_eq!(records, Ok(written));
            prop_assert_eq!(read_frame(&frame, frame_seed(segment, salt ^ 1)), None);
            prop_assert_eq!(read_frame(&frame[..frame.len() - FRAME_ALIGN], frame_seed(segment, salt)), None);
        }

        #[test]
        fn any_bytes_are_taken_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..8u8) {
            read_frame(&bytes, 0);
            records(&bytes).for_each(drop);
            // The same with a believable header, so that the bodies are reached.
            let mut believable = vec![kind];
            put_len(&mut believable, bytes.len());
            believable.extend_from_slice(&bytes);
            records(&believable).for_each(drop);
        }
    }

    #[test]
    fn the_bytes_of_a_frame_are_these() {
        let member = Member { id: 1, urls: vec![PeerUrl::parse("http://a:1").unwrap()] };
        let mut frame = Vec::new();
        begin_frame(&mut frame);
        put_founding(&mut frame, &[member]);
        put_entry(&mut frame, &entry(2, 3, 1, b"c".to_vec(), b"data".to_vec()));
        put_hard_state(&mut frame, &hard_state(2, 1, 3));
        put_boot(&mut frame, 7);
        put_nonce(&mut frame, 2, 0x0123_4567_89ab_cdef);
        put_compacted(&mut frame, 3, 2, 9);
        seal_frame(&mut frame, frame_seed(1, 0x5a17), 42);
        let hex: Vec<String> =
            frame.chunks(16).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        assert_eq!(hex, GOLDEN, "the format on disk changed: give it a new version, and keep reading this one");
    }

    const GOLDEN: [&str; 12] = [
        "a2000000e3b8f3fc2a00000000000000",
        "011e0000000100000001000000000000",
        "00010000000a000000687474703a2f2f",
        "613a31021e0000000200000000000000",
        "03000000000000000101000000040000",
        "00636461746103180000000200000000",
        "00000001000000000000000300000000",
        "00000004080000000700000000000000",
        "05100000000200000000000000efcdab",
        "89674523010618000000030000000000",
        "00000200000000000000090000000000",
        "0000000000000000",
    ];

    /// A version that knows no shared entries refuses the type, and this one what does not fit it.
    #[test]
    fn an_entry_of_several_writes_has_a_type_of_its_own() {
        const KIND_AT: usize = RECORD_HEADER_BYTES + 16;
        for (context, kind) in [(0, 0), (24, 0), (25, 3), (56, 3)] {
            let mut payload = Vec::new();
            put_entry(&mut payload, &entry(2, 3, 0, vec![0; context], b"data".to_vec()));
            assert_eq!(payload[KIND_AT], kind, "{context} bytes of context");
            assert!(records(&payload).all(|record| record.is_ok()));
            payload[KIND_AT] = 3 - kind;
            assert!(records(&payload).any(|record| record.is_err()), "{context} bytes of context");
        }
    }

    #[test]
    fn an_unknown_record_is_refused_not_skipped() {
        let mut payload = Vec::new();
        put_boot(&mut payload, 1);
        payload.extend_from_slice(&[7, 0, 0, 0, 0]);
        put_boot(&mut payload, 2);
        let found: Vec<_> = records(&payload).collect();
        assert_eq!(found[0], Ok(Record::Boot(1)));
        assert!(found[1].as_ref().unwrap_err().to_string().contains("does not know"));
        assert_eq!(found.len(), 2);
    }
}
