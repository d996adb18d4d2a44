//! What the engine promises beside equal bits: shared prefixes counted in rows, order, limits, partial results, streams.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{devices, golden, load, open, small, smollm2};
use rewardrt::{
    Ending, ErrorKind, Finish, Guide, LogprobRequest, Model, ModelOptions, Runtime, RuntimeOptions, SampleRequest,
    Scheduling, ScoreRequest, Streamed,
};

const NAME: &str = "llama-gqa-9-3";

fn ids(n: usize, salt: usize) -> Vec<u32> {
    (0..n).map(|k| (6 + (k * 17 + salt * 31) % 90) as u32).collect()
}

fn request(prompts: Vec<Vec<u32>>) -> SampleRequest {
    SampleRequest { prompts, max_tokens: 8, ignore_eos: true, seed: 3, ..SampleRequest::default() }
}

fn wait_done<T>(job: &rewardrt::Job<T>) {
    assert!(job.wait_timeout(Duration::from_secs(120)), "the job does not end");
}

/// 64 samples of one prompt: its rows are computed once, whatever its length is in blocks.
#[test]
fn samples_share_their_prompt() {
    for device in devices() {
        for length in [200, 208, 1, 17] {
            let model = load(&open(&device, 2), NAME, &small());
            let samples = SampleRequest { n: 64, ..request(vec![ids(length, 0)]) };
            let job = model.sample(&samples).unwrap();
            wait_done(&job);
            let rows = job.stats().rows;
            assert_eq!((rows.prefill, rows.decode, rows.cached), (length as u64, 64 * 7, 0), "{device} {length}");
            assert_eq!(job.stats().sampled_tokens, 64 * 8);
            // One more time: all but the last position is there.
            let job = model.sample(&samples).unwrap();
            wait_done(&job);
            let rows = job.stats().rows;
            assert_eq!((rows.prefill, rows.cached), (1, length as u64 - 1), "{device} {length}: {rows:?}");
        }
    }
}

/// More samples than a step has rows, and than the cache holds at a time.
#[test]
fn more_samples_than_rows() {
    for device in devices() {
        let prompt = ids(40, 1);
        let wide = load(&open(&device, 2), NAME, &small());
        let samples = SampleRequest { n: 30, ..request(vec![prompt]) };
        let expected: Vec<_> = wide.sample(&samples).unwrap().wait().unwrap();
        for (rows, kv) in [(4, 4096), (7, 112), (64, 64)] {
            let options = ModelOptions { max_batch_tokens: Some(rows), kv_tokens: Some(kv), ..small() };
            let narrow = load(&open(&device, 2), NAME, &options);
            let got = narrow.sample(&samples).unwrap().wait().unwrap();
            for (got, want) in got.iter().zip(&expected) {
                assert_eq!((got.sample, &got.tokens), (want.sample, &want.tokens), "{device} {rows} rows");
            }
            assert_eq!(got.len(), 30);
        }
    }
}

/// Pairs that share a prompt, submitted at once: what one is computing, the others wait for.
#[test]
fn concurrent_jobs_share_prefixes() {
    for device in devices() {
        for rows in [1024, 50] {
            let options = ModelOptions { max_batch_tokens: Some(rows), ..small() };
            let model = load(&open(&device, 2), NAME, &options);
            let prompt = ids(150, 2);
            let pair = |tail: usize| (prompt.clone(), ids(10, tail));
            let pairs = LogprobRequest::completions((0..6).map(pair));
            let job = model.logprobs(&pairs).unwrap();
            wait_done(&job);
            let rows_of = job.stats().rows;
            // The first want is at the prompt's last position, which everyone computes for itself; nothing is computed of
            // a completion's last token, whose log-prob is read one position before.
            assert_eq!(rows_of.prefill, 150 + 9 + 5 * 10, "{device}: {rows_of:?}");
            let fresh = load(&open(&device, 2), NAME, &small());
            let alone = fresh.logprobs(&LogprobRequest::completions([pair(3)])).unwrap().wait().unwrap();
            assert_eq!(job.wait().unwrap()[3], alone[0]);
        }
    }
}

