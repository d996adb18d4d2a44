//! out[t, n] = Σ_k x[t, k] · w[n, k] + bias[n], weights as stored, sums in f32.
//!
//! The order of additions of an element depends on K alone: lane j adds the products k ≡ j (mod lanes) in rising k,
//! then the lanes are added by halves, then the bias. How many rows share a tile changes nothing. No input is
//! rounded, so `precision=f32` and `auto` are the same arithmetic on the instruction sets there are.

use std::ops::Range;

use super::lanes::{Lanes, for_each_isa};
use super::{MatrixView, SharedMut};
use crate::weights::Dtype;

/// Parameters of the shader, which sees one slice of the weight's rows at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T or M.
    pub rows: u32,
    /// K.
    pub k: u32,
    /// Elements from one row of the slice to the next.
    pub stride: u32,
    /// Weight rows in the slice.
    pub count: u32,
    /// First weight row of the slice: column of `out` and index into the bias.
    pub first: u32,
    /// N: elements a row of `out`.
    pub out_stride: u32,
    /// 1 if there is a bias.
    pub has_bias: u32,
    /// First row of the slice that is used.
    pub slice_row: u32,
    /// First row of `x` that is used.
    pub x_first: u32,
}

super::kernel!("linear", Params, [("x", Read), ("weight", Read), ("bias", Read), ("out", Write)]);

/// Rows of x a workgroup of the shader handles.
pub const ROWS_PER_WORKGROUP: u32 = 4;
/// Weight rows a workgroup of the shader handles.
pub const COLS_PER_WORKGROUP: u32 = 8;

/// Half of a small second-level cache.
const WEIGHT_BLOCK_BYTES: usize = 192 << 10;

/// How shaders are told a dtype.
pub const fn dtype_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
    }
}

/// One product: what all its tasks share.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// [rows, K].
    pub x: &'a [f32],
    /// [N, K].
    pub weight: MatrixView<'a>,
    /// [N].
    pub bias: Option<&'a [f32]>,
    /// [rows, N].
    pub out: SharedMut<'a>,
}

for_each_isa! {
    /// The CPU twin for the elements `rows` × `cols` of the product.
    ///
    /// The elements must be this task's own (the condition of [`SharedMut::slice`]).
    pub(crate) fn linear(product: Product, rows: Range<usize>, cols: Range<usize>) = body
}

/// The whole product on one thread: for tests and benches.
///
/// # Panics
/// If the lengths do not fit [rows, K] · [N, K]ᵀ = [rows, N].
pub fn linear_alone(isa: super::Isa, x: &[f32], weight: MatrixView, bias: Option<&[f32]>, out: &mut [f32]) {
    let (rows, cols) = (x.len() / weight.cols(), weight.rows());
    assert_eq!((x.len(), out.len()), (rows * weight.cols(), rows * cols));
    linear(isa, Product { x, weight, bias, out: SharedMut::new(out) }, 0..rows, 0..cols);
}

/// How one dtype's elements become lanes.
trait Load {
    const SIZE: usize;
    unsafe fn load<L: Lanes>(p: *const u8) -> L;
}

struct F32;
struct F16;
struct Bf16;

impl Load for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L {
        // SAFETY: the caller's promise; `Lanes::load` takes any alignment.
        unsafe { L::load(p.cast()) }
    }
}
impl Load for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_f16(p) }
    }
}
impl Load for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(p) }
    }
}

#[inline(always)]
fn body<L: Lanes>(product: Product, rows: Range<usize>, cols: Range<usize>) {
    let k = product.weight.cols();
    assert!(rows.end * k <= product.x.len() && cols.end <= product.weight.rows());
    // Weight rows by the block that fits the second-level cache: it serves every row of x.
    let step = (WEIGHT_BLOCK_BYTES / (k * product.weight.dtype().size()).max(1) / 24).max(1) * 24;
    let mut start = cols.start;
    while start < cols.end {
        let block = start..cols.end.min(start + step);
        match product.weight.dtype() {
            Dtype::F32 => all_rows::<L, F32>(product, rows.clone(), block),
            Dtype::F16 => all_rows::<L, F16>(product, rows.clone(), block),
            Dtype::BF16 => all_rows::<L, Bf16>(product, rows.clone(), block),
        }
        start += step;
    }
}

/// Rows of x in tiles of four: they stay in the first-level cache while the weight rows stream past.
#[inline(always)]
fn all_rows<L: Lanes, W: Load>(product: Product, rows: Range<usize>, cols: Range<usize>) {
    let mut t = rows.start;
    while t + 4 <= rows.end {
        all_cols::<L, W, 3, 4>(product, t, cols.clone());
        t += 4;
    }
    match rows.end - t {
        3 => all_cols::<L, W, 4, 3>(product, t, cols),
        2 => all_cols::<L, W, 4, 2>(product, t, cols),
        1 => all_cols::<L, W, 8, 1>(product, t, cols),
        _ => {}
    }
}

#[inline(always)]
fn all_cols<L: Lanes, W: Load, const NR: usize, const TR: usize>(product: Product, t: usize, cols: Range<usize>) {
    let mut n = cols.start;
    while n + NR <= cols.end {
        tile::<L, W, NR, TR>(product, t, n);
        n += NR;
    }
    while n < cols.end {
        tile::<L, W, 1, TR>(product, t, n);
        n += 1;
    }
}

/// NR weight rows times TR rows of x, all sums in registers.
#[inline(always)]
fn tile<L: Lanes, W: Load, const NR: usize, const TR: usize>(product: Product, t: usize, n: usize) {
    let Product { x, weight, bias, out } = product;
    let k = weight.cols();
    let w: [*const u8; NR] = std::array::from_fn(|i| weight.row(n + i).as_ptr());
    let x: [*const f32; TR] = std::array::from_fn(|i| x[(t + i) * k..(t + i + 1) * k].as_ptr());
    let mut sums = [[L::zero(); NR]; TR];
    let whole = k - k % L::N;
    let mut i = 0;
    while i < whole {
        // SAFETY: i + lanes ≤ k, the length of every row.
        unsafe {
            let w: [L; NR] = std::array::from_fn(|r| W::load(w[r].add(i * W::SIZE)));
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = L::load(x.add(i));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = sum.mul_add(w, x);
                }
            }
        }
        i += L::N;
    }
    let rest = k - whole;
    if rest > 0 {
        let w: [L; NR] = std::array::from_fn(|r| {
            let mut padded = [0u8; 64];
            let bytes = rest * W::SIZE;
            // SAFETY: `rest` elements are left in the row; lanes · size ≤ 64.
            unsafe {
                std::ptr::copy_nonoverlapping(w[r].add(whole * W::SIZE), padded.as_mut_ptr(), bytes);
                W::load(padded.as_ptr())
            }
        });
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: `rest` elements are left in the row.
            let x = unsafe { L::load_part(x.add(whole), rest) };
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = sum.mul_add(w, x);
            }
        }
    }
    let width = weight.rows();
    for (j, sums) in sums.iter().enumerate() {
        let at = (t + j) * width + n;
        // SAFETY: elements of this task, by the condition of `linear`.
        let out = unsafe { out.slice(at..at + NR) };
        for (r, sum) in sums.iter().enumerate() {
            out[r] = sum.sum() + bias.map_or(0.0, |b| b[n + r]);
        }
    }
}
