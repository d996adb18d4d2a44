//! POST /v1/chat/completions and /v1/completions.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use rewardrt::{Finish, JobStats, Message, SampleRequest, SampledSequence};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::App;
use super::encode::Encoder;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, Prompts};
use super::models::Served;
use super::respond::{PromptDetails, Usage, identifier, json_response, now};
use super::sampling::Asked;
use super::shape::{Choice, Content, Reply, Shape, Span, Speller, finish_reason, stop_reason};
use super::stream::stream;
use super::ticket::Ticket;
use super::wait::{Waiting, blocking};

/// Alternatives that a completion asks for at most, as in OpenAI and vLLM.
const MAX_TOP: usize = 20;

/// What an answer is written with.
pub struct Writer {
    pub shape: Shape,
    pub served: Arc<Served>,
    pub prompts: Vec<Vec<u32>>,
    pub n: usize,
    pub seed: u64,
    /// Alternatives a token; `None`: no log-probs.
    pub logprobs: Option<usize>,
    pub return_token_ids: bool,
    pub stream_usage: bool,
    id: String,
    created: u64,
    fingerprint: String,
}

impl Writer {
    /// An answer without choices.
    pub fn reply(&self, object: &'static str) -> Reply {
        Reply {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.served.name.clone(),
            system_fingerprint: self.fingerprint.clone(),
            seed: self.seed,
            weight_version: None,
            prompt_token_ids: None,
            choices: Vec::new(),
            usage: None,
        }
    }

    /// The only prompt's ids, for the answer as a whole (chat), or those of a choice (text).
    pub fn prompt_ids(&self, shape: Shape, prompt: usize) -> Option<Vec<u32>> {
        (self.return_token_ids && self.shape == shape).then(|| self.prompts[prompt].clone())
    }

    pub fn usage(&self, completion_tokens: usize, cached_tokens: u64) -> Usage {
        let prompt_tokens = self.prompts.iter().map(Vec::len).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: Some(PromptDetails { cached_tokens }),
        }
    }

    /// The log-probs of an answer's next tokens, if they are asked for.
    ///
    /// # Errors
    /// If the model has no tokenizer to spell them.
    pub fn logprobs(
        &self,
        speller: &mut Speller,
        tokens: &[rewardrt::SampledToken],
    ) -> ApiResult<Option<super::shape::Logprobs>> {
        let Some(top) = self.logprobs else { return Ok(None) };
        let tokenizer = self.served.model.tokenizer()?;
        Ok(Some(speller.logprobs(self.shape, tokenizer, tokens, top)))
    }

    fn whole(&self, answers: Vec<SampledSequence>, stats: JobStats) -> ApiResult<Reply> {
        let object = if self.shape == Shape::Chat { "chat.completion" } else { "text_completion" };
        let mut reply = self.reply(object);
        reply.weight_version = answers.last().map(|a| a.weight_version);
        reply.prompt_token_ids = self.prompt_ids(Shape::Chat, 0);
        let completion_tokens = answers.iter().map(|a| a.tokens.len()).sum();
        reply.usage = Some(Some(self.usage(completion_tokens, stats.rows.cached)));
        let mut taken = vec![0; self.prompts.len()];
        for answer in answers {
            if answer.finish == Finish::Cancelled {
                return Err(ApiError::internal("an answer was cancelled before its end"));
            }
            let mut speller = Speller::after(&self.prompts[answer.prompt]);
            let logprobs = self.logprobs(&mut speller, &answer.tokens)?;
            let text = answer.text.unwrap_or_default();
            let content = match self.shape {
                Shape::Chat => Content::Message { role: "assistant", content: text, refusal: None },
                Shape::Text => Content::Text(text),
            };
            // With best_of an answer's number is not its place.
            let place = taken[answer.prompt];
            taken[answer.prompt] += 1;
            reply.choices.push(Choice {
                index: answer.prompt * self.n + place,
                content,
                logprobs,
                finish_reason: Some(finish_reason(answer.finish)),
                stop_reason: stop_reason(answer.finish),
                token_ids: self.return_token_ids.then(|| answer.tokens.iter().map(|t| t.id).collect()),
                prompt_token_ids: self.prompt_ids(Shape::Text, answer.prompt),
                weight_versions: match &answer.versions[..] {
                    [_, _, ..] => answer.versions.iter().map(Span::from).collect(),
                    _ => Vec::new(),
                },
            });
        }
        Ok(reply)
    }
}

