//! A software model of shaders/include/tiles.wgsl: the same index expressions, the multiply-adds on whole tiles as a matrix
//! unit does them. What it reads is inside the packed buffers, what it writes is written once; the shader has its bits.

use rewardrt::backend::gpu::{MatrixUnits, TileShape, tiled_product};

use super::*;

/// A variant of the shader and its constants.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    tile: usize,
    shape: TileShape,
    head: bool,
    chunks: usize,
}

impl Tiling {
    fn all() -> Vec<Tiling> {
        let mut all = Vec::new();
        for tile in [8, 16] {
            let shapes = [TileShape::Narrow, TileShape::Medium, TileShape::Wide];
            all.extend(shapes.map(|shape| Tiling { tile, shape, head: false, chunks: 8 }));
            all.extend([shapes[0], shapes[2]].map(|shape| Tiling { tile, shape, head: true, chunks: 8 }));
            all.push(Tiling { tile, shape: TileShape::Wide, head: false, chunks: 1 });
        }
        all
    }

    fn rows_and_cols(self) -> [usize; 2] {
        let format = Some(Format::Tiles(self.tile as u32));
        Flags { format, shape: self.shape, head: self.head, ..Flags::default() }.workgroup_tile().map(|n| n as usize)
    }
}

/// Buffers as they are bound.
struct Packed {
    x: Vec<f32>,
    weight: Vec<f32>,
    k: usize,
    x_first: usize,
    slice_row: usize,
}

/// A tile of sums.
type Sums = Vec<f32>;

impl Packed {
    /// c + a · bᵀ: a at rows of K elements, b packed.
    fn multiply_add(&self, tile: usize, x_at: usize, w_at: usize, c: &mut Sums) {
        for (element, sum) in c.iter_mut().enumerate() {
            let (row, column) = (element / tile, element % tile);
            for k in 0..tile {
                // Out of bounds panics.
                *sum += self.x[x_at + row * self.k + k] * self.weight[w_at + column * tile + k];
            }
        }
    }

    /// `products` of the shader, by so many subgroups: the tile of a workgroup.
    fn products(&self, tiling: Tiling, units: usize, first_row: usize, first_column: usize) -> Vec<f32> {
        let Tiling { tile, shape, head, chunks } = tiling;
        let [rows, cols] = tiling.rows_and_cols();
        let area = tile * tile;
        let k_tiles = self.k / tile;
        let chunk_start = |i: usize| i * k_tiles / chunks;
        let x_start = (self.x_first + first_row) * self.k;
        let w_start = (self.slice_row + first_column) / tile * k_tiles * area;
        let wide = shape == TileShape::Wide;
        let mut sums = vec![None; if wide { 1 } else { chunks } * rows * cols];
        let mut store = |c: &Sums, at: usize| {
            for (element, value) in c.iter().enumerate() {
                let written = sums[at + element / tile * cols + element % tile].replace(*value);
                assert!(written.is_none(), "{tiling:?}: written twice");
            }
        };
        for unit in 0..units {
            if wide {
                for part in (unit..4).step_by(units) {
                    let (row, column) = (part / 2 * 2 * tile, part % 2 * 2 * tile);
                    let x_part = x_start + row * self.k;
                    let w_part = w_start + column / tile * k_tiles * area;
                    for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        let mut total = vec![0.0; area];
                        for chunk in 0..chunks {
                            let mut c = vec![0.0; area];
                            for k in chunk_start(chunk)..chunk_start(chunk + 1) {
                                let (x_at, w_at) = (x_part + k * tile, w_part + k * area);
                                self.multiply_add(tile, x_at + i * tile * self.k, w_at + j * k_tiles * area, &mut c);
                            }
                            if chunk == 0 {
                                total = c;
                            } else {
                                total.iter_mut().zip(&c).for_each(|(t, c)| *t += c);
                            }
                        }
                        store(&total, row * cols + column + i * tile * cols + j * tile);
                    }
                }
            } else {
                // How many tiles side by side, and the steps between them.
                let (count, x_step, w_step, next) = match (shape, head) {
                    (_, true) => (4, 0, k_tiles * area, tile),
                    (TileShape::Medium, false) => (4, tile * self.k, 0, tile * cols),
                    _ => (1, 0, 0, 0),
                };
                for chunk in (unit..chunks).step_by(units) {
                    for i in 0..count {
                        let mut c = vec![0.0; area];
                        for k in chunk_start(chunk)..chunk_start(chunk + 1) {
                            let (x_at, w_at) = (x_start + k * tile, w_start + k * area);
                            self.multiply_add(tile, x_at + i * x_step, w_at + i * w_step, &mut c);
                        }
                        store(&c, chunk * rows * cols + i * next);
                    }
                }
            }
        }
        let sums: Vec<f32> = sums.into_iter().map(|s| s.expect("every sum is written")).collect();
        let total = |i: usize| sums[i..].iter().step_by(rows * cols).copied().reduce(|a, b| a + b).unwrap();
        (0..rows * cols).map(total).collect()
    }

    /// The whole dispatch of `linear`: [rows, count].
    fn run(&self, tiling: Tiling, units: usize, rows: usize, count: usize) -> Vec<f32> {
        let [tile_rows, tile_cols] = tiling.rows_and_cols();
        let mut out = vec![None; rows * count];
        for first_row in (0..rows).step_by(tile_rows) {
            for first_column in (0..count).step_by(tile_cols) {
                let sums = self.products(tiling, units, first_row, first_column);
                for (i, sum) in sums.into_iter().enumerate() {
                    let (t, n) = (first_row + i / tile_cols, first_column + i % tile_cols);
                    if t < rows && n < count {
                        assert!(out[t * count + n].replace(sum).is_none(), "{tiling:?}: written twice");
                    }
                }
            }
        }
        out.into_iter().map(|v| v.expect("every element is written")).collect()
    }
}