#[test]
fn sessions_compute_what_is_new() {
    for device in devices() {
        let model = load(&open(&device, 2), NAME, &small());
        let turn = SampleRequest { max_tokens: 10, ignore_eos: true, seed: 5, ..SampleRequest::default() };
        let session = model.session(&ids(50, 0)).unwrap();
        let first = session.sample(&turn).unwrap().wait().unwrap().remove(0);
        assert_eq!(session.tokens().len(), 60);
        session.append(&ids(7, 9)).unwrap();
        let fork = session.fork().unwrap();
        let job = session.sample(&turn).unwrap();
        for refused in [session.append(&[7]).unwrap_err(), session.sample(&turn).map(|_| ()).unwrap_err()] {
            assert_eq!(refused.kind(), ErrorKind::Busy);
        }
        wait_done(&job);
        let rows = job.stats().rows;
        // The last sampled token and what was appended.
        assert_eq!((rows.prefill, rows.cached), (8, 59), "{device}: {rows:?}");
        let second = job.wait().unwrap().remove(0);
        // The same as one prompt, on a fresh model.
        let fresh = load(&open(&device, 2), NAME, &small());
        let mut whole = ids(50, 0);
        whole.extend(first.tokens.iter().map(|t| t.id));
        whole.extend(ids(7, 9));
        let flat = fresh.sample(&SampleRequest { prompts: vec![whole.clone()], ..turn.clone() }).unwrap();
        assert_eq!(flat.wait().unwrap()[0].tokens, second.tokens, "{device}");
        // The fork knows nothing of it and goes its own way.
        assert_eq!(fork.tokens(), whole);
        let other = fork.sample(&SampleRequest { seed: 6, ..turn.clone() }).unwrap().wait().unwrap().remove(0);
        assert_ne!(other.tokens, second.tokens);
        // A job that is dropped leaves the session as it was.
        let before = fork.tokens();
        drop(fork.sample(&turn).unwrap());
        assert_eq!(fork.tokens(), before);
        fork.append(&[8]).unwrap();
        let error = session.append(&[101]).unwrap_err();
        assert!(error.to_string().contains("101 is not below"), "{error}");
        assert_eq!(session.append(&ids(600, 0)).unwrap_err().kind(), ErrorKind::Limit);
        assert_eq!(
            session.sample(&SampleRequest { n: 2, ..turn }).map(|_| ()).unwrap_err().kind(),
            ErrorKind::Argument
        );
    }
}

#[test]
fn priorities_and_shares() {
    // Two rows: two sequences at a time.
    let options = ModelOptions { max_batch_tokens: Some(2), ..small() };
    let model = load(&open("cpu", 1), NAME, &options);
    // Long enough that a busy machine may wake this thread late.
    let long = SampleRequest { n: 400, max_tokens: 100, ..request(vec![ids(5, 0)]) };
    let big = model.sample(&long).unwrap();
    while model.stats().sampled_tokens < 10 {}
    // Equal priority: one of the two places is the next to be free, long before the big job is done.
    let equal = model.sample(&request(vec![ids(5, 1)])).unwrap();
    wait_done(&equal);
    let (finished, all) = big.progress();
    assert!(finished < 100 && all == 400, "{finished} of {all}");
    // Higher priority: at once, in the place of one of them.
    while model.stats().running < 2 {}
    let scheduling = Scheduling { priority: 1, deadline: None };
    let urgent = model.sample(&SampleRequest { scheduling, ..request(vec![ids(5, 2)]) }).unwrap();
    wait_done(&urgent);
    let preemptions = model.stats().preemptions;
    assert!(preemptions > 0 && big.stats().preemptions > 0 && urgent.stats().preemptions == 0);
    assert!(big.progress().0 < 200, "the urgent job did not wait");
    drop(big);
}

#[test]
fn deadlines_and_cancels_return_what_there_is() {
    for device in devices() {
        let model = load(&open(&device, 2), NAME, &small());
        let endless = SampleRequest { n: 3, max_tokens: 500, ..request(vec![ids(5, 0), ids(6, 1)]) };
        let scheduling = Scheduling { priority: 0, deadline: Some(Duration::from_millis(30)) };
        let begin = Instant::now();
        let late = model.sample(&SampleRequest { scheduling, ..endless.clone() }).unwrap().wait().unwrap();
        assert_eq!(late.len(), 6);
        let cut = late.iter().filter(|s| s.finish == Finish::Cancelled && s.tokens.len() < 500).count();
        assert!(cut == 6 || begin.elapsed() < Duration::from_millis(40), "{cut} were cut");
        // A scoring job has nothing to show.
        let texts = vec![ids(500, 0); 300];
        let late = LogprobRequest {
            scheduling: Scheduling { priority: 0, deadline: Some(Duration::ZERO) },
            sequences: texts,
            ..LogprobRequest::default()
        };
        let error = model.logprobs(&late).unwrap().wait().unwrap_err();
        assert!(error.kind() == ErrorKind::Cancelled && error.to_string().contains("deadline"), "{error}");
        let job = model.sample(&endless).unwrap();
        while job.stats().sampled_tokens == 0 {}
        job.cancel();
        wait_done(&job);
        let partial = job.wait().unwrap();
        assert!(partial.iter().any(|s| !s.tokens.is_empty() && s.finish == Finish::Cancelled), "{device}");
        // Before its first step.
        let job = model.sample(&endless).unwrap();
        job.cancel();
        assert_eq!(job.wait().unwrap().len(), 6);
    }
}

