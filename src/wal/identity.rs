//! Whose data directory this is. `LOCK` keeps a second process out; `identity` says which cluster and member the
//! directory belongs to, with a nonce that tells it from any other directory of the same member. Called by `server`
//! at start, before the log is opened.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskError, read_all};
use super::error::Error;
use super::segment;

const LOCK: &str = "LOCK";
const IDENTITY: &str = "identity";
const VERSION: u32 = 1;
const TITLE: &str = "raftkv identity, format ";

/// The directory of the log inside of a data directory.
pub const LOG_DIR: &str = "wal";

/// The data directory, held against other processes for as long as this lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Creates the data directory where it is missing, and locks it. Always on the real file system.
    pub fn take(data_dir: &Path) -> Result<Lock, Error> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Disk(DiskError { operation, path, source })
        };
        fs::create_dir_all(data_dir).map_err(failed("create data directory", data_dir))?;
        let path = data_dir.join(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Lock { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked(data_dir.to_owned())),
            Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
        }
    }
}

/// What the file `identity` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub cluster: u64,
    pub member: u64,
    /// Random, never 0: made once, when the directory is first used.
    pub nonce: u64,
    /// The log was made. Where it is missing now, it is lost; before, it had yet to come.
    pub has_log: bool,
}

impl Identity {
    /// What the directory says; `None` where it was never used. A directory with a log and no identity is refused.
    pub fn load(disk: &dyn Disk, data_dir: &Path) -> Result<Option<Identity>, Error> {
        let path = data_dir.join(IDENTITY);
        if disk.size(&path)?.is_none() {
            let log = data_dir.join(LOG_DIR);
            if segment::ids(disk, &log)?.is_empty() {
                return Ok(None);
            }
            return Err(Error::IdentityMissing { identity: path, log });
        }
        let bytes = read_all(disk.open(&path)?.as_ref())?;
        Identity::parse(&bytes, path).map(Some)
    }

    /// Marks a directory that was never used: a new nonce, durable when this returns.
    pub fn create(disk: &dyn Disk, data_dir: &Path, cluster: u64, member: u64) -> Result<Identity, Error> {
        let mut nonce = 0;
        while nonce == 0 {
            nonce = disk.random().map_err(Error::Random)?;
        }
        let identity = Identity { cluster, member, nonce, has_log: false };
        identity.save(disk, data_dir)?;
        Ok(identity)
    }

    /// Says that the log was made, durable when this returns.
    pub fn note_log(self, disk: &dyn Disk, data_dir: &Path) -> Result<Identity, Error> {
        let identity = Identity { has_log: true, ..self };
        identity.save(disk, data_dir)?;
        Ok(identity)
    }

    /// Writes the file, durable when this returns.
    pub fn save(&self, disk: &dyn Disk, data_dir: &Path) -> Result<(), Error> {
        let (path, new) = (data_dir.join(IDENTITY), data_dir.join("identity.new"));
        disk.create_dir(data_dir)?;
        // The data directory may be new itself.
        if let Some(parent) = data_dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            disk.sync_dir(parent)?;
        }
        if disk.size(&new)?.is_some() {
            disk.remove(&new)?;
        }
        let mut file = disk.create(&new)?;
        file.write_at(0, self.to_text().as_bytes())?;
        file.sync_data()?;
        disk.rename(&new, &path)?;
        disk.sync_dir(data_dir)?;
        Ok(())
    }

    fn to_text(self) -> String {
        let Identity { cluster, member, nonce, has_log } = self;
        let log = u64::from(has_log);
        let lines =
            format!("{TITLE}{VERSION}\ncluster {cluster:016x}\nmember {member}\nnonce {nonce:016x}\nlog {log}\n");
        let crc = crc32c::crc32c(lines.as_bytes());
        format!("{lines}crc32c {crc:08x}\n")
    }

    fn parse(bytes: &[u8], file: PathBuf) -> Result<Identity, Error> {
        let damaged = |file, why: &str| Err(Error::Corrupt { file, offset: 0, why: why.to_owned() });
        let Some((lines, crc)) = std::str::from_utf8(bytes).ok().and_then(|text| {
            let (above, crc) = text.split_at_checked(text.len().checked_sub("crc32c 01234567\n".len())?)?;
            let crc = crc.strip_prefix("crc32c ")?.strip_suffix('\n')?;
            Some((above, u32::from_str_radix(crc, 16).ok()?))
        }) else {
            return damaged(file, "the last line is no checksum");
        };
        if crc32c::crc32c(lines.as_bytes()) != crc {
            return damaged(file, "the checksum does not match");
        }
        let mut lines = lines.lines();
        let version = lines.next().and_then(|line| line.strip_prefix(TITLE)?.parse().ok());
        if let Some(version) = version.filter(|version| *version > VERSION) {
            return Err(Error::Newer { file, version });
        }
        let mut field = |name: &str, radix| {
            let text = lines.next()?.strip_prefix(name)?.strip_prefix(' ')?;
            u64::from_str_radix(text, radix).ok()
        };
        match (version, field("cluster", 16), field("member", 10), field("nonce", 16), field("log", 10)) {
            (Some(VERSION), Some(cluster), Some(member), Some(nonce), Some(log @ (0 | 1))) => {
                Ok(Identity { cluster, member, nonce, has_log: log == 1 })
            }
            _ => damaged(file, "a line is missing or is not what it should be"),
        }
    }
}

