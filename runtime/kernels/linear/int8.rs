//! 8-bit weights: q = round(w / s), s = max |w| / 127 over each block of [`BLOCK`] elements of a row; symmetric.
//!
//! [`super::Arithmetic::Int8`] multiplies them by 16-bit integer inputs (one scale a row): sums over a block are exact in
//! i32 (64 · 127 · 32767 < 2^31), then scaled and added in f32, blocks in rising k. So what is lost is lost when the
//! weights are quantised; rounding the inputs to 16 bits costs less than rounding them to bf16.

use std::ops::Range;

use super::input::Packed;
use super::tile::{AHEAD, write_sums};
use crate::backend::cpu::{Pool, cores};
use crate::error::{Error, Result, try_vec};
use crate::kernels::lanes::{Lanes, for_each_isa};
use crate::kernels::{MatrixView, SharedMut};

/// Elements of a row that share a scale.
pub const BLOCK: usize = 64;

/// A weight quantised on load.
pub struct Int8Matrix {
    rows: usize,
    cols: usize,
    /// [rows, K rounded up to whole blocks], zeros behind K.
    quants: Vec<i8>,
    /// [rows, blocks].
    scales: Vec<f32>,
}

/// A view of an [`Int8Matrix`].
#[derive(Clone, Copy)]
pub struct Int8View<'a> {
    rows: usize,
    cols: usize,
    quants: &'a [i8],
    scales: &'a [f32],
}

impl Int8Matrix {
    /// Bytes that a matrix [rows, cols] will take.
    pub fn bytes_for(rows: usize, cols: usize) -> usize {
        rows * cols.div_ceil(BLOCK) * (BLOCK + size_of::<f32>())
    }

    /// Quantises `view`, in parallel.
    ///
    /// # Errors
    /// `HostMemory` if there is no room, `Format` if a weight is NaN or infinite.
    pub fn quantise(view: MatrixView, pool: &Pool) -> Result<Self> {
        let (rows, cols) = (view.rows(), view.cols());
        let blocks = cols.div_ceil(BLOCK);
        let mut quants: Vec<i8> = try_vec("8-bit weights", 0, rows * blocks * BLOCK)?;
        let mut scales: Vec<f32> = try_vec("8-bit weights", 0.0, rows * blocks)?;
        let (shared_quants, shared_scales) = (SharedMut::new(&mut quants), SharedMut::new(&mut scales));
        // Some rows at a time, each in its turn: a model that is being loaded holds up others for a millisecond.
        let at_a_time = ((1 << 20) / cols.max(1)).max(1);
        for first in (0..rows).step_by(at_a_time) {
            let _turn = cores().take(pool.threads());
            pool.over_rows(at_a_time.min(rows - first), cols, &|rows| {
                let mut row_values = vec![0.0; cols];
                for row in first + rows.start..first + rows.end {
                    view.dtype().read_f32(view.row(row), &mut row_values);
                    // SAFETY: tasks have disjoint rows.
                    let (quants, scales) = unsafe {
                        let quants = shared_quants.slice(row * blocks * BLOCK..(row + 1) * blocks * BLOCK);
                        (quants, shared_scales.slice(row * blocks..(row + 1) * blocks))
                    };
                    for ((values, quants), scale) in
                        row_values.chunks(BLOCK).zip(quants.chunks_exact_mut(BLOCK)).zip(scales)
                    {
                        *scale = quantise_block(values, quants);
                    }
                }
            });
        }
        if let Some(i) = scales.iter().position(|s| !s.is_finite()) {
            let (row, mut values) = (i / blocks, vec![0.0; cols]);
            view.dtype().read_f32(view.row(row), &mut values);
            let column = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
            return Err(Error::format(format!(
                "the weight at row {row}, column {column} is {}; only finite weights can be quantised to 8 bits",
                values[column]
            )));
        }
        Ok(Int8Matrix { rows, cols, quants, scales })
    }

    /// A view of all of it.
    pub fn view(&self) -> Int8View<'_> {
        Int8View { rows: self.rows, cols: self.cols, quants: &self.quants, scales: &self.scales }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.quants.len() + 4 * self.scales.len()
    }
}

