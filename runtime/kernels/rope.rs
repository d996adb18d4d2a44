//! Rotates each head of x by its position: (a, b) ← (a·cos − b·sin, b·cos + a·sin) for the pairs (i, i + E/2).
//!
//! cos and sin come as a table [T, E/2], computed once a step on the host: both backends rotate by the same angles.
//! The GPU does it where queries and keys are made ([`super::linear_qkv`]).

use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};

for_each_isa! {
    /// The CPU twin; `x` is [rows, heads · E], `cos_sin` is [rows, 2, E/2].
    pub fn rope(cos_sin: &[f32], half: usize, heads: usize, x: &mut [f32]) = body
}

#[inline(always)]
fn body<L: Lanes>(cos_sin: &[f32], half: usize, heads: usize, x: &mut [f32]) {
    for (angles, row) in cos_sin.chunks_exact(2 * half).zip(x.chunks_exact_mut(heads * 2 * half)) {
        let (cos, sin) = angles.split_at(half);
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for_lanes!(L, half, |i, n| {
                // SAFETY: i + n ≤ half, the length of all four.
                unsafe {
                    let (a, b) = (load::<L>(low, i, n), load::<L>(high, i, n));
                    let (cos, sin) = (load::<L>(cos, i, n), load::<L>(sin, i, n));
                    store(a.mul(cos).sub(b.mul(sin)), low, i, n);
                    store(b.mul(cos).add(a.mul(sin)), high, i, n);
                }
            });
        }
    }
}
