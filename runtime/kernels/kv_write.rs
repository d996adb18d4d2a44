//! Puts each row's key and value into its slot of the paged cache.
//!
//! Keys lie [block, G, E, P], so that attention reads P keys side by side; values lie [block, G, P, E].
//! The GPU does it where they are made ([`super::linear_qkv`]).

use super::{KV_BLOCK, RowMeta, SharedMut};

/// Where a layer's keys and values are, and how they are laid out.
#[derive(Clone, Copy)]
pub(crate) struct Cache<'a> {
    pub keys: SharedMut<'a>,
    pub values: SharedMut<'a>,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// The whole call on one thread: for tests and benches. `k` and `v` are [T, G·E].
///
/// # Panics
/// If a slot is not in the cache.
pub fn kv_write_alone(rows: &[RowMeta], k: &[f32], v: &[f32], kv_heads: usize, keys: &mut [f32], values: &mut [f32]) {
    let head_dim = k.len() / rows.len().max(1) / kv_heads;
    let cache = Cache { keys: SharedMut::new(keys), values: SharedMut::new(values), kv_heads, head_dim };
    // SAFETY: one thread, and the borrows are exclusive.
    unsafe { kv_write(rows, k, v, cache) };
}

/// The CPU twin for the rows of one task; `k` and `v` are [rows, G·E].
///
/// # Safety
/// No two rows of a step share a slot, and nobody reads these slots meanwhile.
pub(crate) unsafe fn kv_write(rows: &[RowMeta], k: &[f32], v: &[f32], cache: Cache) {
    let Cache { keys, values, kv_heads, head_dim } = cache;
    let width = kv_heads * head_dim;
    for ((row, k), v) in rows.iter().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
        let (block, place) = (row.slot as usize / KV_BLOCK, row.slot as usize % KV_BLOCK);
        for head in 0..kv_heads {
            let start = (block * kv_heads + head) * head_dim * KV_BLOCK;
            for e in 0..head_dim {
                let at = start + e * KV_BLOCK + place;
                // SAFETY: the row's own slot.
                unsafe { keys.slice(at..at + 1)[0] = k[head * head_dim + e] };
            }
            let at = start + place * head_dim;
            // SAFETY: the row's own slot.
            let target = unsafe { values.slice(at..at + head_dim) };
            target.copy_from_slice(&v[head * head_dim..(head + 1) * head_dim]);
        }
    }
}
