//! Flags.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use rewardrt::weights::WeightFormat;
use rewardrt::{Model, ModelOptions, Precision, Result, Rule, Runtime, RuntimeOptions};

/// Samples from language models and scores what was sampled.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
    /// Say on stderr what is loaded and how large it is.
    #[arg(long, short, global = true)]
    pub verbose: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// List the CPU and the graphics adapters.
    Devices(Devices),
    /// Show a model folder: architecture, head, scoring rule, dtypes, bytes, tensors.
    Inspect(Inspect),
    /// Sample answers to prompts.
    Sample(Box<Sample>),
    /// Log-probabilities of given texts.
    Logprobs(Logprobs),
    /// Score texts, answers or conversations.
    Score(Score),
}

#[derive(ClapArgs)]
pub struct Devices {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
pub struct Inspect {
    /// The model folder.
    pub model: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Flags that every command with a model takes.
#[derive(ClapArgs)]
pub struct Common {
    /// The model folder: config.json, safetensors, tokenizer.json.
    #[arg(long)]
    pub model: PathBuf,
    /// auto, cpu, gpu, or gpu:PART of an adapter's name.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// How products are computed.
    #[arg(long, value_enum, default_value = "auto")]
    pub precision: PrecisionArg,
    /// How the weights of products are held; `int8` quantises them on load.
    #[arg(long, value_enum, default_value = "stored")]
    pub weights: WeightsArg,
    /// Write results here instead of stdout; the file appears when it is complete.
    #[arg(long, value_name = "F.jsonl")]
    pub out: Option<PathBuf>,
    /// Threads of the CPU backend [default: one a core].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Rows of a step at most [default: 1024].
    #[arg(long)]
    pub max_batch_tokens: Option<usize>,
    /// Bytes the model may allocate, with an optional suffix K, M or G (1024-based).
    #[arg(long, value_parser = bytes)]
    pub memory: Option<u64>,
    /// Read the weights into memory instead of mapping the files.
    #[arg(long)]
    pub no_mmap: bool,
    /// Longest sequence [default: what config.json says].
    #[arg(long)]
    pub max_context: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum PrecisionArg {
    /// Inputs of products may be rounded to bf16 where weights are bf16 and the processor gains by it.
    Auto,
    /// Inputs keep at least 16 bits of mantissa.
    F32,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum WeightsArg {
    /// As in the checkpoint.
    Stored,
    /// 8 bits, symmetric, one scale for 64 elements of a row: for decoding few sequences, which is bound by memory.
    Int8,
}

impl Common {
    /// Opens the runtime and loads the model.
    pub fn load(&self) -> Result<Model> {
        let runtime = Runtime::open(&RuntimeOptions { device: self.device.clone(), threads: self.threads })?;
        let mut options = ModelOptions {
            precision: match self.precision {
                PrecisionArg::Auto => Precision::Auto,
                PrecisionArg::F32 => Precision::F32,
            },
            weights: match self.weights {
                WeightsArg::Stored => WeightFormat::Stored,
                WeightsArg::Int8 => WeightFormat::Int8,
            },
            max_batch_tokens: self.max_batch_tokens,
            memory: self.memory,
            max_context: self.max_context,
            ..ModelOptions::default()
        };
        options.load.use_mmap = !self.no_mmap;
        runtime.load_model(&self.model, &options)
    }
}

#[derive(ClapArgs)]
pub struct Sample {
    #[command(flatten)]
    pub common: Common,
    /// JSON Lines with prompt, prompt_ids or messages.
    #[arg(long, value_name = "F.jsonl", required_unless_present = "prompt", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// One prompt.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Samples of each prompt.
    #[arg(short, default_value_t = 1)]
    pub n: usize,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 is greedy.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub temperature: f32,
    /// Keep the K most likely tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the most likely tokens that hold this much of the probability.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    pub min_p: f32,
    /// Divide (or multiply, if negative) the logits of tokens that occurred.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Key of the random numbers; sample j of prompt i draws from stream (seed, i, j).
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Text that ends an answer; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Go on after the model's end-of-sequence token.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Report the K most likely tokens at each place.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub logprobs: usize,
}

#[derive(ClapArgs)]
pub struct Logprobs {
    #[command(flatten)]
    pub common: Common,
    /// JSON Lines with a prompt and its completion, or text or ids.
    #[arg(long, value_name = "F.jsonl")]
    pub input: PathBuf,
    /// Report the K most likely tokens at each place.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top: usize,
    /// Report the entropy at each place.
    #[arg(long)]
    pub entropy: bool,
}

#[derive(ClapArgs)]
pub struct Score {
    #[command(flatten)]
    pub common: Common,
    /// JSON Lines with messages, a prompt and its completion, or text or ids.
    #[arg(long, value_name = "F.jsonl")]
    pub input: PathBuf,
    /// sequence, or judge:LABEL,LABEL[,…] [default: what the checkpoint's head implies].
    #[arg(long, value_parser = rule)]
    pub rule: Option<Rule>,
}

fn rule(text: &str) -> Result<Rule> {
    Rule::parse(text)
}

fn bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        other => return Err(format!("unknown suffix {other:?}; K, M and G are known")),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{digits:?}: {e}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}
