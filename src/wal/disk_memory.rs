//! A disk in memory for tests and for the simulator. It knows what was synced: [`MemoryDisk::crash`] loses power, and
//! a caller decides about each unsynced sector and name whether it survives. It can fail any single operation, run
//! out of room, and flip bits. Directories themselves are durable at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskError, DiskFile};

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// Clones share one disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryDisk {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Clone, Default)]
struct Shared {
    files: BTreeMap<u64, Content>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// What happened to names since their directory was synced, oldest first.
    changes: Vec<(PathBuf, Change)>,
    capacity_bytes: Option<u64>,
    operations: u64,
    syncs: u64,
    fail_at: Option<u64>,
    stop_at: Option<u64>,
    crashes: u64,
    seed: u64,
    drawn: u64,
}

#[derive(Debug, Clone, Default)]
struct Content {
    bytes: Vec<u8>,
    durable_len: usize,
    /// Earlier contents of each sector written since the last sync, oldest first.
    dirty: BTreeMap<usize, Vec<Vec<u8>>>,
    /// What is on the disk below sectors whose sync failed. As Linux has it, they read as written and later syncs pass
    /// over them: only another write makes them durable.
    lost: BTreeMap<usize, Vec<u8>>,
}

#[derive(Debug, Clone)]
enum Change {
    Link(PathBuf, u64),
    Rename(PathBuf, PathBuf),
    Unlink(PathBuf),
}

impl MemoryDisk {
    pub fn new() -> Self {
        MemoryDisk::default()
    }

    /// An empty disk whose random numbers follow from `seed`.
    pub fn seeded(seed: u64) -> Self {
        let disk = MemoryDisk::default();
        disk.shared().seed = seed;
        disk
    }

    /// A disk of its own with the same content.
    pub fn fork(&self) -> Self {
        MemoryDisk { shared: Arc::new(Mutex::new(self.shared().clone())) }
    }

    /// Limits what all files together may hold; `None` lifts the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.shared().capacity_bytes = bytes;
    }

    /// What all files together take.
    pub fn used_bytes(&self) -> u64 {
        let shared = self.shared();
        shared.names.values().map(|id| shared.files[id].bytes.len() as u64).sum()
    }

    /// Operations so far, each call through [`Disk`] or [`DiskFile`] being one.
    pub fn operations(&self) -> u64 {
        self.shared().operations
    }

    /// File syncs so far.
    pub fn syncs(&self) -> u64 {
        self.shared().syncs
    }

    /// Lets the operation with this number (counted from 0) fail with EIO. A write has happened all the same, unsynced;
    /// what a sync should have made durable reads as written, and is lost at the next crash.
    pub fn fail_at(&self, operation: u64) {
        self.shared().fail_at = Some(operation);
    }

    /// Cuts the power in the middle of this operation: it and all later ones fail, until [`MemoryDisk::crash`].
    pub fn stop_at(&self, operation: u64) {
        self.shared().stop_at = Some(operation);
    }

    /// Whether an operation is yet to fail.
    pub fn is_to_fail(&self) -> bool {
        let shared = self.shared();
        shared.fail_at.is_some_and(|fail| shared.operations <= fail)
    }

    /// Whether there is a limit to its room.
    pub fn is_short(&self) -> bool {
        self.shared().capacity_bytes.is_some()
    }

    /// Whether the power is out since [`MemoryDisk::stop_at`].
    pub fn has_stopped(&self) -> bool {
        let shared = self.shared();
        shared.stop_at.is_some_and(|stop| shared.operations > stop)
    }

    /// Takes back the faults that are yet to come.
    pub fn heal(&self) {
        let mut shared = self.shared();
        shared.fail_at = None;
        if shared.stop_at.is_some_and(|stop| shared.operations <= stop) {
            shared.stop_at = None;
        }
    }

    /// Loses power and comes back. `survives` is asked for each step of each unsynced sector, size and name;
    /// names of one directory survive in order. Files that were open stay dead.
    pub fn crash(&self, survives: &mut dyn FnMut() -> bool) {
        let mut shared = self.shared();
        let mut broken: BTreeSet<PathBuf> = BTreeSet::new();
        for (dir, change) in std::mem::take(&mut shared.changes) {
            if !broken.contains(&dir) && survives() {
                change.apply(&mut shared.durable_names);
            } else {
                broken.insert(dir);
            }
        }
        shared.names = shared.durable_names.clone();
        for content in shared.files.values_mut() {
            content.crash(survives);
        }
        shared.crashes += 1;
        shared.stop_at = None;
        shared.fail_at = None;
    }

    /// The content of a file as a reader sees it now.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let shared = self.shared();
        shared.names.get(path).map(|id| shared.files[id].bytes.clone())
    }

    /// Replaces the content of a file, durably, behind the back of whoever has it open.
    pub fn set_content(&self, path: &Path, bytes: Vec<u8>) {
        let mut shared = self.shared();
        let next = shared.files.keys().last().map_or(0, |last| last + 1);
        let id = shared.names.get(path).copied().unwrap_or(next);
        shared.names.insert(path.to_owned(), id);
        shared.durable_names.insert(path.to_owned(), id);
        let durable_len = bytes.len();
        shared.files.insert(id, Content { bytes, durable_len, ..Content::default() });
    }

    /// Flips one bit of a file: bit `bit % 8` of byte `bit / 8`.
    pub fn flip(&self, path: &Path, bit: u64) {
        let mut bytes = self.content(path).expect("a file to damage");
        bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        self.set_content(path, bytes);
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no holder of the lock panics")
    }
}

