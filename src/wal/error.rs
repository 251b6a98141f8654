//! What can go wrong with the log. Every text is one line that names the file and says what to do about it.

use std::path::PathBuf;

use super::disk::DiskError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("{} is in use by another process; stop it, or start this one with another data directory", .0.display())]
    Locked(PathBuf),
    #[error(
        "{} is damaged at byte {offset}: {why}; restore the file from a backup, or, if this is a member of a cluster \
         that has a quorum without it, remove the member and add the machine under a new ID",
        file.display()
    )]
    Corrupt { file: PathBuf, offset: u64, why: String },
    #[error("{} was written by a newer version (format {version}); start that version or a later one", file.display())]
    Newer { file: PathBuf, version: u32 },
    #[error(
        "{} is missing, yet {} holds a log; restore the file from a backup, or, if this is a member of a cluster that \
         has a quorum without it, remove the member and add the machine under a new ID",
        identity.display(),
        log.display()
    )]
    IdentityMissing { identity: PathBuf, log: PathBuf },
    #[error(
        "the log in {} is gone; put it back (is the volume mounted?). If it is lost, so is what this member held: if a \
         quorum of the cluster is there without it, remove the member and add the machine under a new ID",
        log.display()
    )]
    LogMissing { log: PathBuf },
    #[error(
        "{} holds no snapshot that this log, which begins behind entry {index}, can go on from; restore that directory \
         from a backup, or, if this is a member of a cluster that has a quorum without it, remove the member and add it \
         under a new ID",
        dir.display()
    )]
    SnapshotMissing { dir: PathBuf, index: u64 },
    #[error("the snapshot that came is damaged at byte {offset}: {why}; it was thrown away and has to be sent again")]
    BadIncoming { offset: u64, why: String },
    #[error("write the state into a snapshot: {0}")]
    Image(std::io::Error),
    #[error("a log record of {bytes} bytes does not fit a frame of {max} bytes; raise the segment size")]
    RecordTooLarge { bytes: u64, max: u64 },
    #[error("the log stopped at an earlier error; restart the server")]
    Stopped,
    #[error("no random numbers from the operating system: {0}")]
    Random(getrandom::Error),
    #[error("start a log thread: {0}")]
    Thread(std::io::Error),
}

impl Error {
    /// True where the cause is a disk (or a quota) without room.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Error::Disk(error) if error.is_disk_full())
    }
}
