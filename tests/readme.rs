//! What a newcomer is told to type works: the commands of README.md, `scripts/cluster`, and the Procfile. All of them
//! use the ports that they name, so one runs at a time.
//!
//! In README.md a `sh` block is what a person pastes into a terminal, and a `text` block right behind it is all that
//! this prints; `…` stands for anything within a line. A block that starts a server keeps its terminal: it is left
//! running, and ended at the end as Ctrl-C ends it. `cargo` runs the program that is built already.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

#[test]
fn the_commands_of_the_readme_do_what_it_says() {
    let checkout = Checkout::new();
    let blocks = blocks(&fs::read_to_string(root().join("README.md")).unwrap());
    let shown = blocks.iter().filter(|block| block.output.is_some()).count();
    assert!(blocks.len() >= 8 && shown >= 6, "{} blocks, {shown} with output: are they found?", blocks.len());
    let mut servers = Vec::new();
    for block in &blocks {
        if block.commands.starts_with("cargo run") {
            servers.push(checkout.serve(&block.commands));
            let port = flag(&block.commands, "--port").unwrap_or("9121");
            checkout.must_run(&format!("{UNTIL_IT_SERVES} http://127.0.0.1:{port}/readyz"));
            continue;
        }
        let printed = checkout.must_run(&block.commands);
        if let Some(output) = &block.output {
            assert!(prints(&printed, output), "README.md says that\n{}prints\n{output}not\n{printed}", block.commands);
        }
    }
    for server in servers {
        server.interrupt();
    }
}

#[test]
fn scripts_cluster_runs_kills_and_restarts_three_nodes() {
    let checkout = Checkout::new();
    let run = |commands: &str| checkout.must_run(commands);
    let started = run("scripts/cluster start 2");
    assert!(started.contains("node 2 started") && started.contains("waits for a second node"), "{started}");
    let started = run("scripts/cluster start");
    assert!(started.contains("node 1 started") && started.contains("node 2 runs already"), "{started}");
    let status = run("scripts/cluster status");
    assert_eq!((status.matches(" leader ").count(), status.matches(" follower ").count()), (2, 2), "{status}");

    run("curl -sSf http://127.0.0.1:12380/my-key -XPUT -d foo");
    assert_eq!(run("scripts/cluster kill 2"), "node 2 is killed\n");
    run("curl -sSf http://127.0.0.1:12380/my-key -XPUT -d bar");
    assert_eq!(run("curl -sSf http://127.0.0.1:32380/my-key"), "bar");
    let status = run("scripts/cluster status");
    assert!(status.lines().any(|line| line.starts_with("2 ") && line.contains(" down ")), "{status}");
    run("scripts/cluster start 2");
    assert_eq!(run("curl -sSf http://127.0.0.1:22380/my-key"), "bar");

    let stopped = run("scripts/cluster stop");
    assert_eq!(stopped.matches(" is stopped").count(), 3, "{stopped}");
    assert!(run("scripts/cluster logs 1").contains("stopped"));
    run("scripts/cluster start");
    assert_eq!(run("curl -sSf http://127.0.0.1:12380/my-key"), "bar");
    run("scripts/cluster clean");
    assert!(!checkout.path("target/cluster").exists());
    let usage = checkout.run("scripts/cluster kill");
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
}

#[test]
fn the_procfile_runs_three_nodes_beside_a_lone_ones_data() {
    let checkout = Checkout::new();
    let Some(honcho) = ["honcho", "python3 -m honcho"]
        .into_iter()
        .find(|honcho| checkout.run(&format!("{honcho} --version")).status.success())
    else {
        eprintln!("not tested: honcho is not installed, `pip install honcho` gets it");
        return;
    };
    // Somebody tried one node first: its directory must not become the first of the three.
    let lone = checkout.serve("cargo run");
    checkout.must_run(&format!("{UNTIL_IT_SERVES} http://127.0.0.1:9121/lone -XPUT -d lone"));
    lone.interrupt();

    let runner = checkout.serve(&format!("exec {honcho} start"));
    for (port, value) in [(12380, "one"), (22380, "two"), (32380, "three")] {
        checkout.must_run(&format!("{UNTIL_IT_SERVES} http://127.0.0.1:{port}/my-key -XPUT -d {value}"));
        for reader in [12380, 22380, 32380] {
            let read = checkout.must_run(&format!("{UNTIL_IT_SERVES} http://127.0.0.1:{reader}/my-key"));
            assert_eq!(read, value, "written at {port}, read at {reader}");
        }
    }
    runner.interrupt();
}

/// A server may not listen yet, and a cluster without its second node answers 503.
const UNTIL_IT_SERVES: &str =
    "curl --silent --show-error --fail --retry 600 --retry-all-errors --retry-delay 0 --retry-max-time 60";

/// Longer than anything takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

const PORTS: [u16; 10] = [9121, 9021, 12379, 12380, 22379, 22380, 32379, 32380, 42379, 42380];

/// A fresh checkout, as far as a user of it sees, and the ports to itself.
struct Checkout {
    dir: TempDir,
    _ports: MutexGuard<'static, ()>,
}

