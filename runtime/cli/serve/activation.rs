//! What vLLM makes of a classifier's logits where a request does not turn it off.

use std::path::Path;

use rewardrt::model::{Head, ModelSpec};
use rewardrt::{Error, ErrorKind, Result, Rule};
use serde_json::Value;

const MAX_CONFIG: u64 = 1 << 20;

/// From logits to values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The values are what they are: of a regression, or probabilities already (`judge`).
    Identity,
    /// Each by itself: one label, or several that do not exclude each other.
    Sigmoid,
    /// Each by itself, from -1 to 1.
    Tanh,
    /// All together.
    Softmax,
}

/// PyTorch's modules, as sentence-transformers writes them into config.json.
const MODULES: [(&str, Activation); 6] = [
    ("torch.nn.modules.linear.Identity", Activation::Identity),
    ("torch.nn.modules.activation.Sigmoid", Activation::Sigmoid),
    ("torch.nn.modules.activation.Tanh", Activation::Tanh),
    ("torch.nn.Identity", Activation::Identity),
    ("torch.nn.Sigmoid", Activation::Sigmoid),
    ("torch.nn.Tanh", Activation::Tanh),
];

/// Of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    /// Of `/classify`.
    pub classes: Activation,
    /// Of `/score` and `/rerank`.
    pub pairs: Activation,
}

impl Activations {
    /// `classes` by `problem_type` of config.json, else by the number of labels; `pairs` by what a cross-encoder's
    /// config.json names, else the same.
    ///
    /// # Errors
    /// `Io` or `Format` if config.json cannot be read, `Argument` if it names an activation that is not known.
    pub fn of(rule: &Rule, spec: &ModelSpec, folder: &Path) -> Result<Self> {
        let same = |activation| Activations { classes: activation, pairs: activation };
        let Head::SequenceClassification { labels } = &spec.head else { return Ok(same(Activation::Identity)) };
        if !matches!(rule, Rule::Sequence) {
            return Ok(same(Activation::Identity));
        }
        let config = config(folder)?;
        let classes = match config["problem_type"].as_str() {
            Some("regression") => Activation::Identity,
            Some("multi_label_classification") => Activation::Sigmoid,
            _ if labels.len() < 2 => Activation::Sigmoid,
            _ => Activation::Softmax,
        };
        let pairs = of_cross_encoder(&config).map_err(|e| e.at(folder.join("config.json").display().to_string()))?;
        Ok(Activations { classes, pairs: pairs.unwrap_or(classes) })
    }
}

/// The newer name goes first.
fn of_cross_encoder(config: &Value) -> Result<Option<Activation>> {
    let fields = [
        ("sentence_transformers.activation_fn", &config["sentence_transformers"]["activation_fn"]),
        ("sbert_ce_default_activation_function", &config["sbert_ce_default_activation_function"]),
    ];
    let Some((field, value)) = fields.into_iter().find(|(_, value)| !value.is_null()) else { return Ok(None) };
    match MODULES.iter().find(|(name, _)| value.as_str() == Some(*name)) {
        Some((_, activation)) => Ok(Some(*activation)),
        None => {
            let names: Vec<&str> = MODULES.iter().map(|(name, _)| *name).collect();
            let message = format!("{field} is {value}, it must be one of {}", names.join(", "));
            Err(Error::new(ErrorKind::Argument, message))
        }
    }
}

impl Activation {
    pub fn apply(self, values: &[f32]) -> Vec<f32> {
        match self {
            Activation::Identity => values.to_vec(),
            Activation::Sigmoid => values.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Activation::Tanh => values.iter().map(|x| x.tanh()).collect(),
            Activation::Softmax => {
                let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = values.iter().map(|x| (x - max).exp()).collect();
                let total: f32 = weights.iter().sum();
                weights.iter().map(|w| w / total).collect()
            }
        }
    }
}

fn config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    let failed = |kind, e: &dyn std::fmt::Display| Error::new(kind, format!("{}: {e}", path.display()));
    let file = std::fs::File::open(&path).map_err(|e| failed(ErrorKind::Io, &e))?;
    let reader = std::io::BufReader::new(std::io::Read::take(file, MAX_CONFIG));
    serde_json::from_reader(reader).map_err(|e| failed(ErrorKind::Format, &e))
}
