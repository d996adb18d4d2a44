//! y[t, n] += Σ_j down[t, j] · b[j, n] for the rows that have an adapter, while the product's sums are at hand: before a
//! bias, rope, silu or the residual stream. The GPU does it in the products themselves (shaders/include/adapter.wgsl).
//!
//! An element is one lane's sum over j in rising order, then one addition: the same for any tile, and for any instruction set that
//! fuses a multiplication and an addition (the portable loops round twice).
//! Rows of an adapter share what is loaded of b, not sums.

use std::ops::Range;

use super::Isa;
use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};

/// The second factor of a product, and the rows that it is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Up<'a> {
    /// B transposed, [R, N].
    pub b: &'a [f32],
    /// R.
    pub rank: usize,
    /// Rows of the product that have this adapter, rising.
    pub rows: &'a [u32],
    /// Where the first of them is in `down`.
    pub at: usize,
    /// Where this product's elements begin in a row of `down`.
    pub first: usize,
}

/// What adapters add to a product.
#[derive(Clone, Copy)]
pub(crate) struct Delta<'a> {
    /// One an adapter; no row is in two of them.
    pub ups: &'a [Up<'a>],
    /// scale · A x, [rows that have an adapter, stride].
    pub down: &'a [f32],
    pub stride: usize,
}

/// Rows that share what is loaded.
const ROWS: usize = 4;

impl Delta<'_> {
    /// Adds to `sums`, the elements `rows` × `cols` of a product with N columns.
    pub(crate) fn add(&self, isa: Isa, rows: Range<usize>, cols: Range<usize>, width: usize, sums: &mut [f32]) {
        for up in self.ups {
            let before = |end: usize| up.rows.partition_point(|row| (*row as usize) < end);
            let (start, end) = (before(rows.start), before(rows.end));
            for chunk in (start..end).step_by(ROWS) {
                let count = ROWS.min(end - chunk);
                // Where there are fewer rows the last one stands for those that are missing; nobody looks at it.
                let row = |i: usize| chunk + i.min(count - 1);
                let down = |i| &self.down[(up.at + row(i)) * self.stride + up.first..][..up.rank];
                let place = |i| (up.rows[row(i)] as usize - rows.start) * cols.len();
                let tile = Tile {
                    down: std::array::from_fn(down),
                    b: up.b,
                    width,
                    first: cols.start,
                    cols: cols.len(),
                    places: std::array::from_fn(place),
                    count,
                };
                lora_up(isa, &tile, sums);
            }
        }
    }
}

/// Some rows of an adapter, and the columns of a task.
pub(crate) struct Tile<'a> {
    /// [R] each.
    down: [&'a [f32]; ROWS],
    /// [R, width].
    b: &'a [f32],
    width: usize,
    /// First column.
    first: usize,
    cols: usize,
    /// Where the rows begin in the sums.
    places: [usize; ROWS],
    /// Of the rows, how many count.
    count: usize,
}

for_each_isa! {
    /// The CPU twin: adds to `cols` sums of each row.
    pub(crate) fn lora_up(tile: &Tile, sums: &mut [f32]) = body
}

#[inline(always)]
fn body<L: Lanes>(tile: &Tile, sums: &mut [f32]) {
    let rank = tile.down[0].len();
    assert!(tile.down.iter().all(|d| d.len() == rank));
    assert!(tile.first + tile.cols <= tile.width && rank * tile.width <= tile.b.len());
    assert!(tile.places.iter().all(|place| place + tile.cols <= sums.len()));
    match tile.count {
        1 => rows::<L, 1, 4>(tile, rank, sums),
        2 => rows::<L, 2, 4>(tile, rank, sums),
        3 => rows::<L, 3, 2>(tile, rank, sums),
        _ => rows::<L, 4, 2>(tile, rank, sums),
    }
}

