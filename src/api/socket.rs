//! A client's socket that keeps track of what its connection is doing, from the bytes that pass and from the requests
//! that begin and end. `connection` reads it to tell an idle client from a slow one.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Between requests. A part of the next one may be there if it came behind the last.
    Idle = 0,
    /// The head of a request has begun.
    Head = 1,
    /// A request is being read and served.
    Serving = 2,
    /// Its answer is being sent.
    Answering = 3,
}

/// Shared by a connection's socket, its requests and its watchdog, which all run in one task: relaxed ordering is
/// enough.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    steps: AtomicU64,
    unread: AtomicBool,
    refused: AtomicU16,
}

impl Progress {
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Idle,
            1 => Phase::Head,
            2 => Phase::Serving,
            3 => Phase::Answering,
            other => unreachable!("no phase has number {other}"),
        }
    }

    /// Differs from what it was if there was progress: a new phase, or a piece of an answer sent. Further bytes of a
    /// head are none: they would let a client feed it one by one.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.step();
    }

    /// The client may still be sending the request that was just answered.
    pub fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    pub fn is_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// The status that hyper answered by itself to what it could not read as a request; it was not sent.
    pub fn refused(&self) -> Option<u16> {
        Some(self.refused.load(Ordering::Relaxed)).filter(|&status| status != 0)
    }

    fn step(&self) {
        self.steps.store(self.steps().wrapping_add(1), Ordering::Relaxed);
    }

    /// Whether what hyper writes now belongs to no request. It is its own bare error answer then, from
    /// `HTTP/1.1 400 …` on, and the end of the connection.
    fn withholds(&self, bytes: &[u8]) -> bool {
        match self.phase() {
            Phase::Serving | Phase::Answering => false,
            Phase::Idle | Phase::Head => {
                let status = bytes.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
                if let Some(status) = status {
                    self.refused.store(status, Ordering::Relaxed);
                }
                true
            }
        }
    }
}

/// The socket itself. Its shutdown does nothing: `connection` has the last word.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    progress: Arc<Progress>,
}

impl Socket {
    pub fn new(stream: TcpStream, progress: Arc<Progress>) -> Self {
        Socket { stream, progress }
    }

    pub fn into_stream(self) -> TcpStream {
        self.stream
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before && self.progress.phase() == Phase::Idle {
            self.progress.enter(Phase::Head);
        }
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.progress.withholds(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.progress.step();
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.progress.withholds(slices.first().map_or(&[], |slice| slice)) {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices))?;
        self.progress.step();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes when it has written all that it has. An answer's body is one piece, so that is the whole answer.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.progress.phase() == Phase::Answering {
            self.progress.enter(Phase::Idle);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
