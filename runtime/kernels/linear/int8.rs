//! 8-bit weights: q = round(w / s), s = max |w| / 127 over each block of [`BLOCK`] elements of a row; symmetric.
//!
//! A block is its q in order, a byte each. Sums over a block fit: 64 · 127 · 32767 < 2^31.

use std::ops::Range;

use super::blocks::{self, BlockFormat, BlockMatrix, BlockView, Unpack};
use super::input::Packed;
use crate::kernels::lanes::{Lanes, for_each_isa};

/// Elements of a row that share a scale.
pub const BLOCK: usize = 64;

/// The format of [`super::WeightFormat::Int8`].
pub enum Int8 {}

/// A weight of 8 bits an element.
pub type Int8Matrix = BlockMatrix<Int8>;

/// A view of an [`Int8Matrix`].
pub type Int8View<'a> = BlockView<'a, Int8>;

impl BlockFormat for Int8 {
    const BLOCK: usize = BLOCK;
    const BYTES: usize = BLOCK;
    const BITS: usize = 8;

    fn quantise(values: &[f32], block: &mut [u8]) -> f32 {
        let most = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = 127.0 / most;
        if !inverse.is_finite() {
            block.fill(0);
            return 0.0;
        }
        let (whole, rest) = block.split_at_mut(values.len());
        for (q, v) in whole.iter_mut().zip(values) {
            // Within ±127 by construction; `as` saturates.
            *q = ((v * inverse).round_ties_even() as i8).cast_unsigned();
        }
        rest.fill(0);
        most / 127.0
    }

    fn read_f32(block: &[u8], scale: f32, out: &mut [f32]) {
        for (out, q) in out.iter_mut().zip(block) {
            *out = f32::from(q.cast_signed()) * scale;
        }
    }
}

impl Unpack for Int8 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(block: *const u8, i: usize) -> L::Pairs {
        // SAFETY: the caller's promise.
        unsafe { L::load_i8(block.add(i).cast()) }
    }
}

for_each_isa! {
    /// See [`super::column_sums`], which checks the lengths.
    pub(super) fn sums(x: &Packed, rows: Range<usize>, view: Int8View, cols: Range<usize>, out: &mut [f32], next: *const u8) = body
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
    blocks::body::<L, Int8>(x, rows, view, cols, out, next);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::backend::cpu::Pool;
    use crate::kernels::MatrixView;
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
                let step = matrix.view().scales()[r * 2 + i / BLOCK];
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
        assert_eq!(error.kind(), crate::error::ErrorKind::NonFinite);
        assert!(error.to_string().contains("row 1, column 1 is inf"), "{error}");
    }
}
