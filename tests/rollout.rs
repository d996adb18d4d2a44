//! A rollout is its steps done one after the other: the same bits, and numpy's numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::checkpoints::{save, tensors, trained};
use common::updates::{put_all, refused};
use common::{devices, golden, load, open, small, smollm2};
use rewardrt::{
    AdapterOptions, Advantage, EncodeOptions, ErrorKind, Finish, InFlight, LogprobRequest, MAX_ROLLOUTS, Message,
    Model, ModelOptions, Reference, Reward, Rollout, RolloutRequest, Rule, Runtime, SampleRequest, Scheduling,
    ScoreRequest, UpdateOptions,
};
use serde_json::json;

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
        assert_eq!(rollout.reward_versions, vec![vec![0; 30]; 2]);
        let clipped = RolloutRequest { clip_reward: Some((-0.1, 0.05)), advantage: Advantage::None, ..request };
        let clipped = policy.rollout(&clipped).unwrap().wait().unwrap();
        let expected: Vec<f32> = rollout.reward.iter().map(|r| r.clamp(-0.1, 0.05)).collect();
        assert!(expected.contains(&-0.1) && expected.contains(&0.05), "{expected:?}");
        assert_eq!((&clipped.reward, &clipped.advantages), (&expected, &expected), "{device}");
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
    no(with(Reward { question: Some("{answer}?".into()), ..reward() }), &["reward s", "no chat template"]);
    no(with(Reward::new("s", policy.clone())), &["reward s", "the rule must be named"]);
    let reference = |name: &str| Some(Reference::Model(load(&runtime, name, &small())));
    no(RolloutRequest { reference: reference("llama-wide"), ..base.clone() }, &["700 ids", "101 ids"]);
    no(
        RolloutRequest { reference: reference("llama-labels-3"), ..base.clone() },
        &["reference", "no language-model head"],
    );
    for (range, says) in
        [((1.0, 0.0), "(1, 0)"), ((f32::NAN, 0.0), "(NaN, 0)"), ((f32::INFINITY, f32::INFINITY), "(inf, inf)")]
    {
        no(RolloutRequest { clip_reward: Some(range), ..base.clone() }, &["clip_reward is", says]);
    }
    let short = load(&runtime, POLICY, &ModelOptions { max_context: Some(40), ..small() });
    let too_short = RolloutRequest { reference: Some(Reference::Model(short)), ..base.clone() };
    refused(policy.rollout(&too_short), ErrorKind::Limit, &["takes 40 tokens", "may have 52"]);
    // Other ids, and no tokenizer to translate.
    let odd = load(&runtime, "llama-odd-widths", &small());
    let judge = load(&runtime, "llama-labels-1", &small());
    let other = RolloutRequest { rewards: vec![Reward::new("w", judge)], ..RolloutRequest::new(sample()) };
    refused(odd.rollout(&other), ErrorKind::Argument, &["reward w", "it reads text", "no tokenizer.json"]);
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

