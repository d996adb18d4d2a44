//! Every field of a request against its range and the model.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::{LogprobRequest, MAX_SEQUENCES, RequestLimits, SampleRequest, ScoreRequest};
use crate::backend::Want;
use crate::engine::{NewSequence, Purpose, SamplePlan};
use crate::error::{Error, Result};
use crate::guide::{self, CompiledGuide};
use crate::kernels::{sample, top_k};
use crate::model::ModelSpec;
use crate::score::BoundRule;
use crate::text::Tokenizer;

/// Tokens in one request, what it may generate included.
const MAX_TOKENS: usize = 1 << 24;
/// Alternatives and kept ids (8 bytes each) in the results of one request.
const MAX_ALTERNATIVES: usize = 1 << 26;
const MAX_STOPS: usize = 64;
/// Each row that samples carries them.
const MAX_BIASES: usize = 1024;
const MAX_SPECULATE: usize = 16;

pub(super) const LIMITS: RequestLimits = RequestLimits {
    tokens: MAX_TOKENS,
    alternatives: MAX_ALTERNATIVES,
    stops: MAX_STOPS,
    biases: MAX_BIASES,
    top_logprobs: top_k::MAX_K,
    kept_ids: sample::MAX_KEPT_IDS,
    speculate: MAX_SPECULATE,
    guide_bytes: guide::MAX_SOURCE,
};

/// Below this a temperature is greedy: 1/T would lose the logits' differences to f32's range.
const GREEDY_BELOW: f32 = 1e-5;

type Mask = Arc<[u32]>;

/// A prompt, and which stretches of it are one forward in the reference implementation.
pub(crate) struct Prompt<'a> {
    pub tokens: &'a [u32],
    pub forwards: Vec<Range<usize>>,
}

impl<'a> Prompt<'a> {
    /// A prompt that is read at once.
    pub(crate) fn whole(tokens: &'a [u32]) -> Self {
        Prompt { tokens, forwards: once(tokens.len()) }
    }
}

/// The first `length` positions as one forward.
fn once(length: usize) -> Vec<Range<usize>> {
    std::iter::once(0..length).collect()
}

/// What a request is checked against.
pub(crate) struct Checker<'a> {
    pub spec: &'a ModelSpec,
    pub max_context: usize,
    pub tokenizer: Option<&'a Arc<Tokenizer>>,
}

