//! Causal attention of each row over its own sequence in the paged cache, with a sliding window where there is one.
//!
//! out[t, h] = Σ_j softmax_j(q[t, h] · key[j] · scale) · value[j] over the keys j of kv head h·G/H.
//!
//! The shader takes keys in chunks of 64 and segments of [`SEGMENT`], both at fixed positions; where long sequences leave
//! the GPU too few workgroups, its segments are computed side by side and joined by `attention_join`, to the same bits.
//!
//! The CPU twin takes keys in chunks of [`CHUNK`] at fixed positions, with a running maximum: the order is a function of
//! the position alone. Within a chunk, tiles of several queries (the heads that share a kv head, and neighbouring rows)
//! share each load of keys and values; a query's sums do not depend on who shares its tile.

use std::cell::Cell;
use std::ops::Range;

use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};
use super::{KV_BLOCK, RowMeta, SharedMut};

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T: rows of the step, which `partials` is laid out by.
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
    /// S: segments side by side. 1: a workgroup walks all segments of its tile and writes `out`. More, and no fewer than
    /// [`segments`]: each takes one and writes `partials`, for `attention_join`.
    pub segments: u32,
    /// First row of the step in `rows`.
    pub first_meta: u32,
    /// First tile of the step in `tiles`.
    pub first_tile: u32,
}

super::kernel!(
    "attention",
    Params,
    [
        ("rows", Read),
        ("tiles", Read),
        ("tables", Read),
        ("q", Read),
        ("keys", Read),
        ("values", Read),
        ("out", Write),
        ("partials", Write),
    ]
);

/// Keys of a segment on the GPU; segments begin at multiples of it.
pub const SEGMENT: usize = 1024;

/// Queries of a workgroup on the GPU: heads that share a kv head, of some rows. The shader's flags `HEAD_ABOVE_…` pick it
/// by the same limits.
pub const fn tile_queries(head_dim: usize) -> usize {
    match head_dim {
        0..=128 => 16,
        129..=256 => 8,
        _ => 4,
    }
}

/// Cuts the rows of a step into the tiles of the shader: [first row, rows], rows of one sequence at rising positions.
/// `group`: H/G.
pub fn tiles(rows: &[RowMeta], group: usize, head_dim: usize) -> Vec<[u32; 2]> {
    let most = (tile_queries(head_dim) / group).max(1) as u32;
    let mut tiles: Vec<[u32; 2]> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let follows = i > 0 && rows[i - 1].table == row.table && rows[i - 1].position < row.position;
        match tiles.last_mut() {
            Some([_, count]) if follows && *count < most => *count += 1,
            _ => tiles.push([i as u32, 1]),
        }
    }
    tiles
}

/// Segments that a tile sees, at most: the least S above 1 that a dispatch may have.
pub fn segments(rows: &[RowMeta], tiles: &[[u32; 2]], window: Option<usize>) -> usize {
    let seen = |&[first, count]: &[u32; 2]| {
        let position = |row: u32| rows[row as usize].position as usize;
        position(first + count - 1) / SEGMENT + 1 - first_key(position(first), window) / SEGMENT
    };
    tiles.iter().map(seen).max().unwrap_or(1)
}

/// Workgroups of the shader for so many tiles.
pub fn workgroups(params: &Params, tiles: usize) -> [u32; 3] {
    let head_tiles = (params.heads / params.kv_heads).div_ceil(tile_queries(params.head_dim as usize) as u32);
    [tiles as u32, params.kv_heads * head_tiles, params.segments.max(1)]
}

/// Floats of `partials`, for T rows and S segments.
pub fn partials_len(rows: usize, heads: usize, head_dim: usize, segments: usize) -> Option<usize> {
    segments.checked_mul(rows)?.checked_mul(heads)?.checked_mul(head_dim + 2)
}

/// Largest E: what the shader keeps in workgroup memory; the backends agree on it.
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

