//! Starts and torments `raftkv` processes. No test sleeps: each waits for a condition, with a deadline.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Longer than anything takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Polls until `condition` gives something. Panics with `what` at the deadline.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_or_tell(|| what.to_owned(), condition)
}

/// The same; `what` is asked only at the deadline.
pub fn wait_or_tell<T>(what: impl Fn() -> String, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out: {}", what());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The Procfile's ports, which whoever works here may have in use, and `tests/readme.rs` has.
const PROCFILE_PORTS: [u16; 6] = [12379, 12380, 22379, 22380, 32379, 32380];

/// A port that nobody else in these tests has: below the range that the kernel takes for outgoing connections.
pub fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU16::new(10_000 + (std::process::id() % 20_000) as u16));
    loop {
        let port = next.fetch_add(1, Ordering::Relaxed);
        if port > 32_000 {
            next.store(10_000, Ordering::Relaxed);
        } else if PROCFILE_PORTS.contains(&port) {
            // Free now, perhaps, but not ours.
        } else if TcpListener::bind(("127.0.0.1", port)).is_ok() && TcpListener::bind(("::", port)).is_ok() {
            return port;
        }
    }
}

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }
}

/// One request on a connection of its own. An error is a connection that broke or refused.
pub fn request(method: &str, port: u16, path: &str, body: &[u8]) -> Result<Answer, ureq::Error> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(DEADLINE))
        .http_status_as_error(false)
        .max_redirects(0)
        .build()
        .into();
    request_with(&agent, method, port, path, body)
}

/// One request through an agent that keeps its connection.
pub fn request_with(
    agent: &ureq::Agent,
    method: &str,
    port: u16,
    path: &str,
    body: &[u8],
) -> Result<Answer, ureq::Error> {
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(format!("http://127.0.0.1:{port}{path}"))
        .body(body.to_vec())
        .expect("a valid request");
    let mut response = agent.run(request)?;
    let headers = response
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let body = response.body_mut().with_config().limit(64 << 20).read_to_vec()?;
    Ok(Answer { status: response.status().as_u16(), headers, body })
}

/// The program, with a command line.
pub fn raftkv(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_raftkv"));
    command.args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RAFTKV_") {
            command.env_remove(name);
        }
    }
    command
}

/// One member: its ports, its directory, and its process while it runs.
pub struct Node {
    pub id: u64,
    pub port: u16,
    pub peer_port: u16,
    pub dir: PathBuf,
    cluster: String,
    extra: Vec<String>,
    log: PathBuf,
    process: Option<Child>,
}

impl Node {
    /// A member with a directory that may be there already, and peers that listen where their URLs say. It is not started.
    pub fn at(id: u64, cluster: &str, dir: &Path, flags: &[&str]) -> Self {
        Node {
            id,
            port: free_port(),
            peer_port: 0,
            dir: dir.to_owned(),
            cluster: cluster.to_owned(),
            extra: flags.iter().map(ToString::to_string).collect(),
            log: dir.with_extension("log"),
            process: None,
        }
    }

