//! A disk of a member's own: a small ext4 in a file, mounted where its data directory is. It can be filled, and its power
//! can be cut: then only what was synced is there when it is mounted again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::course::poll;
use crate::helpers::run;

/// Four segments of 16 MiB, and snapshots.
const SIZE_BYTES: u64 = 160 << 20;

#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    pub mounted_at: PathBuf,
}

impl Disk {
    /// An empty disk, mounted.
    pub fn new(image: PathBuf, mounted_at: &Path) -> anyhow::Result<Self> {
        File::create(&image)?.set_len(SIZE_BYTES)?;
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image))?;
        std::fs::create_dir_all(mounted_at)?;
        let disk = Disk { image, mounted_at: mounted_at.to_owned() };
        disk.mount()?;
        Ok(disk)
    }

    /// The journal is written out rarely, so that it saves nothing by chance.
    fn mount(&self) -> anyhow::Result<()> {
        let options = "loop,commit=300,noauto_da_alloc";
        run(Command::new("mount").args(["-o", options]).arg(&self.image).arg(&self.mounted_at))
    }

    fn unmount(&self) -> anyhow::Result<()> {
        let mut failure = None;
        let unmounted = poll("a disk is unmounted", Duration::from_secs(10), || {
            failure = run(Command::new("umount").arg(&self.mounted_at)).err();
            failure.is_none().then_some(())
        });
        unmounted.with_context(|| format!("{failure:?}"))
    }

    /// From now on nothing reaches the disk.
    pub fn cut(&self, power_cut: &Path) -> anyhow::Result<()> {
        run(Command::new(power_cut).arg(&self.mounted_at))
    }

    /// The power is back; nobody uses the disk yet.
    pub fn remount(&self) -> anyhow::Result<()> {
        self.unmount()?;
        self.mount()
    }

    /// Takes all the room that there is.
    pub fn fill(&self) -> anyhow::Result<()> {
        let file = File::create(self.ballast())?;
        let room = statvfs(&self.mounted_at)?;
        // Some of it the file system needs itself, to keep account.
        for part in [100, 99, 95, 90, 80] {
            let length = room.f_bavail * room.f_frsize * part / 100;
            if length > 0 && fallocate(&file, FallocateFlags::empty(), 0, length).is_ok() {
                break;
            }
        }
        Ok(())
    }

    pub fn make_room(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.ballast())?)
    }

    fn ballast(&self) -> PathBuf {
        self.mounted_at.join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The mount ends with our namespace at the latest.
        self.unmount().ok();
    }
}
