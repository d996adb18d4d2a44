//! [`ModelSpec`] → the flat list of kernel calls that both backends execute for every step.

use super::families;
use super::spec::{Head, ModelSpec};
use crate::error::{Result, checked_size};
use crate::weights::{Checkpoint, Expected, LoadOptions, Weights};

/// A weight matrix [rows, cols], kept as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixId(pub usize);

/// A small vector (a norm's weight, a bias), kept as f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VectorId(pub usize);

/// The activations a step works on: f32, one row a token (or one an output row), of the width given here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buf {
    /// Residual stream [T, D].
    Hidden,
    /// A norm's output [T, D].
    Normed,
    /// [T, H·E].
    Q,
    /// [T, G·E].
    K,
    /// [T, G·E].
    V,
    /// Attention's output [T, H·E].
    Attn,
    /// What a block adds to the residual stream [T, D].
    Delta,
    /// [T, F].
    Gate,
    /// [T, F]; receives silu(gate) · up.
    Up,
    /// Hidden states of the rows that asked for an output [M, D].
    Picked,
    /// Their final norm [M, D].
    Final,
}

impl Buf {
    /// Every buffer, in the order of their discriminants.
    pub const ALL: [Buf; 11] = [
        Buf::Hidden,
        Buf::Normed,
        Buf::Q,
        Buf::K,
        Buf::V,
        Buf::Attn,
        Buf::Delta,
        Buf::Gate,
        Buf::Up,
        Buf::Picked,
        Buf::Final,
    ];

    /// Elements a row.
    pub fn width(self, spec: &ModelSpec) -> usize {
        match self {
            Buf::Hidden | Buf::Normed | Buf::Delta | Buf::Picked | Buf::Final => spec.hidden_size,
            Buf::Q | Buf::Attn => spec.q_width(),
            Buf::K | Buf::V => spec.kv_width(),
            Buf::Gate | Buf::Up => spec.intermediate_size,
        }
    }
}

/// Which rows an op runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// All T rows of the step.
    All,
    /// The M rows that asked for an output.
    Outputs,
}

/// One product of an [`Op::Linear`].
#[derive(Clone, Debug)]
pub struct LinearPart {
    /// The weight [N, K].
    pub weight: MatrixId,
    /// [N].
    pub bias: Option<VectorId>,
    /// Receives [rows, N].
    pub out: Buf,
}

/// One kernel call. Each is documented in the file of its name under `kernels/`.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Op {
    Embed { table: MatrixId, out: Buf },
    RmsNorm { x: Buf, weight: VectorId, out: Buf, rows: Rows },
    Linear { x: Buf, parts: Vec<LinearPart> },
    Rope { x: Buf, heads: usize },
    KvWrite { layer: usize },
    Attention { layer: usize },
    SiluMul { gate: Buf, up: Buf },
    Add { delta: Buf, to: Buf },
    GatherRows { x: Buf, out: Buf },
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

const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

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

    fn part(&mut self, name: &str, shape: [usize; 2], biased: bool, out: Buf) -> Result<LinearPart> {
        let weight = self.matrix(format!("{name}.weight"), shape[0], shape[1])?;
        let bias = biased.then(|| self.vector(format!("{name}.bias"), shape[0]));
        Ok(LinearPart { weight, bias, out })
    }

    fn build(mut self, spec: &ModelSpec) -> Result<Plan> {
        let table = self.matrix(EMBEDDING, spec.vocab_size, spec.hidden_size)?;
        self.ops.push(Op::Embed { table, out: Buf::Hidden });
        for layer in 0..spec.layers {
            self.layer(spec, layer)?;
        }
        self.ops.push(Op::GatherRows { x: Buf::Hidden, out: Buf::Picked });
        let weight = self.vector("model.norm.weight", spec.hidden_size);
        self.ops.push(Op::RmsNorm { x: Buf::Picked, weight, out: Buf::Final, rows: Rows::Outputs });
        let head = match &spec.head {
            Head::LanguageModel { tied: true } => table,
            Head::LanguageModel { tied: false } => self.matrix(LM_HEAD, spec.vocab_size, spec.hidden_size)?,
            Head::SequenceClassification { labels } => self.matrix("score.weight", labels.len(), spec.hidden_size)?,
        };
        Ok(Plan { matrices: self.matrices, vectors: self.vectors, ops: self.ops, head })
    }

    fn layer(&mut self, spec: &ModelSpec, layer: usize) -> Result<()> {
        let (d, f, q, kv) = (spec.hidden_size, spec.intermediate_size, spec.q_width(), spec.kv_width());
        let (attention_bias, mlp_bias) = (spec.attention_bias, spec.mlp_bias);
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");

        let weight = self.vector(name("input_layernorm.weight"), d);
        self.ops.push(Op::RmsNorm { x: Buf::Hidden, weight, out: Buf::Normed, rows: Rows::All });
        let parts = vec![
            self.part(&name("self_attn.q_proj"), [q, d], attention_bias, Buf::Q)?,
            self.part(&name("self_attn.k_proj"), [kv, d], attention_bias, Buf::K)?,
            self.part(&name("self_attn.v_proj"), [kv, d], attention_bias, Buf::V)?,
        ];
        self.ops.push(Op::Linear { x: Buf::Normed, parts });
        self.ops.push(Op::Rope { x: Buf::Q, heads: spec.heads });
        self.ops.push(Op::Rope { x: Buf::K, heads: spec.kv_heads });
        self.ops.push(Op::KvWrite { layer });
        self.ops.push(Op::Attention { layer });
        let parts = vec![self.part(&name("self_attn.o_proj"), [d, q], attention_bias, Buf::Delta)?];
        self.ops.push(Op::Linear { x: Buf::Attn, parts });
        self.ops.push(Op::Add { delta: Buf::Delta, to: Buf::Hidden });

        let weight = self.vector(name("post_attention_layernorm.weight"), d);
        self.ops.push(Op::RmsNorm { x: Buf::Hidden, weight, out: Buf::Normed, rows: Rows::All });
        let parts = vec![
            self.part(&name("mlp.gate_proj"), [f, d], mlp_bias, Buf::Gate)?,
            self.part(&name("mlp.up_proj"), [f, d], mlp_bias, Buf::Up)?,
        ];
        self.ops.push(Op::Linear { x: Buf::Normed, parts });
        self.ops.push(Op::SiluMul { gate: Buf::Gate, up: Buf::Up });
        let parts = vec![self.part(&name("mlp.down_proj"), [d, f], mlp_bias, Buf::Delta)?];
        self.ops.push(Op::Linear { x: Buf::Up, parts });
        self.ops.push(Op::Add { delta: Buf::Delta, to: Buf::Hidden });
        Ok(())
    }
}
