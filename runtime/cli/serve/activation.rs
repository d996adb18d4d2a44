//! What vLLM makes of a classifier's logits where a request does not turn it off.

use std::path::Path;

use rewardrt::model::{Head, ModelSpec};
use rewardrt::{Error, ErrorKind, Result, Rule};

const MAX_CONFIG: u64 = 1 << 20;

/// From logits to `probs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// The values are what they are: of a regression, or probabilities already (`judge`).
    Identity,
    /// Each by itself: one label, or several that do not exclude each other.
    Sigmoid,
    /// All together.
    Softmax,
}

impl Activation {
    /// By `problem_type` of config.json, else by the number of labels.
    ///
    /// # Errors
    /// `Io` or `Format` if config.json cannot be read.
    pub fn of(rule: &Rule, spec: &ModelSpec, folder: &Path) -> Result<Self> {
        let Head::SequenceClassification { labels } = &spec.head else { return Ok(Activation::Identity) };
        if !matches!(rule, Rule::Sequence) {
            return Ok(Activation::Identity);
        }
        Ok(match problem_type(folder)?.as_deref() {
            Some("regression") => Activation::Identity,
            Some("multi_label_classification") => Activation::Sigmoid,
            _ if labels.len() < 2 => Activation::Sigmoid,
            _ => Activation::Softmax,
        })
    }

    pub fn apply(self, values: &[f32]) -> Vec<f32> {
        match self {
            Activation::Identity => values.to_vec(),
            Activation::Sigmoid => values.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Activation::Softmax => {
                let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = values.iter().map(|x| (x - max).exp()).collect();
                let total: f32 = weights.iter().sum();
                weights.iter().map(|w| w / total).collect()
            }
        }
    }
}

fn problem_type(folder: &Path) -> Result<Option<String>> {
    let path = folder.join("config.json");
    let failed = |kind, e: &dyn std::fmt::Display| Error::new(kind, format!("{}: {e}", path.display()));
    let file = std::fs::File::open(&path).map_err(|e| failed(ErrorKind::Io, &e))?;
    let reader = std::io::BufReader::new(std::io::Read::take(file, MAX_CONFIG));
    let config: serde_json::Value = serde_json::from_reader(reader).map_err(|e| failed(ErrorKind::Format, &e))?;
    Ok(config["problem_type"].as_str().map(str::to_owned))
}
