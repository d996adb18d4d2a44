//! What is refused, and how it is said.

use std::process::Command;

use serde_json::{Value, json};

use crate::common::golden;
use crate::server::{Server, command, with_tokenizer};

#[track_caller]
fn refused(server: &Server, path: &str, body: &Value, status: u16, param: Value, says: &str) {
    let (got, answer) = server.post(path, body);
    assert_eq!(got, status, "{path} {body}: {answer}");
    let error = &answer["error"];
    assert_eq!(error["param"], param, "{path} {body}: {answer}");
    assert!(error["message"].as_str().unwrap().contains(says), "{path} {body}: {answer} does not say {says:?}");
    assert_eq!(answer.as_object().unwrap().len(), 1);
    let kind = if status >= 500 { "server_error" } else { "invalid_request_error" };
    assert_eq!(error["type"], kind);
}

#[test]
fn requests_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (tied, labels) = (with_tokenizer("llama-tied", folder.path()), with_tokenizer("llama-labels-3", folder.path()));
    let (policy, reward) = (format!("policy={}", tied.display()), format!("reward={}", labels.display()));
    let server = Server::start(command().args(["--model", &policy, "--reward", &reward, "--kv-tokens", "1024"]));
    let chat = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let cases: [(Value, &str, &str); 27] = [
        (json!({"temperature": -1}), "temperature", "0 or greater"),
        (json!({"temperature": "hot"}), "temperature", "expected f32"),
        (json!({"top_p": 1.5}), "top_p", "from 0 to 1"),
        (json!({"top_k": -2}), "top_k", "-1"),
        (json!({"n": 0}), "n", "at least 1"),
        (json!({"n": -1}), "n", "usize"),
        (json!({"max_tokens": 0}), "max_tokens", "at least 1"),
        (json!({"max_tokens": 3, "max_completion_tokens": 4}), "max_tokens", "differs"),
        (json!({"seed": 1.5}), "seed", "integer"),
        (json!({"stop": [""]}), "stop", "empty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias", "not a token id"),
        (json!({"logit_bias": {"101": 1}}), "logit_bias", "vocabulary size 101"),
        (json!({"top_logprobs": 2}), "top_logprobs", "logprobs: true"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "at most 20"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "stream"),
        (json!({"response_format": {"type": "xml"}}), "response_format", "xml"),
        (
            json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
            "structured_outputs",
            "too",
        ),
        (json!({"structured_outputs": {"regex": "a", "json": {}}}), "structured_outputs", ""),
        (json!({"tools": [{"type": "function"}]}), "tools", "not supported"),
        (json!({"functions": []}), "functions", "not supported"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort", "not supported"),
        (json!({"echo": true}), "echo", "not supported"),
        (json!({"temprature": 0.5}), "temprature", "not supported"),
        (json!({"messages": []}), "messages", "empty"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content",
            "image_url",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing"),
        (json!({"messages": [{"role": "user", "content": "x", "name": "me"}]}), "messages[0].name", "not supported"),
    ];
    for (extra, param, says) in cases {
        refused(&server, "/v1/chat/completions", &chat(extra), 400, json!(param), says);
    }
    let text = "/v1/completions";
    refused(&server, text, &json!({}), 400, json!("prompt"), "missing");
    refused(&server, text, &json!({"prompt": 5}), 400, json!("prompt"), "token ids");
    refused(&server, text, &json!({"prompt": [101]}), 400, json!("prompt"), "vocabulary size 101");
    refused(&server, text, &json!({"prompt": [[1], []]}), 400, json!("prompt"), "empty");
    refused(&server, text, &json!({"prompt": vec![1; 64]}), 400, json!("prompt"), "context");
    refused(&server, text, &json!({"prompt": [1], "n": 1 << 20}), 400, json!("n"), "--max-queued-tokens");
    refused(&server, text, &json!({"prompt": [1], "n": 1 << 17, "max_tokens": 1}), 400, Value::Null, "samples");
    refused(
        &server,
        text,
        &json!({"prompt": [1], "stop_token_ids": [101]}),
        400,
        json!("stop_token_ids"),
        "vocabulary",
    );
    refused(&server, text, &json!({"prompt": "x", "suffix": "y"}), 400, json!("suffix"), "not supported");
    refused(&server, text, &json!({"prompt": "x", "best_of": 3, "stream": true}), 400, json!("best_of"), "stream");
    refused(
        &server,
        text,
        &json!({"prompt": "x", "structured_outputs": {"regex": "("}}),
        400,
        Value::Null,
        "regular expression",
    );
    refused(&server, text, &json!({"prompt": "x", "model": "gpt-4"}), 404, json!("model"), "policy");
    refused(&server, text, &json!({"prompt": "x", "model": "reward"}), 404, json!("model"), "--model");
    refused(&server, text, &json!([1]), 400, Value::Null, "JSON object");
    refused(&server, "/classify", &json!({"model": "policy", "input": "x"}), 404, json!("model"), "--reward");
    refused(
        &server,
        "/classify",
        &json!({"input": "x", "truncate_prompt_tokens": 5}),
        400,
        json!("truncate_prompt_tokens"),
        "not supported",
    );
    refused(
        &server,
        "/v1/embeddings",
        &json!({"input": "x", "encoding_format": "hex"}),
        400,
        json!("encoding_format"),
        "base64",
    );
    refused(&server, "/score", &json!({"text_1": ["a", "b"], "text_2": ["c"]}), 400, json!("text_1"), "as many");
    refused(&server, "/score", &json!({"text_1": "a", "text_2": []}), 400, Value::Null, "no sequences");
    refused(&server, "/score", &json!({"text_1": "a"}), 400, json!("text_2"), "missing");
    refused(&server, "/rerank", &json!({"query": "a", "documents": ["b"]}), 400, json!("model"), "3 labels");
    refused(&server, "/rerank", &json!({"query": "a", "documents": [5]}), 400, json!("documents"), "text");
    refused(&server, "/get_reward", &json!({"prompts": ["x"]}), 400, json!("query"), "missing");
    refused(&server, "/get_reward?model=x", &json!({"query": ["x"]}), 404, json!("model"), "reward");
    refused(&server, "/remote_rm", &json!({"prompt": "x"}), 400, json!("response"), "missing");
    refused(&server, "/v2/nothing", &json!({}), 404, Value::Null, "POST /v2/nothing");

    let (status, text) = server.send("POST", "/v1/completions", b"{\"prompt\": ", &[]);
    assert!(status == 400 && text.contains("not valid JSON"), "{status} {text}");
    let deep = "[".repeat(100_000);
    let (status, text) = server.send("POST", "/classify", format!("{{\"input\": {deep}").as_bytes(), &[]);
    assert!(status == 400 && text.contains("not valid JSON"), "{status} {text}");
    let (status, text) = server.get("/v1/completions");
    assert!(status == 405 && text.contains("does not take GET"), "{status} {text}");
    let (status, text) = server.get("/");
    assert!(status == 404 && text.contains("\"code\":\"not_found\""), "{status} {text}");
    // Nothing of that is left, and the server goes on.
    assert_eq!(server.metric("rewardrt_jobs{model=\"policy\"}"), 0.0);
    server.ask("/v1/completions", json!({"prompt": "x"}));
}

#[test]
fn start_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tied = golden("llama-tied").display().to_string();
    let labels = golden("llama-labels-1").display().to_string();
    let (empty, spaced) = (folder.path().join("empty"), folder.path().join("spaced"));
    std::fs::write(&empty, "\n").unwrap();
    std::fs::write(&spaced, "a b").unwrap();
    let path = |p: &std::path::Path| p.display().to_string();
    let judge_of_classifier = format!("r={labels}:judge:a,b");
    let bad_rule = format!("r={tied}:judge:a");
    let (as_a, as_b) = (format!("x={tied}"), format!("x={labels}"));
    let cases: [(&[&str], i32, &str); 13] = [
        (&[], 2, "--model"),
        (&["--model", "=x"], 2, "NAME=PATH"),
        (&["--model", "/nowhere"], 2, "/nowhere"),
        (&["--model", &labels], 2, "--reward"),
        (&["--reward", &tied], 2, "judge"),
        (&["--reward", &judge_of_classifier], 2, "does not fit"),
        (&["--reward", &bad_rule], 2, "llama-tied:judge:a"),
        (&["--model", &as_a, "--reward", &as_b], 2, "two models"),
        (&["--model", &tied, "--token-file", "/nowhere"], 2, "--token-file"),
        (&["--model", &tied, "--token-file", &path(&empty)], 2, "one token"),
        (&["--model", &tied, "--token-file", &path(&spaced)], 2, "one token"),
        (&["--model", &tied, "--max-queue", "0"], 2, "from 1"),
        (&["--model", &tied, "--timeout", "-1"], 2, "seconds"),
    ];
    for (args, code, says) in cases {
        let output = command().args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr} does not say {says:?}");
    }
    // A port that another one has.
    let server = Server::start(command().args(["--model", &tied]));
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    let again = ["serve", "--device", "cpu", "--model", &tied, "--port", &port];
    let output = Command::new(env!("CARGO_BIN_EXE_rewardrt")).args(again).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}
