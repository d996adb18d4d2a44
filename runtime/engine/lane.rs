//! One model's sequences: who waits, who runs, and what goes into the next step.
//!
//! Waiting sequences start in the order of their jobs' priority, then of who has the fewest running. Of the running
//! ones the older keep their KV blocks; where blocks run out the youngest gives up its own and is computed again later,
//! with the same results, since nothing that is computed for a sequence depends on the others. The oldest always goes
//! on, and any one sequence fits into the cache alone, so every sequence comes to its end.

mod adapters;
mod pack;
mod quiesce;

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use adapters::Adapters;
use pack::{Owner, Packed};
pub use quiesce::InFlight;
pub(crate) use quiesce::{Holds, Quiesce};

use super::angles::Angles;
use super::job::JobState;
use super::kv::{KvCache, Root};
use super::sequence::{Adapted, Finish, Finished, NewSequence, Purpose, Role, Sequence};
use super::stats::ModelStats;
use crate::backend::{Capacity, Executor, NO_ADAPTER, Output, Step};
use crate::error::{Error, ErrorKind};
use crate::model::Rope;

pub(crate) struct Lane {
    executor: Box<dyn Executor>,
    angles: Angles,
    max_rows: usize,
    max_table_entries: usize,
    /// Decode steps that are computed before anybody looks at what was drawn.
    steps_at_once: usize,
    /// What results call the weights.
    version: u64,
    /// What the cache calls them.
    generation: u64,
    kv: KvCache,
    adapters: Adapters,
    /// By number, which is the order of submission.
    jobs: BTreeMap<u64, LaneJob>,
    next_job: u64,
    next_seniority: u64,
    running: Vec<Sequence>,
    stats: ModelStats,
    published: Arc<Mutex<ModelStats>>,
    /// Results that are handed over once the books are closed: who has waited for a job finds it counted as done.
    results: Vec<(Arc<JobState>, usize, Finished)>,
    /// After a lost device, or with half-written weights, every further step would fail or be wrong.
    broken: Option<Error>,
    /// Why it takes no steps.
    pub holds: Holds,
    /// What was let go of while wishes were fulfilled.
    freed: Released,
    /// Who waits for it to come to rest.
    wishes: VecDeque<Quiesce>,
}

struct LaneJob {
    state: Arc<JobState>,
    waiting: VecDeque<Sequence>,
    running: usize,
    /// Results that are still owed.
    owed: usize,
    /// What it counts for in the queue.
    positions: usize,
    started: bool,
}

/// What computes keys and values under these weights.
fn root(generation: u64, adapter: Option<&Adapted>) -> Root {
    Root { generation, adapter: adapter.map_or(0, |a| a.content.id) }
}

/// What the lane is done with.
#[derive(Clone, Copy, Default)]
pub(crate) struct Released {
    pub jobs: usize,
    pub positions: usize,
}

impl std::ops::AddAssign for Released {
    fn add_assign(&mut self, other: Self) {
        self.jobs += other.jobs;
        self.positions += other.positions;
    }
}

