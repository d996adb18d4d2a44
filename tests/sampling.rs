//! Sampled frequencies against exact probabilities (chi-square), in the kernel and through the engine.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{devices, load, open, small};
use rewardrt::kernels::adjust_logits::{Edit, adjust_logits};
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

/// What typical-p keeps (Meister et al. 2022): the smallest |surprise − entropy| that hold `mass`.
fn typical(z: &[f64], mass: f64) -> Vec<f64> {
    let p = probabilities(z, |_| true);
    let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
    let far = |v: usize| (-p[v].ln() - entropy).abs();
    let nearer = |v: usize| (0..z.len()).filter(|o| far(*o) < far(v)).map(|o| p[o]).sum::<f64>();
    probabilities(z, |v| nearer(v) < mass)
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
        ("typical-p", sample::Request { typical_p: 0.6, ..base }, typical(&z, 0.6)),
        ("uniform", sample::Request { inverse_temperature: 0.0, ..base }, vec![0.02; 50]),
    ];
    let (isa, mut scratch) = (Isa::detect().unwrap(), sample::Scratch::default());
    // Bias, penalties and a mask change the row first; here all of them, under top-p and a temperature.
    let edit = |v: usize| Edit {
        token: v as u32,
        bias: if v.is_multiple_of(4) { 1.0 } else { 0.0 },
        penalty: 1.3,
        subtract: 0.25 * (v % 3) as f32,
        raw: 0.0,
    };
    let mut adjusted = logits.clone();
    let mask = [0b1011_1111_1101_1111_1111_0111_1111_1111u32, 0x0003_ffff & !(1 << 7)];
    adjust_logits(&mut (0..50).step_by(2).map(edit).collect::<Vec<_>>(), Some(&mask), &mut adjusted);
    let changed: Vec<f64> = (0..50)
        .map(|v| {
            let biased = z[v] + if v % 4 == 0 { 1.0 } else { 0.0 };
            let penalised = if biased > 0.0 { biased / 1.3 } else { biased * 1.3 };
            let edited = if v % 2 == 0 { penalised - 0.25 * (v % 3) as f64 } else { z[v] };
            if mask[v / 32] >> (v % 32) & 1 == 1 { edited / 0.8 } else { f64::NEG_INFINITY }
        })
        .collect();
    let all = probabilities(&changed, |_| true);
    let mass_above = |v: usize| (0..50).filter(|o| changed[*o] > changed[v]).map(|o| all[o]).sum::<f64>();
    let combined = sample::Request { top_p: 0.85, inverse_temperature: 1.0 / 0.8, mask_row: 0, ..base };
    let combined = ("all together", combined, probabilities(&changed, |v| mass_above(v) < 0.85));
    let rows = cases.into_iter().map(|case| (&logits, case)).chain([(&adjusted, combined)]);
    for (logits, (name, request, p)) in rows {
        let mut counts = vec![0u64; 50];
        for i in 0..1_000_000u32 {
            // Neighbouring counters, as samples and positions are.
            let draw = Draw { seed: 1, stream: 2, sample: i / 1000, position: i % 1000 };
            let request = sample::Request { uniform: draw.uniform(), ..request };
            counts[sample::sample(isa, logits, &request, &mut scratch).token as usize] += 1;
        }
        chi_square(name, &counts, &p);
    }
}

/// The next token's logits (up to a constant), by token: the vocabulary has 101 tokens, so the top list is all of it.
fn exact_logits(model: &rewardrt::Model, prompt: &[u32]) -> Vec<f64> {
    let mut sequence = prompt.to_vec();
    sequence.push(0);
    let exact = LogprobRequest { sequences: vec![sequence], top_logprobs: 101, ..LogprobRequest::default() };
    let exact = model.logprobs(&exact).unwrap().wait().unwrap();
    let mut z = vec![0.0; 101];
    for (token, logprob) in &exact[0].top[prompt.len()] {
        z[*token as usize] = f64::from(*logprob);
    }
    assert!((z.iter().map(|z| z.exp()).sum::<f64>() - 1.0).abs() < 1e-5);
    z
}

