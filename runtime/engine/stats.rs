//! What the work cost. A row is one position of one sequence going through the model once.

use std::time::Duration;

/// What a job has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobStats {
    /// From submission until its first sequence began.
    pub queued: Duration,
    /// From submission until now, or until it was done.
    pub elapsed: Duration,
    /// Rows computed.
    pub rows: Rows,
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Times one of its sequences had to make room and be computed again.
    pub preemptions: u64,
}

/// Rows, by why they were computed; and those that were not, because the cache had them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Of prompts and of texts that are scored.
    pub prefill: u64,
    /// Of sampled tokens.
    pub decode: u64,
    /// Of drafted tokens; the accepted ones are among them.
    pub drafted: u64,
    /// Drafted tokens that turned out to be the sampled ones.
    pub accepted: u64,
    /// Computed before, and again after a preemption.
    pub recomputed: u64,
    /// Found in the cache: a prefix that another sequence or an earlier turn computed.
    pub cached: u64,
}

impl Rows {
    /// Rows that went through the model.
    pub fn computed(&self) -> u64 {
        self.prefill + self.decode + self.drafted + self.recomputed
    }

    pub(super) fn add(&mut self, other: Rows) {
        self.prefill += other.prefill;
        self.decode += other.decode;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.recomputed += other.recomputed;
        self.cached += other.cached;
    }
}

/// What a model has done since it was loaded, and what it is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelStats {
    /// Steps run.
    pub steps: u64,
    /// Time spent in steps, scheduling included.
    pub step_time: Duration,
    /// Rows of all steps.
    pub rows: Rows,
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Jobs that are not done.
    pub jobs: usize,
    /// Sequences that take part in steps.
    pub running: usize,
    /// Sequences that wait for their turn.
    pub waiting: usize,
    /// The longest time that a sequence waited between submission and its first step.
    pub longest_wait: Duration,
    /// Times a sequence had to make room and be computed again.
    pub preemptions: u64,
    /// KV blocks of 16 positions.
    pub kv_blocks: usize,
    /// KV blocks that sequences use.
    pub kv_used: usize,
    /// KV blocks that nobody uses and that are kept for whoever begins with the same tokens.
    pub kv_cached: usize,
    /// KV blocks whose content was given up for another one's.
    pub kv_evictions: u64,
    /// KV blocks copied for a sequence that goes on from the middle of one.
    pub kv_copies: u64,
    /// Contents of adapters on the device: of those that are loaded, and of replaced or dropped ones that sequences still use.
    pub adapters: usize,
    /// Bytes that they take.
    pub adapter_bytes: u64,
}

/// What a runtime has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuntimeStats {
    /// Jobs that are not done.
    pub jobs: usize,
    /// Positions that these jobs can come to; bounded by `max_queued_tokens`.
    pub queued_tokens: usize,
    /// Jobs submitted since the runtime was opened.
    pub submitted: u64,
    /// Jobs refused because the queue was full.
    pub refused: u64,
}
