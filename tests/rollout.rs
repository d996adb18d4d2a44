//! A rollout is its steps done one after the other: the same bits, and numpy's numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::checkpoints::{save, tensors, trained};
use common::updates::refused;
use common::{devices, golden, load, open, small, smollm2};
use rewardrt::{
    AdapterOptions, Advantage, EncodeOptions, ErrorKind, LogprobRequest, Message, Model, ModelOptions, Reference,
    Reward, Rollout, RolloutRequest, Rule, Runtime, SampleRequest, ScoreRequest,
};

const POLICY: &str = "llama-gqa-9-3";

/// Answers of different lengths, some of one token.
fn sample() -> SampleRequest {
    let prompts = (0..6).map(|i| (0..3 + i * 5).map(|k| (6 + (i * 31 + k * 17) % 90) as u32).collect()).collect();
    let stop_ids = (20..40).collect();
    SampleRequest { prompts, n: 5, max_tokens: 24, seed: 5, stop_ids, ignore_eos: true, ..SampleRequest::default() }
}

fn ids(rollout: &Rollout, index: usize) -> Vec<u32> {
    rollout.samples[index].tokens.iter().map(|t| t.id).collect()
}

fn wholes(rollout: &Rollout, request: &SampleRequest) -> Vec<Vec<u32>> {
    let whole = |i: usize| [request.prompts[i / request.n].clone(), ids(rollout, i)].concat();
    (0..rollout.samples.len()).map(whole).collect()
}

/// The policy a training step later.
fn moved(runtime: &Runtime) -> Model {
    let folder = tempfile::tempdir().unwrap();
    save(&trained(&tensors(&golden(POLICY)), 3), &golden(POLICY), folder.path());
    runtime.load_model(folder.path(), &small()).unwrap()
}

#[test]
fn it_is_its_steps_one_after_the_other() {
    for device in devices() {
        let runtime = open(&device, 2);
        let (policy, reference) = (moved(&runtime), load(&runtime, POLICY, &small()));
        let names = ["llama-labels-3", "mistral-labels-2"];
        let models = names.map(|name| load(&runtime, name, &small()));
        let [first, second] = models.clone();
        let rewards = vec![
            Reward { label: 2, weight: 0.5, ..Reward::new("first", first) },
            Reward { weight: -2.0, ..Reward::new("second", second) },
        ];
        let request = RolloutRequest {
            reference: Some(Reference::Model(reference.clone())),
            rewards,
            ..RolloutRequest::new(sample())
        };
        let rollout = policy.rollout(&request).unwrap().wait().unwrap();
        let plain = policy.sample(&request.sample).unwrap().wait().unwrap();
        assert_eq!(rollout.samples.len(), 30);
        for (a, b) in rollout.samples.iter().zip(&plain) {
            assert_eq!(
                (a.prompt, a.sample, &a.tokens, a.finish),
                (b.prompt, b.sample, &b.tokens, b.finish),
                "{device}"
            );
        }
        let lengths: Vec<usize> = rollout.samples.iter().map(|s| s.tokens.len()).collect();
        assert!(lengths.iter().min() < lengths.iter().max(), "{lengths:?}");
        let wholes = wholes(&rollout, &request.sample);
        let pairs = (0..30).map(|i| (request.sample.prompts[i / 5].clone(), ids(&rollout, i)));
        let known = reference.logprobs(&LogprobRequest::completions(pairs)).unwrap().wait().unwrap();
        assert_eq!(rollout.reference.as_ref().unwrap(), &known, "{device}");
        for (i, kl) in rollout.kl.iter().enumerate() {
            for (j, token) in rollout.samples[i].tokens.iter().enumerate() {
                let d = f64::from(token.model_logprob) - f64::from(known[i].logprobs[j].unwrap());
                assert_eq!(kl.k1[j], d as f32);
                assert!((f64::from(kl.k3[j]) - ((-d).exp() - 1.0 + d)).abs() < 1e-6 && kl.k3[j] >= 0.0);
            }
        }
        assert!(rollout.kl.iter().flat_map(|kl| &kl.k3).any(|k| *k > 1e-4), "the policy has not moved");
        for (model, (label, scores)) in models.iter().zip([2, 0].iter().zip(&rollout.rewards)) {
            let request = ScoreRequest { sequences: wholes.clone(), ..ScoreRequest::default() };
            let alone = model.score(&request).unwrap().wait().unwrap();
            let alone: Vec<f32> = alone.iter().map(|s| s.score.values[*label]).collect();
            assert_eq!(scores, &alone, "{device}");
        }
        for (i, total) in rollout.reward.iter().enumerate() {
            let sum = 0.5 * f64::from(rollout.rewards[0][i]) - 2.0 * f64::from(rollout.rewards[1][i]);
            assert_eq!(*total, sum as f32);
        }
        assert!(rollout.sampled_in <= rollout.elapsed);
    }
}

