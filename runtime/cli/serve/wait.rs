//! Waiting for the engine without a thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rewardrt::{Job, JobStats, Result, Streamed};
use tokio::sync::Notify;

use super::error::{ApiError, ApiResult};
use super::ticket::Ticket;

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

/// Whether somebody still waits for work beside the event loop.
pub struct Wanted(Arc<AtomicBool>);

impl Wanted {
    /// # Errors
    /// If nobody does. Nobody reads it then.
    pub fn check(&self) -> ApiResult<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err(ApiError::internal("nobody waits for the answer any more")),
        }
    }
}

/// Goes with the future that waits.
struct Waiter(Arc<AtomicBool>);

impl Drop for Waiter {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Does what takes a while (encoding, compiling a guide, spelling an answer) beside the event loop. The request keeps its
/// place until the work has ended, also where nobody waits for it any more.
pub async fn blocking<T: Send + 'static>(
    ticket: &Arc<Ticket>,
    work: impl FnOnce(&Wanted) -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    let flag = Arc::new(AtomicBool::new(true));
    let (_waiter, wanted, ticket) = (Waiter(flag.clone()), Wanted(flag), ticket.clone());
    let task = tokio::task::spawn_blocking(move || {
        let _ticket = ticket;
        wanted.check()?;
        work(&wanted)
    });
    match task.await {
        Ok(result) => result,
        Err(_) => Err(ApiError::internal("an internal error; the log has more")),
    }
}
