//! What becomes of the sequences under way when weights change, work pauses or memory is given back.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::time::Duration;

use common::checkpoints::{tensors, trained};
use common::updates::{fingerprint, fresh, long, prompt, put_all, refused, subset, under_way};
use common::{devices, golden, load, open, small};
use rewardrt::weights::WeightFormat;
use rewardrt::{
    ErrorKind, Finish, InFlight, LogprobRequest, Model, ModelOptions, RuntimeState, SampleRequest, Tags, UpdateOptions,
    VersionSpan,
};

fn whole(version: u64) -> Vec<VersionSpan> {
    vec![VersionSpan { start: 0, end: 300, version }]
}

#[test]
fn sequences_under_way_finish_end_or_go_on() {
    for device in devices() {
        let name = "llama-gqa-9-3";
        let new = trained(&tensors(&golden(name)), 12);
        let request = long((0..3).map(prompt).collect());
        let old_model = load(&open(&device, 2), name, &small());
        let new_model = fresh(&device, &new, name, &small());
        let sampled = |model: &Model| model.sample(&request).unwrap().wait().unwrap();
        let (old, fresh) = (sampled(&old_model), sampled(&new_model));
        let mut forced = 0;
        for in_flight in [InFlight::Wait, InFlight::Cancel, InFlight::Keep] {
            let model = load(&open(&device, 2), name, &small());
            let job = model.sample(&request).unwrap();
            under_way(&job);
            let how = UpdateOptions { in_flight, ..UpdateOptions::default() };
            put_all(&model, &how, &new).commit(1).unwrap();
            let later = sampled(&model);
            for (a, b) in later.iter().zip(&fresh) {
                assert_eq!((&a.tokens, &a.versions), (&b.tokens, &whole(1)), "{device} {in_flight:?}");
            }
            let first = job.wait().unwrap();
            for (i, got) in first.iter().enumerate() {
                match in_flight {
                    InFlight::Wait => {
                        assert_eq!((&got.tokens, &got.versions), (&old[i].tokens, &whole(0)), "{device}");
                        assert_eq!(got.weight_version, 0);
                    }
                    InFlight::Cancel => {
                        assert_eq!(got.finish, Finish::Cancelled);
                        let n = got.tokens.len();
                        assert!(n < 300 && got.tokens[..] == old[i].tokens[..n], "{device}: the tokens so far");
                    }
                    InFlight::Keep => {
                        let Some(change) = got.versions.iter().find(|s| s.version == 1) else { continue };
                        forced += 1;
                        assert_eq!(got.versions.last(), Some(change));
                        assert_eq!((change.end, got.weight_version), (300, 1));
                        assert_eq!(got.tokens[..change.start], old[i].tokens[..change.start], "{device}");
                        // The rest is what the new weights say after what was sampled.
                        let mut text = request.prompts[i].clone();
                        text.extend(got.tokens[..change.start].iter().map(|t| t.id));
                        let rest = SampleRequest {
                            prompts: vec![text],
                            streams: vec![i as u64],
                            max_tokens: 300 - change.start,
                            ..request.clone()
                        };
                        let replay = new_model.sample(&rest).unwrap().wait().unwrap().remove(0);
                        assert_eq!(got.tokens[change.start..], replay.tokens[..], "{device}");
                    }
                }
            }
        }
        assert!(forced > 0, "no sequence lived through the update");
    }
}

/// What is being scored when weights change is of one version.
#[test]
fn scores_are_of_one_version() {
    for in_flight in [InFlight::Wait, InFlight::Keep] {
        let name = "llama-gqa-9-3";
        let options = ModelOptions { max_batch_tokens: Some(4), ..small() };
        let new = trained(&tensors(&golden(name)), 13);
        let texts =
            LogprobRequest { sequences: (0..6).map(|i| prompt(i).repeat(9)).collect(), ..LogprobRequest::default() };
        let read = |model: &Model| model.logprobs(&texts).unwrap().wait().unwrap();
        let old = read(&load(&open("cpu", 1), name, &options));
        let fresh = read(&fresh("cpu", &new, name, &options));
        for delay in 0..6 {
            let model = load(&open("cpu", 1), name, &options);
            let mut update = put_all(&model, &UpdateOptions { in_flight, ..UpdateOptions::default() }, &new);
            let job = model.logprobs(&texts).unwrap();
            std::thread::sleep(Duration::from_micros(500 * delay));
            update.commit(1).unwrap();
            for (i, got) in job.wait().unwrap().iter().enumerate() {
                let want = if got.weight_version == 0 { &old[i] } else { &fresh[i] };
                assert_eq!(got.logprobs, want.logprobs, "{in_flight:?}");
            }
        }
    }
}

