//! Sampled frequencies against exact probabilities (chi-square), in the kernel and through the engine.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{devices, load, open, small};
use rewardrt::kernels::philox::Draw;
use rewardrt::kernels::{Isa, sample};
use rewardrt::{LogprobRequest, SampleRequest};

/// Asserts that counts fit probabilities: by the Wilson–Hilferty cube root the statistic is normal; 3.72 standard
/// deviations are p = 1e-4.
#[track_caller]
fn chi_square(what: &str, counts: &[u64], p: &[f64]) {
    let total: u64 = counts.iter().sum();
    let (mut statistic, mut cells) = (0.0, 0);
    // Rare outcomes together, so that every cell expects at least 5.
    let (mut rare_count, mut rare_p) = (0.0, 0.0);
    for (count, p) in counts.iter().zip(p) {
        let expected = p * total as f64;
        if expected < 5.0 {
            assert!(*p > 0.0 || *count == 0, "{what}: an impossible token was drawn");
            rare_count += *count as f64;
            rare_p += expected;
        } else {
            statistic += (*count as f64 - expected).powi(2) / expected;
            cells += 1;
        }
    }
    if rare_p >= 5.0 {
        statistic += (rare_count - rare_p).powi(2) / rare_p;
        cells += 1;
    }
    if cells < 2 {
        return;
    }
    let freedom = f64::from(cells - 1);
    let z = ((statistic / freedom).cbrt() - (1.0 - 2.0 / (9.0 * freedom))) / (2.0 / (9.0 * freedom)).sqrt();
    println!("{what}: chi-square {statistic:.1} over {freedom} degrees of freedom, z {z:.2}");
    assert!(z < 3.72, "{what}: the frequencies do not fit");
}

/// softmax(z) over the tokens that satisfy `keep`.
fn probabilities(z: &[f64], keep: impl Fn(usize) -> bool) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::MIN, f64::max);
    let w: Vec<f64> = z.iter().enumerate().map(|(v, z)| if keep(v) { (z - max).exp() } else { 0.0 }).collect();
    let total: f64 = w.iter().sum();
    w.iter().map(|w| w / total).collect()
}

#[test]
fn a_million_draws_of_the_kernel() {
    let logits: Vec<f32> = (0..50).map(|v| ((v * 37 % 50) as f32 / 50.0 - 0.5) * 6.0).collect();
    let z: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
    let base = sample::Request::default();
    let rank = |v: usize| z.iter().filter(|o| **o > z[v]).count();
    let above = |v: usize| {
        let p = probabilities(&z, |_| true);
        (0..50).filter(|o| z[*o] > z[v]).map(|o| p[o]).sum::<f64>()
    };
    let hot: Vec<f64> = z.iter().map(|z| z / 1.7).collect();
    let top = z.iter().copied().fold(f64::MIN, f64::max);
    let cases = [
        ("plain", base, probabilities(&z, |_| true)),
        ("temperature", sample::Request { inverse_temperature: 1.0 / 1.7, ..base }, probabilities(&hot, |_| true)),
        ("top-k", sample::Request { top_k: 8, ..base }, probabilities(&z, |v| rank(v) < 8)),
        ("top-p", sample::Request { top_p: 0.7, ..base }, probabilities(&z, |v| above(v) < 0.7)),
        ("min-p", sample::Request { min_p: 0.1, ..base }, probabilities(&z, |v| z[v] >= top + 0.1f64.ln())),
        ("uniform", sample::Request { inverse_temperature: 0.0, ..base }, vec![0.02; 50]),
    ];
    let (isa, mut scratch) = (Isa::detect().unwrap(), sample::Scratch::default());
    for (name, request, p) in cases {
        let mut counts = vec![0u64; 50];
        for i in 0..1_000_000u32 {
            // Neighbouring counters, as samples and positions are.
            let draw = Draw { seed: 1, stream: 2, sample: i / 1000, position: i % 1000 };
            let request = sample::Request { uniform: draw.uniform(), ..request };
            counts[sample::sample(isa, &logits, &request, &mut scratch).token as usize] += 1;
        }
        chi_square(name, &counts, &p);
    }
}

#[test]
fn ten_thousand_draws_through_the_engine() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-gqa-9-3", &small());
        let prompt = vec![7u32, 30, 61];
        // The vocabulary has 101 tokens, so the top list is the whole distribution.
        let mut sequence = prompt.clone();
        sequence.push(0);
        let exact = LogprobRequest { sequences: vec![sequence], top_logprobs: 101, ..LogprobRequest::default() };
        let exact = model.logprobs(&exact).unwrap().wait().unwrap();
        let mut p = vec![0.0; 101];
        for (token, logprob) in &exact[0].top[3] {
            p[*token as usize] = f64::from(*logprob).exp();
        }
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5);
        let n = if device == "cpu" { 10_000 } else { 2_000 };
        let request = SampleRequest { prompts: vec![prompt], n, max_tokens: 1, seed: 3, ..SampleRequest::default() };
        let mut counts = vec![0u64; 101];
        for answer in model.sample(&request).unwrap().wait().unwrap() {
            let token = &answer.tokens[0];
            counts[token.id as usize] += 1;
            assert!((f64::from(token.logprob) - p[token.id as usize].ln()).abs() < 1e-4);
        }
        chi_square(&format!("engine on {device}"), &counts, &p);
    }
}

#[test]
fn seeds_streams_and_samples_differ_and_repeat() {
    let model = load(&open("cpu", 1), "llama-gqa-9-3", &small());
    let ids = |seed: u64, streams: Vec<u64>, n: usize| -> Vec<Vec<u32>> {
        let prompts = vec![vec![9, 9, 9]; streams.len()];
        let request =
            SampleRequest { prompts, n, streams, seed, max_tokens: 20, ignore_eos: true, ..SampleRequest::default() };
        let answers = model.sample(&request).unwrap().wait().unwrap();
        answers.iter().map(|a| a.tokens.iter().map(|t| t.id).collect()).collect()
    };
    let many = ids(1, vec![0, 1, 1 << 40], 3);
    assert_eq!(many.iter().collect::<std::collections::BTreeSet<_>>().len(), 9, "every stream and sample is its own");
    assert_eq!(many, ids(1, vec![0, 1, 1 << 40], 3));
    // Alone, and with fewer samples: the same.
    assert_eq!(many[6..7], ids(1, vec![1 << 40], 1)[..]);
    assert_ne!(many[0], ids(2, vec![0], 1)[0]);
    assert_ne!(many[0], ids(1 + (1 << 32), vec![0], 1)[0]);
}
