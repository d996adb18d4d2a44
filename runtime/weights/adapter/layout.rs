//! What an adapter's tensors are: which modules of the base model have factors, of which shapes.

use std::collections::BTreeMap;

use super::config::{AdapterConfig, SCORE};
use super::{AdapterWeights, CONFIG, LowRank, MAX_CONFIG, NAMED, PREFIX};
use crate::error::{Error, ErrorKind, Result, checked_size, try_vec};
use crate::model::{Head, MatrixId, ModelSpec, Plan};
use crate::weights::{Buffer, Dtype, Expected, Place, Tensor, Weights};

/// A module that the config gives factors.
#[derive(Clone, PartialEq)]
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

/// The tensors that an adapter has, by its config and the base model.
#[derive(Clone)]
pub(crate) struct AdapterLayout {
    /// By the module's name.
    modules: BTreeMap<String, Module>,
    head: Option<Expected>,
    bytes: u64,
}

impl AdapterLayout {
    /// Reads adapter_config.json. `has` tells whether a tensor that the config leaves open is there.
    ///
    /// # Errors
    /// `Format` and `Limit` for what is malformed or too large; `Unsupported` for another kind of adapter, and for one that
    /// changes nothing; `Shape` for ranks beyond the base model's sizes.
    pub fn new(config: &[u8], spec: &ModelSpec, plan: &Plan, has: impl Fn(&str) -> bool) -> Result<Self> {
        if config.len() > MAX_CONFIG {
            let text = format!("{CONFIG}: {} bytes, at most {MAX_CONFIG} are allowed", config.len());
            return Err(Error::limit(text));
        }
        let config = AdapterConfig::parse(config)?;
        let modules = modules(&config, plan)?;
        refuse_other_targets(&config, spec)?;
        let head = head(&config, spec, plan, has);
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
        let mut layout = AdapterLayout { modules, head, bytes: 0 };
        let mut bytes = 0u64;
        for want in layout.tensors() {
            bytes += size_of_f32(&want)? as u64;
        }
        layout.bytes = bytes;
        Ok(layout)
    }

    /// Every tensor, under PEFT's name.
    pub fn tensors(&self) -> impl Iterator<Item = Expected> {
        self.modules.iter().flat_map(|(name, m)| m.factors(name)).chain(self.head.clone())
    }

    /// The tensor of the score head that it brings.
    pub fn head(&self) -> Option<&str> {
        self.head.as_ref().map(|head| head.name.as_str())
    }

    /// What the values take in f32.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// True if factors of one have the places, ranks and scales that the other asks for.
    pub fn is_like(&self, other: &AdapterLayout) -> bool {
        self.modules == other.modules && self.head() == other.head()
    }

    /// Zeros: it changes nothing, and the base model's own head stays.
    ///
    /// # Errors
    /// `HostMemory`.
    pub fn zeros(&self) -> Result<AdapterWeights> {
        self.read(&self.as_weights(None)?, false)
    }

    /// The values of an adapter as tensors under PEFT's names, in f32; `None`: zeros, as a head is that the adapter lacks.
    ///
    /// # Errors
    /// `HostMemory`.
    pub fn as_weights(&self, values: Option<&AdapterWeights>) -> Result<Weights> {
        let mut tensors = std::collections::HashMap::new();
        let mut add = |want: &Expected, values: &mut dyn Iterator<Item = f32>| -> Result<()> {
            let mut buffer = Buffer::new(&format!("tensor {:?}", want.name), size_of_f32(want)?)?;
            buffer
                .as_mut_slice()
                .chunks_exact_mut(4)
                .zip(values)
                .for_each(|(to, v)| to.copy_from_slice(&v.to_le_bytes()));
            let place = Place::Memory(std::sync::Arc::new(buffer));
            tensors.insert(want.name.clone(), Tensor { dtype: Dtype::F32, shape: want.shape.clone(), place });
            Ok(())
        };
        for (name, module) in &self.modules {
            let [want_a, want_b] = module.factors(name);
            let (mut a, mut b): (&[f32], Vec<f32>) = (&[], Vec::new());
            if let Some(held) = values.and_then(|v| v.get(module.matrix)) {
                (a, b) = (&held.a, transposed(&held.b, module.rank, module.shape[0])?);
            }
            add(&want_a, &mut a.iter().copied())?;
            add(&want_b, &mut b.into_iter())?;
        }
        if let Some(want) = &self.head {
            let head = values.and_then(AdapterWeights::head).unwrap_or_default();
            add(want, &mut head.iter().copied())?;
        }
        Ok(Weights { tensors })
    }

    /// The adapter that these tensors make; its head counts where `with_head`.
    ///
    /// # Errors
    /// `NonFinite`, naming the tensors, for NaN and infinities; `HostMemory`.
    pub fn read(&self, weights: &Weights, with_head: bool) -> Result<AdapterWeights> {
        let mut problems = Vec::new();
        let mut values = |want: &Expected| -> Result<Vec<f32>> {
            let values = to_f32(weights.get(&want.name)?)?;
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
        let head = self.head.as_ref().filter(|_| with_head).map(values).transpose()?;
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

fn size_of_f32(want: &Expected) -> Result<usize> {
    let factors: Vec<usize> = want.shape.iter().copied().chain([4]).collect();
    checked_size(&format!("tensor {:?}", want.name), &factors)
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
fn head(config: &AdapterConfig, spec: &ModelSpec, plan: &Plan, has: impl Fn(&str) -> bool) -> Option<Expected> {
    let name = format!("{PREFIX}{SCORE}.weight");
    let has_head = matches!(spec.head, Head::SequenceClassification { .. });
    let brings = config.saves_score || (config.may_save_score && has(&name));
    (has_head && brings).then(|| Expected { name, shape: plan.matrices[plan.head.0].shape.clone() })
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
