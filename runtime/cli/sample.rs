//! `rewardrt sample`

use rewardrt::{Result, SampleRequest};
use serde::Serialize;
use serde_json::Value;

use crate::args::Sample;
use crate::jobs;
use crate::record::{Record, id_of, read};
use crate::sink::Sink;

#[derive(Serialize)]
struct Line<'a> {
    id: &'a Value,
    sample: usize,
    prompt_ids: &'a [u32],
    completion_ids: Vec<u32>,
    text: Option<String>,
    logprobs: Vec<f32>,
    model_logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<Vec<Vec<(u32, f32)>>>,
    finish: &'static str,
    weight_version: u64,
}

pub fn run(args: &Sample) -> Result<()> {
    let records = match (&args.prompts, &args.prompt) {
        (Some(path), _) => read(path)?,
        (None, text) => vec![("--prompt".to_owned(), Record { prompt: text.clone(), ..Record::default() })],
    };
    let model = args.common.load()?;
    let mut prompts = Vec::new();
    for (i, (place, record)) in records.iter().enumerate() {
        prompts.push((id_of(record, i), record.prompt(&model).map_err(|e| e.at(place))?));
    }
    let request = |first: usize, chunk: &[(Value, Vec<u32>)]| SampleRequest {
        prompts: chunk.iter().map(|(_, ids)| ids.clone()).collect(),
        n: args.n,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        streams: (first as u64..).take(chunk.len()).collect(),
        stop: args.stop.clone(),
        stop_ids: Vec::new(),
        ignore_eos: args.ignore_eos,
        top_logprobs: args.logprobs,
    };
    let mut sink = Sink::open(args.common.out.as_deref())?;
    jobs::run(
        &prompts,
        args.n,
        |first, chunk| model.sample(&request(first, chunk)),
        |number, answer| {
            let (id, prompt_ids) = &prompts[number / args.n.max(1)];
            let tokens = &answer.tokens;
            sink.write(&Line {
                id,
                sample: answer.sample,
                prompt_ids,
                completion_ids: tokens.iter().map(|t| t.id).collect(),
                text: answer.text,
                logprobs: tokens.iter().map(|t| t.logprob).collect(),
                model_logprobs: tokens.iter().map(|t| t.model_logprob).collect(),
                top: (args.logprobs > 0).then(|| tokens.iter().map(|t| t.top.clone()).collect()),
                finish: answer.finish.name(),
                weight_version: answer.weight_version,
            })
        },
    )?;
    sink.finish()
}
