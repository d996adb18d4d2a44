//! Every way a weight file or a config can be wrong: a clear error, no panic, nothing half-loaded.
//!
//! F1–F13 are the rows of the fault table in SECURITY.md.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;

use common::{golden, load, open, small};
use rewardrt::weights::{Checkpoint, LoadOptions, WeightFormat};
use rewardrt::{Error, ErrorKind, LogprobRequest, ModelOptions, SampleRequest};
use serde_json::{Value, json};

/// A safetensors file from its parts.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let mapped = Checkpoint::open(&path, &LoadOptions::default());
    // Both ways of reading agree.
    let read = Checkpoint::open(&path, &LoadOptions { use_mmap: false, ..LoadOptions::default() });
    assert_eq!(mapped.as_ref().err().map(Error::kind), read.as_ref().err().map(Error::kind));
    mapped
}

#[track_caller]
fn refused(bytes: &[u8], kind: ErrorKind, says: &str) {
    match open_bytes(bytes) {
        Ok(_) => panic!("it was accepted"),
        Err(e) => {
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.to_string().contains(says), "{e}\ndoes not say {says:?}");
            assert!(e.to_string().contains("model.safetensors"), "{e}\ndoes not name the file");
        }
    }
}

use ErrorKind::{Format, Limit};

#[test]
fn f1_empty_file() {
    refused(b"", Format, "0 bytes");
}
#[test]
fn f1_seven_bytes() {
    refused(b"1234567", Format, "7 bytes");
}
#[test]
fn f1_header_longer_than_file() {
    refused(b"\x08\0\0\0\0\0\0\0{}", Format, "claims 8 bytes");
}
#[test]
fn f1_header_of_u64_max() {
    refused(b"\xff\xff\xff\xff\xff\xff\xff\xff{}", Limit, "18446744073709551615");
}
#[test]
fn f1_header_above_the_cap() {
    refused(b"\x01\0\0\x01\0\0\0\0{}", Limit, "16777217");
}
#[test]
fn f2_not_utf8() {
    refused(b"\x08\0\0\0\0\0\0\0{\"\xff\xfe\":1}", Format, "JSON");
}
#[test]
fn f2_not_json() {
    refused(b"\x04\0\0\0\0\0\0\0{abc", Format, "JSON");
}
#[test]
fn f2_array_at_the_top() {
    refused(b"\x02\0\0\0\0\0\0\0[]", Format, "begin with");
}
#[test]
fn f2_leading_space() {
    refused(b"\x03\0\0\0\0\0\0\0 {}", Format, "begin with");
}
#[test]
fn f2_empty_header() {
    refused(b"\0\0\0\0\0\0\0\0", Format, "empty");
}
#[test]
fn f2_ten_thousand_deep() {
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    refused(&file(&deep, b""), Format, "JSON");
}
#[test]
fn f2_text_after_the_object() {
    refused(b"\x04\0\0\0\0\0\0\0{}{}", Format, "JSON");
}

const TWO: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;

