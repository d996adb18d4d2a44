//! How many threads of this process compute at a time, over all runtimes in it: no more than there are cores.
//!
//! A step takes as many cores as its pool has threads, and gives them back when it is done. Two runtimes with a thread
//! each run side by side on two cores; two with two threads each take turns, step by step, in the order they came. So
//! a host may open several runtimes without any of their threads waiting, half-way through a loop, for a core.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

struct Turns {
    free: usize,
    /// The next number to be drawn, and the one whose turn it is.
    next: u64,
    serving: u64,
}

pub(crate) struct Cores {
    turns: Mutex<Turns>,
    changed: Condvar,
    total: usize,
}

/// Cores that a step holds.
pub(crate) struct Turn<'a> {
    cores: &'a Cores,
    count: usize,
}

impl Cores {
    pub(super) fn new(total: usize) -> Self {
        let turns = Mutex::new(Turns { free: total, next: 0, serving: 0 });
        Cores { turns, changed: Condvar::new(), total }
    }

    fn lock(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `count` cores (for all of them if there are fewer), first come, first served.
    pub(crate) fn take(&self, count: usize) -> Turn<'_> {
        let count = count.min(self.total);
        let mut turns = self.lock();
        let mine = turns.next;
        turns.next += 1;
        while turns.serving != mine || turns.free < count {
            turns = self.changed.wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
        turns.free -= count;
        turns.serving += 1;
        self.changed.notify_all();
        Turn { cores: self, count }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.cores.lock().free += self.count;
        self.cores.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn never_more_at_work_than_cores() {
        let (cores, busy, most) = (Cores::new(3), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|s| {
            for want in [1, 2, 3, 7, 1, 2] {
                let (cores, busy, most) = (&cores, &busy, &most);
                s.spawn(move || {
                    for _ in 0..200 {
                        let held = cores.take(want);
                        most.fetch_max(busy.fetch_add(held.count, Ordering::SeqCst) + held.count, Ordering::SeqCst);
                        std::thread::yield_now();
                        busy.fetch_sub(held.count, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 3);
        assert_eq!(cores.lock().free, 3);
    }
}