/// TR rows, V vectors of columns at a time: as many sums as keep the multipliers busy.
#[inline(always)]
fn rows<L: Lanes, const TR: usize, const V: usize>(tile: &Tile, rank: usize, sums: &mut [f32]) {
    let whole = tile.cols - tile.cols % (V * L::N);
    let mut n = 0;
    while n < whole {
        let mut totals = [[L::zero(); V]; TR];
        for j in 0..rank {
            let row = j * tile.width + tile.first + n;
            // SAFETY: first + n + V vectors ≤ width, and b has a row of it for each of `rank` (`body`).
            let b: [L; V] = std::array::from_fn(|i| unsafe { load::<L>(tile.b, row + i * L::N, L::N) });
            for (t, total) in totals.iter_mut().enumerate() {
                let v = L::splat(tile.down[t][j]);
                for (total, b) in total.iter_mut().zip(b) {
                    *total = total.mul_add(v, b);
                }
            }
        }
        for (t, total) in totals.into_iter().enumerate() {
            for (i, total) in total.into_iter().enumerate() {
                let at = tile.places[t] + n + i * L::N;
                // SAFETY: within the columns of a row of sums (`body`).
                unsafe { store(load::<L>(sums, at, L::N).add(total), sums, at, L::N) };
            }
        }
        n += V * L::N;
    }
    for place in 0..TR {
        for_lanes!(L, tile.cols - whole, |i, n| {
            let mut total = L::zero();
            for (j, v) in tile.down[place].iter().enumerate() {
                // SAFETY: as above.
                let b = unsafe { load::<L>(tile.b, j * tile.width + tile.first + whole + i, n) };
                total = total.mul_add(L::splat(*v), b);
            }
            let at = tile.places[place] + whole + i;
            // SAFETY: as above.
            unsafe { store(load::<L>(sums, at, n).add(total), sums, at, n) };
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_one_sum_in_rising_order_however_it_is_cut() {
        let (rank, width, rows) = (7, 203, 11);
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let b: [Vec<f32>; 2] = [99, 5].map(|salt| (0..rank * width).map(|i| value(i + salt)).collect());
        let members: [Vec<u32>; 2] = [vec![0, 1, 2, 5, 6, 9, 10], vec![3, 8]];
        let down: Vec<f32> = (0..9 * rank).map(value).collect();
        let sums: Vec<f32> = (0..rows * width).map(|i| value(i + 7)).collect();
        let up = |group: usize, at| Up { b: &b[group], rank, rows: &members[group], at, first: 0 };
        let delta = Delta { ups: &[up(0, 0), up(1, 7)], down: &down, stride: rank };
        for isa in Isa::available() {
            let fused = isa != Isa::Portable;
            let fma = |a: f32, b: f32, c: f32| if fused { a.mul_add(b, c) } else { c + a * b };
            let mut want = sums.clone();
            for (group, first) in [(0, 0), (1, 7)] {
                for (i, row) in members[group].iter().enumerate() {
                    let down = &down[(first + i) * rank..][..rank];
                    for n in 0..width {
                        let delta = (0..rank).fold(0.0f32, |t, j| fma(down[j], b[group][j * width + n], t));
                        want[*row as usize * width + n] += delta;
                    }
                }
            }
            for (row, col) in [(0, 0), (1, 1), (4, 16), (7, 100), (11, 203)] {
                let mut got = sums.clone();
                for rows in [0..row, row..rows] {
                    for cols in [0..col, col..width].into_iter().filter(|c| !c.is_empty()) {
                        let of = |r: usize| r * width + cols.start..r * width + cols.end;
                        let mut part: Vec<f32> = rows.clone().flat_map(|r| got[of(r)].to_vec()).collect();
                        delta.add(isa, rows.clone(), cols.clone(), width, &mut part);
                        for (r, part) in rows.clone().zip(part.chunks_exact(cols.len())) {
                            got[of(r)].copy_from_slice(part);
                        }
                    }
                }
                assert!(got == want, "{isa:?} {row} {col}");
            }
        }
    }
}
