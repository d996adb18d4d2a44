//! A rollout under way: a thread that follows the policy's answers, and one for every model that scores them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::scorer::{Ended, Input, ReferenceScorer, RewardScorer, Scorer};
use super::{Advantage, Kl, Rollout, RolloutRequest, advantage};
use crate::engine::{Ending, Finish, Finished, Job, JobWatch, panic_text};
use crate::error::{Error, ErrorKind, Result};
use crate::loaded_model::Model;
use crate::request::{SampleRequest, SampledSequence, SequenceLogprobs, SequenceScore};

/// Owner of the policy's job; workers count from there.
const POLICY: usize = 0;
/// Sequences of a scoring job at most.
const PER_JOB: usize = 512;
/// Between two tries to enter a full queue, at first and at most.
const FULL_WAIT: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];

/// A rollout that was started. Dropping it cancels the work, and waits the step that this takes.
pub struct RolloutJob {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    answers: usize,
}

/// What the job, its watches and its threads share.
#[derive(Default)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
    done: Condvar,
}

#[derive(Default)]
struct Inner {
    result: Option<Result<Rollout>>,
    is_done: bool,
    is_cancelled: bool,
    /// Answers that have ended.
    ended: usize,
    /// The jobs to cancel, by whose they are: the policy's, each worker's last one.
    watches: BTreeMap<usize, JobWatch>,
    observer: Option<Arc<dyn Fn() + Send + Sync>>,
    /// How it ended.
    ending: Option<Ending>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels what runs and what will be submitted.
    pub fn cancel(&self) {
        let watches = {
            let mut inner = self.lock();
            inner.is_cancelled = true;
            std::mem::take(&mut inner.watches)
        };
        watches.values().for_each(JobWatch::cancel);
    }

    fn is_cancelled(&self) -> bool {
        self.lock().is_cancelled
    }

    fn end(&self, result: Result<Rollout>) {
        let mut inner = self.lock();
        inner.watches.clear();
        inner.ending = Some(result.as_ref().map_or_else(|e| Ending::Failed(e.kind()), |_| Ending::Finished));
        inner.result = Some(result);
        inner.is_done = true;
        let observer = inner.observer.take();
        drop(inner);
        self.done.notify_all();
        if let Some(observer) = observer {
            observer();
        }
    }

    fn wait_timeout(&self, timeout: Duration) -> bool {
        let wait = self.done.wait_timeout_while(self.lock(), timeout, |inner| !inner.is_done);
        wait.unwrap_or_else(PoisonError::into_inner).0.is_done
    }

    /// Has the job cancelled with the rollout, in the place of the last one of the same owner.
    fn watch(&self, owner: usize, watch: JobWatch) {
        let mut inner = self.lock();
        if inner.is_cancelled {
            watch.cancel();
        } else {
            inner.watches.insert(owner, watch);
        }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the rollout was cancelled")
}

impl RolloutJob {
    pub(super) fn start(policy: &Model, request: &RolloutRequest, rewards: Vec<RewardScorer>) -> Result<Self> {
        let begun = Instant::now();
        let shared = Arc::<Shared>::default();
        let place = policy.rollouts().enter(&shared)?;
        let sampling = policy.sample(&SampleRequest { stream: false, ..request.sample.clone() })?;
        shared.watch(POLICY, sampling.watch());
        let answers = request.sample.prompts.len() * request.sample.n;
        let reference = request.reference.as_ref().map(|r| ReferenceScorer::new(policy, r, request));
        let work = Work {
            shared: shared.clone(),
            _policy: policy.clone(),
            sampling,
            reference,
            rewards,
            parts: request.rewards.iter().map(|r| (r.label, r.weight)).collect(),
            n: request.sample.n,
            advantage: request.advantage,
            clip_reward: request.clip_reward,
            begun,
        };
        let run = {
            let shared = shared.clone();
            move || {
                let result = catch_unwind(AssertUnwindSafe(|| work.run()))
                    .unwrap_or_else(|panic| Err(Error::internal(panic_text(&*panic))));
                // Whoever has waited finds room.
                drop(place);
                shared.end(result);
            }
        };
        let thread = std::thread::Builder::new().name("rewardrt-rollout".into()).spawn(run).map_err(no_thread)?;
        Ok(RolloutJob { shared, thread: Some(thread), answers })
    }

