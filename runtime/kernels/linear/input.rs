//! The inputs of a product, packed once for all its tasks: taken through the RMS norm where the Plan says so, and
//! rounded as the [`Arithmetic`] asks.

use std::cell::RefCell;
use std::ops::Range;

use super::Arithmetic;
#[cfg(target_arch = "x86_64")]
use super::amx;
use crate::backend::cpu::Pool;
use crate::error::{Result, try_vec};
use crate::kernels::lanes::{Lanes, for_each_isa, for_lanes, load};
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::{Isa, SharedMut};

/// The norm that x goes through first.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    /// [K].
    pub weight: &'a [f32],
    pub eps: f32,
}

/// What is to be packed.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    /// [rows, K].
    pub x: &'a [f32],
    pub rows: usize,
    pub k: usize,
    pub norm: Option<Norm<'a>>,
}

/// A cache line: what packed rows are aligned to.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

// SAFETY: plain bytes.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: plain bytes without padding (64 bytes, aligned to 64).
unsafe impl bytemuck::Pod for Line {}

/// Memory for packed inputs, kept from product to product.
#[derive(Default)]
pub(crate) struct PackBuffer {
    lines: Vec<Line>,
    scales: Vec<f32>,
}

/// Packed inputs [rows, K].
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    arithmetic: Arithmetic,
    rows: usize,
    k: usize,
    /// Elements from one row to the next (from one group of sixteen rows to the next for AMX).
    stride: usize,
    data: &'a [u8],
    /// One a row, for 16-bit integers.
    scales: &'a [f32],
}

impl<'a> Packed<'a> {
    /// f32 inputs [rows, K] where they are.
    pub(crate) fn plain(x: &'a [f32], rows: usize, k: usize) -> Self {
        assert_eq!(x.len(), rows * k);
        Packed { arithmetic: Arithmetic::Fma, rows, k, stride: k, data: bytemuck::cast_slice(x), scales: &[] }
    }

    pub(crate) fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// [rows, K].
    pub(super) fn f32_rows(&self, rows: Range<usize>) -> &'a [f32] {
        assert_eq!(self.arithmetic, Arithmetic::Fma);
        let all: &[f32] = bytemuck::cast_slice(self.data);
        &all[rows.start * self.k..rows.end * self.k]
    }

    /// [rows, stride] and the stride: K rounded up, with zeros.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn bf16_rows(&self, rows: Range<usize>) -> (&'a [u16], usize) {
        assert_eq!(self.arithmetic, Arithmetic::Bf16);
        let all: &[u16] = bytemuck::cast_slice(self.data);
        (&all[rows.start * self.stride..rows.end * self.stride], self.stride)
    }

    /// The tiles, the terms, and the bytes of a group of sixteen rows.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn amx_tiles(&self) -> (&'a [u8], usize, usize) {
        let Arithmetic::Amx { terms } = self.arithmetic else { panic!("packed for {:?}", self.arithmetic) };
        (self.data, terms, 2 * self.stride)
    }

    /// [rows, stride], the stride (K rounded up, with zeros), and the scale of each row.
    pub(super) fn i16_rows(&self, rows: Range<usize>) -> (&'a [i16], usize, &'a [f32]) {
        assert!(matches!(self.arithmetic, Arithmetic::Int8 | Arithmetic::Int4));
        let all: &[i16] = bytemuck::cast_slice(self.data);
        (&all[rows.start * self.stride..rows.end * self.stride], self.stride, &self.scales[rows])
    }
}

impl PackBuffer {
    /// Makes room for any packing of [rows, k], so that packing allocates nothing.
    ///
    /// # Errors
    /// `HostMemory`.
    pub(crate) fn reserve(&mut self, rows: usize, k: usize) -> Result<()> {
        let lines = Self::bytes_for(rows, k) / 64;
        if self.lines.len() < lines {
            self.lines = Vec::new();
            self.lines = try_vec("packed inputs", Line([0; 64]), lines)?;
        }
        if self.scales.len() < rows {
            self.scales = try_vec("packed inputs", 0.0, rows)?;
        }
        Ok(())
    }

