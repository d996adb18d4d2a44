//! LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.
//!
//! A module with factors computes y = W x + scale · B (A x). [`AdapterCheckpoint::open`] compares headers with the config
//! and with the base model, and reports every difference at once; [`AdapterCheckpoint::read`] looks at the values.

mod config;
mod layout;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::SCORE;
pub(crate) use layout::AdapterLayout;

use super::shards::{inside, read_bounded};
use super::{Checkpoint, Expected, LoadOptions, Weights};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{MatrixId, ModelSpec, Plan};

const MAX_CONFIG: usize = 1 << 20;
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT puts before the base model's own names.
const PREFIX: &str = "base_model.model.";
/// Values that are not finite and are named.
const NAMED: usize = 16;

/// The factors of one module, which adds scale · B (A x) to what the base weight makes of x.
pub struct LowRank {
    /// R, at least 1.
    pub rank: usize,
    /// alpha / R, or alpha / √R.
    pub scale: f32,
    /// A, [R, K].
    pub a: Vec<f32>,
    /// B transposed, [R, N].
    pub b: Vec<f32>,
}

/// An adapter for one base model, read and checked.
pub struct AdapterWeights {
    /// By [`MatrixId`].
    modules: BTreeMap<usize, LowRank>,
    /// By the base tensor's name.
    names: BTreeMap<String, usize>,
    /// Replaces the score head: [labels, D].
    head: Option<Vec<f32>>,
    rank: usize,
    bytes: u64,
}

impl AdapterWeights {
    /// The factors that belong to a matrix of the base model's plan.
    pub fn get(&self, matrix: MatrixId) -> Option<&LowRank> {
        self.modules.get(&matrix.0)
    }

    /// The factors that belong to a tensor of the base checkpoint, for instance
    /// `model.layers.0.self_attn.q_proj.weight`: the merged weight is W + scale · B · A.
    pub fn of_tensor(&self, name: &str) -> Option<&LowRank> {
        self.modules.get(self.names.get(name)?)
    }

    /// The tensors of the base checkpoint that have factors, in name order.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// The score head [labels, D] that replaces the base model's.
    pub fn head(&self) -> Option<&[f32]> {
        self.head.as_deref()
    }

    /// The largest rank of its modules.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What its values take in f32.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// An adapter whose headers fit its config and the base model; no value is read yet.
pub struct AdapterCheckpoint {
    folder: PathBuf,
    weights: Weights,
    layout: AdapterLayout,
    has_head: bool,
}

impl AdapterCheckpoint {
    /// Opens the folder that PEFT's `save_pretrained` wrote.
    ///
    /// # Errors
    /// `Io` or `NotFound` for files that cannot be read; `Format` and `Limit` for what is malformed or too large;
    /// `Unsupported`, with every field, for another kind of adapter; `Shape`, with every tensor that is missing,
    /// superfluous or has another shape than the config and the base model ask for.
    pub fn open(folder: &Path, spec: &ModelSpec, plan: &Plan, options: &LoadOptions) -> Result<Self> {
        Self::check(folder, spec, plan, options).map_err(|e| e.at(folder.display()))
    }

    fn check(folder: &Path, spec: &ModelSpec, plan: &Plan, options: &LoadOptions) -> Result<Self> {
        let layout = AdapterLayout::new(&read_bounded(&folder.join(CONFIG), MAX_CONFIG)?, spec, plan)?;
        let path = folder.join(TENSORS);
        if path.symlink_metadata().is_err() && folder.join("adapter_model.bin").exists() {
            return Err(Error::unsupported(format!(
                "there is no {TENSORS}, and adapter_model.bin is a pickle; save with safe_serialization=True"
            )));
        }
        let checkpoint = Checkpoint::open(&Self::tensor_file(folder)?, options)?;
        let has_head = layout.needs_head() || layout.head().is_some_and(|name| checkpoint.contains(name));
        layout.check_purpose(has_head, spec, plan)?;
        let expected: Vec<Expected> = layout.tensors(has_head).collect();
        differences(&checkpoint, &expected)?;
        let weights = checkpoint.claim(&expected, |_| false)?;
        Ok(AdapterCheckpoint { folder: folder.to_owned(), weights, layout, has_head })
    }

    /// What the values will take in f32.
    pub fn bytes(&self) -> u64 {
        self.layout.bytes(self.has_head)
    }

    pub(crate) fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// The file with the tensors of such a folder.
    ///
    /// # Errors
    /// `Io` or `NotFound`; `Format` if it leads out of the folder.
    pub(crate) fn tensor_file(folder: &Path) -> Result<PathBuf> {
        inside(folder, &folder.join(TENSORS))
    }

    /// Reads every value.
    ///
    /// # Errors
    /// `NonFinite`, naming the tensors, for NaN and infinities; `HostMemory`.
    pub fn read(&self) -> Result<AdapterWeights> {
        self.layout.read(&self.weights, self.has_head).map_err(|e| e.at(self.folder.display()))
    }
}

/// An error with everything in which the file is not what is expected.
fn differences(checkpoint: &Checkpoint, expected: &[Expected]) -> Result<()> {
    let found: BTreeMap<&str, Vec<usize>> = checkpoint.tensors().map(|(name, info)| (name, info.shape)).collect();
    let mut problems = Vec::new();
    for want in expected {
        match found.get(want.name.as_str()) {
            None => problems.push(format!("missing tensor {:?} of shape {:?}", want.name, want.shape)),
            Some(shape) if *shape != want.shape => problems.push(format!(
                "tensor {:?} has shape {shape:?}, the config and the base model ask for {:?}",
                want.name, want.shape
            )),
            Some(_) => {}
        }
    }
    let wanted: std::collections::HashSet<&str> = expected.iter().map(|e| e.name.as_str()).collect();
    for name in found.keys().filter(|name| !wanted.contains(**name)) {
        problems.push(format!("tensor {name:?} {}", why_not(name)));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Shape,
        format!(
            "the adapter does not fit its config and the base model ({} differences):\n  {}",
            problems.len(),
            problems.join("\n  ")
        ),
    ))
}

/// Why a tensor has no place.
fn why_not(name: &str) -> &'static str {
    if !name.starts_with(PREFIX) {
        "does not begin with \"base_model.model.\", as PEFT's tensors do"
    } else if name.contains("lora_magnitude_vector") {
        "is DoRA's, which is not computed"
    } else if name.contains("lora_embedding_") || name.contains("embed_tokens") || name.contains("lm_head") {
        "changes the embedding or the head, which cannot be adapted"
    } else if name.ends_with(".bias") {
        "is a bias, which cannot be adapted"
    } else if name.ends_with(&format!(".{SCORE}.weight")) {
        "replaces a score head, and the base model has none or the config does not say so"
    } else if name.contains(".lora_A.") || name.contains(".lora_B.") {
        "belongs to no module that the config targets and the base model has"
    } else {
        "is neither a factor nor a score head"
    }
}
