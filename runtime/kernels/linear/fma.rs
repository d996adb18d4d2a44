//! [`super::Arithmetic::Fma`]: exact weights, f32 inputs, f32 FMA on every instruction set.

use std::cell::RefCell;
use std::ops::Range;

use super::Weight;
use super::input::Packed;
use super::tile::{self, Block, Multiply};
use crate::kernels::lanes::{Lanes, for_each_isa};
use crate::weights::Dtype;

/// Rows from which it pays to widen a block of weights once for all of them.
const WIDEN_FROM: usize = 8;

struct F32<L>(L);
struct F16<L>(L);
struct Bf16<L>(L);

macro_rules! multiply {
    ($name:ident, $size:literal, $load:path) => {
        impl<L: Lanes> Multiply for $name<L> {
            type Sum = L;
            type W = L;
            type X = L;
            const STEP: usize = L::N;
            const W_SIZE: usize = $size;
            const X_SIZE: usize = 4;
            #[inline(always)]
            unsafe fn load_w(p: *const u8) -> L {
                // SAFETY: the caller's promise; loads take any alignment.
                unsafe { $load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn load_w_part(p: *const u8, n: usize) -> L {
                let mut padded = [0u8; 64];
                // SAFETY: n readable weights; lanes · size ≤ 64.
                unsafe {
                    std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), n * $size);
                    $load(padded.as_ptr().cast())
                }
            }
            #[inline(always)]
            unsafe fn load_x(p: *const u8) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn load_x_part(p: *const u8, n: usize) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::load_part(p.cast(), n) }
            }
            #[inline(always)]
            fn mul_add(sum: L, w: L, x: L) -> L {
                sum.mul_add(w, x)
            }
        }
    };
}
multiply!(F32, 4, L::load);
multiply!(F16, 2, L::load_f16);
multiply!(Bf16, 2, L::load_bf16);

for_each_isa! {
    /// See [`super::column_sums`], which checks the lengths.
    pub(super) fn sums(x: &Packed, rows: Range<usize>, weight: &Weight, cols: Range<usize>, out: &mut [f32], next: *const u8) = body
}

#[inline(always)]
fn body<L: Lanes>(
    x: &Packed,
    rows: Range<usize>,
    weight: &Weight,
    cols: Range<usize>,
    out: &mut [f32],
    next: *const u8,
) {
    let k = weight.cols();
    let x = x.f32_rows(rows.clone());
    let block = Block {
        w: std::ptr::null(),
        w_stride: 4 * k,
        x: x.as_ptr().cast(),
        x_stride: 4 * k,
        k,
        rows: rows.len(),
        cols: cols.len(),
        out: out.as_mut_ptr(),
        out_stride: cols.len(),
        next,
    };
    match weight {
        Weight::Stored(view) if view.dtype() == Dtype::F32 || rows.len() < WIDEN_FROM => {
            let stored = Block { w: view.rows_bytes(cols).as_ptr(), w_stride: view.dtype().size() * k, ..block };
            // SAFETY: x has `rows` rows of K, the view `cols` rows of K, out is [rows, cols] (`column_sums`).
            unsafe {
                match view.dtype() {
                    Dtype::F32 => tile::sums::<F32<L>>(stored),
                    Dtype::F16 => tile::sums::<F16<L>>(stored),
                    Dtype::BF16 => tile::sums::<Bf16<L>>(stored),
                }
            }
        }
        _ => widened::<L>(block, weight, cols),
    }
}

thread_local! {
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Widens the weights block by block: exact, so the sums are those of the stored weights to the bit.
#[inline(always)]
fn widened<L: Lanes>(block: Block, weight: &Weight, cols: Range<usize>) {
    let k = weight.cols();
    // Taken out, not borrowed: a closure would not be compiled for the instruction set.
    let mut wide = WIDE.take();
    let step = (tile::WEIGHT_BLOCK_BYTES / (4 * k).max(1) / 12).max(1) * 12;
    for n in (0..cols.len()).step_by(step) {
        let count = step.min(cols.len() - n);
        wide.resize(wide.len().max(count * k), 0.0);
        for (i, wide) in wide.chunks_exact_mut(k.max(1)).take(count).enumerate() {
            widen_row::<L>(weight, cols.start + n + i, wide);
        }
        // SAFETY: `count` widened rows; the rest as above.
        unsafe { tile::sums::<F32<L>>(Block { w: wide.as_ptr().cast(), ..block.columns(n, count) }) };
    }
    WIDE.set(wide);
}

#[inline(always)]
fn widen_row<L: Lanes>(weight: &Weight, row: usize, out: &mut [f32]) {
    match weight {
        Weight::Stored(view) => {
            let bytes = view.row(row);
            let (size, k) = (view.dtype().size(), out.len());
            let mut i = 0;
            while i + L::N <= k {
                // SAFETY: i + lanes ≤ k, the length of both.
                unsafe {
                    let p = bytes.as_ptr().add(i * size);
                    let v = match view.dtype() {
                        Dtype::F32 => L::load(p.cast()),
                        Dtype::F16 => L::load_f16(p),
                        Dtype::BF16 => L::load_bf16(p),
                    };
                    v.store(out.as_mut_ptr().add(i));
                }
                i += L::N;
            }
            view.dtype().read_f32(&bytes[i * size..], &mut out[i..]);
        }
        Weight::Int8(view) => view.read_f32(row, out),
        Weight::Int4(view) => view.read_f32(row, out),
    }
}