/// Values that f16 holds.
fn halves(numbers: &mut Numbers, n: usize) -> Vec<f32> {
    numbers.floats(n).into_iter().map(|v| half::f16::from_f32(v).to_f32()).collect()
}

/// The product, added up as shaders/include/tiles.wgsl says: chunks at fixed places, then the chunks' sums in order.
fn plain_product(x: &[f32], w: &[f32], k: usize, tile: usize, chunks: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for x in x.chunks_exact(k) {
        for w in w.chunks_exact(k) {
            let chunk = |i: usize| i * (k / tile) / chunks * tile;
            let sum = |i: usize| (chunk(i)..chunk(i + 1)).fold(0.0, |sum, j| sum + x[j] * w[j]);
            out.push((0..chunks).map(sum).reduce(|a, b| a + b).unwrap());
        }
    }
    out
}

/// Rows, columns, tiles along K: edges of every kind; chunks of none, one and several tiles.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (7, 15, 7), (16, 64, 8), (17, 65, 9), (33, 31, 13), (70, 72, 13)];

#[test]
fn the_tiling_covers_everything_once_and_reads_inside_its_buffers() {
    for tiling in Tiling::all() {
        for (rows, count, k_tiles) in SHAPES {
            let (tile, k) = (tiling.tile, k_tiles * tiling.tile);
            let mut numbers = Numbers((rows * 100 + k) as u64);
            let (x_first, slice_row) = (3, 64);
            let x = halves(&mut numbers, rows * k);
            let w = halves(&mut numbers, count * k);
            let want = plain_product(&x, &w, k, tile, tiling.chunks);
            // As large as the executor makes them: whole tiles of rows behind the last one that may be first, and slices of
            // whole 64 rows. NaN where nobody may look.
            let mut padded = vec![f32::NAN; x_first * k];
            padded.extend(&x);
            padded.resize((rows.next_multiple_of(64) + 64) * k, f32::NAN);
            let all_rows = [vec![f32::NAN; slice_row * k], w].concat();
            let weight = pack_tiles(&all_rows, slice_row + count, k, tile, 64);
            let weight = weight.into_iter().map(half::f16::to_f32).collect();
            let packed = Packed { x: padded, weight, k, x_first, slice_row };
            // Subgroups of 8 to 128 lanes.
            for units in [1, 2, 3, 4, 8, 32] {
                let got = packed.run(tiling, units, rows, count);
                assert_eq!(bits(&got), bits(&want), "{tiling:?}, {units} subgroups, T{rows} N{count} K{k}");
            }
        }
    }
}

/// The shader, emulated, has the model's bits; on the adapter's own matrix units, which may add up a tile in any order, the
/// shapes have the same bits and are near the sums of f64.
#[test]
fn products_on_matrix_units() {
    for device in devices().iter().filter(|d| *d != "cpu") {
        for matrix_units in [MatrixUnits::Emulated(8), MatrixUnits::Emulated(16), MatrixUnits::Auto] {
            let options = GpuOptions { matrix_units, ..GpuOptions::default() };
            let gpu = match Gpu::select(&Selection::parse(device).unwrap(), &options) {
                Ok(gpu) => gpu.unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), rewardrt::ErrorKind::Unsupported, "{error}");
                    continue;
                }
            };
            let Some(tile) = gpu.matrix_tile() else {
                assert_eq!(matrix_units, MatrixUnits::Auto, "the emulation failed its test");
                eprintln!("SKIPPED ON {device}: products on its own matrix units, which it lacks");
                continue;
            };
            for (rows, cols, k_tiles) in SHAPES {
                let k = k_tiles * tile as usize;
                let mut numbers = Numbers((rows * 100 + k) as u64);
                let (x, w) = (halves(&mut numbers, rows * k), halves(&mut numbers, cols * k));
                let exact: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
                let (want, scale) = product(&exact, &w, k, None);
                let model = bits(&plain_product(&x, &w, k, tile as usize, 8));
                let mut narrow = None;
                for shape in [TileShape::Narrow, TileShape::Medium, TileShape::Wide] {
                    let what = format!("{device} {matrix_units:?} {shape:?} tiles of {tile}, T{rows} N{cols} K{k}");
                    let got = tiled_product(&gpu, tile, shape, [rows, cols, k], &x, &w).unwrap();
                    compare(&what, &got, &want, &scale, Dtype::F32);
                    assert_eq!(bits(&got), *narrow.get_or_insert(bits(&got)), "{what}: other bits");
                    if matrix_units != MatrixUnits::Auto {
                        assert_eq!(bits(&got), model, "{what}: not the model's bits");
                    }
                }
            }
        }
    }
}
