//! A model on the GPU: buffers, pipelines and bind groups made once; a step uploads its row tables and encodes.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adapters::{Adapters, Bounds};
use super::attention::{self, Work, partial_bytes};
use super::blocks;
use super::buffers::{DeviceBuffers, holding};
use super::device::Gpu;
use super::head::{self, Head};
use super::layers::{Buffers, Builder, Call, Dims};
use super::pipelines::Pipelines;
use super::record::{Clock, Recorder};
use super::resident::{GpuLoader, Resident};
use super::upload::UploadedBytes;
use crate::backend::{
    BlockCopy, Capacity, DeviceWeights, Executor, Holding, KernelTime, Limits, Loader, Memory, NO_ADAPTER, Output, Step,
};
use crate::error::{Error, Result};
use crate::kernels::attention::MAX_HEAD_DIM;
use crate::kernels::linear::Precision;
use crate::kernels::{KV_BLOCK, RowMeta, sample};
use crate::model::{Buf, ModelSpec, Plan};
use crate::weights::{AdapterWeights, WeightFormat, Weights};

/// Decode steps that are computed before their results are read.
const STEPS_AT_ONCE: usize = 8;
/// A model on a GPU.
pub struct GpuExecutor {
    loader: GpuLoader,
    capacity: Capacity,
    /// Why a cache of that many blocks could not be f32, where it is f16.
    no_plain_cache: Option<Error>,
    /// `None` while the weights are not there.
    resident: Option<Arc<Resident>>,
    /// `None` while the KV cache is not there.
    buffers: Option<DeviceBuffers>,
    /// What is executed; there as long as both are.
    built: Option<Built>,
    /// Rows of the matrix units' tiles that the weights last had.
    tile: Option<u32>,
    /// Those of the last build.
    pipelines: Pipelines,
    /// By slot: what is put to the device again with other weights.
    held_adapters: BTreeMap<u32, Arc<AdapterWeights>>,
    /// What adapters that come while nothing is built have to fit: that of the last build.
    bounds: Bounds,
    /// Kept when it is stopped, for what it measured.
    clock: Option<Clock>,
    is_timed: bool,
}

/// The dispatches over buffers and weights, all bound.
struct Built {
    calls: Vec<Call>,
    head: Head,
    adapters: Adapters,
}

/// Says how many rows and blocks fit a model that is held so, or whether that many blocks do.
pub type Sizes<'a> = &'a dyn Fn(Holding, Option<usize>) -> Result<Capacity>;

/// How the weights of a model are used on a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct GpuWeights {
    /// How they are held.
    pub format: WeightFormat,
    /// Whether inputs of products may be rounded to f16.
    pub precision: Precision,
}

