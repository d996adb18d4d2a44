//! Many threads at everything at once, through the C functions: for the thread sanitizer (scripts/test_threads), and to see
//! that nothing is lost.

use std::collections::HashMap;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use crate::boundary::Sized32;
use crate::job::*;
use crate::model::*;
use crate::numbers::*;
use crate::poll::*;
use crate::result::*;
use crate::runtime::*;
use crate::session::*;
use crate::status::{E_FULL, E_NOT_FOUND, OK, PENDING, TIMEOUT};
use crate::stream::*;
use crate::structs::*;

const THREADS: u64 = 32;
const ROUNDS: u64 = 8;
/// The thread sanitizer on a machine with other work takes minutes.
const WATCHDOG: Duration = Duration::from_secs(1200);
const PROMPT: [u32; 4] = [5, 17, 40, 9];
const OFFSETS: [usize; 2] = [0, 4];

/// What all threads share.
struct Arena {
    runtime: *mut rrt_runtime,
    model: *mut rrt_model,
    /// What a seed returned; the same every time.
    answers: Mutex<HashMap<u64, Vec<(u32, u32)>>>,
    submitted: AtomicU64,
    taken: AtomicU64,
    dropped: AtomicU64,
    refused: AtomicU64,
}

// SAFETY: the header: any thread may call any function with any handle.
unsafe impl Sync for Arena {}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Arena {
    fn request(&self, seed: u64) -> rrt_sample_req {
        rrt_sample_req {
            flags: 3, // IGNORE_EOS | STREAM
            model: self.model,
            prompts: rrt_sequences { ids: PROMPT.as_ptr(), offsets: OFFSETS.as_ptr(), count: 1 },
            seed,
            max_new_tokens: 10,
            ..rrt_sample_req::initial()
        }
    }

    /// Submits one job of some kind, however often it is refused.
    fn submit(&self, seed: u64, kind: u64) -> u64 {
        let mut job = 0;
        loop {
            // SAFETY: live handles, and structs whose pointers live longer than the call.
            let status = unsafe {
                match kind {
                    0 => {
                        let request = rrt_score_req {
                            model: self.model,
                            kind: 2,
                            sequences: self.request(0).prompts,
                            ..rrt_score_req::initial()
                        };
                        rrt_submit_score(self.runtime, &request, &mut job, null_mut())
                    }
                    1 => {
                        let mut session = null_mut();
                        assert_eq!(rrt_session_new(self.model, PROMPT.as_ptr(), 4, &mut session, null_mut()), OK);
                        let mut request = self.request(seed);
                        request.prompts = rrt_sequences { ids: null(), offsets: null(), count: 0 };
                        let status = rrt_session_sample(session, &request, &mut job, null_mut());
                        rrt_session_free(session);
                        status
                    }
                    _ => rrt_submit_sample(self.runtime, &self.request(seed), &mut job, null_mut()),
                }
            };
            match status {
                OK => break,
                E_FULL => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => panic!("{other}"),
            }
        }
        self.submitted.fetch_add(1, Ordering::SeqCst);
        job
    }

    /// Compares a whole answer with what the same seed returned before.
    unsafe fn compare(&self, seed: u64, result: *mut rrt_result) {
        let mut view = rrt_sequences_view::initial();
        // SAFETY: a live result, and arrays as long as the view says.
        let tokens: Vec<(u32, u32)> = unsafe {
            assert_eq!(rrt_result_sequences(result, &mut view, null_mut()), OK);
            if *view.finish != 1 {
                return;
            }
            (0..*view.offsets.add(1)).map(|i| (*view.ids.add(i), (*view.logprob.add(i)).to_bits())).collect()
        };
        let mut answers = self.answers.lock().unwrap();
        assert_eq!(answers.entry(seed).or_insert_with(|| tokens.clone()), &tokens, "seed {seed}");
    }

    fn round(&self, state: &mut u64) {
        let (seed, kind, end) = (splitmix(state) % 4, splitmix(state) % 4, splitmix(state) % 5);
        let job = self.submit(seed, kind);
        let (mut ids, mut logprobs, mut count) = ([0u32; 16], [0f32; 16], 0);
        // SAFETY: live handles and buffers of the sizes given.
        unsafe {
            if kind > 0 {
                for _ in 0..splitmix(state) % 4 {
                    let (id, lp) = (ids.as_mut_ptr(), logprobs.as_mut_ptr());
                    let peeked = rrt_job_peek(self.runtime, job, 0, 0, id, lp, null_mut(), 16, &mut count, null_mut());
                    assert_eq!(peeked, OK);
                }
            }
            if end == 0 {
                assert_eq!(rrt_job_drop(self.runtime, job, null_mut()), OK);
                assert_eq!(rrt_job_cancel(self.runtime, job, null_mut()), E_NOT_FOUND);
                self.dropped.fetch_add(1, Ordering::SeqCst);
                return;
            }
            if end == 1 {
                assert_eq!(rrt_job_cancel(self.runtime, job, null_mut()), OK);
            }
            let (mut finished, mut total) = (0, 0);
            rrt_job_progress(self.runtime, job, &mut finished, &mut total, null_mut());
            assert!(finished <= total);
            let waited = rrt_wait(self.runtime, &job, 1, (end % 2) as u32, 1000, null_mut());
            assert!(waited == OK || waited == TIMEOUT);
            assert_eq!(rrt_wait(self.runtime, &job, 1, 0, u64::MAX, null_mut()), OK);
            let mut result = null_mut();
            let status = rrt_job_take(self.runtime, job, &mut result, null_mut());
            assert_ne!(status, PENDING);
            if status == OK {
                if kind > 0 {
                    self.compare(seed, result);
                }
                rrt_result_free(result);
            } else {
                assert!(end == 1 && kind == 0, "{status}");
            }
        }
        self.taken.fetch_add(1, Ordering::SeqCst);
    }

