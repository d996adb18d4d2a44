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
    /// The place of a job in `jobs`.
    places: HashMap<u64, u64>,
    next: u64,
    /// Rises with every mark.
    marks: u64,
    signal: Option<signal::Signal>,
}

impl Queue {
    fn remove(&mut self, job: u64) {
        if let Some(place) = self.places.remove(&job) {
            self.jobs.remove(&place);
            self.settle();
        }
    }

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

    /// The job has news.
    pub fn mark(&self, job: u64) {
        let mut queue = self.lock();
        let place = queue.next;
        if let std::collections::hash_map::Entry::Vacant(entry) = queue.places.entry(job) {
            entry.insert(place);
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
        let (_, &job) = queue.jobs.first_key_value()?;
        queue.remove(job);
        Some(job)
    }

    /// The job is gone.
    pub fn forget(&self, job: u64) {
        self.lock().remove(job);
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
