//! One HTTP/2 connection to an etcd, shared by `pipeline` clients that each have one gRPC call under way: etcd's own
//! interface, and the cheapest that it has. The messages are few enough to be written and read by hand; `template` has
//! those that are sent.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use h2::client::SendRequest;
use hyper::http::{HeaderMap, Request, StatusCode};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, spawn_local};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::answer::BYTES_MAX;
use super::client::{Client, Pause};
use super::source::{Kind, Next, Operation, Source};
use super::tally::{Answered, Failure};

const WINDOW_BYTES: u32 = 16 << 20;

/// Drives a connection until the sources of its clients are over, connecting again where it breaks.
pub async fn drive(client: Client, mut sources: Vec<Source>, stream: TcpStream) {
    let (mut stream, mut pause) = (Some(stream), Pause::new());
    loop {
        let connected = match stream.take() {
            Some(stream) => Ok(stream),
            None => client.connect().await,
        };
        let started = match connected {
            Ok(stream) => handshake(stream).await,
            Err(failure) => Err(failure),
        };
        match started {
            Ok(link) => {
                pause = Pause::new();
                sources = run(&client, sources, link).await;
            }
            // It counts once, not once for each of its clients.
            Err(failure) => client.tally.borrow_mut().fail(failure, 1, Instant::now()),
        }
        sources.retain_mut(|source| !client.is_hopeless(source, Failure::Broken));
        if sources.is_empty() {
            return;
        }
        tokio::time::sleep(pause.next()).await;
    }
}

/// A connection, as each of its clients has it.
#[derive(Clone)]
struct Link {
    send: SendRequest<Bytes>,
    /// When the server last answered anything.
    heard: Rc<Cell<Instant>>,
    /// The connection is over, or is to be.
    over: CancellationToken,
}

async fn handshake(stream: TcpStream) -> Result<Link, Failure> {
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES).enable_push(false);
    let (send, connection) = builder.handshake(stream).await.map_err(|_| Failure::Unreachable)?;
    let link = Link { send, heard: Rc::new(Cell::new(Instant::now())), over: CancellationToken::new() };
    let over = link.over.clone().drop_guard();
    let told = link.over.clone();
    spawn_local(async move {
        // Each call under way learns of the end too, and counts.
        tokio::select! {
            end = connection => if let Err(error) = end {
                debug!(%error, "a connection broke");
            },
            () = told.cancelled() => {}
        }
        drop(over);
    });
    Ok(link)
}

/// Runs a client for each source. Those that were cut short by the end of the connection come back.
async fn run(client: &Client, sources: Vec<Source>, link: Link) -> Vec<Source> {
    let mut clients = JoinSet::new();
    for mut source in sources {
        let (client, link) = (client.clone(), link.clone());
        clients.spawn_local(async move {
            let end = call_after_call(&client, &mut source, link).await;
            (source, end)
        });
    }
    drop(link);
    let ends = clients.join_all().await;
    ends.into_iter().filter_map(|(source, end)| end.is_err().then_some(source)).collect()
}

/// Until the source is over, or the connection is.
async fn call_after_call(client: &Client, source: &mut Source, mut link: Link) -> Result<(), Failure> {
    let requests = Requests::new(&client.address);
    let mut body = Vec::new();
    loop {
        let now = Instant::now();
        if now >= client.give_up_at(source) {
            return Err(Failure::TimedOut);
        }
        let operation = match source.next(now) {
            Next::Send(operation) => operation,
            Next::Over => return Ok(()),
            Next::Wait(instant) => {
                tokio::select! {
                    () = client.alarms.wait(instant) => continue,
                    // All connect again together: the others wait for this one.
                    () = link.over.cancelled() => return Err(Failure::Broken),
                }
            }
        };
        body.clear();
        client.templates.append(&operation, &mut body);
        let message = Bytes::copy_from_slice(&body);
        let called = call(&mut link.send, requests.of(operation.kind), message, &operation);
        let outcome = tokio::time::timeout(client.timeout, called).await.unwrap_or(Err(Failure::TimedOut));
        let answered = Instant::now();
        client.settle(source, operation, now, answered, outcome);
        match outcome {
            Err(Failure::Broken) => return Err(Failure::Broken),
            // Nobody has heard of this server since the call was made: it may have gone without a word.
            Err(Failure::TimedOut) if link.heard.get() <= now => {
                link.over.cancel();
                return Err(Failure::Broken);
            }
            // A call that is given up leaves the connection to the others.
            Err(Failure::TimedOut) => {}
            Ok(_) | Err(_) => link.heard.set(answered),
        }
    }
}

