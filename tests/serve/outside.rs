//! Clients of others: `openai` from PyPI, and the lines of docs/serving.md.

use std::path::{Path, PathBuf};
use std::process::Command;

use rewardrt::{Message, ModelOptions, SampleRequest};
use serde_json::{Value, json};

use crate::common::{open, smollm2};
use crate::server::{Server, command, with_tokenizer};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A Python with `openai`, where `make test` puts it; `None` with a loud line if it is not there.
fn python() -> Option<PathBuf> {
    let python = root().join(".cache/venv-openai/bin/python");
    if python.exists() {
        return Some(python);
    }
    assert!(std::env::var_os("CI").is_none(), "{} must be there in CI", python.display());
    eprintln!("SKIPPED: no {}; `make .cache/venv-openai/ready` makes it", python.display());
    None
}

#[test]
fn the_openai_client() {
    let (Some(folder), Some(python)) = (smollm2(), python()) else { return };
    let scratch = tempfile::tempdir().unwrap();
    let runtime = open("cpu", 2);
    let model =
        runtime.load_model(&folder, &ModelOptions { kv_tokens: Some(4096), ..ModelOptions::default() }).unwrap();
    let messages = [Message { role: "user".into(), content: "Name three colours.".into() }];
    let prompts = vec![model.tokenizer().unwrap().encode_chat(&messages, true).unwrap()];
    let sample = |request: SampleRequest| model.sample(&request).unwrap().wait().unwrap();
    let greedy =
        SampleRequest { prompts: prompts.clone(), temperature: 0.0, max_tokens: 24, ..SampleRequest::default() };
    let greedy = sample(greedy).remove(0);
    let sampled = SampleRequest {
        prompts,
        n: 3,
        temperature: 0.9,
        top_p: 0.9,
        seed: 11,
        max_tokens: 12,
        ..SampleRequest::default()
    };
    let texts: Vec<Option<String>> = sample(sampled).into_iter().map(|a| a.text).collect();
    let ids: Vec<u32> = greedy.tokens.iter().map(|t| t.id).collect();
    let expected = scratch.path().join("expected.json");
    std::fs::write(&expected, json!({"greedy": {"text": greedy.text, "ids": ids}, "sampled": texts}).to_string())
        .unwrap();
    drop((model, runtime));

    let token = scratch.path().join("token");
    std::fs::write(&token, "test-token").unwrap();
    let named = format!("smollm2={}", folder.display());
    let server = Server::start(command().args([
        "--model",
        &named,
        "--kv-tokens",
        "4096",
        "--token-file",
        token.to_str().unwrap(),
    ]));
    let output = Command::new(python)
        .arg(root().join("tests/hosts/openai_client.py"))
        .arg(&server.url)
        .arg(&expected)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).lines().count() >= 20, "{}", text(&output.stdout));
}

/// The blocks of shell in docs/serving.md, each with the JSON that is said to come back: a field that is there must be
/// there, and of that type.
#[test]
fn the_lines_of_the_manual() {
    let manual = std::fs::read_to_string(root().join("docs/serving.md")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (policy, reward) =
        (with_tokenizer("llama-tied", folder.path()), with_tokenizer("llama-labels-1", folder.path()));
    let args = [
        format!("policy={}", policy.display()),
        format!("rm={}", reward.display()),
        format!("judge={}:judge:y,n", policy.display()),
    ];
    let server = Server::start(command().args([
        "--model",
        &args[0],
        "--reward",
        &args[1],
        "--reward",
        &args[2],
        "--max-context",
        "512",
        "--kv-tokens",
        "4096",
    ]));
    let mut ran = 0;
    for block in manual.split("```sh\n").skip(1) {
        let script = block.split("```").next().unwrap();
        if !script.starts_with("curl") {
            continue;
        }
        let script = script.replace("http://127.0.0.1:8000", &server.url);
        let output = Command::new("sh").arg("-c").arg(&script).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{script}\n{text}");
        ran += 1;
        let Some(shown) = block.split("```json\n").nth(1) else { continue };
        // Shown right below the line that asks, if at all.
        if block.find("```json\n").unwrap() > block.find("```").unwrap() + 8 {
            continue;
        }
        let shown: Value = serde_json::from_str(shown.split("```").next().unwrap()).unwrap();
        let got: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{script}: {e}: {text}"));
        alike(&script, &shown, &got);
    }
    assert!(ran >= 12, "{ran} lines");
}

/// Every field of `shown` is in `got`, with a value of the same kind, and the other way round.
fn alike(script: &str, shown: &Value, got: &Value) {
    match (shown, got) {
        (Value::Object(shown), Value::Object(got)) => {
            let names = |map: &serde_json::Map<String, Value>| {
                let mut names: Vec<String> = map.keys().cloned().collect();
                names.sort();
                names
            };
            assert_eq!(names(shown), names(got), "{script}");
            shown.iter().for_each(|(name, value)| alike(script, value, &got[name]));
        }
        (Value::Array(shown), Value::Array(got)) => {
            assert_eq!(shown.is_empty(), got.is_empty(), "{script}");
            // Lists of numbers and letters are shown shorter than they are, those of objects are not.
            let objects = shown.iter().any(Value::is_object);
            assert!(!objects || shown.len() == got.len(), "{script}: {} shown, {} there", shown.len(), got.len());
            shown.iter().zip(got).for_each(|(shown, got)| alike(script, shown, got));
        }
        _ => assert_eq!(
            std::mem::discriminant(shown),
            std::mem::discriminant(got),
            "{script}: {shown} is not like {got}"
        ),
    }
}
