//! A job: what a request turned into, shared between the caller who waits and the engine that works.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sequence::Finished;
use crate::error::{Error, ErrorKind, Result};

/// What the engine and the caller share about one job.
pub(crate) struct JobState {
    inner: Mutex<Inner>,
    done: Condvar,
    cancelled: AtomicBool,
    finished_count: AtomicUsize,
    total: usize,
}

struct Inner {
    /// By index of the sequence in the job.
    finished: Vec<Option<Finished>>,
    remaining: usize,
    error: Option<Error>,
}

impl JobState {
    pub(super) fn new(sequences: usize) -> Arc<Self> {
        Arc::new(JobState {
            inner: Mutex::new(Inner {
                finished: (0..sequences).map(|_| None).collect(),
                remaining: sequences,
                error: None,
            }),
            done: Condvar::new(),
            cancelled: AtomicBool::new(false),
            finished_count: AtomicUsize::new(0),
            total: sequences,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn finish(&self, index: usize, result: Finished) {
        let mut inner = self.lock();
        inner.finished[index] = Some(result);
        inner.remaining -= 1;
        self.finished_count.fetch_add(1, Ordering::Relaxed);
        if inner.remaining == 0 {
            self.done.notify_all();
        }
    }

    /// Fails the whole job; the first error stays.
    pub(super) fn fail(&self, error: Error) {
        let mut inner = self.lock();
        inner.error.get_or_insert(error);
        self.done.notify_all();
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().error.is_some()
    }

    fn wait_timeout(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut inner = self.lock();
        while inner.remaining > 0 && inner.error.is_none() {
            let left = deadline.map_or(Duration::from_secs(3600), |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            inner = self.done.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Watches a job without owning it.
#[derive(Clone)]
pub struct JobWatch {
    state: Arc<JobState>,
}

impl JobWatch {
    /// See [`Job::wait_timeout`].
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.state.wait_timeout(timeout)
    }

    /// See [`Job::cancel`].
    pub fn cancel(&self) {
        self.state.cancelled.store(true, Ordering::Relaxed);
    }
}

/// A submitted request. Dropping it cancels the work.
pub struct Job<T> {
    state: Arc<JobState>,
    read: Box<dyn Fn(Vec<Finished>) -> Result<T> + Send + Sync>,
}

impl<T> Job<T> {
    pub(crate) fn new(state: Arc<JobState>, read: impl Fn(Vec<Finished>) -> Result<T> + Send + Sync + 'static) -> Self {
        Job { state, read: Box::new(read) }
    }

    /// True once [`Job::wait`] will not block.
    pub fn is_done(&self) -> bool {
        let inner = self.state.lock();
        inner.remaining == 0 || inner.error.is_some()
    }

    /// Sequences finished so far, and sequences in all.
    pub fn progress(&self) -> (usize, usize) {
        (self.state.finished_count.load(Ordering::Relaxed), self.state.total)
    }

    /// Asks the engine to stop. Sampling jobs then finish with what they have; scoring jobs fail with `Cancelled`.
    pub fn cancel(&self) {
        self.state.cancelled.store(true, Ordering::Relaxed);
    }

    /// Blocks until the job is done, at most for `timeout`. True if it is done.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.state.wait_timeout(timeout)
    }

    /// A watch on this job that another thread can keep.
    pub fn watch(&self) -> JobWatch {
        JobWatch { state: self.state.clone() }
    }

    /// Blocks until the job is done and returns its result.
    ///
    /// # Errors
    /// What made the job fail: `Cancelled`, `NonFinite`, or an error of the device.
    pub fn wait(self) -> Result<T> {
        while !self.wait_timeout(Duration::from_secs(3600)) {}
        let finished = {
            let mut inner = self.state.lock();
            if let Some(error) = inner.error.take() {
                return Err(error);
            }
            std::mem::take(&mut inner.finished)
        };
        let finished: Vec<Finished> = finished.into_iter().flatten().collect();
        if finished.len() < self.state.total {
            return Err(Error::new(ErrorKind::Internal, "a job ended without all its results"));
        }
        (self.read)(finished)
    }
}

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        self.cancel();
    }
}
