//! One sequence on its way through the engine: what is known, what is computed, what is still wanted.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::job::JobState;
use super::kv::{Key, Path};
use super::sampler::{SamplePlan, Sampler};
use crate::backend::{Output, Want};
use crate::error::{Error, ErrorKind, Result};

/// Why a sampled sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, a stop string, or the guide allows nothing more.
    Stop,
    /// `max_tokens`, or the model's context is full.
    Length,
    /// The job was cancelled, or its deadline passed.
    Cancelled,
    /// No token may come next: the guide and the sets of banned and allowed tokens leave none.
    Blocked,
}

impl Finish {
    /// `stop`, `length`, `cancelled` or `blocked`.
    pub const fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
            Finish::Blocked => "blocked",
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
    /// Smallest (edited logit / temperature) among them. With `ceiling` it rebuilds the set: ties share a fate.
    pub threshold: f32,
    /// Largest one among them; infinity unless `typical_p` cuts from above too.
    pub ceiling: f32,
    /// The tokens that could have been drawn, where they were asked for and no more than `kept_ids` of them.
    pub kept_ids: Vec<u32>,
    /// The most likely tokens with their model log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Which weights sampled which tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionSpan {
    /// First token, from 0.
    pub start: usize,
    /// One past the last token.
    pub end: usize,
    /// The version of the weights.
    pub version: u64,
}

/// How long the parts of a sequence took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// From submission to its first step.
    pub queued: Duration,
    /// From there to its first token.
    pub prefill: Duration,
    /// From there to its end.
    pub decode: Duration,
}

/// What a sequence is for.
pub(crate) enum Purpose {
    /// `samples` answers, of which this is the first.
    Sample { plan: Arc<SamplePlan>, stream: u64, samples: u32, max_tokens: usize },
    /// Positions in rising order, each with what it wants.
    Read(Vec<(usize, Want)>),
}

/// What an adapter is at one time. Replacing an adapter gives it another content; whoever began with this one keeps it.
#[derive(Debug)]
pub(crate) struct AdapterContent {
    /// No other content of the process ever has it; not 0.
    pub id: u64,
    /// The version that results carry.
    pub version: u64,
}

/// The adapter of a running sequence.
#[derive(Clone)]
pub(super) struct Adapted {
    pub content: Arc<AdapterContent>,
    /// Where the executor has it; its own as long as the content is in use.
    pub slot: u32,
}

/// A sequence as the caller hands it over.
pub(crate) struct NewSequence {
    pub tokens: Vec<u32>,
    /// Stretches of positions that are one forward in the reference implementation (it matters to dynamic rope alone);
    /// every other position is a forward of its own.
    pub forwards: Vec<Range<usize>>,
    pub purpose: Purpose,
    pub adapter: Option<Arc<AdapterContent>>,
}

impl NewSequence {
    /// Results it has.
    pub(crate) fn results(&self) -> usize {
        if let Purpose::Sample { samples, .. } = self.purpose { samples as usize } else { 1 }
    }

    /// Positions that each of its samples can grow to.
    pub(crate) fn positions(&self) -> usize {
        match &self.purpose {
            // The last token is sampled and not computed.
            Purpose::Sample { max_tokens, .. } => self.tokens.len() + max_tokens - 1,
            // Nothing to compute.
            Purpose::Read(wants) if wants.is_empty() => 0,
            Purpose::Read(_) => self.tokens.len(),
        }
    }
}

/// A finished sample.
pub(crate) struct Sampled {
    pub tokens: Vec<SampledToken>,
    pub finish: Finish,
    pub text: Option<String>,
    pub versions: Vec<VersionSpan>,
    pub timing: Timing,
}

/// A sequence's result.
pub(crate) enum Finished {
    Sampled(Sampled),
    Read { outputs: Vec<Output>, version: u64 },
}

/// A sequence's tokens, with what their keys in the cache depend on.
pub(super) struct Tokens {
    pub ids: Vec<u32>,
    forwards: Vec<Range<usize>>,
    /// From which length of a forward on its angles depend on it.
    length_dependent_above: Option<usize>,
}

