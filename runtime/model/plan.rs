//! [`ModelSpec`] → the flat list of kernel calls that both backends execute for every step.

use super::families;
use super::spec::{AttentionBias, Head, ModelSpec};
use crate::error::{Result, checked_size};
use crate::weights::{Checkpoint, Expected, LoadOptions, Weights};

/// A weight matrix [rows, cols], kept as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixId(pub usize);

/// A small vector (a norm's weight, a bias), kept as f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VectorId(pub usize);

/// The activations that pass from one op to the next: f32, one row a token (or one an output row), of the width given
/// here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buf {
    /// Residual stream [T, D].
    Hidden,
    /// [T, H·E].
    Q,
    /// [T, G·E].
    K,
    /// [T, G·E].
    V,
    /// Attention's output [T, H·E].
    Attn,
    /// silu(gate) · up [T, F].
    Gated,
    /// Hidden states of the rows that asked for an output [M, D].
    Picked,
    /// Their final norm [M, D].
    Final,
}

impl Buf {
    /// Every buffer, in the order of their discriminants.
    pub const ALL: [Buf; 8] = [Buf::Hidden, Buf::Q, Buf::K, Buf::V, Buf::Attn, Buf::Gated, Buf::Picked, Buf::Final];

    /// Elements a row.
    pub fn width(self, spec: &ModelSpec) -> usize {
        match self {
            Buf::Hidden | Buf::Picked | Buf::Final => spec.hidden_size,
            Buf::Q | Buf::Attn => spec.q_width(),
            Buf::K | Buf::V => spec.kv_width(),
            Buf::Gated => spec.intermediate_size,
        }
    }
}

/// A weight [N, K] and its bias [N].
#[derive(Clone, Copy, Debug)]
pub struct Projection {
    /// The weight.
    pub weight: MatrixId,
    /// The bias.
    pub bias: Option<VectorId>,
}

/// One kernel call, fused where the intermediate result has one reader. What is fused into one call and what a backend
/// splits again is its own affair; the order of the calls and their meaning are not.
#[derive(Clone, Debug)]
pub enum Op {
    /// out = table[token].
    Embed {
        /// [V, D].
        table: MatrixId,
        /// Receives [T, D].
        out: Buf,
    },
    /// out_i = x' · w_iᵀ + b_i for every part, with x' = rms_norm(x) where there is a norm.
    Linear {
        /// [T, K].
        x: Buf,
        /// The norm's weight.
        norm: Option<VectorId>,
        /// Each with what receives it.
        parts: Vec<(Projection, Buf)>,
    },
    /// to = to + (x · wᵀ + b).
    LinearAdd {
        /// [T, K].
        x: Buf,
        /// The product.
        part: Projection,
        /// The residual stream.
        to: Buf,
    },
    /// out = silu(x' · gateᵀ + b) · (x' · upᵀ + b) with x' = rms_norm(x).
    LinearGated {
        /// [T, K].
        x: Buf,
        /// The norm's weight.
        norm: VectorId,
        /// Goes through silu.
        gate: Projection,
        /// Is multiplied.
        up: Projection,
        /// Receives [T, F].
        out: Buf,
    },
    /// Rotates the heads of x in place.
    Rope {
        /// [T, heads · E].
        x: Buf,
        /// H or G.
        heads: usize,
    },
    /// Puts K and V into the layer's cache.
    KvWrite {
        /// The layer.
        layer: usize,
    },
    /// Attn = attention of Q over the layer's cache.
    Attention {
        /// The layer.
        layer: usize,
    },
    /// out = the rows of x that asked for an output.
    GatherRows {
        /// [T, D].
        x: Buf,
        /// Receives [M, D].
        out: Buf,
    },
    /// out = rms_norm(x), over the M rows that asked for an output.
    RmsNorm {
        /// [M, D].
        x: Buf,
        /// The norm's weight.
        weight: VectorId,
        /// Receives [M, D].
        out: Buf,
    },
}

/// Everything a backend needs to execute a model: the tensors by name, and the calls.
pub struct Plan {
    /// Names and shapes of the matrices, by [`MatrixId`].
    pub matrices: Vec<Expected>,
    /// Names and shapes of the vectors, by [`VectorId`].
    pub vectors: Vec<Expected>,
    /// From token ids to the final norm of the output rows.
    pub ops: Vec<Op>,
    /// The language-model head [V, D] or the score head [labels, D], applied to [`Buf::Final`].
    pub head: MatrixId,
}

impl Plan {
    /// The list of calls for `spec`.
    ///
    /// # Errors
    /// `Limit` if a weight's size overflows.
    pub fn new(spec: &ModelSpec) -> Result<Self> {
        Builder::default().build(spec)
    }

    /// Every tensor the model needs.
    pub fn expected(&self) -> impl Iterator<Item = &Expected> {
        self.matrices.iter().chain(&self.vectors)
    }

    /// The first weight of the first product at or after the call `i`; the head's after the last one.
    pub fn first_weight(&self, i: usize) -> MatrixId {
        let of = |op: &Op| match op {
            Op::Linear { parts, .. } => parts.first().map(|(p, _)| p.weight),
            Op::LinearAdd { part, .. } => Some(part.weight),
            Op::LinearGated { gate, .. } => Some(gate.weight),
            _ => None,
        };
        self.ops.iter().skip(i).find_map(of).unwrap_or(self.head)
    }

