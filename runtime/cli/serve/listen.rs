//! Connections: taken as they come, closed when they are idle or too slow, and in peace at the end.

use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::oneshot::Receiver;

/// Time for a request's head to come, which is also how long a connection may be idle.
const HEAD: Duration = Duration::from_secs(75);
/// After a connection could not be taken: the system is out of files, for instance.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop`, then until the requests under way are answered.
pub async fn listen(listener: TcpListener, router: Router, mut stop: Receiver<()>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD);
    let connections = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // It was sent, or nobody can send it any more.
            _ = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                log::warn!("cannot take a connection: {e}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Chunks of a stream are small and must not wait for each other.
        if let Err(e) = stream.set_nodelay(true) {
            log::debug!("TCP_NODELAY: {e}");
        }
        let service = TowerToHyperService::new(router.clone());
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // The client went away, or sent no HTTP.
            if let Err(e) = connection.await {
                log::debug!("connection: {e}");
            }
        });
    }
    drop(listener);
    connections.shutdown().await;
}