#[test]
fn waiting_ends_after_the_time_given() {
    let name = "llama-gqa-9-3";
    let model = load(&open("cpu", 1), name, &ModelOptions { max_batch_tokens: Some(8), ..small() });
    let new = trained(&tensors(&golden(name)), 14);
    let job = model.sample(&SampleRequest { n: 64, ..long((0..8).map(prompt).collect()) }).unwrap();
    under_way(&job);
    let mut update =
        put_all(&model, &UpdateOptions { timeout: Some(Duration::ZERO), ..UpdateOptions::default() }, &new);
    refused(update.commit(1), ErrorKind::Timeout, &["did not finish"]);
    assert_eq!(model.weights_version(), 0);
    job.cancel();
    job.wait().unwrap();
    update.commit(1).unwrap();
    assert_eq!(fingerprint(&model), fingerprint(&fresh("cpu", &new, name, &small())));
}

#[test]
fn pausing_and_going_on() {
    for device in devices() {
        let name = "llama-gqa-9-3";
        let runtime = open(&device, 2);
        let model = load(&runtime, name, &small());
        let request = long((0..3).map(prompt).collect());
        let expected = model.sample(&request).unwrap().wait().unwrap();
        for in_flight in [InFlight::Keep, InFlight::Wait, InFlight::Cancel] {
            let job = model.sample(&request).unwrap();
            under_way(&job);
            runtime.pause(in_flight, None).unwrap();
            // One that comes later waits, and can be cancelled.
            let (waits, cancelled) = (model.sample(&request).unwrap(), model.sample(&request).unwrap());
            assert!(!waits.wait_timeout(Duration::from_millis(30)), "{device} {in_flight:?}");
            cancelled.cancel();
            assert!(cancelled.wait().unwrap().iter().all(|s| s.finish == Finish::Cancelled && s.tokens.is_empty()));
            // So does a model that is loaded meanwhile.
            let other = load(&runtime, name, &small());
            let on_other = other.sample(&request).unwrap();
            assert!(!on_other.wait_timeout(Duration::from_millis(30)));
            assert_eq!(job.is_done(), in_flight != InFlight::Keep);
            runtime.resume().unwrap();
            let got = job.wait().unwrap();
            for later in [waits.wait().unwrap(), on_other.wait().unwrap()] {
                assert!(later.iter().zip(&expected).all(|(a, b)| a.tokens == b.tokens));
            }
            for (got, want) in got.iter().zip(&expected) {
                let n = got.tokens.len();
                assert_eq!(got.tokens[..], want.tokens[..n], "{device} {in_flight:?}");
                assert_eq!(n == 300, in_flight != InFlight::Cancel);
            }
        }
        // What is kept cannot be waited for.
        let job = model.sample(&request).unwrap();
        under_way(&job);
        runtime.pause(InFlight::Keep, None).unwrap();
        let new = trained(&tensors(&golden(name)), 15);
        let mut update = put_all(&model, &UpdateOptions::default(), &new);
        refused(update.commit(1), ErrorKind::Busy, &["paused"]);
        drop(update);
        // A second pause that fails leaves the first one in force.
        refused(runtime.pause(InFlight::Wait, None), ErrorKind::Busy, &["paused"]);
        let waits = model.sample(&request).unwrap();
        assert!(!waits.wait_timeout(Duration::from_millis(30)) && !job.is_done(), "{device}");
        drop(waits);
        put_all(&model, &UpdateOptions { in_flight: InFlight::Keep, ..UpdateOptions::default() }, &new)
            .commit(1)
            .unwrap();
        runtime.resume().unwrap();
        let got = job.wait().unwrap();
        assert!(got.iter().all(|s| s.versions.len() == 2 && s.weight_version == 1), "{device}: {:?}", got[0].versions);
    }
}

