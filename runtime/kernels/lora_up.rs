//! y[t, n] += Σ_j down[t, j] · b[j, n] for the rows that have an adapter, while the product's sums are at hand: before a
//! bias, rope, silu or the residual stream. The GPU does it in the products themselves (shaders/include/adapter.wgsl).
//!
//! An element is one lane's sum over j in rising order, then one addition: the same for any tile and any instruction set.

use std::ops::Range;

use super::Isa;
use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};

/// Where a row's adapter is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Among the groups of rows that share an adapter.
    pub group: u32,
    /// The row's place in `down`.
    pub at: u32,
}

impl Place {
    /// Of a row without an adapter.
    pub const NONE: Place = Place { group: u32::MAX, at: 0 };
}

/// The second factor of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Up<'a> {
    /// B transposed, [R, N].
    pub b: &'a [f32],
    /// R.
    pub rank: usize,
    /// Where this product's elements begin in a row of `down`.
    pub first: usize,
}

/// What adapters add to a product.
#[derive(Clone, Copy)]
pub(crate) struct Delta<'a> {
    /// By row of the product.
    pub places: &'a [Place],
    /// By group; `None` where the adapter leaves this product as it is.
    pub ups: &'a [Option<Up<'a>>],
    /// scale · A x, [rows that have an adapter, stride].
    pub down: &'a [f32],
    pub stride: usize,
}

impl Delta<'_> {
    /// Adds to `sums`, the elements `rows` × `cols` of a product with N columns.
    pub(crate) fn add(&self, isa: Isa, rows: Range<usize>, cols: Range<usize>, width: usize, sums: &mut [f32]) {
        for (row, sums) in rows.zip(sums.chunks_exact_mut(cols.len())) {
            let place = self.places[row];
            let Some(up) = self.ups.get(place.group as usize).copied().flatten() else { continue };
            let down = &self.down[place.at as usize * self.stride + up.first..][..up.rank];
            lora_up(isa, down, up.b, width, cols.start, sums);
        }
    }
}

for_each_isa! {
    /// The CPU twin for one row: `down` is [R], `b` [R, width], `sums` has the columns from `first` on.
    pub fn lora_up(down: &[f32], b: &[f32], width: usize, first: usize, sums: &mut [f32]) = body
}

#[inline(always)]
fn body<L: Lanes>(down: &[f32], b: &[f32], width: usize, first: usize, sums: &mut [f32]) {
    assert!(first + sums.len() <= width && b.len() >= down.len() * width);
    // Four vectors at a time: each waits for its own multiply-adds only.
    let whole = sums.len() - sums.len() % (4 * L::N);
    let mut n = 0;
    while n < whole {
        let mut total = [L::zero(); 4];
        for (j, v) in down.iter().enumerate() {
            let (v, row) = (L::splat(*v), j * width + first + n);
            for (i, total) in total.iter_mut().enumerate() {
                // SAFETY: first + n + 4 vectors ≤ width, and b has a row of it for each element of `down`.
                *total = total.mul_add(v, unsafe { load::<L>(b, row + i * L::N, L::N) });
            }
        }
        for (i, total) in total.into_iter().enumerate() {
            let at = n + i * L::N;
            // SAFETY: at + lanes ≤ the length of sums.
            unsafe { store(load::<L>(sums, at, L::N).add(total), sums, at, L::N) };
        }
        n += 4 * L::N;
    }
    let rest = &mut sums[whole..];
    for_lanes!(L, rest.len(), |i, n| {
        let mut total = L::zero();
        for (j, v) in down.iter().enumerate() {
            // SAFETY: as above.
            total = total.mul_add(L::splat(*v), unsafe { load::<L>(b, j * width + first + whole + i, n) });
        }
        // SAFETY: i + n ≤ the length of rest.
        unsafe { store(load::<L>(rest, i, n).add(total), rest, i, n) };
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_and_every_cut_agree_to_the_bit() {
        let (rank, width) = (7, 203);
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let down: Vec<f32> = (0..rank).map(value).collect();
        let b: Vec<f32> = (0..rank * width).map(|i| value(i + 99)).collect();
        let sums: Vec<f32> = (0..width).map(|i| value(i + 7)).collect();
        // The portable lanes round products.
        let fused = |v: f32, w: f32, total: f32| v.mul_add(w, total);
        let rounded = |v: f32, w: f32, total: f32| v * w + total;
        let expected = |step: &dyn Fn(f32, f32, f32) -> f32| -> Vec<f32> {
            let total = |n| (0..rank).fold(0.0f32, |t, j| step(down[j], b[j * width + n], t));
            (0..width).map(|n| sums[n] + total(n)).collect()
        };
        for isa in Isa::available() {
            let want = if isa.name() == "portable" { expected(&rounded) } else { expected(&fused) };
            for cut in [0, 1, 16, 100, 203] {
                let mut got = sums.clone();
                lora_up(isa, &down, &b, width, 0, &mut got[..cut]);
                lora_up(isa, &down, &b, width, cut, &mut got[cut..]);
                assert_eq!(got, want, "{isa:?} {cut}");
            }
        }
    }
}
