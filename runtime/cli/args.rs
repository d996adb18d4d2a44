//! Flags.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use rewardrt::weights::{Dtype, WeightFormat};
use rewardrt::{
    Adapter, AdapterOptions, Advantage, Error, ErrorKind, Model, ModelOptions, Precision, Result, Rule, Runtime,
    RuntimeOptions, Scheduling,
};

use crate::sampling::Sampling;

/// Samples from language models and scores what was sampled.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
    /// Say on stderr what is loaded, how large it is, and what sampling cost.
    #[arg(long, short, global = true)]
    pub verbose: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// List the CPU and the graphics adapters.
    Devices(Devices),
    /// Show a model folder: architecture, head, scoring rule, dtypes, bytes, tensors. Or an adapter folder: its fields and
    /// tensors.
    Inspect(Inspect),
    /// Sample answers to prompts.
    Sample(Box<Sample>),
    /// One step of online RL: sample answers, compare them with a reference, score them, and say what each is worth.
    Rollout(Box<Rollout>),
    /// Log-probabilities of given texts.
    Logprobs(Logprobs),
    /// Score texts, answers or conversations.
    Score(Score),
    /// Write a checkpoint of random weights with the shapes that a config.json asks for; it has no tokenizer.
    Synth(Synth),
    /// Time sampling and scoring of random tokens, and the kernels they run.
    Bench(Bench),
    /// Write what changed between two checkpoints, as slime does for its weight updates.
    Diff(Diff),
    /// Serve completions and scores over HTTP.
    #[cfg(feature = "serve")]
    Serve(Box<crate::serve::Serve>),
}

#[derive(ClapArgs)]
pub struct Devices {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs)]
pub struct Inspect {
    /// The model or adapter folder.
    pub model: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// A model, and how it is loaded.
#[derive(ClapArgs)]
pub struct Common {
    /// The model folder: config.json, safetensors, tokenizer.json.
    #[arg(long)]
    pub model: PathBuf,
    #[command(flatten)]
    pub loading: Loading,
    /// Write results here instead of stdout; the file appears when it is complete.
    #[arg(long, value_name = "F.jsonl")]
    pub out: Option<PathBuf>,
}

/// Flags that every command with models takes.
#[derive(ClapArgs)]
pub struct Loading {
    /// auto, cpu, gpu, or gpu:PART of an adapter's name.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// How products are computed.
    #[arg(long, value_enum, default_value = "auto")]
    pub precision: PrecisionArg,
    /// How the weights of products are held; `int8` and `int4` quantise them on load.
    #[arg(long, value_enum, default_value = "stored")]
    pub weights: WeightsArg,
    /// Threads of the CPU backend [default: one a core].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Rows of a step at most [default: 1024].
    #[arg(long)]
    pub max_batch_tokens: Option<usize>,
    /// Positions in the KV cache [default: 32768, or what 4 GiB (1 GiB on a GPU) and --memory hold].
    #[arg(long)]
    pub kv_tokens: Option<usize>,
    /// Bytes the model may allocate, with an optional suffix K, M or G (1024-based).
    #[arg(long, value_parser = bytes)]
    pub memory: Option<u64>,
    /// Read the weights into memory instead of mapping the files.
    #[arg(long)]
    pub no_mmap: bool,
    /// Keep compiled shaders in this folder, for a quicker start on a GPU.
    #[arg(long, value_name = "DIR")]
    pub shader_cache: Option<PathBuf>,
    /// Decode steps between two looks at what was drawn; results do not depend on it [default: 8 on a GPU, 1 on the CPU].
    #[arg(long, value_name = "N")]
    pub steps_at_once: Option<usize>,
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
    /// 4 bits, one scale for 32 elements: two thirds of the bytes of `int8`, at a loss.
    Int4,
}

impl Common {
    /// Opens the runtime and loads the model.
    pub fn load(&self) -> Result<Model> {
        self.loading.load(&self.loading.open()?, &self.model, self.loading.kv_tokens)
    }
}

impl Loading {
    /// Opens the runtime alone.
    pub fn open(&self) -> Result<Runtime> {
        Runtime::open(&self.runtime_options())
    }

    pub fn runtime_options(&self) -> RuntimeOptions {
        let mut options =
            RuntimeOptions { device: self.device.clone(), threads: self.threads, ..RuntimeOptions::default() };
        options.gpu.shader_cache = self.shader_cache.clone();
        options
    }