    /// True once [`RolloutJob::wait`] will not block.
    pub fn is_done(&self) -> bool {
        self.shared.lock().is_done
    }

    /// Answers that have ended so far, and answers in all.
    pub fn progress(&self) -> (usize, usize) {
        (self.shared.lock().ended, self.answers)
    }

    /// Blocks until the rollout is done, at most for `timeout`. True if it is done.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.shared.wait_timeout(timeout)
    }

    /// A watch on this rollout that another thread can keep.
    pub fn watch(&self) -> RolloutWatch {
        RolloutWatch { shared: self.shared.clone(), answers: self.answers }
    }

    /// Asks it to stop, within one step; it then fails with `Cancelled`.
    pub fn cancel(&self) {
        self.shared.cancel();
    }

    /// Blocks until the rollout is done and returns its data.
    ///
    /// # Errors
    /// See [`Model::rollout`].
    pub fn wait(mut self) -> Result<Rollout> {
        self.join();
        let result = self.shared.lock().result.take();
        result.unwrap_or_else(|| Err(Error::internal("a rollout without a result")))
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Its panics are caught inside.
            let _ = thread.join();
        }
    }
}

impl Drop for RolloutJob {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.cancel();
            self.join();
        }
    }
}

/// Watches a rollout without owning it.
#[derive(Clone)]
pub struct RolloutWatch {
    shared: Arc<Shared>,
    answers: usize,
}

impl RolloutWatch {
    /// See [`RolloutJob::progress`].
    pub fn progress(&self) -> (usize, usize) {
        (self.shared.lock().ended, self.answers)
    }

    /// See [`RolloutJob::wait_timeout`].
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        self.shared.wait_timeout(timeout)
    }

    /// See [`RolloutJob::cancel`].
    pub fn cancel(&self) {
        self.shared.cancel();
    }

    /// How the rollout ended; `None` while it has not.
    pub fn ending(&self) -> Option<Ending> {
        self.shared.lock().ending
    }

    /// Has `observer` called when the rollout ends, on its thread, or at once if it has; see [`JobWatch::on_change`].
    pub fn on_change(&self, observer: impl Fn() + Send + Sync + 'static) {
        let mut inner = self.shared.lock();
        if !inner.is_done {
            inner.observer = Some(Arc::new(observer));
            return;
        }
        drop(inner);
        observer();
    }
}

fn no_thread(e: std::io::Error) -> Error {
    Error::new(ErrorKind::HostMemory, format!("cannot start a thread: {e}"))
}

/// What the rollout's thread does.
struct Work {
    shared: Arc<Shared>,
    /// Its job would fail if it were freed.
    _policy: Model,
    sampling: Job<Vec<SampledSequence>>,
    reference: Option<ReferenceScorer>,
    rewards: Vec<RewardScorer>,
    /// Label and weight of each reward.
    parts: Vec<(usize, f32)>,
    n: usize,
    advantage: Advantage,
    clip_reward: Option<(f32, f32)>,
    begun: Instant,
}