    pub fn start(&mut self) {
        assert!(self.process.is_none(), "node {} runs already", self.id);
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let child = raftkv(&["--id", &self.id.to_string(), "--cluster", &self.cluster])
            .args(["--port", &self.port.to_string(), "--wal-segment-bytes", "16MiB", "--data-dir"])
            .arg(&self.dir)
            .args(&self.extra)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(child);
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.process.as_ref().expect("a running node"))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.process.take().expect("a running node").wait().unwrap();
    }

    /// TERM, and the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait().code()
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let mut child = self.process.take().expect("a running node");
        wait_or_tell(|| format!("node {} ends\n{}", self.id, self.log()), || child.try_wait().unwrap())
    }

    /// Memory in bytes: held now, and the most that was ever held.
    pub fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_nonzero())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn put(&self, key: &str, value: impl AsRef<[u8]>) -> Result<Answer, ureq::Error> {
        request("PUT", self.port, &format!("/{key}"), value.as_ref())
    }

    pub fn get(&self, key: &str) -> Result<Answer, ureq::Error> {
        request("GET", self.port, &format!("/{key}"), b"")
    }

    /// PUT that must be acknowledged.
    pub fn must_put(&self, key: &str, value: impl AsRef<[u8]>) {
        let answer = self.put(key, value).unwrap();
        assert_eq!(answer.status, 204, "PUT {key} at {}: {}\n{}", self.id, answer.text(), self.log());
    }

    /// GET of what must be there.
    pub fn must_get(&self, key: &str) -> Vec<u8> {
        let answer = self.get(key).unwrap();
        assert_eq!(answer.status, 200, "GET {key} at {}: {}\n{}", self.id, answer.text(), self.log());
        answer.body
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// Asks this member to add another, or to change its URL.
    pub fn add(&self, id: u64, url: &str) -> Answer {
        request("POST", self.port, &format!("/{id}"), url.as_bytes()).unwrap()
    }

    pub fn must_add(&self, id: u64, url: &str) {
        let answer = self.add(id, url);
        assert_eq!(answer.status, 204, "POST /{id} at {}: {}\n{}", self.id, answer.text(), self.log());
    }

    pub fn remove(&self, id: u64) -> Answer {
        request("DELETE", self.port, &format!("/{id}"), b"").unwrap()
    }

    pub fn must_remove(&self, id: u64) {
        let answer = self.remove(id);
        assert_eq!(answer.status, 204, "DELETE /{id} at {}: {}\n{}", self.id, answer.text(), self.log());
    }

    /// Other flags from the next start on.
    pub fn set_flags(&mut self, flags: &[&str]) {
        self.extra = flags.iter().map(ToString::to_string).collect();
    }

    pub fn status(&self) -> Option<serde_json::Value> {
        request("GET", self.port, "/status", b"").ok().filter(|answer| answer.status == 200).map(|answer| answer.json())
    }

    pub fn wait_ready(&self) {
        wait_or_tell(
            || format!("node {} is ready\n{}", self.id, self.log()),
            || request("GET", self.port, "/readyz", b"").ok().filter(|answer| answer.status == 200),
        );
    }

    /// Whether it takes connections, leader or not.
    pub fn wait_alive(&self) {
        wait_or_tell(
            || format!("node {} is alive\n{}", self.id, self.log()),
            || request("GET", self.port, "/livez", b"").ok().filter(|answer| answer.status == 200),
        );
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.take() {
            child.kill().and_then(|()| child.wait()).ok();
        }
    }
}

/// Members with IDs from 1, in a directory that goes with them.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub root: TempDir,
}

impl Cluster {
    /// Members that are not started yet.
    pub fn new(count: usize) -> Self {
        Cluster::with_flags(count, &[])
    }

    pub fn with_flags(count: usize, flags: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let peer_ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
        let urls: Vec<String> = peer_ports.iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
        let nodes = (1..)
            .zip(peer_ports)
            .map(|(id, peer_port)| Node {
                id,
                port: free_port(),
                peer_port,
                dir: root.path().join(format!("raftkv-{id}")),
                cluster: urls.join(","),
                extra: flags.iter().map(ToString::to_string).collect(),
                log: root.path().join(format!("{id}.log")),
                process: None,
            })
            .collect();
        Cluster { nodes, root }
    }

    /// A machine that may join: its `--cluster` lists the members there are now, with itself at the end. Returns its
    /// position. It is neither added nor started.
    pub fn newcomer(&mut self, id: u64) -> usize {
        let peer_port = free_port();
        let mut urls: Vec<String> = self.nodes.iter().map(Node::url).collect();
        urls.resize_with(id as usize - 1, || format!("http://127.0.0.1:{}", free_port()));
        urls.truncate(id as usize - 1);
        urls.push(format!("http://127.0.0.1:{peer_port}"));
        let mut extra = self.nodes[0].extra.clone();
        extra.push("--join".to_owned());
        self.nodes.push(Node {
            id,
            port: free_port(),
            peer_port,
            dir: self.root.path().join(format!("raftkv-{id}")),
            cluster: urls.join(","),
            extra,
            log: self.root.path().join(format!("{id}.log")),
            process: None,
        });
        self.nodes.len() - 1
    }

