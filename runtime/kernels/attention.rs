//! Causal attention of each row over its own sequence in the paged cache, with a sliding window where there is one.
//!
//! out[t, h] = Σ_j softmax_j(q[t, h] · key[j] · scale) · value[j] over the keys j of kv head h·G/H. Keys are taken a
//! block of P at a time, from the first that the window admits, with a running maximum: the order is a function of
//! the position alone.

use std::ops::Range;

use super::lanes::{Lanes, for_each_isa};
use super::rms_norm::{for_lanes, load, store};
use super::{KV_BLOCK, RowMeta, SharedMut};

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T.
    pub rows: u32,
    /// H.
    pub heads: u32,
    /// G.
    pub kv_heads: u32,
    /// E.
    pub head_dim: u32,
    /// 1/√E.
    pub scale: f32,
    /// Keys a query sees, itself included; 0: all.
    pub window: u32,
}

super::kernel!(
    "attention",
    Params,
    [("rows", Read), ("tables", Read), ("q", Read), ("keys", Read), ("values", Read), ("out", Write)]
);

/// Largest E: what the twins keep in registers and on the stack.
pub const MAX_HEAD_DIM: usize = 512;

/// One call: what all its tasks share.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub inputs: Inputs<'a>,
    /// [T, H·E].
    pub out: SharedMut<'a>,
}

for_each_isa! {
    /// The CPU twin for some rows of one sequence and one kv head (the H/G heads that share it).
    ///
    /// The elements of `out` must be this task's own (the condition of [`SharedMut::slice`]).
    pub(crate) fn attention(call: Call, rows: Range<usize>, kv_head: usize) = body
}

/// Rows of a sequence that one task takes: a block of keys is read once for all of them.
pub(crate) const ROWS_PER_TASK: usize = 8;

/// Cuts the rows of a step into runs of one sequence, at most [`ROWS_PER_TASK`] long.
pub(crate) fn row_runs(rows: &[RowMeta]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.len() < ROWS_PER_TASK && rows[run.start].table == row.table => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

/// What one attention call reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// T rows.
    pub rows: &'a [RowMeta],
    /// Block lists.
    pub tables: &'a [u32],
    /// [T, H·E].
    pub q: &'a [f32],
    /// [blocks, G, E, P].
    pub keys: &'a [f32],
    /// [blocks, G, P, E].
    pub values: &'a [f32],
    /// H.
    pub heads: usize,
    /// G.
    pub kv_heads: usize,
    /// E.
    pub head_dim: usize,
    /// Keys a query sees, itself included.
    pub window: Option<usize>,
}

/// The whole call on one thread: for tests and benches. `out` is [T, H·E].
///
/// # Panics
/// If a length does not fit, or a table names a block that is not there.
pub fn attention_alone(isa: super::Isa, inputs: Inputs, out: &mut [f32]) {
    assert_eq!(out.len(), inputs.rows.len() * inputs.heads * inputs.head_dim);
    let call = Call { inputs, out: SharedMut::new(out) };
    for run in row_runs(inputs.rows) {
        for kv_head in 0..inputs.kv_heads {
            attention(isa, call, run.clone(), kv_head);
        }
    }
}

/// First key that a query at `position` sees.
pub fn first_key(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

/// A query on its way through the keys.
struct Query<'a> {
    q: &'a [f32],
    out: &'a mut [f32],
    /// First and last key it sees.
    first: usize,
    last: usize,
    max: f32,
    total: f32,
}

#[inline(always)]
fn body<L: Lanes>(call: Call, rows: Range<usize>, kv_head: usize) {
    let Call { inputs, out } = call;
    let (e, group) = (inputs.head_dim, inputs.heads / inputs.kv_heads);
    let mut queries = Vec::with_capacity(rows.len() * group);
    for row in rows.clone() {
        let last = inputs.rows[row].position as usize;
        for head in kv_head * group..(kv_head + 1) * group {
            let start = (row * inputs.heads + head) * e;
            // SAFETY: these rows' heads belong to this task, by the condition of `attention`.
            let out = unsafe { out.slice(start..start + e) };
            out.fill(0.0);
            let first = first_key(last, inputs.window);
            let q = &inputs.q[start..start + e];
            queries.push(Query { q, out, first, last, max: f32::NEG_INFINITY, total: 0.0 });
        }
    }
    let first = queries.iter().map(|q| q.first).min().unwrap_or(0);
    let last = queries.iter().map(|q| q.last).max().unwrap_or(0);
    let table = inputs.rows[rows.start].table as usize;
    // Which queries share the loop changes nothing for any of them: each takes its own blocks, in order.
    for block in first / KV_BLOCK..=last / KV_BLOCK {
        let at = (inputs.tables[table + block] as usize * inputs.kv_heads + kv_head) * e * KV_BLOCK;
        let (keys, values) = (&inputs.keys[at..at + e * KV_BLOCK], &inputs.values[at..at + e * KV_BLOCK]);
        for query in &mut queries {
            if (query.first / KV_BLOCK..=query.last / KV_BLOCK).contains(&block) {
                query.take_block::<L>(block, keys, values);
            }
        }
    }
    for query in queries {
        let inverse = 1.0 / query.total;
        query.out.iter_mut().for_each(|v| *v *= inverse);
    }
}

