//! The store's state as one image: what a snapshot holds, in the store's own format. Pure: it reads and writes bytes and
//! knows no file. Streamed: neither side holds more than the state itself and one key. Called by the apply task in
//! `store`. The byte map is in `docs/formats.md`.
//!
//! Reading believes nothing: every length is bounded before it is used, keys must come in order, and both the checksum
//! of the image and the hash of the content, computed anew, must be what the writer said.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::key::Key;
use super::keys::Keys;
use super::state::{State, WINDOW_SIZE};
use super::value::{KeyValue, Revisions, hash};
use crate::channel::COMMAND_BYTES_MAX;
use crate::window::Window;

const FORMAT: u8 = 1;
/// One command brought both key and value, so that no state holds a longer pair, whatever limits a front end has.
const PAIR_BYTES_MAX: usize = COMMAND_BYTES_MAX;
/// What is reserved ahead of the bytes that fill it, and what is read or written in one step.
const STEP_BYTES: usize = 64 << 10;
/// Every other key that is read waits for its neighbours, up to so many: a map that is filled in order splits its last node over and
/// over and leaves half of each empty, and those that come between fill it.
const BETWEEN_MAX: usize = 512;

/// Why bytes are no image of a state.
#[derive(Debug, thiserror::Error)]
pub enum BadImage {
    #[error("a state of format {0} was written by a newer version of raftkv: upgrade this node")]
    NewerFormat(u8),
    #[error("the image of the state is damaged: {0}")]
    Damaged(&'static str),
    #[error("read the image of the state: {0}")]
    Read(#[from] io::Error),
}

/// Writes the whole state.
pub fn write_image(state: &State, out: &mut dyn Write) -> io::Result<()> {
    let mut out = HashedWriter::new(out);
    out.put(&[FORMAT])?;
    for number in [state.applied, state.revision, state.content_hash, state.log_hash, state.seen.len() as u64] {
        out.put(&number.to_le_bytes())?;
    }
    for (node, (boot, window)) in &state.seen {
        let (highest, bits) = window.parts();
        for number in [*node, *boot, highest] {
            out.put(&number.to_le_bytes())?;
        }
        let bits: Vec<u8> = bits.iter().flat_map(|word| word.to_le_bytes()).collect();
        out.put(&bits)?;
    }
    out.put(&(state.keys.len() as u64).to_le_bytes())?;
    for (key, (revisions, value)) in state.keys.iter() {
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("at most PAIR_BYTES_MAX").to_le_bytes();
        out.put(&len(key))?;
        out.put(&len(value))?;
        let Revisions { create, modify, version } = revisions;
        for number in [create, modify, version] {
            out.put(&number.to_le_bytes())?;
        }
        out.put(key)?;
        out.put(value)?;
    }
    out.end()
}

/// Reads what [`write_image`] wrote, here or on another node, to its very end.
pub fn read_image(image: impl Read) -> Result<State, BadImage> {
    let mut input = HashedReader::new(image);
    match input.array()? {
        [FORMAT] => {}
        [format] if format > FORMAT => return Err(BadImage::NewerFormat(format)),
        _ => return Err(BadImage::Damaged("its first byte is no format")),
    }
    let [applied, revision, content_hash, log_hash] =
        [input.number()?, input.number()?, input.number()?, input.number()?];
    let seen = read_seen(&mut input)?;
    let (keys, hash_anew) = read_keys(&mut input, revision)?;
    let hash = input.digest();
    if input.number()? != hash {
        return Err(BadImage::Damaged("its checksum does not match"));
    }
    if hash_anew != content_hash {
        return Err(BadImage::Damaged("the hash of its content does not match"));
    }
    // The end of the image tells whoever delivers it that it was all there.
    if !input.is_at_end()? {
        return Err(BadImage::Damaged("bytes follow its end"));
    }
    Ok(State { keys, revision, applied, content_hash, log_hash, seen })
}

fn read_seen(input: &mut HashedReader<impl Read>) -> Result<BTreeMap<u64, (u64, Window)>, BadImage> {
    let mut seen = BTreeMap::new();
    // Nothing is reserved by a count, here and below: it is not to be believed before the bytes were seen.
    for _ in 0..input.number()? {
        let [node, boot, highest] = [input.number()?, input.number()?, input.number()?];
        if seen.last_key_value().is_some_and(|(last, _)| node <= *last) {
            return Err(BadImage::Damaged("its nodes are not in order"));
        }
        let mut bits = Vec::with_capacity(WINDOW_SIZE / 64);
        for _ in 0..WINDOW_SIZE / 64 {
            bits.push(input.number()?);
        }
        let window = Window::from_parts(highest, bits).ok_or(BadImage::Damaged("a window of requests is none"))?;
        seen.insert(node, (boot, window));
    }
    Ok(seen)
}

/// The keys, and the hash of the content as they make it.
fn read_keys(input: &mut HashedReader<impl Read>, revision: u64) -> Result<(Keys, u64), BadImage> {
    let mut keys = Keys::default();
    let (mut last, mut between) = (None, Vec::new());
    let mut content_hash = 0u64;
    let count = input.number()?;
    for n in 0..count {
        let [key_len, value_len] = [input.len()?, input.len()?];
        if key_len.saturating_add(value_len) > PAIR_BYTES_MAX {
            return Err(BadImage::Damaged("a key and its value are longer than a command can be"));
        }
        let [create, modify, version] = [input.number()?, input.number()?, input.number()?];
        if create > modify || modify > revision || version == 0 {
            return Err(BadImage::Damaged("the revisions of a key are not in order"));
        }
        let (key, value) = (Key::from(&input.bytes(key_len)?[..]), input.bytes(value_len)?);
        if last.as_ref().is_some_and(|last| key <= *last) {
            return Err(BadImage::Damaged("its keys are not in order"));
        }
        last = Some(key.clone());
        let revisions = Revisions { create, modify, version };
        let hash = hash(&key, &value, revisions);
        content_hash = content_hash.wrapping_add(hash);
        if n % 2 == 0 {
            keys.insert(key, KeyValue::new(&value, &value, revisions, hash));
        } else {
            between.push((key, KeyValue::new(&value, &value, revisions, hash)));
        }
        if between.len() == BETWEEN_MAX {
            between.drain(..).for_each(|(key, entry)| keys.insert(key, entry));
        }
    }
    between.into_iter().for_each(|(key, entry)| keys.insert(key, entry));
    assert_eq!(keys.len() as u64, count, "each key that was read is in the map");
    Ok((keys, content_hash))
}

/// Gathers small pieces: to hash and to pass on each by itself would cost more than all else.
struct HashedWriter<'a> {
    out: &'a mut dyn Write,
    hash: Xxh3,
    /// Neither hashed nor written yet.
    gathered: Vec<u8>,
}

impl<'a> HashedWriter<'a> {
    fn new(out: &'a mut dyn Write) -> Self {
        HashedWriter { out, hash: Xxh3::new(), gathered: Vec::with_capacity(STEP_BYTES) }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.gathered.len() + bytes.len() > STEP_BYTES {
            self.flush()?;
            if bytes.len() > STEP_BYTES {
                self.hash.update(bytes);
                return self.out.write_all(bytes);
            }
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hash.update(&self.gathered);
        self.out.write_all(&self.gathered)?;
        self.gathered.clear();
        Ok(())
    }

    /// The hash of all that was put ends the image.
    fn end(mut self) -> io::Result<()> {
        self.flush()?;
        self.out.write_all(&self.hash.digest().to_le_bytes())
    }
}

/// Reads in large steps, and hashes what was taken of one when the next is read.
struct HashedReader<R: Read> {
    input: R,
    hash: Xxh3,
    step: Box<[u8]>,
    /// Of `step`: what was hashed, what was taken, what was read.
    hashed: usize,
    taken: usize,
    read: usize,
}

impl<R: Read> HashedReader<R> {
    fn new(input: R) -> Self {
        let step = vec![0; STEP_BYTES].into_boxed_slice();
        HashedReader { input, hash: Xxh3::new(), step, hashed: 0, taken: 0, read: 0 }
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), BadImage> {
        while !buffer.is_empty() {
            if self.taken == self.read && !self.read_on()? {
                return Err(BadImage::Damaged("it is cut short"));
            }
            let len = buffer.len().min(self.read - self.taken);
            let (part, rest) = buffer.split_at_mut(len);
            part.copy_from_slice(&self.step[self.taken..self.taken + len]);
            self.taken += len;
            buffer = rest;
        }
        Ok(())
    }

