//! rrt_wait, rrt_poll, rrt_event_fd

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use runtime::{Ending, ErrorKind};

use crate::boundary::{Outcome, elements, enter, null, only, output};
use crate::job::{Entry, unknown};
use crate::runtime::{Shared, open_runtime, rrt_runtime};
use crate::status::{E_ABI, E_CANCELLED, Failure, OK, PENDING, TIMEOUT, of_kind, rrt_error};
use crate::stream::finish_number;
use crate::structs::rrt_event;

const WAIT_ANY: u32 = 1;
const CHUNK: i32 = 1;
const DONE: i32 = 2;
const FAILED: i32 = 3;
const CANCELLED: i32 = 4;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_wait(
    runtime: *mut rrt_runtime,
    jobs: *const u64,
    count: usize,
    flags: u32,
    timeout_ns: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        if jobs.is_null() {
            return Err(null("jobs"));
        }
        only(flags, WAIT_ANY, "rrt_wait")?;
        // SAFETY: the header's condition on arrays.
        let ids = unsafe { elements(jobs, count, "jobs") }?;
        let known = &runtime.shared.jobs;
        let entries: Vec<Arc<Entry>> =
            ids.iter().map(|id| known.get(*id).ok_or_else(|| unknown(*id))).collect::<Outcome<_>>()?;
        let start = Instant::now();
        let limit = (timeout_ns != u64::MAX).then(|| Duration::from_nanos(timeout_ns));
        let left = || limit.map_or(Duration::from_secs(3600), |l| l.saturating_sub(start.elapsed()));
        let any = flags & WAIT_ANY != 0 && entries.len() > 1;
        loop {
            let marks = known.ready.marks();
            let Some(pending) = entries.iter().find(|entry| !entry.watch.is_done()) else { return Ok(()) };
            if any && entries.iter().any(|entry| entry.watch.is_done()) {
                return Ok(());
            }
            if left().is_zero() {
                return Err(Failure::new(TIMEOUT, "the jobs are not done"));
            }
            if any {
                known.ready.wait_beyond(marks, left());
            } else {
                pending.watch.wait_timeout(left());
            }
        }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

fn last_event(ending: Ending) -> (i32, i32) {
    match ending {
        Ending::Finished => (DONE, OK),
        Ending::CutShort => (CANCELLED, OK),
        Ending::Failed(ErrorKind::Cancelled) => (CANCELLED, E_CANCELLED),
        Ending::Failed(kind) => (FAILED, of_kind(kind)),
    }
}

/// A small number, which every count of a request is.
fn small(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Events on their way to the caller.
struct Batch {
    events: Vec<rrt_event>,
    capacity: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.events.len() >= self.capacity
    }

    /// Adds what a job has to tell; false if there is more than fits.
    fn take(&mut self, job: u64, entry: &Entry) -> bool {
        let blank = rrt_event {
            kind: CHUNK,
            status: PENDING,
            job,
            user_tag: entry.tag,
            sequence: 0,
            first: 0,
            count: 0,
            finish: -1,
            text_len: 0,
        };
        // Looked at before the stream: what comes before the end is there by then.
        let ending = entry.watch.ending();
        if let Some(flow) = &entry.flow {
            loop {
                if self.is_full() {
                    return false;
                }
                let Some(news) = flow.news(&entry.watch) else { break };
                self.events.push(rrt_event {
                    sequence: small(news.answer),
                    first: small(news.first),
                    count: small(news.count),
                    finish: news.finish.map_or(-1, finish_number),
                    text_len: news.text_len as u64,
                    ..blank
                });
            }
        }
        let Some(ending) = ending else { return true };
        if self.is_full() {
            return false;
        }
        if !entry.told.swap(true, Ordering::SeqCst) {
            let (kind, status) = last_event(ending);
            self.events.push(rrt_event { kind, status, ..blank });
        }
        true
    }
}

fn poll(shared: &Shared, capacity: usize) -> Vec<rrt_event> {
    let mut batch = Batch { events: Vec::new(), capacity };
    while !batch.is_full() {
        let Some(job) = shared.jobs.ready.pop() else { break };
        let Some(entry) = shared.jobs.get(job) else { continue };
        if !batch.take(job, &entry) {
            shared.jobs.ready.mark(job);
        }
    }
    batch.events
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_poll(
    runtime: *mut rrt_runtime,
    out: *mut rrt_event,
    capacity: usize,
    stride: usize,
    count: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(count, "count")?;
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        if out.is_null() && capacity > 0 {
            return Err(null("out"));
        }
        let least = rrt_event::FIRST_SIZE;
        if stride < least {
            return Err(Failure::new(E_ABI, format!("stride is {stride}, an rrt_event has at least {least} bytes")));
        }
        let events = poll(&runtime.shared, capacity);
        for (i, event) in events.iter().enumerate() {
            let (from, bytes) = (std::ptr::from_ref(event).cast::<u8>(), stride.min(size_of::<rrt_event>()));
            // SAFETY: the caller's array of `capacity` elements, `stride` bytes apart, and there are no more events. An older
            // caller's are smaller than these.
            unsafe { std::ptr::copy_nonoverlapping(from, out.byte_add(i * stride).cast::<u8>(), bytes) };
        }
        // SAFETY: not NULL.
        unsafe { count.write(events.len()) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_event_fd(runtime: *mut rrt_runtime, fd: *mut i32, err: *mut rrt_error) -> i32 {
    let body = || {
        output(fd, "fd")?;
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        // SAFETY: not NULL.
        unsafe { fd.write(runtime.shared.jobs.ready.descriptor()?) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
