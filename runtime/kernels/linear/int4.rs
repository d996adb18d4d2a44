//! 4-bit weights: q in −8 … 7, one scale s for each block of [`BLOCK`] elements of a row.
//!
//! A block is 16 bytes: byte i has q + 8 of element i in its low nibble and q + 8 of element i + 16 in its high one. So a
//! shift and a mask give sixteen elements in order, or four of them from a u32 word. Sums fit: 32 · 8 · 32767 < 2^31.
//!
//! The scale: m is the element of the largest magnitude, the first of equals. For each d of [`TRIED`] (8 alone is q4_0 of
//! llama.cpp), q = round(w · −d / m), ties to even, kept within −8 … 7. Of these q the one with the largest
//! (Σ w q)² / Σ q² is taken, the first of equals, and s = Σ w q / Σ q²: what makes Σ (w − q s)² least for it.

use std::ops::Range;

use super::blocks::{self, BlockFormat, BlockMatrix, BlockView, Unpack};
use super::input::Packed;
use crate::kernels::lanes::{Lanes, for_each_isa};

/// Elements of a row that share a scale.
pub const BLOCK: usize = 32;

/// Bytes of a block: byte i holds the elements i and i + [`HALF`].
const HALF: usize = BLOCK / 2;

/// What is added to q in its nibble.
const ZERO: u8 = 8;

/// What −m is tried as: more and finer ones take off another half a percent of the squared error (SmolLM2).
const TRIED: [f32; 7] = [8.0, 7.5, 8.5, 7.0, 9.0, 6.5, 9.5];

/// The format of [`super::WeightFormat::Int4`].
pub enum Int4 {}

/// A weight of 4 bits an element.
pub type Int4Matrix = BlockMatrix<Int4>;

/// A view of an [`Int4Matrix`].
pub type Int4View<'a> = BlockView<'a, Int4>;

impl BlockFormat for Int4 {
    const BLOCK: usize = BLOCK;
    const BYTES: usize = HALF;
    const BITS: usize = 4;

    fn quantise(values: &[f32], block: &mut [u8]) -> f32 {
        let largest = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
        let inverse = 1.0 / largest;
        if !inverse.is_finite() {
            block.fill(ZERO << 4 | ZERO);
            return 0.0;
        }
        // In units of the largest: no sum overflows.
        let mut units = [0.0; BLOCK];
        for (unit, v) in units.iter_mut().zip(values) {
            *unit = v * inverse;
        }
        let mut best = Fit { gain: -1.0, scale: 0.0, q: [0.0; BLOCK] };
        for tried in TRIED {
            let fit = Fit::of(&units, tried);
            if fit.gain > best.gain {
                best = fit;
            }
        }
        let stored = |q: f32| q as i8 as u8 + ZERO;
        let (low, high) = best.q.split_at(HALF);
        for (byte, (low, high)) in block.iter_mut().zip(low.iter().zip(high)) {
            *byte = stored(*low) | stored(*high) << 4;
        }
        largest * best.scale
    }

    fn read_f32(block: &[u8], scale: f32, out: &mut [f32]) {
        let value = |nibble: u8| (f32::from(nibble) - f32::from(ZERO)) * scale;
        let (low, high) = out.split_at_mut(out.len().min(HALF));
        for (out, byte) in low.iter_mut().zip(block) {
            *out = value(byte & 15);
        }
        for (out, byte) in high.iter_mut().zip(block) {
            *out = value(byte >> 4);
        }
    }
}

/// A choice of q for a block.
struct Fit {
    /// (Σ w q)² / Σ q²: how much of Σ w² the choice explains.
    gain: f32,
    scale: f32,
    q: [f32; BLOCK],
}

impl Fit {
    /// The q of values whose largest is 1 and becomes −`tried`.
    fn of(units: &[f32; BLOCK], tried: f32) -> Fit {
        // Adding 1.5 · 2^23 leaves no fraction: it rounds to nearest, ties to even, without a call.
        const ROUND: f32 = 12_582_912.0;
        let mut q = [0.0; BLOCK];
        // Eight sums side by side, which the compiler makes vectors of.
        let (mut products, mut squares) = ([0.0f32; 8], [0.0f32; 8]);
        for (q, units) in q.chunks_exact_mut(8).zip(units.chunks_exact(8)) {
            for i in 0..8 {
                q[i] = ((units[i] * -tried + ROUND) - ROUND).clamp(-8.0, 7.0);
                products[i] += units[i] * q[i];
                squares[i] += q[i] * q[i];
            }
        }
        // The largest is never rounded to 0, so neither is the sum of squares.
        let (product, square) = (products.iter().sum::<f32>(), squares.iter().sum::<f32>());
        Fit { gain: product * product / square, scale: product / square, q }
    }
}

impl Unpack for Int4 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(block: *const u8, i: usize) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::load_nibbles(block, i) }
    }
}

