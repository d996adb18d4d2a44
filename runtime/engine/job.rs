//! A job: what a request turned into, shared between the caller who waits and the engine that works.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sequence::{Finish, Finished, SampledToken};
use super::stats::JobStats;
use crate::error::{Error, ErrorKind, Result};

/// When a job's work is done, relative to other jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// Jobs of higher priority go first, and may take the place of running sequences of a lower one (which are computed
    /// again later, with the same results). Jobs of one priority share.
    pub priority: i32,
    /// From submission on; then a sampling job ends with what it has, as if cancelled, and a scoring job fails.
    pub deadline: Option<Duration>,
}

/// How the engine takes a job.
#[derive(Clone, Copy, Default)]
pub(crate) struct JobOptions {
    pub scheduling: Scheduling,
    /// Keep what is sampled for [`Job::next_chunk`].
    pub stream: bool,
    /// Sequences a prompt.
    pub per_prompt: usize,
}

/// What was sampled since the last chunk of the same answer.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Index into [`crate::SampleRequest::prompts`].
    pub prompt: usize,
    /// The answer's number.
    pub sample: usize,
    /// Place of the first of `tokens` in the answer.
    pub first: usize,
    /// At least one, except in a last chunk.
    pub tokens: Vec<SampledToken>,
    /// Text that is certain by now: whole characters, nothing that may turn out to belong to a stop string.
    pub text: String,
    /// Set in an answer's last chunk.
    pub finish: Option<Finish>,
}

/// What [`Job::next_chunk`] found.
#[derive(Clone, Debug)]
pub enum Streamed {
    /// Something new.
    Chunk(Chunk),
    /// Nothing new within the time given.
    Pending,
    /// Nothing more will come: [`Job::wait`] has the result, or says what went wrong.
    Done,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// [`Job::wait`] has the result.
    Finished,
    /// A sampling job that was cancelled or late: [`Job::wait`] has what there is.
    CutShort,
    /// [`Job::wait`] returns an error of this kind.
    Failed(ErrorKind),
}

/// Told that a job has a new chunk or has ended.
type Observer = Arc<dyn Fn() + Send + Sync>;

/// What the engine and the caller share about one job.
pub(crate) struct JobState {
    inner: Mutex<Inner>,
    changed: Condvar,
    cancelled: AtomicBool,
    failed: AtomicBool,
    finished_count: AtomicUsize,
    total: usize,
    pub(super) options: JobOptions,
    pub(super) submitted: Instant,
}

struct Inner {
    /// By index of the sequence in the job.
    finished: Vec<Option<Finished>>,
    /// Their indices, in the order in which they ended.
    order: Vec<usize>,
    remaining: usize,
    error: Option<Error>,
    /// One of its sequences was cancelled.
    cut_short: bool,
    chunks: VecDeque<Chunk>,
    stats: JobStats,
    observer: Option<Observer>,
}

