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
use super::client::{Client, RECONNECT};
use super::source::{Next, Operation, Source};
use super::tally::Failure;
use super::template::Templates;

/// What is read at once, at least.
const READ_BYTES: usize = 16 << 10;

/// Drives a connection until its source is over, connecting again where it breaks.
pub async fn drive(client: Client, mut source: Source, stream: TcpStream) {
    let mut stream = Some(stream);
    loop {
        let connected = match stream.take() {
            Some(stream) => Ok(stream),
            None => client.connect().await,
        };
        let broken = match connected {
            Ok(stream) => Pipe::new(&client, &mut source, stream).run().await,
            Err(failure) => Err(failure),
        };
        let Err(failure) = broken else { return };
        if client.is_hopeless(&mut source, failure) {
            return;
        }
        tokio::time::sleep(RECONNECT).await;
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
            let mut tally = self.client.tally.borrow_mut();
            for (operation, sent) in self.in_flight.drain(..) {
                tally.record(&operation, sent, now, Err(failure));
            }
        }
        end
    }

    async fn exchange(&mut self) -> Result<(), Failure> {
        let give_up_at = self.client.give_up_at(self.source);
        let mut patience = pin!(sleep_until((Instant::now() + self.client.timeout).into()));
        loop {
            let now = Instant::now();
            let (due, over) = self.fill(now);
            self.write()?;
            if over && self.in_flight.is_empty() {
                return Ok(());
            }
            if now >= give_up_at {
                return Err(Failure::TimedOut);
            }
            let writing = self.written < self.output.len();
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
        while self.in_flight.len() < self.client.pipeline {
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

    fn write(&mut self) -> io::Result<()> {
        while self.written < self.output.len() {
            match self.stream.try_write(&self.output[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
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
        let mut tally = self.client.tally.borrow_mut();
        while let Some(answer) = answer::parse(&self.input)? {
            if !(100..200).contains(&answer.status) {
                let (operation, sent) = self.in_flight.pop_front().ok_or(Failure::Malformed)?;
                let outcome = answer.judge(self.client.protocol, operation.kind, &self.input);
                tally.record(&operation, sent, now, outcome);
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
