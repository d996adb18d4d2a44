//! A model on the GPU: buffers and bind groups made once, parameters and row tables written each step.

use std::sync::Arc;

use bytemuck::bytes_of;

use super::device::Gpu;
use super::pipelines::{Flags, Pipelines};
use super::upload::Matrix;
use crate::backend::cpu::Pool;
use crate::backend::{BlockCopy, Capacity, Executor, Memory, Output, Step, logit_rows};
use crate::error::{Error, Result, checked_size};
use crate::kernels::attention::MAX_HEAD_DIM;
use crate::kernels::linear::Int8Matrix;
use crate::kernels::{
    KV_BLOCK, Kernel, MatrixView, RowMeta, attention, embed, gather_rows, kv_write, linear, rms_norm, rope, silu_mul,
};
use crate::model::{Buf, MatrixId, ModelSpec, Op, Plan, Projection, VectorId};
use crate::weights::{WeightFormat, Weights};

/// Multiply-adds in a submission at most: seconds on a software adapter, milliseconds on a GPU.
const SUBMISSION_COST: u64 = 4_000_000_000;
/// Room for a parameter struct, and the largest alignment that WebGPU asks of a uniform offset.
pub(super) const SLOT: u64 = 256;
const PER_DIMENSION: u32 = 65_535;

/// Workgroups, and the parameter bytes of a dispatch, for T rows and M outputs.
type Shape = Box<dyn Fn(u32, u32) -> (Vec<u8>, [u32; 3]) + Send>;

/// Multiply-adds of a dispatch.
#[derive(Clone, Copy)]
enum Cost {
    PerRow(u64),
    /// For each key that a row sees.
    PerKey(u64),
}

const CHEAP: Cost = Cost::PerRow(0);

/// A dispatch whose bindings never change.
pub(super) struct Call {
    pub pipeline: wgpu::ComputePipeline,
    pub bind_group: wgpu::BindGroup,
    shape: Shape,
    cost: Cost,
}

/// The buffers of a model that do not belong to one op.
pub(super) struct Buffers {
    pub params: wgpu::Buffer,
    rows: wgpu::Buffer,
    tables: wgpu::Buffer,
    /// Tiles of attention: each row its own.
    tiles: wgpu::Buffer,
    cos_sin: wgpu::Buffer,
    picked: wgpu::Buffer,
    activations: Vec<wgpu::Buffer>,
    /// A norm's output [T, D], between the two dispatches of an op that begins with one.
    normed: wgpu::Buffer,
    /// The gate's product [T, F], on its way into silu.
    gate: wgpu::Buffer,
    /// Bound where a product has no bias or no scales.
    pub nothing: wgpu::Buffer,
}

impl Buffers {
    pub(super) fn activation(&self, buf: Buf) -> &wgpu::Buffer {
        &self.activations[buf as usize]
    }
}

/// A model on a GPU.
pub struct GpuExecutor {
    pub(super) gpu: Arc<Gpu>,
    pub(super) spec: ModelSpec,
    pub(super) buffers: Buffers,
    calls: Vec<Call>,
    pub(super) head: super::head::Head,
    /// Keys and values of each layer.
    kv: Vec<(wgpu::Buffer, wgpu::Buffer)>,
    /// A block of every layer, on its way to another block: a buffer cannot be copied onto itself.
    passing: wgpu::Buffer,
    capacity: Capacity,
    memory: Memory,
}

/// What building the calls needs.
pub(super) struct Builder<'a> {
    pub gpu: &'a Gpu,
    pub pipelines: Pipelines,
    pub buffers: &'a Buffers,
}