/// Keys that a query takes at a time; chunks begin at multiples of it.
const CHUNK: usize = 4 * KV_BLOCK;
const BLOCKS: usize = CHUNK / KV_BLOCK;

/// Rows of a sequence that one task takes: a chunk of keys is read once for all of them.
pub(crate) const ROWS_PER_TASK: usize = 16;

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

/// What one attention call reads; queries, keys and values are f32, or f16 for matrix units.
#[derive(Clone, Copy)]
pub struct Inputs<'a, T = f32> {
    /// T rows.
    pub rows: &'a [RowMeta],
    /// Block lists.
    pub tables: &'a [u32],
    /// [T, H·E].
    pub q: &'a [T],
    /// [blocks, G, E, P].
    pub keys: &'a [T],
    /// [blocks, G, P, E].
    pub values: &'a [T],
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
#[derive(Clone, Copy)]
struct Query {
    /// First and last key it sees.
    first: usize,
    last: usize,
    max: f32,
    total: f32,
    /// What its sums so far are multiplied by in this chunk.
    shrink: f32,
}

/// What the queries of a task keep, beside their sums in `out`.
#[derive(Default)]
struct Scratch {
    queries: Vec<Query>,
    /// [queries, CHUNK]: scores, then weights.
    weights: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// A chunk of keys and values: where its blocks lie. A block that nobody sees is represented by one that is there, and
/// what comes of it is masked.
struct Chunk<'a> {
    /// Position of its first key.
    start: usize,
    /// Each [E, P].
    keys: [&'a [f32]; BLOCKS],
    /// Each [P, E].
    values: [&'a [f32]; BLOCKS],
}

#[inline(always)]
fn body<L: Lanes>(call: Call, rows: Range<usize>, kv_head: usize) {
    let Call { inputs, out } = call;
    let (e, group) = (inputs.head_dim, inputs.heads / inputs.kv_heads);
    // The queries of a task: rows outside, heads inside.
    let place = |i: usize| ((rows.start + i / group) * inputs.heads + kv_head * group + i % group) * e;
    let count = rows.len() * group;
    let mut scratch = SCRATCH.take();
    scratch.queries.clear();
    for i in 0..count {
        let last = inputs.rows[rows.start + i / group].position as usize;
        let first = first_key(last, inputs.window);
        scratch.queries.push(Query { first, last, max: f32::NEG_INFINITY, total: 0.0, shrink: 0.0 });
        // SAFETY: these rows' heads belong to this task, by the condition of `attention`.
        unsafe { out.slice(place(i)..place(i) + e) }.fill(0.0);
    }
    scratch.weights.resize(count * CHUNK, 0.0);
    let first = scratch.queries.iter().map(|q| q.first).min().unwrap_or(0);
    let last = scratch.queries.iter().map(|q| q.last).max().unwrap_or(0);
    let table = &inputs.tables[inputs.rows[rows.start].table as usize..];
    for chunk in first / CHUNK..=last / CHUNK {
        let chunk = chunk_at(&inputs, table, kv_head, chunk, first / KV_BLOCK..last / KV_BLOCK + 1);
        let mut i = 0;
        while i < count {
            let seen = seen_of(&scratch.queries[i], &chunk);
            // Queries that see the same keys of the chunk may share a tile.
            let most = if L::REGISTERS >= 32 { 6 } else { 3 };
            let alike = |j: &usize| seen_of(&scratch.queries[*j], &chunk) == seen;
            let height = 1 + (i + 1..count.min(i + most)).take_while(alike).count();
            if !seen.is_empty() {
                let places: [usize; 6] = std::array::from_fn(|j| place(i + j.min(height - 1)));
                let tile = Tile { chunk: &chunk, seen, places, inputs: &inputs, out };
                let queries = &mut scratch.queries[i..i + height];
                let weights = &mut scratch.weights[i * CHUNK..(i + height) * CHUNK];
                match height {
                    1 => tile.take::<L, 1>(queries, weights),
                    2 => tile.take::<L, 2>(queries, weights),
                    3 => tile.take::<L, 3>(queries, weights),
                    4 => tile.take::<L, 4>(queries, weights),
                    5 => tile.take::<L, 5>(queries, weights),
                    _ => tile.take::<L, 6>(queries, weights),
                }
            }
            i += height;
        }
    }
    for (i, query) in scratch.queries.iter().enumerate() {
        let inverse = 1.0 / query.total;
        // SAFETY: as above.
        unsafe { out.slice(place(i)..place(i) + e) }.iter_mut().for_each(|v| *v *= inverse);
    }
    SCRATCH.set(scratch);
}

/// The keys of a chunk that a query sees, relative to the chunk.
#[inline(always)]
fn seen_of(query: &Query, chunk: &Chunk) -> Range<usize> {
    let clamp = |key: usize| key.saturating_sub(chunk.start).min(CHUNK);
    clamp(query.first)..clamp(query.last + 1)
}

/// `present`: the blocks that some query of the task sees.
#[inline(always)]
fn chunk_at<'a>(inputs: &Inputs<'a>, table: &[u32], kv_head: usize, chunk: usize, present: Range<usize>) -> Chunk<'a> {
    let size = inputs.head_dim * KV_BLOCK;
    let at: [usize; BLOCKS] = std::array::from_fn(|b| {
        let block = (chunk * BLOCKS + b).clamp(present.start, present.end - 1);
        (table[block] as usize * inputs.kv_heads + kv_head) * size
    });
    Chunk {
        start: chunk * CHUNK,
        keys: at.map(|at| &inputs.keys[at..at + size]),
        values: at.map(|at| &inputs.values[at..at + size]),
    }
}

