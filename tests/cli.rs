//! The command: its outputs, its exit codes, and what it says when it fails.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{golden, smollm2};
use serde_json::{Value, json};

fn rewardrt(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rewardrt")).args(args).output().unwrap()
}

#[track_caller]
fn lines(args: &[&str]) -> Vec<Value> {
    let output = rewardrt(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[track_caller]
fn fails(args: &[&str], code: i32, says: &str) {
    let output = rewardrt(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(stderr.contains(says), "{args:?}: {stderr}\ndoes not say {says:?}");
    assert!(output.stdout.is_empty());
}

fn write(folder: &Path, name: &str, records: &[Value]) -> String {
    let path = folder.join(name);
    let text: String = records.iter().map(|r| format!("{r}\n")).collect();
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn path_of(name: &str) -> String {
    golden(name).to_str().unwrap().to_owned()
}

#[test]
fn sample_then_logprobs() {
    let (folder, model) = (tempfile::tempdir().unwrap(), path_of("llama-gqa-9-3"));
    let prompts = write(
        folder.path(),
        "prompts.jsonl",
        &[
            json!({"id": "a", "prompt_ids": [5, 6, 7]}),
            json!({"id": {"n": 2}, "prompt_ids": [90], "prompt": "ids win over text"}),
            json!({"prompt_ids": [8, 9]}),
        ],
    );
    let base = ["sample", "--model", &model, "--device", "cpu", "--prompts", &prompts, "-n", "3", "--max-tokens", "6"];
    let args =
        [&base[..], &["--temperature", "0.9", "--top-p", "0.9", "--seed", "5", "--ignore-eos", "--logprobs", "2"]]
            .concat();
    let samples = lines(&args);
    assert_eq!(samples.len(), 9);
    assert_eq!((&samples[0]["id"], &samples[3]["id"], &samples[6]["id"]), (&json!("a"), &json!({"n": 2}), &json!(2)));
    assert_eq!(samples[4]["sample"], 1);
    for s in &samples {
        assert_eq!((s["finish"].as_str(), s["weight_version"].as_u64()), (Some("length"), Some(0)));
        for key in ["completion_ids", "logprobs", "model_logprobs", "top"] {
            assert_eq!(s[key].as_array().unwrap().len(), 6, "{key}");
        }
        assert_eq!(s["text"], Value::Null);
    }
    assert_eq!(samples, lines(&args), "the same seed");
    assert_eq!(samples, lines(&[&args[..], &["--no-mmap", "--threads", "1", "--max-batch-tokens", "5"]].concat()));

    let input: Vec<Value> = samples
        .iter()
        .map(|s| json!({"id": s["id"], "prompt_ids": s["prompt_ids"], "completion_ids": s["completion_ids"]}))
        .collect();
    let input = write(folder.path(), "scored.jsonl", &input);
    let out = folder.path().join("out.jsonl");
    let args =
        ["logprobs", "--model", &model, "--device", "cpu", "--input", &input, "--top", "1", "--entropy", "--out"];
    let args = [&args[..], &[out.to_str().unwrap()]].concat();
    assert!(lines(&args).is_empty(), "--out leaves stdout empty");
    let scored: Vec<Value> =
        std::fs::read_to_string(&out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for (l, s) in scored.iter().zip(&samples) {
        // Printed digits tell f32 apart, so equal text is equal bits.
        assert_eq!(l["logprobs"], s["model_logprobs"]);
        assert_eq!(l["ids"], s["completion_ids"]);
        let sum: f64 = l["logprobs"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).sum();
        assert!((l["sum"].as_f64().unwrap() - sum).abs() < 1e-4);
        assert_eq!((l["entropy"].as_array().unwrap().len(), l["top"].as_array().unwrap().len()), (6, 6));
    }
    let whole = write(folder.path(), "whole.jsonl", &[json!({"ids": [5, 6, 7]})]);
    let whole = lines(&["logprobs", "--model", &model, "--device", "cpu", "--input", &whole]);
    assert_eq!(whole[0]["logprobs"][0], Value::Null);
    assert!(whole[0].get("top").is_none() && whole[0].get("entropy").is_none());
}

#[test]
fn controls_of_sample() {
    let (folder, model) = (tempfile::tempdir().unwrap(), path_of("llama-gqa-9-3"));
    let prompts =
        write(folder.path(), "prompts.jsonl", &[json!({"prompt_ids": [5, 6, 7]}), json!({"prompt_ids": [9]})]);
    let base = ["sample", "--model", &model, "--device", "cpu", "--prompts", &prompts, "--max-tokens", "6"];
    let ids = |line: &Value| serde_json::from_value::<Vec<u32>>(line["completion_ids"].clone()).unwrap();
    let all = lines(
        &[
            &base[..],
            &["--allow", "10,11,12", "--ban", "11", "--logit-bias", "12=-1.5", "--typical-p", "0.95"],
            &["--presence-penalty", "-0.5", "--frequency-penalty", "0.25", "--repetition-penalty", "1.1"],
            &["--min-tokens", "2", "--stop-id", "12", "--kept", "2", "--entropy", "--timing", "--speculate", "4"],
            &["-n", "2", "--best-of", "5", "--kv-tokens", "2048", "--deadline", "600"],
        ]
        .concat(),
    );
    assert_eq!(all.len(), 4);
    for line in &all {
        let got = ids(line);
        assert!(got.len() >= 3 && got.iter().all(|t| [10, 12].contains(t)), "{got:?}");
        assert_eq!(got.last() == Some(&12), line["finish"] == "stop");
        for kept in line["kept"].as_array().unwrap() {
            assert!(kept["count"].as_u64().unwrap() <= 2 && kept["ids"].as_array().unwrap().len() <= 2);
        }
        assert_eq!(line["entropy"].as_array().unwrap().len(), got.len());
        assert!(line["timing"]["decode"].as_f64().unwrap() >= 0.0);
    }
    let banned = lines(&[&base[..], &["--logit-bias", "7=-inf", "--logit-bias", "8=3", "--temperature", "0"]].concat());
    assert!(banned.iter().all(|line| !ids(line).contains(&7)));
    let sample = |rest: &[&str], code, says: &str| fails(&[&base[..], rest].concat(), code, says);
    sample(&["--logit-bias", "7"], 2, "ID=VALUE");
    sample(&["--logit-bias", "7=inf"], 2, "logit_bias of token 7 is inf");
    sample(&["--typical-p", "1.5"], 2, "typical_p is 1.5");
    sample(&["--frequency-penalty", "inf"], 2, "frequency_penalty is inf");
    sample(&["--stop-id", "101"], 2, "stop_ids: token id 101 is not below the vocabulary size 101");
    sample(&["--ban", "200"], 2, "banned_ids: token id 200 is not below the vocabulary size 101");
    sample(&["--allow", "7", "--ban", "7"], 2, "leave no token");
    sample(&["--min-tokens", "7"], 2, "min_tokens is 7, it must be at most max_tokens, which is 6");
    sample(&["-n", "3", "--best-of", "2"], 2, "best_of is 2, it must be at least n, which is 3");
    sample(&["--speculate", "17"], 2, "speculate is 17, at most 16");
    sample(&["--kept", "1025"], 2, "kept_ids is 1025");
    sample(&["--deadline", "-1"], 2, "deadline");
    sample(&["--regex", "a+"], 2, "tokenizer.json");
    sample(&["--stream"], 2, "tokenizer.json");
    sample(&["--json-schema", "/nowhere.json"], 2, "/nowhere.json");
    sample(&["--regex", "a", "--grammar", "b"], 2, "cannot be used with");
}

#[test]
fn guided_and_streamed_text() {
    let Some(model) = smollm2() else { return };
    let (folder, model) = (tempfile::tempdir().unwrap(), model.to_str().unwrap().to_owned());
    let out = folder.path().join("out.jsonl");
    let common = ["sample", "--model", &model, "--device", "cpu", "--prompt", "Is water wet?", "--max-tokens", "24"];
    let args = [&common[..], &["-n", "2", "--stream", "--stop", "zzz", "--out", out.to_str().unwrap()]].concat();
    let output = rewardrt(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let texts: Vec<String> = std::fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n\n{}\n", texts[0], texts[1]));
    let guided = lines(&[&common[..], &["-n", "3", "--regex", " (Yes|No)\\."]].concat());
    assert!(guided.iter().all(|l| [" Yes.", " No."].contains(&l["text"].as_str().unwrap()) && l["finish"] == "stop"));
    fails(&[&common[..], &["--regex", "("]].concat(), 2, "regular expression");
}

#[test]
fn score_with_one_and_three_labels() {
    let folder = tempfile::tempdir().unwrap();
    let input = write(
        folder.path(),
        "in.jsonl",
        &[json!({"id": 1, "ids": [5, 6]}), json!({"prompt_ids": [7], "completion_ids": [8]})],
    );
    let one = lines(&["score", "--model", &path_of("llama-labels-1"), "--device", "cpu", "--input", &input]);
    assert!(one[0]["score"].is_number() && one[0].get("scores").is_none());
    assert_eq!((&one[1]["rule"], &one[1]["id"]), (&json!("sequence"), &json!(1)));
    let three = lines(&["score", "--model", &path_of("llama-labels-3"), "--device", "cpu", "--input", &input]);
    let labels: Vec<_> = three[0]["scores"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(labels, ["label-0", "label-1", "label-2"]);
    assert_eq!(three[0]["scores"]["label-0"].as_f64().unwrap() as f32, three[0]["score"].as_f64().unwrap() as f32);
}

#[test]
fn adapters_of_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let (model, adapter) = (path_of("llama-tied"), path_of("adapters/tied-all"));
    let prompts = write(folder.path(), "prompts.jsonl", &[json!({"prompt_ids": [7, 8, 9]})]);
    let sample = ["sample", "--model", &model, "--device", "cpu", "--prompts", &prompts, "--temperature", "0"];
    let sample = [&sample[..], &["--max-tokens", "6", "--ignore-eos"]].concat();
    let (base, adapted) = (lines(&sample), lines(&[&sample[..], &["--adapter", &adapter]].concat()));
    assert_ne!(base[0]["model_logprobs"], adapted[0]["model_logprobs"]);
    assert_eq!((&base[0]["adapter_version"], &adapted[0]["adapter_version"]), (&Value::Null, &json!(0)));
    let scored = json!({"prompt_ids": [7, 8, 9], "completion_ids": adapted[0]["completion_ids"]});
    let input = write(folder.path(), "input.jsonl", &[scored]);
    let logprobs = ["logprobs", "--model", &model, "--device", "cpu", "--input", &input];
    let of = |more: &[&str]| lines(&[&logprobs[..], more].concat())[0]["logprobs"].clone();
    assert_eq!(of(&["--adapter", &adapter]), adapted[0]["model_logprobs"]);
    assert_ne!(of(&[]), adapted[0]["model_logprobs"], "the reference is the base");
    let (model, adapter) = (path_of("llama-labels-3"), path_of("adapters/labels-3-qv"));
    let input = write(folder.path(), "ids.jsonl", &[json!({"ids": [7, 8, 9]})]);
    let score = ["score", "--model", &model, "--device", "cpu", "--input", &input];
    assert_ne!(lines(&score)[0]["score"], lines(&[&score[..], &["--adapter", &adapter]].concat())[0]["score"]);

    let about = lines(&["inspect", &adapter, "--json"]);
    assert_eq!((&about[0]["adapter"]["r"], about[0]["tensors"].as_array().unwrap().len()), (&json!(4), 9));
    let text = String::from_utf8(rewardrt(&["inspect", &adapter]).stdout).unwrap();
    assert!(text.contains("target_modules") && text.contains("[3, 48]"), "{text}");
    fails(&[&score[..], &["--adapter", &path_of("adapters/wide-all")]].concat(), 2, "lora_A");
    fails(&[&score[..], &["--adapter", &path_of("llama-tied")]].concat(), 2, "adapter_config.json");
}

#[test]
fn devices_and_inspect() {
    let devices = lines(&["devices", "--json"]);
    assert!(devices[0]["cpu"]["threads"].as_u64().unwrap() >= 1 && devices[0]["gpus"].is_array());
    assert!(rewardrt(&["devices"]).stdout.starts_with(b"cpu "));
    let model = lines(&["inspect", &path_of("llama-labels-3"), "--json"]);
    assert_eq!(model[0]["architecture"], "LlamaForSequenceClassification");
    assert_eq!((&model[0]["rule"], &model[0]["fits_config"]), (&json!("sequence"), &json!(true)));
    assert!(model[0]["tensors"].as_array().unwrap().iter().any(|t| t["name"] == "score.weight"));
    let text = String::from_utf8(rewardrt(&["inspect", &path_of("llama-shards")]).stdout).unwrap();
    assert!(text.contains("architecture   LlamaForCausalLM") && text.contains("model.norm.weight"));
}

#[test]
fn failures_and_exit_codes() {
    let (folder, model) = (tempfile::tempdir().unwrap(), path_of("llama-gqa-9-3"));
    let good = write(folder.path(), "good.jsonl", &[json!({"prompt_ids": [5]})]);
    let sample = |rest: &[&str], code, says: &str| {
        let args = [&["sample", "--model", &model, "--device", "cpu", "--prompts"][..], rest].concat();
        fails(&args, code, says);
    };
    sample(&["/nowhere.jsonl"], 2, "/nowhere.jsonl");
    sample(&[&good, "--temperature", "-1"], 2, "temperature");
    sample(&[&good, "--top-p", "2"], 2, "top_p is 2");
    sample(&[&good, "--memory", "12q"], 2, "suffix");
    sample(&[&good, "--memory", "1K"], 2, "memory budget is 1024");
    sample(&[&good, "--weights", "int3"], 2, "stored, int8, int4");
    sample(&[&good, "--stop", "x"], 2, "tokenizer.json");
    sample(&[&good, "--frobnicate"], 2, "--frobnicate");
    sample(&[&good, "--out", "/nowhere/out.jsonl"], 1, "/nowhere/out.jsonl");
    let text = write(folder.path(), "text.jsonl", &[json!({"prompt": "hello"})]);
    sample(&[&text], 2, "text.jsonl:1: the model folder has no tokenizer.json");
    std::fs::write(folder.path().join("bad.jsonl"), "{\"prompt_ids\":[5]}\n\n{\"prompt_ids\":[-1]}\n").unwrap();
    let bad = folder.path().join("bad.jsonl");
    sample(&[bad.to_str().unwrap()], 2, "bad.jsonl:3:");
    let empty = write(folder.path(), "empty.jsonl", &[]);
    sample(&[&empty], 2, "no records");
    let none = write(folder.path(), "none.jsonl", &[json!({"promt": "typo"})]);
    sample(&[&none], 2, "none.jsonl:1: the record has none of");
    fails(&["sample", "--model", "/nowhere", "--prompt", "x"], 2, "/nowhere");
    fails(&["sample", "--model", &model, "--prompts", &good, "--device", "gpu:nothing"], 2, "no adapter matches");
    fails(&["score", "--model", &model, "--device", "cpu", "--input", &good], 2, "rule must be named");
    fails(&["score", "--model", &model, "--device", "cpu", "--input", &good, "--rule", "best"], 2, "judge:LABEL");
    fails(&["inspect", "/nowhere"], 2, "/nowhere");
    // A failed run leaves no file behind, neither the result nor a partial one.
    let out = folder.path().join("o.jsonl");
    sample(&[&good, "-n", "0", "--out", out.to_str().unwrap()], 2, "samples");
    assert!(!out.exists() && !folder.path().join("o.jsonl.partial").exists());
}

#[test]
fn text_in_text_out() {
    let Some(model) = smollm2() else { return };
    let (folder, model) = (tempfile::tempdir().unwrap(), model.to_str().unwrap().to_owned());
    let common = ["--model", &model, "--device", "cpu", "--temperature", "0"];
    let answer = lines(
        &[&["sample", "--prompt", "The capital of France is", "--max-tokens", "16", "--stop", "answer"][..], &common]
            .concat(),
    );
    assert_eq!(answer[0]["text"], " Paris.\n\nThe ", "cut before the stop string");
    assert_eq!(answer[0]["finish"], "stop");
    assert!(answer[0]["completion_ids"].as_array().unwrap().len() < 16);
    let judge = write(
        folder.path(),
        "judge.jsonl",
        &[
            json!({"messages": [{"role": "user", "content": "Is Paris in France? Answer yes or no."}]}),
            json!({"messages": [{"role": "user", "content": "Say hi."}], "completion": "hi"}),
            json!({"text": "Is water wet? Answer:"}),
        ],
    );
    let scores = lines(&["score", "--model", &model, "--device", "cpu", "--input", &judge, "--rule", "judge: yes, no"]);
    for s in &scores {
        let sum = s["scores"][" yes"].as_f64().unwrap() + s["scores"][" no"].as_f64().unwrap();
        assert!((sum - 1.0).abs() < 1e-5 && s["rule"] == "judge: yes, no");
    }
    fails(
        &["score", "--model", &model, "--device", "cpu", "--input", &judge, "--rule", "judge:yes,certainly not"],
        2,
        "it must be one",
    );
}

/// A config that synth can make in no time, with what a checkpoint may have: biases, an untied head.
fn small_config(folder: &Path) -> String {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 101,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false, "max_position_embeddings": 64,
    });
    write(folder, "config.json", &[config])
}

#[test]
fn synth_makes_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let config = small_config(folder.path());
    let synth = |name: &str, rest: &[&str]| {
        let out = folder.path().join(name);
        let base = ["synth", config.as_str(), "--out", out.to_str().unwrap()];
        let output = rewardrt(&[&base[..], rest].concat());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(std::fs::read(out.join("config.json")).unwrap(), std::fs::read(&config).unwrap());
        (std::fs::read(out.join("model.safetensors")).unwrap(), out.to_str().unwrap().to_owned())
    };
    for (dtype, stored) in [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")] {
        let (_, model) = synth(dtype, &["--dtype", dtype]);
        let about = lines(&["inspect", &model, "--json"]);
        assert_eq!((&about[0]["fits_config"], about[0]["dtypes"].as_object().unwrap().len()), (&json!(true), 1));
        assert!(about[0]["dtypes"].get(stored).is_some(), "{about:?}");
        let prompt = write(folder.path(), "prompt.jsonl", &[json!({"prompt_ids": [5, 6]})]);
        let args = ["sample", "--model", &model, "--device", "cpu", "--prompts", &prompt, "--max-tokens", "4"];
        let logprobs = &lines(&[&args[..], &["--ignore-eos"]].concat())[0]["model_logprobs"];
        assert!(logprobs.as_array().unwrap().iter().all(|l| l.as_f64().is_some_and(|l| l < 0.0)), "{logprobs}");
    }
    let (first, _) = synth("first", &["--seed", "7"]);
    assert_eq!(first, synth("again", &["--seed", "7"]).0);
    let (other, other_model) = synth("other", &["--seed", "8"]);
    assert!(first.len() == other.len() && first != other);

    // Norms are about 1, the rest about 0, with a deviation of 0.02.
    let spec = rewardrt::model::read_spec(other_model.as_ref()).unwrap();
    let plan = rewardrt::model::Plan::new(&spec).unwrap();
    let weights = plan.load_weights(&spec, other_model.as_ref(), &Default::default()).unwrap();
    for expected in plan.expected() {
        let values = weights.get(&expected.name).unwrap().to_f32();
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt();
        let centre = if expected.name.contains("norm") { 1.0 } else { 0.0 };
        assert!((mean - centre).abs() < 0.02, "{}: mean {mean}", expected.name);
        assert!((0.013..0.027).contains(&deviation), "{}: deviation {deviation}", expected.name);
    }

    let tied = path_of("llama-tied");
    let out = folder.path().join("tied");
    let output = rewardrt(&["synth", &format!("{tied}/config.json"), "--out", out.to_str().unwrap()]);
    assert!(output.status.success());
    let about = lines(&["inspect", out.to_str().unwrap(), "--json"]);
    assert!(!about[0]["tensors"].to_string().contains("lm_head"), "a tied head is not written");
}

/// The bench's 7B model, with fewer layers, a narrower MLP and a small vocabulary: it is made, fits and runs.
#[test]
fn synth_makes_the_bench_s_qwen2() {
    let folder = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/configs/qwen2.5-7b.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for (key, value) in [("num_hidden_layers", 1), ("vocab_size", 64), ("intermediate_size", 32)] {
        config[key] = json!(value);
    }
    let config = write(folder.path(), "config.json", &[config]);
    let out = folder.path().join("qwen2").to_str().unwrap().to_owned();
    let output = rewardrt(&["synth", &config, "--out", &out]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let about = lines(&["inspect", &out, "--json"]);
    assert_eq!(
        ["architecture", "fits_config", "head_dim", "sliding_window"].map(|key| &about[0][key]),
        [&json!("Qwen2ForCausalLM"), &json!(true), &json!(128), &Value::Null]
    );
    let tensors = about[0]["tensors"].as_array().unwrap();
    let names: Vec<_> = tensors.iter().map(|t| t["name"].as_str().unwrap()).collect();
    let biases: Vec<_> = names.iter().filter_map(|n| n.strip_suffix("_proj.bias")).collect();
    assert_eq!(biases, ["k", "q", "v"].map(|p| format!("model.layers.0.self_attn.{p}")));
    assert!(names.contains(&"lm_head.weight"));

    let prompt = write(folder.path(), "prompt.jsonl", &[json!({"prompt_ids": [5, 6]})]);
    let args = ["sample", "--model", &out, "--device", "cpu", "--prompts", &prompt, "--max-tokens", "4"];
    let sample = &lines(&args)[0];
    assert_eq!(sample["model_logprobs"].as_array().unwrap().len(), 4, "{sample}");
}

#[test]
fn synth_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let config = small_config(folder.path());
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    fails(&["synth", "/nowhere/config.json", "--out", out], 2, "/nowhere/config.json");
    fails(&["synth", &config, "--out", folder.path().to_str().unwrap()], 2, "it exists; name a folder that does not");
    fails(&["synth", &config, "--out", "/nowhere/above/out"], 2, "/nowhere/above/out");
    fails(&["synth", &config, "--out", ".."], 2, "it exists");
    fails(&["synth", &config, "--out", out, "--dtype", "int8"], 2, "bf16, f16, f32");
    fails(&["synth", &config, "--out", out, "--seed", "x"], 2, "--seed");
    fails(&["synth", &config], 2, "--out");
    let bad = write(folder.path(), "bad.json", &[json!({"architectures": ["LlamaForCausalLM"], "hidden_size": "x"})]);
    fails(&["synth", &bad, "--out", out], 2, "\"hidden_size\" is \"x\"");
    std::fs::write(&bad, "{").unwrap();
    fails(&["synth", &bad, "--out", out], 2, "not a JSON object");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before + 1, "nothing is left but bad.json");
}

#[test]
fn diff_writes_deltas() {
    let folder = tempfile::tempdir().unwrap();
    let config = small_config(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (name, seed) in [("old", "1"), ("new", "2")] {
        assert!(rewardrt(&["synth", &config, "--out", &path(name), "--seed", seed]).status.success());
    }
    let (old, new) = (path("old"), path("new"));
    let diff = |name: &str, rest: &[&str], says: &[&str]| {
        let output = rewardrt(&[&["diff", &old, &new, "--out", &path(name)][..], rest].concat());
        let (text, errors) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success() && errors.is_empty(), "{errors}");
        assert!(text.lines().count() == 1 && text.starts_with(&path(name)), "{text}");
        says.iter().for_each(|says| assert!(text.contains(says), "{text}\ndoes not say {says:?}"));
        rewardrt::weights::Delta::open(path(name).as_ref(), &Default::default()).unwrap()
    };
    let delta = diff("delta", &[], &[": version 0 to 1 (xor), 35 of 35 tensors changed, ", " %), ", " s"]);
    assert_eq!((delta.base_version(), delta.version(), delta.tensors().count()), (0, 1, 35));
    let more = ["--encoding", "overwrite", "--version", "8", "--level", "5", "--threads", "1"];
    let delta = diff("weight_v000008", &more, &[": version 7 to 8 (overwrite), "]);
    assert_eq!((delta.base_version(), delta.version()), (7, 8));
    let delta = diff("later", &["--base-version", "9"], &[": version 9 to 10 (xor), "]);
    let weights = |name: &str| {
        let spec = rewardrt::model::read_spec(path(name).as_ref()).unwrap();
        let plan = rewardrt::model::Plan::new(&spec).unwrap();
        plan.load_weights(&spec, path(name).as_ref(), &Default::default()).unwrap()
    };
    let (before, after) = (weights("old"), weights("new"));
    for tensor in delta.tensors() {
        let base = before.get(tensor.name).unwrap().bytes();
        let mut out = vec![0; base.len()];
        delta.apply(tensor.name, base, &mut out).unwrap();
        assert!(out == after.get(tensor.name).unwrap().bytes(), "{}", tensor.name);
    }

    let refuses = |args: &[&str], code, says: &str| fails(&[&["diff"], args].concat(), code, says);
    refuses(&[&old, &new], 2, "--out");
    refuses(&[&old, &new, "--out", &path("delta")], 2, "it exists; name a folder that does not");
    refuses(&[&old, &new, "--out", &path("x"), "--encoding", "sparse"], 2, "xor, overwrite");
    refuses(&[&old, &new, "--out", &path("x"), "--level", "0"], 2, "the level is 0, it must be from 1 to 19");
    refuses(&[&old, &new, "--out", &path("x"), "--threads", "0"], 2, "threads is 0");
    let versions = ["--base-version", "3", "--version", "3"];
    refuses(&[&[old.as_str(), &new, "--out", &path("x")], &versions[..]].concat(), 2, "base version is 3");
    refuses(&[&old, &new, "--out", &path("weight_v000005")], 2, "of version 1 it must be \"weight_v000001\"");
    refuses(&["/nowhere", &new, "--out", &path("x")], 2, "/nowhere");
    refuses(&[&old, &path_of("llama-tied"), "--out", &path("x")], 2, "differ in more than their bytes");
    refuses(&[&old, &path("delta"), "--out", &path("x")], 2, "a delta between checkpoints");
    fails(&["inspect", &path("delta")], 2, "config.json");
    assert!(!folder.path().join("x").exists());
}

#[test]
fn bench_times_jobs_and_kernels() {
    let model = path_of("llama-tied");
    let base = ["bench", "--model", &model, "--device", "cpu", "--threads", "1", "--repeat", "1"];
    let base =
        [&base[..], &["--sequences", "1,3", "--prompt-tokens", "8", "--tokens", "4", "--score", "2x16"]].concat();
    let jobs = lines(&[&base[..], &["--json"]].concat());
    assert_eq!(jobs.iter().map(|j| j["job"].as_str().unwrap()).collect::<Vec<_>>(), ["decode", "decode", "logprobs"]);
    assert_eq!(jobs.iter().map(|j| j["sequences"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3, 2]);
    for (job, tokens) in jobs.iter().zip([4.0, 12.0, 32.0]) {
        let (seconds, speed) = (job["seconds"].as_f64().unwrap(), job["tokens_per_second"].as_f64().unwrap());
        assert!((seconds * speed - tokens).abs() < 1e-6, "{job}");
        assert_eq!(job["step_ms"].is_number(), job["job"] == "decode");
        assert_eq!((&job["kernels"], &job["limits"]), (&json!([]), &Value::Null));
        assert_eq!((job["model"].as_str(), job["precision"].as_str()), (Some(model.as_str()), Some("auto")));
        assert!(job["device"].as_str().unwrap().starts_with("cpu ("));
    }

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("bench.jsonl");
    let args = [&base[..], &["--json", "--profile", "--out", out.to_str().unwrap()]].concat();
    assert!(lines(&args).is_empty(), "--out leaves stdout empty");
    let text = std::fs::read_to_string(&out).unwrap();
    let jobs: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for job in &jobs {
        assert!(
            job["limits"]["bytes_per_second"].as_f64().unwrap() > 1e8 && job["limits"]["flops"].as_f64().unwrap() > 1e8
        );
        let kernels = job["kernels"].as_array().unwrap();
        let ms: f64 = kernels.iter().map(|k| k["ms"].as_f64().unwrap()).sum();
        assert!(ms > 0.0 && ms <= 1e3 * job["profile_seconds"].as_f64().unwrap(), "{job}");
        let calls = |name: &str| kernels.iter().find(|k| k["name"] == name).unwrap()["calls"].as_u64().unwrap();
        let steps = if job["job"] == "decode" { 4 } else { 1 };
        let per_step = ["linear", "rope", "kv_write", "attention", "embed", "gather_rows", "rms_norm", "head"];
        assert_eq!(per_step.map(calls), [8, 4, 2, 2, 1, 1, 1, 1].map(|n| n * steps), "{job}");
        assert_eq!(kernels.len(), per_step.len());
    }
    // By hand: weights in bf16; D 48, F 80, H = G = 6, E 8, V 101, L 2; two texts of 15 rows each, the last tokens are only targets.
    let count = |name: &str| {
        let kernels = jobs[2]["kernels"].as_array().unwrap();
        let kernel = kernels.iter().find(|k| k["name"] == name).unwrap();
        (kernel["bytes"].as_u64().unwrap(), kernel["flops"].as_u64().unwrap())
    };
    let (layers, rows, d, f, v) = (2, 30, 48, 80, 101);
    let weights = 4 * d * d + 3 * d * f;
    // Widths in and out of the four products of a layer; two add to what is there.
    let activations = rows * ((d + 3 * d) + (d + 2 * d) + (d + f) + (f + 2 * d));
    assert_eq!(count("linear"), (layers * (2 * weights + 4 * activations), layers * 2 * rows * weights));
    assert_eq!(count("attention"), (layers * (8 * 30 * d + 8 * rows * d), layers * 4 * 2 * (15 * 16 / 2) * d));
    assert_eq!(count("head"), (2 * v * d + 4 * rows * d, 2 * rows * v * d));
    assert_eq!(count("kv_write"), (layers * 4 * 4 * rows * d, 0));

    let tables = rewardrt(&[&base[..], &["--profile"]].concat());
    let text = String::from_utf8(tables.stdout).unwrap();
    assert!(tables.status.success() && text.matches("attention").count() == 3 && text.contains("of read"), "{text}");
    let labels = path_of("llama-labels-3");
    let scores = lines(&["bench", "--model", &labels, "--device", "cpu", "--score", "2x16", "--repeat", "1", "--json"]);
    assert_eq!((scores.len(), &scores[0]["job"]), (1, &json!("score")));
}

#[test]
fn bench_refuses() {
    let model = path_of("llama-tied");
    let bench = |rest: &[&str], says: &str| {
        fails(&[&["bench", "--model", &model, "--device", "cpu"], rest].concat(), 2, says);
    };
    bench(&["--sequences", "1,0"], "--sequences is 0, it must be at least 1");
    bench(&["--sequences", "x"], "--sequences");
    bench(&["--tokens", "0"], "--tokens is 0, it must be at least 1");
    bench(&["--prompt-tokens", "0"], "--prompt-tokens is 0");
    bench(&["--repeat", "0"], "--repeat is 0");
    bench(&["--score", "16"], "it must be BxL, as in 16x256");
    bench(&["--score", "0x16"], "--score BxL: B is 0");
    bench(&["--score", "2x1"], "--score BxL: L is 1, it must be at least 2");
    bench(&[], "--prompt-tokens plus --tokens is 96, at most the model's context of 64 is possible");
    let fits = ["--prompt-tokens", "8", "--tokens", "8"];
    bench(&fits, "--score BxL: L is 256, at most the model's context of 64 is possible");
    bench(&["--out", "x.jsonl"], "--out takes JSON: add --json");
    fails(&["bench", "--model", "/nowhere"], 2, "/nowhere");
}

#[test]
fn configs_of_benches_have_the_public_sizes() {
    let sizes = [("llama-3.2-1b", 1_235_814_400), ("qwen2.5-7b", 7_615_616_512), ("smollm2-135m", 134_515_008)];
    for (name, parameters) in sizes {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("benches/configs/{name}.json"));
        let spec = rewardrt::model::parse_config(&std::fs::read(path).unwrap(), None).unwrap();
        let plan = rewardrt::model::Plan::new(&spec).unwrap();
        let count: usize = plan.expected().map(|e| e.shape.iter().product::<usize>()).sum();
        assert_eq!(count, parameters, "{name}");
    }
}
