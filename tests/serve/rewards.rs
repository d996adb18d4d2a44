//! Scores in other stacks' shapes equal the Rust API's; activations equal the formulas.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rewardrt::{EncodeOptions, Message, Model, Rule, ScoreRequest};
use serde_json::{Value, json};

use crate::common::{open, small};
use crate::server::{Server, command, with_tokenizer};

const ONE: &str = "llama-labels-1";
const THREE: &str = "llama-labels-3";

struct Stack {
    server: Server,
    one: Model,
    three: Model,
    judge: Model,
}

fn stack(folder: &Path) -> Stack {
    let paths: Vec<PathBuf> = [ONE, THREE, "llama-tied"].iter().map(|n| with_tokenizer(n, folder)).collect();
    let mut command = command();
    for (name, path, rule) in [
        ("one", &paths[0], ""),
        ("three", &paths[1], ":sequence"),
        ("judge", &paths[2], ":judge:y,n"),
        ("judge3", &paths[2], ":judge:y,n,x"),
    ] {
        command.args(["--reward", &format!("{name}={}{rule}", path.display())]);
    }
    let server = Server::start(command.args(["--max-context", "512", "--kv-tokens", "4096"]));
    let runtime = open("cpu", 2);
    let load = |i: usize| runtime.load_model(&paths[i], &small()).unwrap();
    Stack { server, one: load(0), three: load(1), judge: load(2) }
}

/// Every label's value, of ids.
fn values(model: &Model, rule: Option<Rule>, sequences: Vec<Vec<u32>>) -> Vec<Vec<f32>> {
    let request = ScoreRequest { sequences, rule, ..ScoreRequest::default() };
    model.score(&request).unwrap().wait().unwrap().into_iter().map(|s| s.score.values).collect()
}

fn encode(model: &Model, text: &str, parse_special: bool) -> Vec<u32> {
    model.tokenizer().unwrap().encode(text, EncodeOptions { add_special: true, parse_special }).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn close(a: &[f32], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).for_each(|(a, b)| assert!((f64::from(*a) - b).abs() < 1e-6, "{a} {b}"));
}

#[test]
fn classify_as_verl_and_vllm_ask() {
    let folder = tempfile::tempdir().unwrap();
    let s = stack(folder.path());
    let text = "<|user|>What?<|end|><|assistant|>That.<|end|>";
    // The template's marks are tokens, not letters.
    let ids = encode(&s.one, text, true);
    assert!(ids.contains(&3) && ids.contains(&5));
    let logits = values(&s.one, None, vec![ids.clone()]).remove(0);
    for off in ["activation", "use_activation"] {
        let answer = s.server.ask("/classify", json!({"model": "one", "input": text, off: false}));
        assert_eq!(floats(&answer["data"][0]["probs"]), logits, "what verl reads: data[-1].probs[-1]");
        assert_eq!(
            (&answer["data"][0]["num_classes"], &answer["usage"]["prompt_tokens"]),
            (&json!(1), &json!(ids.len()))
        );
    }
    // A trainer names the model by its path.
    let path = folder.path().join(ONE);
    let answer = s.server.ask("/classify", json!({"model": path, "input": text, "activation": false}));
    assert_eq!(floats(&answer["data"][0]["probs"]), logits);
    let answer = s.server.ask("/classify", json!({"model": "one", "input": [ids, [1, 40]]}));
    let both = values(&s.one, None, vec![ids.clone(), vec![1, 40]]);
    assert_eq!(answer["data"].as_array().unwrap().len(), 2);
    for (data, logits) in answer["data"].as_array().unwrap().iter().zip(&both) {
        close(&floats(&data["probs"]), &[1.0 / (1.0 + (-f64::from(logits[0])).exp())]);
    }
    // Several labels: softmax, and the name of the best one.
    let logits = values(&s.three, None, vec![encode(&s.three, "ab", true), encode(&s.three, "cd", true)]);
    let answer = s.server.ask("/classify", json!({"model": "three", "input": ["ab", "cd"]}));
    for (i, logits) in logits.iter().enumerate() {
        let e: Vec<f64> = logits.iter().map(|l| f64::from(*l).exp()).collect();
        let total: f64 = e.iter().sum();
        close(&floats(&answer["data"][i]["probs"]), &e.iter().map(|e| e / total).collect::<Vec<_>>());
        let best = (0..3).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        assert_eq!(answer["data"][i]["label"], format!("label-{best}"));
    }
    // A conversation; a judge's probabilities are what they are.
    let messages = [Message { role: "user".into(), content: "Is it?".into() }];
    let rule = Rule::parse("judge:y,n").unwrap();
    let ids = s.judge.tokenizer().unwrap().encode_chat(&messages, true).unwrap();
    let expected = values(&s.judge, Some(rule), vec![ids]).remove(0);
    for activation in [true, false] {
        let body = json!({"model": "judge", "messages": messages, "use_activation": activation});
        let answer = s.server.ask("/classify", body);
        // verl takes the last value: it must be the first label's.
        assert_eq!(floats(&answer["data"][0]["probs"]), expected[..1]);
        assert_eq!((&answer["data"][0]["num_classes"], &answer["data"][0]["label"]), (&json!(1), &json!("y")));
    }
    let answer = s.server.ask("/v1/embeddings", json!({"model": "judge", "messages": messages}));
    assert_eq!(floats(&answer["data"][0]["embedding"]).last(), Some(&expected[0]));
    let (status, answer) = s.server.post("/v1/embeddings", &json!({"model": "judge3", "messages": messages}));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("model")), "{answer}");
    let answer = s.server.ask("/classify", json!({"model": "judge3", "messages": messages}));
    assert_eq!(answer["data"][0]["num_classes"], 3);
    let answer = s.server.ask("/v1/embeddings", json!({"model": "three", "input": "ab", "encoding_format": "base64"}));
    let bytes = BASE64_STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let decoded: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!((decoded, bytes.len()), (logits[0].clone(), 12));
    let answer = s.server.ask("/v1/embeddings", json!({"model": "three", "input": "ab", "encoding_format": "float"}));
    assert_eq!(floats(&answer["data"][0]["embedding"]), logits[0], "SGLang's flavour, raw");
}

