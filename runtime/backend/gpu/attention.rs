//! Attention on the GPU: how the rows of a step are cut, and the dispatches of a layer.
//!
//! Either every row goes through `attention`, or every row goes through `attention_tiles`, on matrix units: they differ in
//! what they round, so which one is decided once, by the shapes of the model and by the device.

use super::device::Gpu;
use super::layers::{Builder, Rule};
use super::pipelines::{Flags, Format, TileShape};
use super::record::{Dispatch, Params};
use crate::error::Result;
use crate::kernels::{RowMeta, attention, attention_join, attention_tiles};
use crate::model::ModelSpec;

/// Workgroups that keep a GPU busy.
const ENOUGH_WORKGROUPS: usize = 1024;

/// Rows of the matrix units' tiles, if attention uses them. `tile`: if products do.
pub(super) fn tile(gpu: &Gpu, spec: &ModelSpec, tile: Option<u32>) -> Option<u32> {
    let tile = tile?;
    if !attention_tiles::fits(tile as usize, spec.head_dim, gpu.workgroup_bytes()) {
        log::info!("attention uses no matrix units: heads of {} in tiles of {tile}", spec.head_dim);
        return None;
    }
    gpu.matrix_attention().then_some(tile)
}

/// Tiles of a step that one dispatch takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    first: u32,
    tiles: u32,
    rows: u32,
    /// Keys that the rows see together.
    keys: u64,
}

/// What the dispatches of a step's attention depend on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    /// `attention` has the first of them only.
    narrow: Share,
    wide: Share,
    /// Segments of keys that are computed side by side.
    segments: u32,
}

/// Room for the segments of 32 rows of 16 segments each, or of fewer rows of more.
pub(super) fn partial_bytes(spec: &ModelSpec) -> u64 {
    (4 * 512 * spec.heads * (spec.head_dim + 2)) as u64
}

/// Cuts the rows of a step; its tiles are added to `tiles`. `partial_bytes`: room for segments side by side.
pub(super) fn cut(
    spec: &ModelSpec,
    tile: Option<u32>,
    rows: &[RowMeta],
    partial_bytes: u64,
    tiles: &mut Vec<[u32; 2]>,
) -> Work {
    let group = spec.heads / spec.kv_heads;
    let cut = match tile {
        Some(tile) => attention_tiles::tiles(rows, group, tile as usize, spec.head_dim),
        None => {
            let narrow = attention::tiles(rows, group, spec.head_dim);
            attention_tiles::Tiles { narrow, wide: Vec::new() }
        }
    };
    let window = spec.sliding_window;
    let mut share = |of: &[[u32; 2]]| {
        // Tiles are no more than rows, which are below 2^16.
        let mut share = Share { first: tiles.len() as u32, tiles: of.len() as u32, rows: 0, keys: 0 };
        for &[first, count] in of {
            share.rows += count;
            for row in &rows[first as usize..(first + count) as usize] {
                let last = row.position as usize;
                share.keys += (last + 1 - attention::first_key(last, window)) as u64;
            }
        }
        tiles.extend_from_slice(of);
        share
    };
    let (narrow, wide) = (share(&cut.narrow), share(&cut.wide));
    let segments = [&cut.narrow, &cut.wide].map(|tiles| attention::segments(rows, tiles, window));
    let segments = segments[0].max(segments[1]);
    // Side by side where there are too few workgroups for a GPU, and room for what they leave.
    let room = attention::partials_len(rows.len(), spec.heads, spec.head_dim, segments)
        .is_some_and(|len| 4 * len as u64 <= partial_bytes);
    let few = cut.narrow.len() * spec.kv_heads + cut.wide.len() * spec.heads < ENOUGH_WORKGROUPS;
    let segments = if few && room { u32::try_from(segments).unwrap_or(1) } else { 1 };
    Work { narrow, wide, segments }
}

