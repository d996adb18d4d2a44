//! Completions: ids, log-probs and text equal those of the Rust API, whole and streamed.

use std::path::Path;

use rewardrt::{EncodeOptions, Guide, Message, Model, ModelOptions, SampleRequest, SampledSequence};
use serde_json::{Value, json};

use crate::common::{open, small};
use crate::server::{Server, command, with_tokenizer};

const NAME: &str = "llama-tied";

/// The server, and the same model beside it.
fn both(folder: &Path) -> (Server, Model) {
    let path = with_tokenizer(NAME, folder);
    let model = open("cpu", 2).load_model(&path, &small()).unwrap();
    let named = format!("policy={}", path.display());
    let server = Server::start(command().args(["--model", &named, "--max-context", "512", "--kv-tokens", "4096"]));
    (server, model)
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// Equal bits: what is printed tells f32 apart.
fn equals_text_choice(choice: &Value, answer: &SampledSequence) {
    let token_ids: Vec<u32> = answer.tokens.iter().map(|t| t.id).collect();
    assert_eq!(ids(&choice["token_ids"]), token_ids);
    assert_eq!(choice["text"].as_str(), answer.text.as_deref());
    assert_eq!(choice["finish_reason"], answer.finish.name());
    let logprobs = &choice["logprobs"];
    let of = |f: fn(&rewardrt::SampledToken) -> f32| answer.tokens.iter().map(f).collect::<Vec<f32>>();
    assert_eq!(floats(&logprobs["token_logprobs"]), of(|t| t.model_logprob));
    assert_eq!(floats(&logprobs["sampling_logprobs"]), of(|t| t.logprob));
    let tops = logprobs["top_logprobs"].as_array().unwrap();
    assert_eq!(tops.len(), answer.tokens.len());
    for (top, token) in tops.iter().zip(&answer.tokens) {
        let mut got: Vec<f32> = top.as_object().unwrap().values().map(|v| v.as_f64().unwrap() as f32).collect();
        got.sort_by(|a, b| b.total_cmp(a));
        // The sampled one is always among them.
        let sampled = [(token.id, token.model_logprob)];
        let sampled = sampled.iter().filter(|(id, _)| token.top.iter().all(|(other, _)| other != id));
        let mut expected: Vec<f32> = token.top.iter().chain(sampled).map(|(_, l)| *l).collect();
        expected.sort_by(|a, b| b.total_cmp(a));
        assert_eq!(got, expected);
    }
}

#[test]
fn text_completions_equal_the_rust_api() {
    let folder = tempfile::tempdir().unwrap();
    let (server, model) = both(folder.path());
    let body = json!({
        "model": "policy", "prompt": [[1, 40, 41], [1, 50]], "n": 3, "seed": 7, "max_tokens": 9, "temperature": 0.8, "top_p": 0.9,
        "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1,
        "logit_bias": {"50": 1.5, "51": -100}, "logprobs": 2, "return_token_ids": true, "stop_token_ids": [60], "ignore_eos": true,
        "user": "somebody", "metadata": {"run": "1"},
    });
    let answer = server.ask("/v1/completions", body);
    let request = SampleRequest {
        prompts: vec![vec![1, 40, 41], vec![1, 50]],
        n: 3,
        seed: 7,
        max_tokens: 9,
        temperature: 0.8,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.01,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: vec![(50, 1.5), (51, -100.0)],
        top_logprobs: 2,
        stop_ids: vec![60],
        ignore_eos: true,
        ..SampleRequest::default()
    };
    let expected = model.sample(&request).unwrap().wait().unwrap();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (i, (choice, expected)) in choices.iter().zip(&expected).enumerate() {
        assert_eq!(choice["index"], i);
        assert_eq!(ids(&choice["prompt_token_ids"]), request.prompts[i / 3]);
        equals_text_choice(choice, expected);
    }
    let tokens: usize = expected.iter().map(|a| a.tokens.len()).sum();
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(5), &json!(tokens)));
    assert_eq!(
        (&answer["seed"], &answer["weight_version"], &answer["model"]),
        (&json!(7), &json!(0), &json!("policy"))
    );
    assert_eq!(answer["object"], "text_completion");

    // Text: BOS is the tokenizer's, once, also where the text has it already.
    for text in ["Hello there", "<s>Hello there"] {
        let body = json!({"prompt": text, "seed": -1, "max_tokens": 5, "return_token_ids": true, "logprobs": 0});
        let answer = server.ask("/v1/completions", body);
        let options = EncodeOptions { add_special: true, parse_special: false };
        let prompt = model.tokenizer().unwrap().encode("Hello there", options).unwrap();
        assert_eq!(prompt[0], 1);
        let request =
            SampleRequest { prompts: vec![prompt.clone()], seed: u64::MAX, max_tokens: 5, ..SampleRequest::default() };
        let expected = model.sample(&request).unwrap().wait().unwrap();
        let choice = &answer["choices"][0];
        assert_eq!(ids(&choice["prompt_token_ids"]), prompt);
        assert_eq!(ids(&choice["token_ids"]), expected[0].tokens.iter().map(|t| t.id).collect::<Vec<_>>());
        assert_eq!(choice["logprobs"]["top_logprobs"], Value::Null);
        let offsets: Vec<usize> = serde_json::from_value(choice["logprobs"]["text_offset"].clone()).unwrap();
        let tokens: Vec<String> = serde_json::from_value(choice["logprobs"]["tokens"].clone()).unwrap();
        let mut at = 0;
        assert_eq!((offsets.len(), tokens.len()), (expected[0].tokens.len(), expected[0].tokens.len()));
        for (offset, token) in offsets.iter().zip(&tokens) {
            assert_eq!(*offset, at);
            at += token.chars().count();
        }
    }
    for (text, add_special, expected) in
        [("<s><s>!", true, [1, 1, 6]), ("<|user|><|user|>!", false, [3, 3, 6]), ("<s>!!", false, [1, 6, 6])]
    {
        let body =
            json!({"prompt": text, "add_special_tokens": add_special, "max_tokens": 1, "return_token_ids": true});
        assert_eq!(ids(&server.ask("/v1/completions", body)["choices"][0]["prompt_token_ids"]), expected, "{text}");
    }
    // OpenAI's default, and the best of several.
    let answer = server.ask(
        "/v1/completions",
        json!({"prompt": [1, 9], "ignore_eos": true, "seed": 1, "return_token_ids": true, "best_of": 4, "n": 2}),
    );
    let request = SampleRequest {
        prompts: vec![vec![1, 9]],
        n: 2,
        best_of: Some(4),
        max_tokens: 16,
        ignore_eos: true,
        seed: 1,
        ..SampleRequest::default()
    };
    let expected = model.sample(&request).unwrap().wait().unwrap();
    assert_eq!((answer["choices"].as_array().unwrap().len(), expected.len()), (2, 2));
    for (i, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], i);
        assert_eq!(ids(&choice["token_ids"]), expected[i].tokens.iter().map(|t| t.id).collect::<Vec<_>>());
    }
}

