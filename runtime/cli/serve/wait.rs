//! Waiting for the engine without a thread.

use std::sync::Arc;
use std::time::Duration;

use rewardrt::{Job, JobStats, Result, Streamed};
use tokio::sync::Notify;

use super::error::{ApiError, ApiResult};

/// A job that an asynchronous task waits for. Dropping it, as when the client goes away, cancels the work.
pub struct Waiting<T> {
    job: Job<T>,
    changed: Arc<Notify>,
}

impl<T> Waiting<T> {
    pub fn new(job: Job<T>) -> Self {
        let changed = Arc::new(Notify::new());
        let notify = changed.clone();
        job.watch().on_change(move || notify.notify_one());
        Waiting { job, changed }
    }

    /// The result, and what it cost.
    pub async fn result(self) -> Result<(T, JobStats)> {
        while !self.job.is_done() {
            self.changed.notified().await;
        }
        let stats = self.job.stats();
        Ok((self.job.wait()?, stats))
    }

    /// The next chunk, or `Done`; never `Pending`.
    pub async fn next(&self) -> Streamed {
        loop {
            match self.job.next_chunk(Duration::ZERO) {
                Streamed::Pending => self.changed.notified().await,
                other => return other,
            }
        }
    }
}

/// Does what takes a while (encoding, compiling a guide) beside the event loop.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> ApiResult<T> + Send + 'static) -> ApiResult<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::internal("an internal error; the log has more")),
    }
}
