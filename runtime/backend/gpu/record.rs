//! Dispatches on their way to the device, and what they cost where somebody asks.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::device::{Gpu, MOST_PARAMS};
use super::pipelines::{Flags, Pipelines, TileShape};
use crate::backend::{Cost, KernelTime, Profile};
use crate::error::{Error, Result};
use crate::kernels::Kernel;

/// Multiply-adds in a submission at most: a second or two on a software adapter, some ten milliseconds on a GPU.
const SOFTWARE_SUBMISSION: u64 = 4_000_000_000;
const SUBMISSION: u64 = 4_000_000_000_000;
const PER_DIMENSION: u32 = 65_535;
/// Timestamps of a query set, two a dispatch: what a set may have at most.
const TIMESTAMPS: u32 = wgpu::QUERY_SET_MAX_QUERIES;

/// `groups` workgroups over the first two dimensions.
pub(super) fn fold(groups: u32) -> [u32; 3] {
    if groups <= PER_DIMENSION { [groups, 1, 1] } else { [PER_DIMENSION, groups.div_ceil(PER_DIMENSION), 1] }
}

/// The immediates of a dispatch.
#[derive(Clone, Copy)]
pub(super) struct Params {
    bytes: [u8; MOST_PARAMS as usize],
    len: usize,
}

impl Params {
    pub(super) fn of<T: bytemuck::Pod>(params: &T) -> Self {
        const { assert!(size_of::<T>() <= MOST_PARAMS as usize) };
        let mut bytes = [0; MOST_PARAMS as usize];
        bytes[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(params));
        Params { bytes, len: size_of::<T>() }
    }
}

/// One dispatch of a step.
pub(super) struct Dispatch {
    /// Which of the pipelines.
    pub shape: TileShape,
    pub params: Params,
    pub groups: [u32; 3],
    /// Bytes that must be read or written: weights, activations, keys and values.
    pub bytes: u64,
    pub multiply_adds: u64,
}

/// A kernel with its bindings, which never change.
pub(super) struct Bound {
    name: &'static str,
    /// By [`TileShape`]; kernels without shapes have one.
    pipelines: Vec<(TileShape, wgpu::ComputePipeline)>,
    group: wgpu::BindGroup,
}

impl Bound {
    /// The pipelines of `shapes` with `storage` bound to them.
    pub(super) fn new(
        gpu: &Gpu,
        pipelines: &mut Pipelines,
        kernel: &Kernel,
        flags: Flags,
        shapes: &[TileShape],
        storage: &[&wgpu::Buffer],
    ) -> Result<Bound> {
        let mut built = Vec::new();
        let mut layout = None;
        for &shape in shapes {
            let pipeline = pipelines.get(gpu, kernel, Flags { shape, ..flags })?;
            built.push((shape, pipeline.pipeline));
            layout = Some(pipeline.layout);
        }
        let layout = layout.ok_or_else(|| Error::internal("a kernel of no shape"))?;
        let mut entries = Vec::new();
        for (buffer, binding) in storage.iter().zip(1..) {
            entries.push(wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        }
        let descriptor = wgpu::BindGroupDescriptor { label: Some(kernel.name), layout: &layout, entries: &entries };
        let group = gpu.checked(kernel.name, || gpu.device.create_bind_group(&descriptor))?;
        Ok(Bound { name: kernel.name, pipelines: built, group })
    }

    /// The same for a kernel that has one shape.
    pub(super) fn plain(
        gpu: &Gpu,
        pipelines: &mut Pipelines,
        kernel: &Kernel,
        flags: Flags,
        storage: &[&wgpu::Buffer],
    ) -> Result<Bound> {
        Self::new(gpu, pipelines, kernel, flags, &[TileShape::Narrow], storage)
    }
}

/// Timestamps around every dispatch.
pub(super) struct Clock {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    readback: wgpu::Buffer,
    /// Name, bytes and multiply-adds of the dispatches in the encoder at hand.
    open: Vec<(&'static str, u64, u64)>,
    times: Profile,
    /// That the host waited for timestamps since it was last asked.
    waited: Duration,
}

impl Clock {
    pub(super) fn new(gpu: &Gpu) -> Result<Clock> {
        if !gpu.timestamps {
            return Err(Error::unsupported(format!("{} has no timestamps", gpu.info().name)));
        }
        let bytes = u64::from(TIMESTAMPS) * 8;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.buffer("timestamps", bytes, usage)?;
        let readback = gpu.buffer("timestamps", bytes, wgpu::BufferUsages::MAP_READ)?;
        let queries = gpu.checked("timestamps", || {
            gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: TIMESTAMPS,
            })
        })?;
        Ok(Clock { queries, resolved, readback, open: Vec::new(), times: Profile::default(), waited: Duration::ZERO })
    }

    /// What was measured since the last time.
    pub(super) fn take(&mut self) -> Vec<KernelTime> {
        self.times.take()
    }

    /// Time that the host spent on a step without waiting for the device; `time` still has what this waited.
    pub(super) fn add_encoding(&mut self, time: Duration) {
        let time = time.saturating_sub(std::mem::take(&mut self.waited));
        self.times.add("encode (host)", time, Cost::default());
    }