fn hello() -> Vec<Message> {
    let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    vec![message("user", "Say <|end|> and more"), message("assistant", "Well"), message("user", "On")]
}

fn chat_request(model: &Model) -> SampleRequest {
    let prompt = model.tokenizer().unwrap().encode_chat(&hello(), true).unwrap();
    SampleRequest { prompts: vec![prompt], n: 2, seed: 3, max_tokens: 30, top_logprobs: 3, ..SampleRequest::default() }
}

fn chat_body() -> Value {
    json!({
        "model": "policy", "seed": 3, "n": 2, "max_completion_tokens": 30, "logprobs": true, "top_logprobs": 3, "return_token_ids": true,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Say <|end|>"}, {"type": "text", "text": " and more"}]},
            {"role": "assistant", "content": "Well", "refusal": null, "tool_calls": null, "annotations": []},
            {"role": "user", "content": "On"},
        ],
    })
}

#[test]
fn chat_completions_equal_the_rust_api() {
    let folder = tempfile::tempdir().unwrap();
    let (server, model) = both(folder.path());
    let request = chat_request(&model);
    let answer = server.ask("/v1/chat/completions", chat_body());
    assert_eq!(ids(&answer["prompt_token_ids"]), request.prompts[0]);
    let expected = model.sample(&request).unwrap().wait().unwrap();
    assert_eq!((answer["choices"].as_array().unwrap().len(), expected.len()), (2, 2));
    for (choice, expected) in answer["choices"].as_array().unwrap().iter().zip(&expected) {
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["message"]["content"].as_str(), expected.text.as_deref());
        assert_eq!(ids(&choice["token_ids"]), expected.tokens.iter().map(|t| t.id).collect::<Vec<_>>());
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), expected.tokens.len());
        for (entry, token) in content.iter().zip(&expected.tokens) {
            assert_eq!(entry["logprob"].as_f64().unwrap() as f32, token.model_logprob);
            assert_eq!(entry["sampling_logprob"].as_f64().unwrap() as f32, token.logprob);
            let spelled = model.tokenizer().unwrap().decode(&[token.id], false).unwrap();
            assert_eq!(entry["token"], spelled.as_str());
            assert_eq!(entry["bytes"], json!(spelled.as_bytes()));
            let top: Vec<f32> = entry["top_logprobs"]
                .as_array()
                .unwrap()
                .iter()
                .map(|t| t["logprob"].as_f64().unwrap() as f32)
                .collect();
            assert_eq!(top, token.top.iter().map(|(_, l)| *l).collect::<Vec<_>>());
        }
    }
    // Without limit: to the end of the context.
    let body = json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true, "return_token_ids": true});
    let answer = server.ask("/v1/chat/completions", body);
    let (prompt, completion) = (ids(&answer["prompt_token_ids"]).len(), ids(&answer["choices"][0]["token_ids"]).len());
    assert_eq!((prompt + completion, &answer["choices"][0]["finish_reason"]), (512, &json!("length")));
    // A seed is drawn where none is given, and replays the answer; every language can read it.
    assert!(answer["seed"].as_u64().unwrap() < 1 << 53);
    let again = json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true, "return_token_ids": true, "seed": answer["seed"]});
    assert_eq!(server.ask("/v1/chat/completions", again)["choices"], answer["choices"]);
}

