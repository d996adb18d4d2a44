//! Every way an adapter can be wrong: a clear error with all differences, nothing half-loaded.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::adapters::{Files, TIED, Tensor, folder};
use common::{golden, load, open, small};
use rewardrt::ErrorKind::{self, Format, Io, Limit, NonFinite, NotFound, Shape, Unsupported};
use rewardrt::{AdapterOptions, Error, Model};
use serde_json::{Value, json};

/// Loads the folder onto `model`, which must be as before if that fails.
fn load_adapter(model: &Model, folder: &std::path::Path) -> Result<(), Error> {
    let result = model.load_adapter(folder, &AdapterOptions::default());
    if result.is_err() {
        assert_eq!((model.stats().adapters, model.memory().adapters), (0, 0));
    }
    result.map(|_| ())
}

#[track_caller]
fn check(error: &Error, folder: &std::path::Path, kind: ErrorKind, says: &[&str]) {
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}\ndoes not name the folder");
    for says in says {
        assert!(error.to_string().contains(says), "{error}\ndoes not say {says:?}");
    }
}

/// A change to a golden adapter, and what the error says.
struct Case {
    golden: &'static str,
    change: fn(&mut Files),
    kind: ErrorKind,
    says: &'static [&'static str],
}

fn case(golden: &'static str, kind: ErrorKind, says: &'static [&'static str], change: fn(&mut Files)) -> Case {
    Case { golden, change, kind, says }
}

fn run(base: &str, cases: &[Case]) {
    let model = load(&open("cpu", 1), base, &small());
    for (i, case) in cases.iter().enumerate() {
        let scratch = tempfile::tempdir().unwrap();
        let mut files = Files::golden(case.golden);
        files.write(scratch.path());
        load_adapter(&model, scratch.path()).unwrap_or_else(|e| panic!("{i}: unchanged: {e}"));
        while model.stats().adapters > 0 {
            std::thread::yield_now();
        }
        (case.change)(&mut files);
        files.write(scratch.path());
        match load_adapter(&model, scratch.path()) {
            Ok(()) => panic!("case {i}, {:?}: it was accepted", case.says),
            Err(error) => check(&error, scratch.path(), case.kind, case.says),
        }
    }
}

fn set(files: &mut Files, key: &str, value: Value) {
    files.config[key] = value;
}

const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj";

#[test]
fn fields_that_ask_for_something_else() {
    let cases = [
        case("tied-qv", Unsupported, &["\"peft_type\" is \"LOHA\"", "\"LORA\""], |f| {
            set(f, "peft_type", json!("LOHA"))
        }),
        case("tied-qv", Unsupported, &["\"peft_type\" is nothing"], |f| set(f, "peft_type", Value::Null)),
        case("tied-qv", Unsupported, &["\"use_dora\" is true", "DoRA", "\"bias\" is \"all\"", "\"none\""], |f| {
            set(f, "use_dora", json!(true));
            set(f, "bias", json!("all"));
        }),
        case("tied-qv", Unsupported, &["fan_in_fan_out"], |f| set(f, "fan_in_fan_out", json!(true))),
        case("tied-qv", Unsupported, &["lora_bias"], |f| set(f, "lora_bias", json!(true))),
        case("tied-qv", Unsupported, &["layer_replication", "[[0,2]]"], |f| {
            set(f, "layer_replication", json!([[0, 2]]))
        }),
        case("tied-qv", Unsupported, &["target_parameters"], |f| set(f, "target_parameters", json!(["experts"]))),
        case("tied-qv", Unsupported, &["trainable_token_indices"], |f| set(f, "trainable_token_indices", json!([1]))),
        case("tied-qv", Unsupported, &["init_lora_weights", "pissa_niter_4", "path_initial_model"], |f| {
            set(f, "init_lora_weights", json!("pissa_niter_4"));
        }),
        case("tied-qv", Unsupported, &["modules_to_save", "\"lm_head\"", "\"embed_tokens\""], |f| {
            set(f, "modules_to_save", json!(["lm_head", "embed_tokens"]));
        }),
        case("tied-qv", Unsupported, &["target_modules", "lm_head", "down"], |f| {
            set(f, "target_modules", json!(["q_proj", "v_proj", "lm_head"]));
        }),
        case("tied-qv", Unsupported, &["target_modules", "embed_tokens"], |f| set(f, "target_modules", json!(".*"))),
        case("tied-qv", Unsupported, &["matches no module", "LlamaForCausalLM", "q_proj"], |f| {
            set(f, "target_modules", json!(["c_attn"]));
        }),
    ];
    run("llama-tied", &cases);
}

#[test]
fn values_out_of_range() {
    let cases = [
        case("tied-qv", Format, &["\"r\" is 0", "from 1"], |f| set(f, "r", json!(0))),
        case("tied-qv", Format, &["\"r\" is -4"], |f| set(f, "r", json!(-4))),
        case("tied-qv", Format, &["\"r\" is 2.5"], |f| set(f, "r", json!(2.5))),
        case("tied-qv", Limit, &["\"r\" is 1000000", "65536"], |f| set(f, "r", json!(1_000_000))),
        case(
            "tied-qv",
            Shape,
            &["the rank of model.layers.1.self_attn.v_proj is 49", "[48, 48]", "4 differences"],
            |f| {
                set(f, "r", json!(49));
            },
        ),
        case("tied-qv", Format, &["\"lora_alpha\" is \"NaN\"", "finite"], |f| set(f, "lora_alpha", json!("NaN"))),
        case("tied-qv", Format, &["alpha 1e", "beyond the range of f32"], |f| set(f, "lora_alpha", json!(1e300))),
        case("tied-qv", Format, &["\"use_rslora\" is \"yes\""], |f| set(f, "use_rslora", json!("yes"))),
        case("tied-qv", Format, &["\"target_modules\" is null"], |f| set(f, "target_modules", Value::Null)),
        case("tied-qv", Format, &["\"target_modules\" is 7"], |f| set(f, "target_modules", json!(7))),
        case("tied-qv", Format, &["\"target_modules\"", "not a regular expression"], |f| {
            set(f, "target_modules", json!("["));
        }),
        case("tied-qv", Limit, &["target_modules", "too long"], |f| {
            set(f, "target_modules", json!(r"(.*)(.*)(.*)(.*)(.*)(.*)\1\2!"));
        }),
        case("tied-qv", Limit, &["target_modules", "at most 4096"], |f| {
            set(f, "target_modules", json!("a".repeat(4990)))
        }),
        case("tied-qv", Format, &["layers_to_transform", "null"], |f| {
            set(f, "target_modules", json!(r".*\.[qv]_proj"));
            set(f, "layers_to_transform", json!([0]));
        }),
        case("tied-qv", Format, &["layers_to_transform", "-1"], |f| set(f, "layers_to_transform", json!([-1]))),
        case("tied-qv", Format, &["rank_pattern", "\"q_proj\" is 0"], |f| set(f, "rank_pattern", json!({"q_proj": 0}))),
        case("tied-qv", Format, &["alpha_pattern", "\"q_proj\" is true"], |f| {
            set(f, "alpha_pattern", json!({"q_proj": true}));
        }),
        case("tied-qv", Format, &["rank_pattern", "not a regular expression"], |f| {
            set(f, "rank_pattern", json!({"q_proj(": 4}));
        }),
        case("tied-qv", Format, &["rank_pattern", "an object"], |f| set(f, "rank_pattern", json!([4]))),
    ];
    run("llama-tied", &cases);
}

fn add(files: &mut Files, name: &str, shape: &[usize]) {
    let values = vec![0.5; shape.iter().product()];
    files.tensors.push(Tensor { name: name.into(), shape: shape.to_vec(), values });
}

#[test]
fn tensors_that_do_not_fit() {
    let cases = [
        case(
            "tied-qv",
            Shape,
            &[
                "3 differences",
                "missing tensor \"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\" of shape [4, 48]",
                "layers.1.self_attn.v_proj.lora_B.weight\" has shape [48, 3]",
                "ask for [48, 4]",
                "layers.7.self_attn.q_proj.lora_A.weight\" belongs to no module",
            ],
            |f| {
                f.tensors.retain(|t| t.name != format!("{Q0}.lora_A.weight"));
                let wrong = f.tensor("1.self_attn.v_proj.lora_B.weight");
                wrong.shape = vec![48, 3];
                wrong.values.truncate(48 * 3);
                add(f, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", &[4, 48]);
            },
        ),
        // Another rank than the files have; another base width.
        case("tied-qv", Shape, &["8 differences", "ask for [8, 48]"], |f| set(f, "r", json!(8))),
        case("tied-qv", Shape, &["has shape [4, 64]", "ask for [4, 48]"], |f| {
            let wrong = f.tensor("0.self_attn.q_proj.lora_A.weight");
            (wrong.shape, wrong.values) = (vec![4, 64], vec![0.0; 256]);
        }),
        case("tied-qv", Shape, &["has shape [48, 4], ", "ask for [4, 48]"], |f| {
            f.tensor("0.self_attn.q_proj.lora_A.weight").shape = vec![48, 4];
        }),
        case("tied-qv", Shape, &["has shape [192]"], |f| {
            f.tensor("0.self_attn.q_proj.lora_A.weight").shape = vec![192];
        }),
        // A module that is in the file and not in the config, and the other way round.
        case(
            "tied-qv",
            Shape,
            &["4 differences", "v_proj.lora_A.weight\" belongs to no module that the config targets"],
            |f| {
                set(f, "target_modules", json!(["q_proj"]));
            },
        ),
        case("tied-qv", Shape, &["4 differences", "missing tensor", "k_proj"], |f| {
            set(f, "target_modules", json!(["q_proj", "k_proj", "v_proj"]));
        }),
        case("tied-qv", Shape, &["lora_magnitude_vector\" is DoRA's"], |f| {
            add(f, &format!("{Q0}.lora_magnitude_vector"), &[48]);
        }),
        case("tied-qv", Shape, &["lora_embedding_A\" changes the embedding"], |f| {
            add(f, "base_model.model.model.embed_tokens.lora_embedding_A", &[4, 101]);
        }),
        case("tied-qv", Shape, &["lm_head.weight\" changes the embedding or the head"], |f| {
            add(f, "base_model.model.lm_head.weight", &[101, 48]);
        }),
        case("tied-qv", Shape, &["lora_B.bias\" is a bias"], |f| add(f, &format!("{Q0}.lora_B.bias"), &[48])),
        case("tied-qv", Shape, &["score.weight\" replaces a score head"], |f| {
            add(f, "base_model.model.score.weight", &[1, 48]);
        }),
        case("tied-qv", Shape, &["does not begin with \"base_model.model.\""], |f| {
            for tensor in &mut f.tensors {
                tensor.name = tensor.name.replace("base_model.model.", "");
            }
        }),
    ];
    run("llama-tied", &cases);
}

#[test]
fn values_that_are_not_finite() {
    let cases = [
        case(
            "tied-qv",
            NonFinite,
            &["0.self_attn.q_proj.lora_A.weight\" has NaN at element 7", "v_proj.lora_B", "inf"],
            |f| {
                f.tensor("0.self_attn.q_proj.lora_A.weight").values[7] = f32::NAN;
                f.tensor("1.self_attn.v_proj.lora_B.weight").values[0] = f32::INFINITY;
            },
        ),
        case("tied-all", NonFinite, &["; and 12 more"], |f| {
            f.tensors.iter_mut().for_each(|t| t.values[0] = f32::NEG_INFINITY);
        }),
    ];
    run("llama-tied", &cases);
}

#[test]
fn score_heads_that_do_not_fit() {
    let cases = [
        case("labels-3-qv", Shape, &["missing tensor \"base_model.model.score.weight\" of shape [3, 48]"], |f| {
            f.tensors.retain(|t| !t.name.contains("score"));
        }),
        case("labels-3-qv", Shape, &["score.weight\" has shape [1, 48]", "[3, 48]"], |f| {
            let head = f.tensor("score.weight");
            (head.shape, head.values) = (vec![1, 48], vec![0.0; 48]);
        }),
        case("labels-3-qv", NonFinite, &["score.weight\" has NaN"], |f| f.tensor("score.weight").values[3] = f32::NAN),
        case("labels-3-base-head", Shape, &["score.weight\" replaces a score head"], |f| {
            add(f, "base_model.model.score.weight", &[3, 48]);
        }),
        case("labels-3-base-head", Unsupported, &["target_modules", "score"], |f| {
            set(f, "target_modules", json!(["k_proj", "down_proj", "score"]));
        }),
    ];
    run("llama-labels-3", &cases);
}

#[test]
fn an_adapter_of_another_model() {
    let runtime = open("cpu", 1);
    let cases = [
        ("llama-gqa-9-3", "tied-all", Shape, "ask for [8, 72]"),
        ("llama-wide", "tied-all", Shape, "layers.1.mlp.up_proj.lora_B.weight\" belongs to no module"),
        ("llama-tied", "wide-all", Shape, "has shape [16, 400], the config and the base model ask for [16, 80]"),
        ("llama-labels-1", "labels-3-qv", Shape, "score.weight\" has shape [3, 48]"),
        ("llama-tied", "labels-3-qv", Shape, "replaces a score head, and the base model has none"),
    ];
    for (base, name, kind, says) in cases {
        let model = load(&runtime, base, &small());
        check(&load_adapter(&model, &folder(name)).unwrap_err(), &folder(name), kind, &[says]);
    }
}

#[test]
fn files_that_are_not_there_or_are_something_else() {
    let model = load(&open("cpu", 1), "llama-tied", &small());
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path();
    let refused = |kind, says: &str| check(&load_adapter(&model, path).unwrap_err(), path, kind, &[says]);
    refused(NotFound, "adapter_config.json");
    std::fs::write(path.join("adapter_config.json"), "{\"r\": NaN}").unwrap();
    refused(Format, "not a JSON object");
    std::fs::write(path.join("adapter_config.json"), "[".repeat(100_000)).unwrap();
    refused(Format, "not a JSON object");
    std::fs::write(path.join("adapter_config.json"), " ".repeat((1 << 20) + 1)).unwrap();
    refused(Limit, "larger than");
    let files = Files::random(2, &TIED, 4, 1);
    files.write(path);
    std::fs::remove_file(path.join("adapter_model.safetensors")).unwrap();
    refused(NotFound, "adapter_model.safetensors");
    std::fs::write(path.join("adapter_model.bin"), "pickle").unwrap();
    refused(Unsupported, "safe_serialization");
    std::fs::create_dir(path.join("adapter_model.safetensors")).unwrap();
    refused(Io, "adapter_model.safetensors");
    std::fs::remove_dir(path.join("adapter_model.safetensors")).unwrap();
    std::fs::write(path.join("adapter_model.safetensors"), b"1234567").unwrap();
    refused(Format, "7 bytes");
    std::fs::remove_file(path.join("adapter_model.safetensors")).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(golden("llama-tied/model.safetensors"), path.join("adapter_model.safetensors"))
            .unwrap();
        refused(Format, "outside the model folder");
    }
}
