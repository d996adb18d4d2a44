//! A request's share of the server's bounds, from its head to the last byte of its answer.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::App;
use super::error::{ApiError, ApiResult};
use super::listen::{Deadline, WRITE_GRACE, WriteLimit};

/// Bytes of bodies are counted in these, so that a semaphore's 2^32 are enough.
const UNIT: usize = 1024;

/// The bounds that requests share. Only `queue` and `bytes` refuse; for the others a request waits until its deadline.
pub struct Bounds {
    /// Requests that wait or are under way.
    pub queue: Arc<Semaphore>,
    /// [`UNIT`]s of their bodies.
    bytes: Arc<Semaphore>,
    /// Requests under way.
    pub places: Arc<Semaphore>,
    /// Tokens that they may come to.
    tokens: Arc<Semaphore>,
    pub max_queue: usize,
    pub max_concurrent: usize,
}

impl Bounds {
    pub fn new(args: &super::Serve) -> Self {
        let of = |count| Arc::new(Semaphore::new(count));
        Bounds {
            queue: of(args.max_queue),
            bytes: of(args.max_queued_bytes.div_ceil(UNIT)),
            places: of(args.max_concurrent),
            tokens: of(args.max_queued_tokens),
            max_queue: args.max_queue,
            max_concurrent: args.max_concurrent,
        }
    }
}

/// What a request holds; given back when the last clone is dropped, which is when its answer is written, its work beside
/// the event loop has ended, or its connection is gone.
pub struct Ticket {
    pub deadline: Instant,
    endpoint: String,
    began: Instant,
    app: Arc<App>,
    status: AtomicU16,
    counted: AtomicBool,
    held: Mutex<Vec<OwnedSemaphorePermit>>,
    _write_limit: Option<WriteLimit>,
}

impl Ticket {
    /// Holds nothing yet. `connection` is cut off when the answer is not written some time after the deadline.
    pub fn new(app: &Arc<App>, endpoint: &str, connection: Option<&Deadline>) -> Self {
        let began = Instant::now();
        let deadline = began + app.timeout;
        Ticket {
            deadline,
            endpoint: endpoint.into(),
            began,
            app: app.clone(),
            status: AtomicU16::new(StatusCode::OK.as_u16()),
            counted: AtomicBool::new(false),
            held: Mutex::new(Vec::new()),
            _write_limit: connection.map(|c| c.limit(deadline + WRITE_GRACE)),
        }
    }

    fn hold(&self, permit: OwnedSemaphorePermit) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).push(permit);
    }

    /// # Errors
    /// 429 if as many requests are there as may be.
    pub fn enter_queue(&self) -> ApiResult<()> {
        let most = self.app.bounds.max_queue;
        let full = |_| ApiError::busy(format!("{most} requests wait or are under way (--max-queue): retry later"));
        self.hold(self.app.bounds.queue.clone().try_acquire_owned().map_err(full)?);
        Ok(())
    }

    /// # Errors
    /// 429 if the bodies that are there leave no room for this one.
    pub fn charge_bytes(&self, bytes: usize) -> ApiResult<()> {
        let full = || ApiError::busy("the bodies of requests fill their memory (--max-queued-bytes): retry later");
        let units = u32::try_from(bytes.div_ceil(UNIT)).map_err(|_| full())?;
        self.hold(self.app.bounds.bytes.clone().try_acquire_many_owned(units).map_err(|_| full())?);
        Ok(())
    }

    /// Waits for a place among the requests under way.
    pub async fn take_place(&self) -> ApiResult<()> {
        self.hold(self.app.bounds.places.clone().acquire_owned().await.map_err(|_| stopping())?);
        Ok(())
    }

    /// Waits until the engine has room for what a request may come to: at most `max_queued_tokens`.
    pub async fn charge_tokens(&self, tokens: usize) -> ApiResult<()> {
        let tokens = u32::try_from(tokens).map_err(|_| ApiError::internal("a request larger than the bound"))?;
        self.hold(self.app.bounds.tokens.clone().acquire_many_owned(tokens).await.map_err(|_| stopping())?);
        Ok(())
    }

    pub fn late(&self) -> ApiError {
        ApiError::late(self.app.timeout.as_secs_f64())
    }

    /// What the request is counted with. An error may still change a stream's.
    pub fn set_status(&self, status: StatusCode) {
        self.status.store(status.as_u16(), Ordering::Relaxed);
    }

    /// Counts the request: all of its answer is known.
    pub fn answered(&self) {
        self.count(&self.status.load(Ordering::Relaxed).to_string());
    }

    fn count(&self, status: &str) {
        if !self.counted.swap(true, Ordering::Relaxed) {
            self.app.metrics.answered(&self.endpoint, status, self.began.elapsed());
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.count("cancelled");
    }
}

/// Nothing closes the semaphores while requests are served.
fn stopping() -> ApiError {
    ApiError::unavailable("the server is stopping")
}
