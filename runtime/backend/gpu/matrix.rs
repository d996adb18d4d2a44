//! Weights as products read them: rows of one matrix or of several, in their format, in slices that fit a binding.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use wgpu::WriteOnly;

use super::device::Gpu;
use super::pipelines::{Flags, Format};
use super::upload::Uploader;
use crate::error::{Error, Result};
use crate::kernels::linear::{INT4_BLOCK, INT8_BLOCK, Weight};
use crate::model::ModelSpec;
use crate::weights::Dtype;

/// Rows of a slice are a multiple of this: whole tiles of every shape, and pairs stay together.
pub(super) const SLICE_ROWS: usize = 64;

/// In which order the rows of several matrices are merged.
#[derive(Clone, Copy)]
pub(super) enum Order {
    /// One after the other.
    Plain,
    /// A row of the first, the same one of the second.
    Interleaved,
    /// Queries, keys, values. Of the heads that are rotated, the two elements of a pair are neighbours.
    Rotated { rotated_heads: usize, head_dim: usize },
}

impl Order {
    /// Which part, and which of its rows, is row `row` of the whole.
    fn find(self, lengths: &[usize], row: usize) -> (usize, usize) {
        let plain = |mut row: usize| {
            let mut part = 0;
            while part + 1 < lengths.len() && row >= lengths[part] {
                row -= lengths[part];
                part += 1;
            }
            (part, row)
        };
        match self {
            Order::Plain => plain(row),
            Order::Interleaved => (row % 2, row / 2),
            Order::Rotated { rotated_heads, head_dim } if row < rotated_heads * head_dim => {
                let (head, i) = (row / head_dim, row % head_dim);
                plain(head * head_dim + i / 2 + i % 2 * (head_dim / 2))
            }
            Order::Rotated { .. } => plain(row),
        }
    }

    /// That of queries, keys and values.
    pub(super) fn rotated(spec: &ModelSpec) -> Self {
        Order::Rotated { rotated_heads: spec.heads + spec.kv_heads, head_dim: spec.head_dim }
    }

    /// The elements of vectors that belong to the rows; a missing one counts as zeros.
    pub(super) fn merge(self, vectors: &[Option<&[f32]>], lengths: &[usize]) -> Vec<f32> {
        let element = |row| {
            let (part, i) = self.find(lengths, row);
            vectors[part].map_or(0.0, |v| v[i])
        };
        (0..lengths.iter().sum()).map(element).collect()
    }
}

/// Some rows of a matrix in a buffer of their own.
pub(super) struct Slice {
    pub buffer: wgpu::Buffer,
    /// Of integer weights: [rows, blocks].
    pub scales: Option<wgpu::Buffer>,
    pub first: u32,
    pub count: u32,
}

/// What turning weights into f16 cost, and how large they can make a result.
#[derive(Default)]
pub(super) struct HalfStats {
    /// Beyond ±65504, infinite or NaN.
    overflows: AtomicU64,
    /// Smaller than f16 can hold exactly.
    underflows: AtomicU64,
    /// The largest Euclidean length of a row, as bits.
    longest_row: AtomicU32,
}

impl HalfStats {
    pub(super) fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }

    pub(super) fn underflows(&self) -> u64 {
        self.underflows.load(Ordering::Relaxed)
    }

    pub(super) fn longest_row(&self) -> f32 {
        f32::from_bits(self.longest_row.load(Ordering::Relaxed))
    }

    fn note(&self, values: &[f32], halves: &[f16]) {
        let (mut overflows, mut underflows, mut square) = (0, 0, 0.0f64);
        for (v, h) in values.iter().zip(halves) {
            square += f64::from(*v) * f64::from(*v);
            if !h.is_finite() {
                overflows += 1;
            } else if h.to_f32() != *v && v.abs() < 6.2e-5 {
                underflows += 1;
            }
        }
        self.overflows.fetch_add(overflows, Ordering::Relaxed);
        self.underflows.fetch_add(underflows, Ordering::Relaxed);
        // Bits of floats that are not negative are in their order. Rounded up.
        let length = (square.sqrt() * (1.0 + 1e-6)) as f32;
        self.longest_row.fetch_max(length.to_bits(), Ordering::Relaxed);
    }
}

/// A weight matrix on the device.
pub(super) struct Matrix {
    pub format: Format,
    pub rows: u32,
    pub cols: u32,
    /// Elements from row to row.
    pub stride: u32,
    pub slices: Vec<Slice>,
    /// Filled where the format is [`Format::Tiles`].
    pub half: HalfStats,
}

