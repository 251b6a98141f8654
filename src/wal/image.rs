//! A snapshot file as bytes: a header, what the log must know of the snapshot, the service's image in blocks, and an end
//! that says how much there was. Written and read as a stream, one block in memory. The byte map is in
//! `docs/formats.md`. Called by `snapshot`.
//!
//! Every block's checksum starts from the file's random salt and the number of the block, so that no block of another
//! file or of another place passes.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::disk::{DiskError, DiskFile};
use super::error::Error;
use super::snapshot::Meta;

/// The most of the image that one block holds.
pub const BLOCK_BYTES_MAX: usize = 256 << 10;
/// The longest description of a snapshot: some 100,000 members that were removed.
const META_BYTES_MAX: usize = 4 << 20;

const MAGIC: [u8; 8] = *b"raftkvS\n";
const VERSION: u32 = 1;
/// Magic, version, salt, length of the description.
const CHECKED_BYTES: usize = 24;
/// The same and a CRC, which covers the description too.
const HEADER_BYTES: usize = CHECKED_BYTES + 4;
/// Length u32, CRC u32.
const BLOCK_HEADER_BYTES: usize = 8;
/// Behind the header of the end block: length of the image u64, its CRC u32.
const END_BYTES: usize = 12;
/// Written between two syncs: what the log's own sync may have to wait for.
const SYNC_EVERY_BYTES: u64 = 8 << 20;

/// A file that grows at its end, and is synced as it grows.
pub struct Appender {
    file: Box<dyn DiskFile>,
    len: u64,
    synced: u64,
}

impl Appender {
    /// Takes over an empty file.
    pub fn new(file: Box<dyn DiskFile>) -> Appender {
        Appender { file, len: 0, synced: 0 }
    }

    pub fn append(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_at(self.len, bytes)?;
        self.len += bytes.len() as u64;
        if self.len - self.synced >= SYNC_EVERY_BYTES { self.sync() } else { Ok(()) }
    }

    pub fn sync(&mut self) -> Result<(), DiskError> {
        self.synced = self.len;
        self.file.sync_data()
    }

    pub fn size_bytes(&self) -> u64 {
        self.len
    }
}

/// Writes a snapshot: what goes in through [`Write`] is the image.
pub struct ImageWriter<'a> {
    out: &'a mut Appender,
    salt: u64,
    /// The block being filled, behind room for its header.
    block: Vec<u8>,
    number: u64,
    image_bytes: u64,
    image_crc: u32,
    /// The error that the writer of the image was told in other words.
    failed: Option<DiskError>,
}

impl<'a> ImageWriter<'a> {
    pub fn begin(out: &'a mut Appender, meta: &Meta, salt: u64) -> Result<Self, Error> {
        let meta = serde_json::to_vec(meta).map_err(|error| Error::Image(error.into()))?;
        if meta.len() > META_BYTES_MAX {
            let why = format!("its description has {} bytes, of at most {META_BYTES_MAX}", meta.len());
            return Err(Error::Image(io::Error::other(why)));
        }
        let mut header = Vec::with_capacity(HEADER_BYTES + meta.len());
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&salt.to_le_bytes());
        header.extend_from_slice(&(meta.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header), &meta);
        header.extend_from_slice(&crc.to_le_bytes());
        header.extend_from_slice(&meta);
        out.append(&header)?;
        let block = vec![0; BLOCK_HEADER_BYTES];
        Ok(ImageWriter { out, salt, block, number: 0, image_bytes: 0, image_crc: 0, failed: None })
    }

    /// Closes the image, whose writer ended with `outcome`. Nothing is synced yet.
    pub fn end(mut self, outcome: io::Result<()>) -> Result<(), Error> {
        if let Some(error) = self.failed {
            return Err(error.into());
        }
        outcome.map_err(Error::Image)?;
        if self.block.len() > BLOCK_HEADER_BYTES {
            self.write_block()?;
        }
        self.block.extend_from_slice(&self.image_bytes.to_le_bytes());
        self.block.extend_from_slice(&self.image_crc.to_le_bytes());
        seal(&mut self.block, self.salt, self.number, 0);
        Ok(self.out.append(&self.block)?)
    }

    fn write_block(&mut self) -> Result<(), DiskError> {
        let bytes = &self.block[BLOCK_HEADER_BYTES..];
        self.image_bytes += bytes.len() as u64;
        self.image_crc = crc32c::crc32c_append(self.image_crc, bytes);
        let len = bytes.len() as u32;
        seal(&mut self.block, self.salt, self.number, len);
        self.out.append(&self.block)?;
        self.block.truncate(BLOCK_HEADER_BYTES);
        self.number += 1;
        Ok(())
    }
}

impl Write for ImageWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failed.is_some() {
            return Err(io::Error::other("the snapshot could not be written"));
        }
        let room = BLOCK_HEADER_BYTES + BLOCK_BYTES_MAX - self.block.len();
        let taken = bytes.len().min(room);
        self.block.extend_from_slice(&bytes[..taken]);
        if taken == room {
            self.write_block().map_err(|error| {
                let told = io::Error::new(error.source.kind(), error.to_string());
                self.failed = Some(error);
                told
            })?;
        }
        Ok(taken)
    }

    /// Blocks are full but for the last, whoever writes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts the header over the room left for it.