    /// The weights of the layers' products: queries, keys, values, outputs, gate, up and down.
    pub fn projections(&self) -> Vec<MatrixId> {
        let mut list = Vec::new();
        for op in &self.ops {
            match op {
                Op::Linear { parts, .. } => list.extend(parts.iter().map(|(p, _)| p.weight)),
                Op::LinearAdd { part, .. } => list.push(part.weight),
                Op::LinearGated { gate, up, .. } => list.extend([gate.weight, up.weight]),
                _ => {}
            }
        }
        list
    }

    /// The weights of products, which may be quantised: all but the embedding table as such and a score head.
    pub fn quantisable(&self, spec: &ModelSpec) -> Vec<MatrixId> {
        let mut list = self.projections();
        if matches!(spec.head, Head::LanguageModel { .. }) {
            list.push(self.head);
        }
        list
    }

    /// Compares the checkpoint at `path` with the plan and opens its bytes.
    ///
    /// # Errors
    /// See [`Checkpoint::open`] and [`Checkpoint::claim`].
    pub fn load_weights(&self, spec: &ModelSpec, path: &std::path::Path, options: &LoadOptions) -> Result<Weights> {
        let checkpoint = Checkpoint::open(path, options)?;
        let expected: Vec<Expected> = self.expected().cloned().collect();
        // A tied head may be stored as well, as long as it is the same matrix.
        let tied = spec.head == Head::LanguageModel { tied: true };
        let redundant_head = tied && checkpoint.same_bytes(LM_HEAD, EMBEDDING);
        checkpoint
            .claim(&expected, |name| families::carries_no_weight(name) || (redundant_head && name == LM_HEAD))
            .map_err(|e| e.at(path.display()))
    }
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const LM_HEAD: &str = "lm_head.weight";

#[derive(Default)]
struct Builder {
    matrices: Vec<Expected>,
    vectors: Vec<Expected>,
    ops: Vec<Op>,
}

impl Builder {
    fn matrix(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Result<MatrixId> {
        let name = name.into();
        checked_size(&format!("tensor {name:?}"), &[rows, cols, 4])?;
        self.matrices.push(Expected { name, shape: vec![rows, cols] });
        Ok(MatrixId(self.matrices.len() - 1))
    }

    fn vector(&mut self, name: impl Into<String>, len: usize) -> VectorId {
        self.vectors.push(Expected { name: name.into(), shape: vec![len] });
        VectorId(self.vectors.len() - 1)
    }

    fn projection(&mut self, name: &str, shape: [usize; 2], biased: bool) -> Result<Projection> {
        let weight = self.matrix(format!("{name}.weight"), shape[0], shape[1])?;
        let bias = biased.then(|| self.vector(format!("{name}.bias"), shape[0]));
        Ok(Projection { weight, bias })
    }

    fn build(mut self, spec: &ModelSpec) -> Result<Plan> {
        let table = self.matrix(EMBEDDING, spec.vocab_size, spec.hidden_size)?;
        self.ops.push(Op::Embed { table, out: Buf::Hidden });
        for layer in 0..spec.layers {
            self.layer(spec, layer)?;
        }
        self.ops.push(Op::GatherRows { x: Buf::Hidden, out: Buf::Picked });
        let weight = self.vector("model.norm.weight", spec.hidden_size);
        self.ops.push(Op::RmsNorm { x: Buf::Picked, weight, out: Buf::Final });
        let head = match &spec.head {
            Head::LanguageModel { tied: true } => table,
            Head::LanguageModel { tied: false } => self.matrix(LM_HEAD, spec.vocab_size, spec.hidden_size)?,
            Head::SequenceClassification { labels } => self.matrix("score.weight", labels.len(), spec.hidden_size)?,
        };
        Ok(Plan { matrices: self.matrices, vectors: self.vectors, ops: self.ops, head })
    }

    fn layer(&mut self, spec: &ModelSpec, layer: usize) -> Result<()> {
        let (d, f, q, kv) = (spec.hidden_size, spec.intermediate_size, spec.q_width(), spec.kv_width());
        let (input_bias, output_bias) =
            (spec.attention_bias != AttentionBias::Never, spec.attention_bias == AttentionBias::All);
        let mlp_bias = spec.mlp_bias;
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");

        let norm = Some(self.vector(name("input_layernorm.weight"), d));
        let parts = vec![
            (self.projection(&name("self_attn.q_proj"), [q, d], input_bias)?, Buf::Q),
            (self.projection(&name("self_attn.k_proj"), [kv, d], input_bias)?, Buf::K),
            (self.projection(&name("self_attn.v_proj"), [kv, d], input_bias)?, Buf::V),
        ];
        self.ops.push(Op::Linear { x: Buf::Hidden, norm, parts });
        self.ops.push(Op::Rope { x: Buf::Q, heads: spec.heads });
        self.ops.push(Op::Rope { x: Buf::K, heads: spec.kv_heads });
        self.ops.push(Op::KvWrite { layer });
        self.ops.push(Op::Attention { layer });
        let part = self.projection(&name("self_attn.o_proj"), [d, q], output_bias)?;
        self.ops.push(Op::LinearAdd { x: Buf::Attn, part, to: Buf::Hidden });

        let norm = self.vector(name("post_attention_layernorm.weight"), d);
        let gate = self.projection(&name("mlp.gate_proj"), [f, d], mlp_bias)?;
        let up = self.projection(&name("mlp.up_proj"), [f, d], mlp_bias)?;
        self.ops.push(Op::LinearGated { x: Buf::Hidden, norm, gate, up, out: Buf::Gated });
        let part = self.projection(&name("mlp.down_proj"), [d, f], mlp_bias)?;
        self.ops.push(Op::LinearAdd { x: Buf::Gated, part, to: Buf::Hidden });
        Ok(())
    }
}
