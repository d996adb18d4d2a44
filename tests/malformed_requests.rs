//! Every way a tokenizer file, a chat template, a request or an option can be wrong: a clear error, no panic.
//!
//! T1–T4 are rows of the fault table in SECURITY.md.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use ErrorKind::Limit;
use common::{golden, load, open, small};
use rewardrt::weights::WeightFormat;
use rewardrt::{
    ChatTemplate, Error, ErrorKind, LogprobRequest, Message, ModelOptions, Rule, SampleRequest, ScoreRequest, Tokenizer,
};
use serde_json::{Value, json};

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
        (SampleRequest { typical_p: f32::NAN, ..good.clone() }, ErrorKind::Argument, "typical_p is NaN"),
        (SampleRequest { presence_penalty: f32::NAN, ..good.clone() }, ErrorKind::Argument, "presence_penalty is NaN"),
        (SampleRequest { logit_bias: vec![(3, f32::NAN)], ..good.clone() }, ErrorKind::Argument, "token 3 is NaN"),
        (SampleRequest { logit_bias: vec![(3, 1.0), (3, 2.0)], ..good.clone() }, ErrorKind::Argument, "token 3 twice"),
        (
            SampleRequest { logit_bias: vec![(u32::MAX, 1.0)], ..good.clone() },
            ErrorKind::Argument,
            "logit_bias: token id",
        ),
        (SampleRequest { allowed_ids: Some(Vec::new()), ..good.clone() }, ErrorKind::Argument, "leave no token"),
        (
            SampleRequest { allowed_ids: Some(vec![9]), stop_ids: vec![9], min_tokens: 1, ..good.clone() },
            ErrorKind::Argument,
            "min_tokens",
        ),
        (SampleRequest { best_of: Some(usize::MAX), ..good.clone() }, ErrorKind::Limit, "samples"),
        (
            SampleRequest { logit_bias: (0..1025).map(|t| (t, 1.0)).collect(), ..good.clone() },
            ErrorKind::Argument,
            "logit_bias names 1025 tokens",
        ),
        (SampleRequest { best_of: Some(0), ..good.clone() }, ErrorKind::Argument, "best_of is 0"),
        (
            SampleRequest { guide: Some(rewardrt::Guide::Regex("a".into())), ..good.clone() },
            ErrorKind::Argument,
            "tokenizer.json",
        ),
        (SampleRequest { stop: vec!["x".into()], ..good.clone() }, ErrorKind::Argument, "tokenizer"),
    ];
    for (request, kind, says) in cases {
        let e = model.sample(&request).map(|_| ()).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(says), "{e} should say {says:?}");
    }
    let logprobs = LogprobRequest { sequences: vec![vec![5, 6]], prompt_lens: vec![3], ..LogprobRequest::default() };
    assert!(model.logprobs(&logprobs).map(|_| ()).unwrap_err().to_string().contains("prompt_len of 3"));
    for (rule, says) in [
        (None, "rule must be named"),
        (Some(Rule::Sequence), "does not fit"),
        (Some(Rule::parse("judge").unwrap()), "tokenizer.json"),
    ] {
        let e = model
            .score(&ScoreRequest { sequences: vec![vec![5]], rule, ..ScoreRequest::default() })
            .map(|_| ())
            .unwrap_err();
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

/// What quantised weights take is part of the budget, to the byte.
#[test]
fn quantised_weights_are_counted() {
    let runtime = open("cpu", 2);
    let load = |weights, memory| {
        runtime.load_model(&golden("llama-tied"), &ModelOptions { weights, memory, ..small() }).map(|m| m.memory())
    };
    let stored = load(WeightFormat::Stored, None).unwrap();
    let mut sizes = Vec::new();
    for weights in [WeightFormat::Int8, WeightFormat::Int4] {
        let memory = load(weights, None).unwrap();
        assert_eq!(load(weights, Some(memory.allocated())).unwrap(), memory);
        let e = load(weights, Some(memory.allocated() - 1)).unwrap_err();
        assert!(e.kind() == Limit && e.to_string().contains(&memory.weights.to_string()), "{e}");
        assert_eq!(memory.mapped, stored.mapped);
        sizes.push(memory.weights - stored.weights);
    }
    assert!(sizes[0] > sizes[1] && sizes[1] > 0, "{sizes:?}");
}

#[test]
fn options_out_of_range() {
    let runtime = open("cpu", 1);
    let load = |options: ModelOptions| runtime.load_model(&golden("llama-tied"), &options).map(|_| ()).unwrap_err();
    assert_eq!(load(ModelOptions { max_batch_tokens: Some(0), ..small() }).kind(), ErrorKind::Argument);
    assert_eq!(load(ModelOptions { memory: Some(10_000), ..small() }).kind(), Limit);
    assert_eq!(load(ModelOptions { kv_tokens: Some(3), ..small() }).kind(), Limit);
    assert_eq!(load(ModelOptions { steps_at_once: Some(0), ..small() }).kind(), ErrorKind::Argument);
    assert_eq!(load(ModelOptions { steps_at_once: Some(65), ..small() }).kind(), ErrorKind::Argument);
    assert_eq!(load(ModelOptions { kv_tokens: Some(usize::MAX), ..small() }).kind(), Limit);
    assert_eq!(load(ModelOptions { max_context: Some(1), ..small() }).kind(), ErrorKind::Argument);
    let open = |device: &str| {
        let options = rewardrt::RuntimeOptions { device: device.into(), ..rewardrt::RuntimeOptions::default() };
        rewardrt::Runtime::open(&options).map(|_| ()).unwrap_err()
    };
    assert_eq!(open("cuda").kind(), ErrorKind::Argument);
    let e = open("gpu:no such adapter");
    assert!(e.kind() == ErrorKind::NoDevice && e.to_string().contains("no such adapter"), "{e}");
}
