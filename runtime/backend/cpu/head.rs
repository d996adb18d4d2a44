//! What follows the final norm: logits of a bounded block of rows at a time, reduced while they are in the cache.

use std::cell::RefCell;
use std::sync::Mutex;

use super::CpuExecutor;
use crate::backend::{Output, OutputRow, Step, TokenStats, Want, logit_rows, top_logprobs};
use crate::error::{Result, try_vec};
use crate::kernels::linear::{self, Product};
use crate::kernels::log_sum_exp::{CHUNK, Stats, log_sum_exp};
use crate::kernels::{MatrixView, SharedMut, sample, top_k};
use crate::model::Buf;

/// The output rows, those that need the whole vocabulary first.
pub(super) struct Order {
    /// Positions in `Step::outputs`.
    outputs: Vec<usize>,
    /// Their rows in the step.
    pub rows: Vec<u32>,
    /// How many need the vocabulary.
    vocabulary: usize,
}

impl Order {
    pub(super) fn new(outputs: &[OutputRow]) -> Self {
        let mut order: Vec<usize> = (0..outputs.len()).collect();
        order.sort_by_key(|&i| !outputs[i].want.needs_vocabulary());
        let vocabulary = outputs.iter().filter(|o| o.want.needs_vocabulary()).count();
        Order { rows: order.iter().map(|&i| outputs[i].row).collect(), outputs: order, vocabulary }
    }
}

impl CpuExecutor {
    pub(super) fn head(&mut self, step: &Step, order: &Order) -> Result<Vec<Output>> {
        let mut results: Vec<Option<Output>> = vec![None; step.outputs.len()];
        let wants: Vec<&Want> = order.outputs.iter().map(|&i| &step.outputs[i].want).collect();
        let block = logit_rows(self.spec.vocab_size);
        for start in (0..order.vocabulary).step_by(block) {
            let end = order.vocabulary.min(start + block);
            let outputs = self.vocabulary_block(start, &wants[start..end])?;
            for (i, output) in (start..end).zip(outputs) {
                results[order.outputs[i]] = Some(output);
            }
        }
        for i in order.vocabulary..wants.len() {
            results[order.outputs[i]] = Some(self.single_rows(i, wants[i]));
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// The rows from `start` on, whose logits fit the block.
    fn vocabulary_block(&mut self, start: usize, wants: &[&Want]) -> Result<Vec<Output>> {
        let (rows, vocab, d) = (wants.len(), self.spec.vocab_size, self.spec.hidden_size);
        if self.logits.len() < rows * vocab {
            self.logits = Vec::new();
            self.logits = try_vec("logits", 0.0, rows * vocab)?;
        }
        let mut logits = std::mem::take(&mut self.logits);
        let mut pool = std::mem::replace(&mut self.pool, super::Pool::new(1));
        let chunks = vocab.div_ceil(CHUNK);
        let stats: Vec<Mutex<Vec<Stats>>> = (0..chunks).map(|_| Mutex::new(Vec::new())).collect();
        {
            let x = &self.buffers[Buf::Final as usize][start * d..(start + rows) * d];
            let (isa, shared) = (self.isa, SharedMut::new(&mut logits));
            let product = Product { x, weight: self.matrix(self.plan.head), bias: None, out: shared };
            pool.run(chunks, &|c| {
                let cols = c * CHUNK..vocab.min((c + 1) * CHUNK);
                linear::linear(isa, product, 0..rows, cols.clone());
                let of_row = |r: usize| {
                    // SAFETY: this task's own columns, written just above.
                    log_sum_exp(isa, unsafe { shared.slice(r * vocab + cols.start..r * vocab + cols.end) })
                };
                *stats[c].lock().unwrap_or_else(|e| e.into_inner()) = (0..rows).map(of_row).collect();
            });
        }
        let stats: Vec<Vec<Stats>> =
            stats.into_iter().map(|m| m.into_inner().unwrap_or_else(|e| e.into_inner())).collect();
        let outputs: Vec<Mutex<Option<Output>>> = wants.iter().map(|_| Mutex::new(None)).collect();
        let isa = self.isa;
        pool.run(rows, &|r| {
            let of_row: Vec<Stats> = stats.iter().map(|chunk| chunk[r]).collect();
            let output = read_row(isa, &logits[r * vocab..(r + 1) * vocab], &Stats::join(&of_row), wants[r]);
            *outputs[r].lock().unwrap_or_else(|e| e.into_inner()) = output;
        });
        self.pool = pool;
        self.logits = logits;
        Ok(outputs.into_iter().filter_map(|m| m.into_inner().unwrap_or_else(|e| e.into_inner())).collect())
    }

    /// A row that needs a few rows of the head only.
    fn single_rows(&mut self, i: usize, want: &Want) -> Output {
        let (d, isa) = (self.spec.hidden_size, self.isa);
        let x = &self.buffers[Buf::Final as usize][i * d..(i + 1) * d];
        let head = self.matrix(self.plan.head);
        let mut logits = Vec::new();
        match want {
            Want::Tokens(tokens) => {
                for &token in tokens.iter() {
                    let row = MatrixView::new(head.dtype(), head.row(token as usize), 1, d);
                    let mut logit = [0.0];
                    linear::linear_alone(isa, x, row, None, &mut logit);
                    logits.push(logit[0]);
                }
            }
            _ => {
                logits.resize(head.rows(), 0.0);
                linear::linear_alone(isa, x, head, None, &mut logits);
            }
        }
        Output::Logits(logits)
    }
}

/// Reads what a row wants off its logits.
fn read_row(isa: crate::kernels::Isa, logits: &[f32], stats: &Stats, want: &Want) -> Option<Output> {
    thread_local! {
        static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let best = if want.top() > 0 { top_k::top_k(logits, want.top()) } else { Vec::new() };
    let token_stats = |token: u32| TokenStats {
        logprob: logits.get(token as usize).map_or(f32::NAN, |l| stats.logprob(*l)),
        entropy: stats.entropy(),
        top: top_logprobs(&best, |logit| stats.logprob(logit)),
    };
    match want {
        Want::Logprob { target, .. } => Some(Output::Logprob(token_stats(*target))),
        Want::Sample { request, seen, .. } => {
            let seen = seen.as_deref().unwrap_or_default();
            let drawn = SCRATCH.with_borrow_mut(|z| sample::sample(isa, logits, request, seen, z));
            Some(Output::Sampled { drawn, stats: token_stats(drawn.token) })
        }
        _ => None,
    }
}
