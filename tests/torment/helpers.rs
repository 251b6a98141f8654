//! What Rust without `unsafe` cannot do: two small C programs, built when they are needed, and a mount namespace of our
//! own, so that whatever is mounted goes with us. Says of each fault why it cannot be had here.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, ensure};

use crate::options::Fault;

/// Set in the process that has a mount namespace of its own.
const MARK: &str = "TORMENT_OWN_MOUNTS";

/// Why a fault cannot be had here; `None` if it can.
pub fn missing(fault: Fault) -> Option<&'static str> {
    if fault.needs_c_compiler() && !succeeds(Command::new("cc").arg("--version")) {
        return Some("no C compiler called cc");
    }
    if !fault.needs_root() {
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root");
    }
    if !succeeds(Command::new("unshare").args(["--mount", "true"])) {
        return Some("no mount namespaces");
    }
    let has_loops = Path::new("/dev/loop-control").exists() && succeeds(Command::new("mkfs.ext4").arg("-V"));
    (!has_loops).then_some("no loop devices, or no mkfs.ext4")
}

fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Runs this program again in a mount namespace of its own, unless this is that one. Its exit code, if it ran.
pub fn with_own_mounts() -> anyhow::Result<Option<ExitCode>> {
    if std::env::var_os(MARK).is_some() {
        return Ok(None);
    }
    let status = Command::new("unshare")
        .arg("--mount")
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .status()
        .context("run unshare")?;
    Ok(Some(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// The library that makes a sync fail, and the program that cuts the power.
#[derive(Debug, Clone, Default)]
pub struct Helpers {
    pub fail_once: Option<PathBuf>,
    pub power_cut: Option<PathBuf>,
}

impl Helpers {
    pub fn build(home: &Path, faults: &[Fault]) -> anyhow::Result<Self> {
        let mut helpers = Helpers::default();
        if faults.contains(&Fault::Fsync) {
            helpers.fail_once = Some(compile(home, "fail_once", &["-shared", "-fPIC"])?);
        }
        if faults.contains(&Fault::PowerCut) {
            helpers.power_cut = Some(compile(home, "power_cut", &[])?);
        }
        Ok(helpers)
    }
}

fn compile(home: &Path, name: &str, flags: &[&str]) -> anyhow::Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torment").join(name).with_extension("c");
    let built = home.join(name);
    run(Command::new("cc").args(["-O1", "-Wall", "-o"]).arg(&built).args(flags).arg(source).arg("-ldl"))?;
    Ok(built)
}

/// Runs a program that must succeed.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