/// `problem_type` decides, as in vLLM.
#[test]
fn activations_follow_the_config() {
    let folder = tempfile::tempdir().unwrap();
    for (problem, activation) in
        [("regression", 0), ("multi_label_classification", 1), ("single_label_classification", 2)]
    {
        let path = with_tokenizer(THREE, &folder.path().join(problem));
        let mut config: Value = serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
        config["problem_type"] = json!(problem);
        std::fs::write(path.join("config.json"), config.to_string()).unwrap();
        let server = Server::start(command().args(["--reward", path.to_str().unwrap()]));
        let logits = values(&open("cpu", 2).load_model(&path, &small()).unwrap(), None, vec![vec![1, 9, 8]]).remove(0);
        let answer = server.ask("/classify", json!({"input": [1, 9, 8]}));
        let e: Vec<f64> = logits.iter().map(|l| f64::from(*l).exp()).collect();
        let expected: Vec<f64> = match activation {
            0 => logits.iter().map(|l| f64::from(*l)).collect(),
            1 => e.iter().map(|e| e / (1.0 + e)).collect(),
            _ => e.iter().map(|x| x / e.iter().sum::<f64>()).collect(),
        };
        close(&floats(&answer["data"][0]["probs"]), &expected);
    }
}

fn change_config(path: &Path, field: &str, value: Value) {
    let file = path.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config[field] = value;
    std::fs::write(file, config.to_string()).unwrap();
}