/// Taking the error of a failed job leaves the others who wait for it with the same.
#[test]
fn a_failed_job_stays_failed() {
    let model = load(&open("cpu", 1), NAME, &small());
    let late = LogprobRequest {
        scheduling: Scheduling { priority: 0, deadline: Some(Duration::ZERO) },
        sequences: vec![ids(500, 0); 300],
        ..LogprobRequest::default()
    };
    let job = model.logprobs(&late).unwrap();
    let watch = job.watch();
    assert_eq!(job.wait().unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(watch.wait_timeout(Duration::ZERO), "done once, done for ever");
    assert_eq!(watch.ending(), Some(Ending::Failed(ErrorKind::Cancelled)));
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let options = RuntimeOptions {
        device: "cpu".into(),
        threads: Some(1),
        max_jobs: 3,
        max_queued_tokens: 1000,
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::open(&options).unwrap();
    let model = runtime.load_model(&golden(NAME), &small()).unwrap();
    let long = SampleRequest { max_tokens: 200, ..request(vec![ids(10, 0)]) };
    let first = model.sample(&SampleRequest { n: 4, ..long.clone() }).unwrap();
    let error = model.sample(&long).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Full && error.to_string().contains("at most 3 jobs and 1000 tokens"), "{error}");
    let small: Vec<_> = (0..2).map(|i| model.sample(&request(vec![ids(4, i)])).unwrap()).collect();
    assert_eq!(model.sample(&request(vec![ids(4, 9)])).map(|_| ()).unwrap_err().kind(), ErrorKind::Full, "jobs");
    let stats = runtime.stats();
    assert!(stats.jobs <= 3 && stats.refused == 2 && stats.submitted == 3, "{stats:?}");
    first.wait().unwrap();
    small.into_iter().for_each(|job| drop(job.wait().unwrap()));
    // Whoever has waited finds room.
    assert_eq!((runtime.stats().jobs, runtime.stats().queued_tokens), (0, 0));
    model.sample(&long).unwrap().wait().unwrap();
    // Far larger than the limit, but alone.
    model.sample(&SampleRequest { n: 20, ..long }).unwrap().wait().unwrap();
}

#[test]
fn too_long_for_the_cache_is_said_at_once() {
    for device in devices() {
        let model = load(&open(&device, 1), NAME, &ModelOptions { kv_tokens: Some(48), ..small() });
        let error = model.sample(&request(vec![ids(42, 0)])).map(|_| ()).unwrap_err();
        assert!(error.kind() == ErrorKind::Limit, "{error}");
        assert!(error.to_string().contains("sequence 0 needs 49 positions in the KV cache, which has 48"), "{error}");
        // Exactly as long as the cache is possible, and again when the cache is full of just that.
        let first = model.sample(&request(vec![ids(41, 0)])).unwrap().wait().unwrap();
        for _ in 0..2 {
            let job = model.sample(&request(vec![ids(41, 0)])).unwrap();
            wait_done(&job);
            assert_eq!(job.wait().unwrap()[0].tokens, first[0].tokens, "{device}");
        }
    }
}

#[test]
fn streams_are_the_result_in_pieces() {
    for device in devices() {
        let model = load(&open(&device, 2), NAME, &small());
        let asked = SampleRequest { n: 3, stream: true, speculate: 4, ..request(vec![ids(20, 0), ids(9, 1)]) };
        let job = model.sample(&asked).unwrap();
        let mut tokens = vec![Vec::new(); 6];
        let mut ends = 0;
        loop {
            match job.next_chunk(Duration::from_secs(60)) {
                Streamed::Chunk(chunk) => {
                    let so_far = &mut tokens[chunk.prompt * 3 + chunk.sample];
                    assert_eq!(chunk.first, so_far.len());
                    so_far.extend(chunk.tokens);
                    ends += usize::from(chunk.finish == Some(Finish::Length));
                }
                Streamed::Pending => panic!("nothing came"),
                Streamed::Done => break,
            }
        }
        assert_eq!(ends, 6);
        for (answer, streamed) in job.wait().unwrap().iter().zip(&tokens) {
            assert_eq!(&answer.tokens, streamed, "{device}");
            assert_eq!(answer.versions.len(), 1);
            assert_eq!((answer.versions[0].start, answer.versions[0].end), (0, 8));
        }
        // Without `stream` there is nothing to take, and nothing to wait for.
        let job = model.sample(&request(vec![ids(20, 0)])).unwrap();
        assert!(matches!(job.next_chunk(Duration::from_secs(60)), Streamed::Done));
    }
}

#[test]
fn best_of_returns_the_likeliest() {
    for device in devices() {
        let model = load(&open(&device, 2), NAME, &small());
        let all = SampleRequest { n: 8, ..request(vec![ids(9, 0), ids(5, 1)]) };
        let everything = model.sample(&all).unwrap().wait().unwrap();
        let best = model.sample(&SampleRequest { n: 2, best_of: Some(8), ..all }).unwrap().wait().unwrap();
        assert_eq!(best.len(), 4);
        for prompt in 0..2 {
            let mut ranked: Vec<_> = everything.iter().filter(|s| s.prompt == prompt).collect();
            let mean = |s: &rewardrt::SampledSequence| {
                s.tokens.iter().map(|t| f64::from(t.model_logprob)).sum::<f64>() / s.tokens.len() as f64
            };
            ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
            for (got, want) in best[2 * prompt..].iter().zip(&ranked[..2]) {
                assert_eq!((got.sample, &got.tokens), (want.sample, &want.tokens), "{device}");
            }
        }
    }
}

/// The reported set is the one that was drawn from: its model probabilities, made to sum to one, are the log-prob's.
#[test]
fn kept_sets_rebuild_the_distribution() {
    for device in devices() {
        let model = load(&open(&device, 2), NAME, &small());
        let base = SampleRequest { kept_ids: 101, top_logprobs: 101, ..request(vec![ids(12, 0)]) };
        for asked in [
            SampleRequest { top_p: 0.8, ..base.clone() },
            SampleRequest { top_k: 9, ..base.clone() },
            SampleRequest { typical_p: 0.5, ..base.clone() },
            SampleRequest { banned_ids: (0..50).collect(), ..base.clone() },
            SampleRequest { allowed_ids: Some(vec![70]), ..base.clone() },
            base.clone(),
        ] {
            for token in &model.sample(&asked).unwrap().wait().unwrap()[0].tokens {
                assert_eq!(token.kept_ids.len(), token.kept as usize);
                let of = |id: u32| f64::from(token.top.iter().find(|(t, _)| *t == id).unwrap().1);
                let mass: f64 = token.kept_ids.iter().map(|id| of(*id).exp()).sum();
                let want = of(token.id) - mass.ln();
                assert!((f64::from(token.logprob) - want).abs() < 1e-4, "{device} {token:?}: {want}");
                if asked.allowed_ids.is_some() {
                    assert_eq!((token.id, token.logprob, token.kept), (70, 0.0, 1));
                }
            }
        }
        // Larger sets than were asked for are counted only.
        let few = SampleRequest { kept_ids: 3, ..base };
        let token = &model.sample(&few).unwrap().wait().unwrap()[0].tokens[0];
        assert!(token.kept == 101 && token.kept_ids.is_empty());
    }
}

#[test]
fn many_jobs_from_many_threads() {
    let model = load(&open("cpu", 2), NAME, &ModelOptions { kv_tokens: Some(256), ..small() });
    let classifier = load(&open("cpu", 2), "llama-labels-1", &small());
    let expected = model.sample(&request(vec![ids(9, 4)])).unwrap().wait().unwrap()[0].tokens.clone();
    std::thread::scope(|scope| {
        for t in 0..8 {
            let (model, classifier, expected) = (&model, &classifier, &expected);
            scope.spawn(move || {
                for i in 0..30 {
                    let job = model.sample(&SampleRequest { n: 1 + i % 4, ..request(vec![ids(3 + i, t)]) }).unwrap();
                    if i % 5 == 0 {
                        job.cancel();
                    }
                    let same = model.sample(&request(vec![ids(9, 4)])).unwrap();
                    let sequences = vec![ids(20 + i, t)];
                    classifier.score(&ScoreRequest { sequences, ..ScoreRequest::default() }).unwrap().wait().unwrap();
                    assert_eq!(&same.wait().unwrap()[0].tokens, expected);
                    job.wait().unwrap();
                }
            });
        }
    });
    let stats = model.stats();
    assert_eq!((stats.jobs, stats.kv_used), (0, 0), "{stats:?}");
}

fn policy() -> Option<Model> {
    let folder = smollm2()?;
    let options = ModelOptions { kv_tokens: Some(16_384), ..ModelOptions::default() };
    Some(open("cpu", 2).load_model(&folder, &options).unwrap())
}

/// Guided answers are valid, the same alone and in company, and end by themselves.
#[test]
fn guided_samples_are_valid() {
    let Some(model) = policy() else { return };
    let tokenizer = model.tokenizer().unwrap();
    let prompt = tokenizer.encode("A person as JSON: ", Default::default()).unwrap();
    let schema = r#"{"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
        "x-guidance": {"whitespace_flexible": false},
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                       "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3}}}"#;
    let asked = SampleRequest {
        prompts: vec![prompt],
        n: 24,
        max_tokens: 120,
        seed: 9,
        guide: Some(Guide::JsonSchema(schema.into())),
        ..SampleRequest::default()
    };
    let answers = model.sample(&asked).unwrap().wait().unwrap();
    for answer in &answers {
        let text = answer.text.as_deref().unwrap();
        assert_eq!(answer.finish, Finish::Stop, "{text}");
        let value: serde_json::Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(value["name"].as_str().unwrap().chars().count() <= 12, "{text}");
        assert!((0..=150).contains(&value["age"].as_i64().unwrap()), "{text}");
        assert!(value["tags"].as_array().unwrap().len() <= 3, "{text}");
        // What was forced is certain.
        assert!(answer.tokens.iter().all(|t| t.kept > 1 || t.logprob == 0.0));
    }
    // With guesses, in another batch.
    let two = SampleRequest { n: 2, speculate: 6, ..asked.clone() };
    for (got, want) in model.sample(&two).unwrap().wait().unwrap().iter().zip(&answers) {
        assert_eq!(got.tokens, want.tokens);
    }
    let regex =
        SampleRequest { guide: Some(Guide::Regex("(yes|no), because [a-z ]{4,20}\\.".into())), n: 4, ..asked.clone() };
    for answer in model.sample(&regex).unwrap().wait().unwrap() {
        let text = answer.text.unwrap();
        assert!(text.ends_with('.') && text.contains(", because ") && answer.finish == Finish::Stop, "{text}");
    }
    // The guide wants a brace, and all braces are banned: nothing can come.
    let open: Vec<u32> = (0..model.spec().vocab_size as u32)
        .filter(|t| tokenizer.decode(&[*t], false).is_ok_and(|text| text.trim_start().starts_with('{')))
        .collect();
    let blocked = SampleRequest { banned_ids: open, n: 2, ..asked.clone() };
    for answer in model.sample(&blocked).unwrap().wait().unwrap() {
        assert_eq!((answer.finish, answer.tokens.len()), (Finish::Blocked, 0));
    }
    let error =
        model.sample(&SampleRequest { guide: Some(Guide::Regex("(".into())), ..asked }).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Argument && error.to_string().contains("regular expression"), "{error}");
}

