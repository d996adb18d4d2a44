//! Text ↔ token ids: tokenizer.json, and the chat template that comes with it.

mod chat;
mod check;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use tokenizer::{EncodeOptions, Tokenizer};