    /// Reads the next step, when all of the last is taken. False at the end.
    fn read_on(&mut self) -> Result<bool, BadImage> {
        self.hash.update(&self.step[self.hashed..self.taken]);
        (self.hashed, self.taken, self.read) = (0, 0, 0);
        self.read = loop {
            match self.input.read(&mut self.step) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => break outcome?,
            }
        };
        Ok(self.read > 0)
    }

    /// Of all that was taken.
    fn digest(&mut self) -> u64 {
        self.hash.update(&self.step[self.hashed..self.taken]);
        self.hashed = self.taken;
        self.hash.digest()
    }

    fn is_at_end(&mut self) -> Result<bool, BadImage> {
        Ok(self.taken == self.read && !self.read_on()?)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadImage> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64, BadImage> {
        self.array().map(u64::from_le_bytes)
    }

    fn len(&mut self) -> Result<usize, BadImage> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    /// Takes memory as the bytes come, and in the end no more than they need.
    fn bytes(&mut self, len: usize) -> Result<Bytes, BadImage> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let start = bytes.len();
            let step = (len - start).min(STEP_BYTES);
            bytes.reserve_exact(step.max(start.min(len - start)));
            bytes.resize(start + step, 0);
            self.fill(&mut bytes[start..])?;
        }
        Ok(bytes.into_boxed_slice().into())
    }
}

