//! Weights into device buffers, in slices of rows that fit a binding.

use super::device::Gpu;
use crate::error::{Error, Result};
use crate::kernels::MatrixView;
use crate::weights::Dtype;

/// Bytes given to the queue at a time.
const CHUNK: usize = 16 << 20;

/// Some rows of a matrix in a buffer of their own.
pub(super) struct Slice {
    pub buffer: wgpu::Buffer,
    pub first: u32,
    pub count: u32,
}

/// A weight matrix on the device. Rows are padded to whole groups of eight elements.
pub(super) struct Matrix {
    pub dtype: Dtype,
    pub rows: u32,
    pub cols: u32,
    /// Elements from row to row.
    pub stride: u32,
    pub slices: Vec<Slice>,
}

impl Matrix {
    pub(super) fn upload(gpu: &Gpu, name: &str, view: MatrixView) -> Result<Matrix> {
        let too_large = || Error::limit(format!("{name}: too large for this device"));
        let small = |n: usize| u32::try_from(n).map_err(|_| too_large());
        let stride = view.cols().next_multiple_of(8);
        let row_bytes = stride * view.dtype().size();
        // Indices in the shader are 32 bits.
        let fitting = usize::try_from(gpu.max_binding()).unwrap_or(usize::MAX) / row_bytes;
        let per_slice = fitting.min(u32::MAX as usize / stride);
        if per_slice == 0 {
            return Err(too_large());
        }
        let mut slices = Vec::new();
        for first in (0..view.rows()).step_by(per_slice) {
            let count = per_slice.min(view.rows() - first);
            let buffer = gpu.buffer(name, (count * row_bytes) as u64, wgpu::BufferUsages::STORAGE)?;
            write_rows(gpu, &buffer, view, first, count, row_bytes)?;
            slices.push(Slice { buffer, first: small(first)?, count: small(count)? });
        }
        Ok(Matrix {
            dtype: view.dtype(),
            rows: small(view.rows())?,
            cols: small(view.cols())?,
            stride: small(stride)?,
            slices,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.slices.iter().map(|s| s.buffer.size()).sum()
    }
}

fn write_rows(
    gpu: &Gpu,
    buffer: &wgpu::Buffer,
    view: MatrixView,
    first: usize,
    count: usize,
    row_bytes: usize,
) -> Result<()> {
    let rows_at_a_time = (CHUNK / row_bytes).max(1);
    let mut staging = Vec::new();
    for start in (0..count).step_by(rows_at_a_time) {
        let rows = rows_at_a_time.min(count - start);
        staging.clear();
        for row in 0..rows {
            staging.extend_from_slice(view.row(first + start + row));
            staging.resize((row + 1) * row_bytes, 0);
        }
        gpu.checked("uploading weights", || gpu.queue.write_buffer(buffer, (start * row_bytes) as u64, &staging))?;
        // Hand over now: the queue otherwise keeps every chunk until the next submission.
        let submission = gpu.queue.submit([]);
        gpu.wait(submission)?;
    }
    Ok(())
}
