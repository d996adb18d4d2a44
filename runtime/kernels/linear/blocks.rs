//! Weights quantised on load: each block of a row is some small integers q and one scale s, w ≈ q · s.
//!
//! [`BlockFormat`] says how a block is stored, [`super::int8`] and [`super::int4`] are the two. Inputs are 16-bit integers
//! (one scale a row): sums over a block are exact in i32, then scaled and added in f32, blocks in rising k. So what is lost
//! is lost when the weights are quantised; rounding the inputs to 16 bits costs less than rounding them to bf16.

use std::marker::PhantomData;
use std::ops::Range;

use super::input::Packed;
use super::tile::{AHEAD, write_sums};
use crate::backend::cpu::{Pool, cores};
use crate::error::{Error, ErrorKind, Result, try_vec};
use crate::kernels::lanes::Lanes;
use crate::kernels::{MatrixView, SharedMut};

/// How a block is stored.
pub trait BlockFormat: Send + Sync {
    /// Elements of a row that share a scale: a multiple of 32, which is two vectors of 16-bit integers at most.
    const BLOCK: usize;
    /// Bytes of their q.
    const BYTES: usize;
    /// Bits of a q, for messages.
    const BITS: usize;

    /// Writes the q of up to BLOCK finite values, 0 behind them, and returns the scale.
    fn quantise(values: &[f32], block: &mut [u8]) -> f32;

    /// q · scale of the first elements of a block, up to BLOCK.
    fn read_f32(block: &[u8], scale: f32, out: &mut [f32]);
}

/// How a block is read for its product.
pub(super) trait Unpack: BlockFormat {
    /// 2 · lanes of q from element i of a block on, a multiple of 2 · lanes.
    ///
    /// # Safety
    /// `block` is a whole block, and i + 2 · lanes is within it.
    unsafe fn load<L: Lanes>(block: *const u8, i: usize) -> L::Pairs;
}

/// A weight quantised on load.
pub struct BlockMatrix<F> {
    rows: usize,
    cols: usize,
    /// [rows, blocks, F::BYTES]: K is rounded up to whole blocks, 0 behind it.
    quants: Vec<u8>,
    /// [rows, blocks].
    scales: Vec<f32>,
    format: PhantomData<F>,
}

/// A view of a [`BlockMatrix`].
pub struct BlockView<'a, F> {
    rows: usize,
    cols: usize,
    quants: &'a [u8],
    scales: &'a [f32],
    format: PhantomData<F>,
}

impl<F> Clone for BlockView<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<F> Copy for BlockView<'_, F> {}

impl<F: BlockFormat> BlockMatrix<F> {
    /// Bytes that a matrix [rows, cols] will take.
    pub fn bytes_for(rows: usize, cols: usize) -> usize {
        rows * cols.div_ceil(F::BLOCK) * (F::BYTES + size_of::<f32>())
    }

    /// Quantises `view`, in parallel.
    ///
    /// # Errors
    /// `HostMemory` if there is no room, `Format` if a weight is NaN or infinite.
    pub fn quantise(view: MatrixView, pool: &Pool) -> Result<Self> {
        let (rows, cols) = (view.rows(), view.cols());
        let blocks = cols.div_ceil(F::BLOCK);
        let row_bytes = blocks * F::BYTES;
        let mut quants: Vec<u8> = try_vec("quantised weights", 0, rows * row_bytes)?;
        let mut scales: Vec<f32> = try_vec("quantised weights", 0.0, rows * blocks)?;
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
                        let quants = shared_quants.slice(row * row_bytes..(row + 1) * row_bytes);
                        (quants, shared_scales.slice(row * blocks..(row + 1) * blocks))
                    };
                    for ((values, quants), scale) in
                        row_values.chunks(F::BLOCK).zip(quants.chunks_exact_mut(F::BYTES)).zip(scales)
                    {
                        let finite = values.iter().all(|v| v.is_finite());
                        *scale = if finite { F::quantise(values, quants) } else { f32::NAN };
                    }
                }
            });
        }
        if let Some(i) = scales.iter().position(|s| !s.is_finite()) {
            let (row, mut values) = (i / blocks, vec![0.0; cols]);
            view.dtype().read_f32(view.row(row), &mut values);
            let column = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
            let text = format!(
                "the weight at row {row}, column {column} is {}; only finite weights can be quantised to {} bits",
                values[column],
                F::BITS
            );
            return Err(Error::new(ErrorKind::NonFinite, text));
        }
        Ok(BlockMatrix { rows, cols, quants, scales, format: PhantomData })
    }

    /// A view of all of it.
    pub fn view(&self) -> BlockView<'_, F> {
        let BlockMatrix { rows, cols, quants, scales, format } = self;
        BlockView { rows: *rows, cols: *cols, quants, scales, format: *format }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.quants.len() + 4 * self.scales.len()
    }
}

impl<'a, F: BlockFormat> BlockView<'a, F> {
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
        self.cols.div_ceil(F::BLOCK)
    }

    /// [rows, blocks, bytes of a block].
    pub fn quants(&self) -> &'a [u8] {
        self.quants
    }

    /// The same from a row on.
    pub fn quants_from(&self, row: usize) -> &'a [u8] {
        &self.quants[row * self.blocks() * F::BYTES..]
    }

    /// [rows, blocks].
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// The weights of a row, q · s; `out` is [K].
    pub fn read_f32(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols);
        let blocks = self.quants_from(row).chunks_exact(F::BYTES);
        let scales = &self.scales[row * self.blocks()..];
        for ((out, block), scale) in out.chunks_mut(F::BLOCK).zip(blocks).zip(scales) {
            F::read_f32(block, *scale, out);
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// A block of a product.
struct Job<'a> {
    x: &'a [i16],
    x_scales: &'a [f32],
    /// Elements a row of x.
    stride: usize,
    /// [columns of the block, blocks, F::BYTES], and [columns of the block, blocks].
    quants: &'a [u8],
    scales: &'a [f32],
    /// Blocks of a row, and their bytes.
    blocks: usize,
    row_bytes: usize,
    cols: usize,
    /// What is wanted after this block.
    next: *const u8,
}