impl Builder<'_> {
    /// A pipeline with `storage` bound to it, and its parameters in `slot`.
    pub(super) fn bind(
        &mut self,
        kernel: &Kernel,
        variant: Flags,
        storage: &[&wgpu::Buffer],
        slot: usize,
    ) -> Result<(wgpu::ComputePipeline, wgpu::BindGroup)> {
        let built = self.pipelines.get(self.gpu, kernel, variant)?;
        let params = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &self.buffers.params,
            offset: slot as u64 * SLOT,
            size: std::num::NonZeroU64::new(SLOT),
        });
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: params }];
        for (i, buffer) in storage.iter().enumerate() {
            entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource: buffer.as_entire_binding() });
        }
        let descriptor =
            wgpu::BindGroupDescriptor { label: Some(kernel.name), layout: &built.layout, entries: &entries };
        let group = self.gpu.checked(kernel.name, || self.gpu.device.create_bind_group(&descriptor))?;
        Ok((built.pipeline.clone(), group))
    }
}

/// `groups` workgroups over the first two dimensions.
pub(super) fn fold(groups: u32) -> [u32; 3] {
    if groups <= PER_DIMENSION { [groups, 1, 1] } else { [PER_DIMENSION, groups.div_ceil(PER_DIMENSION), 1] }
}

