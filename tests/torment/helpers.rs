//! What Rust without `unsafe` cannot do: two small C programs, built when they are needed, and namespaces of our own, so
//! that whatever is mounted or filtered goes with us. Says of each fault why it cannot be had here.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, ensure};

use crate::options::Fault;

/// Set in the process that has namespaces of its own.
const MARK: &str = "TORMENT_OWN_NAMESPACES";

/// Why a fault cannot be had here with so many nodes; `None` if it can.
pub fn missing(fault: Fault, nodes: u64) -> Option<&'static str> {
    if nodes < fault.nodes_min() {
        return Some("it needs three nodes");
    }
    // Preloading and shutting down are asked for as glibc and Linux have it.
    if fault.needs_c_compiler() && !cfg!(all(target_os = "linux", target_env = "gnu")) {
        return Some("it needs Linux with glibc");
    }
    if fault.needs_c_compiler() && !succeeds(Command::new("cc").arg("--version")) {
        return Some("no C compiler called cc");
    }
    if !fault.needs_root() {
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root");
    }
    if !succeeds(Command::new("unshare").args(["--mount", "--net", "true"])) {
        return Some("no namespaces");
    }
    if fault == Fault::Packets {
        let has_tools = succeeds(Command::new("nft").arg("--version")) && succeeds(Command::new("ip").arg("-V"));
        return (!has_tools).then_some("no nft, or no ip");
    }
    let has_loops = Path::new("/dev/loop-control").exists() && succeeds(Command::new("mkfs.ext4").arg("-V"));
    (!has_loops || !succeeds(Command::new("ip").arg("-V"))).then_some("no loop devices, no mkfs.ext4, or no ip")
}

fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Runs this program again with mounts and a network of its own, unless this is that one. Its exit code, if it ran.
pub fn with_own_namespaces() -> anyhow::Result<Option<ExitCode>> {
    if std::env::var_os(MARK).is_some() {
        run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        return Ok(None);
    }
    let status = Command::new("unshare")
        .args(["--mount", "--net"])
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
