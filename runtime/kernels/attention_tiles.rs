//! [`super::attention`] on a GPU's matrix units: queries, keys, values and weights are f16, sums and softmax f32.
//!
//! out[t, h] = Σ_j w[j] · value[j] / Σ_j w[j],  w[j] = f16(2^14 · 2^(q[t, h] · key[j] − max)), with q = f16(query · log2(e) / √E).
//!
//! Rows that come alone are cut into tiles of one row and the heads of a kv head, many rows of a sequence into tiles of one
//! head and many rows: the shader's shapes, which give a query the same bits.

use std::f32::consts::LOG2_E;

use half::f16;

use super::attention::{SEGMENT, first_key};
use super::{KV_BLOCK, RowMeta};
use crate::backend::gpu::TileShape;

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
    /// Keys a query sees, itself included; 0: all.
    pub window: u32,
    /// S: as [`super::attention::Params::segments`].
    pub segments: u32,
    /// First row of the step in `rows`.
    pub first_meta: u32,
    /// First tile of the shape in `tiles`.
    pub first_tile: u32,
}

super::kernel!(
    "attention_tiles",
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

/// Rows of q that a tile may read beyond the step's.
pub const ROWS_BEYOND: usize = 32;

/// What queries are multiplied by before they are rounded. Below 1 for every E that matrix units take: they stay as bounded
/// as they were.
pub fn query_scale(head_dim: usize) -> f32 {
    LOG2_E / (head_dim as f32).sqrt()
}

/// Queries of a workgroup. `tile`: rows of the tiles that the matrix units multiply.
pub const fn queries(shape: TileShape, tile: usize, head_dim: usize) -> usize {
    if matches!(shape, TileShape::Wide) && head_dim <= 128 { 32 } else { tile }
}

/// Bytes of workgroup memory that a shape needs.
pub const fn workgroup_bytes(shape: TileShape, tile: usize, head_dim: usize) -> usize {
    let most_e = match head_dim {
        0..=64 => 64,
        65..=128 => 128,
        129..=256 => 256,
        _ => 512,
    };
    let (keys, sums, lanes) = (64 + 8, most_e + 8, 8);
    4 * SEGMENT / KV_BLOCK + queries(shape, tile, head_dim) * (4 * keys + 2 * keys + 4 * sums + 4 * lanes)
}

/// True if heads of this size can be computed in tiles, in so many bytes of workgroup memory.
pub const fn fits(tile: usize, head_dim: usize, bytes: usize) -> bool {
    let most = workgroup_bytes(TileShape::Narrow, tile, head_dim);
    let wide = workgroup_bytes(TileShape::Wide, tile, head_dim);
    head_dim.is_multiple_of(tile) && most <= bytes && wide <= bytes
}

/// The tiles of a step: [first row, rows], by shape.
#[derive(Clone, Debug, Default)]
pub struct Tiles {
    /// Of a row each.
    pub narrow: Vec<[u32; 2]>,
    /// Of rows of one sequence at rising positions, between two multiples of the shape's [`queries`].
    pub wide: Vec<[u32; 2]>,
}

/// Cuts the rows of a step. `group`: H/G.
pub fn tiles(rows: &[RowMeta], group: usize, tile: usize, head_dim: usize) -> Tiles {
    let most = queries(TileShape::Wide, tile, head_dim) as u32;
    let mut tiles = Tiles::default();
    let together = |a: &RowMeta, b: &RowMeta| {
        a.table == b.table && a.position < b.position && a.position / most == b.position / most
    };
    let mut first = 0;
    for run in rows.chunk_by(together) {
        // A wide tile of each head takes no more workgroups than a narrow one of each row and kv head.
        if run.len() > group {
            tiles.wide.push([first, run.len() as u32]);
        } else {
            tiles.narrow.extend((0..run.len() as u32).map(|i| [first + i, 1]));
        }
        first += run.len() as u32;
    }
    tiles
}

/// Workgroups of the shader for so many tiles of a shape.
pub fn workgroups(params: &Params, shape: TileShape, tile: usize, tiles: usize) -> [u32; 3] {
    let group = (params.heads / params.kv_heads) as usize;
    let head_tiles = group.div_ceil(queries(shape, tile, params.head_dim as usize)) as u32;
    let heads = if shape == TileShape::Wide { params.heads } else { params.kv_heads * head_tiles };
    [tiles as u32, heads, params.segments.max(1)]
}

/// What one call reads; `q` is multiplied by [`query_scale`].
pub type Inputs<'a> = super::attention::Inputs<'a, f16>;

/// Keys of a chunk.
const CHUNK: usize = 64;
/// Threads of a query: each adds up its own weights.
const LANES: usize = 8;
/// What weights are multiplied by before they are rounded.
const LARGEST_WEIGHT: f32 = 16384.0;

/// A query on its way through the keys.
struct Query {
    max: f32,
    total: f32,
    sums: Vec<f32>,
}

/// The CPU twin: the shader's arithmetic, of the keys that are seen. `out` is [T, H·E], before it is rounded to f16.
///
/// # Panics
/// If a length does not fit, or a table names a block that is not there.
pub fn attention_tiles(inputs: Inputs, out: &mut [f32]) {
    let (heads, e) = (inputs.heads, inputs.head_dim);
    assert_eq!(out.len(), inputs.rows.len() * heads * e);
    for (i, out) in out.chunks_exact_mut(e).enumerate() {
        let (row, head) = (&inputs.rows[i / heads], i % heads);
        let last = row.position as usize;
        let first = first_key(last, inputs.window);
        let mut joined = Query { max: f32::MIN, total: 0.0, sums: vec![0.0; e] };
        for segment in first / SEGMENT..=last / SEGMENT {
            let mut now = Query { max: f32::MIN, total: 0.0, sums: vec![0.0; e] };
            let mut lanes = [0.0; LANES];
            let seen = first.max(segment * SEGMENT)..(last + 1).min((segment + 1) * SEGMENT);
            for chunk in seen.start / CHUNK..seen.end.div_ceil(CHUNK) {
                let keys = seen.start.max(chunk * CHUNK)..seen.end.min((chunk + 1) * CHUNK);
                inputs.chunk(i, row, head, keys, &mut now, &mut lanes);
            }
            now.total = lanes.iter().sum();
            let both = joined.max.max(now.max);
            let (before, after) = ((joined.max - both).exp2(), (now.max - both).exp2());
            joined.total = joined.total.mul_add(before, now.total * after);
            for (sum, now) in joined.sums.iter_mut().zip(&now.sums) {
                *sum = sum.mul_add(before, now * after);
            }
            joined.max = both;
        }
        let inverse = 1.0 / joined.total;
        out.iter_mut().zip(&joined.sums).for_each(|(out, sum)| *out = sum * inverse);
    }
}

impl Inputs<'_> {
    /// One chunk further for query `i` of `row` and `head`, over the `keys` of it that it sees.
    fn chunk(
        &self,
        i: usize,
        row: &RowMeta,
        head: usize,
        keys: std::ops::Range<usize>,
        query: &mut Query,
        lanes: &mut [f32; LANES],
    ) {
        let e = self.head_dim;
        let q = &self.q[i * e..(i + 1) * e];
        let kv_head = head / (self.heads / self.kv_heads);
        let start = |key: usize| {
            let block = self.tables[row.table as usize + key / KV_BLOCK] as usize;
            (block * self.kv_heads + kv_head) * KV_BLOCK * e
        };
        let score = |key: usize| {
            let keys = &self.keys[start(key)..][..KV_BLOCK * e];
            let product = |sum: f32, (q, key): (&f16, &f16)| q.to_f32().mul_add(key.to_f32(), sum);
            q.iter().zip(keys[key % KV_BLOCK..].iter().step_by(KV_BLOCK)).fold(0.0, product)
        };
        let scores: Vec<f32> = keys.clone().map(score).collect();
        let max = scores.iter().copied().fold(query.max, f32::max);
        let shrink = (query.max - max).exp2();
        query.max = max;
        query.sums.iter_mut().for_each(|sum| *sum *= shrink);
        let mut weights = [[0.0; LANES]; CHUNK / LANES];
        for (key, score) in keys.clone().zip(scores) {
            let weight = f16::from_f32(LARGEST_WEIGHT * (score - max).exp2()).to_f32();
            weights[key % CHUNK / LANES][key % LANES] = weight;
            let values = &self.values[start(key) + key % KV_BLOCK * e..][..e];
            query.sums.iter_mut().zip(values).for_each(|(sum, v)| *sum = weight.mul_add(v.to_f32(), *sum));
        }
        for (lane, total) in lanes.iter_mut().enumerate() {
            let four = |j: usize| weights[j][lane] + weights[j + 4][lane];
            *total = total.mul_add(shrink, (four(0) + four(1)) + (four(2) + four(3)));
        }
    }
}
