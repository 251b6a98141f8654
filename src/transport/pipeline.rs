//! The way of a message while its peer has no stream open: one `POST /raft` each, over kept connections. A post that
//! fails loses its message, and says so.

use std::sync::Arc;

use bytes::BytesMut;
use hyper::{Method, StatusCode};

use super::dial::exchange;
use super::frame::encode;
use super::handshake::PIPELINE;
use super::hub::Hub;
use super::peer::Peer;

/// One of a peer's few workers.
pub async fn work(hub: Arc<Hub>, peer: Arc<Peer>) {
    let mut buffer = BytesMut::new();
    loop {
        let Some((sequence, message)) = peer.outbox.take_for_pipeline() else {
            peer.outbox.pipeline.notified().await;
            continue;
        };
        encode(&mut buffer, hub.boot, sequence, &message);
        let body = buffer.split().freeze();
        let size = body.len() as u64;
        let request = hub.identity.request(Method::POST, PIPELINE, peer.id, body);
        let error = match exchange(&hub, &peer, request).await {
            Ok(answer) if answer.response.status() == StatusCode::NO_CONTENT => {
                peer.figures.sent_bytes.inc_by(size);
                continue;
            }
            Ok(answer) => answer.failure(),
            Err(error) => error.to_string(),
        };
        peer.note(format!("post a message: {error}"));
        hub.lost(&peer, 1);
    }
}
