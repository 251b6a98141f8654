//! One HTTP/1.1 connection under load: requests go out as they are due, `pipeline` of them without an answer at most,
//! and answers come back in order. Buffers are used again and requests are copies of a template, for the machine is
//! shared with the servers.

use std::collections::VecDeque;
use std::io;
use std::pin::pin;
use std::time::Instant;

use bytes::{Buf, BytesMut};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep_until};

use super::answer;
use super::client::{Client, Pause};
use super::source::{Next, Operation, Source};
use super::tally::Failure;
use super::template::Templates;

/// What is read at once, at least.
const READ_BYTES: usize = 16 << 10;
/// More than this is not made ready ahead of a server that does not read, but for the last request's excess.
const UNWRITTEN_BYTES_MAX: usize = 1 << 20;

/// Drives a connection until its source is over, connecting again where it breaks.
pub async fn drive(client: Client, mut source: Source, stream: TcpStream) {
    let (mut stream, mut pause) = (Some(stream), Pause::new());
    loop {
        let connected = match stream.take() {
            Some(stream) => Ok(stream),
            None => client.connect().await,
        };
        let broken = match connected {
            Ok(stream) => {
                pause = Pause::new();
                Pipe::new(&client, &mut source, stream).run().await
            }
            Err(failure) => Err(failure),
        };
        let Err(failure) = broken else { return };
        if client.is_hopeless(&mut source, failure) {
            return;
        }
        tokio::time::sleep(pause.next()).await;
    }
}

struct Pipe<'a> {
    client: &'a Client,
    templates: &'a Templates,
    source: &'a mut Source,
    stream: TcpStream,
    /// Sent, not answered, with the instant of sending.
    in_flight: VecDeque<(Operation, Instant)>,
    output: Vec<u8>,
    written: usize,
    input: BytesMut,
}

impl<'a> Pipe<'a> {
    fn new(client: &'a Client, source: &'a mut Source, stream: TcpStream) -> Self {
        Pipe {
            client,
            templates: &client.templates,
            source,
            stream,
            in_flight: VecDeque::with_capacity(client.pipeline),
            output: Vec::new(),
            written: 0,
            input: BytesMut::with_capacity(READ_BYTES),
        }
    }

    /// Until the source is over and all is answered, or the connection breaks and what is in flight fails with it.
    async fn run(mut self) -> Result<(), Failure> {
        let end = self.exchange().await;
        if let Err(failure) = end {
            let now = Instant::now();
            for (operation, sent) in self.in_flight.drain(..) {
                self.client.settle(self.source, operation, sent, now, Err(failure));
            }
        }
        end
    }

    async fn exchange(&mut self) -> Result<(), Failure> {
        let mut patience = pin!(sleep_until((Instant::now() + self.client.timeout).into()));
        loop {
            let now = Instant::now();
            let (due, over) = self.fill(now);
            self.write()?;
            if over && self.in_flight.is_empty() {
                return Ok(());
            }
            if now >= self.client.give_up_at(self.source) {
                return Err(Failure::TimedOut);
            }
            let writing = self.unwritten() > 0;
            let interest = if writing { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            let wake = async {
                match due {
                    Some(due) => self.client.alarms.wait(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                ready = self.stream.ready(interest) => {
                    if ready?.is_readable() {
                        self.read()?;
                    }
                }
                () = wake => {}
                () = patience.as_mut() => self.be_patient(patience.as_mut())?,
            }
        }
    }

    /// Puts what is due into the output. Returns when more is due, and whether nothing ever will be.
    fn fill(&mut self, now: Instant) -> (Option<Instant>, bool) {
        while self.in_flight.len() < self.client.pipeline && self.unwritten() < UNWRITTEN_BYTES_MAX {
            match self.source.next(now) {
                Next::Send(operation) => {
                    self.templates.append(&operation, &mut self.output);
                    self.in_flight.push_back((operation, now));
                }
                Next::Wait(instant) => return (Some(instant), false),
                Next::Over => return (None, true),
            }
        }
        (None, false)
    }

    fn unwritten(&self) -> usize {
        self.output.len() - self.written
    }

    fn write(&mut self) -> io::Result<()> {
        while self.unwritten() > 0 {
            match self.stream.try_write(&self.output[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Else it would grow for as long as it is never empty.
                    if self.written >= UNWRITTEN_BYTES_MAX {
                        self.output.drain(..self.written);
                        self.written = 0;
                    }
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// Takes what has come and counts the answers that are complete.
    fn read(&mut self) -> Result<(), Failure> {
        self.input.reserve(READ_BYTES);
        match self.stream.try_read_buf(&mut self.input) {
            Ok(0) => return Err(Failure::Broken),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let now = Instant::now();
        while let Some(answer) = answer::parse(&self.input)? {
            if !(100..200).contains(&answer.status) {
                let (operation, sent) = self.in_flight.pop_front().ok_or(Failure::Malformed)?;
                let outcome = answer.judge(self.client.protocol, operation.kind, &self.input);
                self.client.settle(self.source, operation, sent, now, outcome);
            }
            self.input.advance(answer.length);
            if answer.closes {
                return Err(Failure::Broken);
            }
        }
        Ok(())
    }

    /// Looks at the oldest in flight now and then, so that no request sets a timer of its own.
    fn be_patient(&self, mut patience: std::pin::Pin<&mut Sleep>) -> Result<(), Failure> {
        let now = Instant::now();
        let oldest = self.in_flight.front().map_or(now, |(_, sent)| *sent);
        if now >= oldest + self.client.timeout {
            return Err(Failure::TimedOut);
        }
        patience.as_mut().reset((oldest + self.client.timeout).into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::task::LocalSet;

    use super::super::Protocol;
    use super::super::client::fixture;
    use super::*;

    /// The server takes the connection and reads nothing.
    #[tokio::test]
    async fn what_a_server_does_not_read_is_not_piled_up() {
        let body = async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let client = fixture::client(Protocol::Http, &address, 10_000, Duration::from_secs(60));
            let mut source = fixture::sources(1, None).remove(0);
            let stream = client.connect().await.unwrap();
            let mut pipe = Pipe::new(&client, &mut source, stream);
            let now = Instant::now();
            // The last request may exceed the bound.
            let most = UNWRITTEN_BYTES_MAX + (1 << 17);
            // Until the kernel's buffers are full too.
            while pipe.unwritten() < UNWRITTEN_BYTES_MAX {
                pipe.stream.writable().await.unwrap();
                pipe.fill(now);
                assert!(pipe.unwritten() <= most, "{}", pipe.unwritten());
                pipe.write().unwrap();
                assert!(pipe.output.len() <= UNWRITTEN_BYTES_MAX + most, "{}", pipe.output.len());
                if pipe.unwritten() > 0 {
                    pipe.fill(now);
                }
            }
            assert!(pipe.unwritten() <= most && pipe.in_flight.len() < client.pipeline);
        };
        LocalSet::new().run_until(body).await;
    }
}