for_each_isa! {
    /// See [`super::column_sums`], which checks the lengths.
    pub(super) fn sums(x: &Packed, rows: Range<usize>, view: Int4View, cols: Range<usize>, out: &mut [f32], next: *const u8) = body
}

#[inline(always)]
fn body<L: Lanes>(
    x: &Packed,
    rows: Range<usize>,
    view: Int4View,
    cols: Range<usize>,
    out: &mut [f32],
    next: *const u8,
) {
    blocks::body::<L, Int4>(x, rows, view, cols, out, next);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::backend::cpu::Pool;
    use crate::kernels::MatrixView;
    use crate::weights::Dtype;

    fn quantised(rows: usize, cols: usize, values: &[f32]) -> Int4Matrix {
        let stored = Dtype::F32.from_f32(values);
        Int4Matrix::quantise(MatrixView::new(Dtype::F32, &stored, rows, cols), &Pool::new(2)).unwrap()
    }

    fn squared_error(got: &[f32], want: &[f32]) -> f64 {
        got.iter().zip(want).map(|(g, w)| (f64::from(*g) - f64::from(*w)).powi(2)).sum()
    }

    /// q4_0 of llama.cpp: scale = m / −8.
    fn plain(values: &[f32]) -> Vec<f32> {
        let m = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
        let scale = m / -8.0;
        values.iter().map(|v| if m == 0.0 { 0.0 } else { (v / scale).round().clamp(-8.0, 7.0) * scale }).collect()
    }

    #[test]
    fn a_byte_holds_an_element_of_each_half() {
        // Every q once and again, with a scale of 0.5: exact, since one of the choices is.
        let values: Vec<f32> = (0..BLOCK).map(|i| ((i * 5 % 16) as f32 - 8.0) * 0.5).collect();
        let matrix = quantised(1, BLOCK, &values);
        assert_eq!(matrix.view().scales(), [0.5]);
        for (i, byte) in matrix.view().quants().iter().enumerate() {
            assert_eq!((byte & 15, byte >> 4), ((i * 5 % 16) as u8, ((i + HALF) * 5 % 16) as u8));
        }
        let mut back = vec![0.0; BLOCK];
        matrix.view().read_f32(0, &mut back);
        assert_eq!(back, values);
    }

    #[test]
    fn the_error_of_a_block_is_at_most_that_of_q4_0() {
        let (mut ours, mut theirs) = (0.0, 0.0);
        for seed in 0..200usize {
            let hash = |i: usize| ((i + seed * 7919).wrapping_mul(2_654_435_761) >> 7) % 2001;
            let spread = 10f32.powi(seed as i32 % 60 - 30);
            let values: Vec<f32> = (0..100).map(|i| (hash(i) as f32 / 1000.0 - 1.0).powi(3) * spread).collect();
            let matrix = quantised(1, 100, &values);
            let mut back = vec![0.0; 100];
            matrix.view().read_f32(0, &mut back);
            for (got, want) in back.chunks(BLOCK).zip(values.chunks(BLOCK)) {
                let unit = f64::from(spread).powi(2);
                let (error, q4_0) = (squared_error(got, want) / unit, squared_error(&plain(want), want) / unit);
                assert!(error <= q4_0 * 1.0001 + 1e-12, "{error} {q4_0}");
                (ours, theirs) = (ours + error, theirs + q4_0);
            }
        }
        assert!(ours < 0.9 * theirs, "{ours} {theirs}");
    }

    #[test]
    fn the_smallest_and_the_largest() {
        for value in [0.0, -0.0, 1e-45, f32::MAX, -f32::MAX, f32::MIN_POSITIVE] {
            // A row is whole blocks; what is behind K is 0 as well.
            let matrix = quantised(2, 33, &[value; 66]);
            let mut back = vec![f32::NAN; 33];
            matrix.view().read_f32(1, &mut back);
            assert!(back.iter().all(|v| (v - value).abs() <= value.abs() * 1e-6 + 1e-44), "{value}: {back:?}");
            assert_eq!(matrix.view().quants()[17..32], [0x88; 15]);
            assert_eq!(matrix.bytes(), Int4Matrix::bytes_for(2, 33));
            assert_eq!(matrix.bytes(), 2 * 2 * (16 + 4));
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let mut values = vec![1.0f32; 80];
        values[75] = f32::NAN;
        let stored = Dtype::F32.from_f32(&values);
        let refused = Int4Matrix::quantise(MatrixView::new(Dtype::F32, &stored, 2, 40), &Pool::new(1));
        let error = refused.err().unwrap();
        assert_eq!(error.kind(), crate::error::ErrorKind::NonFinite);
        assert!(error.to_string().contains("row 1, column 35 is NaN"), "{error}");
        assert!(error.to_string().contains("to 4 bits"), "{error}");
    }
}
