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
    /// The score head that it brings, or may bring.
    head: Option<Expected>,
    needs_head: bool,
    factor_bytes: u64,
    head_bytes: u64,
}

impl AdapterLayout {
    /// Reads adapter_config.json.
    ///
    /// # Errors
    /// `Format` and `Limit` for what is malformed or too large; `Unsupported` for another kind of adapter; `Shape` for
    /// ranks beyond the base model's sizes.
    pub fn new(config: &[u8], spec: &ModelSpec, plan: &Plan) -> Result<Self> {
        if config.len() > MAX_CONFIG {
            let text = format!("{CONFIG}: {} bytes, at most {MAX_CONFIG} are allowed", config.len());
            return Err(Error::limit(text));
        }
        let config = AdapterConfig::parse(config)?;
        let modules = modules(&config, plan)?;
        refuse_other_targets(&config, spec)?;
        let head = head(&config, spec, plan);
        let mut factor_bytes = 0u64;
        for want in modules.iter().flat_map(|(name, m)| m.factors(name)) {
            factor_bytes += size_of_f32(&want)? as u64;
        }
        let head_bytes = head.as_ref().map_or(Ok(0), size_of_f32)? as u64;
        Ok(AdapterLayout { needs_head: config.saves_score, modules, head, factor_bytes, head_bytes })
    }

    /// Refuses an adapter that changes nothing.
    ///
    /// # Errors
    /// `Unsupported`, with the modules that the base model has.
    pub fn check_purpose(&self, has_head: bool, spec: &ModelSpec, plan: &Plan) -> Result<()> {
        if has_head || !self.modules.is_empty() {
            return Ok(());
        }
        let known = plan.projections().into_iter().map(|id| module_of(&plan.matrices[id.0].name));
        let known = known.map(|name| name.rsplit('.').next().unwrap_or(name)).collect::<Vec<_>>();
        let mut known: Vec<&str> = known.into_iter().take(7).collect();
        known.sort_unstable();
        Err(Error::unsupported(format!(
            "{CONFIG}: \"target_modules\" matches no module of {}; it has {}",
            spec.architecture,
            known.join(", ")
        )))
    }

    /// Every tensor, under PEFT's name.
    pub fn tensors(&self, with_head: bool) -> impl Iterator<Item = Expected> {
        let head = self.head.clone().filter(|_| with_head);
        self.modules.iter().flat_map(|(name, m)| m.factors(name)).chain(head)
    }

    /// The tensor of the score head that it may have.
    pub fn head(&self) -> Option<&str> {
        self.head.as_ref().map(|head| head.name.as_str())
    }

    /// True if the config says that it has a score head.
    pub fn needs_head(&self) -> bool {
        self.head.is_some() && self.needs_head
    }

    /// What the values take in f32.
    pub fn bytes(&self, with_head: bool) -> u64 {
        self.factor_bytes + if with_head { self.head_bytes } else { 0 }
    }

    /// What keeps factors of another layout from being taken for those of this one.
    pub fn difference(&self, other: &AdapterLayout) -> Option<String> {
        for (name, module) in &self.modules {
            match other.modules.get(name) {
                None => return Some(format!("it has no factors of {name}, and the adapter has")),
                Some(theirs) if theirs != module => {
                    return Some(format!(
                        "the factors of {name} have rank {} and scale {}, the adapter's have {} and {}",
                        theirs.rank, theirs.scale, module.rank, module.scale
                    ));
                }
                Some(_) => {}
            }
        }
        let more = other.modules.keys().find(|name| !self.modules.contains_key(*name));
        let more = more.map(|name| format!("it has factors of {name}, and the adapter has none"));
        more.or_else(|| {
            let more_head = other.needs_head() && self.head.is_none();
            more_head.then(|| "it has a score head, and the adapter has none".into())
        })
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
            return Ok(AdapterWeights { bytes: self.bytes(head.is_some()), modules, names, head, rank });
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

/// The score head that the adapter brings, or may bring without saying so.
fn head(config: &AdapterConfig, spec: &ModelSpec, plan: &Plan) -> Option<Expected> {
    let has_head = matches!(spec.head, Head::SequenceClassification { .. });
    let name = format!("{PREFIX}{SCORE}.weight");
    let shape = plan.matrices[plan.head.0].shape.clone();
    (has_head && (config.saves_score || config.may_save_score)).then_some(Expected { name, shape })
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