impl Content {
    fn crash(&mut self, survives: &mut dyn FnMut() -> bool) {
        for (sector, below) in std::mem::take(&mut self.lost) {
            self.restore(sector, &below);
        }
        for (sector, mut versions) in std::mem::take(&mut self.dirty) {
            // Several unsynced writes to one sector: any of them may be the last that reached the disk.
            let mut kept = None;
            while !versions.is_empty() && !survives() {
                kept = versions.pop();
            }
            if let Some(kept) = kept {
                self.restore(sector, &kept);
            }
        }
        if self.bytes.len() != self.durable_len && !survives() {
            self.bytes.resize(self.durable_len, 0);
        }
        self.durable_len = self.bytes.len();
    }

    fn restore(&mut self, sector: usize, version: &[u8]) {
        let start = sector * SECTOR_BYTES;
        self.bytes[start..start + version.len()].copy_from_slice(version);
    }

    /// Forgets which sectors are not durable, though nothing made them so.
    fn lose(&mut self) {
        for (sector, versions) in std::mem::take(&mut self.dirty) {
            let below = versions.into_iter().next().expect("a dirty sector has an earlier version");
            self.lost.entry(sector).or_insert(below);
        }
    }
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Change::Link(path, id) => {
                names.insert(path.clone(), *id);
            }
            Change::Rename(from, to) => {
                if let Some(id) = names.remove(from) {
                    names.insert(to.clone(), id);
                }
            }
            Change::Unlink(path) => {
                names.remove(path);
            }
        }
    }
}

impl Shared {
    /// Counts an operation. `Err` is its outcome; with `true` the operation takes effect all the same.
    fn begin(&mut self, operation: &'static str, path: &Path) -> Result<(), (bool, DiskError)> {
        let number = self.operations;
        self.operations += 1;
        let stopped = self.stop_at.is_some_and(|stop| number >= stop);
        if stopped || self.fail_at == Some(number) {
            return Err((self.stop_at.is_none_or(|stop| number == stop), eio(operation, path)));
        }
        Ok(())
    }

    fn change(&mut self, path: &Path, change: Change) {
        change.apply(&mut self.names);
        self.changes.push((path.parent().unwrap_or(path).to_owned(), change));
    }

    fn grow(&mut self, id: u64, len: usize, operation: &'static str, path: &Path) -> Result<(), DiskError> {
        let used: usize = self.names.values().map(|id| self.files[id].bytes.len()).sum();
        let content = self.files.get_mut(&id).expect("an open file has content");
        let more = len.saturating_sub(content.bytes.len());
        if more > 0 && self.capacity_bytes.is_some_and(|capacity| (used + more) as u64 > capacity) {
            return Err(error(operation, path, io::ErrorKind::StorageFull.into()));
        }
        content.bytes.resize(content.bytes.len() + more, 0);
        Ok(())
    }
}

fn error(operation: &'static str, path: &Path, source: io::Error) -> DiskError {
    DiskError { operation, path: path.to_owned(), source }
}