/// See [`super::column_sums`], which checks the lengths.
#[inline(always)]
pub(super) fn body<L: Lanes, F: Unpack>(
    x: &Packed,
    rows: Range<usize>,
    view: BlockView<F>,
    cols: Range<usize>,
    out: &mut [f32],
    next: *const u8,
) {
    let (x, stride, x_scales) = x.i16_rows(rows.clone());
    let blocks = view.blocks();
    let row_bytes = blocks * F::BYTES;
    let quants = &view.quants[cols.start * row_bytes..cols.end * row_bytes];
    let scales = &view.scales[cols.start * blocks..cols.end * blocks];
    let job = Job { x, x_scales, stride, quants, scales, blocks, row_bytes, cols: cols.len(), next };
    let most_rows = if L::REGISTERS >= 32 { 4 } else { 2 };
    let mut t = 0;
    while t < rows.len() {
        let height = (rows.len() - t).min(most_rows);
        let out = &mut out[t * job.cols..];
        match height {
            1 => columns::<L, F, 8, 1>(&job, t, out),
            2 => columns::<L, F, 2, 2>(&job, t, out),
            3 => columns::<L, F, 4, 3>(&job, t, out),
            _ => columns::<L, F, 4, 4>(&job, t, out),
        }
        t += height;
    }
}

#[inline(always)]
fn columns<L: Lanes, F: Unpack, const NR: usize, const TR: usize>(job: &Job, t: usize, out: &mut [f32]) {
    let mut n = 0;
    while n < job.cols {
        let out = &mut out[n..];
        if n + NR <= job.cols {
            if TR == 1 {
                stream::<L, F, NR, TR>(job, t, n, out)
            } else {
                tile::<L, F, NR, TR>(job, t, n, out)
            }
            n += NR;
        } else {
            tile::<L, F, 1, TR>(job, t, n, out);
            n += 1;
        }
    }
}

/// One after the other, NR weight rows from `n` on times TR rows of x from `t` on: weights in the order in which memory
/// has them. The sums are those of [`tile`] to the bit.
#[inline(always)]
fn stream<L: Lanes, F: Unpack, const NR: usize, const TR: usize>(job: &Job, t: usize, n: usize, out: &mut [f32]) {
    let mut sums = [[L::zero(); NR]; TR];
    for r in 0..NR {
        let at = (n + r) * job.row_bytes + AHEAD;
        let ahead = if at < job.quants.len() {
            job.quants.as_ptr().wrapping_add(at)
        } else {
            job.next.wrapping_add(at - job.quants.len())
        };
        let row = tile_sums::<L, F, 1, TR>(job, t, n + r, ahead);
        for (sums, [sum]) in sums.iter_mut().zip(row) {
            sums[r] = sum;
        }
    }
    finish(job, t, &mut sums, out);
}

/// NR weight rows from `n` on times TR rows of x from `t` on.
#[inline(always)]
fn tile<L: Lanes, F: Unpack, const NR: usize, const TR: usize>(job: &Job, t: usize, n: usize, out: &mut [f32]) {
    let mut sums = tile_sums::<L, F, NR, TR>(job, t, n, std::ptr::null());
    finish(job, t, &mut sums, out);
}

/// The sums but for the scales of x. Of one row of x, each block asks for its place in the weights `ahead`.
#[inline(always)]
fn tile_sums<L: Lanes, F: Unpack, const NR: usize, const TR: usize>(
    job: &Job,
    t: usize,
    n: usize,
    ahead: *const u8,
) -> [[L; NR]; TR] {
    let (stride, blocks, row_bytes) = (job.stride, job.blocks, job.row_bytes);
    let q = &job.quants[n * row_bytes..(n + NR) * row_bytes];
    let s = &job.scales[n * blocks..(n + NR) * blocks];
    let x = &job.x[t * stride..(t + TR) * stride];
    assert!(stride == blocks * F::BLOCK && row_bytes == blocks * F::BYTES);
    let mut sums = [[L::zero(); NR]; TR];
    for block in 0..blocks {
        let mut exact = [[L::zero_ints(); NR]; TR];
        let mut i = 0;
        while i < F::BLOCK {
            // SAFETY: every row is whole blocks long, and 2 · lanes divides a block.
            unsafe {
                let q = q.as_ptr().add(block * F::BYTES);
                let mut qs = [F::load::<L>(q, i); NR];
                for (r, q_r) in qs.iter_mut().enumerate().skip(1) {
                    *q_r = F::load::<L>(q.add(r * row_bytes), i);
                }
                for (r, exact) in exact.iter_mut().enumerate() {
                    let x = L::load_i16(x.as_ptr().add(r * stride + block * F::BLOCK + i));
                    for (exact, q) in exact.iter_mut().zip(qs) {
                        *exact = L::add_pairs(*exact, q, x);
                    }
                }
            }
            i += 2 * L::N;
        }
        if TR == 1 && (block * F::BYTES).is_multiple_of(LINE) {
            L::prefetch(ahead.wrapping_add(block * F::BYTES));
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