impl Checker<'_> {
    fn tokens(&self, what: &str, i: usize, tokens: &[u32], most: usize) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::argument(format!("{what} {i} is empty; it must have at least one token")));
        }
        if tokens.len() > most {
            return Err(Error::limit(format!(
                "{what} {i} has {} tokens, the model's context allows {most}; max_context raises it",
                tokens.len()
            )));
        }
        match tokens.iter().find(|t| **t as usize >= self.spec.vocab_size) {
            Some(t) => Err(Error::argument(format!(
                "{what} {i}: token id {t} is not below the vocabulary size {}",
                self.spec.vocab_size
            ))),
            None => Ok(()),
        }
    }

    fn top(&self, top: usize) -> Result<usize> {
        if top <= top_k::MAX_K {
            return Ok(top);
        }
        Err(Error::argument(format!("top_logprobs is {top}, at most {} are allowed", top_k::MAX_K)))
    }

    fn count(&self, what: &str, count: usize) -> Result<()> {
        match count {
            0 => Err(Error::argument(format!("there are no {what}"))),
            n if n > MAX_SEQUENCES => Err(Error::limit(format!("{n} {what}, at most {MAX_SEQUENCES} in a request"))),
            _ => Ok(()),
        }
    }

    fn ids(&self, name: &str, ids: impl IntoIterator<Item = u32>) -> Result<()> {
        match ids.into_iter().find(|t| *t as usize >= self.spec.vocab_size) {
            Some(t) => Err(Error::argument(format!(
                "{name}: token id {t} is not below the vocabulary size {}",
                self.spec.vocab_size
            ))),
            None => Ok(()),
        }
    }

    /// What all samples of a request have in common.
    fn plan(&self, r: &SampleRequest, guide: Option<CompiledGuide>) -> Result<SamplePlan> {
        let within = |name: &str, value: f32, ok: bool, range: &str| match ok {
            true => Ok(()),
            false => Err(Error::argument(format!("{name} is {value}, it must be {range}"))),
        };
        within("temperature", r.temperature, r.temperature >= 0.0, "0 or greater")?;
        within("top_p", r.top_p, (0.0..=1.0).contains(&r.top_p), "from 0 to 1")?;
        within("min_p", r.min_p, (0.0..=1.0).contains(&r.min_p), "from 0 to 1")?;
        within("typical_p", r.typical_p, (0.0..=1.0).contains(&r.typical_p), "from 0 to 1")?;
        let penalty = r.repetition_penalty;
        within("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "a number greater than 0")?;
        within("presence_penalty", r.presence_penalty, r.presence_penalty.is_finite(), "a finite number")?;
        within("frequency_penalty", r.frequency_penalty, r.frequency_penalty.is_finite(), "a finite number")?;
        let stops = r.stop.len().max(r.stop_ids.len());
        if stops > MAX_STOPS || r.stop.iter().any(String::is_empty) {
            return Err(Error::argument(format!(
                "stop strings must not be empty, and at most {MAX_STOPS} stops are allowed"
            )));
        }
        if !r.stop.is_empty() && self.tokenizer.is_none() {
            return Err(Error::argument("stop strings need a tokenizer, and the model has no tokenizer.json"));
        }
        let at_most = |name: &str, value: usize, most: usize| match value <= most {
            true => Ok(value),
            false => Err(Error::argument(format!("{name} is {value}, at most {most} are allowed"))),
        };
        self.ids("stop_ids", r.stop_ids.iter().copied())?;
        let mut stop_ids = r.stop_ids.clone();
        if !r.ignore_eos {
            stop_ids.extend(&self.spec.eos_token_ids);
        }
        if r.logit_bias.len() > MAX_BIASES {
            return Err(Error::argument(format!(
                "logit_bias names {} tokens, at most {MAX_BIASES} are allowed; banned_ids and allowed_ids take any number",
                r.logit_bias.len()
            )));
        }
        let mut bias = BTreeMap::new();
        for &(token, value) in &r.logit_bias {
            self.ids("logit_bias", [token])?;
            if value.is_nan() || value == f32::INFINITY {
                return Err(Error::argument(format!(
                    "logit_bias of token {token} is {value}, it must be a finite number or −infinity"
                )));
            }
            if bias.insert(token, value).is_some() {
                return Err(Error::argument(format!("logit_bias names token {token} twice")));
            }
        }
        let (mask, early_mask) = self.masks(r, &stop_ids)?;
        // What is masked needs no bias.
        bias.retain(|_, value| *value != f32::NEG_INFINITY && *value != 0.0);
        let greedy = r.temperature < GREEDY_BELOW;
        Ok(SamplePlan {
            request: sample::Request {
                inverse_temperature: if greedy { -1.0 } else { 1.0 / r.temperature },
                top_k: u32::try_from(r.top_k).unwrap_or(0),
                top_p: r.top_p,
                min_p: r.min_p,
                typical_p: r.typical_p,
                // At most MAX_KEPT_IDS.
                kept_ids: at_most("kept_ids", r.kept_ids, sample::MAX_KEPT_IDS)? as u32,
                ..sample::Request::default()
            },
            seed: r.seed,
            min_tokens: r.min_tokens,
            stop_ids,
            stop_strings: r.stop.clone().into(),
            tokenizer: self.tokenizer.cloned(),
            repetition_penalty: penalty,
            presence_penalty: r.presence_penalty,
            frequency_penalty: r.frequency_penalty,
            bias,
            mask,
            early_mask,
            guide,
            speculate: at_most("speculate", r.speculate, MAX_SPECULATE)?,
            stream: r.stream,
            top: self.top(r.top_logprobs)?,
        })
    }

    /// The tokens that can be drawn, one bit each: as a rule, and while nothing may end the sequence. `None`: all.
    fn masks(&self, r: &SampleRequest, stop_ids: &[u32]) -> Result<(Option<Mask>, Option<Mask>)> {
        let vocab = self.spec.vocab_size;
        self.ids("banned_ids", r.banned_ids.iter().copied())?;
        self.ids("allowed_ids", r.allowed_ids.iter().flatten().copied())?;
        let banned: Vec<u32> = r.logit_bias.iter().filter(|(_, b)| *b == f32::NEG_INFINITY).map(|(t, _)| *t).collect();
        let masked = r.allowed_ids.is_some() || !r.banned_ids.is_empty() || !banned.is_empty();
        let holds_back = r.min_tokens > 0 && !stop_ids.is_empty();
        if !masked && !holds_back {
            return Ok((None, None));
        }
        let mut bits = vec![0u32; vocab.div_ceil(32)];
        match &r.allowed_ids {
            Some(allowed) => allowed.iter().for_each(|t| bits[*t as usize / 32] |= 1 << (t % 32)),
            None => (0..vocab).for_each(|t| bits[t / 32] |= 1 << (t % 32)),
        }
        let clear = |bits: &mut [u32], token: u32| {
            if let Some(word) = bits.get_mut(token as usize / 32) {
                *word &= !(1 << (token % 32));
            }
        };
        r.banned_ids.iter().chain(&banned).for_each(|t| clear(&mut bits, *t));
        let some = |bits: &[u32], what: &str| match bits.iter().any(|word| *word != 0) {
            true => Ok(()),
            false => Err(Error::argument(format!("allowed_ids, banned_ids and logit_bias leave no token{what}"))),
        };
        some(&bits, "")?;
        let mut early = bits.clone();
        if holds_back {
            stop_ids.iter().for_each(|t| clear(&mut early, *t));
            some(&early, " that min_tokens allows before the end")?;
        }
        Ok((masked.then(|| bits.into()), Some(early.into())))
    }

    pub(crate) fn sample(
        &self,
        r: &SampleRequest,
        prompts: &[Prompt],
        guide: Option<CompiledGuide>,
    ) -> Result<Vec<NewSequence>> {
        if r.n == 0 {
            return Err(Error::argument("n is 0, it must be at least 1: there would be no samples"));
        }
        let samples = r.best_of.unwrap_or(r.n);
        if samples < r.n {
            return Err(Error::argument(format!("best_of is {samples}, it must be at least n, which is {}", r.n)));
        }
        self.count("samples", prompts.len().saturating_mul(samples))?;
        if r.max_tokens == 0 {
            return Err(Error::argument("max_tokens is 0, it must be at least 1"));
        }
        if r.min_tokens > r.max_tokens {
            return Err(Error::argument(format!(
                "min_tokens is {}, it must be at most max_tokens, which is {}",
                r.min_tokens, r.max_tokens
            )));
        }
        if !r.streams.is_empty() && r.streams.len() != prompts.len() {
            return Err(Error::argument(format!("{} streams for {} prompts", r.streams.len(), prompts.len())));
        }
        let plan = Arc::new(self.plan(r, guide)?);
        let mut total = 0usize;
        let mut sequences = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            self.tokens("prompt", i, prompt.tokens, self.max_context - 1)?;
            let max_tokens = r.max_tokens.min(self.max_context - prompt.tokens.len());
            total = total.saturating_add((prompt.tokens.len() + max_tokens).saturating_mul(samples));
            self.results(total, plan.top + r.kept_ids)?;
            sequences.push(NewSequence {
                tokens: prompt.tokens.to_vec(),
                forwards: prompt.forwards.clone(),
                purpose: Purpose::Sample {
                    plan: plan.clone(),
                    stream: r.streams.get(i).copied().unwrap_or(i as u64),
                    // At most MAX_SEQUENCES.
                    samples: samples as u32,
                    max_tokens,
                },
                adapter: None,
            });
        }
        Ok(sequences)
    }

    pub(crate) fn logprobs(&self, r: &LogprobRequest) -> Result<Vec<NewSequence>> {
        self.count("sequences", r.sequences.len())?;
        if !r.prompt_lens.is_empty() && r.prompt_lens.len() != r.sequences.len() {
            return Err(Error::argument(format!(
                "{} prompt_lens for {} sequences",
                r.prompt_lens.len(),
                r.sequences.len()
            )));
        }
        let top = self.top(r.top_logprobs)?;
        self.total(&r.sequences, top)?;
        let sequence = |(i, tokens): (usize, &Vec<u32>)| {
            self.tokens("sequence", i, tokens, self.max_context)?;
            let prompt_len = r.prompt_lens.get(i).copied().unwrap_or(0);
            if prompt_len > tokens.len() {
                return Err(Error::argument(format!(
                    "sequence {i} has {} tokens but a prompt_len of {prompt_len}",
                    tokens.len()
                )));
            }
            let want = |p: usize| (p - 1, Want::Logprob { target: tokens[p], top });
            Ok(NewSequence {
                tokens: tokens.clone(),
                // A prompt and its completion are computed the way sampling computes them.
                forwards: once(if prompt_len > 0 { prompt_len } else { tokens.len() }),
                purpose: Purpose::Read((prompt_len.max(1)..tokens.len()).map(want).collect()),
                adapter: None,
            })
        };
        r.sequences.iter().enumerate().map(sequence).collect()
    }

    pub(crate) fn score(&self, r: &ScoreRequest, rule: &BoundRule) -> Result<Vec<NewSequence>> {
        self.count("sequences", r.sequences.len())?;
        self.total(&r.sequences, 0)?;
        if let Some(steps) = &r.steps {
            steps.check(&r.sequences)?;
            let values = (0..r.sequences.len()).map(|i| steps.places(i, &r.sequences[i]).len() * rule.labels().len());
            if values.sum::<usize>() > MAX_ALTERNATIVES {
                return Err(Error::limit(format!(
                    "the steps have more than {MAX_ALTERNATIVES} values, of {} labels each",
                    rule.labels().len()
                )));
            }
        }
        let sequence = |(i, tokens): (usize, &Vec<u32>)| {
            self.tokens("sequence", i, tokens, self.max_context)?;
            let places = r.steps.as_ref().map(|steps| steps.places(i, tokens));
            let purpose = Purpose::Read(rule.wants(tokens, places));
            Ok(NewSequence { tokens: tokens.clone(), forwards: once(tokens.len()), purpose, adapter: None })
        };
        r.sequences.iter().enumerate().map(sequence).collect()
    }

    fn total(&self, sequences: &[Vec<u32>], top: usize) -> Result<()> {
        self.results(sequences.iter().map(Vec::len).sum(), top)
    }

    /// Bounds what the results of a request take.
    fn results(&self, tokens: usize, top: usize) -> Result<()> {
        if tokens <= MAX_TOKENS && tokens.saturating_mul(top) <= MAX_ALTERNATIVES {
            return Ok(());
        }
        Err(Error::limit(format!(
            "the request has {tokens} tokens with {top} alternatives each; at most {MAX_TOKENS} tokens and {MAX_ALTERNATIVES} alternatives are allowed"
        )))
    }
}
