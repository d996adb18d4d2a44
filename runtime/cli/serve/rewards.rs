//! Scores in the shapes of other stacks: vLLM's and verl's /classify, SGLang's reward flavour of /v1/embeddings, /score
//! and /rerank, OpenRLHF's remote reward, slime's remote_rm.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rewardrt::{Message, Rule, ScoreRequest, SequenceScore, Steps};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::App;
use super::activation::{Activation, Activations};
use super::completions::messages;
use super::encode::Encoder;
use super::error::{ApiError, ApiResult};
use super::fields::{Fields, OneOrMany, Prompts};
use super::models::{Role, Served};
use super::respond::{Usage, identifier, json_response, now};
use super::ticket::Ticket;
use super::wait::{Waiting, blocking};

/// Scores, and what they are of.
struct Scored {
    served: Arc<Served>,
    rule: Rule,
    activations: Activations,
    scores: Vec<SequenceScore>,
    tokens: usize,
}

impl Scored {
    fn weight_version(&self) -> Option<u64> {
        self.scores.last().map(|s| s.weight_version)
    }

    fn is_judge(&self) -> bool {
        matches!(self.rule, Rule::Judge { .. })
    }

    fn labels(&self) -> usize {
        self.scores.first().map_or(1, |s| s.labels.len())
    }

    /// Every label's value. A judge of two has one, the first one's: it says both, and whoever takes the last value of an
    /// answer for the reward, as verl does, takes the right one. vLLM has it so for such judges (`from_2_way_softmax`).
    fn values(&self, activation: Activation) -> impl Iterator<Item = Vec<f32>> {
        let count = if self.is_judge() && self.labels() == 2 { 1 } else { usize::MAX };
        self.scores.iter().map(move |s| {
            let mut values = activation.apply(&s.score.values);
            values.truncate(count);
            values
        })
    }

    /// One value a sequence, for endpoints that rank.
    ///
    /// # Errors
    /// For a classifier with several labels, of which none is the score.
    fn relevance(&self, activated: bool) -> ApiResult<Vec<f32>> {
        let (name, labels) = (&self.served.name, self.labels());
        if labels > 1 && !self.is_judge() {
            return Err(ApiError::field(
                "model",
                format!("{name} has {labels} labels, this endpoint takes models with one"),
            ));
        }
        let activation = if activated { self.activations.pairs } else { Activation::Identity };
        Ok(self.values(activation).map(|values| values.first().copied().unwrap_or(f32::NAN)).collect())
    }
}

/// Encodes beside the event loop, queues one job, and waits for it.
///
/// A head is read at the last token, whatever that is, as vLLM, SGLang and OpenRLHF do it. (The rule by itself passes over
/// padding, as transformers does, which loses the end of a sequence where pad and end are one token.)
async fn score(
    app: &App,
    ticket: &Arc<Ticket>,
    model: Option<String>,
    encode: impl FnOnce(&Encoder) -> ApiResult<Vec<Vec<u32>>> + Send + 'static,
) -> ApiResult<Scored> {
    let served = app.models.reward(model.as_deref())?;
    let Role::Reward { rule, activations } = &served.role else {
        return Err(ApiError::internal("a policy was taken for a reward model"));
    };
    let (rule, activations, max_queued_tokens) = (rule.clone(), *activations, app.max_queued_tokens);
    let (served, sequences) = blocking(ticket, move |wanted| {
        let sequences = encode(&Encoder { served: &served, max_queued_tokens, wanted })?;
        Ok((served, sequences))
    })
    .await?;
    let tokens = sequences.iter().map(Vec::len).sum();
    ticket.charge_tokens(tokens).await?;
    let last = sequences.iter().map(|s| s.len().checked_sub(1).into_iter().collect()).collect();
    let request =
        ScoreRequest { sequences, rule: Some(rule.clone()), steps: Some(Steps::At(last)), ..ScoreRequest::default() };
    let (served, job) = blocking(ticket, move |_| {
        let job = served.model.score(&request)?;
        Ok((served, job))
    })
    .await?;
    let (scores, _) = Waiting::new(job).result().await?;
    Ok(Scored { served, rule, activations, scores, tokens })
}