fn eio(operation: &'static str, path: &Path) -> DiskError {
    error(operation, path, io::Error::other("input/output error (made up)"))
}

/// Runs `act`, which has the effect of an operation, as the faults that were asked for allow.
fn operate<T>(
    shared: &mut Shared,
    operation: &'static str,
    path: &Path,
    act: impl FnOnce(&mut Shared) -> Result<T, DiskError>,
) -> Result<T, DiskError> {
    match shared.begin(operation, path) {
        Ok(()) => act(shared),
        Err((takes_effect, error)) => {
            if takes_effect {
                act(shared)?;
            }
            Err(error)
        }
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    id: u64,
    path: PathBuf,
    /// The number of crashes when it was opened: it does not outlive the next one.
    crashes: u64,
}

impl Disk for MemoryDisk {
    fn create_dir(&self, dir: &Path) -> Result<(), DiskError> {
        operate(&mut self.shared(), "create directory", dir, |_| Ok(()))
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>, DiskError> {
        operate(&mut self.shared(), "list", dir, |shared| {
            let here = shared.names.keys().filter(|path| path.parent() == Some(dir));
            Ok(here.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
        })
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        operate(&mut self.shared(), "open", path, |shared| match shared.names.get(path) {
            None => Err(error("open", path, io::ErrorKind::NotFound.into())),
            Some(id) => {
                let (disk, path) = (self.clone(), path.to_owned());
                Ok(Box::new(MemoryFile { disk, id: *id, path, crashes: shared.crashes }) as Box<dyn DiskFile>)
            }
        })
    }

    fn create(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        operate(&mut self.shared(), "create", path, |shared| {
            if shared.names.contains_key(path) {
                return Err(error("create", path, io::ErrorKind::AlreadyExists.into()));
            }
            let id = shared.files.keys().last().map_or(0, |last| last + 1);
            shared.files.insert(id, Content::default());
            shared.change(path, Change::Link(path.to_owned(), id));
            let (disk, path) = (self.clone(), path.to_owned());
            Ok(Box::new(MemoryFile { disk, id, path, crashes: shared.crashes }) as Box<dyn DiskFile>)
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        operate(&mut self.shared(), "rename", from, |shared| {
            if !shared.names.contains_key(from) {
                return Err(error("rename", from, io::ErrorKind::NotFound.into()));
            }
            shared.change(from, Change::Rename(from.to_owned(), to.to_owned()));
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        operate(&mut self.shared(), "remove", path, |shared| {
            if !shared.names.contains_key(path) {
                return Err(error("remove", path, io::ErrorKind::NotFound.into()));
            }
            shared.change(path, Change::Unlink(path.to_owned()));
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &Path) -> Result<(), DiskError> {
        let mut shared = self.shared();
        // A sync that fails has made nothing durable for sure: the crash decides.
        shared.begin("sync directory", dir).map_err(|(_, error)| error)?;
        let (here, elsewhere) = std::mem::take(&mut shared.changes).into_iter().partition(|(of, _)| of == dir);
        shared.changes = elsewhere;
        let here: Vec<(PathBuf, Change)> = here;
        here.iter().for_each(|(_, change)| change.apply(&mut shared.durable_names));
        Ok(())
    }

    fn size(&self, path: &Path) -> Result<Option<u64>, DiskError> {
        operate(&mut self.shared(), "look at", path, |shared| {
            Ok(shared.names.get(path).map(|id| shared.files[id].bytes.len() as u64))
        })
    }

    /// A sequence of its own for each seed: what a test does, it does again.
    fn random(&self) -> Result<u64, getrandom::Error> {
        let mut shared = self.shared();
        shared.drawn += 1;
        Ok(xxhash_rust::xxh3::xxh3_64_with_seed(&shared.drawn.to_le_bytes(), shared.seed))
    }
}

impl MemoryFile {
    fn operate<T>(
        &self,
        operation: &'static str,
        act: impl FnOnce(&mut Shared) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let mut shared = self.disk.shared();
        if shared.crashes != self.crashes {
            return Err(eio(operation, &self.path));
        }
        operate(&mut shared, operation, &self.path, act)
    }
}

impl DiskFile for MemoryFile {
    fn size(&self) -> Result<u64, DiskError> {
        self.operate("look at", |shared| Ok(shared.files[&self.id].bytes.len() as u64))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.operate("read", |shared| {
            let bytes = shared.files[&self.id].bytes.get(offset as usize..offset as usize + buffer.len());
            buffer
                .copy_from_slice(bytes.ok_or_else(|| error("read", &self.path, io::ErrorKind::UnexpectedEof.into()))?);
            Ok(())
        })
    }

    fn write_at(&mut self, offset: u64, new: &[u8]) -> Result<(), DiskError> {
        self.operate("write", |shared| {
            let (start, end) = (offset as usize, offset as usize + new.len());
            shared.grow(self.id, end, "write", &self.path)?;
            let content = shared.files.get_mut(&self.id).expect("an open file has content");
            for sector in start / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
                let whole = sector * SECTOR_BYTES..((sector + 1) * SECTOR_BYTES).min(content.bytes.len());
                let versions = content.dirty.entry(sector).or_default();
                versions.extend(content.lost.remove(&sector));
                versions.push(content.bytes[whole].to_vec());
            }
            content.bytes[start..end].copy_from_slice(new);
            Ok(())
        })
    }

    fn allocate(&mut self, len: u64) -> Result<(), DiskError> {
        self.operate("allocate", |shared| shared.grow(self.id, len as usize, "allocate", &self.path))
    }

    fn sync_data(&mut self) -> Result<(), DiskError> {
        let mut shared = self.disk.shared();
        if shared.crashes != self.crashes {
            return Err(eio("sync", &self.path));
        }
        let outcome = shared.begin("sync", &self.path);
        // Where the power goes, the crash decides what the sync still did.
        let powered = shared.stop_at.is_none_or(|stop| shared.operations <= stop);
        let content = shared.files.get_mut(&self.id).expect("an open file has content");
        if let Err((_, error)) = outcome {
            if powered {
                content.lose();
            }
            return Err(error);
        }
        content.dirty.clear();
        content.durable_len = content.bytes.len();
        shared.syncs += 1;
        Ok(())
    }

    fn renamed(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "/dir/file";

    /// A file with 600 durable bytes of 1 and then 600 unsynced ones of 2 over them.
    fn disk() -> (MemoryDisk, Box<dyn DiskFile>) {
        let disk = MemoryDisk::new();
        let mut file = disk.create(Path::new(FILE)).unwrap();
        file.write_at(0, &[1; 600]).unwrap();
        file.sync_data().unwrap();
        disk.sync_dir(Path::new("/dir")).unwrap();
        file.write_at(0, &[2; 600]).unwrap();
        (disk, file)
    }

    #[test]
    fn what_was_not_synced_survives_a_crash_by_the_sector() {
        for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
            let (disk, mut file) = disk();
            let mut choices = [first, second].into_iter();
            disk.crash(&mut || choices.next().unwrap());
            let content = disk.content(Path::new(FILE)).unwrap();
            assert_eq!((content[0], content[599]), (1 + u8::from(first), 1 + u8::from(second)));
            file.write_at(0, &[3]).unwrap_err();
        }
    }

    #[test]
    fn what_a_failed_sync_lost_is_durable_only_once_it_is_written_again() {
        for again in [false, true] {
            let (disk, mut file) = disk();
            disk.fail_at(disk.operations());
            file.sync_data().unwrap_err();
            if again {
                file.write_at(0, &[2; 600]).unwrap();
            }
            file.sync_data().unwrap();
            assert_eq!(disk.content(Path::new(FILE)).unwrap(), [2; 600]);
            disk.crash(&mut || true);
            assert_eq!(disk.content(Path::new(FILE)).unwrap(), [1 + u8::from(again); 600]);
        }
    }

    #[test]
    fn a_name_is_durable_with_its_directory_and_a_full_disk_takes_no_more() {
        let (disk, mut file) = disk();
        disk.rename(Path::new(FILE), Path::new("/dir/other")).unwrap();
        disk.crash(&mut || false);
        assert_eq!(disk.list(Path::new("/dir")).unwrap(), ["file"]);
        file.sync_data().unwrap_err();
        disk.set_capacity(Some(1000));
        let mut file = disk.open(Path::new(FILE)).unwrap();
        assert!(file.allocate(1001).unwrap_err().is_disk_full());
        file.allocate(1000).unwrap();
    }
}
