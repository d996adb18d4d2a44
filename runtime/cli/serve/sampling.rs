//! The fields that chat and text completions share, as a [`SampleRequest`].

use std::collections::BTreeMap;

use rewardrt::{Guide, SampleRequest};
use serde::Deserialize;
use serde_json::{Number, Value, json};

use super::error::{ApiError, ApiResult};
use super::fields::{Fields, OneOrMany};
use super::respond::random;

/// Fields that name who asks or how it is billed, kept or routed: they cannot change an answer here.
const IGNORED: [&str; 10] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "parallel_tool_calls",
    "request_id",
];

/// Drawn seeds are integers that a JSON number is in every language.
const MAX_DRAWN: u64 = (1 << 53) - 1;

/// What is asked for, the prompts aside.
pub struct Asked {
    pub model: Option<String>,
    pub request: SampleRequest,
    /// As far as it is given; else the endpoint says.
    pub max_tokens: Option<usize>,
    pub return_token_ids: bool,
    /// A last chunk with the usage.
    pub stream_usage: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    /// Padding against an attack on encrypted streams; there is none here.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

impl Asked {
    /// Takes the shared fields, the number of alternatives a token apart.
    pub fn read(fields: &mut Fields) -> ApiResult<Self> {
        fields.ignore(&IGNORED);
        fields.ignore_if(&[("tools", json!([])), ("skip_special_tokens", json!(true))]);
        let seed = fields.take::<Number>("seed")?;
        let seed = match &seed {
            None => random() & MAX_DRAWN,
            Some(n) => n.as_u64().or_else(|| n.as_i64().map(i64::cast_unsigned)).ok_or_else(|| {
                ApiError::field("seed", format!("it is {n}, it must be an integer from -2^63 to 2^64 - 1"))
            })?,
        };
        let stream_options: Option<StreamOptions> = fields.take("stream_options")?;
        let default = SampleRequest::default();
        let request = SampleRequest {
            n: fields.take("n")?.unwrap_or(1),
            temperature: fields.take("temperature")?.unwrap_or(1.0),
            top_p: fields.take("top_p")?.unwrap_or(1.0),
            top_k: top_k(fields)?,
            min_p: fields.take("min_p")?.unwrap_or(0.0),
            typical_p: fields.take("typical_p")?.unwrap_or(1.0),
            repetition_penalty: fields.take("repetition_penalty")?.unwrap_or(1.0),
            presence_penalty: fields.take("presence_penalty")?.unwrap_or(0.0),
            frequency_penalty: fields.take("frequency_penalty")?.unwrap_or(0.0),
            logit_bias: logit_bias(fields)?,
            allowed_ids: fields.take("allowed_token_ids")?,
            guide: guide(fields)?,
            seed,
            stop: fields.take::<OneOrMany<String>>("stop")?.map(OneOrMany::into_vec).unwrap_or_default(),
            stop_ids: fields.take("stop_token_ids")?.unwrap_or_default(),
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            min_tokens: fields.take("min_tokens")?.unwrap_or(0),
            stream: fields.take("stream")?.unwrap_or(false),
            ..default
        };
        if stream_options.is_some() && !request.stream {
            return Err(ApiError::field("stream_options", "it is for requests with stream: true"));
        }
        Ok(Asked {
            model: fields.take("model")?,
            request,
            max_tokens: fields.take("max_tokens")?,
            return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
            stream_usage: stream_options.unwrap_or_default().include_usage.unwrap_or(false),
        })
    }
}

/// -1 and 0 mean all.
fn top_k(fields: &mut Fields) -> ApiResult<usize> {
    let top_k: i64 = fields.take("top_k")?.unwrap_or(0);
    let wrong = |_| ApiError::field("top_k", format!("it is {top_k}, it must be 0 or greater, or -1"));
    usize::try_from(if top_k == -1 { 0 } else { top_k }).map_err(wrong)
}

fn logit_bias(fields: &mut Fields) -> ApiResult<Vec<(u32, f32)>> {
    let biases: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let one = |(token, bias): (String, f32)| {
        let id = token.parse().map_err(|_| ApiError::field("logit_bias", format!("{token:?} is not a token id")))?;
        Ok((id, bias))
    };
    biases.into_iter().map(one).collect()
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    Text {},
    JsonObject {},
    JsonSchema { json_schema: JsonSchema },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonSchema {
    schema: Value,
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(rename = "description")]
    _description: Option<String>,
    /// Every schema is kept to the letter.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// vLLM's `structured_outputs`.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum StructuredOutputs {
    Json(Value),
    Regex(String),
    Grammar(String),
    Choice(Vec<String>),
}

fn guide(fields: &mut Fields) -> ApiResult<Option<Guide>> {
    let format: Option<ResponseFormat> = fields.take("response_format")?;
    let structured: Option<StructuredOutputs> = fields.take("structured_outputs")?;
    let from_format = match format {
        None | Some(ResponseFormat::Text {}) => None,
        Some(ResponseFormat::JsonObject {}) => Some(Guide::JsonSchema(json!({"type": "object"}).to_string())),
        Some(ResponseFormat::JsonSchema { json_schema }) => Some(Guide::JsonSchema(json_schema.schema.to_string())),
    };
    let read = |s| -> ApiResult<Guide> {
        Ok(match s {
            // A schema may come as text.
            StructuredOutputs::Json(Value::String(text)) => Guide::JsonSchema(text),
            StructuredOutputs::Json(schema) => Guide::JsonSchema(schema.to_string()),
            StructuredOutputs::Regex(regex) => Guide::Regex(regex),
            StructuredOutputs::Grammar(grammar) => Guide::Grammar(grammar),
            StructuredOutputs::Choice(choices) => Guide::choices(&choices)?,
        })
    };
    let from_structured = structured.map(read).transpose()?;
    match (from_format, from_structured) {
        (Some(_), Some(_)) => Err(ApiError::field("structured_outputs", "response_format asks for something too")),
        (format, structured) => Ok(format.or(structured)),
    }
}
