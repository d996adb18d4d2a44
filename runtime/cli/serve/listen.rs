//! Connections: taken as they come, closed when they are idle or too slow, and in peace at the end.

use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Time for a request's head to come, which is also how long a connection may be idle.
const HEAD: Duration = Duration::from_secs(75);
/// After a connection could not be taken: the system is out of files, for instance.
const PAUSE: Duration = Duration::from_millis(50);
/// Silence after which the system asks whether the other side is still there.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Time that a client has, after a request's deadline, to read what is left of the answer.
pub const WRITE_GRACE: Duration = Duration::from_secs(10);

/// When a connection is cut off; every request has it as an extension.
///
/// A client that does not read stops hyper from asking for more of the answer, so no time limit inside an answer can see it.
#[derive(Clone)]
pub struct Deadline(watch::Sender<Option<Instant>>);

impl Deadline {
    /// Sets it until the result is dropped.
    pub fn limit(&self, at: Instant) -> WriteLimit {
        self.0.send_replace(Some(at));
        WriteLimit { connection: self.clone(), at }
    }
}

/// A request's limit of its connection.
pub struct WriteLimit {
    connection: Deadline,
    at: Instant,
}

impl Drop for WriteLimit {
    fn drop(&mut self) {
        // The next request of the connection may have set its own.
        self.connection.0.send_if_modified(|now| now.take_if(|now| *now == self.at).is_some());
    }
}

/// Ends when a limit has passed.
async fn passed(mut deadline: watch::Receiver<Option<Instant>>) {
    loop {
        let at = *deadline.borrow_and_update();
        let limit = async {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = limit => return,
            changed = deadline.changed() => if changed.is_err() {
                // Nobody can set one any more.
                std::future::pending::<()>().await;
            },
        }
    }
}

fn set_up(stream: &TcpStream) {
    // Chunks of a stream are small and must not wait for each other.
    let set = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
    if let Err(e) = set.and_then(|()| SockRef::from(stream).set_tcp_keepalive(&keepalive)) {
        log::debug!("TCP_NODELAY and SO_KEEPALIVE: {e}");
    }
}

/// Serves until `stop`, then until the requests under way are answered.
pub async fn listen(listener: TcpListener, router: Router, mut stop: oneshot::Receiver<()>) {
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
        set_up(&stream);
        let (deadline, limits) = watch::channel(None);
        let (deadline, inner) = (Deadline(deadline), TowerToHyperService::new(router.clone()));
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(deadline.clone());
            inner.call(request)
        });
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            tokio::select! {
                // The client went away, or sent no HTTP.
                ended = connection => if let Err(e) = ended {
                    log::debug!("connection: {e}");
                },
                () = passed(limits) => log::debug!("connection: an answer was not read in time"),
            }
        });
    }
    drop(listener);
    connections.shutdown().await;
}