#[test]
fn a_good_file_is_accepted() {
    let checkpoint = open_bytes(&file(TWO, &[0; 12])).unwrap();
    let names: Vec<_> = checkpoint.tensors().map(|(name, info)| (name.to_owned(), info.shape)).collect();
    assert_eq!(names, [("a".to_owned(), vec![2]), ("b".to_owned(), vec![1, 2])]);
}
#[test]
fn f3_overlap() {
    refused(&file(&TWO.replace("[8,12]", "[4,8]"), &[0; 8]), Format, "not a valid safetensors file");
}
#[test]
fn f3_hole() {
    refused(&file(&TWO.replace("[8,12]", "[12,16]"), &[0; 16]), Format, "not a valid safetensors file");
}
#[test]
fn f3_begin_after_end() {
    refused(&file(&TWO.replace("[8,12]", "[12,8]"), &[0; 12]), Format, "not a valid safetensors file");
}
#[test]
fn f3_data_beyond_the_file() {
    refused(&file(TWO, &[0; 11]), Format, "not a valid safetensors file");
}
#[test]
fn f3_trailing_bytes() {
    refused(&file(TWO, &[0; 13]), Format, "not a valid safetensors file");
}
#[test]
fn f3_cut_at_every_length() {
    let whole = file(TWO, &[7; 12]);
    for len in 0..whole.len() {
        assert!(open_bytes(&whole[..len]).is_err(), "cut at {len}");
    }
}
#[test]
fn f4_shape_product_overflows() {
    let huge = TWO.replace("[2]", "[9223372036854775807,9223372036854775807]");
    refused(&file(&huge, &[0; 12]), Format, "not a valid safetensors file");
}
#[test]
fn f4_dimension_of_2_to_the_63() {
    refused(&file(&TWO.replace("[2]", "[9223372036854775808]"), &[0; 12]), Format, "not a valid safetensors file");
}
#[test]
fn f4_negative_dimension() {
    refused(&file(&TWO.replace("[2]", "[-2]"), &[0; 12]), Format, "not a valid safetensors file");
}
#[test]
fn f4_fractional_dimension() {
    refused(&file(&TWO.replace("[2]", "[2.0]"), &[0; 12]), Format, "not a valid safetensors file");
}
#[test]
fn f4_rank_nine() {
    refused(&file(&TWO.replace("[2]", "[2,1,1,1,1,1,1,1,1]"), &[0; 12]), Limit, "9 dimensions");
}
#[test]
fn f5_unknown_dtype() {
    refused(&file(&TWO.replace("BF16", "Q4_K"), &[0; 12]), Format, "Q4_K");
}
#[test]
fn f5_size_does_not_fit_the_shape() {
    refused(&file(&TWO.replace("[1,2]", "[1,3]"), &[0; 12]), Format, "not a valid safetensors file");
}
#[test]
fn f6_name_twice_at_other_offsets() {
    let twice = TWO.replace("\"b\"", "\"a\"");
    refused(&file(&twice, &[0; 12]), Format, "\"a\" stands twice");
}
#[test]
fn f6_name_twice_at_the_same_offsets() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}"#;
    refused(&file(header, &[0; 8]), Format, "\"a\" stands twice");
}
#[test]
fn f6_escaped_name_twice() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\u0061":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}"#;
    refused(&file(header, &[0; 8]), Format, "\"a\" stands twice");
}
#[test]
fn f6_tensor_called_metadata() {
    let header = TWO.replace("\"b\"", "\"__metadata__\"");
    refused(&file(&header, &[0; 12]), Format, "__metadata__");
}
#[test]
fn f6_name_of_600_bytes() {
    refused(&file(&TWO.replace("\"a\"", &format!("\"{}\"", "n".repeat(600))), &[0; 12]), Limit, "600 bytes");
}

/// Copies a golden checkpoint so that a test can damage it.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn load_error(folder: &Path) -> Error {
    open("cpu", 1).load_model(folder, &small()).map(|_| ()).unwrap_err()
}

fn edit(folder: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(name);
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// Splits a safetensors file into header and data.
fn parts(bytes: &[u8]) -> (Value, Vec<u8>) {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

#[test]
fn f7_odd_header_length_gives_the_same_values() {
    let folder = copy("llama-odd-widths");
    let path = folder.path().join("model.safetensors");
    let (header, data) = parts(&std::fs::read(&path).unwrap());
    let request = LogprobRequest { sequences: vec![vec![9, 30, 8, 77, 50]], ..LogprobRequest::default() };
    let aligned = load(&open("cpu", 1), "llama-odd-widths", &small()).logprobs(&request).unwrap().wait().unwrap();
    for device in common::devices() {
        for pad in 0..4 {
            let text = header.to_string() + &" ".repeat(pad);
            std::fs::write(&path, file(&text, &data)).unwrap();
            let model = open(&device, 1).load_model(folder.path(), &small()).unwrap();
            let got = model.logprobs(&request).unwrap().wait().unwrap();
            if device == "cpu" {
                assert_eq!(got, aligned, "padded by {pad}");
            }
        }
    }
}
#[test]
fn f7_zero_sized_and_scalar_tensors() {
    let header = r#"{"empty":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},"odd":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}"#;
    let checkpoint = open_bytes(&file(header, &[0x80, 0x3f])).unwrap();
    let expected =
        |name: &str, shape: &[usize]| rewardrt::weights::Expected { name: name.into(), shape: shape.to_vec() };
    let weights = checkpoint.claim(&[expected("empty", &[0, 5]), expected("odd", &[])], |_| false).unwrap();
    assert_eq!(weights.get("odd").unwrap().to_f32(), [1.0]);
    assert!(weights.get("empty").unwrap().to_f32().is_empty());
    assert!(weights.get("never claimed").is_err());
}
#[test]
fn f8_a_hundred_thousand_tensors() {
    let mut header = serde_json::Map::new();
    for i in 0..100_000 {
        header.insert(format!("t{i}"), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}));
    }
    let text = Value::Object(header.clone()).to_string();
    assert_eq!(open_bytes(&file(&text, b"")).unwrap().tensors().count(), 100_000);
    header.insert("one more".into(), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}));
    header.insert("and another".into(), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}));
    refused(&file(&Value::Object(header).to_string(), b""), Limit, "100001 names");
}

