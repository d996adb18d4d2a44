//! A model on the GPU: buffers, pipelines and bind groups made once; a step uploads its row tables and encodes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adapters::Adapters;
use super::blocks;
use super::device::Gpu;
use super::head::{self, Head};
use super::layers::{Buffers, Builder, Call, Dims, can_tile};
use super::matrix::SLICE_ROWS;
use super::pipelines::Pipelines;
use super::record::{Clock, Recorder};
use super::upload::{Uploaded, Uploader};
use crate::backend::cpu::Pool;
use crate::backend::{
    BlockCopy, Capacity, DeviceWeights, Executor, Holding, KernelTime, Limits, Loader, Memory, NO_ADAPTER, Output, Step,
};
use crate::error::{Error, Result, checked_size};
use crate::kernels::attention::MAX_HEAD_DIM;
use crate::kernels::linear::Precision;
use crate::kernels::{KV_BLOCK, MatrixView, RowMeta, attention, sample};
use crate::model::{Buf, MatrixId, ModelSpec, Plan};
use crate::weights::{AdapterWeights, WeightFormat, Weights};

/// Decode steps that are computed before their results are read.
const STEPS_AT_ONCE: usize = 8;
/// Workgroups of attention that keep a GPU busy.
const ENOUGH_WORKGROUPS: usize = 1024;
/// Rows of x that products on matrix units read together at most: buffers end on a multiple of it.
const ROW_TILE: usize = 64;

/// A model on a GPU.
pub struct GpuExecutor {
    pub(super) gpu: Arc<Gpu>,
    pub(super) spec: ModelSpec,
    pub(super) buffers: Buffers,
    calls: Vec<Call>,
    adapters: Adapters,
    pub(super) head: Head,
    /// A block of every layer, on its way to another block: a buffer cannot be copied onto itself.
    passing: wgpu::Buffer,
    pub(super) capacity: Capacity,
    kv_element: u64,
    memory: Memory,
    uploaded: Uploaded,
    /// Kept when it is stopped, for what it measured.
    clock: Option<Clock>,
    is_timed: bool,
}

/// How the attention of a step is cut.
struct Attention {
    tiles: Vec<[u32; 2]>,
    /// That are computed side by side.
    segments: u32,
}

/// With matrix units keys and values are f16, and weights whole tiles.
fn holding(tile: Option<u32>) -> Holding {
    match tile {
        Some(_) => Holding { kv_element: 2, weight_rows: SLICE_ROWS },
        None => Holding { kv_element: 4, weight_rows: 1 },
    }
}

/// Room for the segments of 32 rows of 16 segments each, or of fewer rows of more.
fn partial_bytes(spec: &ModelSpec) -> u64 {
    (4 * 512 * spec.heads * (spec.head_dim + 2)) as u64
}

/// A matrix of the checkpoint as it is stored.
pub(super) fn stored<'a>(plan: &Plan, weights: &'a Weights, id: MatrixId) -> Result<MatrixView<'a>> {
    let expected = &plan.matrices[id.0];
    let tensor = weights.get(&expected.name)?;
    Ok(MatrixView::new(tensor.dtype(), tensor.bytes(), expected.shape[0], expected.shape[1]))
}

/// How the weights of a model are used on a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct GpuWeights {
    /// How they are held.
    pub format: WeightFormat,
    /// Whether inputs of products may be rounded to f16.
    pub precision: Precision,
}

