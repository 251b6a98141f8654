//! A disk that is plain memory: no more than the bytes and the names, so that next to nothing of what is measured is the
//! disk. The bookkeeping of `disk_memory`, which knows what a loss of power leaves, would be half of an append.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use raftkv::wal::disk::{Disk, DiskError, DiskFile};

type Bytes = Arc<Mutex<Vec<u8>>>;

#[derive(Default)]
pub struct PlainDisk {
    files: Mutex<BTreeMap<PathBuf, Bytes>>,
    drawn: AtomicU64,
}

struct PlainFile(Bytes);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of the lock panics")
}

fn missing(operation: &'static str, path: &Path) -> DiskError {
    DiskError { operation, path: path.to_owned(), source: io::ErrorKind::NotFound.into() }
}

impl Disk for PlainDisk {
    fn create_dir(&self, _dir: &Path) -> Result<(), DiskError> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError> {
        let files = lock(&self.files);
        let here = files.keys().filter(|path| path.parent() == Some(dir));
        Ok(here.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let bytes = lock(&self.files).get(path).cloned().ok_or_else(|| missing("open", path))?;
        Ok(Box::new(PlainFile(bytes)))
    }

    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let bytes = Bytes::default();
        lock(&self.files).insert(path.to_owned(), bytes.clone());
        Ok(Box::new(PlainFile(bytes)))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        let mut files = lock(&self.files);
        let bytes = files.remove(from).ok_or_else(|| missing("rename", from))?;
        files.insert(to.to_owned(), bytes);
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        lock(&self.files).remove(path).map(drop).ok_or_else(|| missing("remove", path))
    }

    fn sync_dir(&self, _dir: &Path) -> Result<(), DiskError> {
        Ok(())
    }

    fn size(&self, path: &Path) -> Result<Option<u64>, DiskError> {
        Ok(lock(&self.files).get(path).map(|bytes| lock(bytes).len() as u64))
    }

    /// The same numbers in every run.
    fn random(&self) -> Result<u64, getrandom::Error> {
        Ok(self.drawn.fetch_add(1, Ordering::Relaxed))
    }
}

impl DiskFile for PlainFile {
    fn size(&self) -> Result<u64, DiskError> {
        Ok(lock(&self.0).len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        buffer.copy_from_slice(&lock(&self.0)[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let (mut file, start) = (lock(&self.0), offset as usize);
        let end = start + bytes.len();
        if file.len() < end {
            file.resize(end, 0);
        }
        file[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn allocate(&mut self, len: u64) -> Result<(), DiskError> {
        lock(&self.0).resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&mut self) -> Result<(), DiskError> {
        Ok(())
    }

    fn renamed(&mut self, _path: &Path) {}
}
