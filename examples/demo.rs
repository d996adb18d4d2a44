//! The main job on a real model: four answers to each of eight prompts, each judged by the same model.
//!
//! `make demo`, or `cargo run --release --example demo -- MODEL [DEVICE]`

use std::error::Error;
use std::time::Instant;

use rewardrt::{Message, ModelOptions, Rule, Runtime, RuntimeOptions, SampleRequest, SampledSequence, ScoreRequest};
use serde::Deserialize;

#[derive(Deserialize)]
struct Prompt {
    messages: Vec<Message>,
}

const ANSWERS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let folder = args.get(1).ok_or("usage: demo MODEL [DEVICE]")?;
    let device = args.get(2).map_or("auto", String::as_str);

    let start = Instant::now();
    let runtime = Runtime::open(&RuntimeOptions { device: device.into(), ..RuntimeOptions::default() })?;
    let model = runtime.load_model(folder.as_ref(), &ModelOptions::default())?;
    println!("{folder} on {}, loaded in {:.2} s\n", runtime.device_name(), start.elapsed().as_secs_f64());

    // 1. Sample: every (prompt, sample) draws from its own stream, so any answer can be replayed alone.
    let lines = include_str!("prompts.jsonl").lines();
    let prompts: Vec<Prompt> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
    let tokenizer = model.tokenizer()?;
    let ids = prompts.iter().map(|p| tokenizer.encode_chat(&p.messages, true)).collect::<Result<_, _>>()?;
    let request = SampleRequest {
        prompts: ids,
        n: ANSWERS,
        max_tokens: 64,
        temperature: 0.8,
        top_p: 0.95,
        seed: 7,
        ..Default::default()
    };
    let start = Instant::now();
    let answers = model.sample(&request)?.wait()?;
    let sampled = start.elapsed().as_secs_f64();
    let tokens: usize = answers.iter().map(|a| a.tokens.len()).sum();

    // 2. Judge: the probability of "yes" against "no" as the next token of a question about the answer.
    let question = |a: &SampledSequence| {
        let asked = &prompts[a.prompt].messages[0].content;
        let text = a.text.as_deref().unwrap_or_default();
        let content = format!("Request: {asked}\n\nReply: {text}\n\nIs this a good reply? Answer yes or no.");
        tokenizer.encode_chat(&[Message { role: "user".into(), content }], true)
    };
    let request = ScoreRequest {
        sequences: answers.iter().map(question).collect::<Result<_, _>>()?,
        rule: Some(Rule::parse("judge:yes,no")?),
        ..ScoreRequest::default()
    };
    let judged_tokens: usize = request.sequences.iter().map(Vec::len).sum();
    let start = Instant::now();
    let scores = model.score(&request)?.wait()?;
    let judged = start.elapsed().as_secs_f64();

    // 3. The table.
    println!(
        "yes: the model's own probability that the answer is good (a judge of 135M parameters is an illustration);\n\
         mean log p: of the answer's tokens; *: the best of its prompt\n"
    );
    for (p, prompt) in prompts.iter().enumerate() {
        println!("{}", prompt.messages[0].content);
        let of_prompt: Vec<usize> = (0..answers.len()).filter(|&i| answers[i].prompt == p).collect();
        let best = of_prompt.iter().copied().max_by(|a, b| scores[*a].score.score.total_cmp(&scores[*b].score.score));
        for &i in &of_prompt {
            let mean = answers[i].tokens.iter().map(|t| t.model_logprob).sum::<f32>() / answers[i].tokens.len() as f32;
            let star = if best == Some(i) { '*' } else { ' ' };
            let text = one_line(answers[i].text.as_deref().unwrap_or_default(), 78);
            println!(
                " {star} yes {:.3}  mean log p {mean:>6.2}  {:<9} {text}",
                scores[i].score.score,
                answers[i].finish.name()
            );
        }
        println!();
    }
    println!(
        "{} answers, {tokens} tokens sampled in {sampled:.1} s ({:.0} tokens/s); {judged_tokens} tokens judged in {judged:.1} s ({:.0} tokens/s)",
        answers.len(),
        tokens as f64 / sampled,
        judged_tokens as f64 / judged
    );
    Ok(())
}

/// Text with line breaks shown, cut to a width.
fn one_line(text: &str, width: usize) -> String {
    let flat = text.trim().replace('\n', " ⏎ ");
    if flat.chars().count() <= width { flat } else { flat.chars().take(width - 1).chain(['…']).collect() }
}