    /// Bytes that hold any packing of [rows, k]: f32, or two bf16 terms of whole groups of sixteen rows.
    pub(crate) fn bytes_for(rows: usize, k: usize) -> usize {
        4 * rows.next_multiple_of(16) * k.next_multiple_of(64)
    }

    /// Packs `source` for `arithmetic`; without a norm f32 inputs are used where they are.
    pub(crate) fn pack<'a>(
        &'a mut self,
        isa: Isa,
        pool: &Pool,
        arithmetic: Arithmetic,
        source: Source<'a>,
    ) -> Packed<'a> {
        let Source { x, rows, k, norm } = source;
        let packed = Packed { arithmetic, ..Packed::plain(x, rows, k) };
        match arithmetic {
            Arithmetic::Fma => {
                let Some(norm) = norm else { return packed };
                let out = SharedMut::new(self.room::<f32>(rows * k));
                pool.over_rows(rows, k, &|rows| {
                    let span = rows.start * k..rows.end * k;
                    // SAFETY: tasks have disjoint rows.
                    rms_norm(isa, &x[span.clone()], norm.weight, norm.eps, unsafe { out.slice(span) });
                });
                Packed { data: self.bytes(rows * k * 4), ..packed }
            }
            Arithmetic::Bf16 => {
                let stride = k.next_multiple_of(32);
                let out = SharedMut::new(self.room::<u16>(rows * stride));
                pool.over_rows(rows, k, &|rows| {
                    for t in rows {
                        normed(isa, &source, t, |row| {
                            // SAFETY: tasks have disjoint rows.
                            round_to_bf16(row, unsafe { out.slice(t * stride..(t + 1) * stride) });
                        });
                    }
                });
                Packed { stride, data: self.bytes(rows * stride * 2), ..packed }
            }
            Arithmetic::Int8 | Arithmetic::Int4 => {
                let block = if arithmetic == Arithmetic::Int8 { super::INT8_BLOCK } else { super::INT4_BLOCK };
                let stride = k.next_multiple_of(block);
                let scales = SharedMut::new(&mut self.scales[..rows]);
                let out = SharedMut::new(room::<i16>(&mut self.lines, rows * stride));
                pool.over_rows(rows, k, &|rows| {
                    for t in rows {
                        normed(isa, &source, t, |row| {
                            // SAFETY: tasks have disjoint rows.
                            let (out, scale) =
                                unsafe { (out.slice(t * stride..(t + 1) * stride), scales.slice(t..t + 1)) };
                            scale[0] = round_to_i16(isa, row, out);
                        });
                    }
                });
                Packed { stride, data: bytes(&self.lines, rows * stride * 2), scales: &self.scales[..rows], ..packed }
            }
            #[cfg(not(target_arch = "x86_64"))]
            Arithmetic::Amx { .. } => unreachable!("tiles off x86_64"),
            #[cfg(target_arch = "x86_64")]
            Arithmetic::Amx { terms } => {
                let stride = amx::group_len(k, terms);
                let groups = rows.div_ceil(16);
                let out = SharedMut::new(self.room::<u16>(groups * stride));
                pool.over_rows(groups, 16 * k, &|groups| {
                    let mut split = vec![0; terms * amx::term_len(k)];
                    for group in groups {
                        split.fill(0);
                        for t in group * 16..rows.min(group * 16 + 16) {
                            normed(isa, &source, t, |row| amx::split_row(row, t % 16, &mut split));
                        }
                        // SAFETY: tasks have disjoint groups.
                        amx::pack_group(&split, k, unsafe { out.slice(group * stride..(group + 1) * stride) });
                    }
                });
                Packed { stride, data: self.bytes(groups * stride * 2), ..packed }
            }
        }
    }

    fn room<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        room(&mut self.lines, len)
    }

    fn bytes(&self, len: usize) -> &[u8] {
        bytes(&self.lines, len)
    }
}

