//! Which jobs have something to say: for rrt_poll, for the event fd, and for waiting on any of several jobs.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::boundary::Outcome;

/// Jobs with news, in the order in which they came. The engine marks them; it is never kept waiting by what it finds here.
#[derive(Default)]
pub struct Ready {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: BTreeMap<u64, u64>,
    /// Every job that exists, and its place in `jobs` if it has news.
    places: HashMap<u64, Option<u64>>,
    next: u64,
    /// Rises with every mark.
    marks: u64,
    signal: Option<signal::Signal>,
}

impl Queue {
    /// The descriptor is readable exactly while there are jobs.
    fn settle(&mut self) {
        let waiting = !self.jobs.is_empty();
        if let Some(signal) = &mut self.signal {
            signal.set(waiting);
        }
    }
}

impl Ready {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job exists from now on.
    pub fn enlist(&self, job: u64) {
        self.lock().places.insert(job, None);
    }

    /// The job has news; nothing happens if it is gone.
    pub fn mark(&self, job: u64) {
        let mut queue = self.lock();
        let place = queue.next;
        if let Some(none @ None) = queue.places.get_mut(&job) {
            *none = Some(place);
            queue.jobs.insert(place, job);
            queue.next += 1;
        }
        queue.marks += 1;
        queue.settle();
        self.changed.notify_all();
    }

    /// The job that has waited longest; its news are no longer noted.
    pub fn pop(&self) -> Option<u64> {
        let mut queue = self.lock();
        let (_, job) = queue.jobs.pop_first()?;
        if let Some(place) = queue.places.get_mut(&job) {
            *place = None;
        }
        queue.settle();
        Some(job)
    }

    /// The job is gone.
    pub fn forget(&self, job: u64) {
        let mut queue = self.lock();
        if let Some(Some(place)) = queue.places.remove(&job) {
            queue.jobs.remove(&place);
            queue.settle();
        }
    }

    /// A number that rises with every mark.
    pub fn marks(&self) -> u64 {
        self.lock().marks
    }

    /// Waits for a mark after the one that [`Ready::marks`] told, at most for `timeout`.
    pub fn wait_beyond(&self, marks: u64, timeout: Duration) {
        let queue = self.lock();
        let waited = self.changed.wait_timeout_while(queue, timeout, |queue| queue.marks == marks);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A descriptor that is readable while jobs have news.
    pub fn descriptor(&self) -> Outcome<i32> {
        let mut queue = self.lock();
        if queue.signal.is_none() {
            queue.signal = Some(signal::Signal::new()?);
            queue.settle();
        }
        queue.signal.as_ref().map_or_else(signal::unsupported, signal::Signal::descriptor)
    }
}

#[cfg(unix)]
mod signal {
    use std::io::{PipeReader, PipeWriter, Read, Write};
    use std::os::fd::AsRawFd;

    use crate::boundary::Outcome;
    use crate::status::{E_IO, E_UNSUPPORTED, Failure};

    /// A pipe with one byte in it while it is set.
    pub struct Signal {
        reader: PipeReader,
        writer: PipeWriter,
        is_set: bool,
    }

    impl Signal {
        pub fn new() -> Outcome<Self> {
            let failed = |e: std::io::Error| Failure::new(E_IO, format!("cannot make a pipe for the event fd: {e}"));
            let (reader, writer) = std::io::pipe().map_err(failed)?;
            // A host that reads from it by mistake must not be able to block the engine.
            rustix::io::ioctl_fionbio(&reader, true).map_err(|e| failed(e.into()))?;
            rustix::io::ioctl_fionbio(&writer, true).map_err(|e| failed(e.into()))?;
            Ok(Signal { reader, writer, is_set: false })
        }

        pub fn set(&mut self, wanted: bool) {
            if wanted == self.is_set {
                return;
            }
            // With one byte at most in the pipe neither can fail, unless a host read it: then there is nothing to take out.
            let _ = if wanted { self.writer.write(&[1]) } else { self.reader.read(&mut [0]) };
            self.is_set = wanted;
        }

        pub fn descriptor(&self) -> Outcome<i32> {
            Ok(self.reader.as_raw_fd())
        }
    }

    pub fn unsupported() -> Outcome<i32> {
        Err(Failure::new(E_UNSUPPORTED, "this system has no event fd: wait by rrt_wait"))
    }
}

#[cfg(not(unix))]
mod signal {
    use crate::boundary::Outcome;
    use crate::status::{E_UNSUPPORTED, Failure};

    /// There is none here.
    pub enum Signal {}

    impl Signal {
        pub fn new() -> Outcome<Self> {
            Err(failure())
        }

        pub fn set(&mut self, _: bool) {
            match *self {}
        }

        pub fn descriptor(&self) -> Outcome<i32> {
            match *self {}
        }
    }

    fn failure() -> Failure {
        Failure::new(E_UNSUPPORTED, "this system has no event fd: wait by rrt_wait")
    }

    pub fn unsupported() -> Outcome<i32> {
        Err(failure())
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_once_and_in_order() {
        let ready = Ready::default();
        [7, 3, 9].iter().for_each(|job| ready.enlist(*job));
        [9, 3, 9, 7].iter().for_each(|job| ready.mark(*job));
        assert_eq!([ready.pop(), ready.pop(), ready.pop(), ready.pop()], [Some(9), Some(3), Some(7), None]);
        ready.mark(3);
        assert_eq!(ready.pop(), Some(3));
    }

    /// The engine may tell of a job after it was taken.
    #[test]
    fn a_job_that_is_gone_marks_nothing() {
        let ready = Ready::default();
        ready.enlist(1);
        ready.mark(1);
        ready.forget(1);
        ready.mark(1);
        assert_eq!(ready.pop(), None);
        assert!(ready.lock().jobs.is_empty() && ready.lock().places.is_empty());
    }
}