fn index(change: impl FnOnce(&mut Value)) -> Error {
    let folder = copy("llama-shards");
    edit(folder.path(), "model.safetensors.index.json", change);
    load_error(folder.path())
}

#[test]
fn f9_index_pointing_outside() {
    for file in ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "config.json"] {
        let e = index(|v| v["weight_map"]["model.norm.weight"] = file.into());
        assert_eq!(e.kind(), Format, "{e}");
        assert!(e.to_string().contains("model.norm.weight"), "{e}");
    }
}
#[test]
fn f9_missing_shard() {
    let e = index(|v| v["weight_map"]["model.norm.weight"] = "model-00009-of-00003.safetensors".into());
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
}
#[test]
fn f9_unlisted_shard() {
    let folder = copy("llama-shards");
    std::fs::write(folder.path().join("model-00004-of-00004.safetensors"), file("{}", b"")).unwrap();
    let e = load_error(folder.path());
    assert!(e.kind() == Format && e.to_string().contains("model-00004-of-00004"), "{e}");
}
#[test]
fn f9_tensor_in_another_shard() {
    let e = index(|v| {
        let other = v["weight_map"]["model.norm.weight"].clone();
        for (_, file) in v["weight_map"].as_object_mut().unwrap() {
            if *file != other {
                *file = other;
                break;
            }
        }
    });
    assert!(e.kind() == Format && e.to_string().contains("is mapped to"), "{e}");
}
#[test]
fn f9_tensor_name_twice_in_the_index() {
    let folder = copy("llama-shards");
    let text = r#"{"weight_map":{"a":"model-00001-of-00003.safetensors","a":"model-00002-of-00003.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
    let e = load_error(folder.path());
    assert!(e.kind() == Format && e.to_string().contains("\"a\" stands twice"), "{e}");
}
#[test]
fn f9_tensor_in_two_shards() {
    let folder = copy("llama-shards");
    let first = folder.path().join("model-00001-of-00003.safetensors");
    std::fs::copy(&first, folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    let e = load_error(folder.path());
    assert!(e.kind() == Format && e.to_string().contains("is also in"), "{e}");
}
#[cfg(unix)]
#[test]
fn f9_links() {
    let (folder, outside) = (copy("llama-tied"), copy("llama-tied"));
    let path = folder.path().join("model.safetensors");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(outside.path().join("model.safetensors"), &path).unwrap();
    let e = load_error(folder.path());
    assert!(e.kind() == Format && e.to_string().contains("outside the model folder"), "{e}");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("model.safetensors", &path).unwrap();
    assert_eq!(load_error(folder.path()).kind(), Format, "a link to itself");
    // The layout of the Hugging Face cache is allowed.
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/abc"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama-tied").join(name), blobs.join(name)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(name)).unwrap();
    }
    open("cpu", 1).load_model(&snapshot, &small()).unwrap();
}

