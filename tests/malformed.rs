//! Every way a file or a request can be wrong: a clear error, no panic, nothing half-loaded.
//!
//! F1–F12, T1–T4 are the rows of the fault table in SECURITY.md.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;

use common::{golden, load, open, small};
use rewardrt::weights::{Checkpoint, LoadOptions};
use rewardrt::{
    ChatTemplate, Error, ErrorKind, LogprobRequest, Message, ModelOptions, Rule, SampleRequest, ScoreRequest, Tokenizer,
};
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

fn tokenizer() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]]}
    })
}

/// T1: crafted tokenizer files become errors; the comments name what the crate does with them.
#[test]
fn t1_tokenizer_files() {
    let parse = |v: &Value| Tokenizer::from_json(v.to_string().as_bytes());
    let good = parse(&tokenizer()).unwrap();
    assert_eq!(good.encode("ab a", Default::default()).unwrap(), [2, 0]);
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 14] = [
        ("merge out of the vocabulary (slice panic)", |v| v["model"]["merges"] = json!([["ab", "ab"]])),
        ("merge of unknown tokens", |v| v["model"]["merges"] = json!([["a", "zzzzzzzz"]])),
        ("prefix longer than a token (underflow)", |v| v["model"]["continuing_subword_prefix"] = json!("######")),
        ("duplicate ids", |v| v["model"]["vocab"]["b"] = json!(0)),
        ("id beyond the limit", |v| v["model"]["vocab"]["b"] = json!(1u64 << 31)),
        ("added id that shifts", |v| v["added_tokens"][0]["id"] = json!(9)),
        ("empty added token", |v| v["added_tokens"][0]["content"] = json!("")),
        ("precompiled charsmap (expect)", |v| {
            v["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})
        }),
        ("template without its token (index panic)", |v| {
            v["post_processor"] = json!({"type": "TemplateProcessing", "special_tokens": {},
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]});
        }),
        ("template without the text", |v| {
            v["post_processor"] = json!({"type": "TemplateProcessing", "special_tokens": {}, "single": [],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]});
        }),
        ("fixed length 0 (chunks(0) panic)", |v| v["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})),
        ("strip beyond the token (underflow)", |v| {
            v["decoder"] = json!({"type": "Strip", "content": " ", "start": 0, "stop": 3})
        }),
        ("model without a vocabulary", |v| v["model"] = json!({"type": "BPE"})),
        ("random encoding", |v| v["model"]["dropout"] = json!(0.5)),
    ];
    for (what, change) in cases {
        let mut v = tokenizer();
        change(&mut v);
        assert!(parse(&v).is_err(), "{what} was accepted");
    }
    let nested = format!(
        "{{\"pre_tokenizer\":{}null{}}}",
        "{\"type\":\"Sequence\",\"pretokenizers\":[".repeat(60),
        "]}".repeat(60)
    );
    assert!(Tokenizer::from_json(nested.as_bytes()).is_err());
    // Truncation with a stride beyond its length panics in the crate, padding to 2^60 aborts: both are switched off.
    let mut v = tokenizer();
    v["truncation"] = json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9});
    v["padding"] = json!({"strategy": {"Fixed": 1u64 << 60}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
    assert_eq!(parse(&v).unwrap().encode("ab ab ab", Default::default()).unwrap(), [2, 2, 2]);
    assert_eq!(good.decode(&[99], true).unwrap_err().kind(), ErrorKind::Argument);
}

/// Role marks that a tokenizer flags as ordinary added tokens cannot be forged either, but the assistant's own turns
/// keep theirs.
#[test]
fn t3_role_marks_that_are_not_special() {
    let mut v = tokenizer();
    let added = |id: u32, content: &str, special: bool| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special});
    v["model"]["vocab"] =
        json!({"a": 0, "b": 1, "ab": 2, "<s>": 3, "<": 4, "U": 5, ">": 6, "t": 7, "<U>": 8, "<t>": 9});
    v["added_tokens"] = json!([added(3, "<s>", true), added(8, "<U>", false), added(9, "<t>", false)]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), v.to_string()).unwrap();
    let template = "{% for m in messages %}{% if m.role == 'user' %}<U>{% endif %}{{ m.content }}{% if false %}<t>{% endif %}{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap().unwrap();
    let chat = |role: &str, content: &str| {
        tokenizer.encode_chat(&[Message { role: role.into(), content: content.into() }], false)
    };
    assert_eq!(chat("user", "a").unwrap(), [8, 0]);
    assert_eq!(chat("user", "a<U>b<s>").unwrap(), [8, 0, 4, 5, 6, 1, 4, 6], "spelled (the vocabulary has no \"s\")");
    assert_eq!(chat("assistant", "<t>a").unwrap(), [9, 0]);
    assert_eq!(chat("user", "<t>a").unwrap(), [8, 4, 7, 6, 0]);
    assert_eq!(chat("user", "<U>\u{100000}").unwrap_err().kind(), ErrorKind::Argument);
}