/// Of two threads that pause at the same time one is late; the other one's pause stays in force.
#[test]
fn a_pause_that_fails_leaves_anothers_alone() {
    let runtime = open("cpu", 2);
    let model = load(&runtime, "llama-gqa-9-3", &small());
    let endless = SampleRequest { n: 200, ..long((0..3).map(prompt).collect()) };
    let job = model.sample(&endless).unwrap();
    under_way(&job);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| runtime.pause(InFlight::Wait, Some(Duration::from_millis(200))));
        while runtime.state() != RuntimeState::Paused {}
        // Its turn comes when the first one is late.
        runtime.pause(InFlight::Keep, None).unwrap();
        refused(late.join().unwrap(), ErrorKind::Timeout, &["did not finish"]);
    });
    assert_eq!(runtime.state(), RuntimeState::Paused);
    let before = model.stats().steps;
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(model.stats().steps, before, "it stands still");
    runtime.resume().unwrap();
    // One that fails alone leaves nothing behind.
    refused(runtime.pause(InFlight::Wait, Some(Duration::from_millis(20))), ErrorKind::Timeout, &["did not finish"]);
    let before = model.stats().steps;
    while model.stats().steps < before + 10 {}
    assert_eq!(runtime.state(), RuntimeState::Running);
}

#[test]
fn sleeping_gives_memory_back_and_waking_changes_nothing() {
    for device in devices() {
        for format in [WeightFormat::Stored, WeightFormat::Int8] {
            let name = "llama-gqa-9-3";
            let model = load(&open(&device, 2), name, &ModelOptions { weights: format, ..small() });
            let new = trained(&tensors(&golden(name)), 16);
            put_all(&model, &UpdateOptions::default(), &new).commit(1).unwrap();
            let request = long((0..3).map(prompt).collect());
            let expected = model.sample(&request).unwrap().wait().unwrap();
            let (before, held) = (fingerprint(&model), model.memory());
            let weights = Tags { weights: true, kv_cache: false };
            let cache = Tags { weights: false, kv_cache: true };
            for tags in [weights, cache, Tags::ALL] {
                let job = model.sample(&request).unwrap();
                under_way(&job);
                model.sleep(tags, InFlight::Keep, None).unwrap();
                assert_eq!(model.sleeping(), tags);
                let asleep = model.memory();
                assert_eq!(asleep.kv_cache == 0, tags.kv_cache, "{device} {asleep:?}");
                assert_eq!(asleep.weights == 0, tags.weights, "{device} {asleep:?}");
                assert!(!job.wait_timeout(Duration::from_millis(20)));
                if tags.weights {
                    refused(model.update(&subset()), ErrorKind::Conflict, &["asleep"]);
                }
                model.wake(weights).unwrap();
                if tags.kv_cache {
                    assert!(!job.is_done());
                    model.wake(Tags::ALL).unwrap();
                }
                assert_eq!((model.sleeping(), model.memory()), (Tags::default(), held));
                let got = job.wait().unwrap();
                assert!(got.iter().zip(&expected).all(|(a, b)| a.tokens == b.tokens), "{device} {tags:?}");
                assert_eq!(fingerprint(&model), before, "{device} {tags:?}");
            }
            // Weights may change while the cache is away.
            model.sleep(cache, InFlight::Wait, None).unwrap();
            put_all(&model, &UpdateOptions::default(), &tensors(&golden(name))).commit(2).unwrap();
            model.wake(Tags::ALL).unwrap();
            assert_eq!(
                fingerprint(&model),
                fingerprint(&load(&open(&device, 2), name, &ModelOptions { weights: format, ..small() }))
            );
        }
    }
}
