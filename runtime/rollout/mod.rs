//! One step of online RL as one job: samples, reference log-probabilities, KL, rewards, advantages.
//!
//! The policy samples; every other model has a worker, which takes the answers as they end and scores them while the
//! others are still being sampled.

mod advantage;
mod job;
mod kl;
mod places;
mod scorer;

use std::collections::BTreeSet;
use std::time::Duration;

pub use advantage::{Advantage, Group};
pub use job::{RolloutJob, RolloutWatch};
pub use kl::Kl;
pub use places::MAX_ROLLOUTS;
pub(crate) use places::Rollouts;
use scorer::RewardScorer;

use crate::adapter::Adapter;
use crate::engine::JobStats;
use crate::error::{Error, Result};
use crate::loaded_model::Model;
use crate::request::{SampleRequest, SampledSequence, SequenceLogprobs};
use crate::score::Rule;
use crate::text::Message;

/// What one step of online RL asks for.
#[derive(Clone)]
pub struct RolloutRequest {
    /// What the policy samples: `n` answers to each prompt. `best_of` must be `None`; `stream` does not count.
    pub sample: SampleRequest,
    /// Whose log-probabilities the policy's are compared with; `None`: no KL.
    pub reference: Option<Reference>,
    /// What scores the answers; may be empty.
    pub rewards: Vec<Reward>,
    /// How rewards become advantages.
    pub advantage: Advantage,
    /// What each prompt is as a conversation, for reward models of another tokenizer and for questions; one without messages:
    /// the prompt is a plain text. Empty: all are.
    pub conversations: Vec<Vec<Message>>,
    /// The weighted sum of the rewards is brought into this range, smallest and largest value, before the advantages.
    pub clip_reward: Option<(f32, f32)>,
}

impl RolloutRequest {
    /// Samples alone: no reference, no rewards.
    pub fn new(sample: SampleRequest) -> Self {
        RolloutRequest {
            sample,
            reference: None,
            rewards: Vec::new(),
            advantage: Advantage::Group,
            conversations: Vec::new(),
            clip_reward: None,
        }
    }
}

/// The distribution that the policy is to stay close to.
#[derive(Clone)]
pub enum Reference {
    /// Another model with the policy's vocabulary. On the CPU, where mapped weights are used in place, one that is loaded from
    /// the policy's own files shares their pages until the policy is updated.
    Model(Model),
    /// The policy without the request's adapter: one copy of the weights for both. An update of the policy is one of the
    /// reference, too: `weight_version` says which weights it had.
    Base,
}

/// A model that scores answers.
#[derive(Clone)]
pub struct Reward {
    /// The model, of this runtime or of another one.
    pub model: Model,
    /// What results call it; no two of a request may have the same.
    pub name: String,
    /// Its part in the sum; finite.
    pub weight: f32,
    /// `None`: the rule that its head implies.
    pub rule: Option<Rule>,
    /// Which of the rule's labels is the reward.
    pub label: usize,
    /// Whose weights come on top of the model's. One that is replaced meanwhile counts for the answers that end from then on.
    pub adapter: Option<Adapter>,
    /// A user message, in which `{prompt}` and `{answer}` (which must occur) stand for the texts, that goes to the model through its chat template
    /// in the place of the answer: what a judge is asked. `{prompt}` is the conversation's last message, or the prompt's
    /// text. `None`: the model reads prompt and answer, as ids if each of the policy's is the same token to it, else as text: the conversation
    /// through its own chat template, or the texts one after the other.
    pub question: Option<String>,
}

impl Reward {
    /// The model under its own rule, with weight 1.
    pub fn new(name: impl Into<String>, model: Model) -> Self {
        Reward { model, name: name.into(), weight: 1.0, rule: None, label: 0, adapter: None, question: None }
    }
}

