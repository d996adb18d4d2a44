//! What comes back.

use std::sync::Arc;

use crate::backend::{Output, TokenStats};
use crate::engine::{Finish, Finished, Sampled, SampledToken, Timing, VersionSpan};
use crate::error::{Error, Result};
use crate::score::{BoundRule, Score, Step};

/// One sampled answer.
#[derive(Clone, Debug)]
pub struct SampledSequence {
    /// Index into [`SampleRequest::prompts`](super::SampleRequest::prompts).
    pub prompt: usize,
    /// Its number among the samples of the prompt, which names its draws; with `best_of` not all numbers come back.
    pub sample: usize,
    /// What was sampled, a stop token included.
    pub tokens: Vec<SampledToken>,
    /// The decoded text without special tokens, cut at a stop string; `None` if the model has no tokenizer.
    pub text: Option<String>,
    /// Why it ended.
    pub finish: Finish,
    /// The weights that sampled its last token.
    pub weight_version: u64,
    /// Which weights sampled which of its tokens.
    pub versions: Vec<VersionSpan>,
    /// The version of the request's adapter.
    pub adapter_version: Option<u64>,
    /// How long its parts took.
    pub timing: Timing,
}

impl SampledSequence {
    /// The mean model log-probability of its tokens: what `best_of` ranks by. −∞ without tokens.
    pub fn mean_logprob(&self) -> f64 {
        let sum: f64 = self.tokens.iter().map(|t| f64::from(t.model_logprob)).sum();
        if self.tokens.is_empty() { f64::NEG_INFINITY } else { sum / self.tokens.len() as f64 }
    }
}

/// What [`LogprobRequest`](super::LogprobRequest) returns for a sequence: one entry a token after the prompt. Without a prompt the first
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
    /// The version of the request's adapter.
    pub adapter_version: Option<u64>,
}

impl SequenceLogprobs {
    /// The sum of the log-probabilities.
    pub fn sum(&self) -> f64 {
        self.logprobs.iter().flatten().map(|l| f64::from(*l)).sum()
    }
}

/// A sequence's score, and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceScore {
    /// The score; with steps the last one's, or NaN where there are none.
    pub score: Score,
    /// The scores of the request's steps, in the order of their places; without steps there are none.
    pub steps: Vec<Step>,
    /// Names of `score.values`.
    pub labels: Arc<[String]>,
    /// The rule, as [`Rule::parse`] reads it.
    pub rule: String,
    /// The weights that produced it.
    pub weight_version: u64,
    /// The version of the request's adapter.
    pub adapter_version: Option<u64>,
}

/// How the samples of a job become its result.
#[derive(Clone, Copy)]
pub(crate) struct Samples {
    /// Samples drawn for each prompt.
    pub drawn: usize,
    /// How many of them are returned; fewer than drawn: the best ones, best first.
    pub returned: usize,
    pub weight_version: u64,
    pub adapter_version: Option<u64>,
}

pub(crate) fn read_samples(samples: Samples, finished: Vec<Finished>) -> Result<Vec<SampledSequence>> {
    let Samples { drawn, returned, weight_version, adapter_version } = samples;
    let read = |(i, finished)| match finished {
        Finished::Sampled(Sampled { tokens, finish, text, versions, timing }) => {
            let weight_version = versions.last().map_or(weight_version, |span| span.version);
            let (prompt, sample) = (i / drawn, i % drawn);
            Ok(SampledSequence {
                prompt,
                sample,
                tokens,
                text,
                finish,
                weight_version,
                versions,
                adapter_version,
                timing,
            })
        }
        Finished::Read { .. } => Err(Error::internal("a sampling job with a scoring result")),
    };
    let mut all: Vec<SampledSequence> = finished.into_iter().enumerate().map(read).collect::<Result<_>>()?;
    if returned < drawn {
        // A stable sort: of equal ones the smaller number comes first.
        all.sort_by(|a, b| a.prompt.cmp(&b.prompt).then(b.mean_logprob().total_cmp(&a.mean_logprob())));
        let mut rank = 0;
        let mut last = usize::MAX;
        all.retain(|s| {
            rank = if s.prompt == last { rank + 1 } else { 0 };
            last = s.prompt;
            rank < returned
        });
    }
    Ok(all)
}

/// `scored[i]`: how many entries sequence i has, `None`s at its start included.
pub(crate) fn read_logprobs(
    scored: &[usize],
    adapter_version: Option<u64>,
    finished: Vec<Finished>,
) -> Result<Vec<SequenceLogprobs>> {
    let read = |(finished, &entries): (Finished, &usize)| {
        let (outputs, weight_version) = outputs(finished)?;
        let missing = entries - outputs.len();
        let mut result = SequenceLogprobs {
            logprobs: vec![None; missing],
            entropies: vec![None; missing],
            top: vec![Vec::new(); missing],
            weight_version,
            adapter_version,
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

/// `places[i]`: where the steps of sequence i are, if there are steps.
pub(crate) fn read_scores(
    rule: &BoundRule,
    places: Option<&[Vec<usize>]>,
    adapter_version: Option<u64>,
    finished: Vec<Finished>,
) -> Result<Vec<SequenceScore>> {
    let (labels, name) = (Arc::<[String]>::from(rule.labels()), rule.rule.to_string());
    let read = |(i, finished): (usize, Finished)| {
        let (outputs, weight_version) = outputs(finished)?;
        let scores = outputs.iter().map(|output| rule.read(output)).collect::<Result<Vec<Score>>>()?;
        let (score, steps) = match places {
            None => (scores.into_iter().next().ok_or_else(|| Error::internal("a score without its logits"))?, vec![]),
            Some(places) => {
                let score = scores.last().cloned().unwrap_or_else(|| Score::none(labels.len()));
                let step = |(&position, score)| Step { position, score };
                (score, places[i].iter().zip(scores).map(step).collect())
            }
        };
        Ok(SequenceScore { score, steps, labels: labels.clone(), rule: name.clone(), weight_version, adapter_version })
    };
    finished.into_iter().enumerate().map(read).collect()
}

/// What was read, and the version of the weights.
fn outputs(finished: Finished) -> Result<(Vec<Output>, u64)> {
    match finished {
        Finished::Read { outputs, version } => Ok((outputs, version)),
        Finished::Sampled(_) => Err(Error::internal("a scoring job with a sampling result")),
    }
}
