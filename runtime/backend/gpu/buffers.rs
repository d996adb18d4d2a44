//! Activations and the KV cache: what is as large as steps may be, whatever the weights.

use super::attention::{self, partial_bytes};
use super::device::Gpu;
use super::layers::Buffers;
use super::matrix::SLICE_ROWS;
use crate::backend::{Capacity, Holding};
use crate::error::{Error, Result, checked_size};
use crate::kernels::{KV_BLOCK, RowMeta, attention_tiles, sample};
use crate::model::ModelSpec;

/// Rows of x that products on matrix units read together at most: buffers end on a multiple of it.
const ROW_TILE: usize = 64;

/// Activations and the KV cache, as matrix units need them or as other instructions do.
pub(super) struct DeviceBuffers {
    pub tile: Option<u32>,
    pub attention_tile: Option<u32>,
    pub buffers: Buffers,
    /// A block of every layer, on its way to another block: a buffer cannot be copied onto itself.
    pub passing: wgpu::Buffer,
    /// Bytes of an element of the cache.
    pub kv_element: u64,
    pub kv_bytes: u64,
}

/// With matrix units keys and values are f16, and weights whole tiles.
pub(super) fn holding(tile: Option<u32>) -> Holding {
    match tile {
        Some(_) => Holding { kv_element: 2, weight_rows: SLICE_ROWS },
        None => Holding { kv_element: 4, weight_rows: 1 },
    }
}

impl DeviceBuffers {
    pub fn new(gpu: &Gpu, spec: &ModelSpec, tile: Option<u32>, capacity: Capacity) -> Result<Self> {
        let half = tile.is_some();
        let attention_tile = attention::tile(gpu, spec, tile);
        let element = holding(tile).kv_element;
        let storage = wgpu::BufferUsages::STORAGE;
        let rows = capacity.max_rows;
        let padded = if half { rows.next_multiple_of(ROW_TILE) } else { rows };
        let activation = |what: &str, rows: usize, width: usize, element: usize| {
            let size = checked_size(what, &[rows, width, element])? as u64;
            if size > gpu.max_binding() {
                return Err(Error::limit(format!(
                    "{what} of {rows} rows exceed a binding of this device; lower max_batch_tokens"
                )));
            }
            gpu.buffer(what, size, storage)
        };
        let per_layer = checked_size("the KV cache", &[capacity.kv_blocks, KV_BLOCK, spec.kv_width(), element])? as u64;
        let mut kv = Vec::new();
        for _ in 0..spec.layers {
            let usage = storage | wgpu::BufferUsages::COPY_SRC;
            kv.push((gpu.buffer("keys", per_layer, usage)?, gpu.buffer("values", per_layer, usage)?));
        }
        let block = checked_size("a KV block", &[2, spec.layers, KV_BLOCK, spec.kv_width(), element])? as u64;
        let passing = gpu.buffer("a KV block", block, wgpu::BufferUsages::COPY_SRC)?;
        let d = spec.hidden_size;
        let language_model = matches!(spec.head, crate::model::Head::LanguageModel { .. });
        let buffers = Buffers {
            rows: activation("rows", rows, size_of::<RowMeta>(), 1)?,
            tables: activation("block tables", capacity.max_table_entries(), 4, 1)?,
            tiles: activation("tiles of attention", rows, 8, 1)?,
            partials: gpu.buffer("partial attention", partial_bytes(spec).min(gpu.max_binding()), storage)?,
            cos_sin: activation("angles", rows, spec.head_dim, 4)?,
            picked: activation("output rows", rows, 4, 1)?,
            drawn: {
                let bytes = (rows * size_of::<sample::Drawn>()) as u64;
                gpu.buffer("draws", bytes, storage | wgpu::BufferUsages::COPY_SRC)?
            },
            hidden: activation("activations", rows, d, 4)?,
            normed: activation("activations", padded, d, element)?,
            q: match attention_tile {
                Some(_) => activation("activations", rows + attention_tiles::ROWS_BEYOND, spec.q_width(), 2)?,
                None => activation("activations", rows, spec.q_width(), 4)?,
            },
            attn: activation("activations", padded, spec.q_width(), element)?,
            gated: activation("activations", padded, spec.intermediate_size, element)?,
            picked_rows: activation("activations", rows, d, 4)?,
            last: activation("activations", padded + ROW_TILE, d, if language_model { element } else { 4 })?,
            nothing: gpu.buffer("nothing", 64, storage)?,
            kv,
        };
        let kv_bytes = 2 * per_layer * spec.layers as u64;
        Ok(DeviceBuffers { tile, attention_tile, buffers, passing, kv_element: element as u64, kv_bytes })
    }
}