/// F10: a config.json with one field changed, and what the error must say.
#[test]
fn f10_config_values() {
    let cases = [
        ("hidden_size", json!(0), Format),
        ("hidden_size", json!(50), Format),
        ("hidden_size", json!(-1), Format),
        ("hidden_size", json!("48"), Format),
        ("hidden_size", json!(1 << 20), Limit),
        ("num_attention_heads", json!(7), Format),
        ("num_key_value_heads", json!(4), Format),
        ("num_key_value_heads", json!(12), Format),
        ("num_hidden_layers", json!(1_000_000_000u64), Limit),
        ("num_hidden_layers", Value::Null, Format),
        ("head_dim", json!(1u64 << 31), Limit),
        ("head_dim", json!(7), ErrorKind::Unsupported),
        ("vocab_size", json!(1u64 << 40), Limit),
        ("rms_norm_eps", json!("NaN"), Format),
        ("rms_norm_eps", json!(-1.0), Format),
        ("rope_theta", json!(0), Format),
        ("max_position_embeddings", json!(0), Format),
        ("max_position_embeddings", json!(1u64 << 40), Limit),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), Format),
        ("rope_scaling", json!({"type": "linear"}), Format),
        ("rope_scaling", json!({"rope_type": "longrope", "factor": 2}), ErrorKind::Unsupported),
        ("rope_scaling", json!("linear"), Format),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            Format,
        ),
        ("rope_scaling", json!({"rope_type": "default", "partial_rotary_factor": 0.5}), ErrorKind::Unsupported),
        ("hidden_act", json!("gelu"), ErrorKind::Unsupported),
        ("architectures", json!(["GPT2LMHeadModel"]), ErrorKind::Unsupported),
        ("architectures", json!([]), Format),
        ("quantization_config", json!({"bits": 4}), ErrorKind::Unsupported),
        ("layer_types", json!(["full_attention", "sliding_attention"]), ErrorKind::Unsupported),
        ("eos_token_id", json!("x"), Format),
        ("tie_word_embeddings", json!(1), Format),
        ("attention_bias", json!("yes"), Format),
    ];
    for (key, value, kind) in cases {
        let folder = copy("llama-biases");
        edit(folder.path(), "config.json", |v| v[key] = value.clone());
        let e = load_error(folder.path());
        assert_eq!(e.kind(), kind, "{key} {value}: {e}");
        let named = e.to_string().contains(key) || e.to_string().contains("architecture") || key == "head_dim";
        assert!(named && e.to_string().contains("config.json"), "{key} {value}: {e}");
    }
    // A huge context costs nothing until it is used.
    let folder = copy("llama-biases");
    edit(folder.path(), "config.json", |v| v["max_position_embeddings"] = json!(1_000_000_000));
    open("cpu", 1)
        .load_model(folder.path(), &ModelOptions { kv_tokens: Some(256), ..ModelOptions::default() })
        .unwrap();
}

/// F10: keys that only some families read, or that stand for what this version does not compute.
#[test]
fn f10_values_of_families() {
    let (full, slides) = ("full_attention", "sliding_attention");
    let cases = [
        ("llama-biases", json!({"is_causal": false}), ErrorKind::Unsupported, "\"is_causal\" is false"),
        (
            "llama-biases",
            json!({"per_layer_config": {"0": {"head_dim": 8}}}),
            ErrorKind::Unsupported,
            "per_layer_config",
        ),
        ("llama-biases", json!({"layer_types": [full]}), Format, "num_hidden_layers = 2 strings"),
        ("llama-biases", json!({"layer_types": [slides, slides]}), ErrorKind::Unsupported, "has no sliding window"),
        (
            "mistral-window",
            json!({"layer_types": [full, full]}),
            ErrorKind::Unsupported,
            "unless \"sliding_window\" is null",
        ),
        ("mistral-window", json!({"attention_bias": true}), ErrorKind::Unsupported, "it must be false or absent"),
        ("qwen2-gqa-14-2", json!({"attention_bias": false}), ErrorKind::Unsupported, "it must be true or absent"),
        ("qwen2-gqa-14-2", json!({"mlp_bias": true}), ErrorKind::Unsupported, "it must be false or absent"),
        ("qwen2-gqa-14-2", json!({"attention_bias": 1}), Format, "\"attention_bias\" is 1"),
        ("qwen2-gqa-14-2", json!({"use_mrope": true}), ErrorKind::Unsupported, "\"use_mrope\" is true"),
        ("qwen2-gqa-14-2", json!({"use_sliding_window": 1}), Format, "\"use_sliding_window\" is 1"),
        // Layer 1 of the two would slide.
        (
            "qwen2-gqa-14-2",
            json!({"use_sliding_window": true}),
            ErrorKind::Unsupported,
            "\"max_window_layers\" is 1, so with \"use_sliding_window\" the layers below 1 do not slide",
        ),
        ("qwen2-gqa-14-2", json!({"layer_types": [full, slides]}), ErrorKind::Unsupported, "\"layer_types\" is ["),
        ("qwen2-gqa-14-2", json!({"layer_types": [full, full, full]}), Format, "num_hidden_layers = 2 strings"),
        ("qwen2-gqa-14-2", json!({"layer_types": full}), Format, "\"layer_types\" is \"full_attention\""),
        (
            "qwen2-gqa-14-2",
            json!({"layer_types": [slides, slides]}),
            ErrorKind::Unsupported,
            "only if \"use_sliding_window\"",
        ),
        (
            "qwen2-tied-window",
            json!({"layer_types": [slides, slides], "sliding_window": null}),
            ErrorKind::Unsupported,
            "\"sliding_window\" is not null",
        ),
        (
            "qwen2-tied-window",
            json!({"layer_types": ["chunked_attention", "chunked_attention"]}),
            ErrorKind::Unsupported,
            "it must be all \"sliding_attention\"",
        ),
        ("qwen2-tied-window", json!({"max_window_layers": -1}), Format, "an integer from 0"),
        ("qwen2-tied-window", json!({"sliding_window": 0}), Format, "\"sliding_window\" is 0"),
    ];
    for (name, values, kind, says) in cases {
        let folder = copy(name);
        edit(folder.path(), "config.json", |v| v.as_object_mut().unwrap().extend(values.as_object().unwrap().clone()));
        let e = load_error(folder.path());
        assert_eq!(e.kind(), kind, "{name} {values}: {e}");
        assert!(e.to_string().contains(says), "{name} {values}: {e}\ndoes not say {says:?}");
    }
}