/// `use_activation`, or `activation` as older vLLM has it; both default to true.
fn activated(fields: &mut Fields) -> ApiResult<bool> {
    let old: Option<bool> = fields.take("activation")?;
    let softmax: Option<bool> = fields.take("softmax")?;
    let new: Option<bool> = fields.take("use_activation")?;
    Ok(new.or(old).or(softmax).unwrap_or(true))
}

/// Leaves out what cannot change a score.
fn ignore(fields: &mut Fields) {
    fields.ignore(&["user", "request_id"]);
    fields.ignore_if(&[("encoding_format", json!("float")), ("truncation_side", json!("right"))]);
}

/// What a classifier reads: text or ids by `input`, or a conversation by `messages`.
enum Input {
    Prompts { prompts: Prompts, add_special: bool },
    Messages { messages: Vec<Message>, add_generation_prompt: Option<bool> },
}

impl Input {
    fn take(fields: &mut Fields) -> ApiResult<Self> {
        if fields.has("messages") {
            let messages = messages(fields.need("messages")?)?;
            return Ok(Input::Messages { messages, add_generation_prompt: fields.take("add_generation_prompt")? });
        }
        let add_special = fields.take("add_special_tokens")?.unwrap_or(true);
        Ok(Input::Prompts { prompts: fields.need("input")?, add_special })
    }

    fn encode(self, encoder: &Encoder) -> ApiResult<Vec<Vec<u32>>> {
        match self {
            Input::Prompts { prompts, add_special } => encoder.prompts("input", prompts, add_special),
            Input::Messages { messages, add_generation_prompt } => {
                encoder.chat(&messages, add_generation_prompt.unwrap_or(reads_next_token(encoder.served)))
            }
        }
    }
}

/// A judge answers after the opening of the assistant's turn.
fn reads_next_token(served: &Served) -> bool {
    matches!(&served.role, Role::Reward { rule: Rule::Judge { .. }, .. })
}

#[derive(Serialize)]
struct List<T> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    data: Vec<T>,
    usage: Usage,
    weight_version: Option<u64>,
}

impl<T: Serialize> List<T> {
    fn respond(prefix: &str, scored: &Scored, data: Vec<T>) -> Response {
        let list = List {
            id: identifier(prefix),
            object: "list",
            created: now(),
            model: scored.served.name.clone(),
            data,
            usage: Usage::of_prompts(scored.tokens),
            weight_version: scored.weight_version(),
        };
        json_response(StatusCode::OK, &list)
    }
}

#[derive(Serialize)]
struct Classification {
    index: usize,
    label: String,
    probs: Vec<f32>,
    num_classes: usize,
}

/// POST /classify.
pub async fn classify(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    mut fields: Fields,
) -> ApiResult<Response> {
    let model = fields.take("model")?;
    let activated = activated(&mut fields)?;
    let input = Input::take(&mut fields)?;
    ignore(&mut fields);
    fields.finish()?;
    let scored = score(&app, &ticket, model, move |encoder| input.encode(encoder)).await?;
    let activation = if activated { scored.activations.classes } else { Activation::Identity };
    let one = |((index, probs), score): ((usize, Vec<f32>), &SequenceScore)| {
        // As numpy's argmax: the first of equal ones.
        let best = (0..probs.len()).fold(0, |best, i| if probs[i] > probs[best] { i } else { best });
        let label = score.labels.get(best).cloned().unwrap_or_default();
        Classification { index, label, num_classes: probs.len(), probs }
    };
    let data = scored.values(activation).enumerate().zip(&scored.scores).map(one).collect();
    Ok(List::respond("classify", &scored, data))
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Floats(Vec<f32>),
    /// Little-endian f32, which the `openai` client asks for by itself.
    Base64(String),
}