    /// Loads a model with this many positions in its KV cache.
    pub fn load(&self, runtime: &Runtime, model: &Path, kv_tokens: Option<usize>) -> Result<Model> {
        let mut options = ModelOptions {
            precision: match self.precision {
                PrecisionArg::Auto => Precision::Auto,
                PrecisionArg::F32 => Precision::F32,
            },
            weights: match self.weights {
                WeightsArg::Stored => WeightFormat::Stored,
                WeightsArg::Int8 => WeightFormat::Int8,
                WeightsArg::Int4 => WeightFormat::Int4,
            },
            max_batch_tokens: self.max_batch_tokens,
            memory: self.memory,
            kv_tokens,
            max_context: self.max_context,
            steps_at_once: self.steps_at_once,
            ..ModelOptions::default()
        };
        options.load.use_mmap = !self.no_mmap;
        runtime.load_model(model, &options)
    }
}

/// Whose weights come on top of the model's.
#[derive(ClapArgs)]
pub struct AdapterArgs {
    /// A LoRA adapter of the model: a folder that PEFT wrote.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

impl AdapterArgs {
    /// Loads it, if there is one.
    pub fn load(&self, model: &Model) -> Result<Option<Adapter>> {
        self.adapter.as_ref().map(|folder| model.load_adapter(folder, &AdapterOptions::default())).transpose()
    }
}

#[derive(ClapArgs)]
pub struct Sample {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    pub adapter: AdapterArgs,
    /// JSON Lines with prompt, prompt_ids or messages.
    #[arg(long, value_name = "F.jsonl", required_unless_present = "prompt", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// One prompt.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Samples of each prompt.
    #[arg(short, default_value_t = 1)]
    pub n: usize,
    /// Draw this many samples of each prompt and return the n with the highest mean model log-probability, best first.
    #[arg(long, value_name = "N")]
    pub best_of: Option<usize>,
    #[command(flatten)]
    pub sampling: Sampling,
    /// Guess up to K tokens ahead (at most 16) where the text repeats itself; the result is the same.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub speculate: usize,
    /// Report the K most likely tokens at each place.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub logprobs: usize,
    /// Report the entropy at each place.
    #[arg(long)]
    pub entropy: bool,
    /// Report how many tokens could be drawn at each place, the smallest and largest (logit / temperature) among them, and
    /// their ids where there are at most K (1024 at most).
    #[arg(long, value_name = "K")]
    pub kept: Option<usize>,
    /// Report the time of each answer's parts.
    #[arg(long)]
    pub timing: bool,
    /// Print the answers' text as it is sampled; JSON goes to --out alone.
    #[arg(long, conflicts_with = "best_of")]
    pub stream: bool,
    #[command(flatten)]
    pub scheduling: SchedulingArgs,
}

/// When the work stops.
#[derive(ClapArgs)]
pub struct SchedulingArgs {
    /// Seconds that a job of up to 512 sequences may take; then its answers end with what they have.
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub deadline: Option<f64>,
}

impl SchedulingArgs {
    pub fn scheduling(&self) -> Result<Scheduling> {
        let seconds = |s: f64| {
            Duration::try_from_secs_f64(s).map_err(|e| {
                Error::new(ErrorKind::Argument, format!("--deadline {s}: {e}; it must be seconds from 0 on"))
            })
        };
        Ok(Scheduling { deadline: self.deadline.map(seconds).transpose()?, ..Scheduling::default() })
    }
}

#[derive(ClapArgs)]
pub struct Rollout {
    /// The model that samples: a folder with config.json, safetensors and, for texts, tokenizer.json.
    #[arg(long, value_name = "MODEL")]
    pub policy: PathBuf,
    #[command(flatten)]
    pub adapter: AdapterArgs,
    /// Compare with this model's log-probabilities.
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<PathBuf>,
    /// Compare with those of the policy without its adapter.
    #[arg(long, conflicts_with = "reference", requires = "adapter")]
    pub reference_base: bool,
    /// Score with this model, under RULE (sequence, judge:LABEL,LABEL[,…]) or what its head implies; may be given more than
    /// once. NAME is what results call it [default: the folder's].
    #[arg(long, value_name = "[NAME=]MODEL[:RULE]", value_parser = reward)]
    pub reward: Vec<RewardArg>,
    /// Parts of the rewards in the sum, in the order of --reward [default: 1 each].
    #[arg(long, value_name = "W,W…", value_delimiter = ',', allow_hyphen_values = true)]
    pub reward_weights: Vec<f32>,
    /// What judges are asked: {prompt} and {answer} stand for the texts [default: they read prompt and answer].
    #[arg(long, value_name = "TEXT")]
    pub question: Option<String>,
    /// How rewards become advantages.
    #[arg(long, value_enum, default_value = "grpo")]
    pub advantage: AdvantageArg,
    /// Bring the sum of the rewards into this range.
    #[arg(long, value_name = "LOW,HIGH", value_parser = range, allow_hyphen_values = true)]
    pub clip_reward: Option<(f32, f32)>,
    /// JSON Lines with prompt, prompt_ids or messages: the prompts of one step.
    #[arg(long, value_name = "F.jsonl")]
    pub prompts: PathBuf,
    /// Samples of each prompt.
    #[arg(short, default_value_t = 8)]
    pub n: usize,
    #[command(flatten)]
    pub sampling: Sampling,
    /// Write results here instead of stdout; the file appears when it is complete.
    #[arg(long, value_name = "F.jsonl")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub loading: Loading,
}

/// A reward model of the command line.
#[derive(Clone)]
pub struct RewardArg {
    name: Option<String>,
    pub model: PathBuf,
    pub rule: Option<Rule>,
}

impl RewardArg {
    /// The name given, or the folder's.
    pub fn name(&self) -> String {
        let folder = || self.model.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        self.name.clone().unwrap_or_else(folder)
    }

