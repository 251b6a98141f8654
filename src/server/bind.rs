//! The ports: where clients and peers are served.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use tokio::net::{TcpListener, TcpSocket, lookup_host};

use super::Error;
use crate::cluster::PeerUrl;
use crate::config::Config;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: u32 = 1024;

pub async fn clients(config: &Config) -> Result<TcpListener, Error> {
    if let Some(address) = &config.listen {
        return bind("--listen", address).await;
    }
    // All interfaces: IPv6 takes IPv4 too, where there is IPv6.
    match bind("--port", &format!("[::]:{}", config.port)).await {
        Err(Error::Bind { source, .. }) if source.kind() != io::ErrorKind::AddrInUse => {
            bind("--port", &format!("0.0.0.0:{}", config.port)).await
        }
        bound => bound,
    }
}

pub async fn peers(config: &Config, urls: &[PeerUrl]) -> Result<Vec<TcpListener>, Error> {
    if let Some(address) = &config.listen_peer {
        return Ok(vec![bind("--listen-peer", address).await?]);
    }
    let mut listeners = Vec::new();
    for url in urls {
        listeners.push(bind("this member's entry in --cluster,", &url.authority()).await?);
    }
    Ok(listeners)
}

async fn bind(flag: &'static str, address: &str) -> Result<TcpListener, Error> {
    let failed = |source| Error::Bind { flag, address: address.to_owned(), source };
    // A process that was killed a moment ago may hold the port a little longer.
    let deadline = Instant::now() + super::PATIENCE;
    loop {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for resolved in lookup_host(address).await.map_err(failed)? {
            match listen(resolved) {
                Ok(listener) => return Ok(listener),
                Err(error) => last = error,
            }
        }
        if last.kind() != io::ErrorKind::AddrInUse || Instant::now() >= deadline {
            return Err(failed(last));
        }
        tokio::time::sleep(super::TRY_AGAIN).await;
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for old connections to time out. Never SO_REUSEPORT: a second process would bind too.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
