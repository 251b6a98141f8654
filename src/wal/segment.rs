//! One file of the log: its name, its header block, and how frames go into it. A segment takes its whole room when it
//! is made, so that a full disk shows early; it gets its name `<id>.wal` only with a durable header and first frame.
//! The byte map is in `docs/formats.md`. Called by the rest of `wal` only.

use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskFile};
use super::error::Error;
use super::record::frame_seed;

/// The smallest size that a flag may ask for: a segment holds two of the longest frames.
pub const SEGMENT_BYTES_MIN: u64 = 16 << 20;
/// The header has a block of its own, so that no frame shares a sector with it.
pub const HEADER_BYTES: u64 = 4096;
/// Of the first segment of a log.
pub const FIRST_ID: u64 = 1;
/// How far ahead of the tail zeros are written: a frame over written zeros costs no metadata when it is synced.
pub const STRETCH_BYTES: u64 = 1 << 20;

const MAGIC: [u8; 8] = *b"raftkvW\n";
const VERSION: u32 = 1;
const FLAG_RECYCLED: u32 = 1;
/// Header bytes under the checksum.
const CHECKED_BYTES: usize = 40;
/// Where the size of the file stands, and the checksum of all up to there.
const SIZE_AT: usize = CHECKED_BYTES + 4;
const SIZE_END: usize = SIZE_AT + 8;
/// Where a full segment says that another follows: in a sector of its own, for the header is durable by then.
const CLOSED_AT: usize = 512;
const CLOSED_END: usize = CLOSED_AT + 8;
const SUFFIX: &str = ".wal";
/// A segment that has no durable first frame yet.
const DRAFT: &str = "segment.new";
static ZEROS: [u8; STRETCH_BYTES as usize] = [0; STRETCH_BYTES as usize];

pub fn path(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("{id:016x}{SUFFIX}"))
}

pub fn draft_path(dir: &Path) -> PathBuf {
    dir.join(DRAFT)
}

/// The IDs of the segments in a directory, lowest first.
pub fn ids(disk: &dyn Disk, dir: &Path) -> Result<Vec<u64>, Error> {
    let names = disk.list(dir)?;
    let id = |name: &String| {
        let hex = name.strip_suffix(SUFFIX).filter(|hex| hex.len() == 16)?;
        u64::from_str_radix(hex, 16).ok()
    };
    let mut ids: Vec<u64> = names.iter().filter_map(id).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Writes zeros from `from` up to `to`.
pub fn write_zeros(file: &mut dyn DiskFile, from: u64, to: u64) -> Result<(), Error> {
    let mut at = from;
    while at < to {
        let len = (to - at).min(STRETCH_BYTES);
        file.write_at(at, &ZEROS[..len as usize])?;
        at += len;
    }
    Ok(())
}

/// The first block of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub id: u64,
    /// Random: with the ID it seeds the checksum of every frame.
    pub salt: u64,
    /// The sequence of the first frame.
    pub first_sequence: u64,
    /// What lies behind the tail may be frames of the file's earlier life instead of zeros.
    pub recycled: bool,
    /// Of the whole file: one that is shorter has lost its end. 0 where the header does not say.
    pub size_bytes: u64,
}

/// Why a block is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHeader {
    Damaged,
    Newer { version: u32 },
}