impl GpuExecutor {
    /// Uploads the weights and builds everything that steps of up to `capacity` need.
    ///
    /// # Errors
    /// `DeviceMemory` or `Limit` if it does not fit the device, `Unsupported` for a head size above
    /// [`MAX_HEAD_DIM`], `Gpu` if a shader does not build.
    pub fn new(
        gpu: Arc<Gpu>,
        spec: ModelSpec,
        plan: Arc<Plan>,
        weights: &Weights,
        format: WeightFormat,
        capacity: Capacity,
    ) -> Result<Self> {
        if spec.head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head size of {}; at most {MAX_HEAD_DIM}", spec.head_dim)));
        }
        if capacity.max_rows > PER_DIMENSION as usize {
            return Err(Error::limit(format!(
                "max_batch_tokens is {}, a GPU takes {PER_DIMENSION}",
                capacity.max_rows
            )));
        }
        let storage = wgpu::BufferUsages::STORAGE;
        let quantised = if format == WeightFormat::Int8 { plan.quantisable(&spec) } else { Vec::new() };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Pool::new(if quantised.is_empty() { 1 } else { cores });
        let mut matrices = Vec::new();
        for (i, m) in plan.matrices.iter().enumerate() {
            let tensor = weights.get(&m.name)?;
            let view = MatrixView::new(tensor.dtype(), tensor.bytes(), m.shape[0], m.shape[1]);
            matrices.push(if quantised.contains(&MatrixId(i)) {
                let int8 = Int8Matrix::quantise(view, &pool).map_err(|e| e.at(format!("tensor {:?}", m.name)))?;
                Matrix::upload_int8(&gpu, &m.name, int8.view())?
            } else {
                Matrix::upload(&gpu, &m.name, view)?
            });
        }
        // A tied table is needed as stored where it embeds.
        let mut tables = Vec::new();
        for op in &plan.ops {
            if let Op::Embed { table, .. } = op
                && quantised.contains(table)
            {
                let tensor = weights.get(&plan.matrices[table.0].name)?;
                let shape = tensor.shape();
                let view = MatrixView::new(tensor.dtype(), tensor.bytes(), shape[0], shape[1]);
                tables.push((*table, Matrix::upload(&gpu, "embedding table", view)?));
            }
        }
        let mut vectors = Vec::new();
        for v in &plan.vectors {
            let values = weights.get(&v.name)?.to_f32();
            let buffer = gpu.buffer(&v.name, values.len() as u64 * 4, storage)?;
            gpu.checked(&v.name, || gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&values)))?;
            vectors.push(buffer);
        }
        let bytes = |what: &str, factors: &[usize]| checked_size(what, factors).map(|n| n as u64);
        let activation = |buf: Buf| {
            let size = bytes("activations", &[capacity.max_rows, buf.width(&spec), 4])?;
            if size > gpu.max_binding() {
                return Err(Error::limit(format!(
                    "activations of {} rows exceed a binding of this device; lower max_batch_tokens",
                    capacity.max_rows
                )));
            }
            gpu.buffer("activations", size, storage)
        };
        let activations = Buf::ALL.into_iter().map(activation).collect::<Result<_>>()?;
        let per_layer = bytes("the KV cache", &[capacity.kv_blocks, KV_BLOCK, spec.kv_width(), 4])?;
        let mut kv = Vec::new();
        for _ in 0..spec.layers {
            let usage = storage | wgpu::BufferUsages::COPY_SRC;
            kv.push((gpu.buffer("keys", per_layer, usage)?, gpu.buffer("values", per_layer, usage)?));
        }
        let block = bytes("a KV block", &[2, spec.layers, KV_BLOCK, spec.kv_width(), 4])?;
        let passing = gpu.buffer("a KV block", block, wgpu::BufferUsages::COPY_SRC)?;
        // An op is at most a norm, its products, and one more dispatch.
        let slices = matrices.iter().chain(tables.iter().map(|(_, t)| t)).map(|m| m.slices.len()).sum::<usize>();
        let slots = 3 * plan.ops.len() + 2 * slices + super::head::SLOTS;
        let rows = capacity.max_rows as u64;
        let buffers = Buffers {
            params: gpu.buffer("params", slots as u64 * SLOT, wgpu::BufferUsages::UNIFORM)?,
            rows: gpu.buffer("rows", rows * size_of::<RowMeta>() as u64, storage)?,
            tables: gpu.buffer("tables", capacity.max_table_entries() as u64 * 4, storage)?,
            tiles: gpu.buffer("tiles", rows * 8, storage)?,
            cos_sin: gpu.buffer("cos_sin", rows * spec.head_dim as u64 * 4, storage)?,
            picked: gpu.buffer("picked", rows * 4, storage)?,
            activations,
            normed: activation(Buf::Hidden)?,
            gate: activation(Buf::Gated)?,
            nothing: gpu.buffer("nothing", 64, storage)?,
        };
        let tiles: Vec<[u32; 2]> = (0..capacity.max_rows as u32).map(|row| [row, 1]).collect();
        gpu.checked("tiles", || gpu.queue.write_buffer(&buffers.tiles, 0, bytemuck::cast_slice(&tiles)))?;
        let mut builder = Builder { gpu: &gpu, pipelines: Pipelines::default(), buffers: &buffers };
        let mut calls = Vec::new();
        let model = Model { spec: &spec, matrices: &matrices, tables: &tables, vectors: &vectors, kv: &kv };
        for op in &plan.ops {
            build_calls(&mut builder, &model, op, &mut calls)?;
        }
        let head_matrix =
            matrices.get(plan.head.0).ok_or_else(|| Error::internal("the plan's head is not a matrix"))?;
        let head = super::head::Head::new(&mut builder, &spec, head_matrix, capacity.max_rows, calls.len())?;
        let memory = Memory {
            weights: matrices.iter().chain(tables.iter().map(|(_, t)| t)).map(Matrix::bytes).sum::<u64>()
                + vectors.iter().map(|v| v.size()).sum::<u64>(),
            mapped: 0,
            kv_cache: 2 * per_layer * spec.layers as u64,
            scratch: scratch_bytes(&spec, capacity.max_rows),
        };
        Ok(GpuExecutor { spec, calls, head, kv, passing, capacity, memory, buffers, gpu })
    }

    /// Encodes and submits the calls of a step, in submissions of bounded cost.
    fn run_calls(&self, t: u32, m: u32, keys: u64) -> Result<()> {
        let mut params = vec![0u8; self.calls.len() * SLOT as usize];
        let mut sizes = Vec::with_capacity(self.calls.len());
        for (slot, call) in params.chunks_exact_mut(SLOT as usize).zip(&self.calls) {
            let (bytes, groups) = (call.shape)(t, m);
            slot[..bytes.len()].copy_from_slice(&bytes);
            sizes.push(groups);
        }
        self.write(&self.buffers.params, &params)?;
        let mut next = 0;
        while next < self.calls.len() {
            let mut cost = 0;
            let submission = self.gpu.checked("a step", || {
                let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                while next < self.calls.len() && cost < SUBMISSION_COST {
                    let (call, [x, y, z]) = (&self.calls[next], sizes[next]);
                    if x * y * z > 0 {
                        pass.set_pipeline(&call.pipeline);
                        pass.set_bind_group(0, &call.bind_group, &[]);
                        pass.dispatch_workgroups(x, y, z);
                    }
                    cost += match call.cost {
                        Cost::PerRow(cost) => cost * u64::from(t),
                        Cost::PerKey(cost) => cost * keys,
                    };
                    next += 1;
                }
                drop(pass);
                self.gpu.queue.submit([encoder.finish()])
            })?;
            // Wait only if more is to come: the head waits for the last one.
            if next < self.calls.len() {
                self.gpu.wait(submission)?;
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, buffer: &wgpu::Buffer, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu.checked("writing", || self.gpu.queue.write_buffer(buffer, 0, bytes))
    }
}

impl Executor for GpuExecutor {
    fn step(&mut self, step: &Step) -> Result<Vec<Output>> {
        let (t, m) = (step.rows.len(), step.outputs.len());
        let Capacity { max_rows, .. } = self.capacity;
        if t > max_rows || m > max_rows || step.tables.len() > self.capacity.max_table_entries() {
            return Err(Error::internal(format!("a step of {t} rows and {m} outputs, built for {max_rows}")));
        }
        let order = super::head::order(step.outputs);
        let picked: Vec<u32> = order.iter().map(|&i| step.outputs[i].row).collect();
        self.write(&self.buffers.rows, bytemuck::cast_slice(step.rows))?;
        self.write(&self.buffers.tables, bytemuck::cast_slice(step.tables))?;
        self.write(&self.buffers.cos_sin, bytemuck::cast_slice(step.cos_sin))?;
        self.write(&self.buffers.picked, bytemuck::cast_slice(&picked))?;
        // Both are at most max_rows, which fits.
        let seen = |r: &RowMeta| u64::from(r.position) + 1;
        let window = self.spec.sliding_window.map_or(u64::MAX, |w| w as u64);
        let keys = step.rows.iter().map(|r| seen(r).min(window)).sum();
        self.run_calls(t as u32, m as u32, keys)?;
        self.run_head(step, &order)
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()> {
        if copies.is_empty() {
            return Ok(());
        }
        let size = 4 * (KV_BLOCK * self.spec.kv_width()) as u64;
        self.gpu.checked("copying KV blocks", || {
            let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let caches = || self.kv.iter().flat_map(|(keys, values)| [keys, values]).zip(0u64..);
            for copy in copies {
                let (from, to) = (u64::from(copy.from) * size, u64::from(copy.to) * size);
                for (cache, i) in caches() {
                    encoder.copy_buffer_to_buffer(cache, from, &self.passing, i * size, size);
                }
                for (cache, i) in caches() {
                    encoder.copy_buffer_to_buffer(&self.passing, i * size, cache, to, size);
                }
            }
            self.gpu.queue.submit([encoder.finish()])
        })?;
        Ok(())
    }

    fn memory(&self) -> Memory {
        self.memory
    }
}

/// What the calls are built from.
struct Model<'a> {
    spec: &'a ModelSpec,
    matrices: &'a [Matrix],
    /// Embedding tables whose product form is quantised.
    tables: &'a [(MatrixId, Matrix)],
    vectors: &'a [wgpu::Buffer],
    kv: &'a [(wgpu::Buffer, wgpu::Buffer)],
}

/// Appends calls to the list, each in its slot.
struct Calls<'a, 'b> {
    builder: &'a mut Builder<'b>,
    model: &'a Model<'a>,
    list: &'a mut Vec<Call>,
}

impl Calls<'_, '_> {
    fn push(
        &mut self,
        kernel: &Kernel,
        variant: Flags,
        storage: &[&wgpu::Buffer],
        cost: Cost,
        shape: Shape,
    ) -> Result<()> {
        let (pipeline, bind_group) = self.builder.bind(kernel, variant, storage, self.list.len())?;
        self.list.push(Call { pipeline, bind_group, shape, cost });
        Ok(())
    }

    fn norm(&mut self, [x, out]: [&wgpu::Buffer; 2], weight: VectorId, over_all: bool) -> Result<()> {
        let (width, eps) = (self.model.spec.hidden_size as u32, self.model.spec.rms_norm_eps);
        let shape: Shape = Box::new(move |t, m| {
            let rows = if over_all { t } else { m };
            (bytes_of(&rms_norm::Params { rows, width, eps }).to_vec(), fold(rows))
        });
        self.push(&rms_norm::KERNEL, Flags::default(), &[x, &self.model.vectors[weight.0], out], CHEAP, shape)
    }

    fn product(&mut self, p: &Projection, [x, out]: [&wgpu::Buffer; 2], accumulate: bool) -> Result<()> {
        let matrix = &self.model.matrices[p.weight.0];
        let nothing = &self.builder.buffers.nothing;
        let bias = p.bias.map_or(nothing, |v| &self.model.vectors[v.0]);
        for slice in &matrix.slices {
            let storage = [x, &slice.buffer, slice.scales.as_ref().unwrap_or(nothing), bias, out];
            let base =
                linear::Params { accumulate: u32::from(accumulate), ..slice_params(matrix, slice, p.bias.is_some()) };
            let shape: Shape = Box::new(move |t, _| linear_shape(linear::Params { rows: t, ..base }));
            let cost = Cost::PerRow(u64::from(matrix.cols) * u64::from(slice.count));
            self.push(&linear::KERNEL, matrix.variant(), &storage, cost, shape)?;
        }
        Ok(())
    }
}

fn build_calls(builder: &mut Builder, model: &Model, op: &Op, list: &mut Vec<Call>) -> Result<()> {
    let (spec, b) = (model.spec, builder.buffers);
    let (half, head_dim) = (spec.head_dim as u32 / 2, spec.head_dim as u32);
    let (heads, kv_heads) = (spec.heads as u32, spec.kv_heads as u32);
    let mut calls = Calls { builder, model, list };
    let plain = Flags::default();
    match op {
        Op::Embed { table, out } => {
            let stored = model.tables.iter().find(|(id, _)| id == table);
            let table = stored.map_or(&model.matrices[table.0], |(_, matrix)| matrix);
            for slice in &table.slices {
                let (width, stride, first, count) = (table.cols, table.stride, slice.first, slice.count);
                let storage = [&b.rows, &slice.buffer, b.activation(*out)];
                let shape: Shape = Box::new(move |t, _| {
                    (bytes_of(&embed::Params { rows: t, width, stride, first, count }).to_vec(), fold(t))
                });
                calls.push(&embed::KERNEL, Flags { dtype: table.dtype, ..plain }, &storage, CHEAP, shape)?;
            }
            Ok(())
        }
        Op::Linear { x, norm, parts } => {
            let mut x = b.activation(*x);
            if let Some(weight) = norm {
                calls.norm([x, &b.normed], *weight, true)?;
                x = &b.normed;
            }
            parts.iter().try_for_each(|(p, out)| calls.product(p, [x, b.activation(*out)], false))
        }
        Op::LinearAdd { x, part, to } => calls.product(part, [b.activation(*x), b.activation(*to)], true),
        Op::LinearGated { x, norm, gate, up, out } => {
            calls.norm([b.activation(*x), &b.normed], *norm, true)?;
            calls.product(gate, [&b.normed, &b.gate], false)?;
            calls.product(up, [&b.normed, b.activation(*out)], false)?;
            let width = out.width(spec) as u32;
            let shape: Shape = Box::new(move |t, _| {
                let len = t * width;
                (bytes_of(&silu_mul::Params { len }).to_vec(), fold(len.div_ceil(silu_mul::ELEMENTS_PER_WORKGROUP)))
            });
            calls.push(&silu_mul::KERNEL, plain, &[&b.gate, b.activation(*out)], CHEAP, shape)
        }
        Op::Rope { x, heads } => {
            let heads = *heads as u32;
            let shape: Shape =
                Box::new(move |t, _| (bytes_of(&rope::Params { rows: t, heads, half }).to_vec(), fold(t)));
            calls.push(&rope::KERNEL, plain, &[&b.cos_sin, b.activation(*x)], CHEAP, shape)
        }
        Op::KvWrite { layer } => {
            let (keys, values) = &model.kv[*layer];
            let storage = [&b.rows, b.activation(Buf::K), b.activation(Buf::V), keys, values];
            let shape: Shape =
                Box::new(move |t, _| (bytes_of(&kv_write::Params { rows: t, kv_heads, head_dim }).to_vec(), fold(t)));
            calls.push(&kv_write::KERNEL, plain, &storage, CHEAP, shape)
        }
        Op::Attention { layer } => {
            let (keys, values) = &model.kv[*layer];
            let (q, out) = (b.activation(Buf::Q), b.activation(Buf::Attn));
            let storage = [&b.rows, &b.tiles, &b.tables, q, keys, values, out, &b.nothing];
            let scale = 1.0 / (spec.head_dim as f32).sqrt();
            let window = spec.sliding_window.map_or(0, |w| u32::try_from(w).unwrap_or(0));
            let shape: Shape = Box::new(move |t, _| {
                let params = attention::Params { rows: t, heads, kv_heads, head_dim, scale, window, segments: 1 };
                (bytes_of(&params).to_vec(), attention::workgroups(&params, t as usize))
            });
            let variant = Flags { vec4: head_dim.is_multiple_of(4), head_dim, ..plain };
            calls.push(&attention::KERNEL, variant, &storage, Cost::PerKey(2 * spec.q_width() as u64), shape)
        }
        Op::GatherRows { x, out } => {
            let width = x.width(spec) as u32;
            let storage = [&b.picked, b.activation(*x), b.activation(*out)];
            let shape: Shape =
                Box::new(move |_, m| (bytes_of(&gather_rows::Params { rows: m, width }).to_vec(), fold(m)));
            calls.push(&gather_rows::KERNEL, plain, &storage, CHEAP, shape)
        }
        Op::RmsNorm { x, weight, out } => calls.norm([b.activation(*x), b.activation(*out)], *weight, false),
    }
}

/// Activations for steps of up to `max_rows` rows with what an op keeps between its dispatches, and the bounded block of
/// logits with its copy for the host; block tables, a KV block on its way, and what sampling reads and writes.
pub(crate) fn scratch_bytes(spec: &ModelSpec, max_rows: usize) -> u64 {
    let widths: usize = Buf::ALL.iter().map(|b| b.width(spec)).sum();
    let between = spec.hidden_size + spec.intermediate_size + spec.head_dim;
    let logits = 2 * logit_rows(spec.vocab_size) * spec.vocab_size;
    let passing = 2 * spec.layers * KV_BLOCK * spec.kv_width();
    // Of each row, 64 entries of block tables.
    4 * ((widths + between + 64) as u64 * max_rows as u64 + (logits + passing) as u64)
        + super::head::sampling_bytes(spec.vocab_size)
}

/// Parameters of a product with one slice of a matrix, for all of its rows.
pub(super) fn slice_params(matrix: &Matrix, slice: &super::upload::Slice, has_bias: bool) -> linear::Params {
    linear::Params {
        rows: 0,
        k: matrix.cols,
        stride: matrix.stride,
        count: slice.count,
        first: slice.first,
        out_stride: matrix.rows,
        has_bias: u32::from(has_bias),
        slice_row: 0,
        x_first: 0,
        accumulate: 0,
    }
}

/// The dispatch of a product.
pub(super) fn linear_shape(params: linear::Params) -> (Vec<u8>, [u32; 3]) {
    let [x, y, _] = fold(params.count.div_ceil(linear::COLS_PER_WORKGROUP));
    (bytes_of(&params).to_vec(), [x, y, params.rows.div_ceil(linear::ROWS_PER_WORKGROUP)])
}

/// Rows whose logits fit the block and a binding.
pub(super) fn block_rows(gpu: &Gpu, width: usize) -> usize {
    let fitting = usize::try_from(gpu.max_binding() / (4 * width as u64)).unwrap_or(usize::MAX);
    logit_rows(width).min(fitting.max(1))
}
