//! The runtime and its models.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use crate::adapter::Adapter;
use crate::backend::cpu::{self, CpuExecutor, CpuOptions, Pool};
use crate::backend::gpu::{self, DeviceInfo, Gpu, GpuExecutor, GpuOptions, GpuWeights, Selection, list_devices};
use crate::backend::{Capacity, Executor, Holding, KernelTime, Limits, Memory};
use crate::engine::{
    AdapterContent, Engine, InFlight, Job, JobOptions, Lane, ModelStats, NewAdapter, NewSequence, QueueLimits,
    RuntimeStats,
};
use crate::error::{Error, Result};
use crate::exchange::ModelWeights;
use crate::guide::{CompiledGuide, Guide, GuideVocabulary};
use crate::kernels::linear::{Precision, Quantised};
use crate::kernels::{Isa, KV_BLOCK};
use crate::model::{MatrixId, ModelSpec, Op, Plan, parse_config};
use crate::request::{
    Checker, LogprobRequest, Prompt, SampleRequest, SampledSequence, Samples, ScoreRequest, SequenceLogprobs,
    SequenceScore, read_logprobs, read_samples, read_scores,
};
use crate::rollout::Rollouts;
use crate::score::{Rule, Steps};
use crate::text::Tokenizer;
use crate::weights::{Dtype, LoadOptions, Tensor, WeightFormat, read_bounded};

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

struct RuntimeInner {
    device: Device,
    engine: Engine,
    models: Mutex<Vec<Weak<ModelInner>>>,
    rollouts: Rollouts,
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

/// A checkpoint on a device. Cheap to clone; freed when the last clone is dropped, which fails its unfinished jobs.
#[derive(Clone)]
pub struct Model {
    inner: Arc<ModelInner>,
}

struct ModelInner {
    runtime: Arc<RuntimeInner>,
    id: u64,
    spec: ModelSpec,
    plan: Arc<Plan>,
    tokenizer: Option<Arc<Tokenizer>>,
    max_context: usize,
    capacity: Capacity,
    /// What the model may allocate.
    budget: Option<u64>,
    load: LoadOptions,
    weights: ModelWeights,
    tensors: Vec<(String, Dtype, Vec<usize>)>,
    /// Made for the first request with a guide.
    guides: OnceLock<Result<GuideVocabulary>>,
    stats: Arc<Mutex<ModelStats>>,
}

impl Drop for ModelInner {
    fn drop(&mut self) {
        self.runtime.engine.remove(self.id);
    }
}

impl Model {
    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.spec
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// `Argument` if the model folder had no tokenizer.json.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.inner.tokenizer.as_deref().ok_or_else(|| Error::argument("the model folder has no tokenizer.json"))
    }

    /// True if the other model can read this one's ids: each is the same token to both. Where a tokenizer is missing, the
    /// number of ids decides.
    pub(crate) fn speaks_to(&self, other: &Model) -> bool {
        let [own, others] = [self, other].map(|model| model.inner.spec.vocab_size);
        match (&self.inner.tokenizer, &other.inner.tokenizer) {
            (Some(mine), Some(theirs)) => own <= others && mine.is_part_of(theirs),
            _ => own == others,
        }
    }

    /// What the values are called that the rule gives a sequence, in their order.
    ///
    /// # Errors
    /// `Argument` for a rule that does not fit the model.
    pub fn rule_labels(&self, rule: &Rule) -> Result<Vec<String>> {
        Ok(rule.bind(&self.inner.spec, self.inner.tokenizer.as_deref())?.labels().to_vec())
    }