impl Header {
    pub fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(HEADER_BYTES as usize);
        block.extend_from_slice(&MAGIC);
        block.extend_from_slice(&VERSION.to_le_bytes());
        block.extend_from_slice(&if self.recycled { FLAG_RECYCLED } else { 0 }.to_le_bytes());
        block.extend_from_slice(&self.id.to_le_bytes());
        block.extend_from_slice(&self.salt.to_le_bytes());
        block.extend_from_slice(&self.first_sequence.to_le_bytes());
        let crc = crc32c::crc32c(&block[..CHECKED_BYTES]);
        block.extend_from_slice(&crc.to_le_bytes());
        block.extend_from_slice(&self.size_bytes.to_le_bytes());
        let crc = crc32c::crc32c(&block);
        block.extend_from_slice(&crc.to_le_bytes());
        block.resize(HEADER_BYTES as usize, 0);
        block
    }

    pub fn decode(block: &[u8]) -> Result<Header, BadHeader> {
        let checked = block.get(..CHECKED_BYTES).ok_or(BadHeader::Damaged)?;
        let u32_at = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(block.get(at..at + 4)?.try_into().ok()?)) };
        let u64_at = |at: usize| -> Option<u64> { Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?)) };
        if checked[..8] != MAGIC || u32_at(CHECKED_BYTES) != Some(crc32c::crc32c(checked)) {
            return Err(BadHeader::Damaged);
        }
        match (u32_at(8), u32_at(12), u64_at(16), u64_at(24), u64_at(32)) {
            (Some(VERSION), Some(flags), Some(id), Some(salt), Some(first_sequence)) => {
                let size_bytes = u64_at(SIZE_AT).ok_or(BadHeader::Damaged)?;
                match u32_at(SIZE_END) {
                    Some(0) if size_bytes == 0 => {}
                    Some(crc) if crc == crc32c::crc32c(&block[..SIZE_END]) => {}
                    _ => return Err(BadHeader::Damaged),
                }
                Ok(Header { id, salt, first_sequence, recycled: flags & FLAG_RECYCLED != 0, size_bytes })
            }
            (Some(version), ..) if version > VERSION => Err(BadHeader::Newer { version }),
            _ => Err(BadHeader::Damaged),
        }
    }

    pub fn frame_seed(&self) -> u32 {
        frame_seed(self.id, self.salt)
    }

    /// The sequence with which the next segment begins, where this one was closed. Other bytes there are damage.
    pub fn next_sequence(&self, bytes: &[u8]) -> Result<Option<u64>, BadHeader> {
        let word = bytes.get(CLOSED_AT..CLOSED_END + 4).ok_or(BadHeader::Damaged)?;
        if word.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sequence = u64::from_le_bytes(word[..8].try_into().expect("eight bytes"));
        if word == self.closing_word(sequence) { Ok(Some(sequence)) } else { Err(BadHeader::Damaged) }
    }

    fn closing_word(&self, next_sequence: u64) -> [u8; CLOSED_END + 4 - CLOSED_AT] {
        let mut word = [0; CLOSED_END + 4 - CLOSED_AT];
        word[..8].copy_from_slice(&next_sequence.to_le_bytes());
        let crc = crc32c::crc32c_append(self.frame_seed(), &word[..8]);
        word[8..].copy_from_slice(&crc.to_le_bytes());
        word
    }
}

/// A segment that frames are written to.
pub struct Segment {
    file: Box<dyn DiskFile>,
    pub header: Header,
    pub size_bytes: u64,
    /// Where the next frame goes.
    pub tail: u64,
    /// Up to where zeros (or frames of an earlier life) were really written.
    written: u64,
    /// The highest index of an entry in it that is still needed, 0 where there is none.
    pub last_index: u64,
}

impl Segment {
    /// A new segment under a temporary name, with nothing durable yet. A spare is used as it is, its room taken.
    pub fn draft(
        disk: &dyn Disk,
        dir: &Path,
        spare: Option<Box<dyn DiskFile>>,
        size_bytes: u64,
        id: u64,
        first_sequence: u64,
    ) -> Result<Segment, Error> {
        let salt = disk.random().map_err(Error::Random)?;
        let mut header = Header { id, salt, first_sequence, recycled: false, size_bytes };
        let (mut file, written) = match spare {
            Some(file) => {
                let mut magic = [0; MAGIC.len()];
                file.read_at(0, &mut magic)?;
                header.recycled = magic == MAGIC;
                (file, size_bytes)
            }
            None => {
                let mut file = disk.create(&draft_path(dir))?;
                file.allocate(size_bytes)?;
                (file, HEADER_BYTES)
            }
        };
        file.write_at(0, &header.encode())?;
        Ok(Segment { file, header, size_bytes, tail: HEADER_BYTES, written, last_index: 0 })
    }

    /// Makes a draft, and the frame in it, durable, and gives it its name.
    pub fn publish(&mut self, disk: &dyn Disk, dir: &Path) -> Result<(), Error> {
        self.file.sync_data()?;
        let named = path(dir, self.header.id);
        disk.rename(&draft_path(dir), &named)?;
        self.file.renamed(&named);
        disk.sync_dir(dir)?;
        Ok(())
    }

    /// Says in a full segment that the next one has its name, durable when this returns: from now on a log that ends
    /// here has lost the rest.
    pub fn close(mut self, next_sequence: u64) -> Result<(), Error> {
        self.file.write_at(CLOSED_AT as u64, &self.header.closing_word(next_sequence))?;
        Ok(self.file.sync_data()?)
    }

    /// A segment as recovery found it.
    pub fn resume(file: Box<dyn DiskFile>, header: Header, size_bytes: u64, tail: u64, last_index: u64) -> Segment {
        // The room was taken and zeroed for a stretch at least, but how far is not known.
        let written = if header.recycled { size_bytes } else { tail };
        Segment { file, header, size_bytes, tail, written, last_index }
    }

    /// What is left for frames.
    pub fn room_bytes(&self) -> u64 {
        self.size_bytes.saturating_sub(self.tail)
    }

