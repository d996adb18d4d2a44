//! What a model reads of an answer, and what it says of it.

use super::{Reference, Reward, RolloutRequest};
use crate::adapter::Adapter;
use crate::engine::{Job, Scheduling};
use crate::error::{Error, Result};
use crate::loaded_model::Model;
use crate::request::{LogprobRequest, ScoreRequest, SequenceLogprobs, SequenceScore};
use crate::score::Rule;
use crate::text::{EncodeOptions, Message};

/// An answer that has ended.
#[derive(Clone)]
pub(super) struct Ended {
    /// Index in the rollout.
    pub index: usize,
    pub prompt: usize,
    pub ids: Vec<u32>,
    /// As in the result; empty without a tokenizer.
    pub text: String,
    /// The job was cancelled or late: this is not what the policy would have said.
    pub is_cut_off: bool,
}

/// A model's part in a rollout.
pub(super) trait Scorer: Send + 'static {
    type Score: Send + 'static;
    /// What the model has to read; `None` if the answer has no score.
    fn read(&self, answer: &Ended) -> Result<Option<Input>>;
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

    fn read(&self, answer: &Ended) -> Result<Option<Input>> {
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
    policy: Model,
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
    /// The text that the policy's ids are, with the answer's.
    Text(Vec<u32>),
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
        let scorer = RewardScorer {
            policy: policy.clone(),
            model,
            name: reward.name.clone(),
            rule,
            adapter: reward.adapter.clone(),
            prompts,
            scheduling: scheduling(request),
        };
        // What a template refuses of a prompt it refuses now.
        for prompt in &scorer.prompts {
            if let PromptForm::Turns { .. } | PromptForm::Question(_) = prompt {
                scorer.encode(prompt, &[], "").map_err(place)?;
            }
        }
        Ok(scorer)
    }

    fn prompts(policy: &Model, reward: &Reward, rule: &Rule, request: &RolloutRequest) -> Result<Vec<PromptForm>> {
        let by_ids = policy.speaks_to(&reward.model);
        let has_template = reward.model.tokenizer().is_ok_and(|t| t.chat_template().is_some());
        if let Some(question) = &reward.question {
            if !has_template {
                return Err(Error::argument("it is asked a question and has no chat template"));
            }
            if !question.contains(ANSWER) {
                return Err(Error::argument(format!("the question {question:?} has no {ANSWER} in it")));
            }
        }
        if reward.question.is_some() || !by_ids {
            // Both texts are needed, whatever becomes of them.
            let no_text = |e: Error| e.at("it reads text");
            policy.tokenizer().map_err(|e| no_text(e.at("the policy")))?;
            reward.model.tokenizer().map_err(no_text)?;
        }
        let form = |(i, ids): (usize, &Vec<u32>)| {
            let messages = request.conversations.get(i).filter(|m| !m.is_empty());
            let text = || match messages.and_then(|m| m.last()) {
                Some(message) => Ok(message.content.clone()),
                None => policy.tokenizer()?.decode_sampled(ids),
            };
            Ok(match (&reward.question, messages) {
                (Some(question), _) => PromptForm::Question(with_prompt(question, &text()?)),
                (None, _) if by_ids => PromptForm::Ids(ids.clone()),
                (None, Some(messages)) if has_template => {
                    PromptForm::Turns { messages: messages.clone(), open: matches!(rule, Rule::Judge { .. }) }
                }
                (None, _) => PromptForm::Text(ids.clone()),
            })
        };
        request.sample.prompts.iter().enumerate().map(form).collect()
    }

    /// What the model reads of an answer.
    fn encode(&self, prompt: &PromptForm, ids: &[u32], text: &str) -> Result<Vec<u32>> {
        match prompt {
            PromptForm::Ids(prompt) => Ok([prompt, ids].concat()),
            PromptForm::Text(prompt) => self.model.tokenizer()?.encode(&self.joined(prompt, ids, text)?, WHOLE),
            PromptForm::Turns { messages, open } => {
                let answer = Message { role: "assistant".into(), content: text.into() };
                let messages: Vec<Message> = messages.iter().cloned().chain([answer]).collect();
                self.model.tokenizer()?.encode_chat(&messages, *open)
            }
            PromptForm::Question(parts) => {
                let content = parts.join(text);
                self.model.tokenizer()?.encode_chat(&[Message { role: "user".into(), content }], true)
            }
        }
    }

    /// Prompt and answer, decoded as one: decoders treat the beginning of a text in their own way, and drop a space there. What a
    /// stop string cut off the answer's text is cut off here.
    fn joined(&self, prompt: &[u32], ids: &[u32], text: &str) -> Result<String> {
        let tokenizer = self.policy.tokenizer()?;
        let mut whole = tokenizer.decode_sampled(&[prompt, ids].concat())?;
        let alone = tokenizer.decode_sampled(ids)?;
        if let Some(rest) = alone.strip_prefix(text).filter(|rest| whole.ends_with(rest)) {
            whole.truncate(whole.len() - rest.len());
        }
        Ok(whole)
    }
}

const ANSWER: &str = "{answer}";

/// Cut before the prompt's text comes in: braces in a prompt or an answer mean nothing.
fn with_prompt(question: &str, prompt: &str) -> Vec<String> {
    question.split(ANSWER).map(|part| part.replace("{prompt}", prompt)).collect()
}

impl Scorer for RewardScorer {
    type Score = SequenceScore;

    fn read(&self, answer: &Ended) -> Result<Option<Input>> {
        if answer.is_cut_off {
            return Ok(None);
        }
        let ids = match self.encode(&self.prompts[answer.prompt], &answer.ids, &answer.text) {
            Ok(ids) => ids,
            // What a policy writes may be more than a template or tokenizer takes; that is no reason to lose the others.
            Err(error) => {
                log::warn!("reward {}: an answer cannot be encoded: {error}", self.name);
                return Ok(None);
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
