//! Are the matrix units right? Asked once a device, before anything is computed with them.
//!
//! Their specification leaves much to drivers, and what is wrong there is wrong in silence: so small products of every shape
//! are compared with the same sums on the host, and with each other to the bit. Attention has a test of its own: products may
//! be right where it is not.

use half::f16;

use super::device::Gpu;
use super::pipelines::{Flags, Format, TileShape};
use super::probe::dispatch_once;
use crate::error::{Error, Result};
use crate::kernels::attention_tiles::{self, Inputs, Tiles};
use crate::kernels::{KV_BLOCK, RowMeta, attention_join, linear};

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

/// Heads, kv heads, and the last position of the test's sequences, one of which reaches into a second segment.
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const LAST: [usize; 2] = [37, 1027];

/// Attention of rows alone and together, of segments side by side and in a row.
///
/// # Errors
/// `Gpu` with the first difference.
pub(super) fn attention(gpu: &Gpu, tile: u32) -> Result<()> {
    for head_dim in [3 * tile as usize, 8 * tile as usize] {
        attention_of(gpu, tile, head_dim).map_err(|e| e.at(format!("heads of {head_dim}")))?;
    }
    Ok(())
}

fn attention_of(gpu: &Gpu, tile: u32, head_dim: usize) -> Result<()> {
    let (mut rows, mut tables) = (Vec::new(), Vec::new());
    for last in LAST {
        let table = tables.len() as u32;
        tables.extend((0..=last as u32 / KV_BLOCK as u32).map(|block| table + block));
        // Across a multiple of 32, and of 1,024; rows alone and together on either side.
        rows.extend((last as u32 - 6..=last as u32).map(|position| RowMeta { position, table, ..RowMeta::default() }));
    }
    // Blocks in falling order.
    tables.reverse();
    let wave = |i: usize, salt: f32| (i as f32 * salt).sin();
    let size = KV_BLOCK * KV_HEADS * head_dim;
    let some = |n: usize, scale: f32, salt| (0..n).map(|i| f16::from_f32(scale * wave(i, salt))).collect::<Vec<f16>>();
    let q = some(rows.len() * HEADS * head_dim, 1.0, 1.37);
    let keys = some(tables.len() * size, 1.0, 2.11);
    let values = some(tables.len() * size, 2.0, 0.73);
    let inputs = Inputs {
        rows: &rows,
        tables: &tables,
        q: &q,
        keys: &keys,
        values: &values,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim,
        window: None,
    };
    let together = attention_tiles::tiles(&rows, HEADS / KV_HEADS, tile as usize, head_dim);
    let alone = Tiles { narrow: (0..rows.len() as u32).map(|row| [row, 1]).collect(), wide: Vec::new() };
    let got = tiled_attention(gpu, tile, inputs, &together, 1)?;
    let mut want = vec![0.0; got.len()];
    attention_tiles::attention_tiles(inputs, &mut want);
    // Rounded to f16, of weights that another exp2 may have rounded otherwise.
    if let Some(i) = (0..got.len()).find(|&i| (got[i] - want[i]).abs() > 4e-3 || !got[i].is_finite()) {
        return Err(Error::gpu(format!("attention, element {i}: {}, not {}", got[i], want[i])));
    }
    // What nobody sees, stale or of later rows, leaves no trace.
    let mut stale = values.clone();
    let mut later = keys.clone();
    for last in LAST {
        let table = rows.iter().find(|r| r.position as usize == last).map_or(0, |r| r.table as usize);
        let block = tables[table + last / KV_BLOCK] as usize;
        for (i, (value, key)) in stale[block * size..].iter_mut().zip(&mut later[block * size..]).take(size).enumerate()
        {
            if i / head_dim % KV_BLOCK > last % KV_BLOCK {
                *value = f16::from_f32(if i % 2 == 0 { 32_752.0 } else { -32_752.0 });
            }
            if i % KV_BLOCK > last % KV_BLOCK {
                *key = f16::NAN;
            }
        }
    }
    let stale = Inputs { values: &stale, keys: &later, ..inputs };
    let others = [
        ("a row alone", inputs, &alone, 1),
        ("segments side by side", inputs, &together, 2),
        ("a row alone in segments", inputs, &alone, 2),
        ("beside stale values", stale, &together, 1),
        ("alone beside stale values", stale, &alone, 1),
    ];
    for (what, inputs, tiles, segments) in others {
        let other = tiled_attention(gpu, tile, inputs, tiles, segments)?;
        if let Some(i) = (0..got.len()).find(|&i| got[i].to_bits() != other[i].to_bits()) {
            return Err(Error::gpu(format!("attention, element {i}, {what}: {}, else {}", other[i], got[i])));
        }
    }
    Ok(())
}

