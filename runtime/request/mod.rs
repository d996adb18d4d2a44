//! What can be asked of a model; [`check`] goes through it field by field before anything is queued.

mod check;
mod results;

pub(crate) use check::{Checker, Prompt};
pub use results::{SampledSequence, SequenceLogprobs, SequenceScore};
pub(crate) use results::{Samples, read_logprobs, read_samples, read_scores};

use crate::adapter::Adapter;
use crate::engine::Scheduling;
use crate::guide::Guide;
use crate::score::{Rule, Steps};

/// Sequences in one request.
pub const MAX_SEQUENCES: usize = 1 << 16;

/// What requests are held to, beside [`MAX_SEQUENCES`] and the model's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Tokens of a request, what it may generate included.
    pub tokens: usize,
    /// Alternatives and kept ids of all tokens of a request.
    pub alternatives: usize,
    /// Stop strings, and stop ids.
    pub stops: usize,
    /// Tokens in a logit bias.
    pub biases: usize,
    /// [`SampleRequest::top_logprobs`].
    pub top_logprobs: usize,
    /// [`SampleRequest::kept_ids`].
    pub kept_ids: usize,
    /// [`SampleRequest::speculate`].
    pub speculate: usize,
    /// Bytes of a [`Guide`].
    pub guide_bytes: usize,
}

impl RequestLimits {
    /// The limits of this version.
    pub const fn get() -> Self {
        check::LIMITS
    }
}

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
    /// Of what is left, keep the tokens whose surprise is closest to the expected one, as many as hold this much of the
    /// probability (Meister et al. 2022); in [0, 1], 1: off.
    pub typical_p: f32,
    /// > 0; logits of tokens in the sequence are divided (positive) or multiplied (negative) by it; 1: off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that this request generated; finite, 0: off.
    pub presence_penalty: f32,
    /// Subtracted once for each time this request generated the token; finite, 0: off.
    pub frequency_penalty: f32,
    /// Added to the logits of tokens, before the penalties; −∞ bans a token. At most 1024, no token
    /// twice.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that are never drawn.
    pub banned_ids: Vec<u32>,
    /// The only tokens that may be drawn; `None`: all.
    pub allowed_ids: Option<Vec<u32>>,
    /// What the answer must be; needs the model's tokenizer.
    pub guide: Option<Guide>,
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
    /// Until there are this many tokens, those that end a sequence cannot be drawn. Stop strings end it all the same, as
    /// in transformers, and so does a guide after which nothing can come.
    pub min_tokens: usize,
    /// Draw this many samples of each prompt and return the `n` with the highest mean model log-probability, best first;
    /// `None`: n.
    pub best_of: Option<usize>,
    /// Report this many of the most likely tokens at each place (at most 128).
    pub top_logprobs: usize,
    /// Report the ids of the tokens that could have been drawn, where there are no more than this many (at most 1024).
    pub kept_ids: usize,
    /// Guess up to this many tokens ahead, from what followed the same words before, and check the guesses in one step
    /// (at most 16; 0: off). The result is the same to the bit, sooner where the text repeats itself.
    pub speculate: usize,
    /// Hand out tokens as they are sampled, by [`Job::next_chunk`](crate::Job::next_chunk).
    pub stream: bool,
    /// Whose weights come on top of the model's; `None`: the model alone. A request keeps the content that the adapter
    /// has when it is submitted.
    pub adapter: Option<Adapter>,
    /// Priority and deadline.
    pub scheduling: Scheduling,
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
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            banned_ids: Vec::new(),
            allowed_ids: None,
            guide: None,
            seed: 0,
            streams: Vec::new(),
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            min_tokens: 0,
            best_of: None,
            top_logprobs: 0,
            kept_ids: 0,
            speculate: 0,
            stream: false,
            adapter: None,
            scheduling: Scheduling::default(),
        }
    }
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
    /// Whose weights come on top of the model's; `None`: the model alone. A request keeps the content that the adapter
    /// has when it is submitted.
    pub adapter: Option<Adapter>,
    /// Priority and deadline.
    pub scheduling: Scheduling,
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

/// Scores sequences.
#[derive(Clone, Debug, Default)]
pub struct ScoreRequest {
    /// Token ids of each sequence; at least one token each.
    pub sequences: Vec<Vec<u32>>,
    /// `None`: the rule that the checkpoint's head implies.
    pub rule: Option<Rule>,
    /// Read the rule at these places, as process reward models do; `None`: once a sequence, where the rule says.
    pub steps: Option<Steps>,
    /// Whose weights come on top of the model's; `None`: the model alone. A request keeps the content that the adapter
    /// has when it is submitted.
    pub adapter: Option<Adapter>,
    /// Priority and deadline.
    pub scheduling: Scheduling,
}
