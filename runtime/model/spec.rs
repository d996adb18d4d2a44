//! What a model is, as data.

use super::rope::{Rope, RopeKind};

/// Where the final hidden states go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// Next-token logits over the vocabulary. `tied`: the embedding matrix is the head.
    LanguageModel {
        /// True if `embed_tokens` serves as the head.
        tied: bool,
    },
    /// `score.weight` of shape [labels, D], no bias, at one pooled position.
    SequenceClassification {
        /// The labels in order, one logit each.
        labels: Vec<String>,
    },
}

/// Which of an attention block's projections have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// None.
    Never,
    /// q, k and v.
    Inputs,
    /// q, k, v and o.
    All,
}

/// A decoder-only transformer with RMS norms, rotary positions and a gated MLP.
///
/// Letters: D model width, H heads, G kv heads, E head size, F MLP width, V vocabulary, L layers.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// `architectures[0]`.
    pub architecture: String,
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// L.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// G; divides H.
    pub kv_heads: usize,
    /// E; even, not necessarily D / H.
    pub head_dim: usize,
    /// Added to the mean square inside every RMS norm.
    pub rms_norm_eps: f32,
    /// Biases on q, k, v and o.
    pub attention_bias: AttentionBias,
    /// Bias on gate, up and down.
    pub mlp_bias: bool,
    /// A query at position p sees the keys at positions > p − window.
    pub sliding_window: Option<usize>,
    /// Rotary positions.
    pub rope: Rope,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// What is read off the final hidden states.
    pub head: Head,
    /// The padding token, which the `sequence` scoring rule skips.
    pub pad_token_id: Option<u32>,
    /// Tokens that end a generated sequence.
    pub eos_token_ids: Vec<u32>,
}

impl ModelSpec {
    /// The longest sequence the model is meant for: dynamic rope stretches the trained length by its factor.
    pub fn context(&self) -> usize {
        match self.rope.kind {
            // At least as long as trained, whatever the factor says; `as` saturates.
            RopeKind::Dynamic { factor, max_positions } => max_positions.max((max_positions as f64 * factor) as usize),
            _ => self.max_positions,
        }
    }

    /// H · E.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// G · E.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
