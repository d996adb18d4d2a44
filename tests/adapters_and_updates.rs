//! Adapters over weights that change: merged and taken out again, kept through updates of the base and through sleep.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::adapters::folder;
use common::checkpoints::{save, tensors, trained};
use common::expected::{check, expected};
use common::{devices, golden, load, open, small};
use rewardrt::weights::{Dtype, WeightFormat};
use rewardrt::{
    Adapter, AdapterOptions, ErrorKind, InFlight, LogprobRequest, Model, ModelOptions, Precision, SampleRequest,
    ScoreRequest, Storage, Tags, UpdateOptions,
};

fn adapter(model: &Model, name: &str) -> Adapter {
    model.load_adapter(&folder(name), &AdapterOptions { version: 7, ..AdapterOptions::default() }).unwrap()
}

fn base(name: &str) -> String {
    expected(&format!("adapters/{name}"))["base"].as_str().unwrap().to_owned()
}

/// To the bit, what the model says with an adapter or without.
fn fingerprint(model: &Model, adapter: Option<&Adapter>) -> Vec<u32> {
    let sequences: Vec<Vec<u32>> =
        (0..4).map(|i| (0..9 + i * 7).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()).collect();
    match model.spec().head {
        rewardrt::model::Head::LanguageModel { .. } => {
            let request = LogprobRequest { sequences, adapter: adapter.cloned(), ..LogprobRequest::default() };
            let all = model.logprobs(&request).unwrap().wait().unwrap();
            all.iter().flat_map(|s| s.logprobs.iter().flatten().map(|l| l.to_bits())).collect()
        }
        _ => {
            let request = ScoreRequest { sequences, adapter: adapter.cloned(), ..ScoreRequest::default() };
            let all = model.score(&request).unwrap().wait().unwrap();
            all.iter().flat_map(|s| s.score.values.iter().map(|v| v.to_bits())).collect()
        }
    }
}

