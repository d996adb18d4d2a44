//! A sampled answer as an object of JSON.

use rewardrt::SampledSequence;
use serde::Serialize;
use serde_json::Value;

/// What `sample` and `rollout` say of every answer.
#[derive(Serialize)]
pub struct Answer<'a> {
    id: &'a Value,
    sample: usize,
    prompt_ids: &'a [u32],
    completion_ids: Vec<u32>,
    text: Option<&'a str>,
    logprobs: Vec<f32>,
    model_logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropy: Option<Vec<f32>>,
    finish: &'static str,
    weight_version: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter_version: Option<u64>,
}

impl<'a> Answer<'a> {
    /// An answer to the prompt (id, ids), without entropies.
    pub fn new((id, prompt_ids): &'a (Value, Vec<u32>), answer: &'a SampledSequence) -> Self {
        let tokens = &answer.tokens;
        Answer {
            id,
            sample: answer.sample,
            prompt_ids,
            completion_ids: tokens.iter().map(|t| t.id).collect(),
            text: answer.text.as_deref(),
            logprobs: tokens.iter().map(|t| t.logprob).collect(),
            model_logprobs: tokens.iter().map(|t| t.model_logprob).collect(),
            entropy: None,
            finish: answer.finish.name(),
            weight_version: answer.weight_version,
            adapter_version: answer.adapter_version,
        }
    }

    /// With the entropy at each place.
    pub fn with_entropy(self, answer: &SampledSequence) -> Self {
        Answer { entropy: Some(answer.tokens.iter().map(|t| t.entropy).collect()), ..self }
    }
}
