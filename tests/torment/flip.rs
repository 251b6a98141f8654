//! Where a bit may flip: anywhere in a member's snapshots, and in its log before the last frame. A flip in that one cannot be
//! told from a write that a crash tore (`docs/formats.md`), so that nobody could ask for it back.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::dice::Dice;

/// Header of a segment, then frames.
const FIRST_FRAME: usize = 4096;
const FRAME_HEADER: usize = 16;

/// A bit of a file that is now the other way round.
pub struct Flip {
    pub file: PathBuf,
    byte: usize,
    bit: u32,
}

impl fmt::Display for Flip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bit {} of byte {} of {}", self.bit, self.byte, self.file.display())
    }
}

/// Flips one bit. `None` where the member has nothing that may be touched.
pub fn flip(dir: &Path, dice: &mut Dice) -> anyhow::Result<Option<Flip>> {
    let mut snapshots = files(&dir.join("snap"), "snap")?;
    let segments = files(&dir.join("wal"), "wal")?;
    let wants_snapshot = dice.chance(30) && !snapshots.is_empty();
    let places = if wants_snapshot {
        let file = snapshots.swap_remove(dice.below(snapshots.len()));
        let length = fs::metadata(&file)?.len() as usize;
        vec![(file, length)]
    } else {
        before_the_last_frame(segments)?
    };
    let total: usize = places.iter().map(|(_, length)| length).sum();
    if total == 0 {
        return Ok(None);
    }
    let mut at = dice.below(total);
    for (file, length) in places {
        if at < length {
            let bit = dice.below(8) as u32;
            let mut bytes = fs::read(&file)?;
            bytes[at] ^= 1 << bit;
            fs::write(&file, bytes)?;
            return Ok(Some(Flip { file, byte: at, bit }));
        }
        at -= length;
    }
    unreachable!("the place is within the total")
}

fn files(dir: &Path, extension: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    // Names are numbers of one width.
    files.sort();
    Ok(files)
}

/// Segments in their order, each with how many of its bytes come before the last frame of all.
fn before_the_last_frame(segments: Vec<PathBuf>) -> anyhow::Result<Vec<(PathBuf, usize)>> {
    let mut places = Vec::new();
    for file in segments {
        let frames = frames(&fs::read(&file)?);
        match frames.last() {
            // Only its header: the last frame is the one before.
            None => break,
            Some(last) => places.push((file, *last)),
        }
    }
    Ok(places)
}

/// Offsets of the frames in a segment.
fn frames(bytes: &[u8]) -> Vec<usize> {
    let word = |at: usize| bytes.get(at..at + 8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let mut found = Vec::new();
    let mut at = FIRST_FRAME;
    // Of what a file held in an earlier life the sequence does not fit.
    let mut sequence = word(32);
    while let (Some(length), Some(own)) = (word(at), word(at + 8)) {
        let length = (length as u32) as usize;
        if length == 0 || sequence.is_some_and(|expected| expected != own) {
            break;
        }
        found.push(at);
        sequence = Some(own + 1);
        at += (FRAME_HEADER + length).next_multiple_of(8);
    }
    found
}