impl GpuExecutor {
    /// Uploads the weights and builds everything that steps need. `sizes` says of how many rows and blocks; it is asked again
    /// if matrix units turn out to be of no use, since a position then takes twice the memory.
    ///
    /// # Errors
    /// What `sizes` returns, `DeviceMemory` or `Limit` if it does not fit the device, `Unsupported` for a head size above
    /// [`MAX_HEAD_DIM`], `Gpu` if a shader does not build.
    pub fn new(
        gpu: Arc<Gpu>,
        spec: ModelSpec,
        plan: &Plan,
        weights: &Weights,
        how: GpuWeights,
        sizes: &dyn Fn(Holding) -> Result<Capacity>,
    ) -> Result<Self> {
        if spec.head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head size of {}; at most {MAX_HEAD_DIM}", spec.head_dim)));
        }
        let tile = match gpu.matrix_tile() {
            Some(tile) if how.precision == Precision::Auto && how.format == WeightFormat::Stored => {
                can_tile(&spec, plan, weights, tile)?.then_some(tile)
            }
            _ => None,
        };
        let build = |tile: Option<u32>| {
            let capacity = sizes(holding(tile))?;
            if capacity.max_rows > 65_535 {
                return Err(Error::limit(format!("max_batch_tokens is {}, a GPU takes 65535", capacity.max_rows)));
            }
            Self::build(gpu.clone(), spec.clone(), plan, weights, how.format, tile, capacity)
        };
        match build(tile) {
            // Something is too large for f16: nothing is rounded then.
            Err(error) if tile.is_some() && error.kind() == crate::error::ErrorKind::Unsupported => {
                log::warn!("matrix units are not used: {error}");
                build(None)
            }
            result => result,
        }
    }

    fn build(
        gpu: Arc<Gpu>,
        spec: ModelSpec,
        plan: &Plan,
        weights: &Weights,
        format: WeightFormat,
        tile: Option<u32>,
        capacity: Capacity,
    ) -> Result<Self> {
        let pool = &Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
        let half = tile.is_some();
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
            partials: gpu.buffer("partial attention", partial_bytes(&spec).min(gpu.max_binding()), storage)?,
            cos_sin: activation("angles", rows, spec.head_dim, 4)?,
            picked: activation("output rows", rows, 4, 1)?,
            drawn: {
                let bytes = (rows * size_of::<sample::Drawn>()) as u64;
                gpu.buffer("draws", bytes, storage | wgpu::BufferUsages::COPY_SRC)?
            },
            hidden: activation("activations", rows, d, 4)?,
            normed: activation("activations", padded, d, element)?,
            q: activation("activations", rows, spec.q_width(), 4)?,
            attn: activation("activations", padded, spec.q_width(), element)?,
            gated: activation("activations", padded, spec.intermediate_size, element)?,
            picked_rows: activation("activations", rows, d, 4)?,
            last: activation("activations", padded + ROW_TILE, d, if language_model { element } else { 4 })?,
            nothing: gpu.buffer("nothing", 64, storage)?,
            kv,
        };
        let mut builder = Builder {
            gpu: &gpu,
            spec: &spec,
            plan,
            weights,
            buffers: &buffers,
            pipelines: Pipelines::default(),
            uploader: Uploader::new(&gpu, pool, weights),
            pool,
            format,
            quantisable: &plan.quantisable(&spec),
            tile,
            half_kv: half,
            calls: Vec::new(),
            products: Vec::new(),
            tied: None,
            weight_bytes: 0,
            underflows: 0,
            weight_count: 0,
        };
        builder.layers()?;
        let head = Head::new(&mut builder, rows)?;
        builder.uploader.finish()?;
        let uploaded = builder.uploader.uploaded;
        let (calls, weight_bytes, underflows, count) =
            (builder.calls, builder.weight_bytes, builder.underflows, builder.weight_count);
        let adapters = Adapters::new(builder.products, builder.pipelines, rows);
        if half {
            log::info!("products on matrix units: {count} weights as f16, {underflows} of them rounded (below 2^-14)");
        }
        log::info!(
            "weights: {} MiB staged, {} MiB copied from where they are mapped",
            uploaded.staged >> 20,
            uploaded.imported >> 20
        );
        gpu.save_shaders();
        let memory = Memory {
            weights: weight_bytes,
            mapped: 0,
            kv_cache: 2 * per_layer * spec.layers as u64,
            scratch: scratch_bytes(&spec, rows),
            host: 0,
            adapters: 0,
        };
        Ok(GpuExecutor {
            calls,
            adapters,
            head,
            passing,
            capacity,
            kv_element: element as u64,
            memory,
            uploaded,
            clock: None,
            is_timed: false,
            buffers,
            spec,
            gpu,
        })
    }

    /// What it was built for.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// How the weights came to the device.
    pub fn uploaded(&self) -> Uploaded {
        self.uploaded
    }

    /// How the attention of a step is cut.
    fn attention(&self, step: &Step) -> Attention {
        let spec = &self.spec;
        let group = spec.heads / spec.kv_heads;
        let tiles = attention::tiles(step.rows, group, spec.head_dim);
        let segments = attention::segments(step.rows, &tiles, spec.sliding_window);
        // Side by side where there are too few workgroups for a GPU, and room for what they leave.
        let room = attention::partials_len(step.rows.len(), spec.heads, spec.head_dim, segments)
            .is_some_and(|len| 4 * len as u64 <= self.buffers.partials.size());
        let few = tiles.len() * spec.kv_heads < ENOUGH_WORKGROUPS;
        let segments = if few && room { u32::try_from(segments).unwrap_or(1) } else { 1 };
        Attention { tiles, segments }
    }

    /// Uploads what the steps differ in.
    fn upload(&self, steps: &[Step], orders: &[Vec<usize>], work: &[Attention]) {
        let mut rows: Vec<RowMeta> = Vec::new();
        let mut cos_sin: Vec<f32> = Vec::new();
        let mut picked: Vec<u32> = Vec::new();
        for (step, order) in steps.iter().zip(orders) {
            // Tokens that are drawn name an output by its place in the list. Draws alone are computed in that order.
            rows.extend_from_slice(step.rows);
            cos_sin.extend_from_slice(step.cos_sin);
            picked.extend(order.iter().map(|&i| step.outputs[i].row));
        }
        let write = |buffer: &wgpu::Buffer, bytes: &[u8]| {
            if !bytes.is_empty() {
                self.gpu.queue.write_buffer(buffer, 0, bytes);
            }
        };
        let tiles: Vec<[u32; 2]> = work.iter().flat_map(|w| w.tiles.iter().copied()).collect();
        write(&self.buffers.tiles, bytemuck::cast_slice(&tiles));
        write(&self.buffers.rows, bytemuck::cast_slice(&rows));
        write(&self.buffers.cos_sin, bytemuck::cast_slice(&cos_sin));
        write(&self.buffers.picked, bytemuck::cast_slice(&picked));
        write(&self.buffers.tables, bytemuck::cast_slice(steps[0].tables));
        if steps.iter().any(|s| !s.adapters.is_empty()) {
            let mut slots = Vec::new();
            for step in steps {
                slots.extend_from_slice(step.adapters);
                // Of a step without adapters.
                slots.resize(slots.len() + step.rows.len() - step.adapters.len(), NO_ADAPTER);
            }
            self.adapters.upload(&self.gpu, &slots);
        }
    }

    fn check(&self, steps: &[Step]) -> Result<()> {
        let Capacity { max_rows, .. } = self.capacity;
        let rows: usize = steps.iter().map(|s| s.rows.len()).sum();
        let outputs: usize = steps.iter().map(|s| s.outputs.len()).sum();
        let tables = steps.iter().map(|s| s.tables.len()).max().unwrap_or(0);
        if steps.is_empty() || rows > max_rows || outputs > max_rows || tables > self.capacity.max_table_entries() {
            return Err(Error::internal(format!("steps of {rows} rows and {outputs} outputs, built for {max_rows}")));
        }
        if steps.iter().any(|s| s.tables != steps[0].tables) {
            return Err(Error::internal("steps with different block tables"));
        }
        Ok(())
    }
}