/// Returns the scale; NaN or infinite if a value is.
fn quantise_block(values: &[f32], quants: &mut [i8]) -> f32 {
    let finite = values.iter().all(|v| v.is_finite());
    let most = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if !finite {
        return f32::NAN;
    }
    let inverse = 127.0 / most;
    if !inverse.is_finite() {
        return 0.0;
    }
    for (q, v) in quants.iter_mut().zip(values) {
        // Within ±127 by construction; `as` saturates.
        *q = (v * inverse).round_ties_even() as i8;
    }
    most / 127.0
}

impl<'a> Int8View<'a> {
    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Blocks a row.
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// [rows, blocks · BLOCK].
    pub fn quants(&self) -> &'a [i8] {
        self.quants
    }

    /// [rows, blocks].
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// The weights of a row, q · s; `out` is [K].
    pub fn read_f32(&self, row: usize, out: &mut [f32]) {
        let blocks = self.blocks();
        let quants = &self.quants[row * blocks * BLOCK..][..self.cols];
        let scales = &self.scales[row * blocks..][..blocks];
        for (i, (out, q)) in out.iter_mut().zip(quants).enumerate() {
            *out = f32::from(*q) * scales[i / BLOCK];
        }
    }
}

for_each_isa! {
    /// See [`super::column_sums`], which checks the lengths.
    pub(super) fn sums(x: &Packed, rows: Range<usize>, view: Int8View, cols: Range<usize>, out: &mut [f32], next: *const u8) = body
}

/// A block of a product.
struct Job<'a> {
    x: &'a [i16],
    x_scales: &'a [f32],
    /// Elements a row of x and of q.
    stride: usize,
    /// [columns of the block, stride], and [columns of the block, blocks].
    quants: &'a [i8],
    scales: &'a [f32],
    /// Blocks of a row.
    blocks: usize,
    cols: usize,
    /// What is wanted after this block.
    next: *const u8,
}

#[inline(always)]
fn body<L: Lanes>(
    x: &Packed,
    rows: Range<usize>,
    view: Int8View,
    cols: Range<usize>,
    out: &mut [f32],
    next: *const u8,
) {
    let (x, stride, x_scales) = x.i16_rows(rows.clone());
    let blocks = view.blocks();
    let quants = &view.quants[cols.start * stride..cols.end * stride];
    let scales = &view.scales[cols.start * blocks..cols.end * blocks];
    let job = Job { x, x_scales, stride, quants, scales, blocks, cols: cols.len(), next };
    let most_rows = if L::REGISTERS >= 32 { 4 } else { 2 };
    let mut t = 0;
    while t < rows.len() {
        let height = (rows.len() - t).min(most_rows);
        let out = &mut out[t * job.cols..];
        match height {
            1 => columns::<L, 8, 1>(&job, t, out),
            2 => columns::<L, 2, 2>(&job, t, out),
            3 => columns::<L, 4, 3>(&job, t, out),
            _ => columns::<L, 4, 4>(&job, t, out),
        }
        t += height;
    }
}

#[inline(always)]
fn columns<L: Lanes, const NR: usize, const TR: usize>(job: &Job, t: usize, out: &mut [f32]) {
    let mut n = 0;
    while n < job.cols {
        let out = &mut out[n..];
        if n + NR <= job.cols {
            if TR == 1 {
                stream::<L, NR, TR>(job, t, n, out)
            } else {
                tile::<L, NR, TR>(job, t, n, out)
            }
            n += NR;
        } else {
            tile::<L, 1, TR>(job, t, n, out);
            n += 1;
        }
    }
}

/// One after the other, NR weight rows from `n` on times TR rows of x from `t` on: weights in the order in which memory
/// has them. The sums are those of [`tile`] to the bit.
#[inline(always)]
fn stream<L: Lanes, const NR: usize, const TR: usize>(job: &Job, t: usize, n: usize, out: &mut [f32]) {
    let mut sums = [[L::zero(); NR]; TR];
    for r in 0..NR {
        let at = (n + r) * job.stride + AHEAD;
        let ahead = if at < job.quants.len() {
            job.quants.as_ptr().wrapping_add(at).cast()
        } else {
            job.next.wrapping_add(at - job.quants.len())
        };
        let row = tile_sums::<L, 1, TR>(job, t, n + r, ahead);
        for (sums, [sum]) in sums.iter_mut().zip(row) {
            sums[r] = sum;
        }
    }
    finish(job, t, &mut sums, out);
}

