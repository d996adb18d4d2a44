//! Parity with transformers in f32 on small random checkpoints of every kind (tests/golden/make.py).
//!
//! `cargo test --release --test golden`; `REWARDRT_ISA` chooses the CPU path.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::expected::{check, expected, floats, ids};
use common::{devices, devices_and_matrix_units, golden, load, open, small};
use rewardrt::weights::WeightFormat;
use rewardrt::{LogprobRequest, ModelOptions, Precision};

fn names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(golden(""))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("expected.json").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 20, "golden folders are missing: {names:?}");
    names
}

/// Options under which as little is rounded as can be.
fn exact() -> ModelOptions {
    ModelOptions { precision: Precision::F32, ..small() }
}

#[test]
fn every_checkpoint_on_every_device() {
    for device in devices() {
        let runtime = open(&device, 2);
        for name in names() {
            check(&name, &load(&runtime, &name, &exact()), None);
        }
    }
}

/// What rounding may cost, as the mean of e^|Δ log-prob| over all checkpoints with a language model.
#[test]
fn what_rounds_keeps_its_gate() {
    let auto = small();
    let int8 = ModelOptions { weights: WeightFormat::Int8, ..small() };
    let int4 = ModelOptions { weights: WeightFormat::Int4, ..small() };
    for device in devices_and_matrix_units() {
        let runtime = open(&device, 2);
        // Not much of a gate for 4 bits: what they cost is told, not bounded.
        let cases = [("auto", &auto, 1.01), ("int8", &int8, 1.03), ("int4", &int4, 2.0)];
        for (what, options, gate) in cases {
            // Integer weights use no matrix units.
            if device.contains("emulated") && what != "auto" {
                continue;
            }
            let mut ratios = Vec::new();
            for name in names() {
                let expected = expected(&name);
                if expected.get("scores").is_some() {
                    continue;
                }
                let sequences = expected["sequences"].as_array().unwrap().iter().map(ids).collect();
                let request = LogprobRequest { sequences, ..LogprobRequest::default() };
                let results = load(&runtime, &name, options).logprobs(&request).unwrap().wait().unwrap();
                for (result, want) in results.iter().zip(expected["logprobs"].as_array().unwrap()) {
                    let got = result.logprobs[1..].iter().map(|l| l.unwrap());
                    ratios.extend(got.zip(floats(want)).map(|(g, w)| f64::from((g - w).abs()).exp()));
                }
            }
            let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
            println!("{device} {what}: mean exp|Δ| {mean:.5} over {} tokens", ratios.len());
            assert!(mean <= gate, "{device} {what}: {mean}");
        }
    }
}

#[test]
fn without_mmap_the_result_is_the_same() {
    let runtime = open("cpu", 2);
    for name in ["llama-shards", "llama-tied"] {
        let mut options = exact();
        options.load.use_mmap = false;
        check(name, &load(&runtime, name, &options), None);
    }
}