    /// A second machine with the ID of the member at `original`, who is stopped, and a copy of its directory. It listens
    /// elsewhere. Returns its position; it is not started.
    pub fn copy(&mut self, original: usize) -> usize {
        let member = &self.nodes[original];
        assert!(member.process.is_none(), "node {} runs", member.id);
        let name = format!("copy-of-{}", member.id);
        let (dir, log, peer_port) = (self.root.path().join(&name), self.root.path().join(name + ".log"), free_port());
        copy_dir(&member.dir, &dir);
        let listen = ["--listen-peer".to_owned(), format!("127.0.0.1:{peer_port}")];
        let extra = member.extra.iter().cloned().chain(listen).collect();
        let (id, cluster) = (member.id, member.cluster.clone());
        self.nodes.push(Node { id, port: free_port(), peer_port, dir, cluster, extra, log, process: None });
        self.nodes.len() - 1
    }

    /// Adds a newcomer through the member at `through`, starts it, and waits until it votes.
    pub fn grow(&mut self, through: usize, id: u64) -> usize {
        let at = self.newcomer(id);
        self.nodes[through].must_add(id, &self.nodes[at].url());
        self.nodes[at].start();
        self.nodes[at].wait_ready();
        self.wait_voter(id);
        at
    }

    /// Waits until every member that runs knows `id` as a voter.
    pub fn wait_voter(&mut self, id: u64) {
        wait_for(&format!("{id} votes"), || {
            let votes = |status: serde_json::Value| {
                let members = status["members"].as_array().unwrap().clone();
                members.iter().any(|member| member["id"] == id && member["votes"] == true)
            };
            self.nodes.iter_mut().all(|node| !node.is_running() || node.status().is_some_and(votes)).then_some(())
        });
    }

    /// Members that are started and ready.
    pub fn start(count: usize) -> Self {
        let mut cluster = Cluster::new(count);
        cluster.start_all();
        cluster
    }

    pub fn start_all(&mut self) {
        self.nodes.iter_mut().for_each(Node::start);
        self.nodes.iter().for_each(Node::wait_ready);
    }

    /// Position of the member that leads, once one does.
    pub fn leader(&mut self) -> usize {
        wait_for("a leader", || {
            self.nodes
                .iter_mut()
                .position(|node| node.is_running() && node.status().is_some_and(|status| status["role"] == "leader"))
        })
    }

    /// Position of a member that follows.
    pub fn follower(&mut self) -> usize {
        let leader = self.leader();
        (leader + 1) % self.nodes.len()
    }

    /// Every member that runs holds the same state.
    pub fn must_agree(&mut self) {
        wait_for("equal state on all members", || {
            let mut seen = Vec::new();
            for node in &mut self.nodes {
                if node.is_running() {
                    let status = node.status()?;
                    seen.push(["applied", "state_hash", "log_hash", "revision"].map(|field| status[field].to_string()));
                }
            }
            seen.windows(2).all(|pair| pair[0] == pair[1]).then_some(())
        });
    }

    /// Every member that runs has each of these. One linearizable read at each: behind it, its own state has them all.
    pub fn must_hold(&mut self, acknowledged: &BTreeMap<String, String>) {
        for node in &mut self.nodes {
            if !node.is_running() {
                continue;
            }
            node.must_get(acknowledged.keys().next().expect("something was acknowledged"));
            let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
            for (key, value) in acknowledged {
                let path = format!("/{key}?consistency=stale");
                let answer = request_with(&agent, "GET", node.port, &path, b"").unwrap();
                assert_eq!((answer.status, answer.text()), (200, value.clone()), "{key} at node {}", node.id);
            }
        }
    }
}

/// Replaces what a directory holds with a copy of another.
pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
