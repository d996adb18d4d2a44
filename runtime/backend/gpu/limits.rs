//! What the device can do at best, measured through the same API as the kernels use it.

use std::time::Instant;

use super::device::Gpu;
use super::layers::product;
use super::pipelines::{Flags, Format, Pipelines, TileShape};
use super::record::{Bound, Recorder};
use crate::backend::Limits;
use crate::error::Result;
use crate::kernels::linear;
use crate::weights::Dtype;

/// Bytes that a copy reads, and writes: larger than any cache. Software adapters take less.
const COPY: u64 = 1 << 30;
const SOFTWARE_COPY: u64 = 64 << 20;
/// Repetitions of each; the best counts.
const REPEATS: usize = 5;

/// Copy bandwidth (bytes read and written a second), and what the product kernel reaches where nothing but arithmetic
/// limits it.
pub(super) fn measure(gpu: &Gpu) -> Result<Limits> {
    Ok(Limits { bytes_per_second: copy(gpu)?, flops: multiply(gpu)? })
}

fn best(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn copy(gpu: &Gpu) -> Result<f64> {
    let most = if gpu.is_software() { SOFTWARE_COPY } else { COPY };
    let bytes = most.min(gpu.max_binding());
    let from = gpu.buffer("copied from", bytes, wgpu::BufferUsages::COPY_SRC)?;
    let to = gpu.buffer("copied to", bytes, wgpu::BufferUsages::STORAGE)?;
    // Several in a submission: its own cost is not the copy's.
    let times = 8;
    let seconds = best(|| {
        let submission = gpu.checked("copying", || {
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            for _ in 0..times {
                encoder.copy_buffer_to_buffer(&from, 0, &to, 0, bytes);
            }
            gpu.queue.submit([encoder.finish()])
        })?;
        gpu.wait(submission)
    })?;
    Ok((2 * times * bytes) as f64 / seconds)
}

fn multiply(gpu: &Gpu) -> Result<f64> {
    let tile = gpu.matrix_tile();
    let format = tile.map_or(Format::Rows(Dtype::BF16), Format::Tiles);
    let flags = Flags { format: Some(format), vec4: true, ..Flags::default() };
    let size = if gpu.is_software() { 256u32 } else { 4096 };
    let storage = wgpu::BufferUsages::STORAGE;
    let elements = u64::from(size) * u64::from(size);
    let x = gpu.buffer("x", elements * 4, storage)?;
    let w = gpu.buffer("w", elements * 4, storage)?;
    let out = gpu.buffer("out", elements * 4, storage)?;
    let nothing = gpu.buffer("nothing", 64, storage)?;
    let storage = [&x, &w, &nothing, &nothing, &out];
    let mut pipelines = Pipelines::default();
    let bound = Bound::new(gpu, &mut pipelines, &linear::KERNEL, flags, &[TileShape::Wide], &storage)?;
    let params = linear::Params {
        rows: size,
        k: size,
        stride: size,
        count: size,
        first: 0,
        out_stride: size,
        has_bias: 0,
        slice_row: 0,
        x_first: 0,
        accumulate: 0,
        scale: 1.0,
    };
    let dispatch = product(flags, [size; 3], 0, &params);
    let times = if gpu.is_software() { 1 } else { 10 };
    let seconds = best(|| {
        let submission = gpu.checked("multiplying", || {
            let mut recorder = Recorder::new(gpu, None);
            for _ in 0..times {
                recorder.dispatch(&bound, &dispatch)?;
            }
            recorder.submit()
        })??;
        gpu.wait(submission)
    })?;
    Ok(f64::from(times) * 2.0 * f64::from(size).powi(3) / seconds)
}
