//! The runtime: a device, an engine, and how models are loaded onto them.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::backend::cpu::{self, CpuExecutor, CpuOptions, Pool};
use crate::backend::gpu::{self, DeviceInfo, Gpu, GpuExecutor, GpuOptions, GpuWeights, Selection, list_devices};
use crate::backend::{Capacity, Executor, Holding};
use crate::engine::{Engine, ModelStats, QueueLimits, RuntimeStats};
use crate::error::{Error, Result};
use crate::exchange::ModelWeights;
use crate::kernels::linear::{Precision, Quantised};
use crate::kernels::{Isa, KV_BLOCK};
use crate::loaded_model::{Model, ModelInner};
use crate::model::{MatrixId, ModelSpec, Op, Plan, parse_config};
use crate::rollout::Rollouts;
use crate::text::Tokenizer;
use crate::weights::{LoadOptions, Tensor, WeightFormat, read_bounded};

const MAX_CONFIG: usize = 1 << 20;
/// Positions a KV cache has where nothing else is said, as far as the bytes below allow.
const DEFAULT_KV_TOKENS: usize = 32_768;
const LEAST_KV_TOKENS: usize = 256;
const DEFAULT_KV_BYTES_CPU: u64 = 4 << 30;
const DEFAULT_KV_BYTES_GPU: u64 = 1 << 30;
/// Scratch grows with it; the products are at full speed well below.
const DEFAULT_MAX_BATCH_TOKENS: usize = 1024;

/// Threads of the CPU backend.
pub const MAX_THREADS: usize = 1024;

/// How a runtime is opened.
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    /// `auto` (a real GPU if there is one, else the CPU), `cpu`, `gpu`, or `gpu:PART` of a device's name. A software
    /// adapter (llvmpipe) is used only when `PART` names it.
    pub device: String,
    /// Threads of the CPU backend; `None`: one a core.
    pub threads: Option<usize>,
    /// Jobs that may wait or run at a time; more are refused with `Full`.
    pub max_jobs: usize,
    /// Positions that these jobs may come to; more are refused with `Full`.
    pub max_queued_tokens: usize,
    /// How a GPU is used.
    pub gpu: GpuOptions,
}

impl Default for RuntimeOptions {
    fn default() -> Self {
        RuntimeOptions {
            device: "auto".into(),
            threads: None,
            max_jobs: 1 << 16,
            max_queued_tokens: 1 << 26,
            gpu: GpuOptions::default(),
        }
    }
}

/// How a model is loaded.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// How products are computed.
    pub precision: Precision,
    /// How the weights are opened.
    pub load: LoadOptions,
    /// How the weights of products are held.
    pub weights: WeightFormat,
    /// Rows of a step at most; `None`: 1024. Results do not depend on it.
    pub max_batch_tokens: Option<usize>,
    /// Positions in the KV cache; `None`: 32,768, or what 4 GiB (1 GiB on a GPU) and `memory` hold.
    pub kv_tokens: Option<usize>,
    /// Bytes the model may allocate (mapped weights do not count); `None`: no bound.
    pub memory: Option<u64>,
    /// Longest sequence; `None`: what the config says.
    pub max_context: Option<usize>,
    /// Decode steps that are computed before their tokens are looked at, from 1 to 64; `None`: 8 on a GPU, 1 on the CPU. The
    /// results are the same; streams, cancelling and new jobs wait that long.
    pub steps_at_once: Option<usize>,
    /// The version that results carry.
    pub weights_version: u64,
}

/// The CPU as a device.
#[derive(Clone, Debug)]
pub struct CpuInfo {
    /// The instruction set the kernels use.
    pub isa: &'static str,
    /// Every instruction set they could use here, slowest first; `REWARDRT_ISA` names one of them.
    pub available: Vec<&'static str>,
    /// Threads by default.
    pub threads: usize,
}