impl Tokens {
    /// The length of the forward that position `p` belongs to.
    pub fn forward_len(&self, p: usize) -> usize {
        self.forwards.iter().find(|f| f.contains(&p)).map_or(p + 1, |f| f.end)
    }

    pub fn key(&self, p: usize) -> Key {
        let length = self.length_dependent_above.map(|trained| (self.forward_len(p), trained));
        // Lengths are below 2^31 (config limits).
        (self.ids[p], length.filter(|(len, trained)| len > trained).map_or(0, |(len, _)| len as u32))
    }
}

pub(super) enum Role {
    Sample {
        sampler: Box<Sampler>,
        /// Answers to the same prompt that begin where this one samples its first token.
        siblings: u32,
    },
    Read {
        wants: Vec<(usize, Want)>,
        outputs: Vec<Output>,
    },
}

pub(super) struct Sequence {
    pub job: Arc<JobState>,
    /// The job's number in its lane.
    pub job_number: u64,
    /// Of its (first) result in the job.
    pub index: usize,
    /// Order of first admission: the older one keeps its blocks.
    pub seniority: u64,
    pub tokens: Tokens,
    pub path: Path,
    pub role: Role,
    pub adapter: Option<Adapted>,
    prompt_len: usize,
    started: Option<Instant>,
    /// Positions that were computed at least once.
    pub seen: usize,
    /// It gave up its blocks while the step at hand was being packed.
    pub preempted: bool,
    /// It has rows in the step at hand.
    pub packed: bool,
    /// Its result was handed over.
    pub ended: bool,
}

impl Sequence {
    pub fn new(
        job: Arc<JobState>,
        job_number: u64,
        index: usize,
        new: NewSequence,
        adapter: Option<Adapted>,
        path: Path,
        length_dependent_above: Option<usize>,
    ) -> Self {
        let role = match new.purpose {
            Purpose::Sample { plan, stream, samples, max_tokens } => {
                Role::Sample { sampler: Box::new(Sampler::new(plan, stream, 0, max_tokens)), siblings: samples - 1 }
            }
            Purpose::Read(wants) => Role::Read { wants, outputs: Vec::new() },
        };
        Sequence {
            job,
            job_number,
            index,
            seniority: 0,
            prompt_len: new.tokens.len(),
            tokens: Tokens { ids: new.tokens, forwards: new.forwards, length_dependent_above },
            path,
            role,
            adapter,
            started: None,
            seen: 0,
            preempted: false,
            packed: false,
            ended: false,
        }
    }

    /// Lets it run for the first time, or again.
    pub fn start(&mut self, seniority: u64) {
        if self.started.is_none() {
            self.started = Some(Instant::now());
            self.seniority = seniority;
            if let Role::Sample { sampler, .. } = &mut self.role {
                sampler.start(&self.tokens.ids);
            }
        }
    }

    /// Another answer to the same prompt, before either has a token.
    pub fn sibling(&self, number: u32, path: Path) -> Option<Self> {
        let Role::Sample { sampler, .. } = &self.role else { return None };
        Some(Sequence {
            job: self.job.clone(),
            index: self.index + number as usize,
            tokens: Tokens { ids: self.tokens.ids.clone(), forwards: self.tokens.forwards.clone(), ..self.tokens },
            path,
            adapter: self.adapter.clone(),
            role: Role::Sample { sampler: Box::new(sampler.sibling(sampler.sample + number)), siblings: 0 },
            ..*self
        })
    }

    /// Leaves itself `count` answers and gives the others to a sequence of their own.
    pub fn split(&mut self, count: u32, path: Path) -> Option<Self> {
        let mut later = self.sibling(count, path)?;
        if let (Role::Sample { siblings, .. }, Role::Sample { siblings: theirs, .. }) =
            (&mut self.role, &mut later.role)
        {
            *theirs = *siblings - count;
            *siblings = count - 1;
        }
        Some(later)
    }

    /// When it first ran.
    pub fn started(&self) -> Option<Instant> {
        self.started
    }