impl Query<'_> {
    #[inline(always)]
    fn take_block<L: Lanes>(&mut self, block: usize, keys: &[f32], values: &[f32]) {
        let scale = 1.0 / (self.q.len() as f32).sqrt();
        let mut scores = [0.0f32; KV_BLOCK];
        block_scores::<L>(self.q, keys, scale, &mut scores);
        let start = block * KV_BLOCK;
        let seen = self.first.saturating_sub(start)..(self.last - start + 1).min(KV_BLOCK);
        let mut max = self.max;
        for (j, score) in scores.iter_mut().enumerate() {
            if !seen.contains(&j) {
                *score = f32::NEG_INFINITY;
            } else if *score > max || score.is_nan() {
                max = *score;
            }
        }
        let shrink = if self.max == f32::NEG_INFINITY { 0.0 } else { exp_one::<L>(self.max - max) };
        let mut weights = [0.0f32; KV_BLOCK];
        for_lanes::<L>(KV_BLOCK, |i, n| {
            // SAFETY: i + n ≤ KV_BLOCK.
            unsafe { store(load::<L>(&scores, i, n).sub(L::splat(max)).exp(), &mut weights, i, n) };
        });
        self.total = self.total * shrink + weights.iter().sum::<f32>();
        self.max = max;
        add_values::<L>(self.out, values, &weights, seen, shrink);
    }
}

#[inline(always)]
fn exp_one<L: Lanes>(x: f32) -> f32 {
    L::splat(x).exp().first()
}

/// scores[j] = scale · Σ_e q[e] · keys[e, j]: four running sums over e ≡ 0, 1, 2, 3 (mod 4), so that one product need
/// not wait for the last one, then (0 + 1) + (2 + 3).
#[inline(always)]
fn block_scores<L: Lanes>(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32; KV_BLOCK]) {
    const { assert!(KV_BLOCK.is_multiple_of(16)) };
    assert!(keys.len() >= q.len() * KV_BLOCK);
    let whole = q.len() - q.len() % 4;
    let mut j = 0;
    while j < KV_BLOCK {
        let mut sums = [L::zero(); 4];
        let mut e = 0;
        while e < whole {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: keys is [E, P] and j + lanes ≤ P, since every lane count divides P.
                let key = unsafe { load::<L>(keys, (e + i) * KV_BLOCK + j, L::N) };
                *sum = sum.mul_add(L::splat(q[e + i]), key);
            }
            e += 4;
        }
        for (i, sum) in sums.iter_mut().enumerate().take(q.len() - whole) {
            // SAFETY: as above.
            let key = unsafe { load::<L>(keys, (e + i) * KV_BLOCK + j, L::N) };
            *sum = sum.mul_add(L::splat(q[e + i]), key);
        }
        let [a, b, c, d] = sums;
        let sum = a.add(b).add(c.add(d));
        // SAFETY: j + lanes ≤ P.
        unsafe { store(sum.mul(L::splat(scale)), scores, j, L::N) };
        j += L::N;
    }
}

/// out ← out · shrink + Σ_j weights[j] · values[j] over the keys that are seen, in rising j.
#[inline(always)]
fn add_values<L: Lanes>(out: &mut [f32], values: &[f32], weights: &[f32; KV_BLOCK], seen: Range<usize>, shrink: f32) {
    /// Sums side by side: enough to hide the latency of an addition.
    const WIDE: usize = 8;
    let e = out.len();
    assert!(values.len() >= e * KV_BLOCK && seen.end <= KV_BLOCK);
    let mut i = 0;
    while i + WIDE * L::N <= e {
        // SAFETY: i + WIDE · lanes ≤ e, the length of `out` and of every value row.
        unsafe {
            let mut sums: [L; WIDE] = std::array::from_fn(|k| load::<L>(out, i + k * L::N, L::N).mul(L::splat(shrink)));
            for j in seen.clone() {
                let weight = L::splat(weights[j]);
                for (k, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.mul_add(weight, load::<L>(values, j * e + i + k * L::N, L::N));
                }
            }
            for (k, sum) in sums.into_iter().enumerate() {
                store(sum, out, i + k * L::N, L::N);
            }
        }
        i += WIDE * L::N;
    }
    while i < e {
        let n = (e - i).min(L::N);
        // SAFETY: i + n ≤ e.
        unsafe {
            let mut sum = load::<L>(out, i, n).mul(L::splat(shrink));
            for j in seen.clone() {
                sum = sum.mul_add(L::splat(weights[j]), load::<L>(values, j * e + i, n));
            }
            store(sum, out, i, n);
        }
        i += n;
    }
}
