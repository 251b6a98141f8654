//! What must hold of commands and of images of the state, whatever bytes they are. Called by `crate::fuzzing`; not in
//! any binary that ships.

use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::key::Key;
use super::state::{State, WINDOW_SIZE};
use super::value::{KeyValue, Revisions, hash};
use super::{read_image, write_image};
use crate::channel::RequestId;
use crate::command::Command;
use crate::window::Window;

/// Any bytes as a command: what is read is written again as the same bytes, and what it does to a state is the same in
/// every replica and comes back from its image.
pub fn command(bytes: &[u8]) {
    if let Ok(command) = Command::decode(bytes) {
        assert_eq!(command.encode(), bytes);
    }
    // There is no more to apply when the choices end.
    apply(&mut Unstructured::new(bytes)).ok();
}

fn apply(u: &mut Unstructured<'_>) -> Result<()> {
    let (mut one, mut other) = (State::founded(1), State::founded(1));
    while !u.is_empty() {
        let (node, boot, counter, len): (u8, u8, u64, u8) = u.arbitrary()?;
        let bytes = u.bytes(usize::from(len).min(u.len()))?;
        let request = RequestId { node: u64::from(node % 4), boot: u64::from(boot % 4), counter };
        // A command as it came, or one that surely is a command.
        let put = Command::Put { key: &bytes[..bytes.len().min(1)], value: bytes }.encode();
        let command = if node < 128 { put } else { Bytes::copy_from_slice(bytes) };
        let index = one.applied() + 1;
        let outcomes = (one.apply_one(index, 1, request, &command), other.apply_one(index, 1, request, &command));
        assert_eq!(outcomes.0, outcomes.1);
        if outcomes.0.is_err() {
            break;
        }
    }
    assert_eq!(one, other);
    assert_eq!(read_image(&image(&one)[..]).expect("an image that was just written"), one);
    Ok(())
}

/// Any bytes as an image, with its own checksum and with a right one; and the image of a state that may be none.
pub fn state_image(bytes: &[u8]) {
    let mut sealed = bytes.to_vec();
    sealed.extend_from_slice(&xxh3_64(bytes).to_le_bytes());
    for bytes in [bytes, &sealed[..]] {
        if let Ok(state) = read_image(bytes) {
            assert_eq!(image(&state), bytes, "what is read is written again as the same bytes");
        }
    }
    // There is nothing to do when the choices end.
    damaged_image(&mut Unstructured::new(bytes)).ok();
}

fn damaged_image(u: &mut Unstructured<'_>) -> Result<()> {
    let state = any_state(u)?;
    let mut bytes = image(&state);
    // Keys whose history cannot be are refused; all else comes back.
    if let Ok(read) = read_image(&bytes[..]) {
        assert_eq!(read, state);
    }
    let (at, with): (u32, u8) = u.arbitrary()?;
    let body = bytes.len() - 8;
    bytes[at as usize % body] ^= with;
    assert!(with == 0 || read_image(&bytes[..]).is_err(), "a damaged image is taken");
    let checksum = xxh3_64(&bytes[..body]).to_le_bytes();
    bytes[body..].copy_from_slice(&checksum);
    if let Ok(read) = read_image(&bytes[..]) {
        assert_eq!(image(&read), bytes);
    }
    Ok(())
}

fn any_state(u: &mut Unstructured<'_>) -> Result<State> {
    let mut state = State::founded(u.arbitrary()?);
    (state.revision, state.log_hash) = u.arbitrary()?;
    for _ in 0..u.int_in_range(0..=2)? {
        let (node, boot, counter): (u64, u64, u64) = u.arbitrary()?;
        let mut window = Window::new(WINDOW_SIZE);
        window.mark(counter);
        state.seen.insert(node, (boot, window));
    }
    for _ in 0..u.int_in_range(0..=4)? {
        let (key_len, value_len, near): (u8, u16, u8) = u.arbitrary()?;
        let key = Key::from(u.bytes(usize::from(key_len % 16).min(u.len()))?);
        let (create, modify, version) =
            if near < 200 { (1, 1 + u64::from(near) % state.revision.max(1), 1) } else { u.arbitrary()? };
        let value = Bytes::from(vec![near; usize::from(value_len)]);
        let revisions = Revisions { create, modify, version };
        let new = hash(&key, &value, revisions);
        if state.keys.get(&key).is_none() {
            state.keys.insert(key, KeyValue::new(&value, &value, revisions, new));
            state.content_hash = state.content_hash.wrapping_add(new);
        }
    }
    Ok(state)
}

fn image(state: &State) -> Vec<u8> {
    let mut image = Vec::new();
    write_image(state, &mut image).expect("a Vec takes it");
    image
}

/// Inputs to begin with, made by the encoders themselves: of [`command`], [`state_image`].
#[cfg(test)]
pub fn seeds() -> [Vec<Vec<u8>>; 2] {
    let mut state = State::founded(1);
    let put = Command::Put { key: b"key", value: b"value" }.encode();
    let commands = vec![put.to_vec(), [&[200, 1, 1, 0, 0, 0, 0, 0, 0, 0, put.len() as u8], &put[..]].concat()];
    let value = Bytes::from_static(b"value");
    state.put(b"key", &value, &value);
    [commands, vec![image(&State::founded(1)), image(&state)]]
}