    /// Results that it still owes.
    pub fn results(&self) -> usize {
        if let Role::Sample { siblings, .. } = self.role { 1 + siblings as usize } else { 1 }
    }

    /// Positions that must be computed before the next result.
    pub fn needed(&self) -> usize {
        match &self.role {
            Role::Sample { .. } => self.tokens.ids.len(),
            Role::Read { wants, .. } => wants.last().map_or(0, |(position, _)| position + 1),
        }
    }

    /// Positions that may come from the cache: the next one has an output, so it must be computed.
    pub fn cacheable(&self) -> usize {
        match &self.role {
            Role::Sample { .. } => self.tokens.ids.len() - 1,
            Role::Read { wants, outputs } => wants.get(outputs.len()).map_or(0, |(position, _)| *position),
        }
    }

    /// Positions of the prompt, or of the text that is read.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// What position `p` of a text wants, if it has not got it yet.
    pub fn read_at(&self, p: usize) -> Option<Want> {
        let Role::Read { wants, outputs } = &self.role else { return None };
        let i = wants.binary_search_by_key(&p, |(position, _)| *position).ok()?;
        (i >= outputs.len()).then(|| wants[i].1.clone())
    }

    /// Takes an output of a row at `position` under weights of `version`; the result when it is finished.
    pub fn accept(&mut self, position: usize, output: Output, version: u64) -> Result<Option<Finished>> {
        let place = |e: Error| e.at(format!("sequence {}, position {position}", self.index));
        match (&mut self.role, output) {
            (Role::Sample { sampler, .. }, Output::Sampled { drawn, stats, kept_ids }) => {
                let finish = sampler.accept(drawn, stats, kept_ids, version).map_err(place)?;
                self.tokens.ids.push(drawn.token);
                Ok(finish.map(|finish| self.finish_sampling(finish)))
            }
            (Role::Read { wants, outputs }, output) => {
                let finite = match &output {
                    Output::Logits(logits) => logits.iter().all(|l| l.is_finite()),
                    Output::Logprob(stats) => !stats.logprob.is_nan() && stats.logprob != f32::INFINITY,
                    Output::Sampled { .. } => true,
                };
                if !finite {
                    return Err(place(Error::new(ErrorKind::NonFinite, "the result is not finite")));
                }
                outputs.push(output);
                Ok((outputs.len() == wants.len()).then(|| Finished::Read { outputs: std::mem::take(outputs), version }))
            }
            _ => Err(Error::internal("an output of another kind than was asked for")),
        }
    }

    /// Hands what was sampled since the last time to a job that streams.
    pub fn stream(&mut self) {
        if let Role::Sample { sampler, .. } = &mut self.role
            && sampler.plan.stream
        {
            let text = sampler.take_text();
            self.job.stream(self.index, sampler.streamed, &sampler.tokens[sampler.streamed..], text, None);
            sampler.streamed = sampler.tokens.len();
        }
    }

    /// Ends a sampling sequence with what it has, and its siblings with nothing; how many results these are.
    pub fn finish_all(&mut self, finish: Finish, results: &mut Vec<(Arc<JobState>, usize, Finished)>) -> usize {
        let count = self.results();
        for _ in 0..count {
            let result = self.finish_sampling(finish);
            results.push((self.job.clone(), self.index, result));
            self.index += 1;
        }
        count
    }

    /// Ends a sampling sequence with what it has.
    fn finish_sampling(&mut self, finish: Finish) -> Finished {
        let (submitted, started) = (self.job.submitted, self.started);
        let Role::Sample { sampler, .. } = &mut self.role else {
            return Finished::Read { outputs: Vec::new(), version: 0 };
        };
        let (text, rest) = sampler.finish_text();
        let new = &sampler.tokens[sampler.streamed..];
        self.job.stream(self.index, sampler.streamed, new, rest, Some(finish));
        Finished::Sampled(Sampled {
            text,
            finish,
            versions: sampler.take_versions(),
            timing: sampler.timing(submitted, started),
            tokens: std::mem::take(&mut sampler.tokens),
        })
    }
}
