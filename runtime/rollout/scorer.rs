//! What a model reads of an answer, and what it says of it.

use super::{Reference, Reward, RolloutRequest};
use crate::adapter::Adapter;
use crate::engine::{Job, Scheduling};
use crate::error::{Error, Result};
use crate::request::{LogprobRequest, ScoreRequest, SequenceLogprobs, SequenceScore};
use crate::runtime::Model;
use crate::score::Rule;
use crate::text::{EncodeOptions, Message};

/// An answer that has ended.
#[derive(Clone, Default)]
pub(super) struct Answer {
    /// Index in the rollout.
    pub index: usize,
    pub prompt: usize,
    pub ids: Vec<u32>,
    /// Empty without a tokenizer.
    pub text: String,
}

/// A model's part in a rollout.
pub(super) trait Scorer: Send + 'static {
    type Score: Send + 'static;
    /// What the model has to read; `None` if it takes no sequence of this length.
    fn read(&self, answer: &Answer) -> Result<Option<Input>>;
    fn submit(&self, inputs: &[Input]) -> Result<Job<Vec<Self::Score>>>;
}

/// A sequence, and how many of its tokens come before the answer.
pub(super) struct Input {
    pub ids: Vec<u32>,
    pub prompt_len: usize,
}

/// Log-probabilities under the reference.
pub(super) struct ReferenceScorer {
    model: Model,
    prompts: Vec<Vec<u32>>,
    scheduling: Scheduling,
}

impl ReferenceScorer {
    pub fn new(policy: &Model, reference: &Reference, request: &RolloutRequest) -> Self {
        let model = match reference {
            Reference::Model(model) => model.clone(),
            Reference::Base => policy.clone(),
        };
        ReferenceScorer { model, prompts: request.sample.prompts.clone(), scheduling: scheduling(request) }
    }
}

impl Scorer for ReferenceScorer {
    type Score = SequenceLogprobs;

    fn read(&self, answer: &Answer) -> Result<Option<Input>> {
        let prompt = &self.prompts[answer.prompt];
        Ok(Some(Input { ids: [prompt.as_slice(), &answer.ids].concat(), prompt_len: prompt.len() }))
    }

    fn submit(&self, inputs: &[Input]) -> Result<Job<Vec<SequenceLogprobs>>> {
        let mut request = LogprobRequest { scheduling: self.scheduling, ..LogprobRequest::default() };
        for input in inputs {
            request.sequences.push(input.ids.clone());
            request.prompt_lens.push(input.prompt_len);
        }
        self.model.logprobs(&request).map_err(|e| e.at("reference"))
    }
}

/// A rollout's deadline ends its sampling; what was sampled is scored all the same.
fn scheduling(request: &RolloutRequest) -> Scheduling {
    Scheduling { deadline: None, ..request.sample.scheduling }
}

/// One reward.
pub(super) struct RewardScorer {
    model: Model,
    name: String,
    rule: Rule,
    adapter: Option<Adapter>,
    prompts: Vec<PromptForm>,
    scheduling: Scheduling,
}

/// A prompt as a reward model takes it.
enum PromptForm {
    /// The policy's ids, followed by the answer's.
    Ids(Vec<u32>),
    /// A text, followed by the answer's.
    Text(String),
    /// The turns before the answer. `open`: the rule reads what would come next, so the template opens another turn.
    Turns { messages: Vec<Message>, open: bool },
    /// A question, cut where the answer comes in.
    Question(Vec<String>),
}

const WHOLE: EncodeOptions = EncodeOptions { add_special: true, parse_special: false };

impl RewardScorer {
    pub fn new(policy: &Model, reward: &Reward, request: &RolloutRequest) -> Result<Self> {
        let place = |e: Error| e.at(format!("reward {}", reward.name));
        let model = reward.model.clone();
        let rule = reward.rule.clone().map_or_else(|| Rule::for_model(model.spec()), Ok).map_err(place)?;
        let labels = model.rule_labels(&rule).map_err(place)?.len();
        if reward.label >= labels {
            return Err(place(Error::argument(format!("label {} of {labels}, counted from 0", reward.label))));
        }
        model.adapted(&reward.adapter).map_err(place)?;
        let prompts = Self::prompts(policy, reward, &rule, request).map_err(place)?;
        Ok(RewardScorer {
            model,
            name: reward.name.clone(),
            rule,
            adapter: reward.adapter.clone(),
            prompts,
            scheduling: scheduling(request),
        })
    }

    fn prompts(policy: &Model, reward: &Reward, rule: &Rule, request: &RolloutRequest) -> Result<Vec<PromptForm>> {
        let by_ids = policy.shares_vocabulary(&reward.model);
        let has_template = reward.model.tokenizer().is_ok_and(|t| t.chat_template().is_some());
        if reward.question.is_some() && !has_template {
            return Err(Error::argument("it is asked a question and has no chat template"));
        }
        let form = |(i, ids): (usize, &Vec<u32>)| {
            let messages = request.conversations.get(i).filter(|m| !m.is_empty());
            let text = || match messages.and_then(|m| m.last()) {
                Some(message) => Ok(message.content.clone()),
                None => policy.tokenizer()?.decode(ids, true),
            };
            Ok(match (&reward.question, messages) {
                (Some(question), _) => PromptForm::Question(with_prompt(question, &text()?)),
                (None, _) if by_ids => PromptForm::Ids(ids.clone()),
                (None, Some(messages)) if has_template => {
                    PromptForm::Turns { messages: messages.clone(), open: matches!(rule, Rule::Judge { .. }) }
                }
                (None, _) => PromptForm::Text(policy.tokenizer()?.decode(ids, true)?),
            })
        };
        request.sample.prompts.iter().enumerate().map(form).collect()
    }
}

/// Cut before the prompt's text comes in: braces in a prompt or an answer mean nothing.
fn with_prompt(question: &str, prompt: &str) -> Vec<String> {
    question.split("{answer}").map(|part| part.replace("{prompt}", prompt)).collect()
}

impl Scorer for RewardScorer {
    type Score = SequenceScore;

    fn read(&self, answer: &Answer) -> Result<Option<Input>> {
        let ids = match &self.prompts[answer.prompt] {
            PromptForm::Ids(prompt) => [prompt.as_slice(), &answer.ids].concat(),
            PromptForm::Text(prompt) => self.model.tokenizer()?.encode(&format!("{prompt}{}", answer.text), WHOLE)?,
            PromptForm::Turns { messages, open } => {
                let mut messages = messages.clone();
                messages.push(Message { role: "assistant".into(), content: answer.text.clone() });
                self.model.tokenizer()?.encode_chat(&messages, *open)?
            }
            PromptForm::Question(parts) => {
                let content = parts.join(&answer.text);
                self.model.tokenizer()?.encode_chat(&[Message { role: "user".into(), content }], true)?
            }
        };
        let most = self.model.max_context().min(self.model.kv_tokens());
        if ids.len() > most {
            log::warn!(
                "reward {}: an answer with its prompt has {} tokens, the model takes {most}",
                self.name,
                ids.len()
            );
            return Ok(None);
        }
        Ok(Some(Input { ids, prompt_len: 0 }))
    }

    fn submit(&self, inputs: &[Input]) -> Result<Job<Vec<SequenceScore>>> {
        let request = ScoreRequest {
            sequences: inputs.iter().map(|i| i.ids.clone()).collect(),
            rule: Some(self.rule.clone()),
            adapter: self.adapter.clone(),
            scheduling: self.scheduling,
            ..ScoreRequest::default()
        };
        self.model.score(&request).map_err(|e| e.at(format!("reward {}", self.name)))
    }
}