#[test]
fn streams_add_up_to_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (server, model) = both(folder.path());
    let expected = model.sample(&chat_request(&model)).unwrap().wait().unwrap();
    let mut body = chat_body();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let mut events = server.events("/v1/chat/completions", &body);
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let chunks: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let (last, chunks) = chunks.split_last().unwrap();
    assert_eq!((&last["choices"], &last["weight_version"]), (&json!([]), &json!(0)));
    let tokens: usize = expected.iter().map(|a| a.tokens.len()).sum();
    assert_eq!(last["usage"]["completion_tokens"], tokens);
    assert_eq!(ids(&chunks[0]["prompt_token_ids"]), chat_request(&model).prompts[0]);
    for (i, expected) in expected.iter().enumerate() {
        let mine: Vec<&Value> = chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == i).collect();
        assert_eq!(mine[0]["delta"], json!({"role": "assistant", "content": ""}));
        let text: String = mine.iter().map(|c| c["delta"]["content"].as_str().unwrap()).collect();
        assert_eq!(Some(text), expected.text);
        let token_ids: Vec<u32> =
            mine.iter().filter(|c| c.get("token_ids").is_some()).flat_map(|c| ids(&c["token_ids"])).collect();
        assert_eq!(token_ids, expected.tokens.iter().map(|t| t.id).collect::<Vec<_>>());
        let logprobs: Vec<f32> = mine
            .iter()
            .filter_map(|c| c["logprobs"]["content"].as_array())
            .flatten()
            .map(|e| e["logprob"].as_f64().unwrap() as f32)
            .collect();
        assert_eq!(logprobs, expected.tokens.iter().map(|t| t.model_logprob).collect::<Vec<_>>());
        assert_eq!(mine.iter().filter(|c| c["finish_reason"] == expected.finish.name()).count(), 1);
    }
    assert!(chunks.iter().all(|c| c["usage"].is_null() && c["object"] == "chat.completion.chunk"));

    let body = json!({"prompt": [1, 9], "seed": 1, "max_tokens": 6, "ignore_eos": true, "logprobs": 1, "return_token_ids": true});
    let whole = server.ask("/v1/completions", body.clone());
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let mut events = server.events("/v1/completions", &streamed);
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let chunks: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let text: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
    let offsets: Vec<Value> =
        chunks.iter().flat_map(|c| c["choices"][0]["logprobs"]["text_offset"].as_array().unwrap().clone()).collect();
    assert_eq!(json!(offsets), whole["choices"][0]["logprobs"]["text_offset"]);
    assert!(chunks.iter().all(|c| c.get("usage").is_none()));
}

