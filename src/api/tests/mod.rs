//! The client port over real sockets, with raw bytes at one end and a node of a few lines at the other, that applies to
//! a real store, refuses, or holds what it is asked, as the test says.

mod hostile;
mod limits;
mod requests;
mod stopping;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Api, Limits};
use crate::channel::{
    self, Change, ChangeFailure, Commit, CommitSender, Failure, Leadership, NodeStatus, Proposal, Queues, Rejection,
    RequestId, Role, SnapshotStatus, Writes,
};
use crate::cluster::Member;
use crate::kv::Service;
use crate::metrics::Metrics;
use crate::store::{Answer, State, Store};

/// Nothing here takes long; what does hangs.
const PATIENCE: Duration = Duration::from_secs(20);

pub const VALUE_BYTES_MAX: usize = 64 << 10;

/// What the node does with what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    Refuse(Failure),
    /// Takes proposals and keeps them.
    Hold,
    /// Takes none.
    Deaf,
}

pub struct Server {
    pub address: SocketAddr,
    pub mode: watch::Sender<Mode>,
    pub held: watch::Receiver<usize>,
    pub leadership: watch::Sender<Leadership>,
    pub metrics: Arc<Metrics>,
    pub shutdown: CancellationToken,
    pub served: JoinHandle<()>,
}

impl Server {
    pub async fn start() -> Self {
        Self::with(Limits::default()).await
    }

    pub async fn with(limits: Limits) -> Self {
        let metrics = Arc::new(Metrics::new());
        let store = Store::new(State::founded(1), metrics.clone());
        let (proposals, proposed) = mpsc::channel(1);
        let (leadership, leads) = watch::channel(Leadership { term: 3, leader: 7 });
        let service = Service::new(proposals, leads, store.view(), VALUE_BYTES_MAX);
        let (commits, committed) = channel::commits();
        tokio::spawn(store.run(committed));
        let (mode, mode_set) = watch::channel(Mode::Apply);
        let (holding, held) = watch::channel(0);
        tokio::spawn(Node { commits, index: 1, held: Vec::new(), holding }.run(proposed, mode_set));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let api = Api::new(service, metrics.clone(), limits);
        let served = tokio::spawn(api.serve(vec![listener], shutdown.clone()));
        Server { address, mode, held, leadership, metrics, shutdown, served }
    }

    pub async fn client(&self) -> Client {
        Client { stream: TcpStream::connect(self.address).await.unwrap(), read: Vec::new() }
    }

    /// One request on a connection of its own.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> Received {
        let mut client = self.client().await;
        client.ask(request).await
    }

    /// Until the node holds so many proposals.
    pub async fn holds(&mut self, count: usize) {
        timeout(PATIENCE, self.held.wait_for(|&held| held == count)).await.unwrap().unwrap();
    }
}

struct Node {
    commits: CommitSender<Answer>,
    index: u64,
    held: Vec<Proposal<Answer>>,
    holding: watch::Sender<usize>,
}

impl Node {
    async fn run(mut self, mut proposals: mpsc::Receiver<Proposal<Answer>>, mut mode: watch::Receiver<Mode>) {
        loop {
            let now = *mode.borrow_and_update();
            tokio::select! {
                proposal = proposals.recv(), if now != Mode::Deaf => match proposal {
                    Some(proposal) => self.held.push(proposal),
                    None => return,
                },
                changed = mode.changed() => if changed.is_err() {
                    return;
                },
            }
            let now = *mode.borrow();
            if !matches!(now, Mode::Hold | Mode::Deaf) {
                for proposal in std::mem::take(&mut self.held) {
                    self.answer(proposal, now);
                }
            }
            self.holding.send_replace(self.held.len());
        }
    }

