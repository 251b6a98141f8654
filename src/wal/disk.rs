//! The one door to the file system: whatever the log does to a disk goes through [`Disk`], so that a test can lose
//! power, run out of room or fail any single operation. [`RealDisk`] is the operating system; the other implementor
//! is `disk_memory::MemoryDisk`. Called by the rest of `wal` only.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Directories and names. A name is durable only after [`Disk::sync_dir`] of the directory that holds it.
pub trait Disk: Send + Sync {
    /// Creates a directory and those above it; one that exists is fine.
    fn create_dir(&self, dir: &Path) -> Result<(), DiskError>;
    /// The names in a directory, in no order; none where the directory is missing.
    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError>;
    /// Opens a file that exists, to read and write.
    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError>;
    /// Creates a file that must not exist yet, to read and write.
    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError>;
    /// Gives a file another name in one step; a file of that name is replaced.
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError>;
    fn remove(&self, path: &Path) -> Result<(), DiskError>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> Result<(), DiskError>;
    /// Size in bytes, `None` where there is no such file.
    fn size(&self, path: &Path) -> Result<Option<u64>, DiskError>;
    /// A number that no file of an earlier life has: what tells a new file from the bytes of an old one.
    fn random(&self) -> Result<u64, getrandom::Error>;
}

/// An open file. Content and size are durable only after [`DiskFile::sync_data`].
pub trait DiskFile: Send {
    fn size(&self) -> Result<u64, DiskError>;
    /// Fills the whole buffer from `offset`; an end of file before that is an error.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    /// Makes the file `len` bytes long and takes the room for it now, so that a full disk shows here.
    fn allocate(&mut self, len: u64) -> Result<(), DiskError>;
    fn sync_data(&mut self) -> Result<(), DiskError>;
    /// The file has another name now, under which its errors are to be told.
    fn renamed(&mut self, path: &Path);
}

/// The whole content of a file.
pub fn read_all(file: &dyn DiskFile) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; usize::try_from(file.size()?).expect("a file that fits the address space")];
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// An operation that failed, and on which path.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {source}", path.display())]
pub struct DiskError {
    pub operation: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl DiskError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError { operation, path: path.to_owned(), source }
}

/// The file system of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

struct RealFile {
    file: File,
    path: PathBuf,
}

impl Disk for RealDisk {
    fn create_dir(&self, dir: &Path) -> Result<(), DiskError> {
        fs::create_dir_all(dir).map_err(failed("create directory", dir))
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed("list", dir))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            // A name that is not UTF-8 is none of ours.
            names.extend(entry.map_err(failed("list", dir))?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed("open", path))?;
        Ok(Box::new(RealFile { file, path: path.to_owned() }))
    }

    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path).map_err(failed("create", path))?;
        Ok(Box::new(RealFile { file, path: path.to_owned() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        fs::rename(from, to).map_err(failed("rename", from))
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        fs::remove_file(path).map_err(failed("remove", path))
    }

    fn sync_dir(&self, dir: &Path) -> Result<(), DiskError> {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync directory", dir))
    }

    fn size(&self, path: &Path) -> Result<Option<u64>, DiskError> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("look at", path)(error)),
        }
    }

    fn random(&self) -> Result<u64, getrandom::Error> {
        getrandom::u64()
    }
}

impl DiskFile for RealFile {
    fn size(&self) -> Result<u64, DiskError> {
        self.file.metadata().map(|metadata| metadata.len()).map_err(failed("look at", &self.path))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_exact_at(buffer, offset).map_err(failed("read", &self.path))
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(bytes, offset).map_err(failed("write", &self.path))
    }

    fn allocate(&mut self, len: u64) -> Result<(), DiskError> {
        match rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, len) {
            // A file system without preallocation still gets the size; a full disk then shows when zeros are written.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.file.set_len(len),
            outcome => outcome.map_err(io::Error::from),
        }
        .map_err(failed("allocate", &self.path))
    }

    fn sync_data(&mut self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(failed("sync", &self.path))
    }

    fn renamed(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
    }
}
