//! One sequence on its way through the engine: what is known, what is computed, what is still wanted.

use std::sync::Arc;

use super::job::JobState;
use crate::backend::{Output, Want};
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::philox::Draw;
use crate::kernels::{sample, top_k};
use crate::text::Tokenizer;

/// Why a sampled sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens`, or the model's context is full.
    Length,
    /// The job was cancelled.
    Cancelled,
}

impl Finish {
    /// `stop`, `length` or `cancelled`.
    pub const fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        }
    }
}

/// One sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: u32,
    /// Its log-probability in the distribution it was drawn from.
    pub logprob: f32,
    /// Its log-probability at temperature 1 over the whole vocabulary.
    pub model_logprob: f32,
    /// Entropy of the model's distribution at this place, in nats.
    pub entropy: f32,
    /// Tokens that could have been drawn.
    pub kept: u32,
    /// Smallest penalised logit / temperature among them.
    pub threshold: f32,
    /// The most likely tokens with their model log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a sampling sequence needs to know.
#[derive(Clone)]
pub(crate) struct SamplePlan {
    /// `uniform` and `seen_row` are set for each draw.
    pub request: sample::Request,
    pub seed: u64,
    pub stream: u64,
    pub sample: u32,
    pub max_tokens: usize,
    pub stop_ids: Arc<[u32]>,
    pub stop_strings: Arc<[String]>,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub vocab_size: usize,
    pub top: usize,
}

/// What a sequence is for.
pub(crate) enum Purpose {
    Sample(Box<SamplePlan>),
    /// Positions in rising order, each with what it wants.
    Read(Vec<(usize, Want)>),
}

/// A sequence as the caller hands it over.
pub(crate) struct NewSequence {
    pub tokens: Vec<u32>,
    /// Positions below this are one forward in the reference implementation (it matters to dynamic rope alone).
    pub forward_len: usize,
    pub purpose: Purpose,
}

impl NewSequence {
    /// Positions it can grow to.
    pub(crate) fn positions(&self) -> usize {
        match &self.purpose {
            // The last token is sampled and not computed.
            Purpose::Sample(plan) => self.tokens.len() + plan.max_tokens - 1,
            // Nothing to compute.
            Purpose::Read(wants) if wants.is_empty() => 0,
            Purpose::Read(_) => self.tokens.len(),
        }
    }
}

/// A sequence's result.
pub(crate) enum Finished {
    Sampled { tokens: Vec<SampledToken>, finish: Finish, text: Option<String> },
    Read(Vec<Output>),
}

pub(super) struct Sequence {
    pub job: Arc<JobState>,
    pub index: usize,
    pub tokens: Vec<u32>,
    pub forward_len: usize,
    /// Positions whose keys and values are in the cache.
    pub computed: usize,
    pub blocks: Vec<u32>,
    purpose: Purpose,
    queued_tokens: usize,
    prompt_len: usize,
    sampled: Vec<SampledToken>,
    seen: Vec<u32>,
    outputs: Vec<Output>,
}