    /// Looks on: events, numbers, caches.
    fn look_on(&self, stop: &AtomicBool) {
        let mut last = HashMap::new();
        let mut events = [rrt_event { kind: 0, ..BLANK }; 8];
        while !stop.load(Ordering::SeqCst) {
            let (mut count, mut timing) = (0, rrt_timing::initial());
            // SAFETY: live handles and buffers of the sizes given.
            unsafe {
                let stride = size_of::<rrt_event>();
                assert_eq!(rrt_poll(self.runtime, events.as_mut_ptr(), 8, stride, &mut count, null_mut()), OK);
                assert_eq!(rrt_timing_stats(self.runtime, &mut timing, null_mut()), OK);
                assert_eq!(rrt_trim(self.runtime, null_mut()), OK);
            }
            for event in &events[..count] {
                if event.kind != 1 {
                    assert!(last.insert(event.job, event.kind).is_none(), "two last events of {}", event.job);
                }
                assert!(event.kind == 1 || event.kind == 2 || event.kind == 4, "{}", event.kind);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

const BLANK: rrt_event =
    rrt_event { kind: 0, status: 0, job: 0, user_tag: 0, sequence: 0, first: 0, count: 0, finish: 0, text_len: 0 };

fn stress() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama-gqa-9-3");
    let open =
        rrt_open_opts { device: c"cpu".as_ptr(), device_len: 3, threads: 2, max_jobs: 8, ..rrt_open_opts::initial() };
    let load = rrt_model_opts {
        path: folder.as_ptr().cast(),
        path_len: folder.len(),
        kv_tokens: 512,
        ..rrt_model_opts::initial()
    };
    let (mut runtime, mut model, mut fd) = (null_mut(), null_mut(), -1);
    // SAFETY: outputs of this function's, and structs whose pointers live longer than the call.
    unsafe {
        assert_eq!(rrt_open(&open, &mut runtime, null_mut()), OK);
        assert_eq!(rrt_model_load(runtime, &load, &mut model, null_mut()), OK);
        assert_eq!(rrt_event_fd(runtime, &mut fd, null_mut()), OK);
    }
    let arena = Arena {
        runtime,
        model,
        answers: Mutex::default(),
        submitted: AtomicU64::new(0),
        taken: AtomicU64::new(0),
        dropped: AtomicU64::new(0),
        refused: AtomicU64::new(0),
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| arena.look_on(&stop));
        let work = |thread: u64| {
            let arena = &arena;
            scope.spawn(move || {
                (0..ROUNDS).fold(thread, |mut state, _| {
                    arena.round(&mut state);
                    state
                })
            })
        };
        let threads: Vec<_> = (0..THREADS).map(work).collect();
        let failed = threads.into_iter().filter_map(|t| t.join().err()).count();
        stop.store(true, Ordering::SeqCst);
        assert_eq!((failed, looking.join().is_err()), (0, false));
    });
    let count = |n: &AtomicU64| n.load(Ordering::SeqCst);
    assert_eq!(count(&arena.submitted), THREADS * ROUNDS);
    assert_eq!(count(&arena.taken) + count(&arena.dropped), THREADS * ROUNDS);
    assert!(count(&arena.refused) > 0, "the queue was never full");
    assert_eq!(arena.answers.lock().unwrap().len(), 4);
    let mut timing = rrt_timing::initial();
    // SAFETY: live handles, freed once.
    unsafe {
        // Dropped jobs end within a step.
        loop {
            assert_eq!(rrt_timing_stats(runtime, &mut timing, null_mut()), OK);
            if timing.jobs == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!((timing.submitted, timing.queued_tokens, timing.kv_used), (THREADS * ROUNDS, 0, 0));
        rrt_model_free(model);
        assert_eq!(rrt_close(runtime, u64::MAX, null_mut()), OK);
    }
}

#[test]
fn nothing_is_lost_among_many_threads() {
    let (done, ended) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        stress();
        done.send(()).unwrap();
    });
    match ended.recv_timeout(WATCHDOG) {
        Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => worker.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("a deadlock: no end after {WATCHDOG:?}"),
    }
}

/// For scripts/test_threads, which wants it to be found.
#[test]
#[ignore = "a race on purpose"]
fn a_planted_race() {
    struct Racy(std::cell::UnsafeCell<u64>);
    // SAFETY: it is not; that is the point.
    unsafe impl Sync for Racy {}
    let shared = Racy(std::cell::UnsafeCell::new(0));
    // Relaxed, so that it orders nothing, and both are at it at the same time.
    let started = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            // The whole of it, not its field.
            let (shared, started) = (&shared, &started);
            scope.spawn(move || {
                started.fetch_add(1, Ordering::Relaxed);
                while started.load(Ordering::Relaxed) < 2 {}
                for _ in 0..10_000 {
                    // SAFETY: as above.
                    unsafe { *std::hint::black_box(shared.0.get()) += 1 };
                }
            });
        }
    });
    // SAFETY: the threads have ended.
    assert!(unsafe { *shared.0.get() } > 0);
}
