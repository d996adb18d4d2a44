//! Flags of what is sampled, and how.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rewardrt::{Error, ErrorKind, Guide, Result, SampleRequest};

/// How answers are sampled.
#[derive(ClapArgs)]
pub struct Sampling {
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// Until then nothing but a stop string, or a guide that has come to its end, ends an answer.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: usize,
    /// Key of the random numbers; sample j of prompt i draws from stream (seed, i, j).
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub controls: Controls,
    #[command(flatten)]
    pub guide: GuideArgs,
    /// Text that ends an answer; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Token that ends an answer, besides the model's own; may be given more than once.
    #[arg(long, value_name = "ID")]
    pub stop_id: Vec<u32>,
    /// Go on after the model's end-of-sequence token.
    #[arg(long)]
    pub ignore_eos: bool,
}

impl Sampling {
    /// A request without prompts. Reads the guide's file.
    pub fn request(&self, n: usize) -> Result<SampleRequest> {
        let controls = &self.controls;
        Ok(SampleRequest {
            n,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            temperature: controls.temperature,
            top_k: controls.top_k,
            top_p: controls.top_p,
            min_p: controls.min_p,
            typical_p: controls.typical_p,
            repetition_penalty: controls.repetition_penalty,
            presence_penalty: controls.presence_penalty,
            frequency_penalty: controls.frequency_penalty,
            logit_bias: controls.logit_bias.clone(),
            banned_ids: controls.ban.clone(),
            allowed_ids: controls.allow.clone(),
            guide: self.guide.read()?,
            seed: self.seed,
            stop: self.stop.clone(),
            stop_ids: self.stop_id.clone(),
            ignore_eos: self.ignore_eos,
            ..SampleRequest::default()
        })
    }
}

/// What changes the distribution that is sampled from, in the order in which it is applied.
#[derive(ClapArgs)]
pub struct Controls {
    /// Add VALUE to the logit of token ID (-inf bans it); may be given more than once.
    #[arg(long, value_name = "ID=VALUE", value_parser = bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Divide (or multiply, if negative) the logits of tokens that occurred.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Subtract from the logits of tokens that were generated.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    pub presence_penalty: f32,
    /// Subtract from the logits of tokens for each time they were generated.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    pub frequency_penalty: f32,
    /// Tokens that are never drawn.
    #[arg(long, value_name = "ID,ID…", value_delimiter = ',')]
    pub ban: Vec<u32>,
    /// The only tokens that may be drawn.
    #[arg(long, value_name = "ID,ID…", value_delimiter = ',')]
    pub allow: Option<Vec<u32>>,
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
    /// Keep the tokens whose surprise is closest to the expected one, as many as hold this much of the probability.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub typical_p: f32,
}

/// What an answer must be.
#[derive(ClapArgs)]
#[group(multiple = false)]
pub struct GuideArgs {
    /// JSON that satisfies the schema in this file.
    #[arg(long, value_name = "F.json")]
    pub json_schema: Option<PathBuf>,
    /// Text that matches this regular expression as a whole.
    #[arg(long, value_name = "REGEX")]
    pub regex: Option<String>,
    /// Text of the grammar in this file (llguidance's Lark).
    #[arg(long, value_name = "F.lark")]
    pub grammar: Option<PathBuf>,
}

impl GuideArgs {
    /// Reads the guide, if there is one.
    pub fn read(&self) -> Result<Option<Guide>> {
        let text = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|e| {
                let kind = match e.kind() {
                    std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                    std::io::ErrorKind::InvalidData => ErrorKind::Format,
                    _ => ErrorKind::Io,
                };
                Error::new(kind, format!("{}: {e}", path.display()))
            })
        };
        match self {
            GuideArgs { json_schema: Some(path), .. } => text(path).map(|t| Some(Guide::JsonSchema(t))),
            GuideArgs { regex: Some(regex), .. } => Ok(Some(Guide::Regex(regex.clone()))),
            GuideArgs { grammar: Some(path), .. } => text(path).map(|t| Some(Guide::Grammar(t))),
            _ => Ok(None),
        }
    }
}

fn bias(text: &str) -> std::result::Result<(u32, f32), String> {
    let (id, value) = text.split_once('=').ok_or("it must be ID=VALUE")?;
    Ok((id.parse().map_err(|e| format!("{id:?}: {e}"))?, value.parse().map_err(|e| format!("{value:?}: {e}"))?))
}
