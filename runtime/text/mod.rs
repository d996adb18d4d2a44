//! Text ↔ token ids: tokenizer.json, and the chat template that comes with it.

mod chat;
mod check;
#[cfg(test)]
pub(crate) mod samples;
mod stream;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub(crate) use stream::TextStream;
pub use tokenizer::{EncodeOptions, Tokenizer};
