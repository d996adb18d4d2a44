//! A loaded model: what it is and holds, and the requests that it takes.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use crate::adapter::Adapter;
use crate::backend::{Capacity, KernelTime, Limits, Memory};
use crate::engine::{AdapterContent, Finished, InFlight, Job, JobOptions, Lane, ModelStats, NewAdapter, NewSequence};
use crate::error::{Error, Result};
use crate::exchange::ModelWeights;
use crate::guide::{CompiledGuide, Guide, GuideVocabulary};
use crate::kernels::KV_BLOCK;
use crate::model::{Head, ModelSpec, Plan};
use crate::request::{
    Checker, LogprobRequest, Prompt, SampleRequest, SampledSequence, Samples, ScoreRequest, SequenceLogprobs,
    SequenceScore, read_logprobs, read_samples, read_scores,
};
use crate::rollout::Rollouts;
use crate::runtime::RuntimeInner;
use crate::score::{Rule, Steps};
use crate::text::Tokenizer;
use crate::weights::{Dtype, LoadOptions};

/// A checkpoint on a device. Cheap to clone; freed when the last clone is dropped, which fails its unfinished jobs.
#[derive(Clone)]
pub struct Model {
    pub(crate) inner: Arc<ModelInner>,
}

pub(crate) struct ModelInner {
    pub runtime: Arc<RuntimeInner>,
    pub id: u64,
    pub spec: ModelSpec,
    pub plan: Arc<Plan>,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub max_context: usize,
    pub capacity: Capacity,
    /// What the model may allocate.
    pub budget: Option<u64>,
    pub load: LoadOptions,
    pub weights: ModelWeights,
    pub tensors: Vec<(String, Dtype, Vec<usize>)>,
    /// Made for the first request with a guide.
    pub guides: OnceLock<Result<GuideVocabulary>>,
    pub stats: Arc<Mutex<ModelStats>>,
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

    /// See [`Engine::quiesce`](crate::engine::Engine::quiesce).
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
            Head::LanguageModel { .. } => Ok(()),
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
        read: impl Fn(Vec<Finished>) -> Result<T> + Send + Sync + 'static,
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
