//! Requests → ragged steps → results.
//!
//! One thread owns the executors. Callers hand it sequences and wait; it packs rows of all running sequences of a
//! model into a step, runs it, and hands each row's output back. Which sequences share a step changes no result.

mod angles;
mod draft;
mod job;
mod kv;
mod lane;
mod pauses;
mod sampler;
mod sequence;
mod stats;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use job::{Chunk, Ending, Job, JobWatch, Scheduling, Streamed};
pub(crate) use job::{JobOptions, JobState};
pub use lane::InFlight;
pub(crate) use lane::Lane;
use lane::{Quiesce, Released};
use pauses::Pauses;
pub(crate) use sampler::SamplePlan;
pub(crate) use sequence::{AdapterContent, Finished, NewSequence, Purpose, Sampled};
pub use sequence::{Finish, SampledToken, Timing, VersionSpan};
pub use stats::{JobStats, ModelStats, Rows, RuntimeStats};

use crate::backend::{Capacity, Executor};
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::KV_BLOCK;
use crate::model::Rope;
use crate::weights::AdapterWeights;

/// Commands carried out between two steps: many at once, and no flood that keeps steps from running.
const COMMANDS_A_TURN: usize = 1024;

/// How much may wait or run at a time, over all jobs of a runtime.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    pub jobs: usize,
    /// Positions that the jobs can come to.
    pub tokens: usize,
}

enum Command {
    Add {
        model: u64,
        lane: Box<Lane>,
    },
    Remove {
        model: u64,
    },
    Submit {
        model: u64,
        job: Arc<JobState>,
        sequences: Vec<NewSequence>,
        positions: usize,
    },
    Visit {
        model: u64,
        visit: Visit,
    },
    Quiesce {
        model: u64,
        wish: Quiesce,
    },
    Pause {
        pause: u64,
        in_flight: InFlight,
        deadline: Option<Instant>,
        answer: Sender<Result<()>>,
    },
    /// Every lane has answered the pause.
    SettlePause {
        pause: u64,
        succeeded: bool,
    },
    Resume,
    AddAdapter {
        model: u64,
        adapter: NewAdapter,
        answer: Sender<Result<()>>,
    },
    FreeAdapters {
        model: u64,
    },
}

/// An adapter's content on its way to the device.
pub(crate) struct NewAdapter {
    pub content: Arc<AdapterContent>,
    pub weights: Arc<AdapterWeights>,
    /// Bytes that all adapters of the model may take.
    pub room: u64,
}

type Lanes = Vec<(u64, Box<Lane>)>;

/// How often deadlines and cancellations are looked after while no lane moves.
const TEND: Duration = Duration::from_millis(5);

/// What is done with an executor between two steps.
type Visit = Box<dyn FnOnce(&mut dyn Executor) + Send>;

/// The engine's front door: cheap to share.
pub(crate) struct Engine {
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
    next_model: AtomicU64,
    next_pause: AtomicU64,
}

struct Shared {
    limits: QueueLimits,
    jobs: AtomicUsize,
    queued_tokens: AtomicUsize,
    submitted: AtomicU64,
    refused: AtomicU64,
    paused: AtomicBool,
    poisoned: Mutex<Option<Error>>,
}

