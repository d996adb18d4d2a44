//! One kernel over buffers given as bytes: for the twin tests and the kernel benches.

use std::time::{Duration, Instant};

use super::device::Gpu;
use super::pipelines::{Flags, Pipeline, build, layout};
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
    let probe = Probe::new(gpu, kernel, flags, storage)?;
    probe.run(params, groups, 1)?;
    probe.read(storage)
}

/// A kernel and its buffers, to be dispatched as often as one likes.
pub struct Probe<'a> {
    gpu: &'a Gpu,
    kernel: &'a Kernel,
    pipeline: Pipeline,
    adapters: bool,
    buffers: Vec<wgpu::Buffer>,
}

impl<'a> Probe<'a> {
    /// Builds the kernel and uploads `storage`, one buffer a binding, in the order of the kernel's table.
    ///
    /// # Errors
    /// See [`dispatch_once`].
    pub fn new(gpu: &'a Gpu, kernel: &'a Kernel, flags: Flags, storage: &[Vec<u8>]) -> Result<Self> {
        if storage.len() != kernel.bindings(flags.adapters).count() {
            return Err(Error::argument(format!("{}: {} buffers", kernel.name, storage.len())));
        }
        let layout = layout(gpu, kernel, flags.adapters)?;
        let pipeline = build(gpu, kernel, &layout, flags)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let padded = |bytes: &[u8]| {
            let mut padded = bytes.to_vec();
            padded.resize(bytes.len().next_multiple_of(16), 0);
            padded
        };
        let mut buffers = Vec::new();
        for bytes in storage {
            let buffer = gpu.buffer("probe", bytes.len() as u64, usage)?;
            gpu.checked("probe", || gpu.queue.write_buffer(&buffer, 0, &padded(bytes)))?;
            buffers.push(buffer);
        }
        Ok(Probe { gpu, kernel, pipeline, adapters: flags.adapters, buffers })
    }

    /// Dispatches it `times` in a row and says how long that took, from the submission to its end.
    ///
    /// # Errors
    /// See [`dispatch_once`].
    pub fn run(&self, params: &[u8], groups: [u32; 3], times: u64) -> Result<Duration> {
        if params.len() != self.kernel.params_size {
            return Err(Error::argument(format!("{}: {} bytes of parameters", self.kernel.name, params.len())));
        }
        let mut entries = Vec::new();
        for (binding, buffer) in (1..).zip(&self.buffers) {
            entries.push(wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        }
        let gpu = self.gpu;
        let (begin, submission) = gpu.checked(self.kernel.name, || {
            let descriptor =
                wgpu::BindGroupDescriptor { label: None, layout: &self.pipeline.layout, entries: &entries };
            let group = gpu.device.create_bind_group(&descriptor);
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&self.pipeline.pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.set_immediates(0, params);
            for _ in 0..times {
                pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
            }
            drop(pass);
            let commands = encoder.finish();
            (Instant::now(), gpu.queue.submit([commands]))
        })?;
        gpu.wait(submission)?;
        Ok(begin.elapsed())
    }

    /// Writes the contents of the writable buffers back.
    fn read(&self, storage: &mut [Vec<u8>]) -> Result<()> {
        let gpu = self.gpu;
        let total: u64 = self.buffers.iter().map(wgpu::Buffer::size).sum();
        let readback = gpu.buffer("readback", total, wgpu::BufferUsages::MAP_READ)?;
        let submission = gpu.checked(self.kernel.name, || {
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut at = 0;
            for buffer in &self.buffers {
                encoder.copy_buffer_to_buffer(buffer, 0, &readback, at, buffer.size());
                at += buffer.size();
            }
            gpu.queue.submit([encoder.finish()])
        })?;
        let bytes = gpu.read(&readback, total, submission)?;
        let mut at = 0;
        let bindings = self.kernel.bindings(self.adapters);
        for ((contents, buffer), (_, access)) in storage.iter_mut().zip(&self.buffers).zip(bindings) {
            if access == Access::Write {
                let len = contents.len();
                contents.copy_from_slice(&bytes[at..at + len]);
            }
            // Sizes are at most what was read.
            at += buffer.size() as usize;
        }
        Ok(())
    }
}
