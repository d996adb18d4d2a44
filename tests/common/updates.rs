//! What the tests of updates share: what a model says to the bit, and ways to put tensors.

use std::time::Duration;

use rewardrt::{ErrorKind, LogprobRequest, Model, ModelOptions, Require, SampleRequest, ScoreRequest, UpdateOptions};

use super::checkpoints::{Owned, save};
use super::{golden, open};

pub fn prompt(i: usize) -> Vec<u32> {
    (0..5 + i * 7 % 40).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()
}

/// What the model says, to the bit: log-probs of texts, or scores.
pub fn fingerprint(model: &Model) -> Vec<u32> {
    let sequences: Vec<Vec<u32>> = (0..5).map(prompt).collect();
    match model.spec().head {
        rewardrt::model::Head::LanguageModel { .. } => {
            let all =
                model.logprobs(&LogprobRequest { sequences, ..LogprobRequest::default() }).unwrap().wait().unwrap();
            all.iter().flat_map(|s| s.logprobs.iter().flatten().map(|l| l.to_bits())).collect()
        }
        _ => {
            let all = model.score(&ScoreRequest { sequences, ..ScoreRequest::default() }).unwrap().wait().unwrap();
            all.iter().map(|s| format!("{:?}", s.score)).flat_map(|s| s.into_bytes()).map(u32::from).collect()
        }
    }
}

pub fn put_all(model: &Model, options: &UpdateOptions, tensors: &[Owned]) -> rewardrt::Update {
    let mut update = model.update(options).unwrap();
    tensors.iter().for_each(|t| update.put(&t.data()).unwrap());
    update
}

pub fn subset() -> UpdateOptions {
    UpdateOptions { require: Require::Subset, ..UpdateOptions::default() }
}

/// A model loaded from these tensors.
pub fn fresh(device: &str, tensors: &[Owned], like: &str, options: &ModelOptions) -> Model {
    let folder = tempfile::tempdir().unwrap();
    save(tensors, &golden(like), folder.path());
    open(device, 2).load_model(folder.path(), options).unwrap()
}

#[track_caller]
pub fn refused<T>(result: rewardrt::Result<T>, kind: ErrorKind, says: &[&str]) {
    let Err(error) = result else { panic!("it was accepted") };
    assert_eq!(error.kind(), kind, "{error}");
    for part in says {
        assert!(error.to_string().contains(part), "{error}\ndoes not say {part:?}");
    }
}

pub fn long(prompts: Vec<Vec<u32>>) -> SampleRequest {
    SampleRequest { prompts, max_tokens: 300, ignore_eos: true, seed: 3, stream: true, ..SampleRequest::default() }
}

/// Waits until a job has sampled something.
pub fn under_way<T>(job: &rewardrt::Job<T>) {
    assert!(matches!(job.next_chunk(Duration::from_secs(60)), rewardrt::Streamed::Chunk(_)));
}