async fn call(
    send: &mut SendRequest<Bytes>,
    request: Request<()>,
    message: Bytes,
    operation: &Operation,
) -> Result<Answered, Failure> {
    // The server may allow fewer calls at once than there are clients. A connection that takes no call is over.
    std::future::poll_fn(|cx| send.poll_ready(cx)).await.map_err(|_| Failure::Broken)?;
    let (response, mut stream) = send.send_request(request, false).map_err(|_| Failure::Broken)?;
    stream.send_data(message, true).map_err(failure)?;
    let response = response.await.map_err(failure)?;
    if response.status() != StatusCode::OK {
        return Err(Failure::Status(response.status().as_u16()));
    }
    // A call that fails at once has its status in the only headers that there are.
    if let Some(code) = grpc_status(response.headers())?.filter(|code| *code != 0) {
        return Err(Failure::Grpc(code));
    }
    let mut body = response.into_body();
    let mut message = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.map_err(failure)?;
        body.flow_control().release_capacity(piece.len()).map_err(failure)?;
        if message.len() + piece.len() > BYTES_MAX {
            return Err(Failure::Malformed);
        }
        message.extend_from_slice(&piece);
    }
    let trailers = body.trailers().await.map_err(failure)?.ok_or(Failure::Malformed)?;
    match grpc_status(&trailers)?.ok_or(Failure::Malformed)? {
        0 => judge(operation.kind, &message),
        code => Err(Failure::Grpc(code)),
    }
}

/// Of the connection, or of one call on it.
fn failure(error: h2::Error) -> Failure {
    if error.is_io() || error.is_go_away() { Failure::Broken } else { Failure::Reset }
}

/// Headers of the two calls, made once.
struct Requests {
    put: Request<()>,
    range: Request<()>,
}

impl Requests {
    fn new(address: &str) -> Self {
        let post = |method: &str| {
            let request = Request::post(format!("http://{address}/etcdserverpb.KV/{method}"));
            let request = request.header("content-type", "application/grpc").header("te", "trailers");
            request.body(()).expect("a request to an address that was dialled")
        };
        Requests { put: post("Put"), range: post("Range") }
    }

    fn of(&self, kind: Kind) -> Request<()> {
        match kind {
            Kind::Write => self.put.clone(),
            Kind::Read => self.range.clone(),
        }
    }
}

fn grpc_status(headers: &HeaderMap) -> Result<Option<u32>, Failure> {
    let Some(value) = headers.get("grpc-status") else { return Ok(None) };
    let code = value.to_str().ok().and_then(|text| text.parse().ok());
    code.map(Some).ok_or(Failure::Malformed)
}

/// The message behind gRPC's prefix: a PutResponse, or a RangeResponse, whose field 2 is a key that was found.
fn judge(kind: Kind, body: &[u8]) -> Result<Answered, Failure> {
    let (prefix, message) = body.split_at_checked(5).ok_or(Failure::Malformed)?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || length as usize != message.len() {
        return Err(Failure::Malformed);
    }
    match kind {
        Kind::Write => Ok(Answered::Written),
        Kind::Read if has_field(message, 2)? => Ok(Answered::Found),
        Kind::Read => Ok(Answered::Missing),
    }
}

/// Whether a message of fields that are numbers or bytes, as etcd's answers are, has field `wanted`.
fn has_field(mut message: &[u8], wanted: u64) -> Result<bool, Failure> {
    while !message.is_empty() {
        let tag = take_varint(&mut message)?;
        if tag >> 3 == wanted {
            return Ok(true);
        }
        match tag & 7 {
            0 => drop(take_varint(&mut message)?),
            2 => {
                let length = usize::try_from(take_varint(&mut message)?).map_err(|_| Failure::Malformed)?;
                message = message.get(length..).ok_or(Failure::Malformed)?;
            }
            _ => return Err(Failure::Malformed),
        }
    }
    Ok(false)
}