impl Matrix {
    /// Uploads `parts`, merged in `order`. With `tile` they become f16 in tiles; else they stay as they are, or f32 where
    /// they are of several kinds.
    pub(super) fn upload(
        uploader: &mut Uploader,
        gpu: &Gpu,
        name: &str,
        parts: &[Weight],
        order: Order,
        tile: Option<u32>,
    ) -> Result<Matrix> {
        let lengths: Vec<usize> = parts.iter().map(Weight::rows).collect();
        let (rows, cols) = (lengths.iter().sum::<usize>(), parts.first().map_or(0, Weight::cols));
        let format = match (tile, parts) {
            (Some(tile), _) => Format::Tiles(tile),
            (None, [Weight::Int8(_), ..]) => Format::Int8,
            (None, [Weight::Int4(_), ..]) => Format::Int4,
            (None, [Weight::Stored(first), rest @ ..]) => {
                let same = |p: &Weight| matches!(p, Weight::Stored(view) if view.dtype() == first.dtype());
                Format::Rows(if rest.iter().all(same) { first.dtype() } else { Dtype::F32 })
            }
            (None, []) => return Err(Error::internal("a matrix of nothing")),
        };
        // Elements of a row on the device, rows and bytes of a unit of upload.
        let (stride, unit_rows, unit_bytes) = match format {
            Format::Rows(dtype) => {
                let stride = cols.next_multiple_of(8);
                (stride, 1, stride * dtype.size())
            }
            Format::Int8 => (cols.next_multiple_of(INT8_BLOCK), 1, cols.next_multiple_of(INT8_BLOCK)),
            Format::Int4 => (cols.next_multiple_of(INT4_BLOCK), 1, cols.next_multiple_of(INT4_BLOCK) / 2),
            Format::Tiles(tile) => (cols, tile as usize, tile as usize * cols * 2),
        };
        let small = |n: usize| u32::try_from(n).map_err(|_| too_large(name));
        let mut matrix = Matrix {
            format,
            rows: small(rows)?,
            cols: small(cols)?,
            stride: small(stride)?,
            slices: Vec::new(),
            half: HalfStats::default(),
        };
        // Indices in the shader are 32 bits.
        let row_bytes = unit_bytes / unit_rows;
        let fitting = usize::try_from(gpu.max_binding()).unwrap_or(usize::MAX) / row_bytes;
        // A dispatch has 65,535 groups of columns, of 8 at least.
        let mut per_slice = fitting.min(u32::MAX as usize / stride.max(1)).min(65_535 * 8);
        // Tiles are held whole.
        if per_slice < if tile.is_some() { rows.next_multiple_of(SLICE_ROWS) } else { rows } {
            per_slice = per_slice / SLICE_ROWS * SLICE_ROWS;
        }
        if per_slice == 0 {
            return Err(too_large(name));
        }
        let merged = Merged { parts, order, lengths: &lengths, cols };
        for first in (0..rows).step_by(per_slice) {
            let count = per_slice.min(rows - first);
            // Whole tiles of columns of every shape; wgpu's buffers begin as zeros.
            let held = if tile.is_some() { count.next_multiple_of(SLICE_ROWS) } else { count };
            let buffer = gpu.buffer(name, (held * row_bytes) as u64, wgpu::BufferUsages::STORAGE)?;
            match format {
                Format::Tiles(tile) => {
                    let tile = tile as usize;
                    let fill = |unit: usize, out: WriteOnly<[u8]>, scratch: &mut Vec<u8>| {
                        let start = first + unit * tile;
                        merged.tiles(start..(start + tile).min(first + count), tile, out, scratch, &matrix.half);
                    };
                    uploader.write(&buffer, count.div_ceil(tile), unit_bytes, &fill)?;
                }
                _ => {
                    let as_stored = match merged.as_stored(first..first + count, format) {
                        Some(bytes) => uploader.copy_mapped(&buffer, bytes)?,
                        None => false,
                    };
                    if !as_stored {
                        let fill = |unit: usize, out: WriteOnly<[u8]>, scratch: &mut Vec<u8>| {
                            merged.row(first + unit, format, out, scratch);
                        };
                        uploader.write(&buffer, count, unit_bytes, &fill)?;
                    }
                }
            }
            let blocks = match format {
                Format::Int8 => stride / INT8_BLOCK,
                Format::Int4 => stride / INT4_BLOCK,
                _ => 0,
            };
            let scales = if blocks > 0 {
                let scales = gpu.buffer(name, (4 * count * blocks) as u64, wgpu::BufferUsages::STORAGE)?;
                uploader.write(&scales, count, 4 * blocks, &|unit, mut out, _| {
                    out.copy_from_slice(bytemuck::cast_slice(merged.scales(first + unit)));
                })?;
                Some(scales)
            } else {
                None
            };
            matrix.slices.push(Slice { buffer, scales, first: small(first)?, count: small(count)? });
        }
        Ok(matrix)
    }

