//! The sampling side of a sequence: what its next draw is made from, and when it ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::draft::prompt_lookup;
use super::sequence::{Finish, SampledToken, Timing, VersionSpan};
use crate::backend::{Sampling, TokenStats};
use crate::error::{Error, ErrorKind, Result};
use crate::guide::{CompiledGuide, GuideState};
use crate::kernels::adjust_logits::Edit;
use crate::kernels::philox::Draw;
use crate::kernels::{sample, top_k};
use crate::text::{TextStream, Tokenizer};

/// What all samples of a request have in common.
pub(crate) struct SamplePlan {
    /// `uniform` is set for each draw, edits and masks by the backend.
    pub request: sample::Request,
    pub seed: u64,
    pub min_tokens: usize,
    pub stop_ids: Vec<u32>,
    pub stop_strings: Arc<[String]>,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub bias: BTreeMap<u32, f32>,
    /// Tokens that can be drawn, one bit each; `None`: all.
    pub mask: Option<Arc<[u32]>>,
    /// The same without what ends a sequence, for the first `min_tokens` places.
    pub early_mask: Option<Arc<[u32]>>,
    pub guide: Option<CompiledGuide>,
    /// Tokens to guess ahead; 0: off.
    pub speculate: usize,
    pub stream: bool,
    pub top: usize,
}

impl SamplePlan {
    fn counts_tokens(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Tokens that can be drawn where `generated` tokens are before, but for a guide. `None`: all.
    fn fixed_mask(&self, generated: usize) -> &Option<Arc<[u32]>> {
        if generated < self.min_tokens { &self.early_mask } else { &self.mask }
    }

    /// True if only thresholds and masks can change the model's distribution.
    fn leaves_logits(&self) -> bool {
        !self.counts_tokens() && self.bias.is_empty() && self.request.inverse_temperature == 1.0
    }
}

/// The tokens of a sequence, each with how often it was generated.
#[derive(Clone, Default)]
struct TokenCounts(BTreeMap<u32, u32>);

impl TokenCounts {
    fn generated(&mut self, token: u32) {
        *self.0.entry(token).or_default() += 1;
    }

    /// The edits in rising order of tokens: those of the bias and of the tokens that occurred.
    fn edits(&self, plan: &SamplePlan) -> Vec<Edit> {
        let mut edits: BTreeMap<u32, Edit> = BTreeMap::new();
        let none = |token| Edit { token, bias: 0.0, penalty: 1.0, subtract: 0.0, raw: 0.0 };
        for (&token, &bias) in &plan.bias {
            edits.entry(token).or_insert_with(|| none(token)).bias = bias;
        }
        for (&token, &count) in &self.0 {
            let edit = edits.entry(token).or_insert_with(|| none(token));
            edit.penalty = plan.repetition_penalty;
            if count > 0 {
                edit.subtract = plan.frequency_penalty * count as f32 + plan.presence_penalty;
            }
        }
        edits.into_values().collect()
    }
}

/// One sample on its way.
pub(super) struct Sampler {
    pub plan: Arc<SamplePlan>,
    stream: u64,
    pub sample: u32,
    max_tokens: usize,
    pub tokens: Vec<SampledToken>,
    counts: TokenCounts,
    guide: Option<GuideState>,
    /// For stop strings and streams.
    text: Option<TextStream>,
    /// Tokens that were streamed.
    pub streamed: usize,
    versions: Vec<VersionSpan>,
    first_token: Option<Instant>,
    /// Guesses in the step at hand that are not refuted yet.
    drafts: Vec<u32>,
    /// The next token comes from a row that was computed from a guess.
    after_guess: bool,
    /// Rows of the steps at hand whose tokens are drawn in the step before.
    pub ahead: usize,
}

impl Sampler {
    pub fn new(plan: Arc<SamplePlan>, stream: u64, sample: u32, max_tokens: usize) -> Self {
        Sampler {
            stream,
            sample,
            max_tokens,
            tokens: Vec::new(),
            counts: TokenCounts::default(),
            guide: None,
            text: None,
            streamed: 0,
            versions: Vec::new(),
            first_token: None,
            drafts: Vec::new(),
            after_guess: false,
            ahead: 0,
            plan,
        }
    }

