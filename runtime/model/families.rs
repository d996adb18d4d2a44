//! The model families this version knows: what their configs leave out, and what they ignore.

/// What distinguishes one family's config.json and checkpoint from another's.
#[derive(Debug)]
pub struct Family {
    /// `architectures[0]` with a language-model head.
    pub causal_lm: &'static str,
    /// `architectures[0]` with a `score` head.
    pub sequence_classification: &'static str,
    /// `num_key_value_heads` when the key is absent; `None`: as many as heads.
    pub default_kv_heads: Option<usize>,
    /// `max_position_embeddings` when the key is absent.
    pub default_max_positions: usize,
    /// `eos_token_id` when the key is absent.
    pub default_eos_token_ids: &'static [u32],
    /// Which layers attend through a sliding window.
    pub window: Window,
    /// Which projections have a bias.
    pub biases: Biases,
}

/// How a family's config says which layers attend through a sliding window.
#[derive(Clone, Copy, Debug)]
pub enum Window {
    /// None, whatever the config says.
    Never,
    /// All, unless `sliding_window` is null.
    EveryLayer {
        /// `sliding_window` when the key is absent.
        default: usize,
    },
    /// If `use_sliding_window` is true and `sliding_window` is not null: those that `layer_types` names, or without it
    /// those from `max_window_layers` on. Otherwise none.
    FromLayer {
        /// `sliding_window` when the key is absent.
        default: usize,
        /// `max_window_layers` when the key is absent.
        default_first: usize,
    },
}

impl Window {
    /// What the family has, for an error message.
    pub fn describe(self) -> &'static str {
        match self {
            Window::Never => "no sliding window",
            Window::EveryLayer { .. } => "a sliding window in every layer unless \"sliding_window\" is null",
            Window::FromLayer { .. } => {
                "a sliding window only if \"use_sliding_window\" is true and \"sliding_window\" is not null"
            }
        }
    }
}

/// How a family's config says which projections have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Biases {
    /// None.
    Never,
    /// q, k, v and o if `attention_bias` is true; gate, up and down if `mlp_bias` is.
    Configured,
    /// q, k and v, always.
    AttentionInputs,
}

impl Biases {
    /// The only value that the config's `attention_bias` or `mlp_bias` may have, if it is not a choice.
    pub fn fixed(self, key: &str) -> Option<bool> {
        match self {
            Biases::Never => Some(false),
            Biases::Configured => None,
            Biases::AttentionInputs => Some(key == "attention_bias"),
        }
    }

    /// What the family has, for an error message.
    pub fn describe(self) -> &'static str {
        match self {
            Biases::Never => "no biases",
            Biases::Configured => "the biases that the config names",
            Biases::AttentionInputs => "biases on q, k and v, always, and no others",
        }
    }
}

/// Every known family. The values are the defaults of transformers' configuration classes.
pub const FAMILIES: &[Family] = &[
    Family {
        causal_lm: "LlamaForCausalLM",
        sequence_classification: "LlamaForSequenceClassification",
        default_kv_heads: None,
        default_max_positions: 2048,
        default_eos_token_ids: &[2],
        window: Window::Never,
        biases: Biases::Configured,
    },
    Family {
        causal_lm: "MistralForCausalLM",
        sequence_classification: "MistralForSequenceClassification",
        default_kv_heads: Some(8),
        default_max_positions: 4096 * 32,
        default_eos_token_ids: &[2],
        window: Window::EveryLayer { default: 4096 },
        biases: Biases::Never,
    },
    Family {
        causal_lm: "Qwen2ForCausalLM",
        sequence_classification: "Qwen2ForSequenceClassification",
        default_kv_heads: Some(32),
        default_max_positions: 32_768,
        default_eos_token_ids: &[],
        window: Window::FromLayer { default: 4096, default_first: 28 },
        biases: Biases::AttentionInputs,
    },
];

/// Tensors that old exports carry and that hold nothing the config does not say.
pub fn carries_no_weight(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Keys that change the result in some architectures, with the one value that leaves these families as they are.
/// Any other value is refused by name.
pub const NEUTRAL: &[(&str, Neutral)] = &[
    ("hidden_act", Neutral::Text("silu")),
    ("quantization_config", Neutral::Absent),
    ("rope_interleaved", Neutral::False),
    ("use_mrope", Neutral::False),
    ("partial_rotary_factor", Neutral::One),
    ("pretraining_tp", Neutral::One),
    ("attn_logit_softcapping", Neutral::Absent),
    ("final_logit_softcapping", Neutral::Absent),
    ("query_pre_attn_scalar", Neutral::Absent),
    ("embedding_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("attention_multiplier", Neutral::Absent),
    ("logits_scaling", Neutral::One),
    ("logit_scale", Neutral::One),
    ("num_local_experts", Neutral::Absent),
    ("num_experts", Neutral::Absent),
    ("no_rope_layers", Neutral::Absent),
    ("no_rope_layer_interval", Neutral::Absent),
    ("use_qk_norm", Neutral::False),
    ("qk_norm", Neutral::False),
    ("qk_layernorm", Neutral::False),
    ("clip_qkv", Neutral::Absent),
    ("is_causal", Neutral::True),
    ("is_encoder_decoder", Neutral::False),
    ("add_cross_attention", Neutral::False),
    ("cross_attention_hidden_size", Neutral::Absent),
    ("pruned_heads", Neutral::Empty),
    ("per_layer_config", Neutral::Empty),
    ("chunk_size_feed_forward", Neutral::Zero),
    ("output_hidden_size", Neutral::Absent),
    ("layer_norm_type", Neutral::Absent),
];

/// The value of a config key that changes nothing. `null` and an absent key always count as neutral.
#[derive(Clone, Copy, Debug)]
pub enum Neutral {
    /// Only `null`.
    Absent,
    /// `false`.
    False,
    /// `true`.
    True,
    /// 1.
    One,
    /// 0.
    Zero,
    /// An empty list or object.
    Empty,
    /// This string.
    Text(&'static str),
}

impl Neutral {
    /// True if `value` changes nothing.
    pub fn admits(self, value: &serde_json::Value) -> bool {
        use serde_json::Value;
        match (self, value) {
            (_, Value::Null) => true,
            (Neutral::False, Value::Bool(b)) => !b,
            (Neutral::True, Value::Bool(b)) => *b,
            (Neutral::One, Value::Number(n)) => n.as_f64() == Some(1.0),
            (Neutral::Zero, Value::Number(n)) => n.as_f64() == Some(0.0),
            (Neutral::Empty, Value::Array(a)) => a.is_empty(),
            (Neutral::Empty, Value::Object(o)) => o.is_empty(),
            (Neutral::Text(text), Value::String(s)) => s == text,
            _ => false,
        }
    }

    /// What would be right, for an error message.
    pub fn describe(self) -> String {
        match self {
            Neutral::Absent => "null".into(),
            Neutral::False => "false".into(),
            Neutral::True => "true".into(),
            Neutral::One => "1".into(),
            Neutral::Zero => "0".into(),
            Neutral::Empty => "empty".into(),
            Neutral::Text(text) => format!("{text:?}"),
        }
    }
}
