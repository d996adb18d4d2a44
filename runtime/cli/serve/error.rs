//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use rewardrt::{Error, ErrorKind};
use serde_json::{Value, json};

use super::respond::json_response;

/// What a client is told when a request fails.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    /// The field that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
    message: String,
}

pub type ApiResult<T> = Result<T, ApiError>;

/// What the library's messages begin with, and the field that it is here.
const FIELDS: [(&str, &str); 18] = [
    ("n", "n"),
    ("best_of", "best_of"),
    ("max_tokens", "max_tokens"),
    ("min_tokens", "min_tokens"),
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("typical_p", "typical_p"),
    ("repetition_penalty", "repetition_penalty"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("logit_bias", "logit_bias"),
    ("allowed_ids", "allowed_token_ids"),
    ("stop", "stop"),
    ("stop_ids", "stop_token_ids"),
    ("top_logprobs", "top_logprobs"),
    ("prompt", "prompt"),
];

impl ApiError {
    fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        ApiError { status, param: None, code, message: message.into() }
    }

    /// 400: `field` is wrong, and why.
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        let field = field.into();
        let message = format!("{field}: {}", message.into());
        ApiError { param: Some(field), ..ApiError::new(StatusCode::BAD_REQUEST, None, message) }
    }

    /// 400: the body as a whole is wrong.
    pub fn body(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, None, message)
    }

    pub fn too_large(most: usize) -> Self {
        let message = format!("the body is longer than {most} bytes (--max-body)");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
    }

    pub fn slow_body() -> Self {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, Some("slow_body"), "the request's body did not come in time")
    }

    pub fn unauthorized() -> Self {
        let message = "the header `Authorization: Bearer TOKEN` is missing or has another token";
        ApiError::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    pub fn no_model(message: String) -> Self {
        let error = ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message);
        ApiError { param: Some("model".into()), ..error }
    }

    pub fn no_route(method: &str, path: &str) -> Self {
        ApiError::new(StatusCode::NOT_FOUND, Some("not_found"), format!("there is no {method} {path}"))
    }

    pub fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
    }

    pub fn busy(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"), message)
    }

    pub fn late(seconds: f64) -> Self {
        let message = format!("the request took longer than {seconds} s (--timeout); its work was cancelled");
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, Some("timeout"), message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Some("unavailable"), message)
    }

    /// 500: a bug of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message)
    }

    /// `{"error": …}`.
    pub fn to_json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error.kind() {
            ErrorKind::Full => ApiError::busy(message),
            kind if error.is_input() && kind != ErrorKind::NotFound => {
                let first = message.split([' ', ':']).next().unwrap_or("");
                let param = FIELDS.iter().find(|(name, _)| *name == first).map(|(_, field)| (*field).to_owned());
                ApiError { param, ..ApiError::body(message) }
            }
            ErrorKind::Poisoned | ErrorKind::Cancelled | ErrorKind::DeviceLost | ErrorKind::NotFound => {
                ApiError::unavailable(message)
            }
            _ => ApiError::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.to_json());
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => headers.insert(RETRY_AFTER, HeaderValue::from_static("1")),
            StatusCode::UNAUTHORIZED => headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            _ => None,
        };
        response
    }
}