/// Which layers of a Qwen2 model slide, as transformers reads it.
#[test]
fn f10_windows_that_are_all_or_none() {
    let (full, slides) = ("full_attention", "sliding_attention");
    for (values, window) in [
        (json!({}), Some(7)),
        (json!({"attention_bias": true, "mlp_bias": false}), Some(7)),
        (json!({"use_sliding_window": false}), None),
        (json!({"use_sliding_window": null}), None),
        // Not read.
        (json!({"use_sliding_window": false, "sliding_window": 0, "max_window_layers": 1}), None),
        (json!({"sliding_window": null, "max_window_layers": 1}), None),
        (json!({"max_window_layers": 2}), None),
        (json!({"max_window_layers": null}), None),
        // `layer_types` wins over `max_window_layers`.
        (json!({"max_window_layers": 1, "layer_types": [slides, slides]}), Some(7)),
        (json!({"max_window_layers": 1, "layer_types": [full, full]}), None),
        (json!({"use_sliding_window": false, "layer_types": [full, full]}), None),
    ] {
        let folder = copy("qwen2-tied-window");
        edit(folder.path(), "config.json", |v| v.as_object_mut().unwrap().extend(values.as_object().unwrap().clone()));
        let spec = rewardrt::model::read_spec(folder.path()).unwrap();
        assert_eq!(spec.sliding_window, window, "{values}");
    }
    let folder = copy("qwen2-tied-window");
    edit(folder.path(), "config.json", |v| {
        v.as_object_mut().unwrap().remove("sliding_window");
        v.as_object_mut().unwrap().remove("eos_token_id");
    });
    let spec = rewardrt::model::read_spec(folder.path()).unwrap();
    assert_eq!((spec.sliding_window, spec.eos_token_ids), (Some(4096), vec![]), "Qwen2Config's defaults");
}

/// F11: every difference at once, not the first only.
#[test]
fn f11_differences_are_listed_together() {
    let folder = copy("llama-biases");
    let path = folder.path().join("model.safetensors");
    let (header, data) = parts(&std::fs::read(&path).unwrap());
    let text = header
        .to_string()
        .replace("model.norm.weight", "model.norm.wait")
        .replace("layers.1.mlp.up_proj.bias", "layers.1.mlp.up_proj.extra");
    std::fs::write(&path, file(&text, &data)).unwrap();
    edit(folder.path(), "config.json", |v| v["vocab_size"] = json!(102));
    let e = load_error(folder.path());
    assert_eq!(e.kind(), ErrorKind::Shape);
    for part in [
        "missing tensor \"model.norm.weight\"",
        "\"model.norm.wait\"",
        "missing tensor \"model.layers.1.mlp.up_proj.bias\"",
        "\"model.embed_tokens.weight\" has shape [101, 48], the config asks for [102, 48]",
        "\"lm_head.weight\" has shape",
        "6 differences",
    ] {
        assert!(e.to_string().contains(part), "{e}\nlacks {part}");
    }
}
#[test]
fn f11_reward_head_with_other_labels() {
    let folder = copy("llama-labels-1");
    edit(folder.path(), "config.json", |v| v["id2label"] = json!({"0": "a", "1": "b"}));
    let e = load_error(folder.path());
    assert!(e.to_string().contains("score.weight") && e.to_string().contains("[2, 48]"), "{e}");
}
#[test]
fn f11_biases_of_qwen2() {
    // None on o, and none may be missing on q, k and v.
    for (from, to, says) in [
        (
            "0.self_attn.q_proj.bias",
            "0.self_attn.o_proj.bias",
            "missing tensor \"model.layers.0.self_attn.q_proj.bias\"",
        ),
        ("1.self_attn.v_proj.bias", "1.self_attn.o_proj.bias", "\"model.layers.1.self_attn.o_proj.bias\""),
    ] {
        let folder = copy("qwen2-gqa-14-2");
        let path = folder.path().join("model.safetensors");
        let (header, data) = parts(&std::fs::read(&path).unwrap());
        std::fs::write(&path, file(&header.to_string().replace(from, to), &data)).unwrap();
        let e = load_error(folder.path());
        assert!(e.kind() == ErrorKind::Shape && e.to_string().contains(says), "{e}\nlacks {says}");
    }
}
#[test]
fn f11_tied_head_stored_as_another_matrix() {
    // Says tied, but brings a head of its own that differs: which one is meant?
    let folder = copy("llama-gqa-9-3");
    edit(folder.path(), "config.json", |v| v["tie_word_embeddings"] = json!(true));
    let e = load_error(folder.path());
    assert!(e.kind() == ErrorKind::Shape && e.to_string().contains("lm_head.weight"), "{e}");
}
#[test]
fn f5_dtype_that_is_not_read() {
    let folder = copy("llama-gqa-9-3");
    let path = folder.path().join("model.safetensors");
    let (header, data) = parts(&std::fs::read(&path).unwrap());
    std::fs::write(&path, file(&header.to_string().replace("BF16", "I16"), &data)).unwrap();
    let e = load_error(folder.path());
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("dtype I16"), "{e}");
}