/// The CPU, and every adapter that wgpu finds.
///
/// # Errors
/// `Gpu` if the graphics API fails to enumerate.
pub fn devices() -> Result<(CpuInfo, Vec<DeviceInfo>)> {
    let available = Isa::available().into_iter().map(Isa::name).collect();
    let cpu = CpuInfo { isa: Isa::detect()?.name(), available, threads: default_threads() };
    Ok((cpu, list_devices()?))
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

enum Device {
    Cpu { isa: Isa, pool: Arc<Pool> },
    Gpu(Arc<Gpu>),
}

/// A device, and the engine thread that feeds it. Cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<RuntimeInner>,
}

pub(crate) struct RuntimeInner {
    device: Device,
    pub engine: Engine,
    models: Mutex<Vec<Weak<ModelInner>>>,
    pub rollouts: Rollouts,
}

impl RuntimeInner {
    fn models(&self) -> MutexGuard<'_, Vec<Weak<ModelInner>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a runtime can do at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuntimeState {
    /// It works.
    Running,
    /// By [`Runtime::pause`].
    Paused,
    /// Its device is lost: it must be opened anew.
    Lost,
    /// A bug stopped its engine: see [`ErrorKind::Internal`](crate::ErrorKind::Internal).
    Poisoned,
}

impl Runtime {
    /// Opens the device and starts the engine.
    ///
    /// # Errors
    /// `Argument` for a selection that does not parse, `NoDevice` if nothing matches it (with the list of what there
    /// is), `Gpu` if the device cannot be opened.
    pub fn open(options: &RuntimeOptions) -> Result<Self> {
        let threads = match options.threads {
            Some(0) => return Err(Error::argument("threads is 0, it must be at least 1")),
            Some(n) if n > MAX_THREADS => {
                return Err(Error::argument(format!("threads is {n}, at most {MAX_THREADS} are allowed")));
            }
            Some(n) => n,
            None => default_threads(),
        };
        let device = match Gpu::select(&Selection::parse(&options.device)?, &options.gpu)? {
            Some(gpu) => Device::Gpu(Arc::new(gpu)),
            None => Device::Cpu { isa: Isa::detect()?.permitted(), pool: Arc::new(Pool::new(threads)) },
        };
        let limits = QueueLimits { jobs: options.max_jobs, tokens: options.max_queued_tokens };
        Ok(Runtime {
            inner: Arc::new(RuntimeInner {
                device,
                engine: Engine::start(limits)?,
                models: Mutex::default(),
                rollouts: Rollouts::default(),
            }),
        })
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    /// Those whose policy is one of its models.
    pub(crate) fn rollouts(&self) -> &Rollouts {
        &self.inner.rollouts
    }

    /// What waits and runs.
    pub fn stats(&self) -> RuntimeStats {
        self.inner.engine.stats()
    }

    /// What it can do at the moment.
    pub fn state(&self) -> RuntimeState {
        match &self.inner.device {
            _ if self.inner.engine.is_poisoned() => RuntimeState::Poisoned,
            Device::Gpu(gpu) if gpu.is_lost() => RuntimeState::Lost,
            _ if self.inner.engine.is_paused() => RuntimeState::Paused,
            _ => RuntimeState::Running,
        }
    }

    /// The models that are loaded.
    pub fn models(&self) -> Vec<Model> {
        self.inner.models().iter().filter_map(Weak::upgrade).map(|inner| Model { inner }).collect()
    }

    /// Counts from here, in [`Runtime::stats`] and in [`Model::stats`] of every model. What is going on stays.
    ///
    /// # Errors
    /// `Poisoned` if the engine has stopped.
    pub fn reset_stats(&self) -> Result<()> {
        self.inner.engine.reset_stats();
        self.models().iter().try_for_each(Model::reset_stats)
    }

    /// The device's name, for logs: `cpu (avx2, 2 threads)` or the adapter's name.
    pub fn device_name(&self) -> String {
        match &self.inner.device {
            Device::Cpu { isa, pool } => format!("cpu ({}, {} threads)", isa.name(), pool.threads()),
            Device::Gpu(gpu) => format!("{} ({})", gpu.info().name, gpu.info().backend),
        }
    }

    /// Loads a model folder: config.json, safetensors, and tokenizer.json where there is one.
    ///
    /// # Errors
    /// `Io`, `Format`, `Unsupported`, `Shape` or `Limit`, naming the file, field or tensors; `HostMemory` or
    /// `DeviceMemory` where there is no room. Nothing stays loaded.
    pub fn load_model(&self, folder: &Path, options: &ModelOptions) -> Result<Model> {
        let spec = read_spec(folder)?;
        let max_context = options.max_context.unwrap_or(spec.context());
        if max_context < 2 {
            return Err(Error::argument(format!("max_context is {max_context}, it must be at least 2")));
        }
        if let Some(steps) = options.steps_at_once.filter(|n| !(1..=64).contains(n)) {
            return Err(Error::argument(format!("steps_at_once is {steps}, it must be from 1 to 64")));
        }
        let plan = Arc::new(Plan::new(&spec)?);
        let weights = plan.load_weights(&spec, folder, &options.load)?;
        let sizes = |holding: Holding, kv_blocks: Option<usize>| {
            let kv_tokens = kv_blocks.map(|n| n * KV_BLOCK).or(options.kv_tokens);
            self.capacity(&spec, &plan, &weights, &ModelOptions { kv_tokens, ..options.clone() }, holding)
        };
        let tokenizer = Tokenizer::from_folder(folder)?.map(Arc::new);
        let (executor, capacity): (Box<dyn Executor>, Capacity) = match &self.inner.device {
            Device::Cpu { isa, pool } => {
                let capacity = sizes(Holding { kv_element: 4, weight_rows: 1 }, None)?;
                let cpu =
                    CpuOptions { isa: *isa, pool: pool.clone(), precision: options.precision, format: options.weights };
                let executor = CpuExecutor::new(spec.clone(), plan.clone(), &weights, capacity, cpu);
                (Box::new(executor.map_err(|e| e.at(folder.display()))?), capacity)
            }
            Device::Gpu(gpu) => {
                let gpu = gpu.clone();
                let how = GpuWeights { format: options.weights, precision: options.precision };
                let executor = GpuExecutor::new(gpu, spec.clone(), plan.clone(), &weights, how, &sizes)?;
                let capacity = executor.capacity();
                (Box::new(executor), capacity)
            }
        };
        let memory = executor.memory();
        let describe = |(name, t): (&String, &Tensor)| (name.clone(), t.dtype(), t.shape().to_vec());
        let mut tensors: Vec<_> = weights.tensors().map(describe).collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let version = options.weights_version;
        let held = ModelWeights::new(version, weights, executor.weights(), executor.loader(), memory);
        let stats = Arc::new(Mutex::new(ModelStats { kv_blocks: capacity.kv_blocks, ..ModelStats::default() }));
        let id = self.inner.engine.add(
            executor,
            spec.rope.clone(),
            capacity,
            options.steps_at_once,
            version,
            stats.clone(),
        )?;
        log::info!(
            "{}: {} on {}, {} MiB allocated, {} MiB mapped, {} KV positions",
            folder.display(),
            spec.architecture,
            self.device_name(),
            memory.allocated() >> 20,
            memory.mapped >> 20,
            capacity.kv_blocks * KV_BLOCK
        );
        let runtime = self.inner.clone();
        let inner = Arc::new(ModelInner {
            runtime,
            id,
            spec,
            plan,
            tokenizer,
            max_context,
            capacity,
            budget: options.memory,
            load: options.load.clone(),
            weights: held,
            tensors,
            guides: OnceLock::new(),
            stats,
        });
        let mut models = self.inner.models();
        models.retain(|model| model.strong_count() > 0);
        models.push(Arc::downgrade(&inner));
        drop(models);
        Ok(Model { inner })
    }

    /// Sizes for a model under its options; states what does not fit.
    fn capacity(
        &self,
        spec: &ModelSpec,
        plan: &Plan,
        weights: &crate::weights::Weights,
        options: &ModelOptions,
        holding: Holding,
    ) -> Result<Capacity> {
        let max_rows = options.max_batch_tokens.unwrap_or(DEFAULT_MAX_BATCH_TOKENS);
        if max_rows == 0 || max_rows > 1 << 20 {
            return Err(Error::argument(format!("max_batch_tokens is {max_rows}, it must be from 1 to {}", 1 << 20)));
        }
        let per_token = (2 * holding.kv_element * spec.kv_width() * spec.layers) as u64;
        let is_gpu = matches!(self.inner.device, Device::Gpu(_));
        let quantised = if options.weights == WeightFormat::Stored { Vec::new() } else { plan.quantisable(spec) };
        // What is allocated: on the CPU mapped weights are not, but what is quantised from them is.
        let mut held = 0u64;
        for (i, m) in plan.matrices.iter().enumerate() {
            let size = weights.get(&m.name)?.dtype().size();
            let is_quantised = quantised.contains(&MatrixId(i));
            // The GPU pads rows to groups of eight.
            let cols = if is_gpu { m.shape[1].next_multiple_of(8) } else { m.shape[1] };
            let stored = m.shape[0].next_multiple_of(holding.weight_rows) * cols * size;
            let is_embedding = plan.ops.iter().any(|op| matches!(op, Op::Embed { table, .. } if table.0 == i));
            if is_quantised {
                held += Quantised::bytes_for(options.weights, m.shape[0], m.shape[1]) as u64;
            }
            if (is_gpu && (!is_quantised || is_embedding)) || (!is_gpu && !options.load.use_mmap) {
                held += stored as u64;
            }
        }
        let vectors: usize = plan.vectors.iter().map(|v| 4 * v.shape[0]).sum();
        let default_bytes = if is_gpu { DEFAULT_KV_BYTES_GPU } else { DEFAULT_KV_BYTES_CPU };
        let held = held + vectors as u64;
        let scratch = match &self.inner.device {
            Device::Cpu { pool, .. } => cpu::scratch_bytes(spec, max_rows, pool.threads()),
            Device::Gpu(_) => gpu::scratch_bytes(spec, max_rows),
        };
        let fixed = held + scratch;
        let budget = options.memory.unwrap_or(u64::MAX);
        let room = usize::try_from(budget.saturating_sub(fixed) / per_token).unwrap_or(usize::MAX);
        let usual = usize::try_from(default_bytes / per_token).unwrap_or(usize::MAX).max(LEAST_KV_TOKENS);
        let mut kv_tokens = options.kv_tokens.unwrap_or(DEFAULT_KV_TOKENS.min(usual).min(room.max(1)));
        if let Device::Gpu(gpu) = &self.inner.device {
            let most = gpu.most_kv_tokens(spec.kv_width(), holding.kv_element);
            if options.kv_tokens.is_some_and(|n| n > most) {
                return Err(Error::limit(format!("kv_tokens is {kv_tokens}; a binding of this device holds {most}")));
            }
            kv_tokens = kv_tokens.min(most);
        }
        let least = options.kv_tokens.unwrap_or(LEAST_KV_TOKENS);
        if room < least || kv_tokens < KV_BLOCK {
            return Err(Error::limit(format!(
                "the memory budget is {budget} bytes; {held} for weights, {} for activations and {} for a KV cache of {least} positions are needed",
                fixed - held,
                per_token.saturating_mul(least as u64)
            )));
        }
        let kv_blocks = kv_tokens / KV_BLOCK;
        if kv_blocks * KV_BLOCK > u32::MAX as usize {
            return Err(Error::limit(format!("kv_tokens is {kv_tokens}, at most {} are allowed", u32::MAX)));
        }
        Ok(Capacity { max_rows, kv_blocks })
    }
}

/// Reads config.json and generation_config.json of a model folder.
///
/// # Errors
/// See [`parse_config`]; `Io` or `NotFound` if there is no config.json.
pub fn read_spec(folder: &Path) -> Result<ModelSpec> {
    let config = read_bounded(&folder.join("config.json"), MAX_CONFIG)?;
    let generation = folder.join("generation_config.json");
    let generation = if generation.exists() { Some(read_bounded(&generation, MAX_CONFIG)?) } else { None };
    parse_config(&config, generation.as_deref()).map_err(|e| e.at(folder.display()))
}
