//! Whole jobs: decode at 1, 8 and 64 sequences, scoring 16 × 256, load to first token.
//!
//! On a synthetic checkpoint (SmolLM2's widths, 4 layers, V 4096, bf16), or on REWARDRT_BENCH_MODEL; on
//! REWARDRT_BENCH_DEVICE (cpu).
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use rewardrt::model::{Plan, read_spec};
use rewardrt::weights::Dtype;
use rewardrt::{LogprobRequest, Model, ModelOptions, Runtime, RuntimeOptions, SampleRequest};
use serde_json::json;

/// Writes a random bf16 checkpoint.
fn synthesise(folder: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 4096, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": true, "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let plan = Plan::new(&read_spec(folder).unwrap()).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (i, tensor) in plan.expected().enumerate() {
        let count: usize = tensor.shape.iter().product();
        let value = |j: usize| ((j * 7 + i) as u32).wrapping_mul(2_654_435_761) as f32 / 4.0e9 - 0.5;
        let values: Vec<f32> = (0..count).map(|j| if tensor.shape.len() == 1 { 1.0 } else { value(j) * 0.1 }).collect();
        let start = data.len();
        data.extend(Dtype::BF16.from_f32(&values));
        header.insert(
            tensor.name.clone(),
            json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn load(folder: &Path) -> Model {
    let device = std::env::var("REWARDRT_BENCH_DEVICE").unwrap_or("cpu".into());
    let runtime = Runtime::open(&RuntimeOptions { device, ..RuntimeOptions::default() }).unwrap();
    runtime.load_model(folder, &ModelOptions::default()).unwrap()
}

fn ids(rows: usize, length: usize) -> Vec<Vec<u32>> {
    (0..rows).map(|r| (0..length).map(|i| ((r * 131 + i * 37) % 4000 + 10) as u32).collect()).collect()
}

fn jobs(c: &mut Criterion) {
    let scratch = tempfile::tempdir().unwrap();
    let folder = match std::env::var_os("REWARDRT_BENCH_MODEL") {
        Some(folder) => PathBuf::from(folder),
        None => {
            synthesise(scratch.path());
            scratch.path().to_owned()
        }
    };
    let model = load(&folder);
    let mut group = c.benchmark_group("engine");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for sequences in [1usize, 8, 64] {
        let request =
            SampleRequest { prompts: ids(sequences, 43), max_tokens: 48, ignore_eos: true, ..SampleRequest::default() };
        group.throughput(Throughput::Elements(48 * sequences as u64));
        group.bench_function(BenchmarkId::new("decode 43+48, sequences", sequences), |b| {
            b.iter(|| model.sample(&request).unwrap().wait().unwrap());
        });
    }
    let request = LogprobRequest { sequences: ids(16, 256), ..LogprobRequest::default() };
    group.throughput(Throughput::Elements(16 * 256));
    group.bench_function("log-probs 16x256", |b| b.iter(|| model.logprobs(&request).unwrap().wait().unwrap()));
    let request = SampleRequest { prompts: ids(1, 8), max_tokens: 1, ..SampleRequest::default() };
    group.throughput(Throughput::Elements(1));
    group.bench_function("load to first token", |b| {
        b.iter(|| load(&folder).sample(&request).unwrap().wait().unwrap());
    });
    group.finish();
}

criterion_group!(benches, jobs);
criterion_main!(benches);