    /// What a shader must know of the weights and of rows of K inputs.
    pub(super) fn variant(&self) -> Flags {
        Flags { format: Some(self.format), vec4: self.cols.is_multiple_of(4), ..Flags::default() }
    }

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> u64 {
        let of = |s: &Slice| s.buffer.size() + s.scales.as_ref().map_or(0, wgpu::Buffer::size);
        self.slices.iter().map(of).sum()
    }
}

fn too_large(name: &str) -> Error {
    Error::limit(format!("{name}: too large for this device"))
}

/// The rows of several matrices as one.
struct Merged<'a> {
    parts: &'a [Weight<'a>],
    order: Order,
    lengths: &'a [usize],
    cols: usize,
}

impl Merged<'_> {
    fn find(&self, row: usize) -> (Weight<'_>, usize) {
        let (part, row) = self.order.find(self.lengths, row);
        (self.parts[part], row)
    }

    /// The bytes of rows, if they lie in the checkpoint as they do on the device.
    fn as_stored(&self, rows: std::ops::Range<usize>, format: Format) -> Option<&[u8]> {
        match (self.parts, self.order) {
            ([Weight::Stored(view)], Order::Plain)
                if format == Format::Rows(view.dtype()) && self.cols.is_multiple_of(8) =>
            {
                Some(view.rows_bytes(rows))
            }
            _ => None,
        }
    }

    /// Writes a row; what it leaves of `out` is zero.
    fn row(&self, row: usize, format: Format, mut out: WriteOnly<[u8]>, scratch: &mut Vec<u8>) {
        scratch.clear();
        let bytes = match self.find(row) {
            (Weight::Stored(view), row) if format == Format::Rows(view.dtype()) => view.row(row),
            (Weight::Stored(view), row) => {
                let mut values = vec![0.0; self.cols];
                view.dtype().read_f32(view.row(row), &mut values);
                scratch.extend_from_slice(bytemuck::cast_slice(&values));
                scratch
            }
            (Weight::Int8(view), row) => &view.quants_from(row)[..view.blocks() * INT8_BLOCK],
            (Weight::Int4(view), row) => &view.quants_from(row)[..view.blocks() * INT4_BLOCK / 2],
        };
        out.slice(..bytes.len()).copy_from_slice(bytes);
        out.slice(bytes.len()..).fill(0);
    }

    fn scales(&self, row: usize) -> &[f32] {
        let (part, row) = self.order.find(self.lengths, row);
        let (scales, blocks) = match &self.parts[part] {
            Weight::Int8(view) => (view.scales(), view.blocks()),
            Weight::Int4(view) => (view.scales(), view.blocks()),
            Weight::Stored(_) => return &[],
        };
        &scales[row * blocks..(row + 1) * blocks]
    }

    /// Writes a band of tiles: rows that are not there are zero.
    fn tiles(
        &self,
        rows: std::ops::Range<usize>,
        tile: usize,
        mut out: WriteOnly<[u8]>,
        scratch: &mut Vec<u8>,
        stats: &HalfStats,
    ) {
        let mut values = vec![0.0f32; self.cols];
        let mut halves = vec![f16::ZERO; self.cols];
        scratch.clear();
        scratch.resize(tile * self.cols * 2, 0);
        for (i, row) in rows.enumerate() {
            let (part, row) = self.find(row);
            // Integers are never made tiles of.
            let Weight::Stored(view) = part else { continue };
            view.dtype().read_f32(view.row(row), &mut values);
            halves.convert_from_f32_slice(&values);
            stats.note(&values, &halves);
            for (k, block) in halves.chunks_exact(tile).enumerate() {
                let at = (k * tile + i) * tile * 2;
                scratch[at..at + 2 * tile].copy_from_slice(bytemuck::cast_slice(block));
            }
        }
        out.copy_from_slice(scratch);
    }
}