#[cfg(test)]
mod tests {
    //! A state comes back as it was; any other bytes are refused, and none panics.

    use proptest::prelude::*;

    use super::*;
    use crate::channel::RequestId;
    use crate::command::Command;

    fn state(writes: &[(Vec<u8>, Vec<u8>)]) -> State {
        let mut state = State::founded(1);
        for (n, (key, value)) in (1..).zip(writes) {
            let request = RequestId { node: 1 + n % 3, boot: 7, counter: n };
            state.apply_one(2 * n, n, request, &Command::Put { key, value }.encode()).unwrap();
            state.skip(2 * n + 1, n);
        }
        state
    }

    fn image(state: &State) -> Vec<u8> {
        let mut image = Vec::new();
        write_image(state, &mut image).unwrap();
        image
    }

    fn refused(image: &[u8]) -> String {
        read_image(image).expect_err("refused").to_string()
    }

    /// Puts the right checksum behind a changed image, so that the checks before it are reached.
    fn resealed(mut image: Vec<u8>) -> Vec<u8> {
        let end = image.len() - 8;
        let hash = xxhash_rust::xxh3::xxh3_64(&image[..end]);
        image[end..].copy_from_slice(&hash.to_le_bytes());
        image
    }

    const WINDOW_BYTES: usize = 24 + WINDOW_SIZE / 8;

    #[test]
    fn the_bytes_of_an_image_are_these() {
        let mut state = State::founded(1);
        let put = Command::Put { key: b"k", value: b"hi" }.encode();
        state.apply_one(2, 3, RequestId { node: 1, boot: 7, counter: 5 }, &put).unwrap();
        let mut image = image(&state);
        assert_eq!(read_image(&image[..]).unwrap(), state);
        let bits = image.drain(65 + 8..65 + WINDOW_SIZE / 8).collect::<Vec<u8>>();
        assert!(bits.iter().all(|byte| *byte == 0), "all of the window but its first word");
        let hex: Vec<String> =
            image.chunks(16).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        assert_eq!(hex, GOLDEN, "the format changed: give it a new version, and keep reading this one");
    }

    const GOLDEN: [&str; 8] = [
        "01020000000000000002000000000000",
        "00a49259dec1633ab1c714811a3fe220",
        "56010000000000000001000000000000",
        "00070000000000000005000000000000",
        "00200000000000000001000000000000",
        "00010000000200000002000000000000",
        "00020000000000000001000000000000",
        "006b6869039101144205c74e",
    ];