    fn read(&mut self, gpu: &Gpu, submission: wgpu::SubmissionIndex) -> Result<()> {
        let begin = Instant::now();
        let open = std::mem::take(&mut self.open);
        let bytes = gpu.read(&self.readback, open.len() as u64 * 16, submission)?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        let period = f64::from(gpu.queue.get_timestamp_period()) * 1e-9;
        for ((name, bytes, multiply_adds), pair) in open.into_iter().zip(ticks.chunks_exact(2)) {
            let time = Duration::from_secs_f64(pair[1].saturating_sub(pair[0]) as f64 * period);
            self.times.add(name, time, Cost { bytes, flops: 2 * multiply_adds });
        }
        self.waited += begin.elapsed();
        Ok(())
    }
}

/// A command buffer in the making. Use it inside [`Gpu::checked`].
pub(super) struct Recorder<'a> {
    gpu: &'a Gpu,
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
    clock: Option<&'a mut Clock>,
    multiply_adds: u64,
    /// Multiply-adds of a submission at most, but for what one dispatch has.
    limit: u64,
    /// That was waited for submissions on the way.
    waited: Duration,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(gpu: &'a Gpu, mut clock: Option<&'a mut Clock>) -> Self {
        if let Some(clock) = &mut clock {
            // Of a step that failed.
            clock.open.clear();
        }
        let limit = if gpu.is_software() { SOFTWARE_SUBMISSION } else { SUBMISSION };
        let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        Recorder { gpu, encoder, pass: None, clock, multiply_adds: 0, limit, waited: Duration::ZERO }
    }

    /// Records a dispatch. Submits what there is and waits for it, if it is much: drivers and our own time limit count a
    /// submission's time, and a clock has so many timestamps.
    pub(super) fn dispatch(&mut self, bound: &Bound, dispatch: &Dispatch) -> Result<()> {
        let [x, y, z] = dispatch.groups;
        if x * y * z == 0 {
            return Ok(());
        }
        self.multiply_adds += dispatch.multiply_adds;
        let mut is_full = self.multiply_adds >= self.limit;
        if let Some(clock) = &mut self.clock {
            // A pass of its own: what is measured is the kernel, without what other kernels hide of it.
            self.pass = None;
            let at = 2 * clock.open.len() as u32;
            clock.open.push((bound.name, dispatch.bytes, dispatch.multiply_adds));
            is_full |= at + 2 == TIMESTAMPS;
            let writes = wgpu::ComputePassTimestampWrites {
                query_set: &clock.queries,
                beginning_of_pass_write_index: Some(at),
                end_of_pass_write_index: Some(at + 1),
            };
            let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes: Some(writes) };
            run(&mut self.encoder.begin_compute_pass(&descriptor), bound, dispatch);
        } else {
            let begin = || {
                let descriptor = wgpu::ComputePassDescriptor::default();
                self.encoder.begin_compute_pass(&descriptor).forget_lifetime()
            };
            run(self.pass.get_or_insert_with(begin), bound, dispatch);
        }
        if is_full {
            let submission = self.submit()?;
            let begin = Instant::now();
            self.gpu.wait(submission)?;
            self.waited += begin.elapsed();
        }
        Ok(())
    }

    /// Copies the start of a buffer, if there is anything to copy.
    pub(super) fn copy(&mut self, from: &wgpu::Buffer, to: &wgpu::Buffer, place: Range<u64>) {
        if !place.is_empty() {
            self.pass = None;
            self.encoder.copy_buffer_to_buffer(from, 0, to, place.start, place.end - place.start);
        }
    }

    /// Submits what there is and reads the first `bytes` of a MAP_READ buffer when it is done.
    pub(super) fn read(&mut self, buffer: &wgpu::Buffer, bytes: u64) -> Result<Vec<u8>> {
        let submission = self.submit()?;
        let begin = Instant::now();
        let read = self.gpu.read(buffer, bytes, submission);
        self.waited += begin.elapsed();
        read
    }

    /// How long it waited on the way.
    pub(super) fn waited(&self) -> Duration {
        self.waited
    }

    /// Submits what was recorded and begins anew.
    pub(super) fn submit(&mut self) -> Result<wgpu::SubmissionIndex> {
        let gpu = self.gpu;
        self.pass = None;
        self.multiply_adds = 0;
        let next = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut encoder = std::mem::replace(&mut self.encoder, next);
        if let Some(clock) = &mut self.clock {
            let count = 2 * clock.open.len() as u32;
            if count > 0 {
                encoder.resolve_query_set(&clock.queries, 0..count, &clock.resolved, 0);
                encoder.copy_buffer_to_buffer(&clock.resolved, 0, &clock.readback, 0, u64::from(count) * 8);
            }
        }
        let submission = gpu.queue.submit([encoder.finish()]);
        if let Some(clock) = &mut self.clock {
            clock.read(gpu, submission.clone())?;
        }
        Ok(submission)
    }
}

fn run(pass: &mut wgpu::ComputePass, bound: &Bound, dispatch: &Dispatch) {
    let shape = bound.pipelines.iter().find(|(shape, _)| *shape == dispatch.shape).or(bound.pipelines.first());
    let Some((_, pipeline)) = shape else { return };
    let [x, y, z] = dispatch.groups;
    pass.set_pipeline(pipeline);
    pass.set_bind_group(0, &bound.group, &[]);
    pass.set_immediates(0, &dispatch.params.bytes[..dispatch.params.len]);
    pass.dispatch_workgroups(x, y, z);
}
