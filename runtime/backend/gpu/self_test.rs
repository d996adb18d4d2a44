//! Are the matrix units right? Asked once a device, before anything is computed with them.
//!
//! Their specification leaves much to drivers, and what is wrong there is wrong in silence: so small products of every shape
//! are compared with the same sums on the host, and with each other to the bit.

use half::f16;

use super::device::Gpu;
use super::pipelines::{Flags, Format, TileShape};
use super::probe::dispatch_once;
use crate::error::{Error, Result};
use crate::kernels::linear;

/// Rows, columns and K of the product: no multiple of the larger tiles, chunks of several lengths.
const ROWS: usize = 70;
const COLS: usize = 72;
const TILES_ALONG_K: usize = 13;
/// Every shape of tile, those of the pass over the vocabulary included.
const SHAPES: [(TileShape, bool); 5] = [
    (TileShape::Narrow, false),
    (TileShape::Medium, false),
    (TileShape::Wide, false),
    (TileShape::Narrow, true),
    (TileShape::Wide, true),
];

/// A product of every shape of tile.
///
/// # Errors
/// `Gpu` with the first difference.
pub(super) fn matrix_units(gpu: &Gpu, tile: u32) -> Result<()> {
    let k = TILES_ALONG_K * tile as usize;
    // Multiples of 1/16 up to 2: products and sums are exact in f32, in any order.
    let value = |i: usize, salt: usize| ((i * 37 + salt * 11 + i / 7) % 65) as f32 / 16.0 - 2.0;
    let x: Vec<f32> = (0..ROWS * k).map(|i| value(i, 1)).collect();
    let w: Vec<f32> = (0..COLS * k).map(|i| value(i, 2)).collect();
    for (shape, head) in SHAPES {
        let got = tiled(gpu, tile, (shape, head), [ROWS, COLS, k], &x, &w)?;
        for (i, got) in got.iter().enumerate() {
            let (t, n) = (i / COLS, i % COLS);
            let exact: f32 = (0..k).map(|j| x[t * k + j] * w[n * k + j]).sum();
            if *got != exact {
                return Err(Error::gpu(format!("{shape:?} product, row {t}, column {n}: {got}, not {exact}")));
            }
        }
    }
    // Sums that are rounded must be rounded alike, whatever the shape and the row's place in its tile.
    let x: Vec<f32> = (0..ROWS * k).map(|i| (value(i % k, 3) * 1.37).sin()).collect();
    let w: Vec<f32> = w.iter().map(|w| (w * 2.11).cos()).collect();
    let first = tiled_product(gpu, tile, TileShape::Narrow, [ROWS, COLS, k], &x, &w)?;
    for (shape, head) in SHAPES {
        let got = tiled(gpu, tile, (shape, head), [ROWS, COLS, k], &x, &w)?;
        // All rows of x are the same.
        if let Some(i) = (0..got.len()).find(|i| got[*i].to_bits() != first[i % COLS].to_bits()) {
            let (t, n) = (i / COLS, i % COLS);
            return Err(Error::gpu(format!(
                "{shape:?} product, row {t}, column {n}: {}, elsewhere {}",
                got[i],
                first[i % COLS]
            )));
        }
    }
    Ok(())
}

/// x [T, K] · wᵀ [N, K] in tiles of one shape.
///
/// # Errors
/// What the device reports.
pub fn tiled_product(
    gpu: &Gpu,
    tile: u32,
    shape: TileShape,
    sizes: [usize; 3],
    x: &[f32],
    w: &[f32],
) -> Result<Vec<f32>> {
    tiled(gpu, tile, (shape, false), sizes, x, w)
}

fn tiled(
    gpu: &Gpu,
    tile: u32,
    (shape, head): (TileShape, bool),
    [rows, cols, k]: [usize; 3],
    x: &[f32],
    w: &[f32],
) -> Result<Vec<f32>> {
    let flags = Flags { format: Some(Format::Tiles(tile)), head, ..Flags::default() };
    let [tile_rows, tile_cols] = Flags { shape, ..flags }.workgroup_tile().map(|n| n as usize);
    let mut inputs: Vec<f16> = x.iter().map(|v| f16::from_f32(*v)).collect();
    inputs.resize(rows.next_multiple_of(tile_rows) * k, f16::ZERO);
    let weights = pack_tiles(w, cols, k, tile as usize, tile_cols);
    let params = linear::Params {
        rows: rows as u32,
        k: k as u32,
        stride: k as u32,
        count: cols as u32,
        first: 0,
        out_stride: cols as u32,
        has_bias: 0,
        slice_row: 0,
        x_first: 0,
        accumulate: 0,
        scale: 1.0,
    };
    let none = vec![0; 64];
    let mut storage = [
        bytemuck::cast_slice(&inputs).to_vec(),
        bytemuck::cast_slice(&weights).to_vec(),
        none.clone(),
        none,
        vec![0; 4 * rows * cols],
    ];
    let groups = [rows.div_ceil(tile_rows) as u32, cols.div_ceil(tile_cols) as u32, 1];
    let flags = Flags { shape, emulated: gpu.emulates(flags), ..flags };
    dispatch_once(gpu, &linear::KERNEL, flags, bytemuck::bytes_of(&params), &mut storage, groups)?;
    Ok(bytemuck::pod_collect_to_vec(&storage[4]))
}

/// w [N, K] as shaders/include/tiles.wgsl wants it, with whole tiles of `columns` rows.
pub fn pack_tiles(w: &[f32], rows: usize, k: usize, tile: usize, columns: usize) -> Vec<f16> {
    let mut packed = vec![f16::ZERO; rows.next_multiple_of(columns) * k];
    for (n, row) in w.chunks_exact(k).take(rows).enumerate() {
        for (j, value) in row.iter().enumerate() {
            let tile_at = (n / tile * (k / tile) + j / tile) * tile * tile;
            packed[tile_at + n % tile * tile + j % tile] = f16::from_f32(*value);
        }
    }
    packed
}