    pub fn is_judge(&self) -> bool {
        matches!(self.rule, Some(Rule::Judge { .. }))
    }
}

/// The rule begins after the first colon behind which there is one.
pub fn reward(text: &str) -> Result<RewardArg> {
    let (name, model) = match text.split_once('=') {
        Some((name, model)) if !name.contains(['/', ':']) => (Some(name.to_owned()), model),
        _ => (None, text),
    };
    let parsed = |(at, _): (usize, &str)| Rule::parse(&model[at + 1..]).ok().map(|rule| (&model[..at], Some(rule)));
    let (model, rule) = model.match_indices(':').find_map(parsed).unwrap_or((model, None));
    if model.is_empty() || name.as_ref().is_some_and(String::is_empty) {
        return Err(Error::new(ErrorKind::Argument, format!("{text:?} must be [NAME=]MODEL[:RULE]")));
    }
    Ok(RewardArg { name, model: model.into(), rule })
}

fn range(text: &str) -> std::result::Result<(f32, f32), String> {
    let (low, high) = text.split_once(',').ok_or("it must be LOW,HIGH")?;
    let number = |n: &str| n.parse::<f32>().map_err(|e| format!("{n:?}: {e}; it must be LOW,HIGH"));
    Ok((number(low)?, number(high)?))
}

#[derive(Clone, Copy, ValueEnum)]
pub enum AdvantageArg {
    /// (r − mean) / (std + 1e-4) over the answers to a prompt.
    Grpo,
    /// r − mean over the answers to a prompt.
    DrGrpo,
    /// r − the mean of the other answers to the prompt.
    Rloo,
    /// (r − mean) / (std + 1e-4) over all answers.
    Batch,
    /// r itself.
    None,
}

impl From<AdvantageArg> for Advantage {
    fn from(advantage: AdvantageArg) -> Self {
        match advantage {
            AdvantageArg::Grpo => Advantage::Group,
            AdvantageArg::DrGrpo => Advantage::Centred,
            AdvantageArg::Rloo => Advantage::LeaveOneOut,
            AdvantageArg::Batch => Advantage::Batch,
            AdvantageArg::None => Advantage::None,
        }
    }
}

#[derive(ClapArgs)]
pub struct Logprobs {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten)]
    pub adapter: AdapterArgs,
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
    #[command(flatten)]
    pub adapter: AdapterArgs,
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

pub fn bytes(text: &str) -> std::result::Result<u64, String> {
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

#[derive(ClapArgs)]
pub struct Synth {
    /// The config.json.
    pub config: PathBuf,
    /// The model folder to make; it must not exist, the one above it must.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The same seed gives the same weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How the weights are stored.
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: DtypeArg,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DtypeArg {
    Bf16,
    F16,
    F32,
}

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::Bf16 => Dtype::BF16,
            DtypeArg::F16 => Dtype::F16,
            DtypeArg::F32 => Dtype::F32,
        }
    }
}

