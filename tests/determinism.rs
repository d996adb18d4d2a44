//! The contract: what is returned for a sequence depends on the sequence alone. Equal bits, no tolerance.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;

use common::{devices_and_matrix_units as devices, load, open, small};
use rewardrt::model::{Plan, read_spec};
use rewardrt::weights::{Dtype, WeightFormat};
use rewardrt::{LogprobRequest, Model, ModelOptions, Precision, SampleRequest, SampledToken, ScoreRequest};
use serde_json::json;

const MODELS: [&str; 4] = ["llama-gqa-9-3", "llama-odd-widths", "mistral-window", "llama-wide"];

/// Models and how they are loaded.
fn cases(device: &str) -> Vec<(&'static str, ModelOptions)> {
    let int8 = ModelOptions { weights: WeightFormat::Int8, ..small() };
    let int4 = ModelOptions { weights: WeightFormat::Int4, ..small() };
    let exact = ModelOptions { precision: Precision::F32, ..small() };
    let mut cases = MODELS.map(|name| (name, small())).to_vec();
    cases.extend([("llama-odd-widths", int8.clone()), ("llama-wide", int8), ("llama-wide", exact)]);
    cases.extend([("llama-odd-widths", int4.clone()), ("llama-wide", int4)]);
    if device.contains("emulated") {
        // Matrix units take stored 16-bit weights with whole tiles along K.
        cases = ["llama-wide", "llama-tied", "mistral-window"].map(|name| (name, small())).to_vec();
    }
    if device.ends_with("emulated8") {
        // Heads of 8, which tiles of 16 leave to the other kernel; the products are the same.
        cases = vec![("llama-gqa-9-3", small())];
    }
    cases
}

/// Which mixes of controls a case takes: all on the CPU; on a GPU, where what is sampled from is the same for all models, its
/// share of them.
fn variants(device: &str, case: usize) -> Vec<usize> {
    if device == "cpu" { vec![0, 1, 2] } else { vec![case % 3] }
}

/// Some are longer than a chunk of keys.
fn prompt(i: usize) -> Vec<u32> {
    let length = 3 + i * 7 % 37 + if i % 8 == 5 { 70 } else { 0 };
    (0..length).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()
}

/// A mix of sampling controls: the result must not depend on the batch under any of them.
fn request(prompts: Vec<Vec<u32>>, streams: Vec<u64>, variant: usize) -> SampleRequest {
    let base =
        SampleRequest { prompts, streams, max_tokens: 12, seed: 7, ignore_eos: true, ..SampleRequest::default() };
    match variant {
        0 => base,
        1 => SampleRequest { temperature: 0.7, top_k: 12, top_p: 0.9, ..base },
        _ => SampleRequest { temperature: 1.3, min_p: 0.05, repetition_penalty: 1.2, top_logprobs: 2, ..base },
    }
}

fn sample(model: &Model, request: &SampleRequest) -> Vec<Vec<SampledToken>> {
    model.sample(request).unwrap().wait().unwrap().into_iter().map(|s| s.tokens).collect()
}

#[test]
fn a_sequence_does_not_see_its_batch() {
    for device in devices() {
        for (case, (name, options)) in cases(&device).into_iter().enumerate() {
            let model = load(&open(&device, 2), name, &options);
            for variant in variants(&device, case) {
                let alone: Vec<_> = (0..6)
                    .map(|i| sample(&model, &request(vec![prompt(i)], vec![i as u64], variant)).remove(0))
                    .collect();
                // Among 64 others, in reverse order.
                let order: Vec<usize> = (0..70).rev().collect();
                let prompts = order.iter().map(|&i| prompt(i)).collect();
                let streams = order.iter().map(|&i| i as u64).collect();
                let crowd = sample(&model, &request(prompts, streams, variant));
                for (i, tokens) in alone.iter().enumerate() {
                    assert_eq!(tokens, &crowd[69 - i], "{device} {name} variant {variant} sequence {i}");
                }
            }
        }
    }
}

