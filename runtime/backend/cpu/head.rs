//! What follows the final norm: one pass over blocks of the vocabulary, each reduced while it is in the cache.
//!
//! A block of logits leaves its log-sum-exp statistics and the logits of targets in it. Whole rows of logits are kept
//! for rows that sample or ask for the best tokens, for a bounded number of rows at a time.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

use super::CpuExecutor;
use crate::backend::{Output, OutputRow, Step, TokenStats, Want, logit_rows, top_logprobs};
use crate::error::{Result, try_vec};
use crate::kernels::adjust_logits::{adjust_logits, raw_logit};
use crate::kernels::linear::{self, Arithmetic, Hint, ROW_BLOCK, Source, Weight};
use crate::kernels::log_sum_exp::{CHUNK, Stats, log_sum_exp};
use crate::kernels::{Isa, MatrixView, SharedMut, sample, top_k};
use crate::model::{Buf, Head};
use crate::weights::Dtype;

/// The output rows by what they need of the vocabulary.
pub(super) struct Order {
    /// Positions in `Step::outputs`: rows that keep their logits, then other rows over the vocabulary, then the rest.
    outputs: Vec<usize>,
    /// Their rows in the step.
    pub rows: Vec<u32>,
    /// How many keep their logits.
    kept: usize,
    /// How many need the vocabulary.
    vocabulary: usize,
}

fn keeps_logits(want: &Want) -> bool {
    matches!(want, Want::Sample(_)) || want.top() > 0
}

impl Order {
    pub(super) fn new(outputs: &[OutputRow]) -> Self {
        let mut order: Vec<usize> = (0..outputs.len()).collect();
        order.sort_by_key(|&i| (!keeps_logits(&outputs[i].want), !outputs[i].want.needs_vocabulary()));
        let count = |f: fn(&Want) -> bool| outputs.iter().filter(|o| f(&o.want)).count();
        Order {
            rows: order.iter().map(|&i| outputs[i].row).collect(),
            outputs: order,
            kept: count(keeps_logits),
            vocabulary: count(Want::needs_vocabulary),
        }
    }
}

/// Rows over the vocabulary at a time where no logits are kept: what their packed inputs take.
const MOST_ROWS: usize = 1024;

/// The block of logits, and the statistics of every chunk of the vocabulary.
pub(super) fn scratch_bytes(vocab: usize, max_rows: usize) -> u64 {
    let statistics = vocab.div_ceil(CHUNK) * max_rows.min(MOST_ROWS) * size_of::<Stats>();
    4 * (logit_rows(vocab) * vocab) as u64 + statistics as u64
}

/// What a thread keeps: z, weights and members of a row that is sampled, and half a MiB for sums and widened weights.
pub(super) fn thread_bytes(vocab: usize) -> u64 {
    16 * vocab as u64 + (512 << 10)
}

thread_local! {
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static SCRATCH: RefCell<sample::Scratch> = RefCell::default();
}

impl CpuExecutor {
    pub(super) fn head(&mut self, step: &Step, order: &Order) -> Result<Vec<Output>> {
        let mut results: Vec<Option<Output>> = vec![None; step.outputs.len()];
        let wants: Vec<&Want> = order.outputs.iter().map(|&i| &step.outputs[i].want).collect();
        let mut put = |first: usize, outputs: Vec<Option<Output>>| {
            for (i, output) in outputs.into_iter().enumerate() {
                results[order.outputs[first + i]] = output;
            }
        };
        let kept_rows = logit_rows(self.spec.vocab_size);
        for (rows, most) in [(0..order.kept, kept_rows), (order.kept..order.vocabulary, MOST_ROWS)] {
            for start in rows.clone().step_by(most) {
                let rows = start..rows.end.min(start + most);
                put(start, self.vocabulary_rows(rows.clone(), &wants[rows], start < order.kept)?);
            }
        }
        put(order.vocabulary, self.single_rows(&order.rows, order.vocabulary, &wants[order.vocabulary..]));
        Ok(results.into_iter().flatten().collect())
    }

