//! `rewardrt score`

use rewardrt::{Result, Rule, ScoreRequest};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::args::Score;
use crate::jobs;
use crate::record::{id_of, read};
use crate::sink::Sink;

#[derive(Serialize)]
struct Line<'a> {
    id: &'a Value,
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<Map<String, Value>>,
    rule: &'a str,
    weight_version: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter_version: Option<u64>,
}

pub fn run(args: &Score) -> Result<()> {
    let records = read(&args.input)?;
    let model = args.common.load()?;
    let adapter = args.adapter.load(&model)?;
    let rule = match &args.rule {
        Some(rule) => rule.clone(),
        None => Rule::for_model(model.spec())?,
    };
    let reads_next_token = matches!(rule, Rule::Judge { .. });
    let mut items = Vec::new();
    for (i, (place, record)) in records.iter().enumerate() {
        items.push((id_of(record, i), record.sequence(&model, reads_next_token).map_err(|e| e.at(place))?));
    }
    let mut sink = Sink::open(args.common.out.as_deref())?;
    let request = |chunk: &[(Value, Vec<u32>)]| ScoreRequest {
        sequences: chunk.iter().map(|(_, ids)| ids.clone()).collect(),
        rule: Some(rule.clone()),
        adapter: adapter.clone(),
        ..ScoreRequest::default()
    };
    jobs::run(
        &items,
        1,
        1,
        |_, chunk| model.score(&request(chunk)),
        |number, result| {
            let by_label =
                || result.labels.iter().cloned().zip(result.score.values.iter().map(|v| number_of(*v))).collect();
            sink.write(&Line {
                id: &items[number].0,
                score: result.score.score,
                scores: (result.labels.len() > 1).then(by_label),
                rule: &result.rule,
                weight_version: result.weight_version,
                adapter_version: result.adapter_version,
            })
        },
    )?;
    sink.finish()
}

/// A float with the digits that tell it apart from its f32 neighbours, no more.
fn number_of(v: f32) -> Value {
    v.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
