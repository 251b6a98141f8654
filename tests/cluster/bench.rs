//! `raftkv bench` against nodes that run: the figures are there and true, and the exit code says how it went.

use std::collections::BTreeMap;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::harness::{Cluster, free_port, raftkv, request, wait_for};

fn bench(args: &[&str]) -> Output {
    raftkv(&["bench"]).args(args).output().unwrap()
}

/// The JSON of a run that went well.
fn figures(args: &[&str]) -> Value {
    let output = bench(&[args, &["--output", "json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{args:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_key_is_written_once_and_then_found() {
    let mut cluster = Cluster::start(3);
    let urls: Vec<String> = cluster.nodes.iter().map(|node| format!("http://127.0.0.1:{}", node.port)).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let load = ["--connections", "5", "--pipeline", "3", "--threads", "2", "--keys", "500", "--value-bytes", "77"];
    let once = ["--distribution", "sequential", "--stop-after", "500", "--warm-up", "0s"];
    let report = figures(&[&load, &once[..], &urls].concat());
    assert_eq!((&report["operations"], &report["writes"]["count"]), (&500.into(), &500.into()), "{report}");
    assert_eq!((&report["failed"], &report["load"]["keys"]), (&0.into(), &500.into()), "{report}");
    for node in &cluster.nodes {
        assert_eq!(node.must_get("key-00000000499").len(), 77);
        assert_eq!(node.status().unwrap()["keys"], 500);
    }
    cluster.must_agree();

    let mixed = ["--duration", "1s", "--warm-up", "100ms", "--reads", "50"];
    let report = figures(&[&load, &mixed[..], &urls].concat());
    let (writes, reads) = (&report["writes"], &report["reads"]);
    assert!(writes["count"].as_u64().unwrap() > 0 && reads["count"].as_u64().unwrap() > 0, "{report}");
    assert_eq!((&report["failed"], &report["missing"]), (&0.into(), &0.into()), "{report}");
    let order: Vec<f64> =
        ["p50_us", "p90_us", "p99_us", "max_us"].iter().map(|at| writes["latency"][at].as_f64().unwrap()).collect();
    assert!(order.is_sorted() && order[0] > 0.0, "{report}");
    assert!(writes["corrected"]["p50_us"].as_f64().unwrap() >= order[0], "{report}");
}

#[test]
fn an_open_loop_keeps_its_rate_and_leaves_files() {
    let cluster = Cluster::start(1);
    let url = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let (json, svg) = (cluster.root.path().join("x.json"), cluster.root.path().join("x.svg"));
    let rate = ["--rate", "200", "--arrivals", "fixed", "--connections", "2", "--warm-up", "0s", "--duration", "1s"];
    let files = ["--json", json.to_str().unwrap(), "--svg", svg.to_str().unwrap(), "--reads", "100", "--keys", "9"];
    let report = figures(&[&rate[..], &files, &["--consistency", "stale", "--timeout", "60s", &url]].concat());
    // However slow this machine is, what was due was sent.
    assert_eq!((&report["operations"], &report["missing"]), (&200.into(), &200.into()), "{report}");
    assert!(report["writes"].is_null() && report["reads"]["corrected"].is_null(), "{report}");
    assert!(report["lateness"]["max_us"].as_f64().unwrap() <= report["reads"]["latency"]["max_us"].as_f64().unwrap());
    let saved: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(saved, report);
    let picture = std::fs::read_to_string(svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"), "{picture}");
}

#[test]
fn failures_are_told_by_kind_and_a_run_of_nothing_else_ends_with_1() {
    let mut cluster = Cluster::with_flags(1, &["--max-value-bytes", "10"]);
    cluster.start_all();
    let url = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let short = ["--connections", "2", "--duration", "300ms", "--warm-up", "0s", &url];
    let output = bench(&short);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("raftkv: nothing succeeded: status 413: ") && stderr.lines().count() == 1, "{stderr}");
    let output = bench(&[&short[..], &["--preload", "--keys", "50"]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("raftkv: --preload: 0 of 50 keys written; status 413: "), "{stderr}");
    assert_eq!(output.status.code(), Some(1));

    let free = format!("http://127.0.0.1:{}", free_port());
    let output = bench(&[&url, &free]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let address = free.trim_start_matches("http://");
    assert!(stderr.starts_with(&format!("raftkv: {address}: cannot connect: ")), "{stderr}");
    assert_eq!((output.status.code(), stderr.lines().count(), output.stdout.len()), (Some(1), 1, 0));
}

/// A shell's soft limit is raised; the hard one is told as the generator's own.
#[test]
fn more_connections_than_a_shell_may_open_files() {
    let cluster = Cluster::start(1);
    let url = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let limited = |limit: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit {limit} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_raftkv"), "bench"]);
        command.args(["--connections", "100", "--rate", "500", "--duration", "300ms", "--warm-up", "0s", &url]);
        command.output().unwrap()
    };
    let output = limited("-Sn 50");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = limited("-n 50");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    assert!(stderr.contains("out of open files, ports or memory at the generator"), "{stderr}");
}

#[test]
fn a_run_without_a_duration_does_not_wait_for_a_server_that_is_gone() {
    let mut cluster = Cluster::start(1);
    let url = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let mut load = raftkv(&["bench", "--stop-after", "1000000000", "--warm-up", "0s", "--timeout", "500ms", &url])
        .args(["--connections", "2", "--output", "json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let node = &mut cluster.nodes[0];
    wait_for("writes arrive", || (node.status()?["revision"].as_u64()? > 10).then_some(()));
    node.kill();
    wait_for("the load ends", || load.try_wait().unwrap());
    let report: Value = serde_json::from_slice(&load.wait_with_output().unwrap().stdout).unwrap();
    assert!(report["operations"].as_u64().unwrap() > 0, "{report}");
    assert!(report["failures"]["no connection"].as_u64().unwrap() > 0, "{report}");
}

/// The server goes and comes back while the keys are written: those that failed are written again.
#[test]
fn a_restart_does_not_end_a_preload() {
    let mut cluster = Cluster::start(1);
    let url = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let keys = "3000";
    let mut load = raftkv(&["bench", "--preload", "--keys", keys, "--connections", "2", "--warm-up", "0s"])
        .args(["--duration", "100ms", "--timeout", "60s", "--reads", "100", "--output", "json", &url])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let node = &mut cluster.nodes[0];
    let written = |status: Value| status["keys"].as_u64();
    let before = wait_for("keys arrive", || written(node.status()?).filter(|keys| *keys > 10));
    assert!(before < 2900, "{before} keys before it was killed leave nothing to be seen");
    node.kill();
    node.start();
    node.wait_ready();
    wait_for("the load ends", || load.try_wait().unwrap());
    let output = load.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["missing"], &report["failed"]), (&0.into(), &0.into()), "{report}");
    assert_eq!(cluster.nodes[0].status().unwrap()["keys"], 3000);
}

/// The server goes and comes back under load: what was in flight fails, if anything was, the load connects again, and nothing
/// that was due in an open loop is forgotten.
#[test]
fn a_restart_under_load_is_ridden_out() {
    let mut cluster = Cluster::start(1);
    let url = format!("http://127.0.0.1:{}", cluster.nodes[0].port);
    let before = request("GET", cluster.nodes[0].port, "/status", b"").unwrap().json()["revision"].as_u64().unwrap();
    let mut load = raftkv(&["bench", "--rate", "200", "--arrivals", "fixed", "--connections", "2", "--warm-up", "0s"])
        .args(["--duration", "5s", "--timeout", "60s", "--output", "json", &url])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let node = &mut cluster.nodes[0];
    wait_for("writes arrive", || (node.status()?["revision"].as_u64()? > before).then_some(()));
    node.kill();
    node.start();
    node.wait_ready();
    wait_for("the load ends", || load.try_wait().unwrap());
    let output = load.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let failures: BTreeMap<String, u64> = serde_json::from_value(report["failures"].clone()).unwrap();
    let in_flight = failures.get("connection broke").copied().unwrap_or_default();
    let done = report["operations"].as_u64().unwrap();
    assert!(in_flight <= 4, "{report}");
    let answered: u64 = failures.iter().filter(|(kind, _)| kind.starts_with("status")).map(|(_, count)| count).sum();
    assert_eq!(done + in_flight + answered, 1000, "{report}");
}
