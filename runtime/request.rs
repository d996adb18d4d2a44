//! What can be asked of a model, checked field by field before anything is queued.

use std::sync::Arc;

use crate::backend::{Output, TokenStats, Want};
use crate::engine::{Finish, Finished, NewSequence, Purpose, SamplePlan, SampledToken};
use crate::error::{Error, Result};
use crate::kernels::{sample, top_k};
use crate::model::ModelSpec;
use crate::score::{BoundRule, Rule, Score};
use crate::text::Tokenizer;

/// Sequences in one request.
pub const MAX_SEQUENCES: usize = 1 << 16;
/// Tokens in one request, what it may generate included.
const MAX_TOKENS: usize = 1 << 24;
/// Alternatives (8 bytes each) in the results of one request.
const MAX_ALTERNATIVES: usize = 1 << 26;
const MAX_STOPS: usize = 64;
/// Below this a temperature is greedy: 1/T would lose the logits' differences to f32's range.
const GREEDY_BELOW: f32 = 1e-5;

/// Samples from a policy.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// Token ids of each prompt; at least one token each.
    pub prompts: Vec<Vec<u32>>,
    /// Samples of each prompt.
    pub n: usize,
    /// Tokens to generate at most; fewer if the model's context ends first.
    pub max_tokens: usize,
    /// ≥ 0; 0 (or below 1e-5) is greedy, infinity is uniform.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0: all.
    pub top_k: usize,
    /// Keep the most likely tokens that hold this much of the probability; in [0, 1], 1: all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; in [0, 1], 0: all.
    pub min_p: f32,
    /// > 0; logits of tokens in the sequence are divided (positive) or multiplied (negative) by it; 1: off.
    pub repetition_penalty: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// The random stream of each prompt; empty: its index. (seed, stream, sample, position) names a draw, so a prompt
    /// can be replayed alone by naming its stream.
    pub streams: Vec<u64>,
    /// Text that ends a sequence; needs the model's tokenizer. The text is cut before it, the ids are kept.
    pub stop: Vec<String>,
    /// Tokens that end a sequence, besides the model's own end-of-sequence tokens.
    pub stop_ids: Vec<u32>,
    /// Do not stop at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Report this many of the most likely tokens at each place (at most 128).
    pub top_logprobs: usize,
}

impl Default for SampleRequest {
    fn default() -> Self {
        SampleRequest {
            prompts: Vec::new(),
            n: 1,
            max_tokens: 128,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            streams: Vec::new(),
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            top_logprobs: 0,
        }
    }
}

/// One sampled answer.
#[derive(Clone, Debug)]
pub struct SampledSequence {
    /// Index into [`SampleRequest::prompts`].
    pub prompt: usize,
    /// 0..n.
    pub sample: usize,
    /// What was sampled, a stop token included.
    pub tokens: Vec<SampledToken>,
    /// The decoded text without special tokens, cut at a stop string; `None` if the model has no tokenizer.
    pub text: Option<String>,
    /// Why it ended.
    pub finish: Finish,
    /// The weights that produced it.
    pub weight_version: u64,
}

/// Log-probabilities of given tokens.
#[derive(Clone, Debug, Default)]
pub struct LogprobRequest {
    /// Whole sequences.
    pub sequences: Vec<Vec<u32>>,
    /// For each sequence, how many leading tokens are a prompt, which is not scored; empty: 0 for all.
    pub prompt_lens: Vec<usize>,
    /// Report this many of the most likely tokens at each place (at most 128).
    pub top_logprobs: usize,
}

impl LogprobRequest {
    /// Scores each completion after its prompt.
    pub fn completions(pairs: impl IntoIterator<Item = (Vec<u32>, Vec<u32>)>) -> Self {
        let mut request = LogprobRequest::default();
        for (mut prompt, completion) in pairs {
            request.prompt_lens.push(prompt.len());
            prompt.extend(completion);
            request.sequences.push(prompt);
        }
        request
    }
}