fn take_varint(message: &mut &[u8]) -> Result<u64, Failure> {
    let mut number = 0;
    for place in 0..10 {
        let (byte, rest) = message.split_first().ok_or(Failure::Malformed)?;
        *message = rest;
        number |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(Failure::Malformed)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    use super::super::Protocol;
    use super::super::client::fixture;
    use super::*;

    /// What a server does with a call.
    #[derive(Clone, Copy)]
    enum Does {
        Answer,
        Reset,
        Nothing,
    }

    /// Takes connections, and does with the calls of each what it is told to, the last for all further ones.
    async fn serve(listener: TcpListener, connections: Vec<Vec<Does>>, taken: Rc<Cell<usize>>) {
        for script in connections {
            let (stream, _) = listener.accept().await.unwrap();
            taken.set(taken.get() + 1);
            spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                let (mut place, mut kept) = (0, Vec::new());
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    match script[place.min(script.len() - 1)] {
                        Does::Answer => {
                            let mut stream = respond.send_response(hyper::http::Response::new(()), false).unwrap();
                            stream.send_data(Bytes::from(body(&[])), false).unwrap();
                            let status = ("grpc-status".parse().unwrap(), "0".parse().unwrap());
                            stream.send_trailers(HeaderMap::from_iter([status])).unwrap();
                        }
                        Does::Reset => respond.send_reset(h2::Reason::REFUSED_STREAM),
                        Does::Nothing => kept.push((request, respond)),
                    }
                    place += 1;
                }
            });
        }
    }

    /// Writes of two clients, all done: how many succeeded, what failed, and the connections that it took.
    async fn drive_against(connections: Vec<Vec<Does>>, operations: u64) -> (u64, Vec<(Failure, u64)>, usize) {
        let body = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let taken = Rc::new(Cell::new(0));
            spawn_local(serve(listener, connections, taken.clone()));
            let client = fixture::client(Protocol::Etcd, &address, 2, Duration::from_secs(1));
            let sources = fixture::sources(2, Some(operations));
            let stream = client.connect().await.unwrap();
            tokio::time::timeout(Duration::from_secs(60), drive(client.clone(), sources, stream)).await.unwrap();
            let tally = client.tally.borrow();
            (tally.writes.len(), tally.failures.clone().into_iter().collect(), taken.get())
        };
        LocalSet::new().run_until(body).await
    }

    #[tokio::test]
    async fn a_call_that_is_reset_leaves_its_client_on_the_connection() {
        use Does::{Answer, Reset};
        let end = drive_against(vec![vec![Answer, Reset, Answer, Reset, Reset, Answer]], 20).await;
        assert_eq!(end, (17, vec![(Failure::Reset, 3)], 1));
    }

    #[tokio::test]
    async fn a_connection_on_which_nothing_is_heard_is_given_up_for_all() {
        let (done, failures, connections) = drive_against(vec![vec![Does::Nothing], vec![Does::Answer]], 20).await;
        assert_eq!((done, connections), (18, 2), "{failures:?}");
        // Which of the two sees it first is chance; the other's call is cut short, or is late by as much.
        assert_eq!(failures.iter().map(|(_, count)| count).sum::<u64>(), 2, "{failures:?}");
        assert!(failures.iter().any(|(failure, _)| *failure == Failure::TimedOut), "{failures:?}");
    }

    #[tokio::test]
    async fn one_call_without_an_answer_does_not_end_the_connection_of_another() {
        use Does::{Answer, Nothing};
        let (_, failures, connections) = drive_against(vec![vec![Nothing, Answer]], 200).await;
        assert_eq!((failures, connections), (vec![(Failure::TimedOut, 1)], 1));
    }

    /// A header of one field, then `rest`, behind gRPC's prefix.
    fn body(rest: &[u8]) -> Vec<u8> {
        let message = [&[0x0a, 2, 0x08, 1], rest].concat();
        [&[0, 0, 0, 0, message.len() as u8], &message[..]].concat()
    }

    #[test]
    fn a_range_tells_found_from_missing() {
        assert_eq!(judge(Kind::Write, &body(&[])), Ok(Answered::Written));
        assert_eq!(judge(Kind::Read, &body(&[])), Ok(Answered::Missing));
        // more = true, count = 300: none of it is a key.
        assert_eq!(judge(Kind::Read, &body(&[0x18, 1, 0x20, 0xac, 2])), Ok(Answered::Missing));
        assert_eq!(judge(Kind::Read, &body(&[0x12, 1, 0, 0x20, 1])), Ok(Answered::Found));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for body in [&[][..], &[0; 4], &[0, 0, 0, 0, 9, 1], &[1, 0, 0, 0, 0], &body(&[0x1a, 200]), &body(&[0x19]), &{
            body(&[0xff; 11])
        }] {
            assert_eq!(judge(Kind::Read, body), Err(Failure::Malformed), "{body:?}");
        }
    }

    #[test]
    fn the_status_of_a_call_is_a_number() {
        let headers = |value| HeaderMap::from_iter([("grpc-status".parse().unwrap(), value)]);
        assert_eq!(grpc_status(&HeaderMap::new()), Ok(None));
        assert_eq!(grpc_status(&headers("14".parse().unwrap())), Ok(Some(14)));
        assert_eq!(grpc_status(&headers("".parse().unwrap())), Err(Failure::Malformed));
    }
}
