//! rewardrt samples from a policy and scores what was sampled, inside the process that trains it.
//!
//! It memory-maps safetensors, runs the same list of kernels on the CPU or, through wgpu, on a GPU, and returns ids,
//! log-probabilities and rewards that depend on nothing but the sequence itself: **a token's log-probability while
//! sampling equals, to the last bit, the one that scoring the finished text returns**, whatever else is in the batch.
//!
//! ```no_run
//! use rewardrt::{EncodeOptions, LogprobRequest, ModelOptions, Runtime, RuntimeOptions, SampleRequest};
//!
//! let runtime = Runtime::open(&RuntimeOptions::default())?;
//! let policy = runtime.load_model("SmolLM2-135M-Instruct".as_ref(), &ModelOptions::default())?;
//! let prompt = policy.tokenizer()?.encode("The capital of France is", EncodeOptions::default())?;
//!
//! let request = SampleRequest { prompts: vec![prompt.clone()], n: 4, max_tokens: 32, ..SampleRequest::default() };
//! for answer in policy.sample(&request)?.wait()? {
//!     let ids: Vec<u32> = answer.tokens.iter().map(|t| t.id).collect();
//!     let scored = LogprobRequest::completions([(prompt.clone(), ids)]);
//!     let again = policy.logprobs(&scored)?.wait()?;
//!     assert_eq!(again[0].logprobs[0], Some(answer.tokens[0].model_logprob));
//! }
//! # Ok::<(), rewardrt::Error>(())
//! ```
//!
//! - [`Runtime`]: a device and the engine thread that feeds it. [`Model`]: a checkpoint loaded onto it.
//! - [`SampleRequest`], [`LogprobRequest`], [`ScoreRequest`]: what can be asked; each becomes a [`Job`].
//! - [`Adapter`]: a LoRA adapter of a model, chosen by each request.
//! - [`Update`]: new weights, all or nothing, while the model is in use; [`Follower`]: from a folder.
//! - [`RolloutRequest`]: a step of online RL as one job: samples, reference log-probabilities, rewards, advantages.
//! - [`Session`]: a rollout of several turns. [`Guide`]: what a sampled text must be.
//! - [`Rule`]: how a sequence becomes a score.
//! - [`Tokenizer`]: ids from text and from chat messages.
//!
//! It does: Llama, Mistral and Qwen2 checkpoints and their sequence classifiers, f32/f16/bf16 weights (8-bit on load),
//! ragged batches, paged KV with shared prefixes, seeded sampling under every usual control. It does not yet: other
//! architectures, quantised checkpoints. It never downloads anything, exits, prints, or installs a signal
//! handler or a logger (a panic inside a dependency is caught, but the process's panic hook sees it; the first [`Guide`]
//! makes llguidance put a hook before it that hides the panics which that crate catches itself).

mod adapter;
mod adapter_update;
pub mod backend;
mod engine;
mod error;
mod exchange;
mod follow;
mod guide;
pub mod kernels;
mod lifecycle;
mod loaded_model;
mod merge;
pub mod model;
mod request;
mod rollout;
mod runtime;
mod score;
mod session;
mod text;
mod update;
pub mod weights;

pub use adapter::{Adapter, AdapterOptions};
pub use adapter_update::{AdapterUpdate, AdapterUpdateOptions};
pub use backend::gpu::{DeviceInfo, DeviceType};
pub use backend::{KernelTime, Limits};
pub use engine::{
    Chunk, Ending, Finish, InFlight, Job, JobStats, JobWatch, ModelStats, Rows, RuntimeStats, SampledToken, Scheduling,
    Streamed, Timing, VersionSpan,
};
pub use error::{Error, ErrorKind, Result};
pub use follow::{FollowOptions, Follower};
pub use guide::Guide;
pub use kernels::linear::Precision;
pub use lifecycle::Tags;
pub use loaded_model::Model;
pub use merge::MergedAdapter;
pub use request::{
    LogprobRequest, MAX_SEQUENCES, RequestLimits, SampleRequest, SampledSequence, ScoreRequest, SequenceLogprobs,
    SequenceScore,
};
pub use rollout::{
    Advantage, Group, Kl, MAX_ROLLOUTS, Reference, Reward, Rollout, RolloutJob, RolloutRequest, RolloutWatch,
};
pub use runtime::{CpuInfo, MAX_THREADS, ModelOptions, Runtime, RuntimeOptions, RuntimeState, devices};
pub use score::{Rule, Score, Step, Steps};
pub use session::Session;
pub use text::{ChatTemplate, EncodeOptions, Message, Tokenizer};
pub use update::{Require, Storage, Update, UpdateOptions};