/// TODO
pub struct Uploaded;

struct GpuLoader;

impl Loader for GpuLoader {
    fn load(
        &self,
        _weights: &Weights,
        _held: Option<&DeviceWeights>,
        _changed: &std::collections::HashSet<String>,
    ) -> Result<DeviceWeights> {
        Err(Error::unsupported("updates on a GPU"))
    }
}

impl Executor for GpuExecutor {
    fn step(&mut self, step: &Step) -> Result<Vec<Output>> {
        Ok(self.steps(std::slice::from_ref(step))?.pop().unwrap_or_default())
    }

    fn steps(&mut self, steps: &[Step]) -> Result<Vec<Vec<Output>>> {
        self.check(steps)?;
        let begin = Instant::now();
        let orders: Vec<Vec<usize>> =
            steps.iter().map(|s| blocks::order(s.outputs, |i| self.head.own_head(s, i))).collect();
        let window = self.spec.sliding_window.map_or(u64::MAX, |w| w as u64);
        let gpu = self.gpu.clone();
        let work: Vec<Attention> = steps.iter().map(|step| self.attention(step)).collect();
        let mut pending = self.head.prepare(&gpu, &self.spec, steps, &orders)?;
        gpu.checked("a step", || self.upload(steps, &orders, &work))?;
        let (mut first_row, mut first_output, mut first_drawn, mut first_tile) = (0, 0, 0, 0);
        let mut last = None;
        let mut waited = Duration::ZERO;
        for (s, step) in steps.iter().enumerate() {
            let seen = |r: &RowMeta| (u64::from(r.position) + 1).min(window);
            // Rows and outputs are at most max_rows, which fits.
            let dims = Dims {
                rows: step.rows.len() as u32,
                outputs: step.outputs.len() as u32,
                first_row,
                first_output,
                first_drawn,
                tiles: work[s].tiles.len() as u32,
                first_tile,
                segments: work[s].segments,
                keys: step.rows.iter().map(seen).sum(),
            };
            let with = self.adapters.step(step.adapters)?;
            let clock = self.clock.as_mut().filter(|_| self.is_timed);
            // A step runs while the next one is encoded.
            last = Some(gpu.checked("a step", || {
                let mut recorder = Recorder::new(&gpu, clock);
                let mut down = None;
                for (i, call) in self.calls.iter().enumerate() {
                    let mut bound = &call.bound;
                    if let (Some(with), Some(a)) = (&with, &call.adaptable)
                        && with.changes(a.product)
                        && let Some(own) = self.adapters.call(i)
                    {
                        // Slices of a product share what the first factors leave.
                        if down.replace(a.product) != Some(a.product)
                            && let Some((bound, dispatch)) = self.adapters.down(with, a.product, &dims)
                        {
                            recorder.dispatch(bound, &dispatch)?;
                        }
                        bound = own;
                    }
                    recorder.dispatch(bound, &(call.rule)(&dims))?;
                }
                self.head.record(&gpu, &mut recorder, &mut pending, s)?;
                if s + 1 == steps.len() {
                    self.head.record_results(&mut recorder, &self.buffers, &pending)?;
                }
                waited += recorder.waited();
                recorder.submit()
            })??);
            first_drawn = first_output;
            first_tile += dims.tiles;
            first_row += dims.rows;
            first_output += dims.outputs;
        }
        if let Some(clock) = self.clock.as_mut().filter(|_| self.is_timed) {
            clock.add_encoding(begin.elapsed().saturating_sub(waited));
        }
        let last = last.ok_or_else(|| Error::internal("no step"))?;
        self.head.results(&gpu, pending, last, steps, &orders)
    }

