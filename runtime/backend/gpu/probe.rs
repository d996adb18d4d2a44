//! One dispatch of one kernel over buffers given as bytes: for the twin tests and the kernel benches.

use super::device::Gpu;
use super::pipelines::{Flags, build, layout};
use crate::error::{Error, Result};
use crate::kernels::{Access, Kernel};

/// Runs `kernel` once over `storage` (one buffer a binding, in the order of the kernel's table) and writes the
/// contents of the writable ones back.
///
/// # Errors
/// `Argument` if the buffers are not as many as the bindings; what the device reports otherwise.
pub fn dispatch_once(
    gpu: &Gpu,
    kernel: &Kernel,
    flags: Flags,
    params: &[u8],
    storage: &mut [Vec<u8>],
    groups: [u32; 3],
) -> Result<()> {
    if storage.len() != kernel.bindings.len() || params.len() != kernel.params_size {
        return Err(Error::argument(format!(
            "{}: {} buffers, {} bytes of parameters",
            kernel.name,
            storage.len(),
            params.len()
        )));
    }
    let layout = layout(gpu, kernel)?;
    let pipeline = build(gpu, kernel, &layout, flags)?;
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let padded = |bytes: &[u8]| {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(16), 0);
        padded
    };
    let mut buffers = Vec::new();
    for bytes in storage.iter() {
        let buffer = gpu.buffer("probe", bytes.len() as u64, usage)?;
        gpu.checked("probe", || gpu.queue.write_buffer(&buffer, 0, &padded(bytes)))?;
        buffers.push(buffer);
    }
    let mut entries = Vec::new();
    for (i, buffer) in buffers.iter().enumerate() {
        entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource: buffer.as_entire_binding() });
    }
    let total: u64 = buffers.iter().map(wgpu::Buffer::size).sum();
    let readback = gpu.buffer("readback", total, wgpu::BufferUsages::MAP_READ)?;
    let submission = gpu.checked(kernel.name, || {
        let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
        let group = gpu.device.create_bind_group(&descriptor);
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.set_immediates(0, params);
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        drop(pass);
        let mut at = 0;
        for buffer in &buffers {
            encoder.copy_buffer_to_buffer(buffer, 0, &readback, at, buffer.size());
            at += buffer.size();
        }
        gpu.queue.submit([encoder.finish()])
    })?;
    let bytes = gpu.read(&readback, total, submission)?;
    let mut at = 0;
    for ((contents, buffer), (_, access)) in storage.iter_mut().zip(&buffers).zip(kernel.bindings) {
        if *access == Access::Write {
            let len = contents.len();
            contents.copy_from_slice(&bytes[at..at + len]);
        }
        // Sizes are at most what was read.
        at += buffer.size() as usize;
    }
    Ok(())
}
