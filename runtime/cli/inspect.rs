//! `rewardrt inspect`

use std::collections::BTreeMap;

use rewardrt::model::{Head, Plan};
use rewardrt::weights::{Checkpoint, LoadOptions};
use rewardrt::{Error, ErrorKind, Result, Rule};
use serde_json::{Map, Value, json};

use crate::args::Inspect;
use crate::sink::print_line;

pub fn run(args: &Inspect) -> Result<()> {
    if args.model.join("adapter_config.json").exists() {
        return adapter(args);
    }
    let spec = rewardrt::model::read_spec(&args.model)?;
    let options = LoadOptions::default();
    let checkpoint = Checkpoint::open(&args.model, &options)?;
    let tensors: Vec<_> = checkpoint.tensors().map(|(name, info)| (name.to_owned(), info)).collect();
    let bytes = checkpoint.total_bytes();
    let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
    for (_, info) in &tensors {
        *dtypes.entry(info.dtype.clone()).or_default() += info.bytes;
    }
    // Shown even if the tensors do not fit; the exit code and the list of differences come at the end.
    let fits = Plan::new(&spec).and_then(|plan| plan.load_weights(&spec, &args.model, &options));
    let rule = Rule::for_model(&spec).map_or_else(|_| "none: name one, as in judge:yes,no".into(), |r| r.to_string());
    let head = match &spec.head {
        Head::LanguageModel { tied: true } => "language model, tied to the embedding".to_owned(),
        Head::LanguageModel { tied: false } => "language model".to_owned(),
        Head::SequenceClassification { labels } => format!("sequence classification: {}", labels.join(", ")),
    };
    if args.json {
        let list: Vec<_> = tensors
            .iter()
            .map(|(name, i)| json!({"name": name, "dtype": i.dtype, "shape": i.shape, "bytes": i.bytes}))
            .collect();
        print_line(
            &json!({
                "architecture": spec.architecture, "head": head, "rule": rule, "layers": spec.layers,
                "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size, "heads": spec.heads,
                "kv_heads": spec.kv_heads, "head_dim": spec.head_dim, "vocab_size": spec.vocab_size,
                "context": spec.context(), "sliding_window": spec.sliding_window,
                "rope": format!("{:?}", spec.rope.kind), "dtypes": dtypes, "bytes": bytes,
                "fits_config": fits.is_ok(), "tensors": list,
            })
            .to_string(),
        )?;
    } else {
        let window = spec.sliding_window.map_or("none".to_owned(), |w| w.to_string());
        let dtypes: Vec<_> = dtypes.iter().map(|(d, b)| format!("{d} {:.1} MB", *b as f64 / 1e6)).collect();
        for (name, value) in [
            ("architecture", spec.architecture.clone()),
            ("head", head),
            ("rule", rule),
            ("layers", spec.layers.to_string()),
            ("width", format!("{} hidden, {} in the MLP", spec.hidden_size, spec.intermediate_size)),
            (
                "attention",
                format!("{} heads of {}, {} kv heads, window {window}", spec.heads, spec.head_dim, spec.kv_heads),
            ),
            ("rope", format!("theta {}, {:?}", spec.rope.theta, spec.rope.kind)),
            ("context", spec.context().to_string()),
            ("vocabulary", spec.vocab_size.to_string()),
            ("bytes", format!("{:.1} MB: {}", bytes as f64 / 1e6, dtypes.join(", "))),
            ("tensors", tensors.len().to_string()),
        ] {
            print_line(&format!("{name:<14} {value}"))?;
        }
        for (name, info) in &tensors {
            print_line(&format!("  {:<5} {:<18} {name}", info.dtype, format!("{:?}", info.shape)))?;
        }
    }
    fits.map(|_| ())
}

/// An adapter folder says what it is; whether it fits a model turns out with that model.
fn adapter(args: &Inspect) -> Result<()> {
    let folder = &args.model;
    let path = folder.join("adapter_config.json");
    let failed = |e: String| Error::new(ErrorKind::Format, format!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|e| failed(e.to_string()))?;
    let config: Map<String, Value> = serde_json::from_str(&text).map_err(|e| failed(e.to_string()))?;
    let checkpoint = Checkpoint::open(&folder.join("adapter_model.safetensors"), &LoadOptions::default())?;
    let tensors: Vec<_> = checkpoint.tensors().collect();
    if args.json {
        let list: Vec<_> = tensors
            .iter()
            .map(|(name, i)| json!({"name": name, "dtype": i.dtype, "shape": i.shape, "bytes": i.bytes}))
            .collect();
        let line = json!({"adapter": config, "bytes": checkpoint.total_bytes(), "tensors": list});
        return print_line(&line.to_string());
    }
    const FIELDS: [&str; 8] = [
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "rank_pattern",
        "modules_to_save",
    ];
    for field in FIELDS {
        print_line(&format!("{field:<24} {}", config.get(field).unwrap_or(&Value::Null)))?;
    }
    print_line(&format!("{:<24} {:.1} MB", "bytes", checkpoint.total_bytes() as f64 / 1e6))?;
    for (name, info) in &tensors {
        print_line(&format!("  {:<5} {:<14} {name}", info.dtype, format!("{:?}", info.shape)))?;
    }
    Ok(())
}