    fn steps_at_once(&self) -> usize {
        STEPS_AT_ONCE
    }

    fn feeds(&self, request: &sample::Request, top: usize) -> bool {
        // What is read back block by block costs more than it gains.
        top == 0 && request.kept_ids == 0
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()> {
        if copies.is_empty() {
            return Ok(());
        }
        let size = self.kv_element * (KV_BLOCK * self.spec.kv_width()) as u64;
        self.gpu.checked("copying KV blocks", || {
            let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let caches = || self.buffers.kv.iter().flat_map(|(keys, values)| [keys, values]).zip(0u64..);
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

    fn loader(&self) -> Arc<dyn Loader> {
        Arc::new(GpuLoader)
    }

    fn weights(&self) -> DeviceWeights {
        DeviceWeights::Gpu(Arc::new(Uploaded))
    }

    fn install(&mut self, _weights: DeviceWeights) -> Result<()> {
        Err(Error::unsupported("updates on a GPU"))
    }

    fn unload(&mut self) {}

    fn free_cache(&mut self) {}

    fn restore_cache(&mut self) -> Result<()> {
        Ok(())
    }

    fn add_adapter(&mut self, slot: u32, adapter: Arc<AdapterWeights>, room: u64) -> Result<()> {
        let heads = self.head.own_bytes();
        let own = adapter.head().map_or(0, |head| self.head.bytes_of_own(head));
        let room = room.saturating_sub(heads + own);
        self.adapters.add(&self.gpu, &self.calls, slot, &adapter, room)?;
        if let Some(head) = adapter.head() {
            let pipelines = self.adapters.pipelines();
            if let Err(error) = self.head.add_own(&self.gpu, pipelines, &self.buffers, slot, head) {
                self.remove_adapter(slot);
                return Err(error);
            }
        }
        Ok(())
    }

    fn remove_adapter(&mut self, slot: u32) {
        self.adapters.remove(slot);
        self.head.remove_own(slot);
    }

    fn memory(&self) -> Memory {
        Memory { adapters: self.adapters.bytes() + self.head.own_bytes(), ..self.memory }
    }

    fn set_profiling(&mut self, on: bool) -> Result<()> {
        if on && self.clock.is_none() {
            self.clock = Some(Clock::new(&self.gpu)?);
        }
        self.is_timed = on;
        Ok(())
    }

    fn take_profile(&mut self) -> Vec<KernelTime> {
        self.clock.as_mut().map(Clock::take).unwrap_or_default()
    }

    fn limits(&mut self) -> Result<Limits> {
        super::limits::measure(&self.gpu)
    }
}

/// Activations for steps of up to `max_rows` rows, and the bounded block of logits with its copy for the host; block tables,
/// a KV block on its way, and what sampling reads and writes.
pub(crate) fn scratch_bytes(spec: &ModelSpec, max_rows: usize) -> u64 {
    let widths: usize = Buf::ALL.iter().map(|b| b.width(spec)).sum();
    let between = spec.hidden_size + spec.head_dim;
    let passing = 2 * spec.layers * KV_BLOCK * spec.kv_width();
    // Of each row, 64 entries of block tables and a tile of attention.
    partial_bytes(spec)
        + 4 * ((widths + between + 66) as u64 * max_rows as u64 + passing as u64)
        + head::bytes(spec.vocab_size, max_rows)
}
