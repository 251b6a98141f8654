//! A disk that fills up refuses writes while reads go on, and takes them again when there is room.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::harness::{free_port, request, wait_for};

/// A process on a disk of its own: a small tmpfs in a mount namespace that ends with it.
struct SmallDisk {
    child: Child,
    dir: PathBuf,
}

impl SmallDisk {
    /// `None` where namespaces are not to be had.
    fn start(dir: &Path, size: &str, port: u16) -> Option<Self> {
        let unshare = [&["--mount", "--user", "--map-root-user"][..], &["--mount"]].into_iter().find(|flags| {
            Command::new("unshare")
                .args(*flags)
                .args(["mount", "-t", "tmpfs", "tmpfs", "/mnt"])
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
        })?;
        let script = "mount -t tmpfs -o size=\"$1\" tmpfs \"$2\" && shift 2 && exec \"$@\"";
        let child = Command::new("unshare")
            .args(unshare)
            .args(["sh", "-c", script, "sh", size])
            .arg(dir)
            .arg(env!("CARGO_BIN_EXE_raftkv"))
            .args(["--port", &port.to_string(), "--cluster", &format!("http://127.0.0.1:{}", free_port())])
            .args(["--wal-segment-bytes", "16MiB", "--data-dir"])
            .arg(dir.join("data"))
            .stdin(Stdio::null())
            .stderr(File::create(dir.with_extension("log")).unwrap())
            .spawn()
            .unwrap();
        Some(SmallDisk { child, dir: dir.to_owned() })
    }

    /// The directory as the process sees it.
    fn inside(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.child.id(), self.dir.display()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).ok();
    }
}

#[test]
fn a_full_disk_refuses_writes_serves_reads_and_recovers() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("disk");
    fs::create_dir(&dir).unwrap();
    let port = free_port();
    let Some(disk) = SmallDisk::start(&dir, "56m", port) else {
        eprintln!("not tested: no mount namespaces here");
        return;
    };
    wait_for("it is ready", || request("GET", port, "/readyz", b"").ok().filter(|answer| answer.status == 200));
    let status = || request("GET", port, "/status", b"").unwrap().json();
    // The log and its spare are there: 32 of 56 MiB. What else is on the disk leaves no room for a third.
    wait_for("the spare is ready", || (status()["wal"]["room_bytes"].as_u64() > Some(17 << 20)).then_some(()));
    let filler = disk.inside().join("filler");
    fs::write(&filler, vec![7; 16 << 20]).unwrap();
    let mut acknowledged = 0;
    let refused = loop {
        let answer = request("PUT", port, &format!("/key-{acknowledged}"), &vec![7; 1 << 20]).unwrap();
        match answer.status {
            204 => acknowledged += 1,
            _ => break answer,
        }
        assert!(acknowledged < 64, "the disk holds 56");
    };
    assert_eq!(refused.status, 507, "{}", refused.text());
    assert!(refused.text().contains("not applied"), "{}", refused.text());
    assert!(acknowledged >= 10, "the log had room: {acknowledged}");
    for n in 0..acknowledged {
        assert_eq!(request("GET", port, &format!("/key-{n}"), b"").unwrap().status, 200);
    }
    assert_eq!(request("GET", port, &format!("/key-{acknowledged}"), b"").unwrap().status, 404);
    assert_eq!(status()["wal"]["full"], true);
    fs::remove_file(filler).unwrap();
    wait_for("writes are taken again", || {
        request("PUT", port, "/again", b"x").ok().filter(|answer| answer.status == 204)
    });
    assert_eq!(status()["wal"]["full"], false);
}

/// Many large writes are on their way when the disk fills up: none of them may take the room that the node itself needs
/// to go on.
#[test]
fn a_disk_that_fills_up_under_load_stops_nobody() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("disk");
    fs::create_dir(&dir).unwrap();
    let port = free_port();
    let Some(mut disk) = SmallDisk::start(&dir, "40m", port) else {
        eprintln!("not tested: no mount namespaces here");
        return;
    };
    wait_for("it is ready", || request("GET", port, "/readyz", b"").ok().filter(|answer| answer.status == 200));
    let log = &dir.with_extension("log");
    std::thread::scope(|scope| {
        for writer in 0..32 {
            scope.spawn(move || {
                for n in 0..64 {
                    let answer = request("PUT", port, &format!("/{writer}-{n}"), &vec![7; 1 << 20]);
                    match answer.unwrap_or_else(|error| panic!("{error}\n{}", fs::read_to_string(log).unwrap())) {
                        answer if answer.status == 204 => {}
                        answer => {
                            let said = fs::read_to_string(log).unwrap();
                            assert_eq!(answer.status, 507, "{}\n{said}", answer.text());
                            return;
                        }
                    }
                }
                panic!("the disk holds 40 MiB");
            });
        }
    });
    assert!(disk.child.try_wait().unwrap().is_none(), "it goes on");
    let status = request("GET", port, "/status", b"").unwrap().json();
    assert_eq!((&status["wal"]["full"], status["keys"].as_u64() > Some(0)), (&true.into(), true), "{status}");
}