impl Vector {
    fn base64(values: Vec<f32>) -> Self {
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Vector::Base64(BASE64_STANDARD.encode(bytes))
    }
}

/// POST /v1/embeddings as SGLang answers it for reward models: the embedding is the raw logits.
pub async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    mut fields: Fields,
) -> ApiResult<Response> {
    let model = fields.take("model")?;
    let input = Input::take(&mut fields)?;
    let vector = match fields.take::<String>("encoding_format")?.as_deref() {
        None | Some("float") => Vector::Floats,
        Some("base64") => Vector::base64,
        Some(other) => {
            let message = format!("it is {other:?}, it must be \"float\" or \"base64\"");
            return Err(ApiError::field("encoding_format", message));
        }
    };
    ignore(&mut fields);
    fields.finish()?;
    let scored = score(&app, &ticket, model, move |encoder| input.encode(encoder)).await?;
    if scored.is_judge() && scored.labels() > 2 {
        let (name, labels) = (&scored.served.name, scored.labels());
        let message =
            format!("{name} is a judge of {labels} labels, of which a reader would take the last; ask /classify");
        return Err(ApiError::field("model", message));
    }
    let one = |(index, values)| Embedding { object: "embedding", index, embedding: vector(values) };
    let data = scored.values(Activation::Identity).enumerate().map(one).collect();
    Ok(List::respond("embd", &scored, data))
}

/// Pairs as vLLM writes them for decoders: one text after the other. Clients of generative rerankers put the template's
/// marks into them, so special tokens are recognised.
fn pairs(encoder: &Encoder, field: &'static str, queries: &[String], documents: &[String]) -> ApiResult<Vec<Vec<u32>>> {
    let query = |i: usize| if queries.len() == 1 { &queries[0] } else { &queries[i] };
    let texts = documents.iter().enumerate().map(|(i, document)| format!("{}{document}", query(i)));
    encoder.rendered(field, texts, true)
}

#[derive(Serialize)]
struct ScoreData {
    index: usize,
    object: &'static str,
    score: f32,
}