impl Builder<'_> {
    /// The dispatches of a layer's attention.
    pub(super) fn attention(&mut self, layer: usize) -> Result<()> {
        match self.attention_tile {
            Some(tile) => {
                self.attention_tiles(layer, tile, TileShape::Narrow)?;
                self.attention_tiles(layer, tile, TileShape::Wide)?;
            }
            None => self.plain_attention(layer)?,
        }
        self.attention_join()
    }

    fn window(&self) -> u32 {
        self.spec.sliding_window.map_or(0, |w| u32::try_from(w).unwrap_or(0))
    }

    fn plain_attention(&mut self, layer: usize) -> Result<()> {
        let (spec, b) = (self.spec, self.buffers);
        let (keys, values) = &b.kv[layer];
        let (heads, kv_heads, head_dim) = (spec.heads as u32, spec.kv_heads as u32, spec.head_dim as u32);
        let storage = [&b.rows, &b.tiles, &b.tables, &b.q, keys, values, &b.attn, &b.partials];
        let scale = 1.0 / (spec.head_dim as f32).sqrt();
        let window = self.window();
        let key_bytes = 2 * (spec.kv_width() as u64) * if self.half_kv { 2 } else { 4 };
        let width = spec.q_width() as u64;
        let rule: Rule = Box::new(move |d| {
            let Work { narrow: share, segments, .. } = d.attention;
            let params = attention::Params {
                rows: d.rows,
                heads,
                kv_heads,
                head_dim,
                scale,
                window,
                segments,
                first_meta: d.first_row,
                first_tile: share.first,
            };
            Dispatch {
                shape: TileShape::Narrow,
                params: Params::of(&params),
                groups: attention::workgroups(&params, share.tiles as usize),
                bytes: share.keys * key_bytes + u64::from(share.rows) * 8 * width,
                multiply_adds: 2 * share.keys * width,
            }
        });
        let half_out = self.tile.is_some();
        let vec4 = head_dim.is_multiple_of(4);
        let flags = Flags { vec4, half_kv: self.half_kv, half_out, head_dim, ..Flags::default() };
        self.push(&attention::KERNEL, flags, &[TileShape::Narrow], &storage, rule)
    }

    /// One of the shapes: a step may have rows for both.
    fn attention_tiles(&mut self, layer: usize, tile: u32, shape: TileShape) -> Result<()> {
        let (spec, b) = (self.spec, self.buffers);
        let (keys, values) = &b.kv[layer];
        let (heads, kv_heads, head_dim) = (spec.heads as u32, spec.kv_heads as u32, spec.head_dim as u32);
        let storage = [&b.rows, &b.tiles, &b.tables, &b.q, keys, values, &b.attn, &b.partials];
        let window = self.window();
        let (key_bytes, width) = (4 * spec.kv_width() as u64, spec.q_width() as u64);
        let rule: Rule = Box::new(move |d| {
            let Work { narrow, wide, segments } = d.attention;
            let share = if shape == TileShape::Wide { wide } else { narrow };
            let params = attention_tiles::Params {
                rows: d.rows,
                heads,
                kv_heads,
                head_dim,
                window,
                segments,
                first_meta: d.first_row,
                first_tile: share.first,
            };
            Dispatch {
                shape,
                params: Params::of(&params),
                groups: attention_tiles::workgroups(&params, shape, tile as usize, share.tiles as usize),
                bytes: share.keys * key_bytes + u64::from(share.rows) * 4 * width,
                multiply_adds: 2 * share.keys * width,
            }
        });
        let flags = Flags { format: Some(Format::Tiles(tile)), head_dim, ..Flags::default() };
        self.push(&attention_tiles::KERNEL, flags, &[shape], &storage, rule)
    }

    fn attention_join(&mut self) -> Result<()> {
        let (spec, b) = (self.spec, self.buffers);
        let (heads, head_dim, width) = (spec.heads as u32, spec.head_dim as u32, spec.q_width() as u64);
        let rule: Rule = Box::new(move |d| {
            let segments = d.attention.segments;
            // One segment needs no joining.
            let rows = if segments > 1 { d.rows } else { 0 };
            let params = attention_join::Params { rows, heads, head_dim, segments };
            Dispatch {
                shape: TileShape::Narrow,
                params: Params::of(&params),
                groups: attention_join::workgroups(&params),
                bytes: u64::from(rows) * 4 * width * u64::from(segments + 1),
                multiply_adds: 0,
            }
        });
        let flags = Flags { half_out: self.tile.is_some(), ..Flags::default() };
        let storage = [&b.partials, &b.attn];
        self.push(&attention_join::KERNEL, flags, &[TileShape::Narrow], &storage, rule)
    }
}
