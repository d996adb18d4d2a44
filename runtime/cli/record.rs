//! One line of input.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use rewardrt::{EncodeOptions, Error, ErrorKind, Message, Model, Result};
use serde::Deserialize;
use serde_json::Value;

const MAX_LINE: u64 = 64 << 20;

#[derive(Deserialize, Default)]
pub struct Record {
    pub id: Option<Value>,
    pub prompt: Option<String>,
    pub prompt_ids: Option<Vec<u32>>,
    pub messages: Option<Vec<Message>>,
    pub completion: Option<String>,
    pub completion_ids: Option<Vec<u32>>,
    pub text: Option<String>,
    pub ids: Option<Vec<u32>>,
}

/// Reads JSON Lines; blank lines are skipped. Each record comes with its place, for messages.
pub fn read(path: &Path) -> Result<Vec<(String, Record)>> {
    let io = |e: std::io::Error| {
        let kind = if e.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
        Error::new(kind, format!("{}: {e}", path.display()))
    };
    let mut reader = BufReader::new(std::fs::File::open(path).map_err(io)?);
    let mut records = Vec::new();
    for number in 1.. {
        let mut line = Vec::new();
        let length = reader.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line).map_err(io)?;
        let place = format!("{}:{number}", path.display());
        if length == 0 {
            break;
        }
        if length as u64 > MAX_LINE {
            return Err(Error::new(ErrorKind::Limit, format!("{place}: the line is longer than {MAX_LINE} bytes")));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let record = serde_json::from_slice(&line).map_err(|e| {
            // Its own line number is that within this line.
            let text = e.to_string();
            let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
            Error::new(ErrorKind::Format, format!("{place}: {what} (column {})", e.column()))
        })?;
        records.push((place, record));
    }
    if records.is_empty() {
        return Err(Error::new(ErrorKind::Format, format!("{}: no records", path.display())));
    }
    Ok(records)
}

const ADD_SPECIAL: EncodeOptions = EncodeOptions { add_special: true, parse_special: false };

impl Record {
    /// The prompt's ids: given, or encoded from text or messages.
    pub fn prompt(&self, model: &Model) -> Result<Vec<u32>> {
        if let Some(ids) = &self.prompt_ids {
            return Ok(ids.clone());
        }
        if let Some(text) = &self.prompt {
            return model.tokenizer()?.encode(text, ADD_SPECIAL);
        }
        if let Some(messages) = &self.messages {
            return model.tokenizer()?.encode_chat(messages, true);
        }
        Err(missing("prompt_ids, prompt or messages"))
    }

    /// The messages, where they are what the prompt is made of.
    pub fn conversation(&self) -> Option<Vec<Message>> {
        self.messages.clone().filter(|_| self.prompt_ids.is_none() && self.prompt.is_none())
    }

    fn has_prompt(&self) -> bool {
        self.prompt_ids.is_some() || self.prompt.is_some() || self.messages.is_some()
    }

    /// The completion's ids, if there is one.
    fn completion(&self, model: &Model) -> Result<Option<Vec<u32>>> {
        match (&self.completion_ids, &self.completion) {
            (Some(ids), _) => Ok(Some(ids.clone())),
            (None, Some(text)) => model.tokenizer()?.encode(text, EncodeOptions::default()).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn whole(&self, model: &Model) -> Result<Option<Vec<u32>>> {
        match (&self.ids, &self.text) {
            (Some(ids), _) => Ok(Some(ids.clone())),
            (None, Some(text)) => model.tokenizer()?.encode(text, ADD_SPECIAL).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// For `logprobs`: the ids, and how many of them are a prompt.
    pub fn scored(&self, model: &Model) -> Result<(Vec<u32>, usize)> {
        if let Some(completion) = self.completion(model)? {
            let mut ids = self.prompt(model)?;
            let prompt_len = ids.len();
            ids.extend(completion);
            return Ok((ids, prompt_len));
        }
        match self.whole(model)? {
            Some(ids) => Ok((ids, 0)),
            None if self.has_prompt() => Err(missing("completion or completion_ids beside the prompt")),
            None => Err(missing("ids, text, or a prompt and its completion")),
        }
    }

    /// For `score`: the whole sequence. A conversation without a completion is rendered with the opening of the
    /// assistant's answer if the rule reads the next token, without it if the rule reads the last one.
    pub fn sequence(&self, model: &Model, reads_next_token: bool) -> Result<Vec<u32>> {
        if let Some(completion) = self.completion(model)? {
            let mut ids = self.prompt(model)?;
            ids.extend(completion);
            return Ok(ids);
        }
        if let Some(ids) = self.whole(model)? {
            return Ok(ids);
        }
        match &self.messages {
            Some(messages) if self.prompt_ids.is_none() && self.prompt.is_none() => {
                model.tokenizer()?.encode_chat(messages, reads_next_token)
            }
            _ if self.has_prompt() => self.prompt(model),
            _ => Err(missing("ids, text, messages, or a prompt and its completion")),
        }
    }
}

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::Format, format!("the record has none of: {what}"))
}

/// The record's id, or its number in the file.
pub fn id_of(record: &Record, index: usize) -> Value {
    record.id.clone().unwrap_or_else(|| index.into())
}