impl Lane {
    pub fn new(
        executor: Box<dyn Executor>,
        rope: Rope,
        capacity: Capacity,
        steps_at_once: Option<usize>,
        version: u64,
        published: Arc<Mutex<ModelStats>>,
    ) -> Self {
        let steps_at_once = steps_at_once.unwrap_or(executor.steps_at_once());
        Lane {
            executor,
            angles: Angles::new(rope),
            max_rows: capacity.max_rows,
            max_table_entries: capacity.max_table_entries(),
            steps_at_once,
            version,
            generation: 0,
            kv: KvCache::new(capacity.kv_blocks),
            adapters: Adapters::default(),
            jobs: BTreeMap::new(),
            next_job: 0,
            next_seniority: 0,
            running: Vec::new(),
            stats: ModelStats::default(),
            published,
            results: Vec::new(),
            broken: None,
            holds: Holds::default(),
            freed: Released::default(),
            wishes: VecDeque::new(),
        }
    }

    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.executor
    }

    /// What computes a sequence's keys and values.
    fn root(&self, sequence: &Sequence) -> Root {
        root(self.generation, sequence.adapter.as_ref())
    }

    /// Takes a job in, or fails it if the device is gone.
    pub fn enqueue(&mut self, state: Arc<JobState>, sequences: Vec<NewSequence>, positions: usize) -> Released {
        let nothing = Released { jobs: 1, positions };
        if let Some(error) = &self.broken {
            state.fail(error.clone());
            return nothing;
        }
        let number = self.next_job;
        self.next_job += 1;
        let trained = self.angles.length_dependent_above();
        let (mut waiting, mut owed, mut index) = (VecDeque::new(), 0, 0);
        for new in sequences {
            let results = new.results();
            // A text of one token has no log-prob to read.
            if matches!(&new.purpose, Purpose::Read(wants) if wants.is_empty()) {
                self.results.push((
                    state.clone(),
                    index,
                    Finished::Read { outputs: Vec::new(), version: self.version },
                ));
            } else {
                let adapter = match self.adapters.find(new.adapter.as_ref()) {
                    Ok(adapter) => adapter,
                    Err(error) => {
                        state.fail(error);
                        return nothing;
                    }
                };
                let path = self.kv.path(root(self.generation, adapter.as_ref()));
                waiting.push_back(Sequence::new(state.clone(), number, index, new, adapter, path, trained));
                owed += results;
            }
            index += results;
        }
        if owed == 0 {
            return nothing;
        }
        self.jobs.insert(number, LaneJob { state, waiting, running: 0, owed, positions, started: false });
        Released::default()
    }

    /// Runs one step if there is work.
    pub fn advance(&mut self) -> Released {
        if self.rests() {
            return self.tend();
        }
        let begin = Instant::now();
        let mut released = self.tend();
        if self.rests() {
            return released;
        }
        self.admit();
        let packed = self.pack();
        released += self.run(packed);
        // Not before: outputs go by places in `running`.
        self.requeue_preempted();
        self.free_adapters();
        if !self.running.is_empty() || released.jobs > 0 {
            self.stats.step_time += begin.elapsed();
        }
        self.publish();
        released
    }

    /// Hands results over.
    pub fn deliver(&mut self) {
        for (job, index, result) in self.results.drain(..) {
            job.finish(index, result);
        }
    }

    /// Executes a packed step and hands its outputs out.
    fn run(&mut self, packed: Packed) -> Released {
        let copies = self.kv.take_copies();
        if packed.rows.is_empty() {
            // Time goes on for those who wait for others, and copies must not be lost.
            let copied = if copies.is_empty() { Ok(()) } else { self.executor.copy_blocks(&copies) };
            self.kv.end_step();
            return match copied {
                Ok(()) => self.sweep(),
                Err(error) => self.break_down(error),
            };
        }
        let (tables, kinds) = (&packed.tables, packed.kinds);
        let steps: Vec<&Packed> = std::iter::once(&packed).chain(&packed.ahead).collect();
        let mut as_given = Vec::new();
        for Packed { rows, cos_sin, outputs, adapters, .. } in &steps {
            let adapters = if adapters.iter().all(|a| *a == NO_ADAPTER) { &[][..] } else { adapters };
            as_given.push(Step { rows, tables, cos_sin, outputs, adapters });
        }
        let begin = Instant::now();
        let copied = self.executor.copy_blocks(&copies);
        let results = copied.and_then(|()| self.executor.steps(&as_given));
        let owners: Vec<Owner> = steps.iter().flat_map(|p| p.owners.iter().copied()).collect();
        let results = results.map(|steps| steps.into_iter().flatten().collect::<Vec<_>>());
        match results {
            Ok(results) if results.len() == owners.len() => {
                self.stats.steps += steps.len() as u64;
                self.stats.rows.add(kinds);
                log::debug!(
                    "step {} ({} at once): {} rows (prefill {}, decode {}, drafted {}, again {}), {} outputs, {} running, {} of {} KV blocks used, {:.2} ms",
                    self.stats.steps,
                    steps.len(),
                    steps.iter().map(|p| p.rows.len()).sum::<usize>(),
                    kinds.prefill,
                    kinds.decode,
                    kinds.drafted,
                    kinds.recomputed,
                    owners.len(),
                    self.running.len(),
                    self.kv.total() - self.kv.available(),
                    self.kv.total(),
                    begin.elapsed().as_secs_f64() * 1e3
                );
                self.hand_out(owners, results);
                self.kv.end_step();
                self.sweep()
            }
            Ok(_) => self.break_down(Error::internal("the executor returned another number of outputs")),
            Err(error) => self.break_down(error),
        }
    }

    /// A step failed: nobody knows what is in the cache.
    fn break_down(&mut self, error: Error) -> Released {
        if error.kind() == ErrorKind::DeviceLost {
            self.broken = Some(error.clone());
        }
        self.fail_all(&error)
    }

    /// Ends every job with `error`.
    pub fn fail_all(&mut self, error: &Error) -> Released {
        let mut released = Released::default();
        self.running.clear();
        for (_, job) in std::mem::take(&mut self.jobs) {
            job.state.fail(error.clone());
            released += Released { jobs: 1, positions: job.positions };
        }
        self.kv.clear();
        self.publish();
        released
    }

    fn publish(&mut self) {
        self.stats.jobs = self.jobs.len();
        self.stats.running = self.running.len();
        self.stats.waiting = self.jobs.values().map(|j| j.owed).sum::<usize>().saturating_sub(self.running.len());
        self.stats.kv_blocks = self.kv.total();
        self.stats.kv_used = self.kv.total() - self.kv.available();
        self.stats.kv_cached = self.kv.idle();
        self.stats.kv_evictions = self.kv.evictions;
        self.stats.kv_copies = self.kv.copied;
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = self.stats;
    }

    /// Counts from here. What is going on stays.
    pub fn reset_stats(&mut self) {
        let ModelStats { adapters, adapter_bytes, .. } = self.stats;
        self.stats = ModelStats { adapters, adapter_bytes, ..ModelStats::default() };
        self.kv.reset_counts();
        self.publish();
    }

    /// True if it has no jobs and nothing keeps it from taking some.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && !self.holds.any()
    }

    /// Lets go of jobs that were cancelled, are late or have failed.
    fn drop_stopped(&mut self) -> Released {
        let mut released = Released::default();
        let stopped: Vec<u64> = self.jobs.iter().filter(|(_, j)| j.state.is_stopped()).map(|(n, _)| *n).collect();
        for number in stopped {
            let Some(job) = self.jobs.remove(&number) else { continue };
            released += Released { jobs: 1, positions: job.positions };
            let (ours, others): (Vec<_>, Vec<_>) = self.running.drain(..).partition(|s| s.job_number == number);
            self.running = others;
            for mut sequence in ours.into_iter().chain(job.waiting) {
                self.kv.release(&mut sequence.path);
                if sequence.job.has_failed() {
                    continue;
                }
                if let Role::Sample { .. } = sequence.role {
                    sequence.finish_all(Finish::Cancelled, &mut self.results);
                } else {
                    let why = if sequence.job.is_late() { "its deadline passed" } else { "it was cancelled" };
                    sequence.job.fail(Error::new(ErrorKind::Cancelled, format!("the job did not finish: {why}")));
                }
            }
        }
        released
    }

    /// Starts waiting sequences while there are blocks and rows for them.
    fn admit(&mut self) {
        // Blocks that running sequences are sure to take.
        let sure = |s: &Sequence| KvCache::needed(s.tokens.ids.len()).saturating_sub(s.path.blocks.len());
        let mut promised: usize = self.running.iter().map(sure).sum();
        loop {
            let order = |(number, job): &(&u64, &LaneJob)| {
                (Reverse(job.state.options.scheduling.priority), job.running, **number)
            };
            let waiting = |(_, j): &(&u64, &LaneJob)| self.next_waiting(j).is_some();
            let Some((&number, job)) = self.jobs.iter().filter(waiting).min_by_key(order) else { return };
            let priority = job.state.options.scheduling.priority;
            let Some(place) = self.next_waiting(job) else { return };
            let first = &job.waiting[place];
            let limit = first.cacheable();
            let (there, unused) = self.kv.probe(self.root(first), |p| first.tokens.key(p), limit);
            let needed = KvCache::needed(first.tokens.ids.len()) - there;
            // Room for some of the running ones to grow; a sequence alone may have it all.
            let spare = self.running.len().div_ceil(4);
            let fits = needed + unused + promised + spare <= self.kv.available();
            if self.running.len() >= self.max_rows || !(fits || self.running.is_empty()) {
                if self.preempt_below(priority) {
                    promised = self.running.iter().map(sure).sum();
                    continue;
                }
                return;
            }
            promised += needed + unused;
            let seniority = self.next_seniority;
            self.next_seniority += 1;
            let Some(job) = self.jobs.get_mut(&number) else { return };
            let Some(mut sequence) = job.waiting.remove(place) else { return };
            job.running += 1;
            sequence.start(seniority);
            if let Some(started) = sequence.started() {
                let waited = started - job.state.submitted;
                self.stats.longest_wait = self.stats.longest_wait.max(waited);
                if !job.started {
                    job.started = true;
                    job.state.count(|stats| stats.queued = waited);
                }
            }
            self.running.push(sequence);
        }
    }

    /// Makes the youngest running sequence of a lower priority wait again.
    fn preempt_below(&mut self, priority: i32) -> bool {
        let lower = |s: &&mut Sequence| s.job.options.scheduling.priority < priority;
        let youngest = |s: &&mut Sequence| (Reverse(s.job.options.scheduling.priority), s.seniority);
        let Some(victim) = self.running.iter_mut().filter(lower).max_by_key(youngest) else { return false };
        victim.preempted = true;
        self.kv.release(&mut victim.path);
        self.requeue_preempted();
        true
    }

    /// Puts sequences that lost their blocks back to the head of their job.
    fn requeue_preempted(&mut self) {
        if !self.running.iter().any(|s| s.preempted) {
            return;
        }
        let (mut preempted, running): (Vec<_>, Vec<_>) = self.running.drain(..).partition(|s| s.preempted);
        self.running = running;
        // The oldest comes first again.
        preempted.sort_by_key(|s| Reverse(s.seniority));
        for mut sequence in preempted {
            sequence.preempted = false;
            self.stats.preemptions += 1;
            sequence.job.count(|stats| stats.preemptions += 1);
            if let Some(job) = self.jobs.get_mut(&sequence.job_number) {
                job.running -= 1;
                job.waiting.push_front(sequence);
            }
        }
    }

    /// Ends a sequence that samples, with its siblings.
    fn end(&mut self, i: usize, finish: Finish) {
        let sequence = &mut self.running[i];
        let results = sequence.finish_all(finish, &mut self.results);
        sequence.ended = true;
        self.kv.release(&mut sequence.path);
        if let Some(job) = self.jobs.get_mut(&sequence.job_number) {
            job.owed -= results;
        }
    }

    /// Gives outputs to their sequences.
    fn hand_out(&mut self, owners: Vec<Owner>, outputs: Vec<Output>) {
        for (owner, output) in owners.into_iter().zip(outputs) {
            let sequence = &mut self.running[owner.sequence];
            if sequence.ended || sequence.job.has_failed() {
                continue;
            }
            if owner.sibling > 0 {
                self.begin_sibling(owner, output);
                continue;
            }
            // After a guess that was wrong, what was computed from it is void.
            if owner.position >= sequence.path.computed {
                continue;
            }
            if let Role::Sample { siblings, .. } = &mut sequence.role {
                *siblings = 0;
            }
            match sequence.accept(owner.position, output, self.version) {
                Ok(finished) => {
                    if let Role::Sample { sampler, .. } = &mut sequence.role
                        && finished.is_none()
                    {
                        let position = owner.position + 1;
                        // The row after it is computed already if it was fed with the draw, or with a guess that was right.
                        let is_fed = sampler.ahead > 0;
                        sampler.ahead = sampler.ahead.saturating_sub(1);
                        let is_guessed = !is_fed && sampler.confirms(sequence.tokens.ids[position]);
                        if is_fed || is_guessed {
                            self.kv.pack(&mut sequence.path, position, sequence.tokens.key(position));
                            sequence.seen = sequence.seen.max(position + 1);
                        }
                        if is_guessed {
                            sequence.job.count(|stats| stats.rows.accepted += 1);
                            self.stats.rows.accepted += 1;
                        }
                    }
                    self.note_output(owner.sequence, finished);
                }
                Err(error) => sequence.job.fail(error),
            }
        }
        for sequence in self.running.iter_mut().filter(|s| s.packed && !s.ended) {
            sequence.stream();
        }
    }

    /// Counts a token, if the output was one, and ends the sequence if it is finished.
    fn note_output(&mut self, i: usize, finished: Option<Finished>) {
        let sequence = &mut self.running[i];
        if let Role::Sample { .. } = sequence.role {
            self.stats.sampled_tokens += 1;
            sequence.job.count(|stats| stats.sampled_tokens += 1);
        }
        if let Some(finished) = finished {
            self.results.push((sequence.job.clone(), sequence.index, finished));
            sequence.ended = true;
            self.kv.release(&mut sequence.path);
            if let Some(job) = self.jobs.get_mut(&sequence.job_number) {
                job.owed -= 1;
            }
        }
    }

    /// Lets another sample part from the first one where both take their first token. Where there is no room for it, it
    /// waits, and starts from what the cache still has then.
    fn begin_sibling(&mut self, owner: Owner, output: Output) {
        let first = &self.running[owner.sequence];
        let has_slot = self.running.len() < self.max_rows;
        let fork = if has_slot { self.kv.fork(&first.path) } else { None };
        let runs = fork.is_some();
        let root = self.root(first);
        let path = fork.unwrap_or_else(|| self.kv.path(root));
        let Some(mut sibling) = first.sibling(owner.sibling, path) else { return };
        match sibling.accept(owner.position, output, self.version) {
            Ok(finished) => {
                let ended = finished.is_some();
                if let Some(job) = self.jobs.get_mut(&sibling.job_number) {
                    if runs || ended {
                        job.running += 1;
                    } else {
                        sibling.stream();
                        sibling.job.count(|stats| stats.sampled_tokens += 1);
                        job.waiting.push_front(sibling);
                        self.stats.sampled_tokens += 1;
                        return;
                    }
                }
                sibling.packed = true;
                self.running.push(sibling);
                self.note_output(self.running.len() - 1, finished);
            }
            Err(error) => {
                self.kv.release(&mut sibling.path);
                sibling.job.fail(error);
            }
        }
    }

    /// Removes sequences that ended, and jobs that owe nothing any more.
    fn sweep(&mut self) -> Released {
        let mut released = Released::default();
        if !self.running.iter().any(|s| s.ended) {
            return released;
        }
        for sequence in self.running.extract_if(.., |s| s.ended) {
            if let Some(job) = self.jobs.get_mut(&sequence.job_number) {
                job.running -= 1;
                if job.owed == 0 {
                    released += Released { jobs: 1, positions: job.positions };
                    self.jobs.remove(&sequence.job_number);
                }
            }
        }
        released
    }
}
