//! The entries of a log that was opened, read from its files once more and one after the other: a start needs each of
//! them only once, and all of them at once might not fit its memory.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft::eraftpb::Entry;

use super::disk::Disk;
use super::error::Error;
use super::frames::Frames;
use super::record::{self, Record};
use super::recovery;
use super::segment;
use super::terms::Terms;

/// What a log holds, as it was when it was opened.
#[derive(Clone)]
pub struct Entries {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segments: RangeInclusive<u64>,
    terms: Terms,
}

impl Entries {
    pub(super) fn new(disk: Arc<dyn Disk>, dir: &Path, segments: RangeInclusive<u64>, terms: Terms) -> Self {
        Entries { disk, dir: dir.to_owned(), segments, terms }
    }

    pub fn len(&self) -> u64 {
        self.terms.len()
    }

    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// Index of the last one.
    pub fn last(&self) -> Option<u64> {
        self.terms.last()
    }

    /// The term of the one at `index`.
    pub fn term(&self, index: u64) -> Option<u64> {
        self.terms.at(index)
    }

    /// Reads them in their order, from the first on. To be done before the log goes on: what is compacted away then is
    /// not there to be read.
    pub fn read(&self) -> Reader<'_> {
        let next = self.terms.first().unwrap_or(0);
        Reader {
            entries: self,
            left: self.len(),
            next,
            segments: self.segments.clone(),
            frames: None,
            found: VecDeque::new(),
        }
    }
}

impl std::fmt::Debug for Entries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.terms.fmt(f)
    }
}

/// Entries as they are read. After an error there are no more.
pub struct Reader<'a> {
    entries: &'a Entries,
    left: u64,
    next: u64,
    /// Those that are not open yet.
    segments: RangeInclusive<u64>,
    frames: Option<Frames>,
    /// Of the frame that was read last.
    found: VecDeque<Entry>,
}

impl Reader<'_> {
    /// Of several that were written at an index, all of the right term say the same. The last of those at the next index
    /// was written behind the last of these: whoever takes the first right one finds all the others behind it.
    fn read_on(&mut self) -> Result<Entry, Error> {
        loop {
            while let Some(entry) = self.found.pop_front() {
                if entry.index == self.next && self.entries.term(entry.index) == Some(entry.term) {
                    self.left -= 1;
                    self.next = self.next.saturating_add(1);
                    return Ok(entry);
                }
            }
            let frame = match &mut self.frames {
                Some(frames) => frames.next()?,
                None => None,
            };
            if let Some(frame) = frame {
                for record in record::records(frame.payload) {
                    if let Ok(Record::Entry(entry)) = record {
                        self.found.push_back(entry);
                    }
                }
                continue;
            }
            let Some(id) = self.segments.next() else {
                let why = format!("entry {} was here when the log was opened, and is gone", self.next);
                return Err(Error::Corrupt { file: self.entries.dir.clone(), offset: 0, why });
            };
            let path = segment::path(&self.entries.dir, id);
            self.frames = Some(recovery::open_segment(self.entries.disk.as_ref(), &path, id)?.frames);
        }
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let read = self.read_on();
        if read.is_err() {
            self.left = 0;
        }
        Some(read)
    }
}