/// What is left to do when the fields are read: encode, queue, wait, write.
struct Order {
    shape: Shape,
    asked: Asked,
    logprobs: Option<usize>,
    /// Where `max_tokens` is not given; `None`: what the context allows.
    default_max_tokens: Option<usize>,
}

/// Tokens that a request may come to, each with its alternatives.
fn size(app: &App, served: &Served, request: &SampleRequest) -> ApiResult<usize> {
    let context = served.model.max_context();
    let drawn = request.best_of.unwrap_or(request.n);
    let whole = |prompt: &Vec<u32>| prompt.len().saturating_add(request.max_tokens).min(context).saturating_mul(drawn);
    let answers = request.prompts.iter().map(whole).fold(0, usize::saturating_add);
    let tokens = answers.saturating_mul(1 + request.top_logprobs);
    let most = app.max_queued_tokens;
    if tokens > most {
        let message = format!(
            "the answers can come to {tokens} tokens, alternatives included; at most {most} are taken (--max-queued-tokens)"
        );
        return Err(ApiError::field("n", message));
    }
    Ok(tokens)
}

async fn run(
    app: Arc<App>,
    ticket: Arc<Ticket>,
    order: Order,
    encode: impl FnOnce(&Encoder) -> ApiResult<Vec<Vec<u32>>> + Send + 'static,
) -> ApiResult<Response> {
    let Order { shape, asked, logprobs, default_max_tokens } = order;
    let served = app.models.policy(asked.model.as_deref())?;
    let mut request = asked.request;
    let (fingerprint, max_queued_tokens) = (app.fingerprint.clone(), app.max_queued_tokens);
    let (served, request, tokens) = blocking(&ticket, move |wanted| {
        let model = &served.model;
        if logprobs.is_some() {
            // To spell tokens, which is better known before they are sampled.
            model.tokenizer()?;
        }
        request.prompts = encode(&Encoder { served: &served, max_queued_tokens, wanted })?;
        request.top_logprobs = logprobs.unwrap_or(0);
        let longest = request.prompts.iter().map(Vec::len).max().unwrap_or(0);
        let room = model.max_context().min(model.kv_tokens()).saturating_sub(longest).max(1);
        request.max_tokens = asked.max_tokens.or(default_max_tokens).unwrap_or(room);
        let tokens = size(&app, &served, &request)?;
        Ok((served, request, tokens))
    })
    .await?;
    ticket.charge_tokens(tokens).await?;
    let streamed = request.stream;
    let (writer, job) = blocking(&ticket, move |_| {
        let job = served.model.sample(&request)?;
        let writer = Writer {
            shape,
            n: request.n,
            seed: request.seed,
            prompts: request.prompts,
            logprobs,
            return_token_ids: asked.return_token_ids,
            stream_usage: asked.stream_usage,
            id: identifier(if shape == Shape::Chat { "chatcmpl" } else { "cmpl" }),
            created: now(),
            fingerprint,
            served,
        };
        Ok((writer, job))
    })
    .await?;
    let waiting = Waiting::new(job);
    if streamed {
        return Ok(stream(writer, waiting, ticket).into_response());
    }
    let (answers, stats) = waiting.result().await?;
    blocking(&ticket, move |_| Ok(json_response(StatusCode::OK, &writer.whole(answers, stats)?))).await
}

/// A message's content: text, or parts of text.
fn text_of(at: &str, content: Value) -> ApiResult<String> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => {
            let text = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text.to_owned()),
                (kind, _) => Err(ApiError::field(at, format!("a part of type {kind:?}; only text is supported"))),
            };
            parts.iter().map(text).collect()
        }
        other => Err(ApiError::field(at, format!("it is {other}, it must be a string or a list of text parts"))),
    }
}