impl GpuExecutor {
    /// Uploads the weights and builds everything that steps need. `sizes` is asked again if matrix units turn
    /// out to be of no use, since a position then takes twice the memory.
    ///
    /// # Errors
    /// What `sizes` returns, `DeviceMemory` or `Limit` if it does not fit the device, `Unsupported` for a head size above
    /// [`MAX_HEAD_DIM`], `Gpu` if a shader does not build.
    pub fn new(
        gpu: Arc<Gpu>,
        spec: ModelSpec,
        plan: Arc<Plan>,
        weights: &Weights,
        how: GpuWeights,
        sizes: Sizes,
    ) -> Result<Self> {
        if spec.head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head size of {}; at most {MAX_HEAD_DIM}", spec.head_dim)));
        }
        let loader = GpuLoader { gpu, spec, plan, how };
        let tile = loader.tile(weights)?;
        let build = |tile: Option<u32>| {
            let capacity = sizes(holding(tile), None)?;
            if capacity.max_rows > 65_535 {
                return Err(Error::limit(format!("max_batch_tokens is {}, a GPU takes 65535", capacity.max_rows)));
            }
            // Weights that come later may be too large for f16.
            let plain = tile.and_then(|_| sizes(holding(None), Some(capacity.kv_blocks)).err());
            Self::of(loader.clone(), weights, tile, capacity, plain)
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

    fn of(
        loader: GpuLoader,
        weights: &Weights,
        tile: Option<u32>,
        capacity: Capacity,
        no_plain_cache: Option<Error>,
    ) -> Result<Self> {
        let buffers = DeviceBuffers::new(&loader.gpu, &loader.spec, tile, capacity)?;
        let resident = Arc::new(loader.upload(weights, tile, None, &HashSet::new())?);
        let mut executor = GpuExecutor {
            loader,
            capacity,
            no_plain_cache,
            resident: Some(resident),
            buffers: Some(buffers),
            built: None,
            tile,
            pipelines: Pipelines::default(),
            held_adapters: BTreeMap::new(),
            bounds: Bounds::default(),
            clock: None,
            is_timed: false,
        };
        executor.build()?;
        executor.loader.gpu.save_shaders();
        Ok(executor)
    }

    /// What it was built for.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// How its weights came to the device.
    pub fn uploaded_bytes(&self) -> UploadedBytes {
        self.resident.as_ref().map(|r| r.uploaded).unwrap_or_default()
    }

    /// Binds everything anew, if weights and buffers are there.
    fn build(&mut self) -> Result<()> {
        let (Some(resident), Some(device)) = (&self.resident, &self.buffers) else { return Ok(()) };
        let built = self.bind(resident, device)?;
        self.pipelines = built.adapters.pipelines_so_far();
        self.built = Some(built);
        Ok(())
    }

    fn bind(&self, resident: &Resident, device: &DeviceBuffers) -> Result<Built> {
        let GpuLoader { gpu, spec, plan, .. } = &self.loader;
        let old = self.built.as_ref();
        let mut builder = Builder {
            gpu,
            spec,
            plan,
            resident,
            buffers: &device.buffers,
            pipelines: old.map_or_else(|| self.pipelines.clone(), |old| old.adapters.pipelines_so_far()),
            tile: resident.tile,
            attention_tile: device.attention_tile,
            half_kv: resident.tile.is_some(),
            calls: Vec::new(),
            products: Vec::new(),
        };
        builder.layers()?;
        // The head's own buffers depend on the same things.
        let same = self.buffers.as_ref().is_some_and(|b| b.tile == device.tile);
        let head = Head::new(&mut builder, self.capacity.max_rows, old.map(|old| &old.head).filter(|_| same))?;
        let Builder { calls, products, pipelines, .. } = builder;
        let adapters = Adapters::new(products, pipelines, self.capacity.max_rows);
        let mut built = Built { calls, head, adapters };
        for (slot, adapter) in &self.held_adapters {
            // There was room for all of them.
            built.add_adapter(gpu, &device.buffers, *slot, adapter, u64::MAX)?;
        }
        Ok(built)
    }

    /// Forgets what is bound, but for the pipelines.
    fn forget(&mut self) {
        if let Some(built) = self.built.take() {
            self.pipelines = built.adapters.pipelines_so_far();
            self.bounds = built.adapters.into_bounds();
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

impl Built {
    fn add_adapter(
        &mut self,
        gpu: &Gpu,
        buffers: &Buffers,
        slot: u32,
        adapter: &AdapterWeights,
        room: u64,
    ) -> Result<()> {
        let own = adapter.head().map_or(0, |head| self.head.bytes_of_own(head));
        let room = room.saturating_sub(self.head.own_bytes() + own);
        self.adapters.add(gpu, &self.calls, slot, adapter, room)?;
        if let Some(head) = adapter.head() {
            let pipelines = self.adapters.pipelines();
            if let Err(error) = self.head.add_own(gpu, pipelines, buffers, slot, head) {
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

    /// Uploads what the steps differ in.
    fn upload(&self, gpu: &Gpu, buffers: &Buffers, steps: &[Step], orders: &[Vec<usize>], tiles: &[[u32; 2]]) {
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
                gpu.queue.write_buffer(buffer, 0, bytes);
            }
        };
        write(&buffers.tiles, bytemuck::cast_slice(tiles));
        write(&buffers.rows, bytemuck::cast_slice(&rows));
        write(&buffers.cos_sin, bytemuck::cast_slice(&cos_sin));
        write(&buffers.picked, bytemuck::cast_slice(&picked));
        write(&buffers.tables, bytemuck::cast_slice(steps[0].tables));
        if steps.iter().any(|s| !s.adapters.is_empty()) {
            let mut slots = Vec::new();
            for step in steps {
                slots.extend_from_slice(step.adapters);
                // Of a step without adapters.
                slots.resize(slots.len() + step.rows.len() - step.adapters.len(), NO_ADAPTER);
            }
            self.adapters.upload(gpu, &slots);
        }
    }
}

impl Executor for GpuExecutor {
    fn step(&mut self, step: &Step) -> Result<Vec<Output>> {
        Ok(self.steps(std::slice::from_ref(step))?.pop().unwrap_or_default())
    }

    fn steps(&mut self, steps: &[Step]) -> Result<Vec<Vec<Output>>> {
        self.check(steps)?;
        let (Some(built), Some(device)) = (&self.built, &self.buffers) else {
            return Err(Error::internal("a step of a model that sleeps"));
        };
        let (spec, buffers) = (&self.loader.spec, &device.buffers);
        let begin = Instant::now();
        let orders: Vec<Vec<usize>> =
            steps.iter().map(|s| blocks::order(s.outputs, |i| built.head.own_head(s, i))).collect();
        let gpu = self.loader.gpu.clone();
        let mut tiles = Vec::new();
        let partials = buffers.partials.size();
        let cut = |step: &Step| attention::cut(spec, device.attention_tile, step.rows, partials, &mut tiles);
        let work: Vec<Work> = steps.iter().map(cut).collect();
        let mut pending = built.head.prepare(&gpu, spec, steps, &orders)?;
        gpu.checked("a step", || built.upload(&gpu, buffers, steps, &orders, &tiles))?;
        let (mut first_row, mut first_output, mut first_drawn) = (0, 0, 0);
        let mut last = None;
        let mut waited = Duration::ZERO;
        for (s, step) in steps.iter().enumerate() {
            // Rows and outputs are at most max_rows, which fits.
            let dims = Dims {
                rows: step.rows.len() as u32,
                outputs: step.outputs.len() as u32,
                first_row,
                first_output,
                first_drawn,
                attention: work[s],
            };
            let with = built.adapters.step(step.adapters)?;
            let clock = self.clock.as_mut().filter(|_| self.is_timed);
            // A step runs while the next one is encoded.
            last = Some(gpu.checked("a step", || {
                let mut recorder = Recorder::new(&gpu, clock);
                let mut down = None;
                for (i, call) in built.calls.iter().enumerate() {
                    let mut bound = &call.bound;
                    if let (Some(with), Some(a)) = (&with, &call.adaptable)
                        && with.changes(a.product)
                        && let Some(own) = built.adapters.call(i)
                    {
                        // Slices of a product share what the first factors leave.
                        if down.replace(a.product) != Some(a.product)
                            && let Some((bound, dispatch)) = built.adapters.down(with, a.product, &dims)
                        {
                            recorder.dispatch(bound, &dispatch)?;
                        }
                        bound = own;
                    }
                    recorder.dispatch(bound, &(call.rule)(&dims))?;
                }
                built.head.record(&gpu, &mut recorder, &mut pending, s)?;
                if s + 1 == steps.len() {
                    built.head.record_results(&mut recorder, buffers, &pending)?;
                }
                waited += recorder.waited();
                recorder.submit()
            })??);
            first_drawn = first_output;
            first_row += dims.rows;
            first_output += dims.outputs;
        }
        if let Some(clock) = self.clock.as_mut().filter(|_| self.is_timed) {
            clock.add_encoding(begin.elapsed().saturating_sub(waited));
        }
        let last = last.ok_or_else(|| Error::internal("no step"))?;
        built.head.results(&gpu, pending, last, steps, &orders)
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
        let GpuLoader { gpu, spec, .. } = &self.loader;
        let Some(device) = &self.buffers else { return Err(Error::internal("the KV cache of a model that sleeps")) };
        let size = device.kv_element * (KV_BLOCK * spec.kv_width()) as u64;
        gpu.checked("copying KV blocks", || {
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let caches = || device.buffers.kv.iter().flat_map(|(keys, values)| [keys, values]).zip(0u64..);
            for copy in copies {
                let (from, to) = (u64::from(copy.from) * size, u64::from(copy.to) * size);
                for (cache, i) in caches() {
                    encoder.copy_buffer_to_buffer(cache, from, &device.passing, i * size, size);
                }
                for (cache, i) in caches() {
                    encoder.copy_buffer_to_buffer(&device.passing, i * size, cache, to, size);
                }
            }
            gpu.queue.submit([encoder.finish()])
        })?;
        Ok(())
    }

    fn loader(&self) -> Arc<dyn Loader> {
        Arc::new(self.loader.clone())
    }

    fn weights(&self) -> Option<DeviceWeights> {
        self.resident.clone().map(DeviceWeights::Gpu)
    }

    fn install(&mut self, weights: DeviceWeights) -> Result<bool> {
        let DeviceWeights::Gpu(resident) = weights else { return Err(Error::internal("weights of another device")) };
        let GpuLoader { gpu, spec, .. } = &self.loader;
        if let (None, Some(error)) = (resident.tile, &self.no_plain_cache) {
            return Err(error.clone().at("weights that are too large for f16"));
        }
        // Other weights may be too large for f16, and matrix units need other buffers.
        let fresh = match &self.buffers {
            Some(device) if device.tile != resident.tile => {
                Some(DeviceBuffers::new(gpu, spec, resident.tile, self.capacity)?)
            }
            _ => None,
        };
        if let Some(device) = fresh.as_ref().or(self.buffers.as_ref()) {
            self.built = Some(self.bind(&resident, device)?);
        }
        let lost_cache = fresh.is_some();
        self.buffers = fresh.or(self.buffers.take());
        self.tile = resident.tile;
        self.resident = Some(resident);
        Ok(lost_cache)
    }

    fn unload(&mut self) {
        self.forget();
        self.resident = None;
    }

    fn free_cache(&mut self) {
        self.forget();
        self.buffers = None;
    }

    fn restore_cache(&mut self) -> Result<()> {
        if self.buffers.is_none() {
            let GpuLoader { gpu, spec, .. } = &self.loader;
            self.buffers = Some(DeviceBuffers::new(gpu, spec, self.tile, self.capacity)?);
            if let Err(error) = self.build() {
                self.buffers = None;
                return Err(error);
            }
        }
        Ok(())
    }

    fn add_adapter(&mut self, slot: u32, adapter: Arc<AdapterWeights>, room: u64) -> Result<()> {
        // They stay in host memory, for what an update or waking up binds anew.
        let host = self.held_adapters.values().map(|a| a.bytes()).sum::<u64>() + adapter.bytes();
        if host > room {
            return Err(Error::limit(format!(
                "with this adapter all of them take {host} bytes of host memory alone, and the model's memory budget leaves {room}"
            )));
        }
        match (&mut self.built, &self.buffers) {
            (Some(built), Some(device)) => {
                built.add_adapter(&self.loader.gpu, &device.buffers, slot, &adapter, room - host)?;
            }
            // It would keep the model from waking up.
            _ => drop(self.bounds.scales(&adapter)?),
        }
        self.held_adapters.insert(slot, adapter);
        Ok(())
    }

    fn remove_adapter(&mut self, slot: u32) {
        self.held_adapters.remove(&slot);
        if let Some(built) = &mut self.built {
            built.remove_adapter(slot);
        }
    }

    fn memory(&self) -> Memory {
        let (spec, rows) = (&self.loader.spec, self.capacity.max_rows);
        Memory {
            weights: self.resident.as_ref().map_or(0, |r| r.bytes),
            mapped: 0,
            kv_cache: self.buffers.as_ref().map_or(0, |b| b.kv_bytes),
            scratch: self.buffers.as_ref().map_or(0, |_| scratch_bytes(spec, rows)),
            host: 0,
            adapters: self.built.as_ref().map_or(0, |b| b.adapters.bytes() + b.head.own_bytes())
                + self.held_adapters.values().map(|a| a.bytes()).sum::<u64>(),
        }
    }

    fn set_profiling(&mut self, on: bool) -> Result<()> {
        if on && self.clock.is_none() {
            self.clock = Some(Clock::new(&self.loader.gpu)?);
        }
        self.is_timed = on;
        Ok(())
    }

    fn take_profile(&mut self) -> Vec<KernelTime> {
        self.clock.as_mut().map(Clock::take).unwrap_or_default()
    }

    fn limits(&mut self) -> Result<Limits> {
        super::limits::measure(&self.loader.gpu)
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