impl Checkout {
    fn new() -> Self {
        static PORTS_LOCK: Mutex<()> = Mutex::new(());
        // A test that failed has told so itself.
        let ports = PORTS_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        wait_for("the Procfile's ports and those of a lone node are free; is one of them running?", ports_are_free);
        let dir = TempDir::new().unwrap();
        let checkout = Checkout { dir, _ports: ports };
        for name in ["README.md", "Procfile", "scripts/cluster"] {
            checkout.add(name, &fs::read(root().join(name)).unwrap());
        }
        checkout.add("bin/cargo", CARGO.as_bytes());
        checkout
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn add(&self, name: &str, content: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn bash(&self, commands: &str) -> Command {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("bash");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RAFTKV_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        command
            .args(["-euo", "pipefail", "-c", commands])
            .current_dir(self.dir.path())
            .env("PATH", path)
            .env("RAFTKV_BIN", env!("CARGO_BIN_EXE_raftkv"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, commands: &str) -> Output {
        self.bash(commands).output().unwrap()
    }

    /// What commands that must succeed print.
    fn must_run(&self, commands: &str) -> String {
        let output = self.run(commands);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{commands}\n{}\n{stdout}\n{stderr}", output.status);
        stdout
    }

    /// Commands that keep their terminal.
    fn serve(&self, commands: &str) -> Server {
        let log = self.path("server.log");
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let child =
            self.bash(commands).stdout(output.try_clone().unwrap()).stderr(output).process_group(0).spawn().unwrap();
        Server { child: Some(child), log }
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        self.run("scripts/cluster clean");
    }
}

/// Commands in a terminal of their own.
struct Server {
    child: Option<Child>,
    log: PathBuf,
}

impl Server {
    /// Ctrl-C, which reaches all of its processes; each has a good end.
    fn interrupt(mut self) {
        let mut child = self.child.take().unwrap();
        kill_process_group(Pid::from_child(&child), Signal::INT).unwrap();
        let status = wait_for("the server stops", || child.try_wait().unwrap());
        let log = fs::read_to_string(&self.log).unwrap();
        // A runner says that it was interrupted, and what became of each of its processes.
        assert!(matches!(status.code(), Some(0 | 130)) && log.contains("stopped"), "{status}\n{log}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // A runner has to end what it runs, which is out of reach here.
            kill_process_group(Pid::from_child(child), Signal::INT).ok();
            child.wait().ok();
        }
    }
}

/// What stands behind a flag in a command line.
fn flag<'a>(commands: &'a str, name: &str) -> Option<&'a str> {
    commands.split_whitespace().skip_while(|word| *word != name).nth(1)
}

fn ports_are_free() -> Option<()> {
    PORTS.iter().all(|port| TcpListener::bind(("::", *port)).is_ok()).then_some(())
}

/// `cargo run` and `cargo build` of a package that is built.
const CARGO: &str = r#"#!/usr/bin/env bash
[[ $1 == run ]] || exit 0
while (($# > 0)) && [[ $1 != -- ]]; do shift; done
exec "$RAFTKV_BIN" "${@:2}"
"#;

/// What a person pastes, and what it prints as far as README.md tells.
struct Block {
    commands: String,
    output: Option<String>,
}

fn blocks(markdown: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = markdown.lines();
    // Whether the last thing above is a block of commands.
    let mut behind_commands = false;
    while let Some(line) = lines.next() {
        match line {
            "```sh" => blocks.push(Block { commands: fenced(&mut lines), output: None }),
            "```text" if behind_commands => {
                blocks.last_mut().expect("commands above").output = Some(fenced(&mut lines));
            }
            _ => {
                assert!(!line.starts_with("```"), "neither commands nor what they print: {line}");
                behind_commands &= line.is_empty();
                continue;
            }
        }
        behind_commands = line == "```sh";
    }
    blocks
}

fn fenced<'a>(lines: &mut impl Iterator<Item = &'a str>) -> String {
    lines.take_while(|line| *line != "```").map(|line| format!("{line}\n")).collect()
}

fn prints(printed: &str, shown: &str) -> bool {
    let (printed, shown) = (printed.trim_end(), shown.trim_end());
    printed.lines().count() == shown.lines().count()
        && printed.lines().zip(shown.lines()).all(|(line, pattern)| matches(line, pattern))
}

/// Whether a line is as shown, where `…` is anything.
fn matches(line: &str, pattern: &str) -> bool {
    match pattern.split_once('…') {
        None => line == pattern,
        Some((start, rest)) => line.strip_prefix(start).is_some_and(|line| {
            line.char_indices().map(|(at, _)| at).chain([line.len()]).any(|at| matches(&line[at..], rest))
        }),
    }
}

#[test]
fn what_is_printed_is_compared_with_what_is_shown() {
    let blocks = blocks("x\n```sh\na\nb\n```\n\n```text\nc\n```\n```sh\nd\n```\n");
    let seen: Vec<_> = blocks.iter().map(|block| (block.commands.as_str(), block.output.as_deref())).collect();
    assert_eq!(seen, [("a\nb\n", Some("c\n")), ("d\n", None)]);
    assert!(prints("ab 12 c", "ab … c\n") && prints("a\r\nb", "a\nb\n") && prints("[1]", "[…]"));
    assert!(!prints("ab 12 d", "ab … c") && !prints("a\nb", "a") && !prints("", "…x") && !prints("hello!", "hello"));
}

/// Polls until `condition` gives something. Panics with `what` at the deadline.
fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
