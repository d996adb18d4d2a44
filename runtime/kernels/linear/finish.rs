//! What becomes of a block of sums: bias, then stored, added to the residual stream, or gated.

use std::ops::Range;

use crate::kernels::SharedMut;
use crate::kernels::lanes::{Lanes, for_each_isa, for_lanes, load, store as store_lanes};
use crate::kernels::silu_mul::gated_lanes;

/// The elements of `out` that a block of sums is for.
pub(super) struct Block<'a> {
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    /// N: elements a row of `out`.
    pub width: usize,
    pub out: SharedMut<'a>,
}

impl Block<'_> {
    /// The block's elements of its i-th row.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // As `SharedMut::slice`.
    fn out_row(&self, i: usize) -> &mut [f32] {
        let start = (self.rows.start + i) * self.width;
        // SAFETY: this task's own elements, by the condition of `super::compute`.
        unsafe { self.out.slice(start + self.cols.start..start + self.cols.end) }
    }
}

for_each_isa! {
    /// out = sums + bias.
    pub(super) fn store(block: &Block, sums: &[f32], bias: Option<&[f32]>) = store_body
}
for_each_isa! {
    /// out = out + (sums + bias).
    pub(super) fn add(block: &Block, sums: &[f32], bias: Option<&[f32]>) = add_body
}
for_each_isa! {
    /// out = silu(gate + its bias) · (up + its bias).
    pub(super) fn gated(block: &Block, sums: [&mut Vec<f32>; 2], bias: [Option<&[f32]>; 2]) = gated_body
}

#[inline(always)]
unsafe fn biased<L: Lanes>(sums: &[f32], bias: Option<&[f32]>, i: usize, n: usize) -> L {
    // SAFETY: i + n is inside both, the caller's promise.
    unsafe {
        let sum = load::<L>(sums, i, n);
        bias.map_or(sum, |bias| sum.add(load::<L>(bias, i, n)))
    }
}

#[inline(always)]
fn store_body<L: Lanes>(block: &Block, sums: &[f32], bias: Option<&[f32]>) {
    let bias = bias.map(|b| &b[block.cols.clone()]);
    for (i, sums) in sums.chunks_exact(block.cols.len()).take(block.rows.len()).enumerate() {
        let out = block.out_row(i);
        for_lanes!(L, sums.len(), |i, n| {
            // SAFETY: i + n ≤ the columns of the block, the length of all.
            unsafe { store_lanes(biased::<L>(sums, bias, i, n), out, i, n) };
        });
    }
}

#[inline(always)]
fn add_body<L: Lanes>(block: &Block, sums: &[f32], bias: Option<&[f32]>) {
    let bias = bias.map(|b| &b[block.cols.clone()]);
    for (i, sums) in sums.chunks_exact(block.cols.len()).take(block.rows.len()).enumerate() {
        let out = block.out_row(i);
        for_lanes!(L, sums.len(), |i, n| {
            // SAFETY: as above.
            unsafe { store_lanes(load::<L>(out, i, n).add(biased::<L>(sums, bias, i, n)), out, i, n) };
        });
    }
}

#[inline(always)]
fn gated_body<L: Lanes>(block: &Block, sums: [&mut Vec<f32>; 2], bias: [Option<&[f32]>; 2]) {
    let [gate_bias, up_bias] = bias.map(|b| b.map(|b| &b[block.cols.clone()]));
    let [gate, up] = sums;
    let cols = block.cols.len();
    for (i, (gate, up)) in gate.chunks_exact(cols).zip(up.chunks_exact(cols)).take(block.rows.len()).enumerate() {
        let out = block.out_row(i);
        for_lanes!(L, cols, |i, n| {
            // SAFETY: as above.
            unsafe {
                let (gate, up) = (biased::<L>(gate, gate_bias, i, n), biased::<L>(up, up_bias, i, n));
                store_lanes(gated_lanes(gate, up), out, i, n);
            }
        });
    }
}
