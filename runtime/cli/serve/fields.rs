//! A request's body, taken apart field by field: each is used, known to change nothing, or refused by name.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::App;
use super::error::{ApiError, ApiResult};
use std::sync::Arc;

/// The fields that nobody has taken yet. Null stands for absent, as OpenAI's clients send it.
pub struct Fields(Map<String, Value>);

impl FromRequest<Arc<App>> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> ApiResult<Self> {
        // Admission has read it.
        let bytes = Bytes::from_request(request, app).await.map_err(|e| ApiError::body(e.to_string()))?;
        Fields::parse(&bytes)
    }
}

impl Fields {
    pub fn parse(body: &[u8]) -> ApiResult<Self> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(mut fields)) => {
                fields.retain(|_, value| !value.is_null());
                Ok(Fields(fields))
            }
            Ok(_) => Err(ApiError::body("the body must be a JSON object")),
            Err(e) => Err(ApiError::body(format!("the body is not valid JSON: {e}"))),
        }
    }

    /// Takes a field, if it is there.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> ApiResult<Option<T>> {
        let read = |value| T::deserialize(value).map_err(|e: serde_json::Error| ApiError::field(name, e.to_string()));
        self.0.remove(name).map(read).transpose()
    }

    /// Takes a field that must be there.
    pub fn need<T: DeserializeOwned>(&mut self, name: &str) -> ApiResult<T> {
        self.take(name)?.ok_or_else(|| ApiError::field(name, "it is missing"))
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Leaves out fields that cannot change the answer.
    pub fn ignore(&mut self, names: &[&str]) {
        self.0.retain(|name, _| !names.contains(&name.as_str()));
    }

    /// Leaves out fields that say what holds anyway.
    pub fn ignore_if(&mut self, neutral: &[(&str, Value)]) {
        self.0.retain(|name, value| !neutral.iter().any(|(n, v)| n == name && v == value));
    }

    /// Refuses what nobody took.
    pub fn finish(self) -> ApiResult<()> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::field(name.clone(), "this field is not supported with this value")),
        }
    }
}

/// One of a thing or a list of them.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// Text or ids, one or many.
#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "expected a string, a list of strings, a list of token ids, or a list of such lists")]
pub enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}
