//! Our end of a snapshot that comes in: a thread writes the file, a few blocks behind the connection. The node hears of it
//! when the whole file is verified and durable, and is the snapshot that the message names.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use raft::eraftpb::{Message, MessageType};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;

use super::meter::Meter;
use super::{
    BLOCK_BYTES, BLOCKS_QUEUED_MAX, FILE_BYTES_MAX, HEAD_BYTES_MAX, STALL_TIMEOUT, SnapshotFiles, SnapshotSink,
};
use crate::channel;
use crate::transport::Event;
use crate::transport::frame::{Decoder, Frame};
use crate::transport::handshake::Denied;
use crate::transport::hub::Hub;
use crate::transport::peer::Peer;

type Sink = Box<dyn SnapshotSink>;

/// Takes a snapshot from a proven sender, and gives it to the node.
pub async fn receive(hub: &Arc<Hub>, peer: &Peer, body: Incoming) -> Result<(), Denied> {
    let received = peer.stop.run_until_cancelled(take(hub, peer, body)).await;
    // A peer that is dropped meanwhile hears why when it tries again.
    let received = received.unwrap_or(Err(Denied::Busy));
    if let Err(denied) = &received
        && peer.lines.snapshot_refused.is_due()
    {
        tracing::warn!(peer = peer.id, "refused a snapshot: {denied}");
    }
    received
}

async fn take(hub: &Arc<Hub>, peer: &Peer, mut body: Incoming) -> Result<(), Denied> {
    let length = body.size_hint().exact().ok_or(Denied::Malformed("no Content-Length"))?;
    if length > FILE_BYTES_MAX + HEAD_BYTES_MAX as u64 {
        return Err(Denied::TooLarge);
    }
    let slot = hub.receiving.clone().try_acquire_owned().map_err(|_| Denied::Busy)?;
    let (frame, rest) = head(&mut body).await?;
    let message = hub.open(peer, frame)?.ok_or(Denied::Malformed("this snapshot came before"))?;
    if message.get_msg_type() != MessageType::MsgSnapshot || message.get_snapshot().get_metadata().index == 0 {
        return Err(Denied::Malformed("the message names no snapshot"));
    }
    if !message.get_snapshot().data.is_empty() {
        return Err(Denied::Malformed("the message holds the snapshot itself"));
    }
    let meter = Meter::of_receiving(peer, rest.len() as u64 + body.size_hint().lower());
    let (blocks_in, blocks) = mpsc::channel(BLOCKS_QUEUED_MAX);
    let files = hub.snapshots.clone();
    let writing = hub.spawn_blocking(move || write(files.as_ref(), blocks));
    // When its thread has failed, nobody takes blocks any more; it says why.
    pass_on(rest, body, blocks_in, &meter).await?;
    let sink = writing.await.map_err(io::Error::other).flatten().map_err(|error| not_stored(&error))?;
    // From here on the file may stay, and the node is to hear of it whatever becomes of the connection.
    let (reply, installed) = oneshot::channel();
    let owned = hub.clone();
    hub.spawn(async move { channel::answer(reply, install(&owned, sink, message, meter, slot).await) });
    installed.await.unwrap_or(Err(Denied::Busy))
}

/// Reads the frame ahead of the file, and what came with it.
async fn head(body: &mut Incoming) -> Result<(Frame, Bytes), Denied> {
    let (mut decoder, mut read_bytes) = (Decoder::default(), 0);
    while read_bytes <= HEAD_BYTES_MAX {
        let piece = next(body).await?.ok_or(Denied::Malformed("the body was cut"))?;
        read_bytes += piece.len();
        decoder.push(piece);
        if let Some(frame) = decoder.next()? {
            return Ok((frame, decoder.rest()));
        }
    }
    Err(Denied::TooLarge)
}

/// Passes the file on to the thread that writes it, in blocks: a piece of the body may be a few bytes.
async fn pass_on(rest: Bytes, mut body: Incoming, blocks: mpsc::Sender<Bytes>, meter: &Meter) -> Result<(), Denied> {
    let (mut block, mut piece) = (BytesMut::with_capacity(BLOCK_BYTES), rest);
    loop {
        meter.add(piece.len() as u64);
        while !piece.is_empty() {
            let room = BLOCK_BYTES - block.len();
            block.extend_from_slice(&piece.split_to(room.min(piece.len())));
            if block.len() < BLOCK_BYTES {
                break;
            }
            let full = std::mem::replace(&mut block, BytesMut::with_capacity(BLOCK_BYTES));
            if !queue(&blocks, full).await? {
                return Ok(());
            }
        }
        piece = match next(&mut body).await? {
            Some(piece) => piece,
            None => break,
        };
    }
    queue(&blocks, block).await?;
    Ok(())
}

/// Waits while the thread is behind. False if it has ended.
async fn queue(blocks: &mpsc::Sender<Bytes>, block: BytesMut) -> Result<bool, Denied> {
    let queued = timeout(STALL_TIMEOUT, blocks.send(block.freeze())).await;
    queued.map(|sent| sent.is_ok()).map_err(|_| Denied::SnapshotNotStored)
}

/// The next bytes of a body, `None` at its end.
async fn next(body: &mut Incoming) -> Result<Option<Bytes>, Denied> {
    loop {
        let piece = timeout(STALL_TIMEOUT, body.frame()).await;
        return match piece.map_err(|_| Denied::Malformed("the body did not come in time"))? {
            Some(Ok(piece)) => match piece.into_data() {
                Ok(bytes) => Ok(Some(bytes)),
                Err(_trailers) => continue,
            },
            Some(Err(_)) => Err(Denied::Malformed("the body was cut")),
            None => Ok(None),
        };
    }
}

/// Writes what comes until no more does. Whoever waits for the sink knows whether that was all; where nobody does any more,
/// it is dropped here.
fn write(files: &dyn SnapshotFiles, mut blocks: mpsc::Receiver<Bytes>) -> io::Result<Sink> {
    let mut sink = files.receive()?;
    while let Some(block) = blocks.blocking_recv() {
        sink.write(&block)?;
    }
    Ok(sink)
}

async fn install(
    hub: &Hub,
    sink: Sink,
    message: Message,
    _meter: Arc<Meter>,
    _slot: OwnedSemaphorePermit,
) -> Result<(), Denied> {
    let finished = hub.spawn_blocking(move || sink.finish()).await.map_err(io::Error::other).flatten();
    let found = finished.map_err(|error| not_stored(&error))?;
    let metadata = message.get_snapshot().get_metadata();
    if found != (metadata.index, metadata.term) {
        return Err(Denied::SnapshotMismatch);
    }
    tracing::info!(peer = message.from, index = found.0, term = found.1, "received a snapshot");
    hub.tell(Event::Snapshot { message }).await;
    Ok(())
}

fn not_stored(error: &io::Error) -> Denied {
    tracing::warn!(%error, "store a snapshot that came in");
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Denied::SnapshotDamaged,
        _ => Denied::SnapshotNotStored,
    }
}