/// Some queries that see the same keys of a chunk.
struct Tile<'a, 'b> {
    chunk: &'b Chunk<'a>,
    seen: Range<usize>,
    /// Where each query begins in q and in out.
    places: [usize; 6],
    inputs: &'b Inputs<'a>,
    out: SharedMut<'a>,
}

impl Tile<'_, '_> {
    /// One chunk further for NQ queries.
    #[inline(always)]
    fn take<L: Lanes, const NQ: usize>(&self, queries: &mut [Query], weights: &mut [f32]) {
        self.scores::<L, NQ>(weights);
        for (query, weights) in queries.iter_mut().zip(weights.chunks_exact_mut(CHUNK)) {
            if self.seen != (0..CHUNK) {
                weights[..self.seen.start].fill(f32::NEG_INFINITY);
                weights[self.seen.end..].fill(f32::NEG_INFINITY);
            }
            softmax_step::<L>(query, weights);
        }
        self.values::<L, NQ>(queries, weights);
    }

    /// scores[i, j] = scale · Σ_e q_i[e] · key_j[e], in rising e.
    #[inline(always)]
    fn scores<L: Lanes, const NQ: usize>(&self, scores: &mut [f32]) {
        /// Vectors of keys side by side.
        const WIDE: usize = 4;
        let e = self.inputs.head_dim;
        let scale = L::splat(1.0 / (e as f32).sqrt());
        let q: [&[f32]; NQ] = std::array::from_fn(|i| &self.inputs.q[self.places[i]..self.places[i] + e]);
        assert!(scores.len() >= NQ * CHUNK);
        let mut j = 0;
        while j < CHUNK {
            // Vector v holds the keys j + v · lanes …, which lie within one block.
            let keys: [*const f32; WIDE] = std::array::from_fn(|v| {
                let key = j + v * L::N;
                self.chunk.keys[key / KV_BLOCK].as_ptr().wrapping_add(key % KV_BLOCK)
            });
            let mut sums = [[L::zero(); WIDE]; NQ];
            for e in 0..e {
                // SAFETY: a block of keys is [E, P], e < E, and every lane count divides P; q_i has E elements.
                unsafe {
                    let keys: [L; WIDE] = std::array::from_fn(|v| L::load(keys[v].add(e * KV_BLOCK)));
                    for (sums, q) in sums.iter_mut().zip(q) {
                        let q = L::splat(*q.get_unchecked(e));
                        for (sum, key) in sums.iter_mut().zip(keys) {
                            *sum = sum.mul_add(q, key);
                        }
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    // SAFETY: i < NQ, j + (v + 1) · lanes ≤ CHUNK.
                    unsafe { sum.mul(scale).store(scores.as_mut_ptr().add(i * CHUNK + j + v * L::N)) };
                }
            }
            j += WIDE * L::N;
        }
    }

    /// out_i ← out_i · shrink_i + Σ_j weights[i, j] · value_j over the keys that are seen, in rising j.
    #[inline(always)]
    fn values<L: Lanes, const NQ: usize>(&self, queries: &[Query], weights: &[f32]) {
        let e = self.inputs.head_dim;
        let mut at = 0;
        while at < e {
            if at + 4 * L::N <= e {
                self.values_at::<L, NQ, 4>(queries, weights, at, L::N);
                at += 4 * L::N;
            } else {
                self.values_at::<L, NQ, 1>(queries, weights, at, L::N.min(e - at));
                at += L::N;
            }
        }
    }

    /// The elements from `at` on: WIDE vectors of `n` elements.
    #[inline(always)]
    fn values_at<L: Lanes, const NQ: usize, const WIDE: usize>(
        &self,
        queries: &[Query],
        weights: &[f32],
        at: usize,
        n: usize,
    ) {
        let e = self.inputs.head_dim;
        assert!(queries.len() >= NQ && weights.len() >= NQ * CHUNK && at + (WIDE - 1) * L::N + n <= e);
        let mut sums = [[L::zero(); WIDE]; NQ];
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: this task's own elements; at + … + n ≤ E.
            unsafe {
                let out = self.out.slice(self.places[i]..self.places[i] + e);
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = load::<L>(out, at + v * L::N, n).mul(L::splat(queries[i].shrink));
                }
            }
        }
        for (b, values) in self.chunk.values.iter().enumerate() {
            let from = self.seen.start.max(b * KV_BLOCK);
            let to = self.seen.end.min((b + 1) * KV_BLOCK);
            for j in from..to {
                let row = j % KV_BLOCK * e + at;
                // SAFETY: a block of values is [P, E]; weights is [NQ, CHUNK] at least and j < CHUNK.
                unsafe {
                    let values: [L; WIDE] = std::array::from_fn(|v| load::<L>(values, row + v * L::N, n));
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let weight = L::splat(*weights.get_unchecked(i * CHUNK + j));
                        for (sum, value) in sums.iter_mut().zip(values) {
                            *sum = sum.mul_add(weight, value);
                        }
                    }
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                let out = self.out.slice(self.places[i]..self.places[i] + e);
                for (v, sum) in sums.into_iter().enumerate() {
                    store(sum, out, at + v * L::N, n);
                }
            }
        }
    }
}

/// Scores become weights e^(score − max), with max the largest so far; the query's total follows.
#[inline(always)]
fn softmax_step<L: Lanes>(query: &mut Query, scores: &mut [f32]) {
    assert!(scores.len() == CHUNK);
    let mut max = L::splat(query.max);
    for_lanes!(L, CHUNK, |i, n| {
        // SAFETY: i + n ≤ CHUNK. A NaN is passed over here and comes out of e^(NaN − max) below.
        max = unsafe { load::<L>(scores, i, n) }.max(max);
    });
    let max = max.largest();
    query.shrink = if query.max == f32::NEG_INFINITY { 0.0 } else { L::splat(query.max - max).exp().first() };
    query.max = max;
    let mut total = L::zero();
    for_lanes!(L, CHUNK, |i, n| {
        // SAFETY: i + n ≤ CHUNK.
        unsafe {
            let weight = load::<L>(scores, i, n).sub(L::splat(max)).exp();
            total = total.add(weight);
            store(weight, scores, i, n);
        }
    });
    query.total = query.total * query.shrink + total.sum();
}