/// Attention on matrix units, [T, H·E] of rounded values: the tiles of either shape, so many segments side by side. Values
/// must be finite.
///
/// # Errors
/// What the device reports.
pub fn tiled_attention(gpu: &Gpu, tile: u32, inputs: Inputs, tiles: &Tiles, segments: usize) -> Result<Vec<f32>> {
    let Inputs { rows, heads, kv_heads, head_dim, .. } = inputs;
    // Behind rows and a tile of another step; beyond the last row lies what nobody may use.
    let rows_before = [RowMeta { token: 9, position: 9, slot: 9, table: 0 }; 2];
    let before = [[0u32, 2]];
    let mut q = inputs.q.to_vec();
    q.resize(q.len() + attention_tiles::ROWS_BEYOND * heads * head_dim, f16::NAN);
    let partials = if segments > 1 { segments * rows.len() * heads * (head_dim + 2) } else { 4 };
    let bytes = |halves: &[f16]| bytemuck::cast_slice(halves).to_vec();
    let mut storage = [
        bytemuck::cast_slice(&[&rows_before, rows].concat()).to_vec(),
        bytemuck::cast_slice(&[&before, &tiles.narrow[..], &tiles.wide[..]].concat()).to_vec(),
        bytemuck::cast_slice(inputs.tables).to_vec(),
        bytes(&q),
        bytes(inputs.keys),
        bytes(inputs.values),
        bytes(&vec![f16::NAN; inputs.q.len()]),
        bytemuck::cast_slice(&vec![f32::NAN; partials]).to_vec(),
    ];
    let flags = Flags { format: Some(Format::Tiles(tile)), f16: true, head_dim: head_dim as u32, ..Flags::default() };
    let mut first_tile = 1;
    for (shape, count) in [(TileShape::Narrow, tiles.narrow.len()), (TileShape::Wide, tiles.wide.len())] {
        let params = attention_tiles::Params {
            rows: rows.len() as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            window: inputs.window.unwrap_or(0) as u32,
            segments: segments as u32,
            first_meta: 2,
            first_tile,
        };
        first_tile += count as u32;
        if count > 0 {
            let groups = attention_tiles::workgroups(&params, shape, tile as usize, count);
            let flags = Flags { shape, emulated: gpu.emulates(flags), ..flags };
            let params = bytemuck::bytes_of(&params);
            dispatch_once(gpu, &attention_tiles::KERNEL, flags, params, &mut storage, groups)?;
        }
    }
    let [.., out, partials] = storage;
    let mut joined = [partials, out];
    if segments > 1 {
        let params = attention_join::Params {
            rows: rows.len() as u32,
            heads: heads as u32,
            head_dim: head_dim as u32,
            segments: segments as u32,
        };
        let flags = Flags { half_out: true, f16: true, ..Flags::default() };
        let groups = attention_join::workgroups(&params);
        dispatch_once(gpu, &attention_join::KERNEL, flags, bytemuck::bytes_of(&params), &mut joined, groups)?;
    }
    let out: Vec<f16> = bytemuck::pod_collect_to_vec(&joined[1]);
    Ok(out.into_iter().map(f16::to_f32).collect())
}
