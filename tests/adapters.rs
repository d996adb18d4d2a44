//! Adapters: parity with PEFT, and the contract that a sequence depends on itself and its own adapter alone.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::adapters::{Files, TIED, folder};
use common::expected::{check, expected, floats, ids};
use common::{devices, devices_and_matrix_units, load, open, small};
use rewardrt::weights::WeightFormat;
use rewardrt::{
    Adapter, AdapterOptions, ErrorKind, Guide, InFlight, Job, LogprobRequest, Model, ModelOptions, Precision, Runtime,
    SampleRequest, SampledSequence, ScoreRequest, Streamed,
};

const GOLDEN: [&str; 11] = [
    "tied-qv",
    "tied-all",
    "tied-mlp",
    "odd-patterns",
    "qwen2-layers",
    "biases-outputs",
    "window-all",
    "wide-all",
    "labels-1-all",
    "labels-3-qv",
    "labels-3-base-head",
];

fn adapter(model: &Model, name: &str) -> Adapter {
    model.load_adapter(&folder(name), &AdapterOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn random(model: &Model, scratch: &Path, rank: usize, seed: u64) -> Adapter {
    Files::random(2, &TIED, rank, seed).write(scratch);
    let options = AdapterOptions { name: Some(format!("random-{seed}")), version: seed, ..AdapterOptions::default() };
    model.load_adapter(scratch, &options).unwrap()
}

fn prompt(i: usize) -> Vec<u32> {
    let length = 3 + i * 7 % 37;
    (0..length).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()
}

fn request(adapter: Option<&Adapter>, prompts: Vec<Vec<u32>>) -> SampleRequest {
    SampleRequest {
        prompts,
        max_tokens: 10,
        seed: 7,
        ignore_eos: true,
        adapter: adapter.cloned(),
        ..SampleRequest::default()
    }
}

fn answers(job: Job<Vec<SampledSequence>>) -> Vec<Vec<rewardrt::SampledToken>> {
    job.wait().unwrap().into_iter().map(|s| s.tokens).collect()
}

/// Submits jobs that begin in one step.
fn together<T>(runtime: &Runtime, submit: impl FnOnce() -> T) -> T {
    runtime.pause(InFlight::Keep, None).unwrap();
    let jobs = submit();
    runtime.resume().unwrap();
    jobs
}

#[test]
fn every_golden_adapter_is_what_peft_computes() {
    let exact = ModelOptions { precision: Precision::F32, ..small() };
    for device in devices() {
        let runtime = open(&device, 2);
        for name in GOLDEN {
            let base = expected(&format!("adapters/{name}"))["base"].as_str().unwrap().to_owned();
            let model = load(&runtime, &base, &exact);
            check(&format!("adapters/{name}"), &model, Some(&adapter(&model, name)));
            // The base model is what it was.
            check(&base, &model, None);
        }
    }
}

/// As tests/golden.rs, with the base weights rounded or their inputs; the tied head makes logits steep, and errors larger.
#[test]
fn what_rounds_keeps_its_gate() {
    let int8 = ModelOptions { weights: WeightFormat::Int8, ..small() };
    for device in devices_and_matrix_units() {
        let runtime = open(&device, 2);
        for (what, options, gate) in [("auto", small(), 1.03), ("int8", int8.clone(), 1.1)] {
            let mut ratios = Vec::new();
            for name in ["tied-qv", "tied-all", "tied-mlp", "window-all", "wide-all"] {
                let expected = expected(&format!("adapters/{name}"));
                let model = load(&runtime, expected["base"].as_str().unwrap(), &options);
                let sequences = expected["sequences"].as_array().unwrap().iter().map(ids).collect();
                let adapter = Some(adapter(&model, name));
                let request = LogprobRequest { sequences, adapter, ..LogprobRequest::default() };
                let results = model.logprobs(&request).unwrap().wait().unwrap();
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

/// Bases, with adapters of each and how they are loaded.
fn cases(device: &str) -> Vec<(&'static str, Vec<&'static str>, ModelOptions)> {
    let tied = vec!["tied-qv", "tied-all", "tied-mlp"];
    let int8 = ModelOptions { weights: WeightFormat::Int8, ..small() };
    let mut cases = vec![
        ("llama-tied", tied.clone(), small()),
        ("mistral-window", vec!["window-all"], small()),
        ("llama-wide", vec!["wide-all"], small()),
    ];
    if !device.contains("emulated") {
        cases.push(("llama-tied", tied.clone(), ModelOptions { precision: Precision::F32, ..small() }));
        cases.push(("llama-tied", tied, int8));
        cases.push(("llama-odd-widths", vec!["odd-patterns"], small()));
        cases.push(("llama-biases", vec!["biases-outputs"], small()));
    }
    cases
}

/// Adapters and the base model in one step: what each sequence gets is what it gets alone, to the bit, for steps of any size
/// and any number of threads; and the same text is another one under another adapter.
#[test]
fn a_sequence_sees_its_own_adapter_alone() {
    for device in devices_and_matrix_units() {
        for (base, names, options) in cases(&device) {
            let alone = load(&open(&device, 2), base, &options);
            let wanted: Vec<_> = std::iter::once(None)
                .chain(names.iter().map(|name| Some(adapter(&alone, name))))
                .map(|adapter| {
                    let each = |i| alone.sample(&request(adapter.as_ref(), vec![prompt(i)])).unwrap();
                    (0..5).map(|i| answers(each(i)).remove(0)).collect::<Vec<_>>()
                })
                .collect();
            for (i, one) in wanted.iter().enumerate() {
                assert!(wanted[..i].iter().all(|other| other != one), "{device} {base}: two adapters, one result");
            }
            let sizes = [(7, 2, 1), (1024, 3, 4), (2, 1, 1)];
            let emulated = device.contains("emulated");
            for (rows, threads, steps_at_once) in sizes.into_iter().take(if emulated { 2 } else { 3 }) {
                let runtime = open(&device, threads);
                let max_batch_tokens = Some(rows);
                let steps_at_once = Some(steps_at_once);
                let options = ModelOptions { max_batch_tokens, steps_at_once, ..options.clone() };
                let model = load(&runtime, base, &options);
                // In another order, and so in other slots.
                let loaded: Vec<Adapter> = names.iter().rev().map(|name| adapter(&model, name)).collect();
                let adapters: Vec<Option<&Adapter>> = loaded.iter().map(Some).chain([None]).collect();
                let jobs = together(&runtime, || {
                    let each = |i: usize, a: &Option<&Adapter>| {
                        let one = SampleRequest { streams: vec![0], ..request(*a, vec![prompt(i)]) };
                        model.sample(&one).unwrap()
                    };
                    // Neighbours in the step have different adapters.
                    (0..5).map(|i| adapters.iter().map(|a| each(i, a)).collect::<Vec<_>>()).collect::<Vec<_>>()
                });
                for (i, jobs) in jobs.into_iter().enumerate() {
                    for (job, want) in jobs.into_iter().zip(wanted.iter().rev()) {
                        assert_eq!(answers(job).remove(0), want[i], "{device} {base}, steps of {rows}, sequence {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn sampled_logprobs_equal_rescored_ones() {
    for device in devices_and_matrix_units() {
        let model = load(&open(&device, 2), "llama-tied", &small());
        for name in ["tied-qv", "tied-all"] {
            let adapter = Some(adapter(&model, name));
            let prompts: Vec<_> = (0..12).map(prompt).collect();
            let sampled = answers(model.sample(&request(adapter.as_ref(), prompts.clone())).unwrap());
            let ids = |tokens: &Vec<rewardrt::SampledToken>| tokens.iter().map(|t| t.id).collect::<Vec<u32>>();
            let pairs = prompts.iter().cloned().zip(sampled.iter().map(ids));
            let scored = LogprobRequest { adapter, ..LogprobRequest::completions(pairs) };
            for (got, want) in model.logprobs(&scored).unwrap().wait().unwrap().iter().zip(&sampled) {
                let want: Vec<_> = want.iter().map(|t| Some(t.model_logprob)).collect();
                assert_eq!(got.logprobs, want, "{device} {name}");
            }
        }
    }
}

/// Everything that makes rows or takes them from elsewhere: samples that share a prompt, guesses, steps ahead, guides,
/// sessions, preemption.
#[test]
fn whatever_makes_rows_keeps_their_adapter() {
    for device in devices() {
        let runtime = open(&device, 2);
        let model = load(&runtime, "llama-tied", &small());
        let (a, b) = (adapter(&model, "tied-all"), adapter(&model, "tied-qv"));
        let one = |adapter: &Adapter, sample: usize| {
            let all = SampleRequest { n: sample + 1, ..request(Some(adapter), vec![prompt(4)]) };
            answers(model.sample(&all).unwrap()).remove(sample)
        };
        let (want_a, want_b) = (one(&a, 3), one(&b, 3));
        let options = ModelOptions { kv_tokens: Some(256), steps_at_once: Some(8), ..small() };
        let narrow = load(&runtime, "llama-tied", &options);
        let (na, nb) = (adapter(&narrow, "tied-all"), adapter(&narrow, "tied-qv"));
        for speculate in [0, 4] {
            let many = |adapter| SampleRequest { n: 12, speculate, ..request(Some(adapter), vec![prompt(4)]) };
            let (ja, jb) =
                together(&runtime, || (narrow.sample(&many(&na)).unwrap(), narrow.sample(&many(&nb)).unwrap()));
            let (got_a, got_b) = (answers(ja), answers(jb));
            assert_eq!((&got_a[3], &got_b[3]), (&want_a, &want_b), "{device}, speculate {speculate}");
        }
        // A session may change its adapter from turn to turn: its keys and values are computed anew.
        let session = model.session(&prompt(4)).unwrap();
        let turn = |adapter: &Adapter| SampleRequest { prompts: Vec::new(), ..request(Some(adapter), Vec::new()) };
        let first = session.sample(&turn(&a)).unwrap().wait().unwrap().remove(0);
        let whole = session.tokens();
        let second = session.sample(&turn(&b)).unwrap().wait().unwrap().remove(0);
        assert_eq!(first.tokens, one(&a, 0));
        let fresh = load(&runtime, "llama-tied", &small());
        let fresh_b = adapter(&fresh, "tied-qv");
        assert_eq!(second.tokens, answers(fresh.sample(&request(Some(&fresh_b), vec![whole])).unwrap()).remove(0));
    }
}

#[test]
fn prefixes_are_never_shared_between_adapters() {
    for device in devices() {
        let runtime = open(&device, 2);
        let model = load(&runtime, "llama-tied", &small());
        let scratch = tempfile::tempdir().unwrap();
        let a = random(&model, scratch.path(), 4, 1);
        let text = prompt(5);
        let run = |model: &Model, adapter: Option<&Adapter>| {
            let before = model.stats().rows.cached;
            let job = model.sample(&request(adapter, vec![text.clone()])).unwrap();
            let answer = answers(job).remove(0);
            (answer, model.stats().rows.cached - before)
        };
        let (base, _) = run(&model, None);
        let (one, cached) = run(&model, Some(&a));
        assert_eq!(cached, 0, "{device}: the base model's prefix was taken");
        assert_eq!(run(&model, Some(&a)), (one.clone(), text.len() as u64 - 1), "{device}: its own prefix was not");
        assert_eq!(run(&model, None).0, base);
        // The same adapter by name and slot, other values.
        Files::random(2, &TIED, 4, 2).write(scratch.path());
        a.replace(scratch.path(), 2).unwrap();
        let (two, cached) = run(&model, Some(&a));
        assert_eq!(cached, 0, "{device}: the replaced content's prefix was taken");
        assert_ne!(one, two);
        drop(a);
        let b = random(&model, scratch.path(), 4, 1);
        assert_eq!(run(&model, Some(&b)), (one, 0), "{device}: the same values again are another content");
        assert_eq!(run(&model, None).0, base);
    }
}

fn wait_for(model: &Model, adapters: usize) {
    let begin = Instant::now();
    while model.stats().adapters != adapters {
        assert!(begin.elapsed() < Duration::from_secs(20), "{} adapters are there", model.stats().adapters);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn replacing_while_sampling_changes_later_requests_only() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-tied", &small());
        let scratch = tempfile::tempdir().unwrap();
        let a = random(&model, scratch.path(), 4, 1);
        let long = SampleRequest { max_tokens: 300, stream: true, ..request(Some(&a), vec![prompt(1), prompt(2)]) };
        let want = answers(model.sample(&long).unwrap());
        let job = model.sample(&long).unwrap();
        assert!(matches!(job.next_chunk(Duration::from_secs(20)), Streamed::Chunk(_)));
        Files::random(2, &TIED[..3], 9, 2).write(scratch.path());
        let clone = a.clone();
        a.replace(scratch.path(), 2).unwrap();
        assert_eq!((clone.version(), clone.rank(), a.name()), (2, 9, "random-1"));
        let after = model.sample(&long).unwrap().wait().unwrap();
        let before = job.wait().unwrap();
        for (before, want) in before.iter().zip(&want) {
            assert_eq!((&before.tokens, before.adapter_version), (want, Some(1)), "{device}");
        }
        let fresh = load(&open(&device, 2), "llama-tied", &small());
        let two = random_of(&fresh, scratch.path(), 2);
        let want = answers(fresh.sample(&SampleRequest { adapter: Some(two), ..long.clone() }).unwrap());
        for (after, want) in after.iter().zip(&want) {
            assert_eq!((&after.tokens, after.adapter_version), (want, Some(2)), "{device}");
        }
        wait_for(&model, 1);
        // A bad one leaves the good one.
        std::fs::write(scratch.path().join("adapter_config.json"), "{}").unwrap();
        a.replace(scratch.path(), 3).unwrap_err();
        assert_eq!(a.version(), 2);
        let again = model.sample(&long).unwrap().wait().unwrap();
        assert_eq!(again[0].tokens, want[0]);
    }
}

/// What is in the folder.
fn random_of(model: &Model, folder: &Path, version: u64) -> Adapter {
    model.load_adapter(folder, &AdapterOptions { version, ..AdapterOptions::default() }).unwrap()
}

#[test]
fn a_dropped_adapter_lives_as_long_as_its_jobs() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-tied", &small());
        let empty = model.memory().allocated();
        let scratch = tempfile::tempdir().unwrap();
        let a = random(&model, scratch.path(), 4, 1);
        assert!(model.memory().adapters >= a.bytes() && model.memory().allocated() > empty, "{device}");
        let long = SampleRequest { n: 3, max_tokens: 200, ..request(Some(&a), vec![prompt(3)]) };
        let want = answers(model.sample(&long).unwrap());
        let job = model.sample(&long).unwrap();
        drop((a, long));
        // Takes a slot of its own meanwhile.
        let b = random(&model, scratch.path(), 8, 2);
        let other = answers(model.sample(&request(Some(&b), vec![prompt(3)])).unwrap());
        assert_eq!(answers(job), want, "{device}");
        wait_for(&model, 1);
        let c = random(&model, scratch.path(), 2, 3);
        answers(model.sample(&request(Some(&c), vec![prompt(3)])).unwrap());
        assert_eq!(answers(model.sample(&request(Some(&b), vec![prompt(3)])).unwrap()), other, "{device}");
        drop((b, c));
        wait_for(&model, 0);
        assert_eq!(model.memory().allocated(), empty, "{device}");
    }
}

#[test]
fn sixty_four_adapters_share_a_step() {
    for device in devices() {
        let runtime = open(&device, 2);
        let model = load(&runtime, "llama-tied", &small());
        let scratch = tempfile::tempdir().unwrap();
        let adapters: Vec<Adapter> = (0..64).map(|i| random(&model, scratch.path(), 1 + i as usize % 11, i)).collect();
        assert_eq!(model.stats().adapters, 64);
        let jobs = together(&runtime, || {
            let submit = |a: &Adapter| model.sample(&request(Some(a), vec![prompt(2)])).unwrap();
            adapters.iter().map(submit).collect::<Vec<_>>()
        });
        let base = model.sample(&request(None, vec![prompt(2)])).unwrap();
        let got: Vec<_> = jobs.into_iter().map(|job| answers(job).remove(0)).collect();
        for i in [0, 1, 17, 40, 63] {
            let alone = load(&runtime, "llama-tied", &small());
            let a = random(&alone, scratch.path(), 1 + i % 11, i as u64);
            assert_eq!(answers(alone.sample(&request(Some(&a), vec![prompt(2)])).unwrap())[0], got[i], "{device} {i}");
        }
        let fresh = load(&runtime, "llama-tied", &small());
        assert_eq!(answers(base), answers(fresh.sample(&request(None, vec![prompt(2)])).unwrap()));
    }
}

#[test]
fn scores_take_the_head_of_their_adapter() {
    for device in devices() {
        let runtime = open(&device, 2);
        let model = load(&runtime, "llama-labels-3", &small());
        let adapters = [None, Some(adapter(&model, "labels-3-qv")), Some(adapter(&model, "labels-3-base-head"))];
        let score = |adapter: &Option<Adapter>, sequences: Vec<Vec<u32>>| {
            let request = ScoreRequest { sequences, adapter: adapter.clone(), ..ScoreRequest::default() };
            model.score(&request).unwrap()
        };
        let sequences: Vec<_> = (0..20).map(prompt).collect();
        let jobs = together(&runtime, || {
            let split = sequences.chunks(3).flat_map(|c| adapters.iter().map(|a| score(a, c.to_vec())));
            split.collect::<Vec<_>>()
        });
        for (i, job) in jobs.into_iter().enumerate() {
            let (chunk, adapter) = (i / 3, &adapters[i % 3]);
            for (j, got) in job.wait().unwrap().into_iter().enumerate() {
                let alone = score(adapter, vec![sequences[chunk * 3 + j].clone()]).wait().unwrap().remove(0);
                assert_eq!(got, alone, "{device}");
                assert_eq!(got.adapter_version, adapter.as_ref().map(|_| 0));
            }
        }
    }
}

#[test]
fn requests_with_a_foreign_adapter_are_refused() {
    let runtime = open("cpu", 1);
    let (model, other) = (load(&runtime, "llama-tied", &small()), load(&runtime, "llama-tied", &small()));
    let foreign = adapter(&other, "tied-qv");
    let error = model.sample(&request(Some(&foreign), vec![prompt(0)])).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Argument);
    assert!(error.to_string().contains("tied-qv"), "{error}");
    let error = other
        .sample(&SampleRequest { guide: Some(Guide::Regex("a".into())), ..request(Some(&foreign), vec![prompt(0)]) });
    assert!(error.is_err(), "no tokenizer: the request's other errors come through");
}

#[test]
fn adapters_count_against_the_memory_budget() {
    for device in devices() {
        let runtime = open(&device, 2);
        let scratch = tempfile::tempdir().unwrap();
        let base = load(&runtime, "llama-tied", &small());
        let fixed = base.memory().allocated();
        let first = random(&base, scratch.path(), 8, 1);
        let (one, bytes) = (base.memory().adapters, first.bytes());
        let second = random(&base, scratch.path(), 8, 2);
        let two = base.memory().adapters;
        assert!(two >= one + bytes, "{device}");
        drop((first, second));
        let model = load(&runtime, "llama-tied", &ModelOptions { memory: Some(fixed + two - 1), ..small() });
        let first = random(&model, scratch.path(), 8, 1);
        for _ in 0..2 {
            let error = model.load_adapter(scratch.path(), &AdapterOptions::default()).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
            assert_eq!(first.replace(scratch.path(), 9).err().unwrap().kind(), ErrorKind::Limit);
            assert_eq!(first.version(), 1);
        }
        let none = load(&runtime, "llama-tied", &ModelOptions { memory: Some(fixed + bytes - 1), ..small() });
        let error = none.load_adapter(scratch.path(), &AdapterOptions::default()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
        assert_eq!((none.stats().adapters, none.memory().allocated()), (0, fixed), "{device}");
    }
}
