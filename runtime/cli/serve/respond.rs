//! Answers as JSON, and what all of them have.

use std::hash::{BuildHasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde::Serialize;

/// A JSON body. Floats have the digits that tell them apart, no more; those that are not finite are null.
pub fn json_response(status: StatusCode, value: &impl Serialize) -> Response {
    let (status, body) = match serde_json::to_vec(value) {
        Ok(body) => (status, body),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{e}").into_bytes()),
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// 64 bits that nobody chose: for identifiers and for seeds that are not given.
pub fn random() -> u64 {
    RandomState::new().hash_one(SystemTime::now())
}

/// `chatcmpl-…` and the like.
pub fn identifier(prefix: &str) -> String {
    format!("{prefix}-{:016x}", random())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What a request cost in tokens.
#[derive(Clone, Copy, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptDetails>,
}

/// Where the prompt's keys and values came from.
#[derive(Clone, Copy, Serialize)]
pub struct PromptDetails {
    pub cached_tokens: u64,
}

impl Usage {
    /// Of a request that samples nothing.
    pub fn of_prompts(tokens: usize) -> Self {
        Usage { prompt_tokens: tokens, completion_tokens: 0, total_tokens: tokens, prompt_tokens_details: None }
    }
}