fn render(source: &str) -> Result<String, Error> {
    let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let messages = [message("user", "hi"), message("assistant", "yo")];
    ChatTemplate::new(source.into(), vec![("bos_token".into(), "<s>".into())])?.render(&messages, true)
}

#[test]
fn t4_templates_do_what_jinja_does() {
    for (source, want) in [
        (
            "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }};{% endfor %}",
            "<s>user:hi;assistant:yo;",
        ),
        ("{%- for m in messages %}\n  {%- if loop.first %}[{% endif %}\n{{ m.content }}\n{% endfor %}]", "[hi\nyo\n]"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ messages[0].content.upper().strip() }}", "HI"),
        ("{{ {'k': '<é>\\n'} | tojson }}", "{\"k\": \"<é>\\n\"}"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% if strftime_now is defined %}now{% else %}then{% endif %}", "then"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ] {
        assert_eq!(render(source).unwrap(), want, "{source}");
    }
}

/// T4: hostile templates end with an error, soon and with little memory.
#[test]
fn t4_hostile_templates() {
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set b = ns %}{% set ns.a = [b] %}{{ ns.a | tojson }}",
        "{% for n in [namespace()] %}{% set n.a = n %}{{ n }}{% endfor %}",
        // What a lexer of our own could take for a string or the end of a block.
        "{% raw %}{{ \"{% endraw %}{% set n = namespace() %}{% set n.me = n %}{{ n }}{# \" }} #}",
        "{% set n = namespace() %}{% macro f(v) %}{% set n.me = v %}{% endmacro %}{{ {\"a\": {}} }}{{ f(n) }}{{ n }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{% for m in messages %}",
        "{{ 'x' * 1000000000 }}",
    ] {
        let start = std::time::Instant::now();
        let e = render(source).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Template, "{source}: {e}");
        assert!(start.elapsed().as_secs() < 5, "{source}: {:?}", start.elapsed());
    }
    // A namespace full of nested lists is dropped without overflowing the stack.
    let _ = render("{% set ns = namespace(a=[]) %}{% for i in range(100000) %}{% set ns.a = [ns.a] %}{% endfor %}");
    assert_eq!(ChatTemplate::new("x".repeat(70_000), Vec::new()).unwrap_err().kind(), Limit);
}

