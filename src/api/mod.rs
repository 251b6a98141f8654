//! The client port: HTTP/1.1 in front of [`kv::Service`]. Owns the sockets of clients, their limits and time-outs, and
//! the translation of requests and outcomes; knows nothing of raft, of the log or of the disk. `server` calls it.
//!
//! ```text
//! mod.rs        accepts            socket.rs  what a connection is doing, seen from its bytes
//! connection.rs one connection     target.rs  a request target as a key or a service
//! router.rs     one request        body.rs    a request body, bounded in bytes and in time
//! raftexample.rs PUT, GET /{key}   reply.rs   answers; the one map from errors to statuses
//! ops.rs        /metrics, /readyz, …
//! ```
//!
//! # What hyper decides before this room sees a request
//! A head that is no HTTP, or larger than its limits, ends its connection: hyper's bare answer is kept back and one
//! with a reason is sent in its place. Content-Length beside Transfer-Encoding cannot be seen here, for hyper drops
//! the former; it is served as chunked and the connection closes behind it, as RFC 9112 §6.3 permits, so nothing can be
//! smuggled. A fragment (`#…`), which no client may send, is cut off.

mod body;
mod connection;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod ops;
mod raftexample;
mod reply;
mod router;
mod socket;
mod target;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::server::conn::http1;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::command::KEY_BYTES_MAX;
use crate::kv;
use crate::metrics::Metrics;

/// All headers of a request together, in bytes, names and separators included. Their number is limited to 100 by
/// hyper's own default, which it keeps on the stack.
pub const HEADER_BYTES_MAX: usize = 16 << 10;

/// A request line, in bytes: the longest key with each byte escaped, and room for an absolute form.
const REQUEST_LINE_BYTES_MAX: usize = 3 * KEY_BYTES_MAX + 1024;

/// A connection's buffer for what it reads, in bytes. Values that are larger come in pieces.
const READ_BUFFER_BYTES_MAX: usize = 64 << 10;

/// Connections over the limit that are being told so at the same time; what comes beyond is closed without a word.
const TURNED_AWAY_MAX: usize = 128;

/// How long to wait for a file descriptor to come free when none is left to accept with.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What one client, and all of them together, may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections open at once. One over it is told 503 and closed: a client in the listen queue would wait without
    /// learning why, and so would a health probe.
    pub connections_max: usize,
    /// Bytes of request bodies in memory, over all connections; beyond, 503.
    pub bodies_bytes_max: usize,
    /// A connection without a request is closed after this.
    pub idle_time: Duration,
    /// From the first byte of a request to the end of its headers; beyond, 408.
    pub head_time: Duration,
    /// From one piece of a body to the next; beyond, 408.
    pub body_gap_time: Duration,
    /// From the first to the last piece of a body; beyond, 408.
    pub body_time: Duration,
    /// A client that takes no byte of its answer for this long is hung up on.
    pub write_time: Duration,
    /// How long `/readyz` and `/status` wait for the node.
    pub probe_time: Duration,
    /// How long a client that was refused in the middle of its request may still send, so that it reads why instead
    /// of a reset.
    pub linger_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections_max: 10_000,
            bodies_bytes_max: 256 << 20,
            idle_time: Duration::from_secs(75),
            head_time: Duration::from_secs(10),
            body_gap_time: Duration::from_secs(10),
            body_time: Duration::from_secs(60),
            write_time: Duration::from_secs(30),
            probe_time: Duration::from_secs(1),
            linger_time: Duration::from_secs(1),
        }
    }
}

/// The client port's front end.
#[derive(Debug)]
pub struct Api {
    service: kv::Service,
    metrics: Arc<Metrics>,
    limits: Limits,
    bodies: body::Budget,
    http: http1::Builder,
}

impl Api {
    pub fn new(service: kv::Service, metrics: Arc<Metrics>, limits: Limits) -> Self {
        let mut http = http1::Builder::new();
        http.keep_alive(true)
            // A client that closes its sending side after a request (`nc`, HTTP/1.0) gets its answer.
            .half_close(true)
            // It would close idle connections too, and arm a timer for each request: `connection` watches instead.
            .header_read_timeout(None)
            .max_header_size(HEADER_BYTES_MAX + REQUEST_LINE_BYTES_MAX)
            .max_buf_size(READ_BUFFER_BYTES_MAX)
            // Flushing once for all that is pipelined holds an answer back until the *next* request is whole, and
            // gathers answers without a bound: 3,000 GETs in 64 KiB times 1 MiB each.
            .pipeline_flush(false);
        Api { bodies: body::Budget::new(limits.bodies_bytes_max), service, metrics, limits, http }
    }

    /// Serves until `shutdown`; then closes the listeners and the idle connections, lets requests in flight finish,
    /// and returns when the last connection is done. Whoever does not want to wait so long drops this future, which
    /// ends every connection.
    pub async fn serve(self, mut listeners: Vec<TcpListener>, shutdown: CancellationToken) {
        let api = Arc::new(self);
        let mut connections = JoinSet::new();
        let mut accepting = true;
        loop {
            api.metrics.http_connections.set(connections.len() as i64);
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = connections.join_next() => {
                    log_panic(ended);
                    continue;
                }
                accepted = accept(&listeners) => accepted,
            };
            // The next one gets the first turn.
            listeners.rotate_left(1);
            match accepted {
                Ok(stream) => {
                    if !accepting {
                        info!("accepting connections again");
                        accepting = true;
                    }
                    let open = connections.len();
                    if open < api.limits.connections_max {
                        connections.spawn(connection::serve(api.clone(), stream, shutdown.child_token()));
                    } else if open < api.limits.connections_max + TURNED_AWAY_MAX {
                        connections.spawn(connection::turn_away(api.clone(), stream));
                    }
                }
                Err(error) if concerns_one_client(&error) => {}
                Err(error) => {
                    if accepting {
                        warn!(%error, "cannot accept connections; trying on");
                        accepting = false;
                    }
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            }
        }
        drop(listeners);
        while let Some(ended) = connections.join_next().await {
            log_panic(ended);
            api.metrics.http_connections.set(connections.len() as i64);
        }
    }
}

/// A connection from whichever listener has one.
async fn accept(listeners: &[TcpListener]) -> io::Result<TcpStream> {
    poll_fn(|cx| {
        for listener in listeners {
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                return Poll::Ready(accepted.map(|(stream, _)| stream));
            }
        }
        Poll::Pending
    })
    .await
}

/// The client went away before it was accepted; the listener is well.
fn concerns_one_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

fn log_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a connection's task failed");
    }
}