impl Work {
    fn run(self) -> Result<Rollout> {
        let Work { shared, _policy, sampling, reference, rewards, parts, n, advantage, clip_reward, begun } = self;
        let (rewards, reference) = start(rewards, reference, &shared)?;
        follow(&sampling, n, |answer| {
            // By an update, say: what still has to be scored would be of the weights after it.
            if sampling.is_cancelled() {
                shared.cancel();
            }
            shared.lock().ended += 1;
            rewards.iter().for_each(|worker| worker.send(&answer));
            reference.iter().for_each(|worker| worker.send(&answer));
        });
        let cost = sampling.stats();
        let sampled = sampling.wait();
        let sampled_in = begun.elapsed();
        if sampled.is_err() {
            shared.cancel();
        }
        // All threads end before the first error is returned: whose failure cancelled the others is asked first.
        let reference = reference.map(Worker::finish).transpose();
        let rewards: Vec<_> = rewards.into_iter().map(Worker::finish).collect();
        let mut errors: Vec<Error> = rewards.iter().filter_map(|r| r.as_ref().err().cloned()).collect();
        errors.extend(reference.as_ref().err().cloned());
        errors.extend(sampled.as_ref().err().cloned());
        errors.sort_by_key(|e| e.kind() == ErrorKind::Cancelled);
        if let Some(error) = errors.into_iter().next() {
            return Err(error);
        }
        if shared.is_cancelled() {
            return Err(cancelled());
        }
        let (samples, reference) = (sampled?, reference?);
        let reference: Option<Vec<SequenceLogprobs>> = match reference {
            Some(scores) => Some(scores.into_iter().collect::<Option<_>>().ok_or_else(unscored)?),
            None => None,
        };
        let scores = rewards.into_iter().collect::<Result<Vec<_>>>()?;
        if scores.iter().any(|s| s.len() != samples.len()) {
            return Err(Error::internal("a rollout with answers that were not scored"));
        }
        let value =
            |score: &Option<SequenceScore>, label: usize| score.as_ref().map_or(f32::NAN, |s| s.score.values[label]);
        let values = |(scores, (label, _)): (&Scores, &(usize, f32))| scores.iter().map(|s| value(s, *label)).collect();
        let rewards: Vec<Vec<f32>> = scores.iter().zip(&parts).map(values).collect();
        let version = |score: &Option<SequenceScore>| score.as_ref().map_or(0, |s| s.weight_version);
        let reward_versions = scores.iter().map(|scores| scores.iter().map(version).collect()).collect();
        let weights: Vec<f32> = parts.iter().map(|(_, weight)| *weight).collect();
        let reward = total(&rewards, &weights, samples.len(), clip_reward)?;
        let kl = reference.iter().flatten().zip(&samples).map(|(r, s)| kl(s, r)).collect::<Result<_>>()?;
        Ok(Rollout {
            advantages: advantage.of(&reward, n),
            groups: advantage::groups(&reward, n),
            samples,
            reference,
            kl,
            rewards,
            reward_versions,
            reward,
            sampling: cost,
            sampled_in,
            elapsed: begun.elapsed(),
        })
    }
}

type Workers = (Vec<Worker<SequenceScore>>, Option<Worker<SequenceLogprobs>>);

/// Starts every scorer's thread, or none: those that were started have ended when another one's start fails.
fn start(rewards: Vec<RewardScorer>, reference: Option<ReferenceScorer>, shared: &Arc<Shared>) -> Result<Workers> {
    let mut started = Vec::with_capacity(rewards.len());
    let all = || {
        for (i, scorer) in rewards.into_iter().enumerate() {
            started.push(Worker::start(scorer, POLICY + 2 + i, shared)?);
        }
        reference.map(|scorer| Worker::start(scorer, POLICY + 1, shared)).transpose()
    };
    match all() {
        Ok(reference) => Ok((started, reference)),
        Err(error) => {
            // They have nothing to do yet, and so nothing to say.
            started.into_iter().for_each(|worker| drop(worker.finish()));
            Err(error)
        }
    }
}

/// Hands every answer on when it has ended.
fn follow(sampling: &Job<Vec<SampledSequence>>, n: usize, each: impl Fn(Ended)) {
    let mut seen = 0;
    loop {
        let ended = sampling.ended_after(seen, |index, finished| match finished {
            Finished::Sampled(sampled) => Ended {
                index,
                prompt: index / n,
                ids: sampled.tokens.iter().map(|t| t.id).collect(),
                text: sampled.text.clone().unwrap_or_default(),
                is_cut_off: sampled.finish == Finish::Cancelled,
            },
            // A sampling job has no such results; one would fail as it is read.
            Finished::Read { .. } => {
                Ended { index, prompt: index / n, ids: Vec::new(), text: String::new(), is_cut_off: true }
            }
        });
        if ended.is_empty() {
            return;
        }
        seen += ended.len();
        ended.into_iter().for_each(&each);
    }
}

/// What a reward model says of each answer.
type Scores = Vec<Option<SequenceScore>>;

fn unscored() -> Error {
    Error::internal("a sampled token without its reference log-probability")
}