    /// What a sequence needs only once it runs.
    pub fn start(&mut self, prompt: &[u32]) {
        // Presence and frequency count what was generated alone.
        if self.plan.repetition_penalty != 1.0 {
            self.counts.0.extend(prompt.iter().map(|t| (*t, 0)));
        }
        self.guide = self.plan.guide.as_ref().map(CompiledGuide::start);
        if let Some(tokenizer) = &self.plan.tokenizer
            && (self.plan.stream || !self.plan.stop_strings.is_empty())
        {
            self.text = Some(TextStream::new(tokenizer.clone(), self.plan.stop_strings.clone()));
        }
    }

    /// Another sample of the same prompt, of which nothing is sampled yet.
    pub fn sibling(&self, sample: u32) -> Self {
        Sampler {
            counts: self.counts.clone(),
            guide: self.guide.clone(),
            text: self.text.clone(),
            ..Sampler::new(self.plan.clone(), self.stream, sample, self.max_tokens)
        }
    }

    /// Tokens that can be drawn where `generated` tokens are before, under the guide that stands there. `None`: all.
    fn mask(plan: &SamplePlan, guide: Option<&mut GuideState>, generated: usize) -> Result<Option<Arc<[u32]>>> {
        let fixed = plan.fixed_mask(generated);
        let Some(guide) = guide else { return Ok(fixed.clone()) };
        let mut mask = guide.mask()?;
        for (word, fixed) in mask.iter_mut().zip(fixed.iter().flat_map(|f| f.iter())) {
            *word &= fixed;
        }
        Ok(Some(mask.into()))
    }

    /// What the draw of the token at `position` needs; `None` if no token may come there.
    ///
    /// `siblings`: how many samples draw there, with the numbers from this one's on.
    pub fn draws(&mut self, position: usize, siblings: u32) -> Result<Option<Vec<Sampling>>> {
        let mask = Self::mask(&self.plan, self.guide.as_mut(), self.tokens.len())?;
        if is_empty(&mask) {
            return Ok(None);
        }
        let edits = self.counts.edits(&self.plan);
        let draw = |s| self.sampling(position, self.sample + s, edits.clone(), mask.clone());
        Ok(Some((0..siblings).map(draw).collect()))
    }

    fn sampling(&self, position: usize, sample: u32, edits: Vec<Edit>, mask: Option<Arc<[u32]>>) -> Sampling {
        // Positions are below 2^31 (config limits).
        let draw = Draw { seed: self.plan.seed, stream: self.stream, sample, position: position as u32 };
        let request = sample::Request { uniform: draw.uniform(), ..self.plan.request };
        Sampling { request, edits, mask, top: self.plan.top }
    }

    /// True if draws can be prepared before the tokens before them are known.
    pub fn foresees(&self) -> bool {
        self.guide.is_none() && !self.plan.counts_tokens() && self.plan.speculate == 0
    }

    /// Tokens that may still come after the next one.
    pub fn remaining(&self) -> usize {
        self.max_tokens.saturating_sub(self.tokens.len() + 1)
    }

    /// What the draw of the token at `position` needs, `after` more tokens than there are now; `None` if no token may come
    /// there.
    pub fn foresee(&self, position: usize, after: usize) -> Option<Sampling> {
        let mask = self.plan.fixed_mask(self.tokens.len() + after).clone();
        let edits = || self.counts.edits(&self.plan);
        (!is_empty(&mask)).then(|| self.sampling(position, self.sample, edits(), mask))
    }

    /// Guesses for the places after the next one, at most `room`, and what drawing at each of the places after them
    /// needs. `known` are all tokens of the sequence.
    pub fn guess(&mut self, known: &[u32], room: usize) -> Result<Vec<(u32, Sampling)>> {
        let most = self.plan.speculate.min(room).min(self.max_tokens - self.tokens.len() - 1);
        let mut guesses = Vec::new();
        let mut counts = self.counts.clone();
        // A copy: what a parser has seen must not depend on guesses.
        let likely = prompt_lookup(known, most);
        if likely.is_empty() {
            return Ok(guesses);
        }
        let mut guide = self.guide.clone();
        let mut mask = Self::mask(&self.plan, guide.as_mut(), self.tokens.len())?;
        for &token in likely {
            // A token that cannot be drawn, or ends the sequence, is no use.
            let allowed = mask.as_ref().is_none_or(|m| m[token as usize / 32] >> (token % 32) & 1 == 1);
            if !allowed || self.plan.stop_ids.contains(&token) {
                break;
            }
            if let Some(guide) = &mut guide
                && (guide.accept(token).is_err() || guide.is_finished())
            {
                break;
            }
            if self.plan.counts_tokens() {
                counts.generated(token);
            }
            // What goes wrong after a guess goes wrong again, in its own place, if the guess is right.
            match Self::mask(&self.plan, guide.as_mut(), self.tokens.len() + guesses.len() + 1) {
                Ok(after) if !is_empty(&after) => mask = after,
                _ => break,
            }
            let position = known.len() + guesses.len() + 1;
            guesses.push((token, self.sampling(position, self.sample, counts.edits(&self.plan), mask.clone())));
        }
        self.drafts = guesses.iter().rev().map(|(token, _)| *token).collect();
        Ok(guesses)
    }