#[test]
fn the_same_weights_have_no_divergence() {
    for device in devices() {
        let runtime = open(&device, 2);
        let policy = load(&runtime, POLICY, &small());
        let twin = load(&runtime, POLICY, &small());
        for reference in [Reference::Model(twin), Reference::Model(policy.clone()), Reference::Base] {
            let request = RolloutRequest { reference: Some(reference), ..RolloutRequest::new(sample()) };
            let rollout = policy.rollout(&request).unwrap().wait().unwrap();
            let all = || rollout.kl.iter().flat_map(|kl| [&kl.k1, &kl.k2, &kl.k3]).flatten();
            assert!(all().count() > 90 && all().all(|k| *k == 0.0), "{device}");
        }
    }
}

/// Loaded twice on the CPU, a checkpoint is mapped twice and held once.
#[test]
fn policy_and_reference_share_their_pages() {
    let Some(folder) = smollm2() else { return };
    let runtime = open("cpu", 2);
    let options = ModelOptions { kv_tokens: Some(256), ..ModelOptions::default() };
    let [policy, reference] = [(); 2].map(|()| runtime.load_model(&folder, &options).unwrap());
    for model in [&policy, &reference] {
        let memory = model.memory();
        assert!(memory.mapped > 200 << 20 && memory.weights < 1 << 20, "{memory:?}");
    }
}

/// The policy with an adapter against the policy alone: one copy of the weights.
#[test]
fn the_base_of_an_adapter_is_a_reference() {
    for device in devices() {
        let runtime = open(&device, 2);
        let base = load(&runtime, "llama-tied", &small());
        let folder = common::adapters::folder("tied-all");
        let adapter = base.load_adapter(&folder, &AdapterOptions::default()).unwrap();
        let request = RolloutRequest {
            reference: Some(Reference::Base),
            ..RolloutRequest::new(SampleRequest { adapter: Some(adapter), ..sample() })
        };
        let rollout = base.rollout(&request).unwrap().wait().unwrap();
        let pairs = (0..30).map(|i| (request.sample.prompts[i / 5].clone(), ids(&rollout, i)));
        let known = base.logprobs(&LogprobRequest::completions(pairs)).unwrap().wait().unwrap();
        assert_eq!(rollout.reference.unwrap(), known, "{device}");
        assert!(rollout.kl.iter().flat_map(|kl| &kl.k2).any(|k| *k > 1e-6));
    }
}

#[test]
fn what_a_reward_model_cannot_take_has_no_reward() {
    let runtime = open("cpu", 2);
    let policy = load(&runtime, POLICY, &small());
    let short = load(&runtime, "llama-labels-1", &ModelOptions { max_context: Some(20), ..small() });
    let request = RolloutRequest { rewards: vec![Reward::new("short", short)], ..RolloutRequest::new(sample()) };
    let rollout = policy.rollout(&request).unwrap().wait().unwrap();
    let too_long: Vec<bool> = wholes(&rollout, &request.sample).iter().map(|w| w.len() > 20).collect();
    assert!(too_long.contains(&true) && too_long.contains(&false));
    for (i, long) in too_long.into_iter().enumerate() {
        assert_eq!(rollout.reward[i].is_nan(), long);
        assert_eq!(rollout.rewards[0][i].is_nan(), long);
        assert!(!long || rollout.advantages[i] == 0.0);
    }
}