impl Sequence {
    pub(super) fn new(job: Arc<JobState>, index: usize, new: NewSequence) -> Self {
        let queued_tokens = new.positions();
        let NewSequence { tokens, forward_len, purpose } = new;
        Sequence {
            job,
            index,
            queued_tokens,
            prompt_len: tokens.len(),
            tokens,
            forward_len,
            computed: 0,
            blocks: Vec::new(),
            purpose,
            sampled: Vec::new(),
            seen: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// Gives it its KV blocks; what a running sequence needs beyond them is allocated now, not while it waits.
    pub(super) fn start(&mut self, blocks: Vec<u32>) {
        self.blocks = blocks;
        if let Purpose::Sample(plan) = &self.purpose
            && plan.request.repetition_penalty != 1.0
        {
            self.seen.resize(plan.vocab_size.div_ceil(32), 0);
            self.tokens.iter().for_each(|t| mark(&mut self.seen, *t));
        }
    }

    /// Positions it can ever put into the cache.
    pub(super) fn most_positions(&self) -> usize {
        match &self.purpose {
            Purpose::Sample(plan) => self.prompt_len + plan.max_tokens - 1,
            Purpose::Read(_) => self.needed(),
        }
    }

    /// What it counts for in the queue.
    pub(super) fn queued_tokens(&self) -> usize {
        self.queued_tokens
    }

    /// Positions that must be computed before the next result.
    pub(super) fn needed(&self) -> usize {
        match &self.purpose {
            Purpose::Sample(_) => self.tokens.len(),
            Purpose::Read(wants) => wants.last().map_or(0, |(position, _)| position + 1),
        }
    }

    /// The length of the forward that position `p` belongs to.
    pub(super) fn forward_len_at(&self, p: usize) -> usize {
        if p < self.forward_len { self.forward_len } else { p + 1 }
    }

    /// What position `p` wants, when it is computed.
    pub(super) fn want_at(&self, p: usize) -> Option<Want> {
        match &self.purpose {
            Purpose::Sample(plan) => (p + 1 == self.tokens.len()).then(|| self.draw(plan, p + 1)),
            Purpose::Read(wants) => {
                let i = wants.binary_search_by_key(&p, |(position, _)| *position).ok()?;
                Some(wants[i].1.clone())
            }
        }
    }

    fn draw(&self, plan: &SamplePlan, position: usize) -> Want {
        // Positions are below 2^31 (config limits).
        let draw = Draw { seed: plan.seed, stream: plan.stream, sample: plan.sample, position: position as u32 };
        let seen = (!self.seen.is_empty()).then(|| self.seen.as_slice().into());
        let request = sample::Request { uniform: draw.uniform(), ..plan.request };
        Want::Sample { request, seen, top: plan.top }
    }

    /// Takes an output of the row at `position`; `Some` when the sequence is finished.
    pub(super) fn accept(&mut self, position: usize, output: Output) -> Result<Option<Finished>> {
        let nonfinite = |what: &str| {
            Error::new(
                ErrorKind::NonFinite,
                format!("sequence {}: {what} at position {position} is not finite", self.index),
            )
        };
        match (&self.purpose, output) {
            (Purpose::Sample(plan), Output::Sampled { drawn, stats }) => {
                if drawn.token == top_k::NO_TOKEN || !stats.logprob.is_finite() {
                    return Err(nonfinite("the distribution of the next token"));
                }
                let request = &plan.request;
                let unchanged = request.inverse_temperature == 1.0
                    && request.repetition_penalty == 1.0
                    && drawn.threshold == f32::NEG_INFINITY;
                self.tokens.push(drawn.token);
                if !self.seen.is_empty() {
                    mark(&mut self.seen, drawn.token);
                }
                self.sampled.push(SampledToken {
                    id: drawn.token,
                    // The same distribution: the same number, to the bit.
                    logprob: if unchanged { stats.logprob } else { drawn.logprob },
                    model_logprob: stats.logprob,
                    entropy: stats.entropy,
                    kept: drawn.kept,
                    threshold: drawn.threshold,
                    top: stats.top,
                });
                Ok(self.stop_reason().map(|finish| self.finish_sampling(finish)))
            }
            (Purpose::Read(wants), output) => {
                let finite = match &output {
                    Output::Logits(logits) => logits.iter().all(|l| l.is_finite()),
                    Output::Logprob(stats) => !stats.logprob.is_nan() && stats.logprob != f32::INFINITY,
                    Output::Sampled { .. } => true,
                };
                if !finite {
                    return Err(nonfinite("the result"));
                }
                let count = wants.len();
                self.outputs.push(output);
                Ok((self.outputs.len() == count).then(|| Finished::Read(std::mem::take(&mut self.outputs))))
            }
            _ => Err(Error::internal("an output of another kind than was asked for")),
        }
    }

    fn stop_reason(&self) -> Option<Finish> {
        let Purpose::Sample(plan) = &self.purpose else { return None };
        let last = self.sampled.last()?;
        if plan.stop_ids.contains(&last.id) || self.stop_string_hit(plan) {
            return Some(Finish::Stop);
        }
        (self.sampled.len() >= plan.max_tokens).then_some(Finish::Length)
    }

    /// Looks for a stop string in the text of the last tokens, enough of them to hold the longest one.
    fn stop_string_hit(&self, plan: &SamplePlan) -> bool {
        let Some(tokenizer) = plan.tokenizer.as_ref().filter(|_| !plan.stop_strings.is_empty()) else { return false };
        let longest = plan.stop_strings.iter().map(String::len).max().unwrap_or(0);
        let generated = &self.tokens[self.prompt_len..];
        let hit = |ids: &[u32]| {
            let text = tokenizer.decode_sampled(ids).unwrap_or_default();
            plan.stop_strings.iter().any(|s| text.contains(s.as_str()))
        };
        // Every token but a special one is at least a byte; the rest is room for those.
        hit(&generated[generated.len().saturating_sub(longest + 16)..]) && hit(generated)
    }

    /// Ends a sampling sequence with what it has.
    pub(super) fn finish_sampling(&mut self, finish: Finish) -> Finished {
        let text = match &self.purpose {
            Purpose::Sample(plan) => plan.tokenizer.as_ref().and_then(|tokenizer| {
                let mut text = tokenizer.decode_sampled(&self.tokens[self.prompt_len..]).ok()?;
                let cut = plan.stop_strings.iter().filter_map(|s| text.find(s.as_str())).min();
                text.truncate(cut.unwrap_or(text.len()));
                Some(text)
            }),
            Purpose::Read(_) => None,
        };
        Finished::Sampled { tokens: std::mem::take(&mut self.sampled), finish, text }
    }

    pub(super) fn is_sampling(&self) -> bool {
        matches!(self.purpose, Purpose::Sample(_))
    }
}

fn mark(seen: &mut [u32], token: u32) {
    if let Some(word) = seen.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}