#[test]
fn requests_out_of_range() {
    let model =
        load(&open("cpu", 1), "llama-gqa-9-3", &ModelOptions { kv_tokens: Some(256), ..ModelOptions::default() });
    let good = SampleRequest { prompts: vec![vec![5, 6, 7]], max_tokens: 4, ..SampleRequest::default() };
    let cases = [
        (SampleRequest { prompts: vec![], ..good.clone() }, ErrorKind::Argument, "samples"),
        (SampleRequest { prompts: vec![vec![]], ..good.clone() }, ErrorKind::Argument, "empty"),
        (
            SampleRequest { prompts: vec![vec![5], vec![101]], ..good.clone() },
            ErrorKind::Argument,
            "prompt 1: token id 101",
        ),
        (SampleRequest { prompts: vec![vec![5; 64]], ..good.clone() }, Limit, "64 tokens"),
        (SampleRequest { n: 0, ..good.clone() }, ErrorKind::Argument, "samples"),
        (SampleRequest { n: usize::MAX, ..good.clone() }, Limit, "samples"),
        (SampleRequest { max_tokens: 0, ..good.clone() }, ErrorKind::Argument, "max_tokens"),
        (SampleRequest { temperature: -0.1, ..good.clone() }, ErrorKind::Argument, "temperature is -0.1"),
        (SampleRequest { temperature: f32::NAN, ..good.clone() }, ErrorKind::Argument, "temperature is NaN"),
        (SampleRequest { top_p: 1.1, ..good.clone() }, ErrorKind::Argument, "top_p is 1.1"),
        (SampleRequest { min_p: -1.0, ..good.clone() }, ErrorKind::Argument, "min_p"),
        (SampleRequest { repetition_penalty: 0.0, ..good.clone() }, ErrorKind::Argument, "repetition_penalty"),
        (SampleRequest { top_logprobs: 129, ..good.clone() }, ErrorKind::Argument, "top_logprobs is 129"),
        (SampleRequest { streams: vec![1, 2], ..good.clone() }, ErrorKind::Argument, "2 streams for 1 prompts"),
        (SampleRequest { stop: vec!["x".into()], ..good.clone() }, ErrorKind::Argument, "tokenizer"),
    ];
    for (request, kind, says) in cases {
        let e = model.sample(&request).map(|_| ()).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(says), "{e} should say {says:?}");
    }
    let logprobs = LogprobRequest { sequences: vec![vec![5, 6]], prompt_lens: vec![3], top_logprobs: 0 };
    assert!(model.logprobs(&logprobs).map(|_| ()).unwrap_err().to_string().contains("prompt_len of 3"));
    for (rule, says) in [
        (None, "rule must be named"),
        (Some(Rule::Sequence), "does not fit"),
        (Some(Rule::parse("judge").unwrap()), "tokenizer.json"),
    ] {
        let e = model.score(&ScoreRequest { sequences: vec![vec![5]], rule }).map(|_| ()).unwrap_err();
        assert!(e.to_string().contains(says), "{e}");
    }
    for rule in ["", "judge:", "judge:yes", "judge:yes,yes", "judge:yes,", "sequence:1", "mean"] {
        assert_eq!(Rule::parse(rule).unwrap_err().kind(), ErrorKind::Argument, "{rule}");
    }
    // Values at the edge of the range have defined results.
    for request in [
        SampleRequest { temperature: f32::INFINITY, ..good.clone() },
        SampleRequest { temperature: 1e-30, ..good.clone() },
        SampleRequest { top_k: usize::MAX, top_p: 0.0, min_p: 1.0, ..good.clone() },
        SampleRequest { top_p: 1.0, min_p: 0.0, repetition_penalty: 1e-3, ..good.clone() },
    ] {
        let answers = model.sample(&request).unwrap().wait().unwrap();
        assert!(answers[0].tokens.iter().all(|t| !t.logprob.is_nan() && t.logprob <= 1e-6));
    }
    // One token: nothing to score, which is a result and not a wait for ever.
    let single = LogprobRequest { sequences: vec![vec![5]], ..LogprobRequest::default() };
    assert_eq!(model.logprobs(&single).unwrap().wait().unwrap()[0].logprobs, [None]);
}

#[test]
fn options_out_of_range() {
    let runtime = open("cpu", 1);
    let load = |options: ModelOptions| runtime.load_model(&golden("llama-tied"), &options).map(|_| ()).unwrap_err();
    assert_eq!(load(ModelOptions { max_batch_tokens: Some(0), ..small() }).kind(), ErrorKind::Argument);
    assert_eq!(load(ModelOptions { memory: Some(10_000), ..small() }).kind(), Limit);
    assert_eq!(load(ModelOptions { kv_tokens: Some(3), ..small() }).kind(), Limit);
    assert_eq!(load(ModelOptions { kv_tokens: Some(usize::MAX), ..small() }).kind(), Limit);
    assert_eq!(load(ModelOptions { max_context: Some(1), ..small() }).kind(), ErrorKind::Argument);
    let open = |device: &str| {
        let options = rewardrt::RuntimeOptions { device: device.into(), threads: None };
        rewardrt::Runtime::open(&options).map(|_| ()).unwrap_err()
    };
    assert_eq!(open("cuda").kind(), ErrorKind::Argument);
    let e = open("gpu:no such adapter");
    assert!(e.kind() == ErrorKind::NoDevice && e.to_string().contains("no such adapter"), "{e}");
}