/// A judge of the policy's own vocabulary reads ids; asked a question, it reads its own conversation.
#[test]
fn judges_read_ids_or_are_asked() {
    let Some(folder) = smollm2() else { return };
    let runtime = open("cpu", 2);
    let options = ModelOptions { kv_tokens: Some(4096), ..ModelOptions::default() };
    let policy = runtime.load_model(&folder, &options).unwrap();
    let user = |content: &str| vec![Message { role: "user".into(), content: content.into() }];
    let conversations = vec![user("Name a colour."), user("Say {answer} and {prompt}.")];
    let tokenizer = policy.tokenizer().unwrap();
    let prompts = conversations.iter().map(|c| tokenizer.encode_chat(c, true).unwrap()).collect();
    let rule = Rule::parse("judge:yes,no").unwrap();
    let by_ids = Reward { rule: Some(rule.clone()), ..Reward::new("by ids", policy.clone()) };
    let question = "Was {answer} a good answer to {prompt}?";
    let asked = Reward { name: "asked".into(), question: Some(question.into()), ..by_ids.clone() };
    let sample = SampleRequest { prompts, n: 2, max_tokens: 6, seed: 1, ..SampleRequest::default() };
    let request = RolloutRequest { rewards: vec![by_ids, asked], conversations, ..RolloutRequest::new(sample) };
    let rollout = policy.rollout(&request).unwrap().wait().unwrap();
    let score = |sequences: Vec<Vec<u32>>| -> Vec<f32> {
        let request = ScoreRequest { sequences, rule: Some(rule.clone()), ..ScoreRequest::default() };
        policy.score(&request).unwrap().wait().unwrap().iter().map(|s| s.score.score).collect()
    };
    assert_eq!(rollout.rewards[0], score(wholes(&rollout, &request.sample)));
    // What braces in a prompt say is text.
    let whole = |i: usize| {
        let prompt = &request.conversations[i / 2][0].content;
        let question = format!("Was {} a good answer to {prompt}?", rollout.samples[i].text.as_ref().unwrap());
        tokenizer.encode_chat(&user(&question), true).unwrap()
    };
    assert_eq!(rollout.rewards[1], score((0..4).map(whole).collect()));
}

/// A folder with SmolLM2's weights and a tokenizer in which two tokens have changed places.
fn other_vocabulary(smollm2: &Path) -> tempfile::TempDir {
    // Beside it, so that the weights need no copy.
    let folder = tempfile::tempdir_in(smollm2).unwrap();
    for entry in std::fs::read_dir(smollm2).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        if path.is_file() && name != "tokenizer.json" {
            std::fs::hard_link(&path, folder.path().join(name)).unwrap();
        }
    }
    let text = std::fs::read(smollm2.join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let [a, b] = ["Ġred", "Ġblue"].map(|token| vocab[token].clone());
    vocab["Ġred"] = b;
    vocab["Ġblue"] = a;
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    folder
}

