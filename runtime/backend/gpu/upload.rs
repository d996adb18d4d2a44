//! Weights into device buffers, in slices of rows that fit a binding.

use std::ops::Range;

use super::device::Gpu;
use super::pipelines::Flags;
use crate::error::{Error, Result};
use crate::kernels::MatrixView;
use crate::kernels::linear::{INT8_BLOCK, Int8View};
use crate::weights::Dtype;

/// Bytes given to the queue at a time.
const CHUNK: usize = 16 << 20;

/// Some rows of a matrix in a buffer of their own.
pub(super) struct Slice {
    pub buffer: wgpu::Buffer,
    /// Of 8-bit weights: [rows, blocks].
    pub scales: Option<wgpu::Buffer>,
    pub first: u32,
    pub count: u32,
}

/// A weight matrix on the device. Rows are padded to whole groups of eight elements.
pub(super) struct Matrix {
    /// `None`: 8-bit integers with scales.
    pub dtype: Option<Dtype>,
    pub rows: u32,
    pub cols: u32,
    /// Elements from row to row.
    pub stride: u32,
    pub slices: Vec<Slice>,
}

impl Matrix {
    pub(super) fn upload(gpu: &Gpu, name: &str, view: MatrixView) -> Result<Matrix> {
        let stride = view.cols().next_multiple_of(8);
        let rows = Rows { name, count: view.rows(), bytes: stride * view.dtype().size() };
        let slices = rows.upload(gpu, stride, |i, out| out.extend_from_slice(view.row(i)))?;
        Matrix::new(name, Some(view.dtype()), [view.rows(), view.cols(), stride], slices)
    }

    pub(super) fn upload_int8(gpu: &Gpu, name: &str, view: Int8View) -> Result<Matrix> {
        let blocks = view.blocks();
        let stride = blocks * INT8_BLOCK;
        let rows = Rows { name, count: view.rows(), bytes: stride };
        let mut slices = rows.upload(gpu, stride, |i, out| {
            out.extend_from_slice(bytemuck::cast_slice(&view.quants()[i * stride..(i + 1) * stride]));
        })?;
        for slice in &mut slices {
            let (first, count) = (slice.first as usize, slice.count as usize);
            let buffer = gpu.buffer(name, (4 * count * blocks) as u64, wgpu::BufferUsages::STORAGE)?;
            let scales = &view.scales()[first * blocks..(first + count) * blocks];
            gpu.checked(name, || gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(scales)))?;
            slice.scales = Some(buffer);
        }
        Matrix::new(name, None, [view.rows(), view.cols(), stride], slices)
    }

    fn new(name: &str, dtype: Option<Dtype>, sizes: [usize; 3], slices: Vec<Slice>) -> Result<Matrix> {
        let [rows, cols, stride] = sizes.map(u32::try_from);
        let too_large = |_| too_large(name);
        Ok(Matrix {
            dtype,
            rows: rows.map_err(too_large)?,
            cols: cols.map_err(too_large)?,
            stride: stride.map_err(too_large)?,
            slices,
        })
    }

    /// What the shader must know of the weights and of rows of K inputs.
    pub(super) fn variant(&self) -> Flags {
        Flags { dtype: self.dtype, int8: self.dtype.is_none(), vec4: self.cols.is_multiple_of(4), ..Flags::default() }
    }

    pub(super) fn bytes(&self) -> u64 {
        let of = |s: &Slice| s.buffer.size() + s.scales.as_ref().map_or(0, wgpu::Buffer::size);
        self.slices.iter().map(of).sum()
    }
}

fn too_large(name: &str) -> Error {
    Error::limit(format!("{name}: too large for this device"))
}

/// Rows of equal length on their way to the device.
struct Rows<'a> {
    name: &'a str,
    count: usize,
    /// Of a row on the device.
    bytes: usize,
}

impl Rows<'_> {
    /// `append` adds the bytes of a row; what it leaves of [`Rows::bytes`] is zero. `stride` is in elements.
    fn upload(&self, gpu: &Gpu, stride: usize, append: impl Fn(usize, &mut Vec<u8>)) -> Result<Vec<Slice>> {
        let small = |n: usize| u32::try_from(n).map_err(|_| too_large(self.name));
        // Indices in the shader are 32 bits.
        let fitting = usize::try_from(gpu.max_binding()).unwrap_or(usize::MAX) / self.bytes;
        let per_slice = fitting.min(u32::MAX as usize / stride);
        if per_slice == 0 {
            return Err(too_large(self.name));
        }
        let mut slices = Vec::new();
        for first in (0..self.count).step_by(per_slice) {
            let count = per_slice.min(self.count - first);
            let buffer = gpu.buffer(self.name, (count * self.bytes) as u64, wgpu::BufferUsages::STORAGE)?;
            self.write(gpu, &buffer, first..first + count, &append)?;
            slices.push(Slice { buffer, scales: None, first: small(first)?, count: small(count)? });
        }
        Ok(slices)
    }

    fn write(
        &self,
        gpu: &Gpu,
        buffer: &wgpu::Buffer,
        rows: Range<usize>,
        append: &impl Fn(usize, &mut Vec<u8>),
    ) -> Result<()> {
        let at_a_time = (CHUNK / self.bytes).max(1);
        let mut staging = Vec::new();
        for start in rows.clone().step_by(at_a_time) {
            staging.clear();
            for row in start..rows.end.min(start + at_a_time) {
                append(row, &mut staging);
                staging.resize((row - start + 1) * self.bytes, 0);
            }
            let offset = ((start - rows.start) * self.bytes) as u64;
            gpu.checked("uploading weights", || gpu.queue.write_buffer(buffer, offset, &staging))?;
            // Hand over now: the queue otherwise keeps every chunk until the next submission.
            let submission = gpu.queue.submit([]);
            gpu.wait(submission)?;
        }
        Ok(())
    }
}