    /// Rows that need the whole vocabulary; `keep`: whole rows of logits are there at the end of the pass.
    fn vocabulary_rows(&mut self, rows: Range<usize>, wants: &[&Want], keep: bool) -> Result<Vec<Option<Output>>> {
        let (vocab, d) = (self.spec.vocab_size, self.spec.hidden_size);
        let count = rows.len();
        let kept = if keep { count * vocab } else { 0 };
        if self.logits.len() < kept {
            self.logits = Vec::new();
            self.logits = try_vec("logits", 0.0, kept)?;
        }
        let chunks = vocab.div_ceil(CHUNK);
        let mut stats: Vec<Stats> = try_vec("statistics", Stats::default(), chunks * count)?;
        let mut target_logits = vec![f32::NAN; count];
        let targets: Vec<usize> = wants
            .iter()
            .map(|want| if let Want::Logprob { target, .. } = want { *target as usize } else { usize::MAX })
            .collect();
        let mut logits = std::mem::take(&mut self.logits);
        {
            let (isa, pool) = (self.options.isa, self.options.pool.clone());
            let mut buffer = std::mem::take(&mut self.packed);
            let weight = self.weight(self.plan.head);
            let arithmetic = Arithmetic::of(isa, self.options.precision, [weight]);
            let x = &self.buffers[Buf::Final as usize][rows.start * d..rows.end * d];
            let packed = buffer.pack(isa, &pool, arithmetic, Source { x, rows: count, k: d, norm: None });
            let (all_stats, all_logits) = (SharedMut::new(&mut stats), SharedMut::new(&mut logits));
            let all_targets = SharedMut::new(&mut target_logits);
            pool.run(chunks, &|c| {
                let cols = c * CHUNK..vocab.min((c + 1) * CHUNK);
                let width = cols.len();
                let next = Hint::at(&weight, vocab.min((c + pool.threads()) * CHUNK));
                SUMS.with_borrow_mut(|sums| {
                    sums.resize(sums.len().max(ROW_BLOCK * CHUNK), 0.0);
                    for first in (0..count).step_by(ROW_BLOCK) {
                        let block = first..count.min(first + ROW_BLOCK);
                        linear::column_sums(isa, &packed, block.clone(), &weight, cols.clone(), sums, next);
                        for (r, sums) in block.zip(sums.chunks_exact(width)) {
                            // SAFETY: elements that belong to this chunk alone; a target is in one chunk.
                            unsafe {
                                all_stats.slice(r * chunks + c..r * chunks + c + 1)[0] = log_sum_exp(isa, sums);
                                if cols.contains(&targets[r]) {
                                    all_targets.slice(r..r + 1)[0] = sums[targets[r] - cols.start];
                                }
                                if keep {
                                    all_logits
                                        .slice(r * vocab + cols.start..r * vocab + cols.end)
                                        .copy_from_slice(sums);
                                }
                            }
                        }
                    }
                });
            });
            self.packed = buffer;
        }
        let outputs: Vec<Mutex<Option<Output>>> = wants.iter().map(|_| Mutex::new(None)).collect();
        let isa = self.options.isa;
        // A row is a pass over the vocabulary where it samples, and a sum over the chunks otherwise.
        let cost = if keep { vocab } else { 16 * chunks };
        let all_logits = SharedMut::new(&mut logits);
        self.options.pool.over_rows(count, cost, &|rows| {
            for r in rows {
                let chunk_stats = &stats[r * chunks..(r + 1) * chunks];
                // SAFETY: a row belongs to one task.
                let row = if keep { unsafe { all_logits.slice(r * vocab..(r + 1) * vocab) } } else { &mut [] };
                let output = read_row(isa, row, target_logits[r], chunk_stats, wants[r]);
                *outputs[r].lock().unwrap_or_else(|e| e.into_inner()) = output;
            }
        });
        self.logits = logits;
        Ok(outputs.into_iter().map(|m| m.into_inner().unwrap_or_else(|e| e.into_inner())).collect())
    }