#[test]
fn a_merged_adapter_is_the_model_and_comes_out_again() {
    let exact = ModelOptions { precision: Precision::F32, ..small() };
    let mut compared = 0;
    for device in devices() {
        for name in ["tied-all", "odd-patterns", "wide-all", "labels-1-all", "labels-3-qv", "labels-3-base-head"] {
            let base = base(name);
            let model = load(&open(&device, 2), &base, &exact);
            let adapter = adapter(&model, name);
            let before = fingerprint(&model, None);
            let merged = adapter.merge(1, &UpdateOptions::default()).unwrap();
            assert_eq!(model.weights_version(), 1);
            if tensors(&golden(&base)).iter().all(|t| t.dtype == Dtype::F32) {
                // What PEFT computes with the adapter beside the weights: only the order of additions differs.
                check(&format!("adapters/{name}"), &model, None);
                compared += 1;
            }
            assert_ne!(fingerprint(&model, None), before);
            let error = merged.unmerge(1, &UpdateOptions::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Argument, "{error}");
            merged.unmerge(2, &UpdateOptions::default()).unwrap();
            assert_eq!(fingerprint(&model, None), before, "{device} {name}");
            assert_eq!(merged.unmerge(3, &UpdateOptions::default()).unwrap_err().kind(), ErrorKind::Conflict);
            // Not out of weights that came later.
            let merged = adapter.merge(4, &UpdateOptions::default()).unwrap();
            let mut update = model.update(&UpdateOptions::default()).unwrap();
            update.put_files(&golden(&base)).unwrap();
            update.commit(5).unwrap();
            let error = merged.unmerge(6, &UpdateOptions::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            assert_eq!(fingerprint(&model, None), before, "{device} {name}");
            let in_place = UpdateOptions { storage: Storage::InPlace, ..UpdateOptions::default() };
            assert_eq!(adapter.merge(8, &in_place).map(|_| ()).unwrap_err().kind(), ErrorKind::Argument);
        }
    }
    assert!(compared >= 2, "{compared}");
}

/// What an update in place left half-written stays invalid.
#[test]
fn nothing_is_taken_out_of_half_written_weights() {
    let base = base("tied-all");
    let model = load(&open("cpu", 2), &base, &small());
    let adapter = adapter(&model, "tied-all");
    let merged = adapter.merge(1, &UpdateOptions::default()).unwrap();
    assert!(merged.is_current());
    let mut update = model.update(&UpdateOptions { storage: Storage::InPlace, ..UpdateOptions::default() }).unwrap();
    update.put(&tensors(&golden(&base))[0].data()).unwrap();
    drop(update);
    assert!(!merged.is_current());
    assert_eq!(merged.unmerge(2, &UpdateOptions::default()).unwrap_err().kind(), ErrorKind::Conflict);
    let request = LogprobRequest { sequences: vec![(6..20).collect()], ..LogprobRequest::default() };
    assert_eq!(model.logprobs(&request).unwrap().wait().unwrap_err().kind(), ErrorKind::Conflict);
}

/// The devices, and llvmpipe with matrix units emulated.
fn with_matrix_units() -> Vec<String> {
    let mut all = devices();
    all.extend(common::devices_and_matrix_units().into_iter().find(|d| d.ends_with("emulated")));
    all
}

/// The base changes under adapters that stay.
#[test]
fn adapters_stay_through_updates_and_sleep() {
    for device in with_matrix_units() {
        for name in ["tied-all", "labels-3-qv"] {
            let base = base(name);
            let formats: &[WeightFormat] =
                if device == "cpu" { &[WeightFormat::Stored, WeightFormat::Int8] } else { &[WeightFormat::Stored] };
            for &format in formats {
                let options = ModelOptions { weights: format, ..small() };
                let model = load(&open(&device, 2), &base, &options);
                let adapter = adapter(&model, name);
                let new = trained(&tensors(&golden(&base)), 3);
                let saved = tempfile::tempdir().unwrap();
                save(&new, &golden(&base), saved.path());
                let fresh = open(&device, 2).load_model(saved.path(), &options).unwrap();
                let on_fresh = self::adapter(&fresh, name);
                let expected = (fingerprint(&fresh, None), fingerprint(&fresh, Some(&on_fresh)));
                for storage in [Storage::Shadow, Storage::InPlace] {
                    let mut update = model.update(&UpdateOptions { storage, ..UpdateOptions::default() }).unwrap();
                    new.iter().for_each(|t| update.put(&t.data()).unwrap());
                    update.commit(model.weights_version() + 1).unwrap();
                    let got = (fingerprint(&model, None), fingerprint(&model, Some(&adapter)));
                    assert_eq!(got, expected, "{device} {name} {format:?} {storage:?}");
                }
                for tags in
                    [Tags { weights: true, kv_cache: false }, Tags { weights: false, kv_cache: true }, Tags::ALL]
                {
                    model.sleep(tags, InFlight::Wait, None).unwrap();
                    // One more comes while it sleeps, and one goes.
                    let second = self::adapter(&model, name);
                    model.wake(tags).unwrap();
                    let got = (fingerprint(&model, Some(&second)), fingerprint(&model, Some(&adapter)));
                    assert_eq!(got, (expected.1.clone(), expected.1.clone()), "{device} {name} {format:?} {tags:?}");
                }
            }
        }
    }
}

/// A sequence with an adapter lives through an update of the base: each part is of the base that it names.
#[test]
fn a_policy_lives_through_an_update_of_its_base() {
    let name = "tied-all";
    let base = base(name);
    let request = |adapter: &Adapter, prompt: Vec<u32>, max_tokens: usize| SampleRequest {
        prompts: vec![prompt],
        max_tokens,
        ignore_eos: true,
        seed: 3,
        stream: true,
        adapter: Some(adapter.clone()),
        ..SampleRequest::default()
    };
    let mut lived = 0;
    for device in with_matrix_units() {
        let model = load(&open(&device, 2), &base, &small());
        let policy = adapter(&model, name);
        let new = trained(&tensors(&golden(&base)), 5);
        let saved = tempfile::tempdir().unwrap();
        save(&new, &golden(&base), saved.path());
        let fresh = open(&device, 2).load_model(saved.path(), &small()).unwrap();
        let on_fresh = adapter(&fresh, name);
        let mut update =
            model.update(&UpdateOptions { in_flight: InFlight::Keep, ..UpdateOptions::default() }).unwrap();
        new.iter().for_each(|t| update.put(&t.data()).unwrap());
        let prompt: Vec<u32> = (6..26).collect();
        let job = model.sample(&request(&policy, prompt.clone(), 200)).unwrap();
        let _ = job.next_chunk(std::time::Duration::from_secs(60));
        update.commit(1).unwrap();
        let got = job.wait().unwrap().remove(0);
        assert_eq!(got.adapter_version, Some(7));
        let Some(span) = got.versions.iter().find(|s| s.version == 1) else { continue };
        let mut text = prompt;
        text.extend(got.tokens[..span.start].iter().map(|t| t.id));
        let rest = fresh.sample(&request(&on_fresh, text, 200 - span.start)).unwrap().wait().unwrap().remove(0);
        assert_eq!(got.tokens[span.start..], rest.tokens[..], "{device} {:?}", got.versions);
        lived += 1;
    }
    assert!(lived > 0, "no sequence lived through the update");
}