fn kl(sample: &SampledSequence, reference: &SequenceLogprobs) -> Result<Kl> {
    let known: Option<Vec<f32>> = reference.logprobs.iter().copied().collect();
    let known = known.filter(|k| k.len() == sample.tokens.len());
    let known = known.ok_or_else(unscored)?;
    Ok(Kl::new(sample.tokens.iter().map(|t| t.model_logprob).zip(known)))
}

/// The weighted sum of what is not NaN.
fn total(rewards: &[Vec<f32>], weights: &[f32], sequences: usize, clip: Option<(f32, f32)>) -> Result<Vec<f32>> {
    let of = |i: usize| {
        let known = || rewards.iter().zip(weights).filter(|(r, _)| !r[i].is_nan());
        if known().next().is_none() {
            return Ok(f32::NAN);
        }
        let sum = known().map(|(r, w)| f64::from(*w) * f64::from(r[i])).sum::<f64>() as f32;
        let sum = clip.map_or(sum, |(low, high)| sum.clamp(low, high));
        let text = || format!("the weighted sum of the rewards of answer {i} is {sum}");
        if sum.is_finite() { Ok(sum) } else { Err(Error::new(ErrorKind::NonFinite, text())) }
    };
    (0..sequences).map(of).collect()
}

/// A model that scores answers as they come.
struct Worker<T> {
    answers: Sender<Ended>,
    thread: JoinHandle<Result<Vec<Option<T>>>>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(scorer: impl Scorer<Score = T>, owner: usize, shared: &Arc<Shared>) -> Result<Self> {
        let (answers, waiting) = channel();
        let shared = shared.clone();
        let run = move || {
            let scores = catch_unwind(AssertUnwindSafe(|| score(&scorer, owner, &waiting, &shared)))
                .unwrap_or_else(|panic| Err(Error::internal(panic_text(&*panic))));
            if scores.is_err() {
                shared.cancel();
            }
            scores
        };
        let thread = std::thread::Builder::new().name("rewardrt-scorer".into()).spawn(run).map_err(no_thread)?;
        Ok(Worker { answers, thread })
    }

    fn send(&self, answer: &Ended) {
        // A worker that has gone has failed, and says so at the end.
        let _ = self.answers.send(answer.clone());
    }

    /// The scores in the order of the answers; `None` for what the model does not take.
    fn finish(self) -> Result<Vec<Option<T>>> {
        drop(self.answers);
        self.thread.join().unwrap_or_else(|panic| Err(Error::internal(panic_text(&*panic))))
    }
}

/// One job at a time, with all answers that have ended meanwhile: few, large steps where the model is the slower one.
fn score<T>(
    scorer: &impl Scorer<Score = T>,
    owner: usize,
    waiting: &Receiver<Ended>,
    shared: &Shared,
) -> Result<Vec<Option<T>>> {
    let mut scores: BTreeMap<usize, Option<T>> = BTreeMap::new();
    while let Ok(first) = waiting.recv() {
        let mut indices = Vec::new();
        let mut inputs = Vec::new();
        for answer in std::iter::once(first).chain(waiting.try_iter()).take(PER_JOB) {
            match scorer.read(&answer)? {
                Some(input) => {
                    indices.push(answer.index);
                    inputs.push(input);
                }
                None => drop(scores.insert(answer.index, None)),
            }
        }
        if inputs.is_empty() {
            continue;
        }
        let job = enter(scorer, &inputs, shared)?;
        shared.watch(owner, job.watch());
        scores.extend(indices.into_iter().zip(job.wait()?.into_iter().map(Some)));
    }
    Ok(scores.into_values().collect())
}

/// Submits, when there is room in the queue.
fn enter<T>(scorer: &impl Scorer<Score = T>, inputs: &[Input], shared: &Shared) -> Result<Job<Vec<T>>> {
    let [mut wait, longest] = FULL_WAIT;
    loop {
        if shared.is_cancelled() {
            return Err(cancelled());
        }
        match scorer.submit(inputs) {
            Err(e) if e.kind() == ErrorKind::Full => {
                std::thread::sleep(wait);
                wait = (2 * wait).min(longest);
            }
            result => return result,
        }
    }
}
