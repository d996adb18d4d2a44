//! Runs jobs from stdin and prints their seconds: what benches/peers drives.
//!
//! `work MODEL THREADS [--precision auto|f32] [--weights stored|int8|int4]`, then one line a job:
//! {"kind": "decode" | "logprobs" | "hidden", "ids": [[…]], "new": N}. `hidden` reads one token's logit at the last
//! position: the forward of a reward model.
//!
//! `work --first-token MODEL THREADS` loads the model, samples one token and ends.

use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

use rewardrt::weights::WeightFormat;
use rewardrt::{
    LogprobRequest, Model, ModelOptions, Precision, Rule, Runtime, RuntimeOptions, SampleRequest, ScoreRequest,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Work {
    kind: String,
    ids: Vec<Vec<u32>>,
    new: usize,
}

fn load(model: &str, threads: &str, options: &ModelOptions) -> Result<Model, Box<dyn Error>> {
    let device = std::env::var("REWARDRT_DEVICE").unwrap_or("cpu".into());
    let runtime =
        Runtime::open(&RuntimeOptions { device, threads: Some(threads.parse()?), ..RuntimeOptions::default() })?;
    Ok(runtime.load_model(model.as_ref(), options)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let ["--first-token", model, threads] = args[..] {
        let model = load(model, threads, &ModelOptions::default())?;
        let prompts = vec![model.tokenizer()?.encode("The capital of France is", Default::default())?];
        let answers = model.sample(&SampleRequest { prompts, max_tokens: 1, ..SampleRequest::default() })?.wait()?;
        println!("{:?}", answers[0].text);
        return Ok(());
    }
    let [model, threads, flags @ ..] = &args[..] else { return Err("usage: work MODEL THREADS [FLAGS]".into()) };
    let mut options = ModelOptions::default();
    for flag in flags.chunks(2) {
        match flag {
            ["--precision", "auto"] | ["--weights", "stored"] => {}
            ["--precision", "f32"] => options.precision = Precision::F32,
            ["--weights", "int8"] => options.weights = WeightFormat::Int8,
            ["--weights", "int4"] => options.weights = WeightFormat::Int4,
            other => return Err(format!("what is {other:?}?").into()),
        }
    }
    let model = load(model, threads, &options)?;
    for line in std::io::stdin().lock().lines() {
        let Work { kind, ids, new } = serde_json::from_str(&line?)?;
        let start = Instant::now();
        match kind.as_str() {
            "decode" => {
                let request =
                    SampleRequest { prompts: ids, max_tokens: new, ignore_eos: true, ..SampleRequest::default() };
                model.sample(&request)?.wait()?;
            }
            "logprobs" => {
                model.logprobs(&LogprobRequest { sequences: ids, ..LogprobRequest::default() })?.wait()?;
            }
            "hidden" => {
                let rule = Some(Rule::parse("judge:yes,no")?);
                model.score(&ScoreRequest { sequences: ids, rule, ..ScoreRequest::default() })?.wait()?;
            }
            other => return Err(format!("what is a job of kind {other:?}?").into()),
        }
        println!("{}", start.elapsed().as_secs_f64());
        // The next round has the same ids, and no peer keeps their keys and values.
        model.trim()?;
    }
    Ok(())
}
