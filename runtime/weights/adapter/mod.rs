//! LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.
//!
//! A module with factors computes y = W x + scale · B (A x). [`AdapterCheckpoint::open`] compares headers with the config
//! and with the base model, and reports every difference at once; [`AdapterCheckpoint::read`] looks at the values.

mod config;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::{AdapterConfig, SCORE};

use super::shards::{inside, read_bounded};
use super::{Checkpoint, Expected, LoadOptions, Tensor, Weights};
use crate::error::{Error, ErrorKind, Result, checked_size, try_vec};
use crate::model::{Head, MatrixId, ModelSpec, Plan};

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

/// A module that the config gives factors.
struct Module {
    matrix: MatrixId,
    rank: usize,
    scale: f32,
    /// [N, K] of the base weight.
    shape: [usize; 2],
}

impl Module {
    fn factors(&self, name: &str) -> [Expected; 2] {
        let [n, k] = self.shape;
        [("A", vec![self.rank, k]), ("B", vec![n, self.rank])]
            .map(|(factor, shape)| Expected { name: format!("{PREFIX}{name}.lora_{factor}.weight"), shape })
    }
}

/// An adapter whose headers fit its config and the base model; no value is read yet.
pub struct AdapterCheckpoint {
    folder: PathBuf,
    weights: Weights,
    /// By the module's name.
    modules: BTreeMap<String, Module>,
    head: Option<Expected>,
    bytes: u64,
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
        let config = AdapterConfig::parse(&read_bounded(&folder.join(CONFIG), MAX_CONFIG)?)?;
        let path = folder.join(TENSORS);
        if path.symlink_metadata().is_err() && folder.join("adapter_model.bin").exists() {
            return Err(Error::unsupported(format!(
                "there is no {TENSORS}, and adapter_model.bin is a pickle; save with safe_serialization=True"
            )));
        }
        let checkpoint = Checkpoint::open(&inside(folder, &path)?, options)?;
        let modules = modules(&config, plan)?;
        refuse_other_targets(&config, spec)?;
        let head = head(&config, spec, plan, &checkpoint);
        if modules.is_empty() && head.is_none() {
            let known = plan.projections().into_iter().map(|id| module_of(&plan.matrices[id.0].name));
            let known = known.map(|name| name.rsplit('.').next().unwrap_or(name)).collect::<Vec<_>>();
            let mut known: Vec<&str> = known.into_iter().take(7).collect();
            known.sort_unstable();
            return Err(Error::unsupported(format!(
                "{CONFIG}: \"target_modules\" matches no module of {}; it has {}",
                spec.architecture,
                known.join(", ")
            )));
        }
        let expected: Vec<Expected> =
            modules.iter().flat_map(|(name, m)| m.factors(name)).chain(head.clone()).collect();
        differences(&checkpoint, &expected)?;
        let mut bytes = 0u64;
        for want in &expected {
            let mut factors = want.shape.clone();
            factors.push(4);
            bytes += checked_size(&format!("tensor {:?}", want.name), &factors)? as u64;
        }
        let weights = checkpoint.claim(&expected, |_| false)?;
        Ok(AdapterCheckpoint { folder: folder.to_owned(), weights, modules, head, bytes })
    }

    /// What the values will take in f32.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads every value.
    ///
    /// # Errors
    /// `NonFinite`, naming the tensors, for NaN and infinities; `HostMemory`.
    pub fn read(self) -> Result<AdapterWeights> {
        let folder = self.folder.display().to_string();
        self.values().map_err(|e| e.at(folder))
    }

    fn values(self) -> Result<AdapterWeights> {
        let mut problems = Vec::new();
        let mut values = |want: &Expected| -> Result<Vec<f32>> {
            let values = to_f32(self.weights.get(&want.name)?)?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                problems.push(format!("tensor {:?} has {} at element {at}", want.name, values[at]));
            }
            Ok(values)
        };
        let (mut modules, mut names) = (BTreeMap::new(), BTreeMap::new());
        for (name, module) in &self.modules {
            let [want_a, want_b] = module.factors(name);
            let (a, b) = (values(&want_a)?, values(&want_b)?);
            let b = transposed(&b, module.shape[0], module.rank)?;
            modules.insert(module.matrix.0, LowRank { rank: module.rank, scale: module.scale, a, b });
            names.insert(format!("{name}.weight"), module.matrix.0);
        }
        let head = self.head.as_ref().map(values).transpose()?;
        if problems.is_empty() {
            let rank = self.modules.values().map(|m| m.rank).max().unwrap_or(0);
            return Ok(AdapterWeights { modules, names, head, rank, bytes: self.bytes });
        }
        let more = problems.len().saturating_sub(NAMED);
        problems.truncate(NAMED);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        Err(Error::new(ErrorKind::NonFinite, format!("{}{more}; every value must be finite", problems.join("; "))))
    }
}