/// A cross-encoder's own activation is that of pairs, not of classes.
#[test]
fn pairs_follow_sentence_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let path = with_tokenizer(ONE, folder.path());
    let raw = values(&open("cpu", 2).load_model(&path, &small()).unwrap(), None, vec![vec![1, 46, 45]]).remove(0)[0];
    let (raw, sigmoid) = (f64::from(raw), |x: f64| 1.0 / (1.0 + (-x).exp()));
    let ids = json!([1, 46, 45]);
    for (field, value, expected) in [
        ("sentence_transformers", json!({"activation_fn": "torch.nn.modules.linear.Identity"}), raw),
        ("sentence_transformers", json!({"activation_fn": "torch.nn.Tanh"}), raw.tanh()),
        ("sentence_transformers", json!({"version": "5"}), sigmoid(raw)),
        ("sbert_ce_default_activation_function", json!("torch.nn.modules.activation.Tanh"), raw.tanh()),
        ("sbert_ce_default_activation_function", json!("torch.nn.Identity"), raw),
        ("sbert_ce_default_activation_function", json!("torch.nn.modules.activation.Sigmoid"), sigmoid(raw)),
    ] {
        let path = with_tokenizer(ONE, folder.path());
        change_config(&path, field, value.clone());
        let server = Server::start(command().args(["--reward", path.to_str().unwrap()]));
        let answer = server.ask("/score", json!({"text_1": "I", "text_2": "H"}));
        close(&[answer["data"][0]["score"].as_f64().unwrap() as f32], &[expected]);
        let answer = server.ask("/classify", json!({"input": ids}));
        close(&floats(&answer["data"][0]["probs"]), &[sigmoid(raw)]);
    }
    let path = with_tokenizer(ONE, folder.path());
    change_config(&path, "sbert_ce_default_activation_function", json!("my.module.Relu"));
    let output = command().args(["--reward", path.to_str().unwrap()]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("my.module.Relu"), "{text}");
}

/// TRL's reward models pad with the end of sequence: what it ends with must be read all the same.
#[test]
fn a_head_is_read_at_the_last_token() {
    let folder = tempfile::tempdir().unwrap();
    let (pads, plain) = (with_tokenizer(ONE, &folder.path().join("a")), with_tokenizer(ONE, &folder.path().join("b")));
    change_config(&pads, "pad_token_id", json!(2));
    // Without padding the library's rule has no token to pass over.
    change_config(&plain, "pad_token_id", Value::Null);
    let expected = |ids: &[u32]| {
        let model = open("cpu", 2).load_model(&plain, &small()).unwrap();
        values(&model, None, vec![ids.to_vec()]).remove(0)[0]
    };
    let (ended, open) = (expected(&[1, 45, 2]), expected(&[1, 45]));
    assert_ne!(ended, open);
    let server = Server::start(command().args(["--reward", pads.to_str().unwrap()]));
    let answer = server.ask("/classify", json!({"input": "H</s>", "use_activation": false}));
    assert_eq!(floats(&answer["data"][0]["probs"]), [ended]);
    let answer = server.ask("/v1/embeddings", json!({"input": [1, 45, 2]}));
    assert_eq!(floats(&answer["data"][0]["embedding"]), [ended]);
    let answer = server.ask("/score", json!({"text_1": "H", "text_2": "</s>", "use_activation": false}));
    assert_eq!(answer["data"][0]["score"].as_f64().unwrap() as f32, ended);
    let answer = server.ask("/get_reward", json!({"query": ["<s>H</s>"]}));
    assert_eq!(floats(&answer["rewards"]), [ended]);
    let answer = server.ask("/remote_rm", json!({"prompt": "H", "response": "</s>"}));
    assert_eq!(answer.as_f64().unwrap() as f32, ended);
}

