//! `rewardrt sample`

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use rewardrt::{Chunk, Error, ErrorKind, Job, Model, Result, SampleRequest, SampledSequence, Streamed};
use serde::Serialize;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::args::Sample;
use crate::jobs;
use crate::record::{Record, id_of, read};
use crate::sink::Sink;

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    answer: Answer<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<Vec<&'a [(u32, f32)]>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timing: Option<Value>,
}

fn line<'a>(args: &Sample, prompt: &'a (Value, Vec<u32>), answer: &'a SampledSequence) -> Line<'a> {
    let tokens = &answer.tokens;
    // Infinities, which JSON has not, mean no limit.
    let limit = |v: f32| if v.is_finite() { json!(v) } else { Value::Null };
    let kept = |k: usize| {
        let one = |t: &rewardrt::SampledToken| {
            let ids = if t.kept as usize <= k { json!(t.kept_ids) } else { Value::Null };
            json!({"count": t.kept, "threshold": limit(t.threshold), "ceiling": limit(t.ceiling), "ids": ids})
        };
        tokens.iter().map(one).collect()
    };
    let timing = || {
        let seconds = |d: Duration| d.as_secs_f64();
        let t = answer.timing;
        json!({"queued": seconds(t.queued), "prefill": seconds(t.prefill), "decode": seconds(t.decode)})
    };
    let plain = Answer::new(prompt, answer);
    Line {
        top: (args.logprobs > 0).then(|| tokens.iter().map(|t| t.top.as_slice()).collect()),
        kept: args.kept.map(kept),
        timing: args.timing.then(timing),
        answer: if args.entropy { plain.with_entropy(answer) } else { plain },
    }
}

pub fn run(args: &Sample) -> Result<()> {
    let records = match (&args.prompts, &args.prompt) {
        (Some(path), _) => read(path)?,
        (None, text) => vec![("--prompt".to_owned(), Record { prompt: text.clone(), ..Record::default() })],
    };
    let scheduling = args.scheduling.scheduling()?;
    let base = args.sampling.request(args.n)?;
    let model = args.common.load()?;
    let adapter = args.adapter.load(&model)?;
    let mut prompts = Vec::new();
    for (i, (place, record)) in records.iter().enumerate() {
        prompts.push((id_of(record, i), record.prompt(&model).map_err(|e| e.at(place))?));
    }
    let request = |first: usize, chunk: &[(Value, Vec<u32>)]| SampleRequest {
        prompts: chunk.iter().map(|(_, ids)| ids.clone()).collect(),
        best_of: args.best_of,
        streams: (first as u64..).take(chunk.len()).collect(),
        top_logprobs: args.logprobs,
        kept_ids: args.kept.unwrap_or(0),
        speculate: args.speculate,
        stream: args.stream,
        adapter: adapter.clone(),
        scheduling,
        ..base.clone()
    };
    if args.stream {
        return stream(args, &model, &prompts, &request(0, &prompts));
    }
    let mut sink = Sink::open(args.common.out.as_deref())?;
    jobs::run(
        &prompts,
        args.n,
        args.best_of.unwrap_or(args.n),
        |first, chunk| model.sample(&request(first, chunk)),
        |number, answer| sink.write(&line(args, &prompts[number / args.n.max(1)], &answer)),
    )?;
    report(&model);
    sink.finish()
}

/// Prints texts as they grow, one answer after the other: those whose turn has not come are kept until then.
fn stream(args: &Sample, model: &Model, prompts: &[(Value, Vec<u32>)], request: &SampleRequest) -> Result<()> {
    model.tokenizer()?;
    let mut sink = args.common.out.as_deref().map(|path| Sink::open(Some(path))).transpose()?;
    let per_prompt = args.best_of.unwrap_or(args.n);
    let job = model.sample(request)?;
    print_chunks(&job, per_prompt, prompts.len() * per_prompt)?;
    for answer in job.wait()? {
        if let Some(sink) = &mut sink {
            sink.write(&line(args, &prompts[answer.prompt], &answer))?;
        }
    }
    report(model);
    sink.map_or(Ok(()), Sink::finish)
}

fn print_chunks(job: &Job<Vec<SampledSequence>>, per_prompt: usize, answers: usize) -> Result<()> {
    let failed = |e: io::Error| {
        let kind = if e.kind() == io::ErrorKind::BrokenPipe { ErrorKind::Cancelled } else { ErrorKind::Io };
        Error::new(kind, format!("stdout: {e}"))
    };
    let mut out = io::stdout();
    // Text and whether it is all, by answer.
    let mut kept: BTreeMap<usize, (String, bool)> = BTreeMap::new();
    let mut turn = 0;
    loop {
        match job.next_chunk(Duration::from_secs(1)) {
            Streamed::Chunk(Chunk { prompt, sample, text, finish, .. }) => {
                let (so_far, ended) = kept.entry(prompt * per_prompt + sample).or_default();
                so_far.push_str(&text);
                *ended |= finish.is_some();
            }
            Streamed::Pending => continue,
            Streamed::Done => return Ok(()),
        }
        while let Some((text, ended)) = kept.get_mut(&turn) {
            write!(out, "{}", std::mem::take(text)).and_then(|()| out.flush()).map_err(failed)?;
            if !*ended {
                break;
            }
            kept.remove(&turn);
            turn += 1;
            // A blank line between answers.
            let border = if turn < answers { "\n\n" } else { "\n" };
            write!(out, "{border}").map_err(failed)?;
        }
    }
}

/// What the work cost, for `--verbose`.
fn report(model: &Model) {
    let s = model.stats();
    log::info!(
        "{} tokens sampled in {} steps of {:.2} s; rows: {} prefill, {} decode, {} drafted ({} accepted), {} again, {} from the cache; {} preemptions, {} evictions, {} KV copies, longest wait {:.2} s",
        s.sampled_tokens,
        s.steps,
        s.step_time.as_secs_f64(),
        s.rows.prefill,
        s.rows.decode,
        s.rows.drafted,
        s.rows.accepted,
        s.rows.recomputed,
        s.rows.cached,
        s.preemptions,
        s.kv_evictions,
        s.kv_copies,
        s.longest_wait.as_secs_f64()
    );
}
