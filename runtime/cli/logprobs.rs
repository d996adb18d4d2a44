//! `rewardrt logprobs`

use rewardrt::{LogprobRequest, Result};
use serde::Serialize;
use serde_json::Value;

use crate::args::Logprobs;
use crate::jobs;
use crate::record::{id_of, read};
use crate::sink::Sink;

#[derive(Serialize)]
struct Line<'a> {
    id: &'a Value,
    ids: &'a [u32],
    logprobs: Vec<Option<f32>>,
    sum: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropy: Option<Vec<Option<f32>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<Vec<Vec<(u32, f32)>>>,
}

struct Item {
    id: Value,
    ids: Vec<u32>,
    prompt_len: usize,
}

pub fn run(args: &Logprobs) -> Result<()> {
    let records = read(&args.input)?;
    let model = args.common.load()?;
    let adapter = args.adapter.load(&model)?;
    let mut items = Vec::new();
    for (i, (place, record)) in records.iter().enumerate() {
        let (ids, prompt_len) = record.scored(&model).map_err(|e| e.at(place))?;
        items.push(Item { id: id_of(record, i), ids, prompt_len });
    }
    let mut sink = Sink::open(args.common.out.as_deref())?;
    let request = |chunk: &[Item]| LogprobRequest {
        sequences: chunk.iter().map(|i| i.ids.clone()).collect(),
        prompt_lens: chunk.iter().map(|i| i.prompt_len).collect(),
        top_logprobs: args.top,
        adapter: adapter.clone(),
        ..LogprobRequest::default()
    };
    jobs::run(
        &items,
        1,
        1,
        |_, chunk| model.logprobs(&request(chunk)),
        |number, result| {
            let item = &items[number];
            sink.write(&Line {
                id: &item.id,
                ids: &item.ids[item.prompt_len..],
                sum: result.sum(),
                logprobs: result.logprobs,
                entropy: args.entropy.then_some(result.entropies),
                top: (args.top > 0).then_some(result.top),
            })
        },
    )?;
    sink.finish()
}