/// NR weight rows from `n` on times TR rows of x from `t` on.
#[inline(always)]
fn tile<L: Lanes, const NR: usize, const TR: usize>(job: &Job, t: usize, n: usize, out: &mut [f32]) {
    let mut sums = tile_sums::<L, NR, TR>(job, t, n, std::ptr::null());
    finish(job, t, &mut sums, out);
}

/// The sums but for the scales of x. Of one row of x, each block asks for its place in the weights `ahead`.
#[inline(always)]
fn tile_sums<L: Lanes, const NR: usize, const TR: usize>(
    job: &Job,
    t: usize,
    n: usize,
    ahead: *const u8,
) -> [[L; NR]; TR] {
    let (stride, blocks) = (job.stride, job.blocks);
    let q = &job.quants[n * stride..(n + NR) * stride];
    let s = &job.scales[n * blocks..(n + NR) * blocks];
    let x = &job.x[t * stride..(t + TR) * stride];
    assert!(stride == blocks * BLOCK);
    let mut sums = [[L::zero(); NR]; TR];
    for block in 0..blocks {
        let mut exact = [[L::zero_ints(); NR]; TR];
        let mut i = block * BLOCK;
        while i < (block + 1) * BLOCK {
            // SAFETY: every row is whole blocks long, and 2 · lanes divides a block.
            unsafe {
                let mut qs = [L::load_i8(q.as_ptr().add(i)); NR];
                for (r, q_r) in qs.iter_mut().enumerate().skip(1) {
                    *q_r = L::load_i8(q.as_ptr().add(r * stride + i));
                }
                for (r, exact) in exact.iter_mut().enumerate() {
                    let x = L::load_i16(x.as_ptr().add(r * stride + i));
                    for (exact, q) in exact.iter_mut().zip(qs) {
                        *exact = L::add_pairs(*exact, q, x);
                    }
                }
            }
            i += 2 * L::N;
        }
        if TR == 1 {
            L::prefetch(ahead.wrapping_add(block * BLOCK));
        }
        for (sums, exact) in sums.iter_mut().zip(exact) {
            for (r, (sum, exact)) in sums.iter_mut().zip(exact).enumerate() {
                *sum = sum.mul_add(L::from_ints(exact), L::splat(s[r * blocks + block]));
            }
        }
    }
    sums
}

#[inline(always)]
fn finish<L: Lanes, const NR: usize, const TR: usize>(job: &Job, t: usize, sums: &mut [[L; NR]; TR], out: &mut [f32]) {
    for (r, sums) in sums.iter_mut().enumerate() {
        let scale = L::splat(job.x_scales[t + r]);
        for sum in sums {
            *sum = sum.mul(scale);
        }
    }
    assert!(out.len() >= (TR - 1) * job.cols + NR);
    // SAFETY: room for the tile, just asserted.
    unsafe { write_sums(sums, out.as_mut_ptr(), job.cols) };
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::weights::Dtype;

    #[test]
    fn quantising_is_within_half_a_step() {
        let values: Vec<f32> = (0..3 * 100).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
        let stored = Dtype::F32.from_f32(&values);
        let matrix = Int8Matrix::quantise(MatrixView::new(Dtype::F32, &stored, 3, 100), &Pool::new(2)).unwrap();
        let mut row = vec![0.0; 100];
        for (r, values) in values.chunks_exact(100).enumerate() {
            matrix.view().read_f32(r, &mut row);
            for (i, (got, want)) in row.iter().zip(values).enumerate() {
                let step = matrix.scales[r * 2 + i / BLOCK];
                assert!((got - want).abs() <= step * 0.5001, "{got} {want} {step}");
            }
        }
        assert_eq!(matrix.bytes(), Int8Matrix::bytes_for(3, 100));
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let mut values = vec![1.0f32; 8];
        values[5] = f32::INFINITY;
        let stored = Dtype::F32.from_f32(&values);
        let refused = Int8Matrix::quantise(MatrixView::new(Dtype::F32, &stored, 2, 4), &Pool::new(1));
        let error = refused.err().unwrap();
        assert_eq!(error.kind(), crate::error::ErrorKind::Format);
        assert!(error.to_string().contains("row 1, column 1 is inf"), "{error}");
    }
}
