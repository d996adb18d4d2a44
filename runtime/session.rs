//! Rollouts of several turns: a sequence that grows by what is appended and by what is sampled.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::engine::Job;
use crate::error::{Error, ErrorKind, Result};
use crate::loaded_model::Model;
use crate::request::{Prompt, SampleRequest, SampledSequence};

/// A sequence of turns: tokens from outside (a prompt, a tool's or an environment's answer) and sampled ones.
///
/// Ids that were sampled stay as they are; nothing is decoded and encoded again. The keys and values of its turns stay
/// in the model's cache as long as there is room (least recently used go first), so that a turn computes what is new;
/// where they had to go they are computed again, with the same results. Sampling in a session returns what sampling
/// the same tokens as one prompt returns, to the bit: a draw is named by (seed, stream, sample, position), and positions
/// go on from turn to turn. (Beyond the trained length of a dynamic rope each turn is a forward of its own.)
///
/// ```no_run
/// # fn f(model: &rewardrt::Model, question: Vec<u32>, tool_answer: Vec<u32>) -> rewardrt::Result<()> {
/// use rewardrt::SampleRequest;
///
/// let turn = SampleRequest { max_tokens: 64, seed: 1, ..SampleRequest::default() };
/// let session = model.session(&question)?;
/// let call = session.sample(&turn)?.wait()?;
/// session.append(&tool_answer)?;
/// let other = session.fork()?; // two continuations of one state
/// let (a, b) = (session.sample(&turn)?, other.sample(&SampleRequest { seed: 2, ..turn.clone() })?);
/// # let _ = (call, a.wait()?, b.wait()?);
/// # Ok(())
/// # }
/// ```
pub struct Session {
    model: Model,
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Default)]
struct State {
    tokens: Vec<u32>,
    /// Turns from outside, each one forward.
    forwards: Vec<Range<usize>>,
    /// Tokens that came with the last turns from outside and of which no forward is made yet begin here.
    open: usize,
    /// A job is sampling.
    busy: bool,
}

/// Ends the busy state, whatever becomes of the job.
struct Turn(Arc<Mutex<State>>);

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.0).busy = false;
    }
}

impl Model {
    /// Begins a session with these tokens (there may be none yet).
    ///
    /// # Errors
    /// `Argument` for an id beyond the vocabulary, `Limit` beyond the model's context.
    pub fn session(&self, tokens: &[u32]) -> Result<Session> {
        let session = Session { model: self.clone(), state: Arc::default() };
        session.append(tokens)?;
        Ok(session)
    }
}

impl Session {
    fn idle(&self) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        if state.busy {
            return Err(Error::new(ErrorKind::Busy, "the session is sampling: wait for its job, or drop it"));
        }
        Ok(state)
    }

    /// The model that it is of.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// All tokens so far, sampled ones included.
    pub fn tokens(&self) -> Vec<u32> {
        lock(&self.state).tokens.clone()
    }

    /// Adds tokens from outside.
    ///
    /// # Errors
    /// `Busy` while a job samples; `Argument` for an id beyond the vocabulary, `Limit` beyond the model's context.
    /// Nothing is added then.
    pub fn append(&self, tokens: &[u32]) -> Result<()> {
        let mut state = self.idle()?;
        let vocab = self.model.spec().vocab_size;
        if let Some(t) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::argument(format!("token id {t} is not below the vocabulary size {vocab}")));
        }
        let (length, most) = (state.tokens.len().saturating_add(tokens.len()), self.model.max_context());
        if length > most {
            return Err(Error::limit(format!(
                "the session would have {length} tokens, the model's context allows {most}; max_context raises it"
            )));
        }
        state.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Samples the next turn; it is part of the session once [`Job::wait`] has returned it. A job that is dropped leaves
    /// the session as it was. The request's `prompts` must be empty and its `n` 1: [`Session::fork`] gives more.
    ///
    /// # Errors
    /// `Busy` while another job of the session samples; otherwise as [`Model::sample`].
    pub fn sample(&self, request: &SampleRequest) -> Result<Job<Vec<SampledSequence>>> {
        if !request.prompts.is_empty() || request.n != 1 {
            return Err(Error::argument(format!(
                "a session's request has {} prompts and n = {}; it must have none and n = 1",
                request.prompts.len(),
                request.n
            )));
        }
        let turn = {
            let mut state = self.idle()?;
            state.busy = true;
            Turn(self.state.clone())
        };
        let State { tokens, mut forwards, open, .. } = lock(&self.state).clone();
        if open < tokens.len() {
            forwards.push(open..tokens.len());
        }
        let prompts = [Prompt { tokens: &tokens, forwards: forwards.clone() }];
        self.model.sample_prompts(request, &prompts, move |results| {
            let mut state = lock(&turn.0);
            if results.iter().all(|r| r.tokens.is_empty()) {
                return;
            }
            state.forwards = forwards.clone();
            state.tokens.extend(results.iter().flat_map(|r| r.tokens.iter().map(|t| t.id)));
            state.open = state.tokens.len();
        })
    }

    /// Another session with the same tokens, which goes its own way. What is computed is shared.
    ///
    /// # Errors
    /// `Busy` while a job samples.
    pub fn fork(&self) -> Result<Session> {
        let state = self.idle()?.clone();
        Ok(Session { model: self.model.clone(), state: Arc::new(Mutex::new(state)) })
    }
}
