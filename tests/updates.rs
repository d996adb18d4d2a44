//! Weights that change while the model is in use: all or nothing, checked before a byte is used, and the same bits as a
//! model that was loaded with them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::time::Duration;

use common::checkpoints::{Owned, save, tensors, trained};
use common::{devices, devices_and_matrix_units, golden, load, open, small};
use rewardrt::weights::{Dtype, TensorData, WeightFormat};
use rewardrt::{
    Error, ErrorKind, Finish, InFlight, LogprobRequest, Model, ModelOptions, Require, SampleRequest, ScoreRequest,
    Storage, Tags, UpdateOptions, VersionSpan,
};

const MODELS: [&str; 7] = [
    "llama-gqa-9-3",
    "llama-biases",
    "llama-tied",
    "llama-shards",
    "llama-odd-widths",
    "qwen2-gqa-14-2",
    "llama-labels-3",
];

fn prompt(i: usize) -> Vec<u32> {
    (0..5 + i * 7 % 40).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()
}

/// What the model says, to the bit: log-probs of texts, or scores.
fn fingerprint(model: &Model) -> Vec<u32> {
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

fn put_all(model: &Model, options: &UpdateOptions, tensors: &[Owned]) -> rewardrt::Update {
    let mut update = model.update(options).unwrap();
    tensors.iter().for_each(|t| update.put(&t.data()).unwrap());
    update
}

fn subset() -> UpdateOptions {
    UpdateOptions { require: Require::Subset, ..UpdateOptions::default() }
}

/// A model loaded from these tensors.
fn fresh(device: &str, tensors: &[Owned], like: &str, options: &ModelOptions) -> Model {
    let folder = tempfile::tempdir().unwrap();
    save(tensors, &golden(like), folder.path());
    open(device, 2).load_model(folder.path(), options).unwrap()
}

#[test]
fn an_updated_model_equals_a_loaded_one() {
    for device in devices_and_matrix_units() {
        // Building pipelines takes most of the time on llvmpipe.
        let (names, formats): (&[&str], &[WeightFormat]) = match &device[..] {
            "cpu" => (&MODELS, &[WeightFormat::Stored, WeightFormat::Int8]),
            d if d.contains("emulated") => (&["llama-tied"], &[WeightFormat::Stored]),
            _ => (&["llama-biases", "llama-tied", "llama-labels-3"], &[WeightFormat::Stored, WeightFormat::Int8]),
        };
        for &name in names {
            for &format in formats {
                let options = ModelOptions { weights: format, ..small() };
                let model = load(&open(&device, 2), name, &options);
                let before = fingerprint(&model);
                let old = tensors(&golden(name));
                let new = trained(&old, 1);
                let expected = fingerprint(&fresh(&device, &new, name, &options));
                assert_ne!(before, expected);
                for storage in [Storage::Shadow, Storage::InPlace, Storage::InPlace] {
                    let how = UpdateOptions { storage, check_finite: true, ..UpdateOptions::default() };
                    put_all(&model, &how, &new).commit(1).unwrap();
                    assert_eq!(fingerprint(&model), expected, "{device} {name} {format:?} {storage:?}");
                    assert_eq!(model.weights_version(), 1);
                    put_all(&model, &how, &old).commit(2).unwrap();
                    assert_eq!(fingerprint(&model), before, "{device} {name} {format:?} {storage:?}");
                }
                // A few tensors at a time come to the same.
                for (i, part) in new.chunks(3).enumerate() {
                    put_all(&model, &subset(), part).commit(10 + i as u64).unwrap();
                }
                assert_eq!(fingerprint(&model), expected, "{device} {name} {format:?} in parts");
            }
        }
    }
}

#[test]
fn files_and_folders_are_taken_as_they_are() {
    for device in devices() {
        let name = "llama-shards";
        let new = trained(&tensors(&golden(name)), 3);
        let folder = tempfile::tempdir().unwrap();
        save(&new, &golden(name), folder.path());
        let expected = fingerprint(&fresh(&device, &new, name, &small()));
        for use_mmap in [true, false] {
            let mut options = small();
            options.load.use_mmap = use_mmap;
            for storage in [Storage::Shadow, Storage::InPlace] {
                let model = load(&open(&device, 2), name, &options);
                let mut update = model.update(&UpdateOptions { storage, ..UpdateOptions::default() }).unwrap();
                update.put_files(folder.path()).unwrap();
                update.commit(9).unwrap();
                assert_eq!(fingerprint(&model), expected, "{device} {use_mmap} {storage:?}");
                // And back, from several shards.
                let mut update = model.update(&UpdateOptions { storage, ..UpdateOptions::default() }).unwrap();
                update.put_files(&golden(name)).unwrap();
                update.commit(10).unwrap();
                assert_eq!(fingerprint(&model), fingerprint(&load(&open(&device, 2), name, &small())));
            }
        }
    }
}

/// Parts in any order, cut along any dimension.
#[test]
fn parts_of_a_tensor_add_up() {
    let name = "llama-odd-widths";
    let new = trained(&tensors(&golden(name)), 4);
    let expected = fingerprint(&fresh("cpu", &new, name, &small()));
    for in_columns in [false, true] {
        let model = load(&open("cpu", 2), name, &small());
        let mut update = model.update(&UpdateOptions::default()).unwrap();
        for tensor in &new {
            let [rows, cols] = match tensor.shape[..] {
                [rows, cols] => [rows, cols],
                _ => {
                    update.put(&tensor.data()).unwrap();
                    continue;
                }
            };
            let size = tensor.dtype.size();
            let (first, second) = if in_columns { (cols / 3, cols) } else { (rows / 3, rows) };
            for (from, to) in [(first, second), (0, first)] {
                let (shape, start, bytes): (Vec<usize>, Vec<usize>, Vec<u8>) = if in_columns {
                    let row = |r: usize| tensor.bytes[(r * cols + from) * size..(r * cols + to) * size].to_vec();
                    (vec![rows, to - from], vec![0, from], (0..rows).flat_map(row).collect())
                } else {
                    let part = tensor.bytes[from * cols * size..to * cols * size].to_vec();
                    (vec![to - from, cols], vec![from, 0], part)
                };
                update.put_slice(&TensorData { shape: &shape, bytes: &bytes, ..tensor.data() }, &start).unwrap();
            }
        }
        update.commit(1).unwrap();
        assert_eq!(fingerprint(&model), expected, "{in_columns}");
    }
}

/// A trainer in f32 pushes to a 16-bit model: rounded to nearest, as saving the checkpoint would.
#[test]
fn other_dtypes_are_rounded_where_that_is_allowed() {
    for name in ["llama-tied", "llama-gqa-9-3", "mistral-window"] {
        let old = tensors(&golden(name));
        let wide: Vec<Owned> = trained(&old.iter().map(|t| t.to(Dtype::F32)).collect::<Vec<_>>(), 5);
        let rounded: Vec<Owned> = wide.iter().zip(&old).map(|(w, o)| w.to(o.dtype)).collect();
        let expected = fingerprint(&fresh("cpu", &rounded, name, &small()));
        let model = load(&open("cpu", 2), name, &small());
        let how = UpdateOptions { convert: true, check_finite: true, ..UpdateOptions::default() };
        put_all(&model, &how, &wide).commit(1).unwrap();
        assert_eq!(fingerprint(&model), expected, "{name}");
    }
}

#[track_caller]
fn refused<T>(result: rewardrt::Result<T>, kind: ErrorKind, says: &[&str]) {
    let Err(error) = result else { panic!("it was accepted") };
    assert_eq!(error.kind(), kind, "{error}");
    for part in says {
        assert!(error.to_string().contains(part), "{error}\ndoes not say {part:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_update_goes_on() {
    let name = "llama-tied";
    for storage in [Storage::Shadow, Storage::InPlace] {
        let model = load(&open("cpu", 2), name, &small());
        let before = fingerprint(&model);
        let new = trained(&tensors(&golden(name)), 6);
        let how = UpdateOptions { storage, check_finite: true, ..UpdateOptions::default() };
        let mut update = model.update(&how).unwrap();
        let norm = new.iter().find(|t| t.name == "model.norm.weight").unwrap();
        let proj = new.iter().find(|t| t.name == "model.layers.1.mlp.up_proj.weight").unwrap();
        let d = norm.shape[0];
        let shape = [d + 1];
        refused(
            update.put(&TensorData { name: "model.layers.2.mlp.up_proj.weight", ..proj.data() }),
            ErrorKind::NotFound,
            &["\"model.layers.2.mlp.up_proj.weight\""],
        );
        refused(
            update.put(&TensorData { shape: &shape, ..norm.data() }),
            ErrorKind::Shape,
            &["\"model.norm.weight\"", &format!("[{}]", d + 1), &format!("[{d}]")],
        );
        let transposed = [proj.shape[1], proj.shape[0]];
        refused(
            update.put(&TensorData { shape: &transposed, ..proj.data() }),
            ErrorKind::Shape,
            &[&format!("{transposed:?}"), &format!("{:?}", proj.shape)],
        );
        let other = if norm.dtype == Dtype::F32 { Dtype::BF16 } else { Dtype::F32 };
        refused(update.put(&norm.to(other).data()), ErrorKind::Shape, &[other.name(), norm.dtype.name()]);
        refused(
            update.put(&TensorData { bytes: &norm.bytes[1..], ..norm.data() }),
            ErrorKind::Argument,
            &[&format!("{} bytes", norm.bytes.len() - 1), &norm.bytes.len().to_string()],
        );
        let sum = xxhash_rust::xxh3::xxh3_128(&norm.bytes);
        refused(
            update.put(&TensorData { checksum: Some(sum ^ 1), ..norm.data() }),
            ErrorKind::Format,
            &[&format!("{sum:032x}"), &format!("{:032x}", sum ^ 1)],
        );
        for (bad, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let mut values = proj.dtype.to_f32(&proj.bytes);
            values[77] = bad;
            let bytes = proj.dtype.from_f32(&values);
            let bad = TensorData { bytes: &bytes, ..proj.data() };
            refused(update.put(&bad), ErrorKind::NonFinite, &["up_proj", "element 77", word]);
        }
        // Parts.
        let (rows, cols) = (proj.shape[0], proj.shape[1]);
        let size = proj.dtype.size();
        let half = [rows / 2, cols];
        let part = |from: usize| TensorData {
            shape: &half,
            bytes: &proj.bytes[from * cols * size..(from + rows / 2) * cols * size],
            ..proj.data()
        };
        refused(update.put_slice(&part(0), &[rows, 0]), ErrorKind::Shape, &["not inside"]);
        refused(update.put_slice(&part(0), &[usize::MAX, 0]), ErrorKind::Shape, &["not inside"]);
        refused(update.put_slice(&part(0), &[0]), ErrorKind::Shape, &["not inside"]);
        update.put_slice(&part(0), &[0, 0]).unwrap();
        refused(update.put_slice(&part(0), &[1, 0]), ErrorKind::Duplicate, &["overlaps"]);
        refused(update.put(&proj.data()), ErrorKind::Duplicate, &["parts"]);
        refused(update.put_files(&golden(name)), ErrorKind::Duplicate, &["parts", &proj.name]);
        update.put(&TensorData { checksum: Some(sum), ..norm.data() }).unwrap();
        refused(update.put(&norm.data()), ErrorKind::Duplicate, &["\"model.norm.weight\""]);
        refused(update.put_slice(&norm.data(), &[0]), ErrorKind::Duplicate, &["\"model.norm.weight\""]);
        refused(
            update.commit(1),
            ErrorKind::Shape,
            &["not complete", "\"model.layers.0.input_layernorm.weight\" is missing", "elements were put"],
        );
        if storage == Storage::Shadow {
            assert_eq!((fingerprint(&model), model.weights_version()), (before.clone(), 0));
        }
        // After all that it can be finished.
        update.put_slice(&part(rows / 2), &[rows / 2, 0]).unwrap();
        for tensor in new.iter().filter(|t| ![&norm.name, &proj.name].contains(&&t.name)) {
            update.put(&tensor.data()).unwrap();
        }
        refused(update.commit(0), ErrorKind::Argument, &["version 0"]);
        update.commit(1).unwrap();
        assert_eq!(fingerprint(&model), fingerprint(&fresh("cpu", &new, name, &small())), "{storage:?}");
        refused(update.put(&norm.data()), ErrorKind::Conflict, &["committed"]);
        refused(update.commit(2), ErrorKind::Conflict, &["committed"]);
    }
}

/// A finite f32 that a 16-bit type has no room for.
#[test]
fn overflows_of_a_conversion_are_refused() {
    for (name, value) in [("llama-wide", f32::MAX), ("mistral-window", 65_520.0)] {
        let model = load(&open("cpu", 2), name, &small());
        let tensor = tensors(&golden(name)).into_iter().find(|t| t.dtype != Dtype::F32).unwrap().to(Dtype::F32);
        let mut values = tensor.dtype.to_f32(&tensor.bytes);
        values[3] = if model.spec().architecture.starts_with("Mistral") { value } else { f32::MAX };
        let bytes = Dtype::F32.from_f32(&values);
        let mut update = model.update(&UpdateOptions { convert: true, ..subset() }).unwrap();
        let stored = tensors(&golden(name)).into_iter().find(|t| t.name == tensor.name).unwrap().dtype;
        if stored == Dtype::BF16 && value < 1e30 {
            continue;
        }
        let bad = TensorData { bytes: &bytes, ..tensor.data() };
        refused(update.put(&bad), ErrorKind::NonFinite, &["element 3", stored.name()]);
    }
}

#[test]
fn a_tied_head_may_come_too_if_it_is_the_embedding() {
    let name = "llama-tied";
    let model = load(&open("cpu", 2), name, &small());
    let new = trained(&tensors(&golden(name)), 7);
    let embedding = new.iter().find(|t| t.name == "model.embed_tokens.weight").unwrap();
    let head = Owned { name: "lm_head.weight".into(), ..embedding.clone() };
    let expected = fingerprint(&fresh("cpu", &new, name, &small()));
    let mut update = put_all(&model, &UpdateOptions::default(), &new);
    update.put(&head.data()).unwrap();
    refused(update.put(&head.data()), ErrorKind::Duplicate, &["lm_head.weight"]);
    update.commit(1).unwrap();
    assert_eq!(fingerprint(&model), expected);
    // Alone it stands for both, in place too.
    let without: Vec<Owned> = new.iter().filter(|t| t.name != embedding.name).cloned().collect();
    for (version, storage) in [(2, Storage::Shadow), (4, Storage::InPlace)] {
        put_all(&model, &UpdateOptions::default(), &tensors(&golden(name))).commit(version + 100).unwrap();
        let mut update = put_all(&model, &UpdateOptions { storage, ..UpdateOptions::default() }, &without);
        update.put(&head.data()).unwrap();
        update.commit(version).unwrap();
        assert_eq!(fingerprint(&model), expected, "{storage:?}");
    }
    // From a trainer's f32 files, both are rounded.
    let wide: Vec<Owned> = new.iter().chain([&head]).map(|t| t.to(Dtype::F32)).collect();
    let folder = tempfile::tempdir().unwrap();
    save(&wide, &golden(name), folder.path());
    let mut update = model.update(&UpdateOptions { convert: true, ..UpdateOptions::default() }).unwrap();
    update.put_files(folder.path()).unwrap();
    update.commit(5).unwrap();
    assert_eq!(fingerprint(&model), expected);
    let other = Owned { name: head.name.clone(), ..trained(std::slice::from_ref(embedding), 8).remove(0) };
    let mut update = put_all(&model, &UpdateOptions::default(), &new);
    update.put(&other.data()).unwrap();
    refused(update.commit(3), ErrorKind::Shape, &["lm_head.weight", "tie_word_embeddings"]);
}

#[test]
fn versions_and_rivals() {
    let name = "llama-gqa-9-3";
    let model = load(&open("cpu", 2), name, &ModelOptions { weights_version: 41, ..small() });
    let new = trained(&tensors(&golden(name)), 9);
    let expect = |version| UpdateOptions { expect_version: Some(version), ..UpdateOptions::default() };
    refused(model.update(&expect(40)), ErrorKind::Conflict, &["41", "40"]);
    let mut first = put_all(&model, &expect(41), &new);
    let mut second = put_all(&model, &expect(41), &tensors(&golden(name)));
    first.commit(42).unwrap();
    refused(second.commit(43), ErrorKind::Conflict, &["begin anew"]);
    assert_eq!(fingerprint(&model), fingerprint(&fresh("cpu", &new, name, &small())));
    assert_eq!(model.weights_version(), 42);
    // What is committed while an update in place waits for rest is not lost: that update begins anew.
    let long_job = model.sample(&long((0..3).map(prompt).collect())).unwrap();
    under_way(&long_job);
    let other = trained(&tensors(&golden(name)), 21);
    let mut queued = put_all(&model, &UpdateOptions::default(), &other);
    std::thread::scope(|scope| {
        let commit = scope.spawn(|| queued.commit(50));
        std::thread::sleep(Duration::from_millis(20));
        let late = scope.spawn(|| model.update(&UpdateOptions { storage: Storage::InPlace, ..subset() }).map(drop));
        std::thread::sleep(Duration::from_millis(20));
        long_job.cancel();
        commit.join().unwrap().unwrap();
        // It came before the commit was done, or after.
        if let Err(error) = late.join().unwrap() {
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        }
    });
    drop(long_job);
    assert_eq!(fingerprint(&model), fingerprint(&fresh("cpu", &other, name, &small())));
    assert_eq!(model.weights_version(), 50);
    put_all(&model, &UpdateOptions::default(), &new).commit(42).unwrap();
    // In place there is one at a time.
    let in_place = UpdateOptions { storage: Storage::InPlace, ..UpdateOptions::default() };
    let update = model.update(&in_place).unwrap();
    refused(model.update(&in_place), ErrorKind::Conflict, &["in place"]);
    refused(model.update(&UpdateOptions::default()), ErrorKind::Conflict, &["in place"]);
    // Nothing was written: the model is as it was.
    update.abort();
    assert_eq!(fingerprint(&model), fingerprint(&fresh("cpu", &new, name, &small())));
    assert_eq!(model.weights_version(), 42);
}

/// Half-written weights answer nothing until whole ones are there.
#[test]
fn an_unfinished_update_in_place_leaves_no_model() {
    for device in devices() {
        let name = "llama-gqa-9-3";
        let model = load(&open(&device, 2), name, &small());
        let new = trained(&tensors(&golden(name)), 10);
        let in_place = UpdateOptions { storage: Storage::InPlace, ..UpdateOptions::default() };
        let waiting = LogprobRequest { sequences: vec![prompt(3)], ..LogprobRequest::default() };
        let mut update = model.update(&in_place).unwrap();
        let job = model.logprobs(&waiting).unwrap();
        assert!(!job.wait_timeout(Duration::from_millis(30)), "nothing is computed meanwhile");
        update.put(&new[0].data()).unwrap();
        drop(update);
        refused(job.wait(), ErrorKind::Conflict, &["no valid weights"]);
        refused(model.logprobs(&waiting).unwrap().wait(), ErrorKind::Conflict, &["no valid weights"]);
        refused(model.update(&subset()), ErrorKind::Conflict, &["all tensors"]);
        // Another one that writes nothing does not make them valid.
        drop(model.update(&in_place).unwrap());
        refused(model.logprobs(&waiting).unwrap().wait(), ErrorKind::Conflict, &["no valid weights"]);
        // Whole ones mend it, either way.
        let expected = fingerprint(&fresh(&device, &new, name, &small()));
        put_all(&model, &UpdateOptions::default(), &new).commit(5).unwrap();
        assert_eq!(fingerprint(&model), expected, "{device}");
        let mut update = model.update(&in_place).unwrap();
        update.put(&new[1].data()).unwrap();
        drop(update);
        put_all(&model, &in_place, &new).commit(6).unwrap();
        assert_eq!(fingerprint(&model), expected, "{device}");
    }
}

/// Every step of an update may fail: what the N-th tensor does to it, while it is put and while it is loaded. The old model
/// answers as before, and holds what it held.
#[test]
fn failing_at_any_step_changes_nothing() {
    for device in devices() {
        let name = "llama-gqa-9-3";
        let plain = load(&open(&device, 2), name, &small());
        let new = trained(&tensors(&golden(name)), 11);
        let all: u64 = new.iter().map(|t| t.bytes.len() as u64).sum();
        let held = plain.memory();
        let before = fingerprint(&plain);
        // 1. No memory for the N-th tensor.
        for n in 0..new.len() {
            let staged: u64 = new[..n].iter().map(|t| t.bytes.len() as u64).sum();
            let budget = held.allocated() + staged + new[n].bytes.len() as u64 - 1;
            let model = load(&open(&device, 2), name, &ModelOptions { memory: Some(budget), ..small() });
            let mut update = model.update(&UpdateOptions::default()).unwrap();
            new[..n].iter().for_each(|t| update.put(&t.data()).unwrap());
            refused(update.put(&new[n].data()), ErrorKind::Limit, &[&new[n].name, &budget.to_string()]);
            drop(update);
            assert_eq!((fingerprint(&model), model.memory()), (before.clone(), held), "{device} step {n}");
        }
        // 2. The N-th tensor cannot be used on the device: NaN has no quantised form.
        let options = ModelOptions { weights: WeightFormat::Int8, ..small() };
        let model = load(&open(&device, 2), name, &options);
        let (before, held) = (fingerprint(&model), model.memory());
        let products: Vec<&Owned> =
            new.iter().filter(|t| t.name.contains("proj") || t.name == "lm_head.weight").collect();
        for bad in &products {
            let mut values = bad.dtype.to_f32(&bad.bytes);
            values[5] = f32::NAN;
            let bytes = bad.dtype.from_f32(&values);
            let mut update = model.update(&UpdateOptions::default()).unwrap();
            for tensor in &new {
                let data =
                    if tensor.name == bad.name { TensorData { bytes: &bytes, ..tensor.data() } } else { tensor.data() };
                update.put(&data).unwrap();
            }
            refused(update.commit(1), ErrorKind::NonFinite, &[&bad.name]);
            drop(update);
            assert_eq!((fingerprint(&model), model.memory()), (before.clone(), held), "{device} {}", bad.name);
        }
        assert_eq!(model.weights_version(), 0);
        // 3. And then it goes through.
        put_all(&model, &UpdateOptions::default(), &new).commit(1).unwrap();
        assert_eq!(fingerprint(&model), fingerprint(&fresh(&device, &new, name, &options)));
        if device == "cpu" {
            assert_eq!(model.memory().allocated(), held.allocated() + all, "the new tensors are in memory");
        }
    }
}

fn long(prompts: Vec<Vec<u32>>) -> SampleRequest {
    SampleRequest { prompts, max_tokens: 300, ignore_eos: true, seed: 3, stream: true, ..SampleRequest::default() }
}

/// Waits until a job has sampled something.
fn under_way<T>(job: &rewardrt::Job<T>) {
    assert!(matches!(job.next_chunk(Duration::from_secs(60)), rewardrt::Streamed::Chunk(_)));
}

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
        put_all(&model, &UpdateOptions { in_flight: InFlight::Keep, ..UpdateOptions::default() }, &new)
            .commit(1)
            .unwrap();
        runtime.resume().unwrap();
        let got = job.wait().unwrap();
        assert!(got.iter().all(|s| s.versions.len() == 2 && s.weight_version == 1), "{device}: {:?}", got[0].versions);
    }
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

/// A file that is wrong in several places is refused in one go.
#[test]
fn files_that_do_not_fit() {
    let name = "llama-gqa-9-3";
    let model = load(&open("cpu", 2), name, &small());
    let before = fingerprint(&model);
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = trained(&tensors(&golden(name)), 17);
    wrong[1].name = "model.layers.9.x".into();
    wrong[2].shape.push(1);
    save(&wrong, &golden(name), folder.path());
    let mut update = model.update(&UpdateOptions::default()).unwrap();
    let error: Error = update.put_files(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shape);
    for part in ["model.layers.9.x", &wrong[2].name, &folder.path().display().to_string()] {
        assert!(error.to_string().contains(part), "{error}");
    }
    refused(update.put_files(&folder.path().join("none")), ErrorKind::NotFound, &["none"]);
    refused(update.commit(1), ErrorKind::Shape, &["missing"]);
    drop(update);
    assert_eq!(fingerprint(&model), before);
    // Read instead of mapped, or rounded, they take memory; the budget counts it before anything is taken.
    let mut options = ModelOptions { memory: Some(model.memory().allocated() + 160_000), ..small() };
    options.load.use_mmap = false;
    let read = load(&open("cpu", 2), name, &options);
    let mut update = read.update(&UpdateOptions::default()).unwrap();
    refused(update.put_files(&golden(name)), ErrorKind::Limit, &["memory budget"]);
    drop(update);
    assert_eq!(fingerprint(&read), before);
}
