//! Causal attention of each row over its own sequence in the paged cache, with a sliding window where there is one.
//!
//! out[t, h] = Σ_j softmax_j(q[t, h] · key[j] · scale) · value[j] over the keys j of kv head h·G/H. Keys are taken a
//! block of P at a time, from the first that the window admits, with a running maximum: the order is a function of
//! the position alone.

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
    pub rows: &'a [RowMeta],
    pub tables: &'a [u32],
    /// [T, H·E].
    pub q: &'a [f32],
    /// [blocks, G, E, P].
    pub keys: &'a [f32],
    /// [blocks, G, P, E].
    pub values: &'a [f32],
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
    /// [T, H·E].
    pub out: SharedMut<'a>,
}

for_each_isa! {
    /// The CPU twin for one row and one kv head (the H/G heads that share it).
    ///
    /// The elements of `out` must be this task's own (the condition of [`SharedMut::slice`]).
    pub(crate) fn attention(call: Call, row: usize, kv_head: usize) = body
}

/// The arrays of one attention call, for [`attention_alone`].
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
    let Inputs { rows, tables, q, keys, values, heads, kv_heads, head_dim, window } = inputs;
    assert_eq!(out.len(), rows.len() * heads * head_dim);
    let out = SharedMut::new(out);
    let call = Call { rows, tables, q, keys, values, heads, kv_heads, head_dim, window, out };
    for task in 0..rows.len() * kv_heads {
        attention(isa, call, task / kv_heads, task % kv_heads);
    }
}

/// First key that a query at `position` sees.
pub fn first_key(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

#[inline(always)]
fn body<L: Lanes>(call: Call, row: usize, kv_head: usize) {
    let group = call.heads / call.kv_heads;
    for h in kv_head * group..(kv_head + 1) * group {
        one_head::<L>(&call, row, kv_head, h);
    }
}

#[inline(always)]
fn one_head<L: Lanes>(call: &Call, row: usize, kv_head: usize, head: usize) {
    let e = call.head_dim;
    let meta = call.rows[row];
    let last = meta.position as usize;
    let first = first_key(last, call.window);
    let start = (row * call.heads + head) * e;
    let q = &call.q[start..start + e];
    // SAFETY: this row's head belongs to this task, by the condition of `attention`.
    let out = unsafe { call.out.slice(start..start + e) };
    out.fill(0.0);

    let scale = 1.0 / (e as f32).sqrt();
    let (mut max, mut total) = (f32::NEG_INFINITY, 0.0f32);
    for block in first / KV_BLOCK..=last / KV_BLOCK {
        let at = (call.tables[meta.table as usize + block] as usize * call.kv_heads + kv_head) * e * KV_BLOCK;
        let mut scores = [0.0f32; KV_BLOCK];
        block_scores::<L>(q, &call.keys[at..at + e * KV_BLOCK], scale, &mut scores);
        let seen = first.saturating_sub(block * KV_BLOCK)..(last - block * KV_BLOCK + 1).min(KV_BLOCK);
        let mut block_max = max;
        for (j, score) in scores.iter_mut().enumerate() {
            if !seen.contains(&j) {
                *score = f32::NEG_INFINITY;
            } else if *score > block_max || score.is_nan() {
                block_max = *score;
            }
        }
        let shrink = if max == f32::NEG_INFINITY { 0.0 } else { exp_one::<L>(max - block_max) };
        let mut weights = [0.0f32; KV_BLOCK];
        for_lanes::<L>(KV_BLOCK, |i, n| {
            // SAFETY: i + n ≤ KV_BLOCK.
            unsafe { store(load::<L>(&scores, i, n).sub(L::splat(block_max)).exp(), &mut weights, i, n) };
        });
        total = total * shrink + weights.iter().sum::<f32>();
        max = block_max;
        let values = &call.values[at..at + e * KV_BLOCK];
        for_lanes::<L>(e, |i, n| {
            // SAFETY: i + n ≤ e, the length of `out` and of every value row.
            unsafe {
                let mut sum = load::<L>(out, i, n).mul(L::splat(shrink));
                for j in seen.clone() {
                    sum = sum.mul_add(L::splat(weights[j]), load::<L>(values, j * e + i, n));
                }
                store(sum, out, i, n);
            }
        });
    }
    let inverse = 1.0 / total;
    for v in out {
        *v *= inverse;
    }
}

#[inline(always)]
fn exp_one<L: Lanes>(x: f32) -> f32 {
    L::splat(x).exp().first()
}

/// scores[j] = scale · Σ_e q[e] · keys[e, j], in rising e.
#[inline(always)]
fn block_scores<L: Lanes>(q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32; KV_BLOCK]) {
    const { assert!(KV_BLOCK.is_multiple_of(16)) };
    let mut j = 0;
    while j < KV_BLOCK {
        let mut sum = L::zero();
        for (e, q) in q.iter().enumerate() {
            // SAFETY: keys is [E, P] and j + lanes ≤ P, since every lane count divides P.
            sum = sum.mul_add(L::splat(*q), unsafe { load::<L>(keys, e * KV_BLOCK + j, L::N) });
        }
        // SAFETY: j + lanes ≤ P.
        unsafe { store(sum.mul(L::splat(scale)), scores, j, L::N) };
        j += L::N;
    }
}