#[test]
fn stops_and_guides() {
    let folder = tempfile::tempdir().unwrap();
    let (server, model) = both(folder.path());
    let chat = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Go"}], "seed": 5, "max_tokens": 400, "ignore_eos": true,
            "allowed_token_ids": (6..101).collect::<Vec<u32>>()});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ask("/v1/chat/completions", body)["choices"][0].clone()
    };
    let free = chat(json!({}));
    let text = free["message"]["content"].as_str().unwrap();
    let stop: String = text.chars().skip(20).take(2).collect();
    for stop in [json!(stop), json!(["never in it", stop])] {
        let stopped = chat(json!({"stop": stop}));
        let stop = stop.as_str().or(stop[1].as_str()).unwrap();
        assert_eq!(stopped["message"]["content"], text.split(stop).next().unwrap());
        assert_eq!(stopped["finish_reason"], "stop");
    }
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "pair", "strict": true, "schema": schema}});
    for extra in [json!({"response_format": format}), json!({"structured_outputs": {"json": schema}})] {
        let choice = chat(extra);
        let value: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(value["a"].as_i64().unwrap() <= 99 && ["x", "y"].contains(&value["b"].as_str().unwrap()), "{value}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let object = chat(json!({"response_format": {"type": "json_object"}, "max_tokens": 5}));
    assert!(object["message"]["content"].as_str().unwrap().starts_with('{'));
    let choice = chat(json!({"structured_outputs": {"choice": ["yes", "no \"q\""]}}));
    assert!(["yes", "no \"q\""].contains(&choice["message"]["content"].as_str().unwrap()));
    let regex = chat(json!({"structured_outputs": {"regex": "[0-9]{4}"}, "response_format": {"type": "text"}}));
    let request = SampleRequest {
        prompts: vec![model.tokenizer().unwrap().encode_chat(&hello()[2..], true).unwrap()],
        guide: Some(Guide::Regex("[0-9]{4}".into())),
        seed: 5,
        max_tokens: 400,
        ..SampleRequest::default()
    };
    let body = json!({"messages": [{"role": "user", "content": "On"}], "seed": 5, "structured_outputs": {"regex": "[0-9]{4}"}});
    let answer = server.ask("/v1/chat/completions", body);
    let expected = model.sample(&request).unwrap().wait().unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"].as_str(), expected[0].text.as_deref());
    assert!(regex["message"]["content"].as_str().unwrap().parse::<u32>().is_ok());
    assert!(chat(json!({"allowed_token_ids": [40], "max_tokens": 3}))["message"]["content"] == "CCC");
    // A guide and a mask that leave nothing to draw.
    let blocked = chat(json!({"allowed_token_ids": [40], "structured_outputs": {"regex": "[0-9]{4}"}}));
    assert_eq!((&blocked["finish_reason"], &blocked["stop_reason"]), (&json!("stop"), &json!("blocked")));
    assert!(regex.get("stop_reason").is_none());
}

/// Alone or in a crowd: the same bits. And the crowd shares steps.
#[test]
fn a_seed_answers_alike_whatever_the_load() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _) = both(folder.path());
    let body = |i: u64| json!({"prompt": [1, 10 + i % 80], "seed": i % 7, "max_tokens": 40, "ignore_eos": true, "logprobs": 1, "return_token_ids": true});
    let alone: Vec<Value> = (0..8).map(|i| server.ask("/v1/completions", body(i))["choices"].clone()).collect();
    let steps = server.metric("rewardrt_steps_total{model=\"policy\"}");
    std::thread::scope(|scope| {
        for client in 0..64u64 {
            let (server, alone) = (&server, &alone);
            scope.spawn(move || {
                for i in 0..8 {
                    let i = (client + i) % 8;
                    assert_eq!(server.ask("/v1/completions", body(i))["choices"], alone[i as usize]);
                }
            });
        }
    });
    let steps = server.metric("rewardrt_steps_total{model=\"policy\"}") - steps;
    assert!(steps < 512.0 * 40.0 / 4.0, "{steps} steps for {} tokens: the requests were not batched", 512 * 40);
}

/// One folder under two names is loaded once: the second costs no KV cache.
#[test]
fn models_are_listed_and_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let (tied, other) = (with_tokenizer(NAME, folder.path()), with_tokenizer("qwen2-tied-window", folder.path()));
    let mut command = command();
    for model in [format!("a={}", tied.display()), other.display().to_string()] {
        command.args(["--model", &model]);
    }
    let judge = format!("j={}:judge:a,b", tied.display());
    let server = Server::start(command.args(["--reward", &judge, "--kv-tokens", "1024", "--max-context", "256"]));
    let listed: Value = serde_json::from_str(&server.get("/v1/models").1).unwrap();
    let names: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "qwen2-tied-window", "j"]);
    assert_eq!((&listed["data"][0]["max_model_len"], &listed["data"][2]["rule"]), (&json!(256), &json!("judge:a,b")));
    let options = ModelOptions { kv_tokens: Some(1024), max_context: Some(256), ..ModelOptions::default() };
    for (name, folder) in
        [(json!("a"), &tied), (json!("qwen2-tied-window"), &other), (Value::Null, &tied), (json!(other), &other)]
    {
        let body = json!({"model": name, "prompt": [1, 40], "seed": 2, "return_token_ids": true});
        let answer = server.ask("/v1/completions", body);
        let model = open("cpu", 2).load_model(folder, &options).unwrap();
        let request = SampleRequest { prompts: vec![vec![1, 40]], seed: 2, max_tokens: 16, ..SampleRequest::default() };
        let expected = model.sample(&request).unwrap().wait().unwrap();
        assert_eq!(
            ids(&answer["choices"][0]["token_ids"]),
            expected[0].tokens.iter().map(|t| t.id).collect::<Vec<_>>()
        );
    }
}