#[derive(ClapArgs)]
pub struct Bench {
    #[command(flatten)]
    pub common: Common,
    /// Sequences that are decoded at a time, one job each.
    #[arg(long, value_name = "N,N…", value_delimiter = ',', default_values_t = [1, 8, 64])]
    pub sequences: Vec<usize>,
    /// Random tokens of each prompt.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub prompt_tokens: usize,
    /// Tokens to generate after each prompt.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub tokens: usize,
    /// Texts × tokens whose log-probabilities are computed (or scores, with a score head).
    #[arg(long, value_name = "BxL", value_parser = shape, default_value = "16x256")]
    pub score: (usize, usize),
    /// Load N random LoRA adapters, whose sequences share the steps; 0: the model alone.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub adapters: usize,
    /// Rank of the adapters.
    #[arg(long, value_name = "R", default_value_t = 16)]
    pub adapter_rank: usize,
    /// Timed runs of each job; the median counts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Run each job once more and time every kernel; measure what the device can do.
    #[arg(long)]
    pub profile: bool,
    /// Let the order of additions on a GPU's matrix units depend on how many rows a step has: what the determinism costs.
    #[arg(long)]
    pub batch_variant: bool,
    /// Print a JSON object a job.
    #[arg(long)]
    pub json: bool,
}

fn shape(text: &str) -> std::result::Result<(usize, usize), String> {
    let (texts, tokens) = text.split_once('x').ok_or("it must be BxL, as in 16x256")?;
    let number = |n: &str| n.parse().map_err(|e| format!("{n:?}: {e}; it must be BxL, as in 16x256"));
    Ok((number(texts)?, number(tokens)?))
}

#[derive(ClapArgs)]
pub struct Diff {
    /// The checkpoint that receivers have: a folder or a .safetensors file.
    pub old: PathBuf,
    /// The checkpoint that they are to have, with the same tensors.
    pub new: PathBuf,
    /// The folder to make; slime wants weight_vNNNNNN. It appears when it is complete.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How the delta holds what changed.
    #[arg(long, value_enum, default_value = "xor")]
    pub encoding: EncodingArg,
    /// Version of the old checkpoint [default: one below --version, or 0].
    #[arg(long, value_name = "N")]
    pub base_version: Option<u64>,
    /// Version of the new checkpoint [default: one above --base-version, or 1].
    #[arg(long, value_name = "N")]
    pub version: Option<u64>,
    /// Level of zstd, from 1 to 19.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub level: i32,
    /// Threads [default: one a core].
    #[arg(long)]
    pub threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum EncodingArg {
    /// new XOR old: the smaller one.
    Xor,
    /// Positions and values of changed bytes: may be applied twice.
    Overwrite,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rewards_have_a_name_a_model_and_a_rule() {
        let parsed = |text: &str| {
            let arg = reward(text).map_err(|e| e.to_string())?;
            Ok::<_, String>((arg.name(), arg.model.display().to_string(), arg.rule.map(|rule| rule.to_string())))
        };
        let ok = |name: &str, model: &str, rule: Option<&str>| Ok((name.into(), model.into(), rule.map(str::to_owned)));
        assert_eq!(parsed("models/rm"), ok("rm", "models/rm", None));
        assert_eq!(parsed("models/rm:sequence"), ok("rm", "models/rm", Some("sequence")));
        assert_eq!(parsed("j=models/rm:judge: yes, no"), ok("j", "models/rm", Some("judge: yes, no")));
        assert_eq!(parsed("C:rm/x:judge"), ok("x", "C:rm/x", Some("judge:yes,no")));
        assert_eq!(parsed("runs/a=1/rm"), ok("rm", "runs/a=1/rm", None));
        for wrong in ["", "=rm", "name=", ":judge"] {
            assert!(parsed(wrong).unwrap_err().contains("[NAME=]MODEL[:RULE]"), "{wrong}");
        }
    }

    #[test]
    fn ranges_have_two_ends() {
        assert_eq!(range("-1.5,2"), Ok((-1.5, 2.0)));
        assert_eq!(range("-inf,2"), Ok((f32::NEG_INFINITY, 2.0)));
        assert!(range("3").is_err() && range("1,x").is_err());
    }
}