#[test]
fn chunks_and_threads_do_not_matter() {
    for device in devices() {
        for (name, base) in cases(&device) {
            let prompts: Vec<_> = (0..9).map(prompt).collect();
            let results: Vec<_> = [(1, 1), (7, 2), (64, 2), (1024, 3)]
                .into_iter()
                .map(|(rows, threads)| {
                    let options = ModelOptions { max_batch_tokens: Some(rows), ..base.clone() };
                    let model = load(&open(&device, threads), name, &options);
                    let texts = LogprobRequest { sequences: prompts.clone(), ..LogprobRequest::default() };
                    let logprobs = model.logprobs(&texts).unwrap().wait().unwrap();
                    (sample(&model, &request(prompts.clone(), Vec::new(), 1)), logprobs)
                })
                .collect();
            for other in &results[1..] {
                assert_eq!(&results[0], other, "{device} {name}");
            }
        }
    }
}

#[test]
fn sampled_logprobs_equal_rescored_ones() {
    for device in devices() {
        for (case, (name, options)) in cases(&device).into_iter().enumerate() {
            let model = load(&open(&device, 2), name, &options);
            for variant in variants(&device, case) {
                let prompts: Vec<_> = (0..64).map(prompt).collect();
                let sampled = sample(&model, &request(prompts.clone(), Vec::new(), variant));
                let pairs: Vec<_> = prompts
                    .iter()
                    .zip(&sampled)
                    .map(|(p, tokens)| (p.clone(), tokens.iter().map(|t| t.id).collect::<Vec<u32>>()))
                    .collect();
                let check = |i: usize, got: &rewardrt::SequenceLogprobs| {
                    let want: Vec<_> = sampled[i].iter().map(|t| Some(t.model_logprob)).collect();
                    assert_eq!(got.logprobs, want, "{device} {name} variant {variant} sequence {i}");
                    let want: Vec<_> = sampled[i].iter().map(|t| Some(t.entropy)).collect();
                    assert_eq!(got.entropies, want);
                };
                let together = model.logprobs(&LogprobRequest::completions(pairs.clone())).unwrap().wait().unwrap();
                together.iter().enumerate().for_each(|(i, got)| check(i, got));
                let alone = model.logprobs(&LogprobRequest::completions([pairs[5].clone()])).unwrap().wait().unwrap();
                check(5, &alone[0]);
                if variant == 0 {
                    // Nothing was changed about the distribution: both log-probs are one number.
                    assert!(sampled.iter().flatten().all(|t| t.logprob == t.model_logprob));
                }
            }
        }
    }
}

#[test]
fn scores_do_not_see_their_batch() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-labels-3", &small());
        let sequences: Vec<_> = (0..40).map(prompt).collect();
        let score = |sequences: Vec<Vec<u32>>| {
            model.score(&ScoreRequest { sequences, ..ScoreRequest::default() }).unwrap().wait().unwrap()
        };
        let together = score(sequences.clone());
        for (i, sequence) in sequences.into_iter().enumerate().step_by(9) {
            assert_eq!(score(vec![sequence])[0], together[i], "{device} {i}");
        }
    }
}

/// With room for few sequences at a time, others wait; and when jobs are cancelled, blocks are used again.
#[test]
fn a_small_kv_cache_changes_nothing() {
    for device in devices() {
        let name = "llama-gqa-9-3";
        let prompts: Vec<_> = (0..20).map(prompt).collect();
        let wide = load(&open(&device, 2), name, &small());
        let narrow = load(&open(&device, 2), name, &ModelOptions { kv_tokens: Some(160), ..small() });
        let expected = sample(&wide, &request(prompts.clone(), Vec::new(), 2));
        for _ in 0..3 {
            let long = SampleRequest { max_tokens: 40, ..request(prompts.clone(), Vec::new(), 0) };
            let job = narrow.sample(&long).unwrap();
            job.cancel();
            let partial = job.wait().unwrap();
            assert!(partial.iter().all(|s| s.finish == rewardrt::Finish::Cancelled || s.tokens.len() == 40));
        }
        assert_eq!(sample(&narrow, &request(prompts, Vec::new(), 2)), expected, "{device}");
    }
}