/// Ids of another vocabulary mean other texts: the reward model reads the conversation through its own template, or the text.
#[test]
fn another_vocabulary_reads_the_text() {
    let Some(folder) = smollm2() else { return };
    let other = other_vocabulary(&folder);
    let runtime = open("cpu", 2);
    let options = ModelOptions { kv_tokens: Some(2048), ..ModelOptions::default() };
    let policy = runtime.load_model(&folder, &options).unwrap();
    let judge = runtime.load_model(other.path(), &options).unwrap();
    let tokenizer = policy.tokenizer().unwrap();
    let rule = Rule::parse("judge:yes,no").unwrap();
    let user = Message { role: "user".into(), content: "Is the sky red or blue?".into() };
    let text = "Roses are red, violets are";
    let prompts = vec![
        tokenizer.encode_chat(std::slice::from_ref(&user), true).unwrap(),
        tokenizer.encode(text, EncodeOptions { add_special: true, parse_special: false }).unwrap(),
    ];
    let request = RolloutRequest {
        rewards: vec![Reward { rule: Some(rule.clone()), ..Reward::new("judge", judge.clone()) }],
        conversations: vec![vec![user.clone()], Vec::new()],
        ..RolloutRequest::new(SampleRequest { prompts, max_tokens: 8, ..SampleRequest::default() })
    };
    let rollout = policy.rollout(&request).unwrap().wait().unwrap();
    let answer = |i: usize| rollout.samples[i].text.clone().unwrap();
    let own = judge.tokenizer().unwrap();
    let said = Message { role: "assistant".into(), content: answer(0) };
    let whole = EncodeOptions { add_special: true, parse_special: false };
    let sequences = vec![
        own.encode_chat(&[user, said], true).unwrap(),
        own.encode(&format!("{text}{}", answer(1)), whole).unwrap(),
    ];
    assert_ne!(sequences[1][..4], request.sample.prompts[1][..4], "the vocabularies differ in \" red\"");
    let scored = ScoreRequest { sequences, rule: Some(rule), ..ScoreRequest::default() };
    let alone = judge.score(&scored).unwrap().wait().unwrap();
    assert_eq!(rollout.rewards[0], alone.iter().map(|s| s.score.score).collect::<Vec<_>>());

    let as_reference = RolloutRequest { reference: Some(Reference::Model(judge)), ..request };
    refused(policy.rollout(&as_reference), ErrorKind::Argument, &["the reference has another vocabulary"]);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let runtime = open("cpu", 1);
    let policy = load(&runtime, POLICY, &small());
    let scorer = load(&runtime, "llama-labels-3", &small());
    let base = RolloutRequest { rewards: vec![Reward::new("r", scorer.clone())], ..RolloutRequest::new(sample()) };
    let no = |request: RolloutRequest, says: &[&str]| refused(policy.rollout(&request), ErrorKind::Argument, says);
    let with =
        |reward: Reward| RolloutRequest { rewards: vec![Reward::new("r", scorer.clone()), reward], ..base.clone() };
    let reward = || Reward::new("s", scorer.clone());
    no(with(Reward::new("r", scorer.clone())), &["\"r\" is empty or occurs twice"]);
    no(with(Reward::new("", scorer.clone())), &["\"\" is empty"]);
    no(with(Reward { weight: f32::NAN, ..reward() }), &["reward s: the weight NaN"]);
    no(with(Reward { label: 3, ..reward() }), &["reward s: label 3 of 3"]);
    no(with(Reward { rule: Some(Rule::parse("judge").unwrap()), ..reward() }), &["reward s", "does not fit"]);
    no(with(Reward { question: Some("?".into()), ..reward() }), &["reward s", "no chat template"]);
    no(with(Reward::new("s", policy.clone())), &["reward s", "the rule must be named"]);
    let reference = |name: &str| Some(Reference::Model(load(&runtime, name, &small())));
    no(RolloutRequest { reference: reference("llama-wide"), ..base.clone() }, &["700 ids", "101 ids"]);
    no(
        RolloutRequest { reference: reference("llama-labels-3"), ..base.clone() },
        &["reference", "no language-model head"],
    );
    no(RolloutRequest { clip_reward: Some((1.0, 0.0)), ..base.clone() }, &["clip_reward is (1, 0)"]);
    no(RolloutRequest { clip_reward: Some((f32::NAN, 0.0)), ..base.clone() }, &["clip_reward is (NaN, 0)"]);
    no(RolloutRequest { conversations: vec![Vec::new()], ..base.clone() }, &["1 conversations for 6 prompts"]);
    let sampling = |sample: SampleRequest| RolloutRequest { sample, ..base.clone() };
    no(sampling(SampleRequest { best_of: Some(8), ..sample() }), &["best_of is 8"]);
    no(sampling(SampleRequest { temperature: -1.0, ..sample() }), &["temperature is -1"]);
    let alone = RolloutRequest { advantage: Advantage::LeaveOneOut, ..sampling(SampleRequest { n: 1, ..sample() }) };
    no(alone, &["n is 1", "at least 2"]);
    // Nothing is left behind.
    assert_eq!(policy.stats().jobs + scorer.stats().jobs, 0);
    assert!(policy.rollout(&base).unwrap().wait().is_ok());
}

