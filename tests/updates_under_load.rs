//! Updates while others sample, and processes that are killed: nothing is ever computed with a mixture of weights.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::checkpoints::{Owned, tensors, trained};
use common::updates::fresh;
use common::{devices, golden, load, open, small};
use rewardrt::{
    InFlight, LogprobRequest, Model, ModelOptions, SampleRequest, SampledSequence, SequenceLogprobs, Storage,
    UpdateOptions,
};

const NAME: &str = "llama-gqa-9-3";
/// Different weights; version v has those with number v mod KINDS.
const KINDS: usize = 4;
const COMMITS: u64 = 200;
const THREADS: usize = 8;

fn prompt(i: usize) -> Vec<u32> {
    (0..4 + i * 5 % 30).map(|k| (6 + (i * 29 + k * 13) % 90) as u32).collect()
}

fn request(i: usize) -> SampleRequest {
    let base =
        SampleRequest { prompts: vec![prompt(i), prompt(i + 1)], n: 2, ignore_eos: true, ..SampleRequest::default() };
    SampleRequest {
        max_tokens: 5 + i % 40,
        seed: i as u64,
        temperature: [0.0, 1.0, 0.8][i % 3],
        top_k: i % 4 * 5,
        ..base
    }
}

/// What one thread, alone with a model of each kind of weights, gets for the versions that a sequence reports.
fn replay(models: &[Model], request: &SampleRequest, got: &SampledSequence) {
    assert_eq!(got.versions.first().map(|s| s.start), Some(0));
    assert_eq!(got.versions.last().map(|s| s.end), Some(got.tokens.len()));
    for spans in got.versions.windows(2) {
        assert_eq!(spans[0].end, spans[1].start);
        assert!(spans[0].version < spans[1].version);
    }
    for span in &got.versions {
        let mut text = request.prompts[got.prompt].clone();
        text.extend(got.tokens[..span.start].iter().map(|t| t.id));
        let alone = SampleRequest {
            prompts: vec![text],
            streams: vec![got.prompt as u64],
            n: got.sample + 1,
            max_tokens: span.end - span.start,
            ..request.clone()
        };
        let model = &models[span.version as usize % KINDS];
        let again = model.sample(&alone).unwrap().wait().unwrap().remove(got.sample);
        assert_eq!(got.tokens[span.start..span.end], again.tokens[..], "versions {:?}", got.versions);
    }
}

fn stress(device: &str, storage: Storage, commits: u64) {
    let base = tensors(&golden(NAME));
    let kinds: Vec<Vec<Owned>> =
        (0..KINDS as u32).map(|k| if k == 0 { base.clone() } else { trained(&base, k) }).collect();
    let options = ModelOptions { max_batch_tokens: Some(48), ..small() };
    let model = load(&open(device, 2), NAME, &options);
    let (done, finished) = (AtomicBool::new(false), AtomicUsize::new(0));
    let lived = AtomicUsize::new(0);
    type Results = (Vec<(usize, SampledSequence)>, Vec<(usize, SequenceLogprobs)>);
    let results: Vec<Results> = std::thread::scope(|scope| {
        let sampling = |thread: usize| {
            let (model, done, finished, lived) = (&model, &done, &finished, &lived);
            move || {
                let (mut sampled, mut read) = (Vec::new(), Vec::new());
                let mut i = thread;
                while !done.load(Ordering::Relaxed) {
                    let texts = LogprobRequest { sequences: vec![prompt(i)], ..LogprobRequest::default() };
                    let texts = model.logprobs(&texts).unwrap();
                    let answers = model.sample(&request(i)).unwrap().wait().unwrap();
                    lived.fetch_add(answers.iter().filter(|s| s.versions.len() > 1).count(), Ordering::Relaxed);
                    finished.fetch_add(answers.len(), Ordering::Relaxed);
                    sampled.extend(answers.into_iter().map(|s| (i, s)));
                    read.push((i, texts.wait().unwrap().remove(0)));
                    i += THREADS;
                }
                (sampled, read)
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|t| scope.spawn(sampling(t))).collect();
        // On a busy machine commits overtake the sequences: some more, until enough of those have lived through one.
        let enough = || finished.load(Ordering::Relaxed) > 4 * THREADS && lived.load(Ordering::Relaxed) > 0;
        for version in (1..=100 * commits).take_while(|v| *v <= commits || !enough()) {
            let in_flight = if version % 5 == 0 { InFlight::Wait } else { InFlight::Keep };
            let how = UpdateOptions { storage, in_flight, ..UpdateOptions::default() };
            let mut update = model.update(&how).unwrap();
            kinds[version as usize % KINDS].iter().for_each(|t| update.put(&t.data()).unwrap());
            update.commit(version).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    // One sequence at a time, each on a model that never changes.
    let models: Vec<Model> = kinds.iter().map(|tensors| fresh(device, tensors, NAME, &small())).collect();
    let mut count = 0;
    for (sampled, read) in &results {
        for (i, got) in sampled {
            replay(&models, &request(*i), got);
            count += 1;
        }
        for (i, got) in read {
            let texts = LogprobRequest { sequences: vec![prompt(*i)], ..LogprobRequest::default() };
            let model = &models[got.weight_version as usize % KINDS];
            assert_eq!(got.logprobs, model.logprobs(&texts).unwrap().wait().unwrap()[0].logprobs);
        }
    }
    let lived = lived.into_inner();
    println!("{device} {storage:?}: {commits} commits, {count} sequences, {lived} of them lived through one or more");
    assert!(lived > 0 && count > THREADS);
}

#[test]
fn every_sequence_equals_its_replay() {
    for device in devices() {
        let commits = if device == "cpu" { COMMITS } else { COMMITS / 10 };
        stress(&device, Storage::Shadow, commits);
        stress(&device, Storage::InPlace, commits / 4);
    }
}