/// While everything stands still, only cancelling can end a rollout.
#[test]
fn a_rollout_can_be_cancelled_or_dropped() {
    for device in devices() {
        let runtime = open(&device, 2);
        let policy = load(&runtime, POLICY, &small());
        let scorer = load(&runtime, "llama-labels-3", &small());
        let request = RolloutRequest {
            reference: Some(Reference::Base),
            rewards: vec![Reward::new("r", scorer.clone())],
            ..RolloutRequest::new(sample())
        };
        runtime.pause(InFlight::Keep, None).unwrap();
        let job = policy.rollout(&request).unwrap();
        assert!(!job.wait_timeout(Duration::from_millis(30)));
        job.cancel();
        refused(job.wait(), ErrorKind::Cancelled, &["cancelled"]);
        drop(policy.rollout(&request).unwrap());
        runtime.resume().unwrap();
        // The engine gives the blocks back after it has told the job.
        let begin = Instant::now();
        let idle = |model: &Model| model.stats().jobs == 0 && model.stats().kv_used == 0;
        while !(idle(&policy) && idle(&scorer)) {
            assert!(begin.elapsed() < Duration::from_secs(20), "{device}: {:?}", policy.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
        // A scorer on a runtime that stands still: the answers are all there, their scores are not.
        let still = open("cpu", 1);
        let waits = load(&still, "llama-labels-3", &small());
        still.pause(InFlight::Keep, None).unwrap();
        let request = RolloutRequest { rewards: vec![Reward::new("r", waits.clone())], ..request };
        let job = policy.rollout(&request).unwrap();
        while job.progress() != (30, 30) {
            assert!(!job.wait_timeout(Duration::from_millis(2)) && begin.elapsed() < Duration::from_secs(40));
        }
        job.cancel();
        refused(job.wait(), ErrorKind::Cancelled, &["cancelled"]);
    }
}

/// What cancels a model's jobs cancels the rollouts that they belong to: nothing of one waits for the end of a pause.
#[test]
fn what_cancels_its_jobs_cancels_a_rollout() {
    for device in devices() {
        let runtime = open(&device, 2);
        let policy = load(&runtime, POLICY, &small());
        let endless = SampleRequest { max_tokens: 400, stop_ids: Vec::new(), ..sample() };
        let request = RolloutRequest { reference: Some(Reference::Base), ..RolloutRequest::new(endless) };
        let begun = || {
            let tokens = policy.stats().sampled_tokens;
            let job = policy.rollout(&request).unwrap();
            while policy.stats().sampled_tokens == tokens {}
            job
        };
        let job = begun();
        runtime.pause(InFlight::Cancel, None).unwrap();
        assert!(job.wait_timeout(Duration::from_secs(60)), "{device}: it waits for the end of the pause");
        refused(job.wait(), ErrorKind::Cancelled, &["cancelled"]);
        runtime.resume().unwrap();
        let job = begun();
        let how = UpdateOptions { in_flight: InFlight::Cancel, ..UpdateOptions::default() };
        put_all(&policy, &how, &tensors(&golden(POLICY))).commit(1).unwrap();
        refused(job.wait(), ErrorKind::Cancelled, &["cancelled"]);
    }
}

/// Each takes threads, so there are only so many; one that has ended makes room.
#[test]
fn too_many_rollouts_are_refused() {
    let runtime = open("cpu", 1);
    let policy = load(&runtime, POLICY, &small());
    let request = RolloutRequest::new(SampleRequest { prompts: vec![vec![7, 8]], n: 1, max_tokens: 1, ..sample() });
    runtime.pause(InFlight::Keep, None).unwrap();
    let jobs: Vec<_> = (0..MAX_ROLLOUTS).map(|_| policy.rollout(&request).unwrap()).collect();
    refused(policy.rollout(&request).map(|_| ()), ErrorKind::Full, &["64 rollouts are under way"]);
    runtime.resume().unwrap();
    jobs.into_iter().for_each(|job| drop(job.wait().unwrap()));
    policy.rollout(&request).unwrap().wait().unwrap();
}

/// One answer of one token and one of 400: the first is scored long before the second ends.
#[test]
fn answers_are_scored_while_others_are_sampled() {
    let runtime = open("cpu", 2);
    let policy = load(&runtime, POLICY, &small());
    let scorer = load(&runtime, "llama-labels-1", &small());
    let prompt: Vec<u32> = (6..16).collect();
    let first = |stream| {
        let request = SampleRequest {
            prompts: vec![prompt.clone()],
            streams: vec![stream],
            max_tokens: 400,
            ignore_eos: true,
            ..SampleRequest::default()
        };
        policy.sample(&request).unwrap().wait().unwrap()[0].tokens.iter().map(|t| t.id).collect::<Vec<u32>>()
    };
    // A token that begins one stream's answer and is nowhere in another's.
    let answers: Vec<Vec<u32>> = (0..40).map(first).collect();
    let pairs = (0..40).flat_map(|i| (0..40).map(move |j| (i, j)));
    let (short, long) = pairs
        .into_iter()
        .max_by_key(|(i, j)| answers[*j].iter().position(|id| *id == answers[*i][0]).unwrap_or(400))
        .unwrap();
    let sample = SampleRequest {
        prompts: vec![prompt.clone(); 2],
        streams: vec![short as u64, long as u64],
        stop_ids: vec![answers[short][0]],
        max_tokens: 400,
        ignore_eos: true,
        ..SampleRequest::default()
    };
    let request = RolloutRequest { rewards: vec![Reward::new("r", scorer.clone())], ..RolloutRequest::new(sample) };
    let job = policy.rollout(&request).unwrap();
    let mut scored_early = false;
    while !job.wait_timeout(Duration::from_micros(200)) {
        scored_early |= scorer.stats().steps > 0 && job.progress() == (1, 2);
    }
    let lengths: Vec<usize> = job.wait().unwrap().samples.iter().map(|s| s.tokens.len()).collect();
    assert!(lengths[0] == 1 && lengths[1] > 100, "{lengths:?}");
    assert!(scored_early);
}

/// What a deadline cut off is not what the policy would have said.
#[test]
fn what_was_cut_off_has_no_reward() {
    let runtime = open("cpu", 2);
    let policy = load(&runtime, POLICY, &small());
    let scorer = load(&runtime, "llama-labels-1", &small());
    let scheduling = Scheduling { deadline: Some(Duration::ZERO), ..Scheduling::default() };
    let request = RolloutRequest {
        reference: Some(Reference::Base),
        rewards: vec![Reward::new("r", scorer)],
        ..RolloutRequest::new(SampleRequest { scheduling, ..sample() })
    };
    let rollout = policy.rollout(&request).unwrap().wait().unwrap();
    assert!(rollout.samples.iter().all(|s| s.finish == Finish::Cancelled));
    assert!(rollout.reward.iter().all(|r| r.is_nan()) && rollout.advantages.iter().all(|a| *a == 0.0));
    assert!(rollout.groups.iter().all(|g| g.zero_variance && g.best_and_worst.is_none()));
    assert_eq!(rollout.reference.unwrap().len(), 30);
}

/// The failure that cancelled the others is the one that is told.
#[test]
fn a_model_that_fails_fails_the_rollout() {
    let runtime = open("cpu", 2);
    let policy = load(&runtime, POLICY, &small());
    let folder = tempfile::tempdir().unwrap();
    let mut broken = tensors(&golden("llama-labels-1"));
    broken[0].bytes = broken[0].dtype.from_f32(&vec![f32::NAN; broken[0].shape.iter().product()]);
    save(&broken, &golden("llama-labels-1"), folder.path());
    let scorer = runtime.load_model(folder.path(), &small()).unwrap();
    let rewards = vec![Reward::new("r", scorer)];
    let request = RolloutRequest { rewards, reference: Some(Reference::Base), ..RolloutRequest::new(sample()) };
    refused(policy.rollout(&request).unwrap().wait(), ErrorKind::NonFinite, &["not finite"]);
    // Finite rewards whose sum is not.
    let scorer = load(&runtime, "llama-labels-1", &small());
    let reward = |i| Reward { weight: f32::MAX, ..Reward::new(format!("r{i}"), scorer.clone()) };
    let request = RolloutRequest { rewards: (0..50).map(reward).collect(), ..RolloutRequest::new(sample()) };
    refused(
        policy.rollout(&request).unwrap().wait(),
        ErrorKind::NonFinite,
        &["the weighted sum of the rewards of answer"],
    );
}

/// A tokenizer of words w1 … w100 with a space before them, which its decoder drops at the beginning of a text; w50 is special.
fn words(id_of: impl Fn(usize) -> usize, more: &[&str]) -> String {
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (1..=100).map(|i| (format!("▁w{i}"), id_of(i).into())).collect();
    vocab.insert("<unk>".into(), 0.into());
    let mut added = vec![special(0, "<unk>"), special(id_of(50), "▁w50")];
    added.extend(more.iter().enumerate().map(|(i, content)| special(101 + i, content)));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": added,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
    .to_string()
}

/// Where decoders drop a space at the beginning, an answer's text is not what follows the prompt's.
#[test]
fn a_reward_model_reads_ids_if_it_can_and_else_the_whole_text() {
    let runtime = open("cpu", 2);
    let with = |name: &str, tokenizer: String| {
        let folder = tempfile::tempdir().unwrap();
        save(&tensors(&golden(name)), &golden(name), folder.path());
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        runtime.load_model(folder.path(), &small()).unwrap()
    };
    let policy = with(POLICY, words(|i| i, &[]));
    // All the policy's tokens, and one more.
    let larger = with("llama-labels-1", words(|i| i, &["<pad>"]));
    let other = with("llama-labels-1", words(|i| 101 - i, &[]));
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| vec![10 + i, 50, 20 + i]).collect();
    let sample = SampleRequest {
        prompts,
        n: 6,
        max_tokens: 12,
        banned_ids: vec![0],
        stop: vec![" w3".into()],
        ignore_eos: true,
        ..SampleRequest::default()
    };
    let rewards = vec![Reward::new("larger", larger.clone()), Reward::new("other", other.clone())];
    let request = RolloutRequest { rewards, ..RolloutRequest::new(sample) };
    let rollout = policy.rollout(&request).unwrap().wait().unwrap();
    let score = |model: &Model, sequences: Vec<Vec<u32>>| -> Vec<f32> {
        let all = model.score(&ScoreRequest { sequences, ..ScoreRequest::default() }).unwrap().wait().unwrap();
        all.iter().map(|s| s.score.score).collect()
    };
    assert_eq!(rollout.rewards[0], score(&larger, wholes(&rollout, &request.sample)));
    let text = |i: usize| format!("w{} w{} {}", 10 + i / 6, 20 + i / 6, rollout.samples[i].text.as_ref().unwrap());
    assert!((0..24).any(|i| rollout.samples[i].finish == Finish::Stop));
    let whole = EncodeOptions { add_special: true, parse_special: false };
    let encoded = |i: usize| other.tokenizer().unwrap().encode(&text(i), whole);
    for i in 0..24 {
        // A text that ends in a space has none of its tokens there: it has no score, and the others keep theirs.
        match encoded(i) {
            Ok(ids) => assert_eq!(rollout.rewards[1][i], score(&other, vec![ids])[0], "{:?}", text(i)),
            Err(_) => assert!(rollout.rewards[1][i].is_nan() && text(i).ends_with(' ')),
        }
    }
    assert!(rollout.rewards[1].iter().filter(|r| !r.is_nan()).count() > 8);
    assert_eq!(other.tokenizer().unwrap().encode("w10 w20", whole).unwrap(), [91, 81]);
}

#[test]
fn flags_that_make_no_sense_are_refused_before_anything_is_loaded() {
    let refused = |args: &[&str], says: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rewardrt"));
        command.args(["rollout", "--policy", "nowhere", "--prompts", "nowhere.jsonl"]).args(args);
        let done = command.output().unwrap();
        let text = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.code() == Some(2) && text.contains(says), "{args:?}: {text}");
    };
    refused(&["--reward", "a/rm", "--reward", "b/rm"], "two rewards are called \"rm\"");
    refused(&["--reward", "rm", "--reward-weights", "1,2"], "2 numbers for 1 rewards");
    refused(&["--reward", "rm", "--question", "{answer}?"], "--question is for judges");
    refused(&["--reward", ":judge"], "[NAME=]MODEL[:RULE]");
    refused(&["--clip-reward", "1"], "LOW,HIGH");
    refused(&["--reference-base"], "--adapter");
    refused(&[], "nowhere.jsonl");
}
