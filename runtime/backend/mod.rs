//! Two executors of the same [`Plan`](crate::model::Plan): [`cpu`] and [`gpu`].

pub mod cpu;
pub mod gpu;
mod profile;

use std::collections::HashSet;
use std::sync::Arc;

pub(crate) use profile::{Cost, Costs, Profile, kernel_name};
pub use profile::{KernelTime, Limits};

use crate::error::{Error, Result};
use crate::kernels::embed::FROM_DRAW;
use crate::kernels::{RowMeta, adjust_logits, sample, top_k};
use crate::weights::{AdapterWeights, Weights};

/// What a row asks for once its final hidden state is there.
#[derive(Clone, Debug)]
pub enum Want {
    /// The logits of the score head.
    Score,
    /// The next-token logits of these tokens only.
    Tokens(Arc<[u32]>),
    /// The log-probability of `target` as the next token.
    Logprob {
        /// Checked against the vocabulary by the engine.
        target: u32,
        /// How many of the most likely tokens to report.
        top: usize,
    },
    /// A next token.
    Sample(Box<Sampling>),
}

/// What a draw is made from.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// The backend fills in where its edits and its mask are.
    pub request: sample::Request,
    /// Rising tokens below V, none twice.
    pub edits: Vec<adjust_logits::Edit>,
    /// One bit a token, ⌈V / 32⌉ words; `None`: every token may be drawn.
    pub mask: Option<Arc<[u32]>>,
    /// How many of the most likely tokens to report, as the model has them.
    pub top: usize,
}

impl Want {
    /// True if the row needs logits over the whole vocabulary.
    fn needs_vocabulary(&self) -> bool {
        matches!(self, Want::Logprob { .. } | Want::Sample(_))
    }

    fn top(&self) -> usize {
        match self {
            Want::Logprob { top, .. } => *top,
            Want::Sample(sampling) => sampling.top,
            _ => 0,
        }
    }
}

/// Two different KV blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Whose content is copied.
    pub from: u32,
    /// Where it goes.
    pub to: u32,
}

/// A row that wants something; several may be the same row.
#[derive(Clone, Debug)]
pub struct OutputRow {
    /// Index into [`Step::rows`].
    pub row: u32,
    /// What it wants.
    pub want: Want,
}

/// One ragged forward: packed rows of any number of sequences.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// T rows; those of a sequence in rising position.
    pub rows: &'a [RowMeta],
    /// The block lists of the sequences, one after the other; at most [`Capacity::max_table_entries`].
    pub tables: &'a [u32],
    /// cos and sin of every row's angles: [T, 2, E/2].
    pub cos_sin: &'a [f32],
    /// The rows that want something; at most [`Capacity::max_rows`].
    pub outputs: &'a [OutputRow],
    /// The adapter of every row, by the slot it was added under, or [`NO_ADAPTER`]; empty where no row has one.
    pub adapters: &'a [u32],
}

/// In [`Step::adapters`]: the row is computed by the base model alone.
pub const NO_ADAPTER: u32 = u32::MAX;

/// What the vocabulary says about one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenStats {
    /// ln p of the token: temperature 1, whole vocabulary.
    pub logprob: f32,
    /// Entropy of that distribution, in nats.
    pub entropy: f32,
    /// The most likely tokens and their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// The answer to a [`Want`], in the order of [`Step::outputs`].
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// For `Score` and `Tokens`.
    Logits(Vec<f32>),
    /// For `Logprob`.
    Logprob(TokenStats),
    /// For `Sample`.
    Sampled {
        /// The draw.
        drawn: sample::Drawn,
        /// The drawn token in the unmodified distribution.
        stats: TokenStats,
        /// The tokens that could have been drawn, rising; empty if they are more than was asked for.
        kept_ids: Vec<u32>,
    },
}

/// The weights of a model as its device holds them. Cheap to clone.
#[derive(Clone)]
pub enum DeviceWeights {
    /// For a [`cpu::CpuExecutor`].
    Cpu(Arc<cpu::CpuWeights>),
    /// For a [`gpu::GpuExecutor`].
    Gpu(Arc<gpu::Resident>),
}

/// Makes a model's tensors ready for its device, on any thread, while steps run.
pub trait Loader: Send + Sync {
    /// What is made of tensors that `changed` does not name is taken over from `held`.
    ///
    /// # Errors
    /// `DeviceMemory`, `HostMemory`, `NonFinite` (a weight that cannot be quantised) or an error of the device.
    fn load(&self, weights: &Weights, held: Option<&DeviceWeights>, changed: &HashSet<String>)
    -> Result<DeviceWeights>;
}

/// A loaded model that executes steps.
pub trait Executor: Send {
    /// Executes one step. On an error nothing of it counts; the KV slots it wrote are undefined.
    ///
    /// # Errors
    /// `DeviceLost`, `DeviceMemory`, `HostMemory` or `Gpu`.
    fn step(&mut self, step: &Step) -> Result<Vec<Output>>;

