//! Server-sent events: chunks of completions as they are sampled, then `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse::{Event, Sse};
use futures_util::stream::{Stream, unfold};
use rewardrt::{Chunk, Finish, SampledSequence, Streamed};
use serde::Serialize;

use super::completions::Writer;
use super::error::{ApiError, ApiResult};
use super::shape::{Choice, Content, Reply, Shape, Speller, finish_reason, stop_reason};
use super::ticket::Ticket;
use super::wait::Waiting;

struct State {
    writer: Writer,
    /// Gone once all is written.
    waiting: Option<Waiting<Vec<SampledSequence>>>,
    /// One for each answer.
    spellers: Vec<Speller>,
    completion_tokens: usize,
    events: VecDeque<Event>,
    ticket: Arc<Ticket>,
}

/// Streams a job's answers. An error after the first chunk is an event of its own, `{"error": …}`.
pub fn stream(
    writer: Writer,
    waiting: Waiting<Vec<SampledSequence>>,
    ticket: Arc<Ticket>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let spellers = writer.prompts.iter().flat_map(|p| (0..writer.n).map(|_| Speller::after(p))).collect();
    let events = VecDeque::new();
    let mut state = State { writer, waiting: Some(waiting), spellers, completion_tokens: 0, events, ticket };
    state.open();
    Sse::new(unfold(state, |mut state| async move {
        while state.events.is_empty() {
            state.advance().await?;
        }
        state.events.pop_front().map(|event| (Ok(event), state))
    }))
}

impl State {
    fn push(&mut self, value: &impl Serialize) {
        // What is written are numbers and text, which always have a JSON form.
        let text = serde_json::to_string(value).unwrap_or_default();
        self.events.push_back(Event::default().data(text));
    }

    fn chunk(&self, choices: Vec<Choice>) -> Reply {
        let object = if self.writer.shape == Shape::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut reply = self.writer.reply(object);
        reply.choices = choices;
        reply.usage = self.writer.stream_usage.then_some(None);
        reply
    }

    /// Every answer of a chat begins with its role.
    fn open(&mut self) {
        if self.writer.shape != Shape::Chat {
            return;
        }
        for index in 0..self.spellers.len() {
            let content = Content::Delta { role: Some("assistant"), content: Some(String::new()) };
            let mut reply = self.chunk(vec![plain(index, content)]);
            reply.prompt_token_ids = self.writer.prompt_ids(Shape::Chat, 0);
            self.push(&reply);
        }
    }

    /// Waits for something to write; `None` at the end.
    async fn advance(&mut self) -> Option<()> {
        let waiting = self.waiting.as_ref()?;
        let next = match tokio::time::timeout_at(self.ticket.deadline, waiting.next()).await {
            Ok(Streamed::Chunk(chunk)) => self.take(chunk),
            Ok(_) => self.end().await,
            Err(_) => Err(self.ticket.late()),
        };
        if let Err(error) = next {
            // Dropping the job cancels it.
            self.waiting = None;
            self.ticket.set_status(error.status);
            self.push(&error.to_json());
        }
        Some(())
    }

    fn take(&mut self, chunk: Chunk) -> ApiResult<()> {
        let Chunk { prompt, sample, first, tokens, text, finish } = chunk;
        if finish == Some(Finish::Cancelled) {
            return Err(ApiError::internal("an answer was cancelled before its end"));
        }
        let index = prompt * self.writer.n + sample;
        self.completion_tokens += tokens.len();
        let logprobs = self.writer.logprobs(&mut self.spellers[index], &tokens)?;
        let content = match self.writer.shape {
            Shape::Chat => Content::Delta { role: None, content: Some(text) },
            Shape::Text => Content::Text(text),
        };
        let choice = Choice {
            logprobs,
            finish_reason: finish.map(finish_reason),
            stop_reason: finish.and_then(stop_reason),
            token_ids: self.writer.return_token_ids.then(|| tokens.iter().map(|t| t.id).collect()),
            prompt_token_ids: if first == 0 { self.writer.prompt_ids(Shape::Text, prompt) } else { None },
            ..plain(index, content)
        };
        let reply = self.chunk(vec![choice]);
        self.push(&reply);
        Ok(())
    }

    async fn end(&mut self) -> ApiResult<()> {
        let Some(waiting) = self.waiting.take() else { return Ok(()) };
        let (answers, stats) = waiting.result().await?;
        if self.writer.stream_usage {
            let mut reply = self.chunk(Vec::new());
            reply.usage = Some(Some(self.writer.usage(self.completion_tokens, stats.rows.cached)));
            reply.weight_version = answers.last().map(|a| a.weight_version);
            self.push(&reply);
        }
        self.events.push_back(Event::default().data("[DONE]"));
        Ok(())
    }
}

/// A choice with nothing but its content.
fn plain(index: usize, content: Content) -> Choice {
    Choice {
        index,
        content,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
        prompt_token_ids: None,
        weight_versions: Vec::new(),
    }
}
