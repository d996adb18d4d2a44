//! Runs jobs from stdin and prints their seconds: what benches/peers drives.
//!
//! `work MODEL THREADS`, then one line a job: {"kind": "decode" | "logprobs", "ids": [[…]], "new": N}

use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

use rewardrt::{LogprobRequest, ModelOptions, Runtime, RuntimeOptions, SampleRequest};
use serde::Deserialize;

#[derive(Deserialize)]
struct Work {
    kind: String,
    ids: Vec<Vec<u32>>,
    new: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, threads] = &args[..] else { return Err("usage: work MODEL THREADS".into()) };
    let device = std::env::var("REWARDRT_DEVICE").unwrap_or("cpu".into());
    let runtime = Runtime::open(&RuntimeOptions { device, threads: Some(threads.parse()?) })?;
    let model = runtime.load_model(model.as_ref(), &ModelOptions::default())?;
    for line in std::io::stdin().lock().lines() {
        let work: Work = serde_json::from_str(&line?)?;
        let start = Instant::now();
        if work.kind == "decode" {
            let request =
                SampleRequest { prompts: work.ids, max_tokens: work.new, ignore_eos: true, ..SampleRequest::default() };
            model.sample(&request)?.wait()?;
        } else {
            let request = LogprobRequest { sequences: work.ids, ..LogprobRequest::default() };
            model.logprobs(&request)?.wait()?;
        }
        println!("{}", start.elapsed().as_secs_f64());
    }
    Ok(())
}