#[cfg(test)]
mod tests {
    //! A directory belongs to one member and to one process at a time.

    use super::super::disk::RealDisk;
    use super::super::disk_memory::MemoryDisk;
    use super::*;

    const TEXT: &str = "raftkv identity, format 1\n\
                        cluster 00000000000000c1\n\
                        member 3\n\
                        nonce 0123456789abcdef\n\
                        log 1\n\
                        crc32c 35c3cbd1\n";
    const IDENTITY: Identity = Identity { cluster: 0xc1, member: 3, nonce: 0x0123_4567_89ab_cdef, has_log: true };

    #[test]
    fn the_text_of_an_identity_is_this() {
        assert_eq!(IDENTITY.to_text(), TEXT);
        assert_eq!(Identity::parse(TEXT.as_bytes(), PathBuf::new()).unwrap(), IDENTITY);
    }

    #[test]
    fn what_was_saved_is_loaded_and_every_nonce_differs() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("new");
        let lock = Lock::take(&data_dir).unwrap();
        assert_eq!(Identity::load(&RealDisk, &data_dir).unwrap(), None);
        let one = Identity::create(&RealDisk, &data_dir, 7, 1).unwrap();
        assert_eq!(Identity::load(&RealDisk, &data_dir).unwrap(), Some(one));
        let other = Identity::create(&RealDisk, &data_dir, 7, 1).unwrap();
        assert_ne!(one.nonce, other.nonce);
        drop(lock);
    }

    #[test]
    fn a_second_process_is_kept_out_until_the_first_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        let error = Lock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another process"), "{error}");
        drop(first);
        Lock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_data_directory_that_cannot_be_made_is_named_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Lock::take(&file.join("data")).unwrap_err().to_string();
        assert!(error.starts_with("create data directory ") && error.contains("file/data"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        for bit in 0..TEXT.len() * 8 {
            let mut bytes = TEXT.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match Identity::parse(&bytes, "identity".into()) {
                Err(error) => assert!(error.to_string().contains("identity"), "{error}"),
                // A digit of the checksum itself in the other case.
                Ok(identity) => assert_eq!(identity, IDENTITY, "bit {bit}"),
            }
        }
        Identity::parse(&TEXT.as_bytes()[..30], "identity".into()).unwrap_err();
        Identity::parse(b"", "identity".into()).unwrap_err();
    }

    #[test]
    fn a_newer_format_is_refused_as_such() {
        let lines = "raftkv identity, format 2\nsomething else\n";
        let text = format!("{lines}crc32c {:08x}\n", crc32c::crc32c(lines.as_bytes()));
        let error = Identity::parse(text.as_bytes(), "identity".into()).unwrap_err();
        assert!(matches!(error, Error::Newer { version: 2, .. }), "{error}");
    }

    #[test]
    fn a_log_without_an_identity_is_refused() {
        let disk = MemoryDisk::new();
        disk.set_content(Path::new("/data/wal/0000000000000001.wal"), Vec::new());
        let error = Identity::load(&disk, Path::new("/data")).unwrap_err().to_string();
        assert!(error.starts_with("/data/identity is missing"), "{error}");
    }

    #[test]
    fn a_crash_at_any_step_leaves_no_identity_or_the_whole_one() {
        for survive in [false, true] {
            for stop in 0.. {
                let disk = MemoryDisk::new();
                disk.stop_at(stop);
                let saved = IDENTITY.save(&disk, Path::new("/data"));
                disk.crash(&mut || survive);
                let loaded = Identity::load(&disk, Path::new("/data")).unwrap();
                assert!(loaded.is_none() || loaded == Some(IDENTITY), "{loaded:?}");
                if saved.is_ok() {
                    assert_eq!(loaded, Some(IDENTITY));
                    break;
                }
                IDENTITY.save(&disk, Path::new("/data")).unwrap();
            }
        }
    }
}