/// The first `len` elements of the buffer.
fn room<T: bytemuck::Pod>(lines: &mut [Line], len: usize) -> &mut [T] {
    &mut bytemuck::cast_slice_mut::<Line, T>(lines)[..len]
}

fn bytes(lines: &[Line], len: usize) -> &[u8] {
    &bytemuck::cast_slice::<Line, u8>(lines)[..len]
}

/// Calls `f` with row t of the source, after its norm.
fn normed(isa: Isa, source: &Source, t: usize, f: impl FnOnce(&[f32])) {
    thread_local! {
        static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let row = &source.x[t * source.k..(t + 1) * source.k];
    match source.norm {
        None => f(row),
        Some(norm) => ROW.with_borrow_mut(|scratch| {
            scratch.resize(source.k, 0.0);
            rms_norm(isa, row, norm.weight, norm.eps, scratch);
            f(scratch);
        }),
    }
}

/// Nearest, ties to even; subnormals become zero, as the multiplying instruction would read them. The rest of `out` is
/// zero.
pub(super) fn round_to_bf16(row: &[f32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        fn on(row: &[f32], out: &mut [u16]) {
            let mut i = 0;
            while i < row.len() {
                let n = (row.len() - i).min(16);
                // SAFETY: the mask keeps both to n elements; out is at least as long as the row.
                unsafe {
                    let mask = ((1u32 << n) - 1) as __mmask16;
                    let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row.as_ptr().add(i)));
                    let rounded = std::mem::transmute::<__m256bh, __m256i>(rounded);
                    _mm256_mask_storeu_epi16(out.as_mut_ptr().add(i).cast(), mask, rounded);
                }
                i += 16;
            }
        }
        assert!(row.len() <= out.len());
        // SAFETY: bf16 arithmetics are chosen only where the instruction set is.
        unsafe { on(row, out) };
        out[row.len()..].fill(0);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("bf16 arithmetic off x86_64: {} {}", row.len(), out.len());
}

for_each_isa! {
    /// q = round(x · 32767 / max |x|), ties to even; returns max |x| / 32767 (NaN if an input is not finite, which
    /// makes every product NaN). The rest of `out` is zero.
    fn round_to_i16(row: &[f32], out: &mut [i16]) -> f32 = round_to_i16_body
}

#[inline(always)]
fn round_to_i16_body<L: Lanes>(row: &[f32], out: &mut [i16]) -> f32 {
    const LARGEST: f32 = 32767.0;
    // `trap` becomes NaN if an input is not finite.
    let (mut most, mut trap) = (L::zero(), L::zero());
    for_lanes!(L, row.len(), |i, n| {
        // SAFETY: i + n ≤ the row's length.
        let v = unsafe { load::<L>(row, i, n) };
        trap = trap.mul_add(v, L::zero());
        most = v.max(L::zero().sub(v)).max(most);
    });
    out.fill(0);
    let most = most.largest();
    if trap.sum().is_nan() {
        return f32::NAN;
    }
    let inverse = LARGEST / most;
    if !inverse.is_finite() {
        // All zero, or so small that its products are zero beside anything else.
        return 0.0;
    }
    for_lanes!(L, row.len(), |i, n| {
        let mut rounded = [0.0f32; 16];
        // SAFETY: i + n ≤ the row's length; lanes ≤ 16.
        unsafe { load::<L>(row, i, n).mul(L::splat(inverse)).round().store(rounded.as_mut_ptr()) };
        for (out, v) in out[i..i + n].iter_mut().zip(rounded) {
            // Within ±32767 by construction; `as` saturates.
            *out = v as i16;
        }
    });
    most / LARGEST
}