    fn answer(&mut self, proposal: Proposal<Answer>, mode: Mode) {
        match (proposal, mode) {
            (Proposal::Write { reply, .. }, Mode::Refuse(failure)) => channel::answer(reply, Err(failure)),
            (Proposal::Read { reply }, Mode::Refuse(Failure::Rejected(rejection))) => {
                channel::answer(reply, Err(rejection));
            }
            (Proposal::Write { command, reply }, _) => {
                self.index += 1;
                let request = RequestId { node: 1, boot: 1, counter: self.index };
                let (index, writes, replies) = (self.index, Writes::one(request, command), vec![Some(reply)]);
                self.commits.publish(vec![Commit::Apply { index, term: 3, writes, replies }]).unwrap();
            }
            (Proposal::Read { reply }, _) => {
                self.commits.publish(vec![Commit::Barrier { replies: vec![reply] }]).unwrap();
            }
            (Proposal::Reconfigure { reply, .. }, Mode::Refuse(Failure::Rejected(rejection))) => {
                channel::answer(reply, Err(ChangeFailure::Rejected(rejection)));
            }
            (Proposal::Reconfigure { reply, .. }, Mode::Refuse(Failure::Unknown)) => {
                channel::answer(reply, Err(ChangeFailure::Unknown));
            }
            // Odd IDs are welcome, even ones are not.
            (Proposal::Reconfigure { change: Change::Add(Member { id, .. }) | Change::Remove(id), reply }, _) => {
                let conflict = ChangeFailure::Conflict("no even IDs".to_owned());
                channel::answer(reply, if id % 2 == 1 { Ok(()) } else { Err(conflict) });
            }
            (Proposal::Reconfigure { change: Change::Promote(_), .. }, _) => panic!("nobody asks for it"),
            (Proposal::Status { reply }, _) => channel::answer(reply, status(self.index)),
        }
    }
}

fn status(commit: u64) -> NodeStatus {
    NodeStatus {
        id: 7,
        cluster: "0123456789abcdef".into(),
        role: Role::Leader,
        term: 3,
        leader: 7,
        commit,
        members: Vec::new(),
        snapshot: SnapshotStatus { index: 0, log_from: 2 },
        wal: serde_json::Value::Null,
        queues: Queues { proposals: 0, proposed_bytes: 0, reads: 0, unapplied_bytes: 0 },
    }
}

pub struct Client {
    pub stream: TcpStream,
    read: Vec<u8>,
}

impl Client {
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> Received {
        let request = request.as_ref();
        self.send(request).await;
        if request.starts_with(b"HEAD ") { self.head().await } else { self.receive().await }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        timeout(PATIENCE, self.stream.write_all(bytes.as_ref())).await.unwrap().unwrap();
    }

    /// The next answer.
    pub async fn receive(&mut self) -> Received {
        let mut received = self.head().await;
        let length = received.header("content-length").map_or(0, |length| length.parse().unwrap());
        while self.read.len() < length {
            assert!(self.fill().await, "closed within a body: {received:?}");
        }
        received.body = self.read.drain(..length).collect();
        received
    }

    /// The next answer, which has no body whatever its headers say.
    pub async fn head(&mut self) -> Received {
        let end = loop {
            if let Some(end) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            assert!(self.fill().await, "closed within a head: {:?}", String::from_utf8_lossy(&self.read));
        };
        let head: Vec<u8> = self.read.drain(..end + 4).collect();
        let head = String::from_utf8(head[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n").map(str::to_owned);
        let line = lines.next().unwrap();
        assert!(line.starts_with("HTTP/1."), "{line}");
        Received { status: line[9..12].parse().unwrap(), headers: lines.collect(), body: Vec::new() }
    }

    /// Until the server closes, in order and with nothing more to say.
    pub async fn closed(&mut self) {
        while self.fill().await {}
        assert_eq!(String::from_utf8_lossy(&self.read), "");
    }

    async fn fill(&mut self) -> bool {
        timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await.expect("an answer in time").unwrap() > 0
    }
}

#[derive(Debug)]
pub struct Received {
    pub status: u16,
    pub headers: Vec<String>,
    pub body: Vec<u8>,
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// One line of plain text that says `what`.
    pub fn refuses(&self, status: u16, what: &str) {
        assert_eq!(self.status, status, "{self:?}: {}", self.text());
        assert!(self.text().contains(what), "{what}: {}", self.text());
        assert_eq!(self.text().matches('\n').count(), 1, "{}", self.text());
        assert!(self.text().ends_with('\n'), "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(self.header("x-content-type-options"), Some("nosniff"));
    }

    pub fn closes(&self) -> bool {
        self.header("connection") == Some("close")
    }
}

pub fn put(key: &str, value: &str) -> String {
    format!("PUT /{key} HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{value}", value.len())
}

pub fn get(key: &str) -> String {
    request("GET", &format!("/{key}"))
}

pub fn request(method: &str, target: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nhost: h\r\n\r\n")
}

pub fn rejected(rejection: Rejection) -> Mode {
    Mode::Refuse(Failure::Rejected(rejection))
}