/// What [`LogprobRequest`] returns for a sequence: one entry a token after the prompt. Without a prompt the first
/// entries are `None`: nothing comes before the first token.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceLogprobs {
    /// ln p(token | all before it), temperature 1, whole vocabulary.
    pub logprobs: Vec<Option<f32>>,
    /// Entropy of the distribution the token is from, in nats.
    pub entropies: Vec<Option<f32>>,
    /// The most likely tokens at this place, best first.
    pub top: Vec<Vec<(u32, f32)>>,
    /// The weights that produced it.
    pub weight_version: u64,
}

impl SequenceLogprobs {
    /// The sum of the log-probabilities.
    pub fn sum(&self) -> f64 {
        self.logprobs.iter().flatten().map(|l| f64::from(*l)).sum()
    }
}

/// Scores sequences.
#[derive(Clone, Debug, Default)]
pub struct ScoreRequest {
    /// Token ids of each sequence; at least one token each.
    pub sequences: Vec<Vec<u32>>,
    /// `None`: the rule that the checkpoint's head implies.
    pub rule: Option<Rule>,
}

/// A sequence's score, and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceScore {
    /// The score.
    pub score: Score,
    /// Names of `score.values`.
    pub labels: Arc<[String]>,
    /// The rule, as [`Rule::parse`] reads it.
    pub rule: String,
    /// The weights that produced it.
    pub weight_version: u64,
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

    pub(crate) fn sample(&self, r: &SampleRequest) -> Result<Vec<NewSequence>> {
        self.count("samples", r.prompts.len().saturating_mul(r.n))?;
        let within = |name: &str, value: f32, ok: bool, range: &str| match ok {
            true => Ok(()),
            false => Err(Error::argument(format!("{name} is {value}, it must be {range}"))),
        };
        within("temperature", r.temperature, r.temperature >= 0.0, "0 or greater")?;
        within("top_p", r.top_p, (0.0..=1.0).contains(&r.top_p), "from 0 to 1")?;
        within("min_p", r.min_p, (0.0..=1.0).contains(&r.min_p), "from 0 to 1")?;
        let penalty = r.repetition_penalty;
        within("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "a number greater than 0")?;
        if r.max_tokens == 0 {
            return Err(Error::argument("max_tokens is 0, it must be at least 1"));
        }
        if !r.streams.is_empty() && r.streams.len() != r.prompts.len() {
            return Err(Error::argument(format!("{} streams for {} prompts", r.streams.len(), r.prompts.len())));
        }
        let stops = r.stop.len().max(r.stop_ids.len());
        if stops > MAX_STOPS || r.stop.iter().any(String::is_empty) {
            return Err(Error::argument(format!(
                "stop strings must not be empty, and at most {MAX_STOPS} stops are allowed"
            )));
        }
        if !r.stop.is_empty() && self.tokenizer.is_none() {
            return Err(Error::argument("stop strings need a tokenizer, and the model has no tokenizer.json"));
        }
        let mut stop_ids = r.stop_ids.clone();
        if !r.ignore_eos {
            stop_ids.extend(&self.spec.eos_token_ids);
        }
        let greedy = r.temperature < GREEDY_BELOW;
        let request = sample::Request {
            uniform: 0.0,
            inverse_temperature: if greedy { -1.0 } else { 1.0 / r.temperature },
            top_k: u32::try_from(r.top_k).unwrap_or(0),
            top_p: r.top_p,
            min_p: r.min_p,
            repetition_penalty: penalty,
            seen_row: 0,
            active: 1,
        };
        let plan = SamplePlan {
            request,
            seed: r.seed,
            stream: 0,
            sample: 0,
            max_tokens: 0,
            stop_ids: stop_ids.into(),
            stop_strings: r.stop.clone().into(),
            tokenizer: self.tokenizer.cloned(),
            vocab_size: self.spec.vocab_size,
            top: self.top(r.top_logprobs)?,
        };
        let mut total = 0usize;
        let mut sequences = Vec::new();
        for (i, prompt) in r.prompts.iter().enumerate() {
            self.tokens("prompt", i, prompt, self.max_context - 1)?;
            let max_tokens = r.max_tokens.min(self.max_context - prompt.len());
            total = total.saturating_add((prompt.len() + max_tokens).saturating_mul(r.n));
            self.results(total, plan.top)?;
            let stream = r.streams.get(i).copied().unwrap_or(i as u64);
            for sample in 0..r.n {
                // n is at most MAX_SEQUENCES.
                let plan = SamplePlan { stream, sample: sample as u32, max_tokens, ..plan.clone() };
                sequences.push(NewSequence {
                    tokens: prompt.clone(),
                    forward_len: prompt.len(),
                    purpose: Purpose::Sample(Box::new(plan)),
                });
            }
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
                forward_len: if prompt_len > 0 { prompt_len } else { tokens.len() },
                purpose: Purpose::Read((prompt_len.max(1)..tokens.len()).map(want).collect()),
            })
        };
        r.sequences.iter().enumerate().map(sequence).collect()
    }

    pub(crate) fn score(&self, r: &ScoreRequest, rule: &BoundRule) -> Result<Vec<NewSequence>> {
        self.count("sequences", r.sequences.len())?;
        self.total(&r.sequences, 0)?;
        let sequence = |(i, tokens): (usize, &Vec<u32>)| {
            self.tokens("sequence", i, tokens, self.max_context)?;
            let purpose = Purpose::Read(rule.wants(tokens));
            Ok(NewSequence { tokens: tokens.clone(), forward_len: tokens.len(), purpose })
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

pub(crate) fn read_samples(n: usize, weight_version: u64, finished: Vec<Finished>) -> Result<Vec<SampledSequence>> {
    let read = |(i, finished)| match finished {
        Finished::Sampled { tokens, finish, text } => {
            Ok(SampledSequence { prompt: i / n, sample: i % n, tokens, text, finish, weight_version })
        }
        Finished::Read(_) => Err(Error::internal("a sampling job with a scoring result")),
    };
    finished.into_iter().enumerate().map(read).collect()
}

/// `scored[i]`: how many entries sequence i has, `None`s at its start included.
pub(crate) fn read_logprobs(
    scored: &[usize],
    weight_version: u64,
    finished: Vec<Finished>,
) -> Result<Vec<SequenceLogprobs>> {
    let read = |(finished, &entries): (Finished, &usize)| {
        let outputs = outputs(finished)?;
        let missing = entries - outputs.len();
        let mut result = SequenceLogprobs {
            logprobs: vec![None; missing],
            entropies: vec![None; missing],
            top: vec![Vec::new(); missing],
            weight_version,
        };
        for output in outputs {
            let Output::Logprob(TokenStats { logprob, entropy, top }) = output else {
                return Err(Error::internal("a log-prob job with another result"));
            };
            result.logprobs.push(Some(logprob));
            result.entropies.push(Some(entropy));
            result.top.push(top);
        }
        Ok(result)
    };
    finished.into_iter().zip(scored).map(read).collect()
}

pub(crate) fn read_scores(
    rule: &BoundRule,
    weight_version: u64,
    finished: Vec<Finished>,
) -> Result<Vec<SequenceScore>> {
    let (labels, name) = (Arc::<[String]>::from(rule.labels()), rule.rule.to_string());
    let read = |finished| {
        let score = rule.read(&outputs(finished)?)?;
        Ok(SequenceScore { score, labels: labels.clone(), rule: name.clone(), weight_version })
    };
    finished.into_iter().map(read).collect()
}

fn outputs(finished: Finished) -> Result<Vec<Output>> {
    match finished {
        Finished::Read(outputs) => Ok(outputs),
        Finished::Sampled { .. } => Err(Error::internal("a scoring job with a sampling result")),
    }
}