/// Writes a random bf16 checkpoint whose heads of 16 fit all tiles of matrix units, and whose context has two segments of keys.
fn heads_of_16(folder: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let plan = Plan::new(&read_spec(folder).unwrap()).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (i, tensor) in plan.expected().enumerate() {
        let count: usize = tensor.shape.iter().product();
        let value = |j: usize| ((j * 7 + i * 1001) as u32).wrapping_mul(2_654_435_761) as f32 / 8_589_934_592.0 - 0.25;
        let values: Vec<f32> = (0..count).map(|j| if tensor.shape.len() == 1 { 1.0 } else { value(j) }).collect();
        let start = data.len();
        data.extend(Dtype::BF16.from_f32(&values));
        let offsets = [start, data.len()];
        header.insert(tensor.name.clone(), json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}));
    }
    let header = serde_json::Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data[..]].concat();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

/// Attention over one segment and over two, of rows alone and together, where all of it may be on matrix units.
#[test]
fn heads_as_wide_as_a_tile() {
    let folder = tempfile::tempdir().unwrap();
    heads_of_16(folder.path());
    let prompts: Vec<Vec<u32>> = [1021, 5, 40, 70].map(|n| (0..n).map(|i| (i * 31 + n) % 90 + 6).collect()).to_vec();
    let mut exact: Option<Vec<f32>> = None;
    for device in devices() {
        // The CPU's products would round to bf16, with an eighth of the precision.
        let precision = if device == "cpu" { Precision::F32 } else { Precision::Auto };
        let base = ModelOptions { kv_tokens: Some(4096), max_context: Some(2048), precision, ..small() };
        let options = ModelOptions { max_batch_tokens: Some(512), ..base.clone() };
        let model = open(&device, 2).load_model(folder.path(), &options).unwrap();
        let request = SampleRequest { max_tokens: 8, ..request(prompts.clone(), Vec::new(), 0) };
        let sampled = sample(&model, &request);
        let ids = |tokens: &[SampledToken]| tokens.iter().map(|t| t.id).collect::<Vec<u32>>();
        let pairs: Vec<_> = prompts.iter().cloned().zip(sampled.iter().map(|t| ids(t))).collect();
        let want: Vec<Vec<_>> =
            sampled.iter().map(|tokens| tokens.iter().map(|t| Some(t.model_logprob)).collect()).collect();
        for rows in [512, 33] {
            let options = ModelOptions { max_batch_tokens: Some(rows), ..base.clone() };
            let model = open(&device, 2).load_model(folder.path(), &options).unwrap();
            let scored = model.logprobs(&LogprobRequest::completions(pairs.clone())).unwrap().wait().unwrap();
            let got: Vec<Vec<_>> = scored.into_iter().map(|s| s.logprobs).collect();
            assert_eq!(got, want, "{device}: {rows} rows a step");
        }
        // All devices against the first.
        let texts = LogprobRequest { sequences: prompts.clone(), ..LogprobRequest::default() };
        let scored = model.logprobs(&texts).unwrap().wait().unwrap();
        let got: Vec<f32> = scored.iter().flat_map(|s| s.logprobs.iter().flatten().copied()).collect();
        let exact = exact.get_or_insert_with(|| got.clone());
        let mean = got.iter().zip(&*exact).map(|(a, b)| f64::from((a - b).abs()).exp()).sum::<f64>() / got.len() as f64;
        println!("{device}: mean exp|Δ| {mean:.5} over {} tokens", got.len());
        assert!(mean <= 1.01, "{device}: {mean}");
    }
}