    /// Output rows from `first` on that need a few rows of the head only: single tokens as the whole vocabulary would have
    /// them, or a score head, in f32. `step_rows`: where the output rows are in the step.
    fn single_rows(&mut self, step_rows: &[u32], first: usize, wants: &[&Want]) -> Vec<Option<Output>> {
        let (d, isa) = (self.spec.hidden_size, self.options.isa);
        let mut buffer = std::mem::take(&mut self.packed);
        let x = &self.buffers[Buf::Final as usize][first * d..(first + wants.len()) * d];
        let weight = self.weight(self.plan.head);
        let arithmetic = match self.spec.head {
            Head::LanguageModel { .. } => Arithmetic::of(isa, self.options.precision, [weight]),
            Head::SequenceClassification { .. } => Arithmetic::Fma,
        };
        let packed =
            buffer.pack(isa, &self.options.pool, arithmetic, Source { x, rows: wants.len(), k: d, norm: None });
        let outputs: Vec<Mutex<Option<Output>>> = wants.iter().map(|_| Mutex::new(None)).collect();
        let columns = wants.iter().map(|w| if let Want::Tokens(t) = w { t.len() } else { weight.rows() }).max();
        self.options.pool.over_rows(wants.len(), d * columns.unwrap_or(0), &|rows| {
            for r in rows {
                let mut logits;
                if let Want::Tokens(tokens) = wants[r] {
                    logits = vec![0.0; tokens.len()];
                    for (logit, &token) in logits.chunks_exact_mut(1).zip(tokens.iter()) {
                        let col = token as usize;
                        linear::column_sums(isa, &packed, r..r + 1, &weight, col..col + 1, logit, Hint::NONE);
                    }
                } else {
                    let own = self.adapters.head(step_rows[first + r]).map(|head| {
                        let bytes = bytemuck::cast_slice(head);
                        Weight::Stored(MatrixView::new(Dtype::F32, bytes, weight.rows(), weight.cols()))
                    });
                    let weight = own.unwrap_or(weight);
                    logits = vec![0.0; weight.rows()];
                    linear::column_sums(isa, &packed, r..r + 1, &weight, 0..weight.rows(), &mut logits, Hint::NONE);
                }
                *outputs[r].lock().unwrap_or_else(|e| e.into_inner()) = Some(Output::Logits(logits));
            }
        });
        self.packed = buffer;
        outputs.into_iter().map(|m| m.into_inner().unwrap_or_else(|e| e.into_inner())).collect()
    }
}

/// Reads what a row wants off its logits, which sampling may change, and their statistics.
fn read_row(isa: Isa, logits: &mut [f32], target: f32, chunks: &[Stats], want: &Want) -> Option<Output> {
    let stats = Stats::join(chunks);
    let best = if want.top() > 0 { top_k::top_k(logits, want.top()) } else { Vec::new() };
    let of = |logit: f32| TokenStats {
        logprob: stats.logprob(logit),
        entropy: stats.entropy(),
        top: top_logprobs(&best, |logit| stats.logprob(logit)),
    };
    match want {
        Want::Logprob { .. } => Some(Output::Logprob(of(target))),
        Want::Sample(sampling) => {
            let mut request = sampling.request;
            let mut edits = sampling.edits.clone();
            if sampling.mask.is_some() {
                request.mask_row = 0;
            }
            adjust_logits(&mut edits, sampling.mask.as_deref(), logits);
            let (mut drawn, kept_ids) = SCRATCH.with_borrow_mut(|scratch| {
                let drawn = sample::sample(isa, logits, &request, scratch);
                (drawn, sample::kept_ids(logits, &request, &drawn, scratch))
            });
            // NaN where nothing could be drawn.
            if drawn.token != top_k::NO_TOKEN {
                drawn.logit = raw_logit(&edits, logits, drawn.token);
            }
            Some(Output::Sampled { stats: of(drawn.logit), drawn, kept_ids })
        }
        _ => None,
    }
}