/// POST /score: the relevance of pairs.
pub async fn score_pairs(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    mut fields: Fields,
) -> ApiResult<Response> {
    const NAMES: [(&str, &str); 4] =
        [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")];
    let model = fields.take("model")?;
    let activated = activated(&mut fields)?;
    let (first, second) = NAMES.into_iter().find(|(_, second)| fields.has(second)).unwrap_or(NAMES[0]);
    let queries = fields.need::<OneOrMany<String>>(first)?.into_vec();
    let documents = fields.need::<OneOrMany<String>>(second)?.into_vec();
    ignore(&mut fields);
    fields.finish()?;
    if queries.len() != 1 && queries.len() != documents.len() {
        let message =
            format!("{} texts for {} of {second}; there must be 1 or as many", queries.len(), documents.len());
        return Err(ApiError::field(first, message));
    }
    let scored = score(&app, &ticket, model, move |encoder| pairs(encoder, second, &queries, &documents)).await?;
    let one = |(index, score)| ScoreData { index, object: "score", score };
    let data = scored.relevance(activated)?.into_iter().enumerate().map(one).collect();
    Ok(List::respond("score", &scored, data))
}

/// A text, alone or as Jina and Cohere also write it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or {\"text\": a string}")]
enum Document {
    Plain(String),
    Object { text: String },
}

impl Document {
    fn into_text(self) -> String {
        match self {
            Document::Plain(text) | Document::Object { text } => text,
        }
    }
}

#[derive(Serialize)]
struct Ranked {
    index: usize,
    relevance_score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<Value>,
}

/// POST /rerank: documents in the order of their relevance, ties in the order they came.
pub async fn rerank(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    mut fields: Fields,
) -> ApiResult<Response> {
    let model = fields.take("model")?;
    let activated = activated(&mut fields)?;
    let query: Document = fields.need("query")?;
    let documents: Vec<Document> = fields.need("documents")?;
    // 0 means all, as in vLLM.
    let top_n = fields.take("top_n")?.filter(|n| *n > 0).unwrap_or(usize::MAX);
    let return_documents = fields.take("return_documents")?.unwrap_or(true);
    ignore(&mut fields);
    fields.finish()?;
    let query = vec![query.into_text()];
    let documents: Arc<[String]> = documents.into_iter().map(Document::into_text).collect();
    let texts = documents.clone();
    let scored = score(&app, &ticket, model, move |encoder| pairs(encoder, "documents", &query, &texts)).await?;
    let one = |(index, relevance_score): (usize, f32)| {
        let document = return_documents.then(|| json!({"text": documents[index]}));
        Ranked { index, relevance_score, document }
    };
    let mut results: Vec<Ranked> = scored.relevance(activated)?.into_iter().enumerate().map(one).collect();
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(top_n);
    #[derive(Serialize)]
    struct Reply {
        id: String,
        model: String,
        usage: Usage,
        results: Vec<Ranked>,
        weight_version: Option<u64>,
    }
    let reply = Reply {
        id: identifier("rerank"),
        model: scored.served.name.clone(),
        usage: Usage::of_prompts(scored.tokens),
        results,
        weight_version: scored.weight_version(),
    };
    Ok(json_response(StatusCode::OK, &reply))
}

/// Which reward model, in the address: the bodies of OpenRLHF and slime have no place for it.
#[derive(Deserialize)]
pub struct Chosen {
    model: Option<String>,
}

/// POST /get_reward: OpenRLHF's remote reward. `prompts` and `labels` are not looked at: the query holds the prompt.
///
/// As OpenRLHF's own server has it, the tokenizer adds nothing to a query, and nothing is taken away.
pub async fn get_reward(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    Query(chosen): Query<Chosen>,
    mut fields: Fields,
) -> ApiResult<Response> {
    let queries: OneOrMany<String> = fields.need("query")?;
    fields.ignore(&["prompts", "labels"]);
    fields.finish()?;
    let queries = queries.into_vec();
    let scored = score(&app, &ticket, chosen.model, move |encoder| encoder.literal("query", queries.iter())).await?;
    #[derive(Serialize)]
    struct Reply {
        rewards: Vec<f32>,
        scores: Vec<f32>,
        extra_logs: Map<String, Value>,
    }
    let rewards: Vec<f32> = scored.scores.iter().map(|s| s.score.score).collect();
    let reply = Reply { scores: rewards.clone(), rewards, extra_logs: Map::new() };
    Ok(json_response(StatusCode::OK, &reply))
}

/// A prompt as slime has it: rendered, or a conversation.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of messages")]
enum SlimePrompt {
    Rendered(String),
    Messages(Vec<Map<String, Value>>),
}

/// POST /remote_rm: slime's `--rm-type remote_rm`. The body of the answer is the reward. `label` is not looked at.
pub async fn remote_rm(
    State(app): State<Arc<App>>,
    Extension(ticket): Extension<Arc<Ticket>>,
    Query(chosen): Query<Chosen>,
    mut fields: Fields,
) -> ApiResult<Response> {
    let prompt: SlimePrompt = fields.need("prompt")?;
    let response: String = fields.need("response")?;
    fields.ignore(&["label", "metadata"]);
    fields.finish()?;
    let conversation = match prompt {
        SlimePrompt::Rendered(prompt) => Err(prompt + &response),
        SlimePrompt::Messages(list) => {
            let mut conversation = messages(list)?;
            conversation.push(Message { role: "assistant".into(), content: response });
            Ok(conversation)
        }
    };
    let scored = score(&app, &ticket, chosen.model, move |encoder| match conversation {
        Ok(messages) => encoder.chat(&messages, reads_next_token(encoder.served)),
        Err(text) => encoder.rendered("prompt", [text].into_iter(), true),
    })
    .await?;
    let reward = scored.scores.first().map_or(f32::NAN, |s| s.score.score);
    Ok(json_response(StatusCode::OK, &reward))
}
