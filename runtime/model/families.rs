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
    /// `sliding_window` when the key is absent; the inner `None` is full attention.
    pub default_sliding_window: Option<usize>,
    /// False if the architecture has no sliding window whatever its config says.
    pub has_sliding_window: bool,
    /// True if `attention_bias` and `mlp_bias` are read.
    pub has_bias: bool,
}

/// Every known family. The values are the defaults of transformers' configuration classes.
pub const FAMILIES: &[Family] = &[
    Family {
        causal_lm: "LlamaForCausalLM",
        sequence_classification: "LlamaForSequenceClassification",
        default_kv_heads: None,
        default_max_positions: 2048,
        default_sliding_window: None,
        has_sliding_window: false,
        has_bias: true,
    },
    Family {
        causal_lm: "MistralForCausalLM",
        sequence_classification: "MistralForSequenceClassification",
        default_kv_heads: Some(8),
        default_max_positions: 4096 * 32,
        default_sliding_window: Some(4096),
        has_sliding_window: true,
        has_bias: false,
    },
];

/// Tensors that old exports carry and that hold nothing the config does not say.
pub fn carries_no_weight(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Keys that change the result in some architectures, with the one value that leaves Llama and Mistral as they are.
/// Any other value is refused by name.
pub const NEUTRAL: &[(&str, Neutral)] = &[
    ("hidden_act", Neutral::Text("silu")),
    ("quantization_config", Neutral::Absent),
    ("rope_interleaved", Neutral::False),
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
    ("is_encoder_decoder", Neutral::False),
    ("add_cross_attention", Neutral::False),
    ("cross_attention_hidden_size", Neutral::Absent),
    ("pruned_heads", Neutral::Empty),
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
            Neutral::One => "1".into(),
            Neutral::Zero => "0".into(),
            Neutral::Empty => "empty".into(),
            Neutral::Text(text) => format!("{text:?}"),
        }
    }
}