/// F12: weights with NaN load; a job over them fails and says where.
#[test]
fn f12_nan_weights_fail_the_job() {
    for device in common::devices() {
        let folder = copy("llama-shards");
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                let (header, mut data) = parts(&std::fs::read(&path).unwrap());
                if let Some(at) = header["model.norm.weight"]["data_offsets"][0].as_u64() {
                    data[at as usize..at as usize + 4].copy_from_slice(&f32::NAN.to_le_bytes());
                    std::fs::write(&path, file(&header.to_string(), &data)).unwrap();
                }
            }
        }
        let model = open(&device, 1).load_model(folder.path(), &small()).unwrap();
        let request = SampleRequest { prompts: vec![vec![5, 6, 7]], max_tokens: 3, ..SampleRequest::default() };
        let e = model.sample(&request).unwrap().wait().unwrap_err();
        assert!(e.kind() == ErrorKind::NonFinite && e.to_string().contains("position 2"), "{device}: {e}");
        let request = LogprobRequest { sequences: vec![vec![5, 6, 7]], ..LogprobRequest::default() };
        let e = model.logprobs(&request).unwrap().wait().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NonFinite, "{device}: {e}");
    }
}

/// F12: a weight that has no place among integers is named when it is quantised.
#[test]
fn f12_nan_weights_cannot_be_quantised() {
    const NAME: &str = "model.layers.1.mlp.up_proj.weight";
    let folder = copy("llama-shards");
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let (header, mut data) = parts(&std::fs::read(&path).unwrap());
            if let Some(at) = header[NAME]["data_offsets"][0].as_u64() {
                data[at as usize + 8..at as usize + 12].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
                std::fs::write(&path, file(&header.to_string(), &data)).unwrap();
            }
        }
    }
    for (weights, bits) in [(WeightFormat::Int8, "8 bits"), (WeightFormat::Int4, "4 bits")] {
        let options = ModelOptions { weights, ..small() };
        let e = open("cpu", 1).load_model(folder.path(), &options).map(|_| ()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NonFinite, "{e}");
        for part in [NAME, "row 0, column 2 is -inf", bits] {
            assert!(e.to_string().contains(part), "{e}\nlacks {part}");
        }
    }
}

/// F13: seeded mutations of a good file: an error or a load, never a panic.
#[test]
fn f13_mutated_files() {
    let good = std::fs::read(golden("llama-odd-widths").join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize + 8;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..1 + random(4) {
            match random(4) {
                0 => bytes[random(n)] ^= 1 << random(8),
                1 => bytes[random(n)] = b"0123456789{}[]\",:-e"[random(19)],
                2 => {
                    let (from, to) = (random(n), random(n));
                    bytes.copy_within(from.min(n - 9)..from.min(n - 9) + 8, to.min(n - 9));
                }
                _ => bytes.truncate(n + random(good.len() - n)),
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Err(e) = Checkpoint::open(&path, &LoadOptions::default()) {
            assert!(matches!(e.kind(), Format | Limit), "{e}");
        }
    }
}
