//! Threads that share one loop at a time, with a microsecond to pay at its start and end.
//!
//! A step runs hundreds of short loops, so the workers spin for a moment before they sleep, and the caller never
//! waits for a worker that has not begun. A sleeping pool costs nothing.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker spins before it sleeps: longer than what a step does between its loops.
const SPIN: Duration = Duration::from_micros(100);
/// Spins between two looks at the clock.
const SPINS: u32 = 64;
/// Multiply-adds below which a loop is not worth waking a thread for.
pub(crate) const SMALL: usize = 20_000;

type Task = dyn Fn(usize) + Sync;

struct Shared {
    /// Bits 32..: number of the loop; bit 31: open for workers to enter; bits 0..31: workers inside.
    state: AtomicU64,
    task: UnsafeCell<Option<*const Task>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

// SAFETY: `task` is written only while no worker is inside, and read only from inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is to a Sync closure that outlives the loop.
unsafe impl Send for Shared {}

/// A pool of `threads − 1` workers; the caller is the last one.
pub struct Pool {
    shared: Arc<Shared>,
    /// Loops do not nest and do not overlap.
    running: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Starts the workers; fewer than asked for if the system gives no more threads.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let spawn = |i| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("rewardrt-cpu-{i}")).spawn(move || work(&shared)).ok()
        };
        let workers = (1..threads.max(1)).map_while(spawn).collect();
        Pool { shared, running: Mutex::new(()), workers }
    }

    /// Threads that take part in a loop.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)`, …, `task(tasks − 1)`, each once, in any order and on any thread, and returns when all are
    /// done. A panic in a task is raised again here. A task must not call `run` of the same pool.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let running = lock(&self.running);
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased for the duration of this call; no worker is inside after it.
        let erased = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync + '_), &'static Task>(task) };
        // SAFETY: no worker is inside: the last loop was closed and drained, and `running` is held.
        unsafe { *shared.task.get() = Some(erased) };
        shared.tasks.store(tasks, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        shared.state.store(number << 32 | OPEN, Ordering::SeqCst);
        // A worker counts itself as a sleeper before it looks at the state for the last time.
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _sleep = lock(&shared.sleep);
            shared.wake.notify_all();
        }
        take_tasks(shared, erased);
        // Close, then wait for those inside.
        shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins.is_multiple_of(1024) {
                // Nobody to spin for if a worker was descheduled inside.
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let panic = lock(&shared.panic).take();
        drop(running);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `body` with ranges that cover `0..rows`; a row costs about `cost` multiply-adds.
    pub(crate) fn over_rows(&self, rows: usize, cost: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        let per_task = rows.div_ceil(4 * self.threads()).max(SMALL.div_ceil(cost.max(1))).max(1);
        self.run(rows.div_ceil(per_task), &|i| body(i * per_task..rows.min((i + 1) * per_task)));
    }
}

fn take_tasks(shared: &Shared, task: &Task) {
    let tasks = shared.tasks.load(Ordering::Relaxed);
    let run = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let i = shared.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                break;
            }
            task(i);
        }
    }));
    if let Err(panic) = run {
        shared.next.store(tasks, Ordering::Relaxed);
        lock(&shared.panic).get_or_insert(panic);
    }
}

fn work(shared: &Shared) {
    let mut last = 0;
    loop {
        let Some(state) = wait_for_loop(shared, last) else { return };
        last = state >> 32;
        // Enter, unless it was closed meanwhile.
        let entered = shared
            .state
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |s| (s & OPEN != 0 && s >> 32 == last).then_some(s + 1));
        if entered.is_err() {
            continue;
        }
        // SAFETY: inside, so the task is there and stays until this worker leaves.
        if let Some(task) = unsafe { *shared.task.get() } {
            // SAFETY: as above.
            take_tasks(shared, unsafe { &*task });
        }
        shared.state.fetch_sub(1, Ordering::Release);
    }
}

/// The state of a loop that is open and not `last`; `None` to stop.
fn wait_for_loop(shared: &Shared, last: u64) -> Option<u64> {
    let ready = || {
        let state = shared.state.load(Ordering::SeqCst);
        (state & OPEN != 0 && state >> 32 != last).then_some(state)
    };
    let begin = Instant::now();
    while begin.elapsed() < SPIN {
        for _ in 0..SPINS {
            if let Some(state) = ready() {
                return Some(state);
            }
            std::hint::spin_loop();
        }
    }
    let mut sleep = lock(&shared.sleep);
    shared.sleepers.fetch_add(1, Ordering::SeqCst);
    let found = loop {
        if shared.stop.load(Ordering::SeqCst) {
            break None;
        }
        if let Some(state) = ready() {
            break Some(state);
        }
        sleep = shared.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
    };
    shared.sleepers.fetch_sub(1, Ordering::SeqCst);
    found
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _sleep = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches every panic of a task.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(3);
        for tasks in [0, 1, 2, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..50 {
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        let run = catch_unwind(AssertUnwindSafe(|| pool.run(100, &|i| assert!(i != 57, "task 57"))));
        assert!(run.is_err());
        let done = AtomicUsize::new(0);
        pool.run(10, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 10);
    }
}
