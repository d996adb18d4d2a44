//! [`super::Arithmetic::Bf16`]: bf16 weights times bf16 inputs, 32 products an instruction (AVX-512 BF16).
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::input::Packed;
use super::tile::{self, Block, Multiply};
use crate::kernels::MatrixView;
use crate::kernels::lanes::Avx512;

struct Pairs;

// The intrinsics are inlined into `sums_on`, which enables the instruction set.
impl Multiply for Pairs {
    type Sum = Avx512;
    type W = __m512i;
    type X = __m512i;
    const STEP: usize = 32;
    const W_SIZE: usize = 2;
    const X_SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load_w(p: *const u8) -> __m512i {
        // SAFETY: 64 readable bytes, the caller's promise.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_w_part(p: *const u8, n: usize) -> __m512i {
        // SAFETY: the mask keeps it to n elements.
        unsafe { _mm512_maskz_loadu_epi16((1u32 << n) - 1, p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_x(p: *const u8) -> __m512i {
        // SAFETY: 64 readable bytes, the caller's promise.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_x_part(p: *const u8, _n: usize) -> __m512i {
        // SAFETY: packed rows are padded with zeros to whole steps.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    fn mul_add(sum: Avx512, w: __m512i, x: __m512i) -> Avx512 {
        // SAFETY: the instruction set is enabled where this is inlined; both types are 64 plain bytes.
        unsafe {
            let (w, x) = (std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(x));
            Avx512(_mm512_dpbf16_ps(sum.0, w, x))
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn sums_on(block: Block) {
    // SAFETY: the caller's promise.
    unsafe { tile::sums::<Pairs>(block) }
}

/// See [`super::column_sums`], which checks the lengths.
pub(super) fn sums(
    x: &Packed,
    rows: Range<usize>,
    view: MatrixView,
    cols: Range<usize>,
    out: &mut [f32],
    next: *const u8,
) {
    let k = view.cols();
    let (packed, stride) = x.bf16_rows(rows.clone());
    let block = Block {
        w: view.rows_bytes(cols.clone()).as_ptr(),
        w_stride: 2 * k,
        x: packed.as_ptr().cast(),
        x_stride: 2 * stride,
        k,
        rows: rows.len(),
        cols: cols.len(),
        out: out.as_mut_ptr(),
        out_stride: cols.len(),
        next,
    };
    // SAFETY: this arithmetic is chosen only where the instruction set is; x has `rows` padded rows, the view `cols`
    // rows of K, out is [rows, cols].
    unsafe { sums_on(block) }
}
