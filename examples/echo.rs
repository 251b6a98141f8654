//! The floor under any server here: hyper, alone. It answers each PUT with 204 and each GET with 128 bytes, keeps
//! nothing, and takes its connections as `src/api` does. `scripts/bench` puts it under the same load as raftkv.
//!
//!     cargo run --release --example echo -- 127.0.0.1:9199

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

const VALUE: &[u8] = &[b'v'; 128];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Some(address) = std::env::args().nth(1) else { anyhow::bail!("usage: echo HOST:PORT") };
    let listener = TcpListener::bind(&address).await?;
    let mut http = http1::Builder::new();
    http.half_close(true).header_read_timeout(None);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let connection = http.serve_connection(TokioIo::new(stream), service_fn(answer));
        tokio::spawn(async move {
            // A client that leaves in the middle of a request is no concern of a floor.
            connection.await.ok();
        });
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut answer = Response::new(Full::default());
    if request.method() == Method::PUT {
        *answer.status_mut() = match request.into_body().collect().await {
            Ok(_) => StatusCode::NO_CONTENT,
            Err(_) => StatusCode::BAD_REQUEST,
        };
    } else {
        *answer.body_mut() = Full::from(Bytes::from_static(VALUE));
    }
    Ok(answer)
}