    /// Forgets all guesses but the first `count`.
    pub fn keep_guesses(&mut self, count: usize) {
        self.drafts.drain(..self.drafts.len() - count);
    }

    /// True if `token`, just sampled, was the next guess: the row after it is already computed.
    pub fn confirms(&mut self, token: u32) -> bool {
        self.after_guess = self.drafts.pop() == Some(token);
        if !self.after_guess {
            self.drafts.clear();
        }
        self.after_guess
    }

    /// Takes a drawn token; why the sequence ends, if it does.
    pub fn accept(
        &mut self,
        drawn: sample::Drawn,
        stats: TokenStats,
        kept_ids: Vec<u32>,
        version: u64,
    ) -> Result<Option<Finish>> {
        if drawn.token == top_k::NO_TOKEN || !stats.logprob.is_finite() {
            return Err(Error::new(ErrorKind::NonFinite, "the distribution of the next token is not finite"));
        }
        let unchanged = self.plan.leaves_logits() && drawn.threshold == f32::NEG_INFINITY;
        if self.plan.counts_tokens() {
            self.counts.generated(drawn.token);
        }
        let place = self.tokens.len();
        self.tokens.push(SampledToken {
            id: drawn.token,
            // The same distribution: the same number, to the bit.
            logprob: if unchanged { stats.logprob } else { drawn.logprob },
            model_logprob: stats.logprob,
            entropy: stats.entropy,
            kept: drawn.kept,
            threshold: drawn.threshold,
            ceiling: drawn.ceiling,
            kept_ids,
            top: stats.top,
        });
        match self.versions.last_mut() {
            Some(span) if span.version == version => span.end = place + 1,
            _ => self.versions.push(VersionSpan { start: place, end: place + 1, version }),
        }
        self.first_token.get_or_insert_with(Instant::now);
        if let Some(guide) = &mut self.guide {
            if self.after_guess {
                // Each token has its allowance of work from the mask before it.
                guide.mask()?;
            }
            guide.accept(drawn.token)?;
        }
        let stopped = match &mut self.text {
            Some(text) => text.push(drawn.token)?,
            None => false,
        };
        let finished = self.guide.as_ref().is_some_and(GuideState::is_finished);
        if stopped || finished || self.plan.stop_ids.contains(&drawn.token) {
            return Ok(Some(Finish::Stop));
        }
        Ok((self.tokens.len() >= self.max_tokens).then_some(Finish::Length))
    }

    /// Text that is certain and was not streamed yet.
    pub fn take_text(&mut self) -> String {
        self.text.as_mut().map(TextStream::take).unwrap_or_default()
    }

    /// The final text, and what of it was not streamed yet.
    pub fn finish_text(&mut self) -> (Option<String>, String) {
        if let Some(text) = &mut self.text {
            let (all, rest) = text.finish();
            return (Some(all), rest);
        }
        let ids: Vec<u32> = self.tokens.iter().map(|t| t.id).collect();
        (self.plan.tokenizer.as_ref().and_then(|t| t.decode_sampled(&ids).ok()), String::new())
    }

    pub fn take_versions(&mut self) -> Vec<VersionSpan> {
        std::mem::take(&mut self.versions)
    }

    pub fn timing(&self, submitted: Instant, started: Option<Instant>) -> Timing {
        let now = Instant::now();
        let started = started.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        Timing { queued: started - submitted, prefill: first.saturating_duration_since(started), decode: now - first }
    }
}

fn is_empty(mask: &Option<Arc<[u32]>>) -> bool {
    mask.as_ref().is_some_and(|m| m.iter().all(|word| *word == 0))
}
