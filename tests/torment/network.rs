//! The network between the members: each is reached at a proxy of ours, which knows the caller by the headers that
//! open every exchange, and treats the bytes of either direction as the link that they travel on is at that moment.
//! Told by `storms` what the links are; `world` lays the cables.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::dice::Dice;
use crate::helpers::run;

/// What happens to bytes on their way from one member to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// They wait until the link is mended, as TCP sends again what was lost; nobody is told.
    Cut,
    /// Each piece is late by so much.
    Slow(Duration),
    /// Pieces of 64 bytes, so far apart.
    Trickle(Duration),
    /// With each piece the connection breaks, one time in so many.
    Lossy(u64),
    /// So many packets of a hundred are lost, as the kernel sees them.
    Packets(u8),
}

/// The links that are not as they should be, from sender to receiver.
pub type Weather = BTreeMap<(u64, u64), Link>;

const HEAD_BYTES_MAX: usize = 16 << 10;
/// A connection that says nothing is a stranger's.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
const TRICKLE_BYTES: usize = 64;

pub struct Network {
    weather: watch::Sender<Weather>,
    runtime: Runtime,
    seed: u64,
    filters_packets: bool,
}

impl Network {
    /// Packets can be lost where this process has a network of its own.
    pub fn new(seed: u64, filters_packets: bool) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Network { weather: watch::Sender::new(Weather::new()), runtime, seed, filters_packets })
    }

    /// Member `id` is reached at `port`. It must listen at the address that is returned, whose port is `listen`.
    pub fn lay_cable(&self, id: u64, port: u16, listen: u16) -> anyhow::Result<SocketAddr> {
        let address = (Ipv4Addr::LOCALHOST, port);
        let listener = self.runtime.block_on(TcpListener::bind(address)).context("bind a proxy's port")?;
        let (weather, seed, filters_packets) = (self.weather.subscribe(), self.seed, self.filters_packets);
        let at = |id| if filters_packets { callee(id) } else { Ipv4Addr::LOCALHOST };
        let listens = SocketAddr::from((at(id), listen));
        self.runtime.spawn(async move {
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let cable = Cable { weather: weather.clone(), dice: Dice::new(seed, (id << 32) + connection) };
                tokio::spawn(async move {
                    // A broken connection is what this is for; both ends see it.
                    connect(stream, id, listens, filters_packets, cable).await.ok();
                });
            }
        });
        Ok(listens)
    }

    pub fn set(&self, weather: Weather) -> anyhow::Result<()> {
        if self.filters_packets {
            filter(&weather)?;
        }
        self.weather.send_replace(weather);
        Ok(())
    }
}

/// Where the proxies call from for a member: so its packets can be told from another's.
fn caller(id: u64) -> Ipv4Addr {
    Ipv4Addr::new(127, 1, (id >> 8) as u8, id as u8)
}

/// Where a member listens.
fn callee(id: u64) -> Ipv4Addr {
    Ipv4Addr::new(127, 2, (id >> 8) as u8, id as u8)
}

/// Has the kernel lose the packets of links, on the connections that either end made.
fn filter(weather: &Weather) -> anyhow::Result<()> {
    let mut rules = String::from("table ip torment\ndelete table ip torment\ntable ip torment {\n");
    rules.push_str("chain input { type filter hook input priority 0;\n");
    for ((from, to), link) in weather {
        if let Link::Packets(percent) = link {
            // nft takes no number here that the generator cannot give.
            let last = percent - 1;
            for (from, to) in [(caller(*from), callee(*to)), (callee(*from), caller(*to))] {
                let rule = format!("ip saddr {from} ip daddr {to} numgen random mod 100 <= {last} drop\n");
                rules.push_str(&rule);
            }
        }
    }
    rules.push_str("}\n}\n");
    run(Command::new("nft").arg(rules))
}

#[derive(Clone)]
struct Cable {
    weather: watch::Receiver<Weather>,
    dice: Dice,
}

async fn connect(
    mut outer: TcpStream,
    to: u64,
    listens: SocketAddr,
    filters_packets: bool,
    cable: Cable,
) -> io::Result<()> {
    let (head, from) = timeout(HEAD_TIME_MAX, read_head(&mut outer)).await??;
    let mut outward = cable.clone();
    // The call itself travels on the link, too.
    outward.pass((from, to)).await?;
    let socket = TcpSocket::new_v4()?;
    if filters_packets {
        socket.bind((caller(from), 0).into())?;
    }
    let mut inner = socket.connect(listens).await?;
    inner.set_nodelay(true)?;
    outer.set_nodelay(true)?;
    inner.write_all(&head).await?;
    let (outer_reads, outer_writes) = outer.into_split();
    let (inner_reads, inner_writes) = inner.into_split();
    tokio::try_join!(
        pump(outer_reads, inner_writes, (from, to), outward),
        pump(inner_reads, outer_writes, (to, from), cable),
    )?;
    Ok(())
}

/// The first bytes of a connection, and the member that they say they come from; 0 where they do not say.
async fn read_head(outer: &mut TcpStream) -> io::Result<(Vec<u8>, u64)> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
        if outer.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let from = text.lines().find_map(|line| line.strip_prefix("x-raft-from:")?.trim().parse().ok());
    Ok((head, from.unwrap_or(0)))
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, link: (u64, u64), mut cable: Cable) -> io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        // The end of a process travels like its bytes: behind a cut nobody hears of it.
        let read = from.read(&mut piece).await;
        let trickle = cable.pass(link).await?;
        let bytes = &piece[..read?];
        if bytes.is_empty() {
            return to.shutdown().await;
        }
        match trickle {
            None => to.write_all(bytes).await?,
            Some(pause) => {
                for few in bytes.chunks(TRICKLE_BYTES) {
                    to.write_all(few).await?;
                    if cable.pass(link).await?.is_some() {
                        sleep_until(Instant::now() + pause).await;
                    }
                }
            }
        }
    }
}

impl Cable {
    /// Waits until a piece may pass; how far apart its parts must be, if they must. Fails where the connection breaks.
    async fn pass(&mut self, link: (u64, u64)) -> io::Result<Option<Duration>> {
        loop {
            let now = self.weather.borrow_and_update().get(&link).copied();
            match now {
                None | Some(Link::Packets(_)) => return Ok(None),
                Some(Link::Slow(delay)) => {
                    sleep_until(Instant::now() + delay).await;
                    return Ok(None);
                }
                Some(Link::Trickle(pause)) => return Ok(Some(pause)),
                Some(Link::Lossy(of)) if self.dice.next().is_multiple_of(of) => {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                Some(Link::Lossy(_)) => return Ok(None),
                Some(Link::Cut) => {
                    self.weather.changed().await.map_err(|_| io::ErrorKind::ConnectionAborted)?;
                }
            }
        }
    }
}