/// Messages as the chat template takes them: a role and a text.
pub fn messages(list: Vec<Map<String, Value>>) -> ApiResult<Vec<Message>> {
    let one = |(i, mut message): (usize, Map<String, Value>)| {
        let at = |field: &str| format!("messages[{i}].{field}");
        // An answer that a client sends back has these, empty.
        message.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
        let role = message.remove("role").ok_or_else(|| ApiError::field(at("role"), "it is missing"))?;
        let role = String::deserialize(role).map_err(|e| ApiError::field(at("role"), e.to_string()))?;
        let content = message.remove("content").ok_or_else(|| ApiError::field(at("content"), "it is missing"))?;
        let content = text_of(&at("content"), content)?;
        match message.keys().next() {
            Some(other) => Err(ApiError::field(at(other), "this field is not supported")),
            None => Ok(Message { role, content }),
        }
    };
    list.into_iter().enumerate().map(one).collect()
}

/// POST /v1/chat/completions.
pub async fn chat(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    mut fields: Fields,
) -> ApiResult<Response> {
    let messages = messages(fields.need("messages")?)?;
    if messages.is_empty() {
        return Err(ApiError::field("messages", "it is empty, there must be at least one"));
    }
    let mut asked = Asked::read(&mut fields)?;
    if let Some(most) = fields.take("max_completion_tokens")?
        && asked.max_tokens.replace(most).is_some_and(|other| other != most)
    {
        return Err(ApiError::field("max_tokens", "it differs from max_completion_tokens"));
    }
    let wanted: bool = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<usize> = fields.take("top_logprobs")?;
    let logprobs = match (wanted, top) {
        (false, Some(1..)) => return Err(ApiError::field("top_logprobs", "it needs logprobs: true")),
        (false, _) => None,
        (true, top) => Some(top.unwrap_or(0)),
    };
    check_top("top_logprobs", logprobs)?;
    let add_generation_prompt = fields.take("add_generation_prompt")?.unwrap_or(true);
    fields.ignore_if(&[
        ("tool_choice", json!("none")),
        ("modalities", json!(["text"])),
        ("continue_final_message", json!(false)),
        ("add_special_tokens", json!(false)),
    ]);
    fields.finish()?;
    let order = Order { shape: Shape::Chat, asked, logprobs, default_max_tokens: None };
    run(app, ticket, order, move |encoder| encoder.chat(&messages, add_generation_prompt)).await
}

/// POST /v1/completions.
pub async fn text(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    mut fields: Fields,
) -> ApiResult<Response> {
    /// OpenAI's.
    const DEFAULT_MAX_TOKENS: usize = 16;
    let prompts: Prompts = fields.need("prompt")?;
    let mut asked = Asked::read(&mut fields)?;
    let logprobs = fields.take("logprobs")?;
    check_top("logprobs", logprobs)?;
    asked.request.best_of = fields.take("best_of")?;
    if asked.request.stream && asked.request.best_of.is_some_and(|best_of| best_of > asked.request.n) {
        return Err(ApiError::field(
            "best_of",
            "the best answers are known at the end only: it does not go with stream",
        ));
    }
    let add_special = fields.take("add_special_tokens")?.unwrap_or(true);
    fields.ignore_if(&[("echo", json!(false)), ("suffix", json!(""))]);
    fields.finish()?;
    let order = Order { shape: Shape::Text, asked, logprobs, default_max_tokens: Some(DEFAULT_MAX_TOKENS) };
    run(app, ticket, order, move |encoder| encoder.prompts("prompt", prompts, add_special)).await
}

fn check_top(field: &str, top: Option<usize>) -> ApiResult<()> {
    match top {
        Some(top) if top > MAX_TOP => {
            Err(ApiError::field(field, format!("it is {top}, at most {MAX_TOP} are allowed")))
        }
        _ => Ok(()),
    }
}