    /// Bytes it holds.
    pub fn memory(&self) -> Memory {
        Memory { adapters: self.stats().adapter_bytes, ..self.inner.weights.lock().memory }
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// Bytes that adapters may take.
    pub(crate) fn adapter_room(&self) -> u64 {
        let held = Memory { adapters: 0, ..self.inner.weights.lock().memory };
        self.inner.budget.map_or(u64::MAX, |budget| budget.saturating_sub(held.allocated()))
    }

    pub(crate) fn add_adapter(&self, adapter: NewAdapter) -> Result<()> {
        self.inner.runtime.engine.add_adapter(self.inner.id, adapter)
    }

    pub(crate) fn free_adapters(&self) {
        self.inner.runtime.engine.free_adapters(self.inner.id);
    }

    /// True for a clone of the same model.
    pub fn is(&self, other: &Model) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Longest sequence it takes.
    pub fn max_context(&self) -> usize {
        self.inner.max_context
    }

    /// Positions in its KV cache.
    pub fn kv_tokens(&self) -> usize {
        self.inner.capacity.kv_blocks * KV_BLOCK
    }

    /// The version that its results carry.
    pub fn weights_version(&self) -> u64 {
        self.inner.weights.lock().version
    }

    /// Name, dtype and shape of every tensor, in name order: what an update has to bring.
    pub fn tensors(&self) -> Vec<(String, Dtype, Vec<usize>)> {
        self.inner.tensors.clone()
    }

    pub(crate) fn weights(&self) -> &ModelWeights {
        &self.inner.weights
    }

    /// Bytes that it may allocate; `None`: no bound.
    pub fn memory_budget(&self) -> Option<u64> {
        self.inner.budget
    }

    pub(crate) fn load_options(&self) -> &LoadOptions {
        &self.inner.load
    }

    /// See [`Engine::quiesce`].
    pub(crate) fn quiesce<T: Send + 'static>(
        &self,
        in_flight: InFlight,
        deadline: Option<Instant>,
        then: impl FnOnce(&mut Lane) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.inner.runtime.engine.quiesce(self.inner.id, in_flight, deadline, then)
    }

    /// What it has done, and what it is doing.
    pub fn stats(&self) -> ModelStats {
        *self.inner.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts from here in [`Model::stats`]. What is going on stays.
    ///
    /// # Errors
    /// `Poisoned` if the engine has stopped.
    pub fn reset_stats(&self) -> Result<()> {
        self.quiesce(InFlight::Keep, None, |lane| {
            lane.reset_stats();
            Ok(())
        })
    }

    /// Times every kernel from the next step on, or no longer. It costs a little, on a GPU more.
    ///
    /// # Errors
    /// `Unsupported` if the device has no clock for it, `Poisoned` if the engine has stopped.
    pub fn set_profiling(&self, on: bool) -> Result<()> {
        self.inner.runtime.engine.visit(self.inner.id, move |executor| executor.set_profiling(on))?
    }

    /// What the kernels have cost since profiling began or since the last call.
    ///
    /// # Errors
    /// `Poisoned` if the engine has stopped.
    pub fn take_profile(&self) -> Result<Vec<KernelTime>> {
        self.inner.runtime.engine.visit(self.inner.id, |executor| executor.take_profile())
    }

    /// Measures what the device does at best with weights like this model's; no step runs meanwhile, for about a second.
    ///
    /// # Errors
    /// `HostMemory` or an error of the device.
    pub fn limits(&self) -> Result<Limits> {
        self.inner.runtime.engine.visit(self.inner.id, |executor| executor.limits())?
    }

    fn checker(&self) -> Checker<'_> {
        let inner = &self.inner;
        Checker { spec: &inner.spec, max_context: inner.max_context, tokenizer: inner.tokenizer.as_ref() }
    }

    pub(crate) fn language_model(&self) -> Result<()> {
        match self.inner.spec.head {
            crate::model::Head::LanguageModel { .. } => Ok(()),
            _ => Err(Error::argument(format!("{} has no language-model head", self.inner.spec.architecture))),
        }
    }

    fn compile(&self, guide: &Guide) -> Result<CompiledGuide> {
        let inner = &self.inner;
        let new = || GuideVocabulary::new(self.tokenizer()?, inner.spec.vocab_size, &inner.spec.eos_token_ids);
        inner.guides.get_or_init(new).as_ref().map_err(Error::clone)?.compile(guide)
    }

    /// Those of its runtime that are under way.
    pub(crate) fn rollouts(&self) -> &Rollouts {
        &self.inner.runtime.rollouts
    }

    /// The content of a request's adapter.
    pub(crate) fn adapted(&self, adapter: &Option<Adapter>) -> Result<Option<Arc<AdapterContent>>> {
        adapter.as_ref().map(|a| a.content(self)).transpose()
    }

