//! Comparing a model with what transformers computed.

use rewardrt::kernels::Isa;
use rewardrt::{Adapter, LogprobRequest, Model, SampleRequest, ScoreRequest};
use serde_json::Value;

use super::golden;

/// f32 mode's gate (DESIGN.md, Precision) is 1e-3 on a real model; these are two layers deep. On AMX inputs keep 16 bits
/// of mantissa, elsewhere all.
fn tolerance() -> f32 {
    if Isa::detect().unwrap().name() == "amx" { 1e-4 } else { 2e-5 }
}

pub fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| u32::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

fn close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance() * w.abs().max(1.0), "{what} [{i}]: {g}, transformers has {w}");
    }
}

/// expected.json of a golden folder.
pub fn expected(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(name).join("expected.json")).unwrap()).unwrap()
}

/// Compares the model under an adapter with what is expected of the golden folder `name`.
pub fn check(name: &str, model: &Model, adapter: Option<&Adapter>) {
    let expected = expected(name);
    let sequences: Vec<Vec<u32>> = expected["sequences"].as_array().unwrap().iter().map(ids).collect();
    if expected.get("scores").is_some() {
        check_scores(name, model, adapter, sequences, &expected);
    } else {
        check_logprobs(name, model, adapter, sequences, &expected);
        check_greedy(name, model, adapter, &expected["greedy"]);
    }
}

fn check_scores(name: &str, model: &Model, adapter: Option<&Adapter>, sequences: Vec<Vec<u32>>, expected: &Value) {
    let request = ScoreRequest { sequences, adapter: adapter.cloned(), ..ScoreRequest::default() };
    let scores = model.score(&request).unwrap().wait().unwrap();
    for (i, score) in scores.iter().enumerate() {
        close(&format!("{name}: score {i}"), &score.score.values, &floats(&expected["scores"][i]));
        assert_eq!(score.score.score, score.score.values[0]);
        assert_eq!(score.rule, "sequence");
        assert_eq!(score.labels.len(), score.score.values.len());
    }
}

fn check_logprobs(name: &str, model: &Model, adapter: Option<&Adapter>, sequences: Vec<Vec<u32>>, expected: &Value) {
    let request = LogprobRequest { sequences, top_logprobs: 3, adapter: adapter.cloned(), ..LogprobRequest::default() };
    let results = model.logprobs(&request).unwrap().wait().unwrap();
    for (i, result) in results.iter().enumerate() {
        let what = |part: &str| format!("{name}: {part} of sequence {i}");
        assert_eq!((result.logprobs[0], result.entropies[0]), (None, None));
        let logprobs: Vec<f32> = result.logprobs[1..].iter().map(|l| l.unwrap()).collect();
        let entropies: Vec<f32> = result.entropies[1..].iter().map(|l| l.unwrap()).collect();
        close(&what("logprobs"), &logprobs, &floats(&expected["logprobs"][i]));
        close(&what("entropies"), &entropies, &floats(&expected["entropies"][i]));
        let sum: f64 = floats(&expected["logprobs"][i]).iter().map(|l| f64::from(*l)).sum();
        assert!((result.sum() - sum).abs() < 1e-3, "{}", what("sum"));
        for (got, want) in result.top[1..].iter().zip(expected["top"][i].as_array().unwrap()) {
            let (tokens, values): (Vec<u32>, Vec<f32>) = got.iter().copied().unzip();
            assert_eq!(tokens, ids(&want[0]), "{}", what("top"));
            close(&what("top"), &values, &floats(&want[1]));
        }
    }
}

fn check_greedy(name: &str, model: &Model, adapter: Option<&Adapter>, greedy: &Value) {
    let completion = ids(&greedy["completion"]);
    let request = SampleRequest {
        prompts: vec![ids(&greedy["prompt"])],
        max_tokens: completion.len(),
        temperature: 0.0,
        ignore_eos: true,
        adapter: adapter.cloned(),
        ..SampleRequest::default()
    };
    let samples = model.sample(&request).unwrap().wait().unwrap();
    let got: Vec<u32> = samples[0].tokens.iter().map(|t| t.id).collect();
    assert_eq!(got, completion, "{name}: greedy");
}