/// A weight's module.
fn module_of(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

/// The linear modules of the base model that have factors.
fn modules(config: &AdapterConfig, plan: &Plan) -> Result<BTreeMap<String, Module>> {
    let (mut modules, mut problems) = (BTreeMap::new(), Vec::new());
    for matrix in plan.projections() {
        let Expected { name, shape } = &plan.matrices[matrix.0];
        let (name, shape) = (module_of(name), [shape[0], shape[1]]);
        if !config.targets(name)? {
            continue;
        }
        let rank = config.rank_of(name)?;
        // Rank beyond the smaller side is of no use but happens (one r for all modules); beyond the larger it is a mistake.
        let most = shape[0].max(shape[1]);
        if rank > most {
            problems.push(format!("the rank of {name} is {rank}, beyond both sides of its weight {shape:?}"));
            continue;
        }
        modules.insert(name.to_owned(), Module { matrix, rank, scale: config.scale_of(name)?, shape });
    }
    if problems.is_empty() {
        return Ok(modules);
    }
    Err(Error::new(ErrorKind::Shape, format!("{CONFIG}: {} differences:\n  {}", problems.len(), problems.join("\n  "))))
}

/// Modules that are no product of the layers cannot have factors.
fn refuse_other_targets(config: &AdapterConfig, spec: &ModelSpec) -> Result<()> {
    if config.is_all_linear() {
        return Ok(());
    }
    let head = if matches!(spec.head, Head::LanguageModel { .. }) { "lm_head" } else { SCORE };
    for module in ["model.embed_tokens", head] {
        if config.targets(module)? {
            return Err(Error::unsupported(format!(
                "{CONFIG}: \"target_modules\" names {module}; only q, k, v, o, gate, up and down can have factors"
            )));
        }
    }
    Ok(())
}

/// The score head that the adapter brings.
fn head(config: &AdapterConfig, spec: &ModelSpec, plan: &Plan, checkpoint: &Checkpoint) -> Option<Expected> {
    let name = format!("{PREFIX}{SCORE}.weight");
    let has_head = matches!(spec.head, Head::SequenceClassification { .. });
    let brings = config.saves_score || (config.may_save_score && checkpoint.contains(&name));
    (has_head && brings).then(|| Expected { name, shape: plan.matrices[plan.head.0].shape.clone() })
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

fn to_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    let mut values = try_vec("an adapter", 0.0, tensor.shape().iter().product())?;
    tensor.dtype().read_f32(tensor.bytes(), &mut values);
    Ok(values)
}

/// [rows, cols] as [cols, rows].
fn transposed(values: &[f32], rows: usize, cols: usize) -> Result<Vec<f32>> {
    let mut out = try_vec("an adapter", 0.0, values.len())?;
    for (i, row) in values.chunks_exact(cols).enumerate() {
        for (j, v) in row.iter().enumerate() {
            out[j * rows + i] = *v;
        }
    }
    Ok(out)
}