    #[test]
    fn every_cut_and_every_flipped_byte_is_refused() {
        let whole = image(&state(&[(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), vec![0, 255])]));
        // Of the second window, a part will do.
        let interesting = |at: usize| !(41 + WINDOW_BYTES + 100..41 + 2 * WINDOW_BYTES - 100).contains(&at);
        for at in (0..whole.len()).filter(|at| interesting(*at)) {
            assert!(read_image(&whole[..at]).is_err(), "cut at {at}");
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(read_image(&flipped[..]).is_err(), "flipped at {at}");
        }
        let mut longer = whole;
        longer.push(0);
        assert!(refused(&longer).contains("bytes follow"));
    }

    /// Wrong and yet with a right checksum: what a broken or hostile writer could send.
    #[test]
    fn what_no_store_would_write_is_refused_for_what_it_is() {
        let whole = image(&state(&[(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"2".to_vec())]));
        let keys = 41 + 2 * WINDOW_BYTES + 8;
        for (at, byte, why) in [
            (0, 0, "no format"),
            (17, 1, "hash of its content"),
            (41, 9, "nodes are not in order"),
            (41 + 16, 9, "window of requests"),
            (keys - 8, 1, "checksum"),
            (keys - 8, 3, "longer than a command"),
            (keys + 3, 255, "longer than a command"),
            (keys + 8, 200, "revisions"),
            (keys + 24, 0, "revisions"),
            (keys + 32, b'b', "keys are not in order"),
            (keys + 32, b'c', "keys are not in order"),
            (keys + 33, b'9', "hash of its content"),
        ] {
            let mut image = whole.clone();
            image[at] = byte;
            let error = refused(&resealed(image));
            assert!(error.contains(why), "byte {at} made {byte}: {error}");
        }
        let mut newer = whole;
        newer[0] = 2;
        assert!(matches!(read_image(&newer[..]), Err(BadImage::NewerFormat(2))));
    }

    #[test]
    fn the_longest_pair_fits() {
        let value = vec![7; COMMAND_BYTES_MAX - 21];
        let state = state(&[(b"k".to_vec(), value)]);
        assert_eq!(read_image(&image(&state)[..]).unwrap(), state);
    }

    /// The image of a clone is that of the moment of the clone.
    #[test]
    fn a_view_does_not_change_under_later_writes() {
        let mut state = state(&[(b"a".to_vec(), b"1".to_vec())]);
        let (view, before) = (state.clone(), image(&state));
        let later = Command::Put { key: b"a", value: b"2" }.encode();
        state.apply_one(4, 9, RequestId { node: 1, boot: 8, counter: 1 }, &later).unwrap();
        assert_eq!(image(&view), before);
        assert_ne!(image(&state), before);
    }

    /// Every other key waits for its neighbours on the way back.
    #[test]
    fn states_of_many_keys_survive() {
        for count in [2 * BETWEEN_MAX - 1, 2 * BETWEEN_MAX, 2 * BETWEEN_MAX + 1, 5 * BETWEEN_MAX] {
            let writes: Vec<_> = (0..count).map(|n| (format!("{n:05}").into_bytes(), vec![n as u8])).collect();
            let state = state(&writes);
            assert_eq!(state.len(), count);
            assert_eq!(read_image(&image(&state)[..]).unwrap(), state);
        }
    }

    proptest! {
        #[test]
        fn any_state_survives_and_goes_on_alike(
            writes in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..6), prop::collection::vec(any::<u8>(), 0..99)), 0..20),
        ) {
            let state = state(&writes);
            let image = image(&state);
            let mut restored = read_image(&image[..]).unwrap();
            prop_assert_eq!(&restored, &state);
            // A repeat is a repeat after the restoration too.
            let mut original = state;
            let index = original.applied() + 1;
            let again = Command::Put { key: b"again", value: b"" }.encode();
            let request = RequestId { node: 2, boot: 7, counter: 1 };
            prop_assert_eq!(
                original.apply_one(index, 99, request, &again).unwrap(),
                restored.apply_one(index, 99, request, &again).unwrap()
            );
            prop_assert_eq!(restored, original);
        }

        #[test]
        fn any_bytes_are_taken_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), plausible: bool) {
            if plausible && bytes.len() > 49 {
                bytes[0] = FORMAT;
                bytes[33..41].fill(0);
            }
            prop_assert!(read_image(&bytes[..]).is_err());
        }
    }
}
