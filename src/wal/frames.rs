//! The frames of one segment, read from its file in their order, with a stretch of the file in memory and not all of
//! it. Called by `recovery`, which finds out where they end, and by `entries`.

use super::disk::{DiskError, DiskFile};
use super::record::{FRAME_HEADER_BYTES, Frame, frame_len, read_frame};
use super::segment::{HEADER_BYTES, Header};

/// Read at once; a frame may be longer. Small in tests, so that frames lie across stretches in every way.
pub const STRETCH_BYTES: usize = if cfg!(test) { 8 } else { 1 << 20 };

pub struct Frames {
    file: Box<dyn DiskFile>,
    file_bytes: u64,
    seed: u32,
    /// Behind the last frame that was good.
    tail: u64,
    /// Bytes of the file from `start` on.
    window: Vec<u8>,
    start: u64,
}

impl Frames {
    pub fn new(file: Box<dyn DiskFile>, header: &Header) -> Result<Self, DiskError> {
        let file_bytes = file.size()?;
        let tail = HEADER_BYTES.min(file_bytes);
        Ok(Frames { file, file_bytes, seed: header.frame_seed(), tail, window: Vec::new(), start: tail })
    }

    /// The next one; `None` where there is no whole one with a right checksum, then and ever after.
    pub fn next(&mut self) -> Result<Option<Frame<'_>>, DiskError> {
        let claimed = frame_len(self.fill(FRAME_HEADER_BYTES)?);
        self.fill(FRAME_HEADER_BYTES + claimed.unwrap_or(0))?;
        let at = self.window.len() - self.ahead().len();
        let frame = read_frame(&self.window[at..], self.seed);
        if let Some(frame) = &frame {
            // A file cut inside of the padding ends before the place of the next frame.
            self.tail = (self.tail + frame.size_bytes() as u64).min(self.file_bytes);
        }
        Ok(frame)
    }

    /// Where the frame after the last good one begins, or would.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    pub fn into_file(self) -> Box<dyn DiskFile> {
        self.file
    }

    /// What lies behind the tail: as many bytes as asked for at least, unless the file ends before.
    fn fill(&mut self, len: usize) -> Result<&[u8], DiskError> {
        let left = self.file_bytes - self.tail;
        if (self.ahead().len() as u64) < left.min(len as u64) {
            let wanted = left.min(STRETCH_BYTES.max(len) as u64) as usize;
            self.window.drain(..self.window.len() - self.ahead().len());
            self.start = self.tail;
            let have = self.window.len();
            self.window.resize(wanted, 0);
            self.file.read_at(self.tail + have as u64, &mut self.window[have..])?;
        }
        Ok(self.ahead())
    }

    /// What of that is in memory.
    fn ahead(&self) -> &[u8] {
        // The padding behind a frame may not have been read with it.
        self.window.get((self.tail - self.start) as usize..).unwrap_or_default()
    }
}