    /// Writes a sealed frame at the tail. Durable only after [`Segment::sync`].
    pub fn write(&mut self, frame: &[u8]) -> Result<(), Error> {
        let end = self.tail + frame.len() as u64;
        assert!(end <= self.size_bytes, "a frame up to {end} in a segment of {} bytes", self.size_bytes);
        if end > self.written {
            let ahead = (end + STRETCH_BYTES).min(self.size_bytes);
            write_zeros(self.file.as_mut(), end, ahead)?;
            self.written = ahead;
        }
        self.file.write_at(self.tail, frame)?;
        self.tail = end;
        Ok(())
    }

    /// Writes bytes again that lie there already.
    pub fn rewrite(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.file.write_at(offset, bytes)?)
    }

    /// Overwrites what follows the tail with zeros.
    pub fn cut(&mut self, reach_bytes: u64) -> Result<(), Error> {
        let to = (self.tail + reach_bytes).min(self.size_bytes);
        write_zeros(self.file.as_mut(), self.tail, to)
    }

    pub fn sync(&mut self) -> Result<(), Error> {
        Ok(self.file.sync_data()?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk_memory::MemoryDisk;
    use super::*;

    #[test]
    fn the_bytes_of_a_header_are_these() {
        let header = Header { id: 2, salt: 0x5a17, first_sequence: 9, recycled: true, size_bytes: 0x2000 };
        let block = header.encode();
        let hex: Vec<String> =
            block[..56].chunks(8).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        assert_eq!(hex, GOLDEN, "the format on disk changed: give it a new version, and keep reading this one");
        assert_eq!(block.len() as u64, HEADER_BYTES);
        assert_eq!(Header::decode(&block), Ok(header));
    }

    const GOLDEN: [&str; 7] = [
        "726166746b76570a",
        "0100000001000000",
        "0200000000000000",
        "175a000000000000",
        "0900000000000000",
        "2bcfc37c00200000",
        "00000000e0363b16",
    ];

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let block = Header { id: 2, salt: 3, first_sequence: 9, recycled: false, size_bytes: 0x2000 }.encode();
        for bit in 0..(SIZE_END + 4) * 8 {
            let mut block = block.clone();
            block[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&block), Err(BadHeader::Damaged), "bit {bit}");
        }
        assert_eq!(Header::decode(&block[..10]), Err(BadHeader::Damaged));
    }

    /// The first builds wrote zeros there.
    #[test]
    fn a_header_that_does_not_tell_the_size_is_read() {
        let header = Header { id: 2, salt: 3, first_sequence: 9, recycled: false, size_bytes: 0x2000 };
        let mut block = header.encode();
        block[SIZE_AT..SIZE_END + 4].fill(0);
        assert_eq!(Header::decode(&block), Ok(Header { size_bytes: 0, ..header }));
    }

    #[test]
    fn every_flipped_bit_of_the_word_that_another_segment_follows_is_noticed() {
        let header = Header { id: 2, salt: 3, first_sequence: 9, recycled: false, size_bytes: 0x2000 };
        let mut block = header.encode();
        assert_eq!(header.next_sequence(&block), Ok(None));
        block[CLOSED_AT..CLOSED_END + 4].copy_from_slice(&header.closing_word(77));
        assert_eq!(header.next_sequence(&block), Ok(Some(77)));
        for bit in CLOSED_AT * 8..(CLOSED_END + 4) * 8 {
            let mut block = block.clone();
            block[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(header.next_sequence(&block), Err(BadHeader::Damaged), "bit {bit}");
        }
        assert_eq!(Header { id: 3, ..header }.next_sequence(&block), Err(BadHeader::Damaged));
    }

    #[test]
    fn a_newer_format_is_no_damage() {
        let mut block = Header { id: 2, salt: 3, first_sequence: 9, recycled: false, size_bytes: 0x2000 }.encode();
        block[8] = 2;
        let crc = crc32c::crc32c(&block[..CHECKED_BYTES]);
        block[CHECKED_BYTES..CHECKED_BYTES + 4].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&block), Err(BadHeader::Newer { version: 2 }));
    }

    #[test]
    fn only_names_of_segments_are_segments() {
        let disk = MemoryDisk::new();
        for name in ["00000000000000ff.wal", "0000000000000002.wal", "spare", "2.wal", "segment.new", "x.wal"] {
            disk.set_content(&Path::new("/wal").join(name), Vec::new());
        }
        assert_eq!(ids(&disk, Path::new("/wal")).unwrap(), [2, 255]);
        assert_eq!(path(Path::new("/wal"), 255), Path::new("/wal/00000000000000ff.wal"));
    }
}