fn seal(block: &mut [u8], salt: u64, number: u64, len: u32) {
    let crc = block_crc(salt, number, len, &block[BLOCK_HEADER_BYTES..]);
    block[0..4].copy_from_slice(&len.to_le_bytes());
    block[4..8].copy_from_slice(&crc.to_le_bytes());
}

fn block_crc(salt: u64, number: u64, len: u32, bytes: &[u8]) -> u32 {
    let mut head = [0; 20];
    head[..8].copy_from_slice(&salt.to_le_bytes());
    head[8..16].copy_from_slice(&number.to_le_bytes());
    head[16..].copy_from_slice(&len.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&head), bytes)
}

/// The image of a snapshot file, each block verified before a byte of it is handed out. Its end is reached only where
/// all of it was there; until then an end of file is an error.
pub struct Image {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    file_bytes: u64,
    /// Where the next block begins.
    at: u64,
    salt: u64,
    number: u64,
    block: Vec<u8>,
    /// How much of `block` was handed out.
    taken: usize,
    image_bytes: u64,
    image_crc: u32,
    ended: bool,
}

impl Image {
    /// Of the whole file.
    pub fn size_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Reads the front of a file, up to the image.
    pub fn open(file: Box<dyn DiskFile>, path: &Path) -> Result<(Meta, Image), Error> {
        let file_bytes = file.size()?;
        let mut image = Image {
            file,
            path: path.to_owned(),
            file_bytes,
            at: 0,
            salt: 0,
            number: 0,
            block: Vec::new(),
            taken: 0,
            image_bytes: 0,
            image_crc: 0,
            ended: false,
        };
        let header = image.read_next(HEADER_BYTES)?;
        let (checked, crc) = header.split_at(CHECKED_BYTES);
        if checked[..8] != MAGIC {
            return Err(image.corrupt(0, "it is no snapshot"));
        }
        let (version, salt, len) = (u32_at(checked, 8), u64_at(checked, 12), u32_at(checked, 20) as usize);
        if len > META_BYTES_MAX {
            return Err(image.corrupt(20, "its description is too long"));
        }
        let meta = image.read_next(len)?;
        if crc32c::crc32c_append(crc32c::crc32c(checked), &meta) != u32_at(crc, 0) {
            return Err(image.corrupt(0, "the checksum of its header does not match"));
        }
        if version > VERSION {
            return Err(Error::Newer { file: image.path, version });
        }
        let meta: Meta = serde_json::from_slice(&meta)
            .map_err(|error| image.corrupt(HEADER_BYTES as u64, format!("its description is none: {error}")))?;
        meta.check().map_err(|why| image.corrupt(HEADER_BYTES as u64, why))?;
        image.salt = salt;
        Ok((meta, image))
    }

    /// Reads to the end, for the sake of the checks.
    pub fn verify(mut self) -> Result<(), Error> {
        while !self.ended {
            self.next_block()?;
        }
        Ok(())
    }

    /// Reads and checks the next block, or the end.
    fn next_block(&mut self) -> Result<(), Error> {
        let start = self.at;
        let outcome = self.read_block(start);
        if outcome.is_err() {
            // Asked again, it says the same again.
            self.at = start;
        }
        outcome
    }

    fn read_block(&mut self, start: u64) -> Result<(), Error> {
        let header = self.read_next(BLOCK_HEADER_BYTES)?;
        let (len, crc) = (u32_at(&header, 0), u32_at(&header, 4));
        if len as usize > BLOCK_BYTES_MAX {
            return Err(self.corrupt(start, "a block is too long"));
        }
        let bytes = self.read_next(if len == 0 { END_BYTES } else { len as usize })?;
        if block_crc(self.salt, self.number, len, &bytes) != crc {
            return Err(self.corrupt(start, "the checksum of a block does not match"));
        }
        if len == 0 {
            if (u64_at(&bytes, 0), u32_at(&bytes, 8)) != (self.image_bytes, self.image_crc) {
                return Err(self.corrupt(start, "the end does not match what came before it"));
            }
            if self.at != self.file_bytes {
                return Err(self.corrupt(self.at, "bytes follow the end"));
            }
            self.ended = true;
            return Ok(());
        }
        self.image_bytes += u64::from(len);
        self.image_crc = crc32c::crc32c_append(self.image_crc, &bytes);
        self.number += 1;
        (self.block, self.taken) = (bytes, 0);
        Ok(())
    }

    /// The next bytes of the file. `len` is bounded by the caller, and here by what is there.
    fn read_next(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        if len as u64 > self.file_bytes - self.at {
            return Err(self.corrupt(self.file_bytes, "it is cut short"));
        }
        let mut bytes = vec![0; len];
        self.file.read_at(self.at, &mut bytes)?;
        self.at += len as u64;
        Ok(bytes)
    }

    fn corrupt(&self, offset: u64, why: impl Into<String>) -> Error {
        Error::Corrupt { file: self.path.clone(), offset, why: why.into() }
    }
}

impl Read for Image {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.block.len() && !self.ended {
            self.next_block().map_err(io::Error::other)?;
        }
        let left = &self.block[self.taken..];
        let len = left.len().min(buffer.len());
        buffer[..len].copy_from_slice(&left[..len]);
        self.taken += len;
        Ok(len)
    }
}

/// The bytes are there: the caller took them by their length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