    /// Executes steps one after the other, all with the same block tables. The token of a row may be [`FROM_DRAW`] with the
    /// number of an output of the step before: the token that was drawn there. Where there are several, all outputs are
    /// draws that [`feeds`](Executor::feeds) allows; together they have at most [`Capacity::max_rows`] rows.
    ///
    /// [`FROM_DRAW`]: crate::kernels::embed::FROM_DRAW
    ///
    /// # Errors
    /// As [`Executor::step`], for all of them.
    fn steps(&mut self, steps: &[Step]) -> Result<Vec<Vec<Output>>> {
        let mut results: Vec<Vec<Output>> = Vec::new();
        for step in steps {
            let mut rows = step.rows.to_vec();
            for row in rows.iter_mut().filter(|r| r.token >= FROM_DRAW) {
                row.token = match results.last().and_then(|r| r.get((row.token - FROM_DRAW) as usize)) {
                    // What follows a row without a draw ends in that row's error.
                    Some(Output::Sampled { drawn, .. }) if drawn.token == top_k::NO_TOKEN => 0,
                    Some(Output::Sampled { drawn, .. }) => drawn.token,
                    _ => return Err(Error::internal("a token from something that is not a draw")),
                };
            }
            results.push(self.step(&Step { rows: &rows, ..*step })?);
        }
        Ok(results)
    }

    /// How many decode steps are best computed before their results are read.
    fn steps_at_once(&self) -> usize {
        1
    }

    /// True if such draws, with `top` alternatives, may be made in [`steps`](Executor::steps) that follow one another.
    fn feeds(&self, _request: &sample::Request, _top: usize) -> bool {
        true
    }

    /// Copies whole KV blocks in every layer, one pair after the other, before the next step.
    ///
    /// # Errors
    /// As [`Executor::step`].
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()>;

    /// Makes new weights ready for [`install`](Executor::install).
    fn loader(&self) -> Arc<dyn Loader>;

    /// The weights in use; `None` after [`unload`](Executor::unload).
    fn weights(&self) -> Option<DeviceWeights>;

    /// Computes the next step with these weights. True if the KV cache had to be made anew for them.
    ///
    /// # Errors
    /// As [`Executor::step`]; the weights are as before then.
    fn install(&mut self, weights: DeviceWeights) -> Result<bool>;

    /// Lets go of the weights. No step may come before [`install`](Executor::install).
    fn unload(&mut self);

    /// Frees the KV cache. No step may come before [`restore_cache`](Executor::restore_cache).
    fn free_cache(&mut self);

    /// Allocates the KV cache again; what was in it is gone.
    ///
    /// # Errors
    /// `DeviceMemory`, `HostMemory` or `DeviceLost`.
    fn restore_cache(&mut self) -> Result<()>;
    /// Makes an adapter known under a slot that no other one has, unless all adapters would then take more than `room`
    /// bytes. Slots are small numbers, given anew when they are free.
    ///
    /// # Errors
    /// `Limit` beyond `room`, `HostMemory`, or an error of the device; nothing has changed then.
    fn add_adapter(&mut self, slot: u32, adapter: Arc<AdapterWeights>, room: u64) -> Result<()>;

    /// Forgets an adapter, which no later step names.
    fn remove_adapter(&mut self, slot: u32);

    /// Bytes held for weights, KV cache and activations.
    fn memory(&self) -> Memory;

    /// Times every kernel from the next step on, or no longer.
    ///
    /// # Errors
    /// `Unsupported` if the device cannot.
    fn set_profiling(&mut self, on: bool) -> Result<()>;

    /// What the kernels have cost since the last call; empty where nothing was timed.
    fn take_profile(&mut self) -> Vec<KernelTime>;

    /// Measures what the device does at best, which takes about a second.
    ///
    /// # Errors
    /// As [`Executor::step`].
    fn limits(&mut self) -> Result<Limits>;
}

/// Bytes a loaded model holds. Weights that are memory-mapped count under `mapped`, not `weights`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Weights in allocated memory of the device.
    pub weights: u64,
    /// Weights used in place in mapped files.
    pub mapped: u64,
    /// The KV cache's full size.
    pub kv_cache: u64,
    /// Activations and logits.
    pub scratch: u64,
    /// Weights in host memory beside those of a GPU: what was put by updates, for later ones and for waking up.
    pub host: u64,
    /// Adapters, with what steps that have some need besides.
    pub adapters: u64,
}

impl Memory {
    /// Everything that is allocated: what a memory budget bounds.
    pub fn allocated(&self) -> u64 {
        self.weights + self.kv_cache + self.scratch + self.host + self.adapters
    }
}

/// How a device holds a model, as far as sizes depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Bytes of a key's or value's element.
    pub kv_element: usize,
    /// Rows of weights come in multiples of this.
    pub weight_rows: usize,
}

/// Sizes an executor is built for.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Largest T of a step.
    pub max_rows: usize,
    /// KV blocks of [`crate::kernels::KV_BLOCK`] positions.
    pub kv_blocks: usize,
}

impl Capacity {
    /// Entries of a step's block tables at most. Sequences that share blocks list them each for itself; one sequence
    /// always fits.
    pub fn max_table_entries(&self) -> usize {
        self.kv_blocks + 64 * self.max_rows
    }
}

/// Rows whose logits over the whole vocabulary exist at a time: bounded whatever T is.
pub(crate) fn logit_rows(vocab: usize) -> usize {
    const BUDGET_BYTES: usize = 16 << 20;
    (BUDGET_BYTES / (4 * vocab)).clamp(4, 64)
}

/// Log-probabilities of the best tokens.
fn top_logprobs(best: &[top_k::Candidate], logprob: impl Fn(f32) -> f32) -> Vec<(u32, f32)> {
    best.iter().filter(|c| c.token != top_k::NO_TOKEN).map(|c| (c.token, logprob(c.logit))).collect()
}