    fn submit<T>(
        &self,
        mut sequences: Vec<NewSequence>,
        adapter: Option<Arc<AdapterContent>>,
        options: JobOptions,
        read: impl Fn(Vec<crate::engine::Finished>) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Job<T>> {
        sequences.iter_mut().for_each(|s| s.adapter = adapter.clone());
        let (id, kv_blocks) = (self.inner.id, self.inner.capacity.kv_blocks);
        let state = self.inner.runtime.engine.submit(id, kv_blocks, sequences, options)?;
        Ok(Job::new(state, read))
    }

    /// Queues a sampling job: n answers to each prompt, in the order (prompt, sample).
    ///
    /// # Errors
    /// `Argument` or `Limit` for a field out of range, `Full` if the queue is.
    pub fn sample(&self, request: &SampleRequest) -> Result<Job<Vec<SampledSequence>>> {
        let prompts: Vec<Prompt> = request.prompts.iter().map(|p| Prompt::whole(p)).collect();
        self.sample_prompts(request, &prompts, |_| {})
    }

    /// The same for prompts that are given apart; `each` sees the result before it is returned.
    pub(crate) fn sample_prompts(
        &self,
        request: &SampleRequest,
        prompts: &[Prompt],
        each: impl Fn(&[SampledSequence]) + Send + Sync + 'static,
    ) -> Result<Job<Vec<SampledSequence>>> {
        self.language_model()?;
        let guide = request.guide.as_ref().map(|g| self.compile(g)).transpose()?;
        let adapter = self.adapted(&request.adapter)?;
        let sequences = self.checker().sample(request, prompts, guide)?;
        let (drawn, returned) = (request.best_of.unwrap_or(request.n), request.n);
        let options = JobOptions { scheduling: request.scheduling, stream: request.stream, per_prompt: drawn };
        let adapter_version = adapter.as_ref().map(|a| a.version);
        let samples = Samples { drawn, returned, weight_version: self.weights_version(), adapter_version };
        self.submit(sequences, adapter, options, move |finished| {
            let results = read_samples(samples, finished)?;
            each(&results);
            Ok(results)
        })
    }

    /// Queues a job for the log-probabilities of given tokens, in the order of the sequences.
    ///
    /// # Errors
    /// `Argument` or `Limit` for a field out of range, `Full` if the queue is.
    pub fn logprobs(&self, request: &LogprobRequest) -> Result<Job<Vec<SequenceLogprobs>>> {
        self.language_model()?;
        let adapter = self.adapted(&request.adapter)?;
        let sequences = self.checker().logprobs(request)?;
        let prompt_len = |i: usize| request.prompt_lens.get(i).copied().unwrap_or(0);
        let scored: Vec<usize> = request.sequences.iter().enumerate().map(|(i, s)| s.len() - prompt_len(i)).collect();
        let version = adapter.as_ref().map(|a| a.version);
        let options = JobOptions { scheduling: request.scheduling, ..JobOptions::default() };
        self.submit(sequences, adapter, options, move |finished| read_logprobs(&scored, version, finished))
    }

    /// Queues a scoring job, in the order of the sequences.
    ///
    /// # Errors
    /// `Argument` or `Limit` for a field out of range or a rule that does not fit the model, `Full` if the queue is.
    pub fn score(&self, request: &ScoreRequest) -> Result<Job<Vec<SequenceScore>>> {
        let rule = match &request.rule {
            Some(rule) => rule.clone(),
            None => Rule::for_model(&self.inner.spec)?,
        };
        let bound = rule.bind(&self.inner.spec, self.inner.tokenizer.as_deref())?;
        let adapter = self.adapted(&request.adapter)?;
        let sequences = self.checker().score(request, &bound)?;
        let places_of = |steps: &Steps| {
            request.sequences.iter().enumerate().map(|(i, tokens)| steps.places(i, tokens)).collect::<Vec<_>>()
        };
        let places = request.steps.as_ref().map(places_of);
        let version = adapter.as_ref().map(|a| a.version);
        let options = JobOptions { scheduling: request.scheduling, ..JobOptions::default() };
        self.submit(sequences, adapter, options, move |finished| {
            read_scores(&bound, places.as_deref(), version, finished)
        })
    }
}