#[test]
fn ten_thousand_draws_of_every_control_through_the_engine() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-gqa-9-3", &small());
        let prompt = vec![7u32, 30, 61];
        let z = exact_logits(&model, &prompt);
        let n = if device == "cpu" { 10_000 } else { 2_000 };
        let base =
            SampleRequest { prompts: vec![prompt.clone()], n, max_tokens: 1, seed: 3, ..SampleRequest::default() };
        let rank = |v: usize| z.iter().filter(|o| **o > z[v]).count();
        let plain = probabilities(&z, |_| true);
        let above = |v: usize| (0..101).filter(|o| z[*o] > z[v]).map(|o| plain[o]).sum::<f64>();
        let top = z.iter().copied().fold(f64::MIN, f64::max);
        let hot: Vec<f64> = z.iter().map(|z| z / 1.5).collect();
        let biased = |v: usize| z[v] + if v.is_multiple_of(10) { 1.5 } else { 0.0 };
        let bias: Vec<f64> = (0..101).map(biased).collect();
        // (The repetition penalty needs a logit's sign, which log-probs do not have: tests/real.rs has it.)
        let cases = [
            ("plain", base.clone(), plain.clone()),
            ("temperature", SampleRequest { temperature: 1.5, ..base.clone() }, probabilities(&hot, |_| true)),
            ("top-k", SampleRequest { top_k: 11, ..base.clone() }, probabilities(&z, |v| rank(v) < 11)),
            ("top-p", SampleRequest { top_p: 0.6, ..base.clone() }, probabilities(&z, |v| above(v) < 0.6)),
            ("min-p", SampleRequest { min_p: 0.2, ..base.clone() }, probabilities(&z, |v| z[v] >= top + 0.2f64.ln())),
            ("typical-p", SampleRequest { typical_p: 0.5, ..base.clone() }, typical(&z, 0.5)),
            (
                "bias",
                SampleRequest { logit_bias: (0..101).step_by(10).map(|t| (t, 1.5)).collect(), ..base.clone() },
                probabilities(&bias, |_| true),
            ),
            ("banned", SampleRequest { banned_ids: (0..50).collect(), ..base.clone() }, probabilities(&z, |v| v >= 50)),
            (
                "allowed",
                SampleRequest { allowed_ids: Some((0..101).step_by(3).collect()), ..base.clone() },
                probabilities(&z, |v| v % 3 == 0),
            ),
            (
                "min tokens",
                SampleRequest { min_tokens: 1, stop_ids: (0..40).collect(), ..base.clone() },
                probabilities(&z, |v| v >= 40 && !model.spec().eos_token_ids.contains(&(v as u32))),
            ),
        ];
        for (name, request, p) in cases {
            let mut counts = vec![0u64; 101];
            for answer in model.sample(&request).unwrap().wait().unwrap() {
                let token = &answer.tokens[0];
                counts[token.id as usize] += 1;
                assert!((f64::from(token.logprob) - p[token.id as usize].ln()).abs() < 1e-4, "{name}: {token:?}");
                assert!((f64::from(token.model_logprob) - z[token.id as usize]).abs() < 1e-5, "{name}");
            }
            chi_square(&format!("engine on {device}, {name}"), &counts, &p);
        }
        // Penalties depend on what was generated: the second token of those samples that began alike.
        let first = rank_zero(&z);
        let two = SampleRequest {
            max_tokens: 2,
            logit_bias: vec![(first, 30.0)],
            presence_penalty: 31.0,
            frequency_penalty: 0.5,
            ignore_eos: true,
            ..base
        };
        let mut longer = prompt;
        longer.push(first);
        let z = exact_logits(&model, &longer);
        let penalised = |v: usize| z[v] + if v == first as usize { 30.0 - 31.0 - 0.5 } else { 0.0 };
        let p = probabilities(&(0..101).map(penalised).collect::<Vec<_>>(), |_| true);
        let mut counts = vec![0u64; 101];
        for answer in model.sample(&two).unwrap().wait().unwrap() {
            assert_eq!(answer.tokens[0].id, first);
            counts[answer.tokens[1].id as usize] += 1;
        }
        chi_square(&format!("engine on {device}, presence and frequency"), &counts, &p);
    }
}

fn rank_zero(z: &[f64]) -> u32 {
    (0..z.len()).max_by(|a, b| z[*a].total_cmp(&z[*b])).unwrap() as u32
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
