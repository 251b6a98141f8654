//! Stopping lets requests in flight finish, and nothing else keep it.

use super::*;

#[tokio::test]
async fn a_request_in_flight_finishes_and_idle_connections_close() {
    let mut server = Server::start().await;
    let mut idle = server.client().await;
    assert_eq!(idle.ask(put("k", "1")).await.status, 204);
    let mut fresh = server.client().await;
    server.mode.send_replace(Mode::Hold);
    let mut busy = server.client().await;
    busy.send(put("k", "2")).await;
    server.holds(1).await;
    server.shutdown.cancel();
    idle.closed().await;
    fresh.closed().await;
    assert!(TcpStream::connect(server.address).await.is_err(), "the listener is closed");
    assert!(!server.served.is_finished());
    server.mode.send_replace(Mode::Apply);
    let answer = busy.receive().await;
    assert_eq!((answer.status, answer.closes()), (204, true));
    busy.closed().await;
    timeout(PATIENCE, server.served).await.unwrap().unwrap();
    assert_eq!(server.metrics.http_connections.get(), 0);
}

#[tokio::test]
async fn dropping_the_server_ends_every_connection() {
    let mut server = Server::start().await;
    server.mode.send_replace(Mode::Hold);
    let mut busy = server.client().await;
    busy.send(put("k", "2")).await;
    server.holds(1).await;
    server.served.abort();
    assert!(server.served.await.unwrap_err().is_cancelled());
    busy.closed().await;
}

#[tokio::test]
async fn several_listeners_are_one_port() {
    let server = Server::start().await;
    assert_eq!(server.ask(put("k", "v")).await.status, 204);
    let metrics = Arc::new(Metrics::new());
    let store = Store::new(State::founded(1), metrics.clone());
    let (proposals, _proposed) = mpsc::channel(1);
    let (_, leads) = watch::channel(Leadership::default());
    let api = Api::new(Service::new(proposals, leads, store.view(), 1), metrics, Limits::default());
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(api.serve(listeners, shutdown.clone()));
    for address in addresses {
        let mut client = Client { stream: TcpStream::connect(address).await.unwrap(), read: Vec::new() };
        assert_eq!(client.ask(get("livez")).await.status, 200);
    }
    shutdown.cancel();
    timeout(PATIENCE, served).await.unwrap().unwrap();
}