/// One step's data. Lists of sequences are in the order (prompt, sample).
#[derive(Clone, Debug)]
pub struct Rollout {
    /// The answers.
    pub samples: Vec<SampledSequence>,
    /// Of every answer's tokens under the reference.
    pub reference: Option<Vec<SequenceLogprobs>>,
    /// Of every answer's tokens: the policy against the reference, both at temperature 1. Empty without a reference.
    pub kl: Vec<Kl>,
    /// By reward, by sequence. NaN where there is none: the answer was cut off (`Finish::Cancelled`), is longer than the reward model
    /// takes, or its text cannot be encoded for it.
    pub rewards: Vec<Vec<f32>>,
    /// By reward, by sequence: the weights that scored it; 0 where nothing did. They differ if the model was updated meanwhile.
    pub reward_versions: Vec<Vec<u64>>,
    /// The weighted sum of a sequence's rewards, without those that are NaN; NaN if all are, or there is none.
    pub reward: Vec<f32>,
    /// What the reward is worth among the others; 0 where the reward is NaN.
    pub advantages: Vec<f32>,
    /// By prompt.
    pub groups: Vec<Group>,
    /// What sampling has cost.
    pub sampling: JobStats,
    /// From the beginning to the last sampled token.
    pub sampled_in: Duration,
    /// From the beginning to the end.
    pub elapsed: Duration,
}

impl Model {
    /// Starts a rollout with this model as the policy.
    ///
    /// # Errors
    /// `Argument` for a field out of range, a rule, label or vocabulary that does not fit; `Full` if the queue is, or
    /// [`MAX_ROLLOUTS`] of the runtime are under way. The job itself fails as those of [`Model::sample`], [`Model::logprobs`]
    /// and [`Model::score`] do, and with `Cancelled`: by [`RolloutJob::cancel`], and by a pause, a sleep or an update that
    /// cancels what is under way.
    pub fn rollout(&self, request: &RolloutRequest) -> Result<RolloutJob> {
        check(self, request)?;
        let scorers =
            request.rewards.iter().map(|r| RewardScorer::new(self, r, request)).collect::<Result<Vec<_>>>()?;
        RolloutJob::start(self, request, scorers)
    }
}

fn check(policy: &Model, request: &RolloutRequest) -> Result<()> {
    let sample = &request.sample;
    if let Some(drawn) = sample.best_of {
        return Err(Error::argument(format!("best_of is {drawn}; a rollout returns all it draws: leave it out")));
    }
    if request.advantage == Advantage::LeaveOneOut && sample.n < 2 {
        return Err(Error::argument(format!(
            "n is {}; leave-one-out advantages compare an answer with the others of its prompt and need at least 2",
            sample.n
        )));
    }
    let (conversations, prompts) = (request.conversations.len(), sample.prompts.len());
    if conversations != 0 && conversations != prompts {
        return Err(Error::argument(format!("{conversations} conversations for {prompts} prompts")));
    }
    if let Some((low, high)) = request.clip_reward
        && !(low <= high && low < f32::INFINITY && high > f32::NEG_INFINITY)
    {
        return Err(Error::argument(format!(
            "clip_reward is ({low}, {high}); they must be the smallest and the largest reward"
        )));
    }
    let mut names = BTreeSet::new();
    for reward in &request.rewards {
        let name = &reward.name;
        if name.is_empty() || !names.insert(name) {
            return Err(Error::argument(format!("the reward name {name:?} is empty or occurs twice")));
        }
        if !reward.weight.is_finite() {
            return Err(Error::argument(format!("reward {name}: the weight {} is not finite", reward.weight)));
        }
    }
    match &request.reference {
        Some(Reference::Model(reference)) => check_reference(policy, reference, sample),
        Some(Reference::Base) | None => Ok(()),
    }
}

/// The reference reads the policy's ids, and takes the longest answer there can be.
fn check_reference(policy: &Model, reference: &Model, sample: &SampleRequest) -> Result<()> {
    reference.language_model().map_err(|e| e.at("reference"))?;
    let [vocab, own] = [policy, reference].map(|m| m.spec().vocab_size);
    if vocab != own || !policy.speaks_to(reference) {
        return Err(Error::argument(format!(
            "the reference has another vocabulary ({own} ids) than the policy ({vocab} ids): log-probabilities of one's \
             tokens mean nothing to the other"
        )));
    }
    let prompt = sample.prompts.iter().map(Vec::len).max().unwrap_or(0);
    let longest = prompt.saturating_add(sample.max_tokens).min(policy.max_context());
    let most = reference.max_context().min(reference.kv_tokens());
    if longest > most {
        return Err(Error::limit(format!(
            "the reference takes {most} tokens, and a prompt with its answer may have {longest}; its max_context and \
             kv_tokens, or a smaller max_tokens, change that"
        )));
    }
    Ok(())
}