impl JobState {
    pub(super) fn new(sequences: usize, options: JobOptions) -> Arc<Self> {
        Arc::new(JobState {
            inner: Mutex::new(Inner {
                finished: Vec::new(),
                order: Vec::new(),
                remaining: sequences,
                error: None,
                cut_short: false,
                chunks: VecDeque::new(),
                stats: JobStats::default(),
                observer: None,
            }),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            finished_count: AtomicUsize::new(0),
            total: sequences,
            options,
            submitted: Instant::now(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn finish(&self, index: usize, result: Finished) {
        let mut inner = self.lock();
        // Allocated with the first result: a job that waits costs little.
        let total = self.total;
        inner.finished.resize_with(total, || None);
        inner.cut_short |= matches!(&result, Finished::Sampled(sampled) if sampled.finish == Finish::Cancelled);
        inner.finished[index] = Some(result);
        inner.order.push(index);
        inner.remaining -= 1;
        self.finished_count.fetch_add(1, Ordering::Relaxed);
        if inner.remaining == 0 {
            inner.stats.elapsed = self.submitted.elapsed();
            self.announce(inner);
        } else {
            self.changed.notify_all();
        }
    }

    /// Tells everybody who waits or observes.
    fn announce(&self, inner: MutexGuard<'_, Inner>) {
        self.changed.notify_all();
        let observer = inner.observer.clone();
        drop(inner);
        if let Some(observer) = observer {
            observer();
        }
    }

    /// Fails the whole job; the first error stays.
    pub(super) fn fail(&self, error: Error) {
        let mut inner = self.lock();
        self.failed.store(true, Ordering::Relaxed);
        inner.error.get_or_insert(error);
        inner.stats.elapsed = self.submitted.elapsed();
        self.announce(inner);
    }

    /// Adds to the stream of the sequence `index`, if there is one.
    pub(super) fn stream(
        &self,
        index: usize,
        first: usize,
        tokens: &[SampledToken],
        text: String,
        end: Option<Finish>,
    ) {
        if self.options.stream && (!tokens.is_empty() || end.is_some()) {
            let (prompt, sample) = (index / self.options.per_prompt, index % self.options.per_prompt);
            let chunk = Chunk { prompt, sample, first, tokens: tokens.to_vec(), text, finish: end };
            let mut inner = self.lock();
            inner.chunks.push_back(chunk);
            self.announce(inner);
        }
    }

    pub(super) fn count(&self, add: impl FnOnce(&mut JobStats)) {
        add(&mut self.lock().stats);
    }

    /// See [`Job::cancel`].
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// True if its sequences need not go on.
    pub(super) fn is_stopped(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed) || self.is_late()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub(super) fn is_late(&self) -> bool {
        self.options.scheduling.deadline.is_some_and(|deadline| self.submitted.elapsed() >= deadline)
    }

    /// Waits until `ready` says something, at most for `timeout`.
    fn wait_for<T>(&self, timeout: Duration, ready: impl Fn(&mut Inner) -> Option<T>) -> Option<T> {
        let deadline = Instant::now().checked_add(timeout);
        let mut inner = self.lock();
        loop {
            if let Some(value) = ready(&mut inner) {
                return Some(value);
            }
            let left = deadline.map_or(Duration::from_secs(3600), |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn wait_timeout(&self, timeout: Duration) -> bool {
        self.wait_for(timeout, |inner| inner.is_done().then_some(())).is_some()
    }

    fn next_chunk(&self, timeout: Duration) -> Streamed {
        let next = |inner: &mut Inner| match inner.chunks.pop_front() {
            Some(chunk) => Some(Streamed::Chunk(chunk)),
            None => inner.is_done().then_some(Streamed::Done),
        };
        self.wait_for(timeout, next).unwrap_or(Streamed::Pending)
    }

    fn progress(&self) -> (usize, usize) {
        (self.finished_count.load(Ordering::Relaxed), self.total)
    }

    fn stats(&self) -> JobStats {
        let inner = self.lock();
        let elapsed = if inner.is_done() { inner.stats.elapsed } else { self.submitted.elapsed() };
        JobStats { elapsed, ..inner.stats }
    }
}

impl Inner {
    fn is_done(&self) -> bool {
        self.remaining == 0 || self.error.is_some()
    }

    fn ending(&self) -> Option<Ending> {
        match &self.error {
            Some(error) => Some(Ending::Failed(error.kind())),
            None if self.remaining > 0 => None,
            None if self.cut_short => Some(Ending::CutShort),
            None => Some(Ending::Finished),
        }
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
        self.state.cancel();
    }

    /// See [`Job::progress`].
    pub fn progress(&self) -> (usize, usize) {
        self.state.progress()
    }

    /// See [`Job::stats`].
    pub fn stats(&self) -> JobStats {
        self.state.stats()
    }

    /// See [`Job::next_chunk`].
    pub fn next_chunk(&self, timeout: Duration) -> Streamed {
        self.state.next_chunk(timeout)
    }

    /// How the job ended; `None` while it has not.
    pub fn ending(&self) -> Option<Ending> {
        self.state.lock().ending()
    }

    /// Has `observer` called whenever the job has a new chunk, and when it ends; at once if either has happened already. It
    /// takes the place of an earlier one. It runs on the engine's thread, so it has to be quick and must not wait for
    /// anything that the engine does: what it is good for is waking somebody up.
    pub fn on_change(&self, observer: impl Fn() + Send + Sync + 'static) {
        let observer: Observer = Arc::new(observer);
        let mut inner = self.state.lock();
        inner.observer = Some(observer.clone());
        let has_changed = inner.is_done() || !inner.chunks.is_empty();
        drop(inner);
        if has_changed {
            observer();
        }
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
        self.state.lock().is_done()
    }

    /// Sequences finished so far, and sequences in all.
    pub fn progress(&self) -> (usize, usize) {
        self.state.progress()
    }

    /// What the job has cost so far.
    pub fn stats(&self) -> JobStats {
        self.state.stats()
    }

    /// True if it was asked to stop, by [`Job::cancel`] or by an update or a pause that ends what is under way.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.state.cancelled.load(Ordering::Relaxed)
    }

    /// Asks the engine to stop, within one step. Sampling jobs then finish with what they have; scoring jobs fail with
    /// `Cancelled`.
    pub fn cancel(&self) {
        self.state.cancel();
    }

    /// Blocks until the job is done, at most for `timeout`. True if it is done.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.state.wait_timeout(timeout)
    }

    /// The next piece of what is being sampled, of any answer, blocking at most for `timeout`. For requests with `stream`
    /// set; others go straight to `Done` at their end.
    pub fn next_chunk(&self, timeout: Duration) -> Streamed {
        self.state.next_chunk(timeout)
    }

    /// What `read` makes of the sequences that have ended, by index, but for the first `seen` of them. Blocks until there is one;
    /// empty when nothing more will come.
    pub(crate) fn ended_after<R>(&self, seen: usize, read: impl Fn(usize, &Finished) -> R) -> Vec<R> {
        let new = |inner: &mut Inner| {
            let order = inner.order.get(seen..).unwrap_or_default().iter();
            let ended: Vec<R> = order.filter_map(|i| inner.finished[*i].as_ref().map(|f| read(*i, f))).collect();
            (!ended.is_empty() || inner.is_done()).then_some(ended)
        };
        loop {
            if let Some(ended) = self.state.wait_for(Duration::from_secs(3600), new) {
                return ended;
            }
        }
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
            // It stays: others may still wait for the job, or ask how it ended.
            if let Some(error) = &inner.error {
                return Err(error.clone());
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