impl Shared {
    fn poison(&self) -> Option<Error> {
        self.poisoned.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Engine {
    pub(crate) fn start(limits: QueueLimits) -> Result<Self> {
        let (commands, inbox) = channel();
        let shared = Arc::new(Shared {
            limits,
            jobs: AtomicUsize::new(0),
            queued_tokens: AtomicUsize::new(0),
            submitted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            poisoned: Mutex::new(None),
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name("rewardrt-engine".into())
            .spawn(move || run(inbox, &for_thread))
            .map_err(|e| Error::new(ErrorKind::HostMemory, format!("cannot start the engine thread: {e}")))?;
        Ok(Engine {
            commands,
            thread: Mutex::new(Some(thread)),
            shared,
            next_model: AtomicU64::new(1),
            next_pause: AtomicU64::new(1),
        })
    }

    /// Takes over a loaded model whose weights have this version; the number names it from now on.
    pub(crate) fn add(
        &self,
        executor: Box<dyn Executor>,
        rope: Rope,
        capacity: Capacity,
        steps_at_once: Option<usize>,
        version: u64,
        stats: Arc<Mutex<ModelStats>>,
    ) -> Result<u64> {
        if let Some(error) = self.shared.poison() {
            return Err(error);
        }
        let model = self.next_model.fetch_add(1, Ordering::Relaxed);
        let lane = Box::new(Lane::new(executor, rope, capacity, steps_at_once, version, stats));
        self.send(Command::Add { model, lane })?;
        Ok(model)
    }

    pub(crate) fn remove(&self, model: u64) {
        // An engine that is gone has no models left either.
        let _ = self.send(Command::Remove { model });
    }

    /// Does something with a model's executor between two steps, and waits for its result.
    pub(crate) fn visit<T: Send + 'static>(
        &self,
        model: u64,
        visit: impl FnOnce(&mut dyn Executor) -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = channel();
        let visit = Box::new(move |executor: &mut dyn Executor| {
            // Nobody waits any more if this fails.
            let _ = answer.send(visit(executor));
        });
        self.send(Command::Visit { model, visit })?;
        self.answer(&answered)
    }

    /// Brings an adapter's content to the device, between two steps. It stays there as long as somebody has it.
    pub(crate) fn add_adapter(&self, model: u64, adapter: NewAdapter) -> Result<()> {
        let (answer, answered) = channel();
        self.send(Command::AddAdapter { model, adapter, answer })?;
        self.answer(&answered)?
    }

    /// Frees what adapters took that nobody has any more.
    pub(crate) fn free_adapters(&self, model: u64) {
        // An engine that is gone has no adapters left either.
        let _ = self.send(Command::FreeAdapters { model });
    }

    fn answer<T>(&self, answered: &Receiver<T>) -> Result<T> {
        let gone = |_| self.shared.poison().unwrap_or_else(|| Error::new(ErrorKind::NotFound, "the model was freed"));
        answered.recv().map_err(gone)
    }

    /// Brings a model's lane to rest, does something with it between two steps, and waits for its result.
    ///
    /// # Errors
    /// `Timeout` or `Busy` if it does not come to rest, and what `then` returns.
    pub(crate) fn quiesce<T: Send + 'static>(
        &self,
        model: u64,
        in_flight: InFlight,
        deadline: Option<Instant>,
        then: impl FnOnce(&mut Lane) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = channel();
        let then = Box::new(move |lane: Result<&mut Lane>| {
            // Nobody waits any more if this fails.
            let _ = answer.send(lane.and_then(then));
        });
        self.send(Command::Quiesce { model, wish: Quiesce { in_flight, deadline, then } })?;
        let gone = |_| self.shared.poison().unwrap_or_else(|| Error::new(ErrorKind::NotFound, "the model was freed"));
        answered.recv().map_err(gone)?
    }

    /// Brings every lane to rest and keeps it there.
    ///
    /// # Errors
    /// `Timeout` or `Busy` if one does not come to rest; all of them go on then, unless another pause is in force or on its way.
    pub(crate) fn pause(&self, in_flight: InFlight, deadline: Option<Instant>) -> Result<()> {
        let (answer, answers) = channel();
        let pause = self.next_pause.fetch_add(1, Ordering::Relaxed);
        self.send(Command::Pause { pause, in_flight, deadline, answer })?;
        // Every lane answers, then nobody holds the other end.
        let failed = answers.iter().filter_map(Result::err).next();
        if let Some(error) = self.shared.poison() {
            return Err(error);
        }
        self.send(Command::SettlePause { pause, succeeded: failed.is_none() })?;
        failed.map_or(Ok(()), Err)
    }

    /// Lets the lanes move again.
    pub(crate) fn resume(&self) -> Result<()> {
        if let Some(error) = self.shared.poison() {
            return Err(error);
        }
        self.send(Command::Resume)
    }

    /// Queues sequences as one job.
    pub(crate) fn submit(
        &self,
        model: u64,
        kv_blocks: usize,
        sequences: Vec<NewSequence>,
        options: JobOptions,
    ) -> Result<Arc<JobState>> {
        if let Some(error) = self.shared.poison() {
            return Err(error);
        }
        let mut positions = 0usize;
        for (i, sequence) in sequences.iter().enumerate() {
            let most = sequence.positions();
            if kv::KvCache::needed(most) > kv_blocks {
                return Err(Error::limit(format!(
                    "sequence {i} needs {most} positions in the KV cache, which has {}; load the model with more kv_tokens or memory",
                    kv_blocks * KV_BLOCK
                )));
            }
            positions = positions.saturating_add(most.saturating_mul(sequence.results()));
        }
        let Shared { limits, jobs, queued_tokens, submitted, refused, .. } = &*self.shared;
        let queued = queued_tokens.fetch_add(positions, Ordering::Relaxed);
        let others = jobs.fetch_add(1, Ordering::Relaxed);
        // A job alone is taken whatever its size: the request's own limits bound it.
        if others > 0 && (others >= limits.jobs || queued.saturating_add(positions) > limits.tokens) {
            queued_tokens.fetch_sub(positions, Ordering::Relaxed);
            jobs.fetch_sub(1, Ordering::Relaxed);
            refused.fetch_add(1, Ordering::Relaxed);
            return Err(Error::new(
                ErrorKind::Full,
                format!(
                    "{others} jobs with {queued} tokens are queued, and this one has {positions}; at most {} jobs and {} tokens are taken: retry when jobs have finished",
                    limits.jobs, limits.tokens
                ),
            ));
        }
        submitted.fetch_add(1, Ordering::Relaxed);
        let job = JobState::new(sequences.iter().map(NewSequence::results).sum(), options);
        self.send(Command::Submit { model, job: job.clone(), sequences, positions })?;
        Ok(job)
    }

    pub(crate) fn stats(&self) -> RuntimeStats {
        let Shared { jobs, queued_tokens, submitted, refused, .. } = &*self.shared;
        RuntimeStats {
            jobs: jobs.load(Ordering::Relaxed),
            queued_tokens: queued_tokens.load(Ordering::Relaxed),
            submitted: submitted.load(Ordering::Relaxed),
            refused: refused.load(Ordering::Relaxed),
        }
    }

    /// Counts submitted and refused jobs from here.
    pub(crate) fn reset_stats(&self) {
        self.shared.submitted.store(0, Ordering::Relaxed);
        self.shared.refused.store(0, Ordering::Relaxed);
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.shared.poison().is_some()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::SeqCst)
    }

    fn send(&self, command: Command) -> Result<()> {
        let gone =
            |_| self.shared.poison().unwrap_or_else(|| Error::new(ErrorKind::Poisoned, "the engine has stopped"));
        self.commands.send(command).map_err(gone)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Closing the channel ends the thread after its current step.
        let (closed, _) = channel();
        self.commands = closed;
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

fn run(inbox: Receiver<Command>, shared: &Shared) {
    let mut lanes = Lanes::new();
    let mut pauses = Pauses::default();
    let mut obeyed = 0;
    let mut tended = Instant::now();
    loop {
        let rest = lanes.iter().all(|(_, lane)| lane.rests());
        let command = match rest {
            // Commands that come all the time must not keep deadlines waiting.
            true if tended.elapsed() > TEND && lanes.iter().any(|(_, lane)| lane.is_waited_for()) => {
                Err(TryRecvError::Empty)
            }
            true if lanes.iter().any(|(_, lane)| lane.is_waited_for()) => {
                inbox.recv_timeout(TEND).map_err(|e| match e {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            }
            true => inbox.recv().map_err(|_| TryRecvError::Disconnected),
            false if obeyed < COMMANDS_A_TURN => inbox.try_recv(),
            false => Err(TryRecvError::Empty),
        };
        if command.as_ref().is_err_and(|e| *e == TryRecvError::Disconnected) {
            break;
        }
        // A job that a panicking command carried is unknown to the lanes.
        let submitted = match &command {
            Ok(Command::Submit { job, .. }) => Some(job.clone()),
            _ => None,
        };
        let work = catch_unwind(AssertUnwindSafe(|| {
            let mut released = Released::default();
            match command {
                Ok(command) => {
                    obeyed += 1;
                    released += obey(&mut lanes, &mut pauses, shared, command);
                }
                Err(_) => {
                    (obeyed, tended) = (0, Instant::now());
                    lanes.iter_mut().for_each(|(_, lane)| released += lane.advance());
                }
            }
            released
        }));
        match work {
            Ok(released) => {
                shared.queued_tokens.fetch_sub(released.positions, Ordering::Relaxed);
                shared.jobs.fetch_sub(released.jobs, Ordering::Relaxed);
                lanes.iter_mut().for_each(|(_, lane)| lane.deliver());
            }
            Err(panic) => {
                poison(shared, &*panic, &mut lanes, submitted);
                // Refuse whatever is still on its way, until the runtime is closed.
                while let Ok(command) = inbox.recv() {
                    let Some(error) = shared.poison() else { continue };
                    match command {
                        Command::Submit { job, .. } => job.fail(error),
                        Command::Quiesce { wish, .. } => (wish.then)(Err(error)),
                        Command::Pause { answer, .. } => {
                            let _ = answer.send(Err(error));
                        }
                        _ => {}
                    }
                }
                return;
            }
        }
    }
    let closed = Error::new(ErrorKind::Cancelled, "the runtime was closed");
    for (_, lane) in &mut lanes {
        lane.fail_all(&closed);
    }
}

/// After a panic nobody knows what the lanes are like: every job fails, every later one is refused.
fn poison(shared: &Shared, panic: &(dyn Any + Send), lanes: &mut [(u64, Box<Lane>)], submitted: Option<Arc<JobState>>) {
    let error = Error::new(ErrorKind::Internal, format!("internal error: {}", panic_text(panic)));
    log::error!("{error}");
    let poison = Error::new(ErrorKind::Poisoned, format!("the runtime is poisoned by an earlier {error}"));
    *shared.poisoned.lock().unwrap_or_else(PoisonError::into_inner) = Some(poison);
    for (_, lane) in lanes {
        lane.deliver();
        lane.fail_all(&error);
        lane.refuse_wishes(&error);
    }
    if let Some(job) = submitted {
        job.fail(error);
    }
}

/// Carries out a command; says what is done with.
fn obey(lanes: &mut Lanes, pauses: &mut Pauses, shared: &Shared, command: Command) -> Released {
    match command {
        Command::Add { model, mut lane } => {
            lane.holds.paused = pauses.any();
            lanes.push((model, lane));
            Released::default()
        }
        Command::Remove { model } => match lanes.iter().position(|(id, _)| *id == model) {
            Some(i) => {
                let (_, mut lane) = lanes.swap_remove(i);
                lane.deliver();
                lane.fail_all(&Error::new(ErrorKind::Cancelled, "the model was freed"))
            }
            None => Released::default(),
        },
        Command::Submit { model, job, sequences, positions } => match lanes.iter_mut().find(|(id, _)| *id == model) {
            Some((_, lane)) => lane.enqueue(job, sequences, positions),
            None => {
                job.fail(Error::new(ErrorKind::NotFound, "the model was freed"));
                Released { jobs: 1, positions }
            }
        },
        Command::Visit { model, visit } => {
            // Dropping a visit to a model that is gone tells who waits.
            if let Some((_, lane)) = lanes.iter_mut().find(|(id, _)| *id == model) {
                visit(lane.executor());
            }
            Released::default()
        }
        Command::AddAdapter { model, adapter, answer } => {
            if let Some((_, lane)) = lanes.iter_mut().find(|(id, _)| *id == model) {
                // Nobody waits any more if this fails.
                let _ = answer.send(lane.add_adapter(adapter));
            }
            Released::default()
        }
        Command::FreeAdapters { model } => {
            if let Some((_, lane)) = lanes.iter_mut().find(|(id, _)| *id == model) {
                lane.free_adapters();
            }
            Released::default()
        }
        Command::Quiesce { model, wish } => match lanes.iter_mut().find(|(id, _)| *id == model) {
            Some((_, lane)) => lane.quiesce(wish),
            None => Released::default(),
        },
        Command::Pause { pause, in_flight, deadline, answer } => {
            let wanted = pauses.begin(pause);
            shared.paused.store(true, Ordering::SeqCst);
            let mut released = Released::default();
            for (_, lane) in lanes {
                let (answer, wanted) = (answer.clone(), wanted.clone());
                let then = Box::new(move |lane: Result<&mut Lane>| {
                    // Nobody waits any more if this fails.
                    let _ = answer.send(lane.map(|lane| lane.holds.paused |= wanted.load(Ordering::SeqCst)));
                });
                released += lane.quiesce(Quiesce { in_flight, deadline, then });
            }
            released
        }
        Command::SettlePause { pause, succeeded } => {
            pauses.settle(pause, succeeded);
            if !pauses.any() {
                go_on(lanes, shared);
            }
            Released::default()
        }
        Command::Resume => {
            pauses.end();
            go_on(lanes, shared);
            Released::default()
        }
    }
}

/// Nothing is paused any more.
fn go_on(lanes: &mut Lanes, shared: &Shared) {
    shared.paused.store(false, Ordering::SeqCst);
    lanes.iter_mut().for_each(|(_, lane)| lane.holds.paused = false);
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}