#[test]
fn a_rollout_can_be_cancelled_or_dropped() {
    for device in devices() {
        let runtime = open(&device, 2);
        let policy = load(&runtime, POLICY, &small());
        let scorer = load(&runtime, "llama-labels-3", &small());
        let long = SampleRequest { max_tokens: 400, stop_ids: Vec::new(), ..sample() };
        let request = RolloutRequest {
            reference: Some(Reference::Base),
            rewards: vec![Reward::new("r", scorer.clone())],
            ..RolloutRequest::new(long)
        };
        let job = policy.rollout(&request).unwrap();
        job.cancel();
        refused(job.wait(), ErrorKind::Cancelled, &["cancelled"]);
        drop(policy.rollout(&request).unwrap());
        // The engine gives the blocks back after it has told the job.
        let begin = Instant::now();
        let idle = |model: &Model| model.stats().jobs == 0 && model.stats().kv_used == 0;
        while !(idle(&policy) && idle(&scorer)) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{device}: {:?}", policy.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The failure that cancelled the others is the one that is told.
#[test]
fn a_model_that_fails_fails_the_rollout() {
    let runtime = open("cpu", 2);
    let policy = load(&runtime, POLICY, &small());
    let reference = load(&runtime, POLICY, &ModelOptions { max_context: Some(12), ..small() });
    let request = RolloutRequest { reference: Some(Reference::Model(reference)), ..RolloutRequest::new(sample()) };
    refused(policy.rollout(&request).unwrap().wait(), ErrorKind::Limit, &["reference", "12"]);
}

/// The command, checked by numpy.
#[test]
fn numpy_finds_the_same() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/venv/bin/python");
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} must be there in CI", python.display());
        eprintln!("SKIPPED: no numpy at {}; `make model` brings it", python.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let moved = file("moved");
    save(&trained(&tensors(&golden(POLICY)), 1), &golden(POLICY), &moved);
    let prompts: String =
        sample().prompts.iter().map(|p| format!("{}\n", serde_json::json!({ "prompt_ids": p }))).collect();
    std::fs::write(file("prompts.jsonl"), prompts).unwrap();
    for (advantage, policy) in ["grpo", "dr-grpo", "rloo", "batch", "none", "grpo"]
        .iter()
        .zip([&moved; 5].into_iter().chain([&golden(POLICY)]))
    {
        let out = file("out.jsonl");
        let mut command = Command::new(env!("CARGO_BIN_EXE_rewardrt"));
        command.args(["rollout", "--device", "cpu", "-n", "4", "--max-tokens", "12", "--ignore-eos", "--top-k", "9"]);
        command.args(["--stop-id", "30", "--stop-id", "40", "--kv-tokens", "2048", "--max-context", "256"]);
        command.args(["--reward-weights", "1.5,-0.25", "--advantage", advantage]).arg("--policy").arg(policy);
        command.arg("--reference").arg(golden(POLICY)).arg("--prompts").arg(file("prompts.jsonl"));
        for reward in ["llama-labels-1", "llama-labels-3"] {
            command.arg("--reward").arg(golden(reward));
        }
        let done = command.arg("--out").arg(&out).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let check = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rollout/check.py");
        let mut numpy = Command::new(&python);
        numpy.arg(check).arg(&out).args([advantage, "1.5,-0.25"]).args((policy != &moved).then_some("identical"));
        let done = numpy.output().unwrap();
        assert!(done.status.success(), "{advantage}: {}", String::from_utf8_lossy(&done.stderr));
    }
}
