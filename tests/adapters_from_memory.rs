//! Adapters whose values come from a trainer's memory: what a folder with the same values gives, to the bit.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::adapters::{Files, TIED, folder};
use common::checkpoints::{Owned, tensors};
use common::expected::expected;
use common::{devices, devices_and_matrix_units, load, open, small};
use rewardrt::weights::{Dtype, TensorData};
use rewardrt::{
    Adapter, AdapterOptions, AdapterUpdateOptions, ErrorKind, InFlight, LogprobRequest, Model, ModelOptions, Require,
    SampleRequest, ScoreRequest, Tags,
};

fn config(name: &str) -> String {
    std::fs::read_to_string(folder(name).join("adapter_config.json")).unwrap()
}

fn versioned(version: u64) -> AdapterOptions {
    AdapterOptions { version, ..AdapterOptions::default() }
}

fn subset() -> AdapterUpdateOptions {
    AdapterUpdateOptions { require: Require::Subset, ..AdapterUpdateOptions::default() }
}

fn base(name: &str) -> String {
    expected(&format!("adapters/{name}"))["base"].as_str().unwrap().to_owned()
}

/// What the model says with an adapter or without.
fn says(model: &Model, adapter: Option<&Adapter>) -> Vec<f32> {
    let sequences: Vec<Vec<u32>> =
        (0..3).map(|i| (0..7 + i * 9).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()).collect();
    match model.spec().head {
        rewardrt::model::Head::LanguageModel { .. } => {
            let request = LogprobRequest { sequences, adapter: adapter.cloned(), ..LogprobRequest::default() };
            let all = model.logprobs(&request).unwrap().wait().unwrap();
            all.iter().flat_map(|s| s.logprobs.iter().flatten().copied()).collect()
        }
        _ => {
            let request = ScoreRequest { sequences, adapter: adapter.cloned(), ..ScoreRequest::default() };
            let all = model.score(&request).unwrap().wait().unwrap();
            all.iter().flat_map(|s| s.score.values.clone()).collect()
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn put_all(adapter: &Adapter, tensors: &[Owned], options: &AdapterUpdateOptions, version: u64) {
    let mut update = adapter.update(options).unwrap();
    tensors.iter().for_each(|t| update.put(&t.data()).unwrap());
    update.commit(version).unwrap();
    assert!(update.has_ended());
}

#[test]
fn values_from_memory_are_those_of_the_folder() {
    for device in devices() {
        for name in ["tied-all", "odd-patterns", "qwen2-layers", "labels-3-qv", "labels-3-base-head"] {
            let model = load(&open(&device, 2), &base(name), &small());
            let saved = model.load_adapter(&folder(name), &versioned(7)).unwrap();
            let blank = model.adapter_from_config(&config(name), &versioned(3)).unwrap();
            assert_eq!((blank.version(), blank.folder(), blank.rank()), (3, None, saved.rank()));
            // Nothing is added, and a head that is still to come is not made up.
            for (with, without) in says(&model, Some(&blank)).iter().zip(says(&model, None)) {
                assert!((with - without).abs() <= 1e-6 * without.abs(), "{device} {name}: {with} and {without}");
            }
            let all = tensors(&folder(name));
            put_all(&blank, &all, &AdapterUpdateOptions::default(), 4);
            assert_eq!(blank.version(), 4);
            let want = bits(&says(&model, Some(&saved)));
            assert_eq!(bits(&says(&model, Some(&blank))), want, "{device} {name}");
            assert_eq!(model.stats().adapters, 2, "{device} {name}: the values before are gone");
            // In parts: rows in two, the second half first.
            let mut update = blank.update(&AdapterUpdateOptions::default()).unwrap();
            for t in &all {
                let (rows, size) = (t.shape[0], t.bytes.len() / t.shape[0]);
                for part in [rows / 2..rows, 0..rows / 2].into_iter().filter(|part| !part.is_empty()) {
                    let shape = [&[part.len()], &t.shape[1..]].concat();
                    let bytes = &t.bytes[part.start * size..part.end * size];
                    let data = TensorData { shape: &shape, bytes, ..t.data() };
                    update.put_slice(&data, &[part.start, 0]).unwrap();
                }
            }
            update.commit(5).unwrap();
            assert_eq!(bits(&says(&model, Some(&blank))), want, "{device} {name}, in parts");
            // From the folder, and from its file.
            for path in [folder(name), folder(name).join("adapter_model.safetensors")] {
                let mut update = blank.update(&AdapterUpdateOptions::default()).unwrap();
                update.put_files(&path).unwrap();
                update.commit(blank.version() + 1).unwrap();
                assert_eq!(bits(&says(&model, Some(&blank))), want, "{device} {name}, {}", path.display());
            }
        }
    }
}

/// Any dtype is taken exactly, and what an update does not bring stays.
#[test]
fn a_subset_leaves_the_rest() {
    let name = "tied-all";
    for device in devices() {
        let model = load(&open(&device, 2), &base(name), &small());
        let policy = model.load_adapter(&folder(name), &versioned(1)).unwrap();
        for (i, dtype) in [Dtype::BF16, Dtype::F16, Dtype::F32].into_iter().enumerate() {
            let chosen: Vec<Owned> = tensors(&folder(name))
                .iter()
                .filter(|t| t.name.contains("layers.1.") && t.name.contains("lora_B"))
                .map(|t| {
                    let halved: Vec<f32> = t.dtype.to_f32(&t.bytes).iter().map(|v| v * 0.7).collect();
                    Owned { dtype, bytes: dtype.from_f32(&halved), ..t.clone() }
                })
                .collect();
            assert!(chosen.len() >= 4);
            put_all(&policy, &chosen, &subset(), 2 + i as u64);
            let mut files = Files::golden(name);
            for t in &chosen {
                files.tensor(&t.name).values = dtype.to_f32(&t.bytes);
            }
            let saved = tempfile::tempdir().unwrap();
            files.write(saved.path());
            let want = model.load_adapter(saved.path(), &versioned(9)).unwrap();
            assert_eq!(bits(&says(&model, Some(&policy))), bits(&says(&model, Some(&want))), "{device} {dtype:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_old_values_serve_on() {
    let name = "labels-3-qv";
    let model = load(&open("cpu", 2), &base(name), &small());
    let policy = model.load_adapter(&folder(name), &versioned(1)).unwrap();
    let (before, all) = (says(&model, Some(&policy)), tensors(&folder(name)));
    let expects = |expect_version| AdapterUpdateOptions { expect_version, ..subset() };
    let error = policy.update(&expects(Some(2))).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("has version 1, the update expects 2"), "{error}");

    let mut update = policy.update(&expects(Some(1))).unwrap();
    let wrong = |t: &Owned, change: &dyn Fn(&mut Owned)| {
        let mut t = t.clone();
        change(&mut t);
        t
    };
    let cases: [(Owned, ErrorKind, &str); 5] = [
        (wrong(&all[0], &|t| t.name = "lora_A".into()), ErrorKind::NotFound, "the adapter has no tensor \"lora_A\""),
        (wrong(&all[0], &|t| t.shape.reverse()), ErrorKind::Shape, "the adapter's has"),
        (wrong(&all[0], &|t| t.bytes.truncate(8)), ErrorKind::Argument, "8 bytes were given"),
        (wrong(&all[0], &|t| t.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes())), ErrorKind::NonFinite, "NaN"),
        (wrong(&all[0], &|t| t.shape = vec![usize::MAX, usize::MAX]), ErrorKind::Shape, "has shape"),
    ];
    for (tensor, kind, text) in cases {
        let error = update.put(&tensor.data()).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(text), "{kind:?}: {error}");
        assert!(error.to_string().contains("labels-3-qv"), "which adapter: {error}");
    }
    update.put(&all[0].data()).unwrap();
    assert_eq!(update.put(&all[0].data()).unwrap_err().kind(), ErrorKind::Duplicate);
    assert_eq!(update.commit(1).unwrap_err().kind(), ErrorKind::Argument, "the version it has");
    drop(update);

    // All are asked for by default, by name.
    let mut update = policy.update(&AdapterUpdateOptions::default()).unwrap();
    all[1..].iter().for_each(|t| update.put(&t.data()).unwrap());
    let error = update.commit(2).unwrap_err();
    assert!(error.kind() == ErrorKind::Shape && error.to_string().contains(&all[0].name), "{error}");
    // It can go on after that, but not after other values came.
    update.put(&all[0].data()).unwrap();
    policy.replace(&folder(name), 5).unwrap();
    let error = update.commit(6).unwrap_err();
    assert!(error.kind() == ErrorKind::Conflict && error.to_string().contains("version 5"), "{error}");
    assert_eq!((policy.version(), bits(&says(&model, Some(&policy)))), (5, bits(&before)));

    // A folder of other ranks is another adapter.
    let mut other = Files::golden(name);
    other.config["lora_alpha"] = serde_json::json!(16);
    let saved = tempfile::tempdir().unwrap();
    other.write(saved.path());
    let mut update = policy.update(&AdapterUpdateOptions::default()).unwrap();
    let error = update.put_files(saved.path()).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Shape && error.to_string().contains("scale 4, the adapter's have 4 and 2"),
        "{error}"
    );
    assert_eq!(update.put_files("/nowhere".as_ref()).unwrap_err().kind(), ErrorKind::NotFound);
    update.put_files(&folder(name)).unwrap();
    update.commit(6).unwrap();
    assert_eq!(update.put(&all[0].data()).unwrap_err().kind(), ErrorKind::Conflict, "it was committed");

    for (config, kind, text) in [
        ("{", ErrorKind::Format, "adapter_config.json"),
        (r#"{"peft_type": "LORA"}"#, ErrorKind::Format, "target_modules"),
        (r#"{"peft_type": "LORA", "target_modules": ["c_attn"]}"#, ErrorKind::Unsupported, "matches no module"),
        (r#"{"peft_type": "IA3", "target_modules": ["q_proj"]}"#, ErrorKind::Unsupported, "IA3"),
        (r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 60000}"#, ErrorKind::Shape, "rank"),
    ] {
        let error = model.adapter_from_config(config, &versioned(1)).map(|_| ()).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(text), "{config}: {error}");
    }
    assert_eq!(bits(&says(&model, Some(&policy))), bits(&before));
    assert_eq!(model.stats().adapters, 1, "what was refused is not on the device");
}

/// A sequence ends with the values that it began with, and the commit does not wait for it.
#[test]
fn sequences_end_with_what_they_began_with() {
    let mut waited_for = 0;
    for device in devices() {
        let runtime = open(&device, 2);
        let model = load(&runtime, "llama-tied", &small());
        let saved = tempfile::tempdir().unwrap();
        let (old, new) = (Files::random(2, &TIED, 4, 1), Files::random(2, &TIED, 4, 2));
        old.write(saved.path());
        let policy = model.load_adapter(saved.path(), &versioned(1)).unwrap();
        let alone = model.load_adapter(saved.path(), &versioned(1)).unwrap();
        let request = |adapter: &Adapter| SampleRequest {
            prompts: vec![(6..20).collect()],
            max_tokens: 150,
            ignore_eos: true,
            stream: true,
            seed: 11,
            adapter: Some(adapter.clone()),
            ..SampleRequest::default()
        };
        let job = model.sample(&request(&policy)).unwrap();
        let _ = job.next_chunk(std::time::Duration::from_secs(60));
        let values: Vec<Owned> = new
            .tensors
            .iter()
            .map(|t| Owned {
                name: t.name.clone(),
                dtype: Dtype::F32,
                shape: t.shape.clone(),
                bytes: Dtype::F32.from_f32(&t.values),
            })
            .collect();
        put_all(&policy, &values, &AdapterUpdateOptions::default(), 2);
        waited_for += usize::from(job.is_done());
        let after = model.sample(&request(&policy)).unwrap().wait().unwrap().remove(0);
        let got = job.wait().unwrap().remove(0);
        let want = model.sample(&request(&alone)).unwrap().wait().unwrap().remove(0);
        assert_eq!((got.adapter_version, after.adapter_version), (Some(1), Some(2)));
        assert_eq!(got.tokens, want.tokens, "{device}");
        assert_ne!(got.tokens, after.tokens, "{device}: the new values are others");
        drop((policy, alone, got, after));
        // The last of them leaves nothing behind, once another step is done.
        says(&model, None);
        assert_eq!(model.stats().adapters, 0);
    }
    assert_eq!(waited_for, 0, "sequences that were done when the commit returned");
}

/// A score head that the config leaves open, and one that it asks for.
#[test]
fn the_base_keeps_its_head_until_one_comes() {
    let name = "labels-3-qv";
    for device in devices() {
        let model = load(&open(&device, 2), &base(name), &small());
        let is_head = |t: &Owned| t.name.ends_with("score.weight");
        let (heads, factors): (Vec<Owned>, Vec<Owned>) = tensors(&folder(name)).into_iter().partition(is_head);
        let saved = model.load_adapter(&folder(name), &versioned(9)).unwrap();
        let whole = bits(&says(&model, Some(&saved)));
        assert_eq!(heads.len(), 1);

        // Asked for: a subset may leave it out, and then the base model's stays.
        let required = model.adapter_from_config(&config(name), &versioned(1)).unwrap();
        let mut update = required.update(&AdapterUpdateOptions::default()).unwrap();
        factors.iter().for_each(|t| update.put(&t.data()).unwrap());
        let error = update.commit(2).unwrap_err();
        assert!(error.to_string().contains("score.weight"), "{error}");
        drop(update);
        put_all(&required, &factors, &subset(), 2);
        let factors_alone = bits(&says(&model, Some(&required)));
        assert_ne!(factors_alone, whole);

        // Left open: a config before PEFT has added it.
        let mut open_config: serde_json::Value = serde_json::from_str(&config(name)).unwrap();
        open_config["modules_to_save"] = serde_json::Value::Null;
        let optional = model.adapter_from_config(&open_config.to_string(), &versioned(1)).unwrap();
        put_all(&optional, &factors, &AdapterUpdateOptions::default(), 2);
        assert_eq!(bits(&says(&model, Some(&optional))), factors_alone, "{device}");
        let mut update = optional.update(&AdapterUpdateOptions::default()).unwrap();
        update.put_files(&folder(name)).unwrap();
        update.commit(3).unwrap();
        assert_eq!(bits(&says(&model, Some(&optional))), whole, "{device}");
        // Once there it is asked for.
        let mut update = optional.update(&AdapterUpdateOptions::default()).unwrap();
        factors.iter().for_each(|t| update.put(&t.data()).unwrap());
        assert_eq!(update.commit(4).unwrap_err().kind(), ErrorKind::Shape);
        put_all(&optional, &heads, &subset(), 5);
        assert_eq!(bits(&says(&model, Some(&optional))), whole, "{device}");
    }
}

/// The first of two updates wins, an update begins while the model sleeps, and the memory budget counts.
#[test]
fn updates_race_sleep_and_are_counted() {
    let name = "tied-all";
    let all = tensors(&folder(name));
    for device in devices() {
        let model = load(&open(&device, 2), &base(name), &small());
        let policy = model.adapter_from_config(&config(name), &versioned(1)).unwrap();
        let mut first = policy.update(&AdapterUpdateOptions::default()).unwrap();
        let mut second = policy.clone().update(&AdapterUpdateOptions::default()).unwrap();
        for update in [&mut first, &mut second] {
            all.iter().for_each(|t| update.put(&t.data()).unwrap());
        }
        second.commit(2).unwrap();
        assert_eq!(first.commit(3).unwrap_err().kind(), ErrorKind::Conflict);
        first.abort();
        let want = says(&model, Some(&policy));
        model.sleep(Tags::ALL, InFlight::Wait, None).unwrap();
        put_all(&policy, &all, &AdapterUpdateOptions::default(), 4);
        model.wake(Tags::ALL).unwrap();
        assert_eq!(bits(&says(&model, Some(&policy))), bits(&want), "{device}");
        assert_eq!((policy.version(), model.stats().adapters), (4, 1));
    }
    // Room for the adapter, and not for what an update needs besides.
    let runtime = open("cpu", 2);
    let plain = load(&runtime, &base(name), &small());
    let held = plain.memory().allocated();
    let policy = plain.load_adapter(&folder(name), &versioned(1)).unwrap();
    let (adapter, bytes) = (plain.stats().adapter_bytes, policy.bytes());
    assert!(adapter >= bytes);
    let budget = |more: u64| ModelOptions { memory: Some(held + more), ..small() };
    let tight = load(&runtime, &base(name), &budget(adapter + bytes));
    let policy = tight.load_adapter(&folder(name), &versioned(1)).unwrap();
    let error = policy.update(&AdapterUpdateOptions::default()).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Limit && error.to_string().contains("tied-all"), "{error}");
    let roomy = load(&runtime, &base(name), &budget(4 * adapter));
    let policy = roomy.load_adapter(&folder(name), &versioned(1)).unwrap();
    put_all(&policy, &all, &AdapterUpdateOptions::default(), 2);
}

/// What is too large for f16 is refused also while the weights it would be added to are asleep.
#[test]
fn what_is_too_large_for_f16_is_refused_asleep_as_well() {
    let Some(device) = devices_and_matrix_units().into_iter().find(|d| d.ends_with("emulated")) else {
        println!("SKIPPED: no device with matrix units");
        return;
    };
    let model = load(&open(&device, 2), "llama-tied", &small());
    let saved = tempfile::tempdir().unwrap();
    let mut files = Files::random(2, &TIED, 4, 1);
    files.write(saved.path());
    files.tensor("layers.1.self_attn.q_proj.lora_B.weight").values.iter_mut().for_each(|v| *v *= 1e6);
    let large = tempfile::tempdir().unwrap();
    files.write(large.path());
    let load = |path: &std::path::Path| model.load_adapter(path, &versioned(1));
    let before = says(&model, None);
    let awake = load(large.path()).unwrap_err();
    assert_eq!(awake.kind(), ErrorKind::Unsupported, "{awake}");
    for tags in [Tags { weights: true, kv_cache: false }, Tags { weights: false, kv_cache: true }, Tags::ALL] {
        model.sleep(tags, InFlight::Wait, None).unwrap();
        let asleep = load(large.path()).unwrap_err();
        assert_eq!(asleep.to_string(), awake.to_string(), "{tags:?}");
        let fits = load(saved.path()).unwrap();
        model.wake(tags).unwrap();
        assert_eq!(bits(&says(&model, None)), bits(&before), "{tags:?}");
        assert_ne!(bits(&says(&model, Some(&fits))), bits(&before), "{tags:?}");
    }
}