#[test]
fn score_and_rerank() {
    let folder = tempfile::tempdir().unwrap();
    let s = stack(folder.path());
    let documents = ["Rome", "Paris", "<|end|>"];
    // The marks of a client's template are tokens.
    let pair = |q: &str, d: &str| encode(&s.one, &format!("{q}{d}"), true);
    assert_eq!(pair("", "<|end|>"), [1, 5]);
    let raw = values(&s.one, None, documents.iter().map(|d| pair("Capital?", d)).collect()).concat();
    let sigmoid = |l: f32| 1.0 / (1.0 + (-f64::from(l)).exp());
    for (path, first, second) in [
        ("/score", "text_1", "text_2"),
        ("/v1/score", "queries", "documents"),
        ("/score", "queries", "items"),
        ("/score", "data_1", "data_2"),
    ] {
        let answer = s.server.ask(path, json!({"model": "one", first: "Capital?", second: documents}));
        let got: Vec<f32> =
            answer["data"].as_array().unwrap().iter().map(|d| d["score"].as_f64().unwrap() as f32).collect();
        close(&got, &raw.iter().map(|l| sigmoid(*l)).collect::<Vec<_>>());
        let answer =
            s.server.ask(path, json!({first: vec!["Capital?"; 3], second: documents, "use_activation": false}));
        let got: Vec<f32> =
            answer["data"].as_array().unwrap().iter().map(|d| d["score"].as_f64().unwrap() as f32).collect();
        assert_eq!(got, raw);
    }
    let mut order: Vec<usize> = (0..3).collect();
    order.sort_by(|a, b| raw[*b].total_cmp(&raw[*a]));
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let body = json!({"model": "one", "query": "Capital?", "documents": documents, "use_activation": false});
        let answer = s.server.ask(path, body);
        assert_eq!(answer["results"].as_array().unwrap().len(), 3);
        for (result, i) in answer["results"].as_array().unwrap().iter().zip(&order) {
            assert_eq!((&result["index"], &result["document"]["text"]), (&json!(i), &json!(documents[*i])));
            assert_eq!(result["relevance_score"].as_f64().unwrap() as f32, raw[*i]);
        }
    }
    let body = json!({"query": "Capital?", "documents": [{"text": "Rome"}, "Paris", "<|end|>"], "top_n": 1, "return_documents": false});
    let answer = s.server.ask("/rerank", body);
    assert_eq!(answer["results"].as_array().unwrap().len(), 1);
    assert_eq!((&answer["results"][0]["index"], answer["results"][0].get("document")), (&json!(order[0]), None));
    // A judge ranks by the probability of its first label.
    let rule = Some(Rule::parse("judge:y,n").unwrap());
    let expected = values(&s.judge, rule, vec![encode(&s.judge, "QD", false)]).remove(0)[0];
    let answer = s.server.ask("/score", json!({"model": "judge", "text_1": "Q", "text_2": "D"}));
    assert_eq!(answer["data"][0]["score"].as_f64().unwrap() as f32, expected);
}

#[test]
fn rewards_of_openrlhf_and_slime() {
    let folder = tempfile::tempdir().unwrap();
    let s = stack(folder.path());
    // OpenRLHF: the tokens of the text, no more and no less.
    let text = "<s><|user|>Q<|end|><|assistant|>A";
    let ids = encode(&s.one, &text["<s>".len()..], true);
    assert_eq!(ids[..2], [1, 3]);
    for (ending, added) in [("", &[][..]), ("</s>", &[2]), ("</s></s>", &[2, 2])] {
        let expected = values(&s.one, None, vec![[&ids, added].concat()]).concat();
        let body = json!({"query": [format!("{text}{ending}")], "prompts": ["Q"], "labels": [null]});
        let answer = s.server.ask("/get_reward", body);
        assert_eq!(floats(&answer["rewards"]), expected, "{ending}");
        assert_eq!((&answer["scores"], &answer["extra_logs"]), (&answer["rewards"], &json!({})));
    }
    let answer =
        s.server.ask("/get_reward?model=three", json!({"query": ["x", "y"], "prompts": ["", ""], "labels": ["", ""]}));
    let sequences = ["x", "y"].map(|t| encode(&s.three, t, true)[1..].to_vec()).to_vec();
    let expected: Vec<f32> = values(&s.three, None, sequences).iter().map(|v| v[0]).collect();
    assert_eq!(floats(&answer["rewards"]), expected);

    // slime: the body of the answer is the reward.
    let reward = s
        .server
        .ask("/remote_rm", json!({"prompt": "<s><|user|>Q<|end|><|assistant|>", "response": "A<|end|>", "label": "4"}));
    let expected = values(&s.one, None, vec![encode(&s.one, "<|user|>Q<|end|><|assistant|>A<|end|>", true)]).concat();
    assert_eq!(reward.as_f64().unwrap() as f32, expected[0]);
    let messages = [("user", "Q"), ("assistant", "A")].map(|(r, c)| Message { role: r.into(), content: c.into() });
    let reward = s.server.ask("/remote_rm?model=one", json!({"prompt": messages[..1], "response": "A", "label": null}));
    let ids = s.one.tokenizer().unwrap().encode_chat(&messages, false).unwrap();
    assert_eq!(reward.as_f64().unwrap() as f32, values(&s.one, None, vec![ids]).concat()[0]);
}
