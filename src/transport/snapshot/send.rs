//! Our end of a snapshot that we send: a thread reads the file, a few blocks ahead of the connection, and the node is told
//! how it ended, once, whatever happens.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use hyper::{Method, StatusCode};
use raft::eraftpb::{Message, MessageType};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::meter::Meter;
use super::{BLOCK_BYTES, BLOCKS_QUEUED_MAX, FILE_BYTES_MAX, HEAD_BYTES_MAX};
use crate::transport::Event;
use crate::transport::dial::{Connected, collect, connect, drive, failure, verify};
use crate::transport::frame::encode;
use crate::transport::handshake::SNAPSHOT;
use crate::transport::hub::Hub;
use crate::transport::peer::Peer;

/// A refusal is one line.
const ANSWER_BYTES_MAX: usize = 4 << 10;

/// Sends the snapshot that `message` names, in a task of its own. There is no queue: where no slot is free it is refused.
pub fn send(hub: &Arc<Hub>, message: Message) {
    assert_eq!(message.get_msg_type(), MessageType::MsgSnapshot, "only a snapshot comes with a file");
    assert!(message.get_snapshot().data.is_empty(), "a snapshot that comes with a file has no other data");
    let slot = Slot::take(hub, message.to);
    let sender = hub.clone();
    hub.spawn(async move {
        let (hub, to) = (sender, message.to);
        let outcome = match slot {
            Ok(slot) => {
                let place = slot.peer.place();
                let transfer = transfer(&hub, &slot.peer, &message);
                let outcome = place.run_until_cancelled(transfer).await;
                let outcome = outcome.unwrap_or_else(|| Err("the peer moved or was dropped".to_owned()));
                if let Err(error) = &outcome {
                    slot.peer.note(format!("send a snapshot: {error}"));
                }
                // Its slot is free by the time the node hears of it and may send the next.
                drop(slot);
                outcome
            }
            Err(error) => Err(error.to_owned()),
        };
        let index = message.get_snapshot().get_metadata().index;
        match &outcome {
            Ok(()) => tracing::info!(peer = to, index, "the peer has the snapshot"),
            Err(error) => {
                if hub.peer(to).is_none_or(|peer| peer.lines.snapshot_lost.is_due()) {
                    tracing::warn!(peer = to, index, error, "a snapshot was not delivered");
                }
            }
        }
        hub.tell(Event::SnapshotSent { peer: to, delivered: outcome.is_ok() }).await;
    });
}

/// The right to send, at most one for each peer and a few in all.
struct Slot {
    peer: Arc<Peer>,
    _one_for_the_peer: OwnedSemaphorePermit,
    _one_of_all: OwnedSemaphorePermit,
}

impl Slot {
    fn take(hub: &Hub, to: u64) -> Result<Slot, &'static str> {
        let peer = hub.peer(to).ok_or("the member has no address")?;
        let permit = peer.sending.clone().try_acquire_owned();
        let _one_for_the_peer = permit.map_err(|_| "another one is on its way to this peer")?;
        let permit = hub.sending.clone().try_acquire_owned();
        let _one_of_all = permit.map_err(|_| "too many are on their way to other peers")?;
        Ok(Slot { peer, _one_for_the_peer, _one_of_all })
    }
}

async fn transfer(hub: &Hub, peer: &Peer, message: &Message) -> Result<(), String> {
    let (index, term) = (message.get_snapshot().get_metadata().index, message.get_snapshot().get_metadata().term);
    let files = hub.snapshots.clone();
    let opened = hub.spawn_blocking(move || files.open(index, term)).await.map_err(io::Error::other);
    let (total_bytes, file) = opened.flatten().map_err(|error| format!("open it: {error}"))?;
    if total_bytes > FILE_BYTES_MAX {
        return Err(format!("it takes {total_bytes} bytes, of {FILE_BYTES_MAX}"));
    }
    if !peer.may_dial() {
        return Err("the peer was unreachable a moment ago".to_owned());
    }
    let (mut sender, connection): Connected<Outgoing> = connect(peer).await.map_err(|error| error.to_string())?;
    let mut head = BytesMut::new();
    encode(&mut head, hub.boot, peer.outbox.next_sequence(), message);
    if head.len() > HEAD_BYTES_MAX {
        return Err(format!("its message takes {} bytes, of {HEAD_BYTES_MAX}", head.len()));
    }
    let (blocks_in, blocks) = mpsc::channel(BLOCKS_QUEUED_MAX);
    // It ends with the connection, which holds the other end of the channel.
    drop(hub.spawn_blocking(move || read(file, total_bytes, &blocks_in)));
    let meter = Meter::of_sending(peer, total_bytes);
    let body = Outgoing { head: Some(head.freeze()), blocks, left_bytes: total_bytes, meter: meter.clone() };
    let request = hub.identity.request_with(Method::POST, SNAPSHOT, peer.id, body);
    let exchanged = drive(connection, async {
        let response = sender.send_request(request).await.map_err(|error| format!("send it: {error}"))?;
        collect(response, ANSWER_BYTES_MAX).await
    });
    let response = tokio::select! {
        exchanged = exchanged => exchanged?,
        () = meter.stalled() => return Err("it stalled".to_owned()),
    };
    verify(hub, peer, &response).await.map_err(|denied| format!("not the peer that we know: {denied}"))?;
    match response.status() {
        StatusCode::NO_CONTENT => Ok(()),
        _ => Err(failure(&response)),
    }
}

/// Reads the file, for as long as somebody takes its blocks.
fn read(file: Box<dyn Read + Send>, total_bytes: u64, blocks: &mpsc::Sender<io::Result<Bytes>>) {
    let mut file = file.take(total_bytes);
    loop {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let block = match file.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block) {
            Ok(0) => return,
            Ok(_) => Ok(Bytes::from(block)),
            Err(error) => Err(error),
        };
        let failed = block.is_err();
        if blocks.blocking_send(block).is_err() || failed {
            return;
        }
    }
}

/// The body of the request. It ends where its length says, or fails: a file that became shorter is no file.
struct Outgoing {
    head: Option<Bytes>,
    blocks: mpsc::Receiver<io::Result<Bytes>>,
    left_bytes: u64,
    meter: Arc<Meter>,
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if let Some(head) = this.head.take() {
            return Poll::Ready(Some(Ok(Frame::data(head))));
        }
        if this.left_bytes == 0 {
            return Poll::Ready(None);
        }
        let block = match ready!(this.blocks.poll_recv(context)) {
            Some(block) => block?,
            None => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
        };
        this.left_bytes -= block.len() as u64;
        this.meter.add(block.len() as u64);
        Poll::Ready(Some(Ok(Frame::data(block))))
    }

    fn is_end_stream(&self) -> bool {
        self.head.is_none() && self.left_bytes == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.head.as_ref().map_or(0, |head| head.len() as u64) + self.left_bytes)
    }
}