/// Profiling changes no result, begins and ends between two steps, and hands out each time once.
#[test]
fn profiles_between_steps() {
    let model = load(&open("cpu", 2), NAME, &small());
    let draw = |salt| model.sample(&request(vec![ids(20, salt), ids(9, salt + 1)])).unwrap();
    let expected = draw(0).wait().unwrap();
    assert!(model.take_profile().unwrap().is_empty(), "off unless it is asked for");
    model.set_profiling(true).unwrap();
    let tokens = |answers: &[rewardrt::SampledSequence]| -> Vec<Vec<_>> {
        answers.iter().map(|a| a.tokens.iter().map(|t| (t.id, t.model_logprob.to_bits())).collect()).collect()
    };
    let steps = model.stats().steps;
    assert_eq!(tokens(&draw(0).wait().unwrap()), tokens(&expected));
    let profile = model.take_profile().unwrap();
    let of = |name: &str| profile.iter().find(|k| k.name == name).unwrap();
    assert_eq!(of("head").calls, model.stats().steps - steps);
    assert!(profile.iter().all(|k| k.seconds > 0.0 && k.bytes > 0), "{profile:?}");
    assert!(model.take_profile().unwrap().is_empty());
    // While a job runs.
    let job = draw(50);
    model.set_profiling(false).unwrap();
    model.take_profile().unwrap();
    job.wait().unwrap();
    assert!(model.take_profile().unwrap().is_empty());
    let limits = model.limits().unwrap();
    assert!(limits.bytes_per_second > 1e8 && limits.flops > 1e8, "{limits:?}");
}
