//! Weights that change while the model is in use: all or nothing, checked before a byte is used, and the same bits as a
//! model that was loaded with them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::time::Duration;

use common::checkpoints::{Owned, save, tensors, trained};
use common::updates::{fingerprint, fresh, long, prompt, put_all, refused, subset, under_way};
use common::{devices, devices_and_matrix_units, golden, load, open, small};
use rewardrt::weights::{Dtype, TensorData, WeightFormat};
use rewardrt::{Error, ErrorKind, LogprobRequest, ModelOptions, Storage, UpdateOptions};

const MODELS: [&str; 7] = [
    "llama-gqa-9-3",
    "llama-biases",
    "llama-tied",
    "llama-shards",
    "llama-odd-widths",
    "qwen2-gqa-14-2",
    "llama-labels-3",
];

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
    for name in ["llama-tied", "llama-gqa-9-3", "llama-head-dim"] {
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

/// A finite f32 that a 16-bit type has no room for; the largest one that it has room for.
#[test]
fn overflows_of_a_conversion_are_refused() {
    let bf16 = (f32::from_bits(0x7f7f_8000), f32::from_bits(0x7f7f_7fff));
    for (name, dtype, (too_large, fits)) in
        [("llama-gqa-9-3", Dtype::BF16, bf16), ("llama-head-dim", Dtype::F16, (65_520.0, 65_519.0))]
    {
        let model = load(&open("cpu", 2), name, &small());
        let stored = tensors(&golden(name)).into_iter().find(|t| t.name == "model.norm.weight").unwrap();
        assert_eq!(stored.dtype, dtype);
        let wide = stored.to(Dtype::F32);
        let mut update = model.update(&UpdateOptions { convert: true, ..subset() }).unwrap();
        let with = |value: f32| {
            let mut values = Dtype::F32.to_f32(&wide.bytes);
            values[3] = value;
            Dtype::F32.from_f32(&values)
        };
        for value in [too_large, -too_large] {
            let bad = TensorData { bytes: &with(value), ..wide.data() };
            refused(update.put(&bad), ErrorKind::NonFinite, &["element 3", dtype.name()]);
        }
        update.put(&TensorData { bytes: &with(fits), ..wide.data() }).unwrap();
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
