//! What completions look like: OpenAI's chat and text completions, with a few fields more.
//!
//! `seed`, `weight_version`, `weight_versions`, `token_ids`, `prompt_token_ids` and `sampling_logprob` are not OpenAI's.

use std::collections::BTreeMap;

use rewardrt::{Finish, SampledToken, Tokenizer, VersionSpan};
use serde::Serialize;

use super::respond::Usage;

/// Chat or text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Chat,
    Text,
}

/// A whole answer, or a chunk of one.
#[derive(Serialize)]
pub struct Reply {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
    /// The request's, or the one that was drawn for it.
    pub seed: u64,
    /// The weights that sampled the last token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_version: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    pub choices: Vec<Choice>,
    /// `Some(None)` is null.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
pub struct Choice {
    pub index: usize,
    #[serde(flatten)]
    pub content: Content,
    pub logprobs: Option<Logprobs>,
    pub finish_reason: Option<&'static str>,
    /// As in vLLM: more about a stop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Which weights sampled which tokens, where there was more than one version.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weight_versions: Vec<Span>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    Message {
        role: &'static str,
        content: String,
        refusal: Option<String>,
    },
    Delta {
        #[serde(skip_serializing_if = "Option::is_none")]
        role: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        content: Option<String>,
    },
    Text(String),
}

/// Tokens `start..end` were sampled by weights of this version.
#[derive(Serialize)]
pub struct Span {
    start: usize,
    end: usize,
    version: u64,
}

impl From<&VersionSpan> for Span {
    fn from(span: &VersionSpan) -> Self {
        Span { start: span.start, end: span.end, version: span.version }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
pub enum Logprobs {
    Chat {
        content: Vec<Entry>,
    },
    Text {
        tokens: Vec<String>,
        token_logprobs: Vec<f32>,
        sampling_logprobs: Vec<f32>,
        /// Null where no alternatives were asked for.
        top_logprobs: Option<Vec<BTreeMap<String, f32>>>,
        /// In characters, from the beginning of the answer.
        text_offset: Vec<usize>,
    },
}

/// A token of a chat completion.
#[derive(Serialize)]
pub struct Entry {
    #[serde(flatten)]
    token: Alternative,
    /// In the distribution that it was drawn from.
    sampling_logprob: f32,
    top_logprobs: Vec<Alternative>,
}

/// A token and its log-probability at temperature 1 over the whole vocabulary.
#[derive(Serialize)]
pub struct Alternative {
    token: String,
    logprob: f32,
    /// Null for a token that is a part of a character.
    bytes: Option<Vec<u8>>,
}

/// JSON has no infinity; vLLM writes this.
const LEAST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST }
}

/// OpenAI's name of an end.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Blocked => Finish::Stop.name(),
        other => other.name(),
    }
}

/// What OpenAI has no name for: `blocked` says that a guide came to where no token may follow.
pub fn stop_reason(finish: Finish) -> Option<&'static str> {
    (finish == Finish::Blocked).then(|| finish.name())
}

/// Spells tokens one by one, where an answer stands by now.
pub struct Speller {
    /// The token before: some decoders drop a space from what comes first.
    previous: u32,
    /// Characters so far.
    offset: usize,
}

impl Speller {
    /// After a prompt.
    pub fn after(prompt: &[u32]) -> Self {
        Speller { previous: prompt.last().copied().unwrap_or(0), offset: 0 }
    }

    fn spell(&self, tokenizer: &Tokenizer, id: u32) -> String {
        let pair = tokenizer.decode(&[self.previous, id], false);
        let previous = tokenizer.decode(&[self.previous], false);
        let added = match (pair, previous) {
            (Ok(pair), Ok(previous)) => pair.strip_prefix(&previous).map(str::to_owned),
            _ => None,
        };
        // An id that the tokenizer does not know has no text.
        added.or_else(|| tokenizer.decode(&[id], false).ok()).unwrap_or_default()
    }

    fn alternative(&self, tokenizer: &Tokenizer, id: u32, logprob: f32) -> Alternative {
        let token = self.spell(tokenizer, id);
        let bytes = (!token.contains(char::REPLACEMENT_CHARACTER)).then(|| token.as_bytes().to_vec());
        Alternative { token, logprob: finite(logprob), bytes }
    }

    /// The log-probs of the next tokens.
    pub fn logprobs(&mut self, shape: Shape, tokenizer: &Tokenizer, tokens: &[SampledToken], top: usize) -> Logprobs {
        let mut entries = Vec::with_capacity(tokens.len());
        let mut offsets = Vec::with_capacity(tokens.len());
        for t in tokens {
            let entry = Entry {
                token: self.alternative(tokenizer, t.id, t.model_logprob),
                sampling_logprob: finite(t.logprob),
                top_logprobs: t.top.iter().map(|(id, l)| self.alternative(tokenizer, *id, *l)).collect(),
            };
            offsets.push(self.offset);
            self.offset += entry.token.token.chars().count();
            self.previous = t.id;
            entries.push(entry);
        }
        match shape {
            Shape::Chat => Logprobs::Chat { content: entries },
            Shape::Text => Logprobs::Text {
                token_logprobs: entries.iter().map(|e| e.token.logprob).collect(),
                sampling_logprobs: entries.iter().map(|e| e.sampling_logprob).collect(),
                top_logprobs: (top > 0).then(|| {
                    // The sampled token is always there, as OpenAI has it.
                    let all = |e: &Entry| {
                        e.top_logprobs.iter().chain([&e.token]).map(|a| (a.token.clone(), a.logprob)).collect()
                    };
                    entries.iter().map(all).collect()
                }),
                tokens: entries.into_iter().map(|e| e.token.token).collect(),
                text_offset: offsets,
            },
        }
    }
}
