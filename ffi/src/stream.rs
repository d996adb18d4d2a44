//! rrt_job_peek, rrt_job_peek_text: what a streaming job has so far.

use std::collections::VecDeque;
use std::ffi::c_char;
use std::sync::{Mutex, MutexGuard, PoisonError};

use runtime::{Chunk, Finish, Streamed};

use crate::boundary::{Outcome, enter, null, output};
use crate::job::unknown;
use crate::runtime::{open_runtime, rrt_runtime};
use crate::status::{E_ARG, E_RANGE, Failure, rrt_error};
use crate::watch::Watch;

/// The number of a [`Finish`] in the header.
pub fn finish_number(finish: Finish) -> i32 {
    match finish {
        Finish::Stop => 0,
        Finish::Length => 1,
        Finish::Cancelled => 2,
        Finish::Blocked => 3,
    }
}

/// What has come of each answer, and what of it was told by events.
pub struct Flow {
    answers: Mutex<Answers>,
    samples_a_prompt: usize,
}

struct Answers {
    list: Vec<Answer>,
    /// Those with something to tell, each once.
    untold: VecDeque<usize>,
}

#[derive(Default)]
struct Answer {
    ids: Vec<u32>,
    logprob: Vec<f32>,
    sample_logprob: Vec<f32>,
    text: String,
    finish: Option<Finish>,
    /// Tokens that events have told.
    told: usize,
    waits: bool,
}

/// What a CHUNK event says.
pub struct News {
    pub answer: usize,
    pub first: usize,
    pub count: usize,
    pub finish: Option<Finish>,
    pub text_len: usize,
}

impl Flow {
    pub fn new(answers: usize, samples_a_prompt: usize) -> Self {
        let list = (0..answers).map(|_| Answer::default()).collect();
        Flow { answers: Mutex::new(Answers { list, untold: VecDeque::new() }), samples_a_prompt }
    }

    /// Takes in what the job has handed out by now.
    fn drain(&self, watch: &Watch) -> MutexGuard<'_, Answers> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        while let Streamed::Chunk(chunk) = watch.next_chunk() {
            let place = chunk.prompt * self.samples_a_prompt + chunk.sample;
            answers.add(place, chunk);
        }
        answers
    }

    /// The next thing to tell.
    pub fn news(&self, watch: &Watch) -> Option<News> {
        let mut answers = self.drain(watch);
        let place = answers.untold.pop_front()?;
        let answer = answers.list.get_mut(place)?;
        let (first, count) = (answer.told, answer.ids.len() - answer.told);
        answer.told = answer.ids.len();
        answer.waits = false;
        Some(News { answer: place, first, count, finish: answer.finish, text_len: answer.text.len() })
    }
}

impl Answers {
    fn add(&mut self, place: usize, chunk: Chunk) {
        let Some(answer) = self.list.get_mut(place) else { return };
        for token in &chunk.tokens {
            answer.ids.push(token.id);
            answer.logprob.push(token.model_logprob);
            answer.sample_logprob.push(token.logprob);
        }
        answer.text.push_str(&chunk.text);
        answer.finish = chunk.finish;
        if !std::mem::replace(&mut answer.waits, true) {
            self.untold.push_back(place);
        }
    }
}

/// Does something with an answer of a job that streams.
///
/// # Safety
/// The header's condition on handles.
unsafe fn with_answer<T>(
    runtime: *mut rrt_runtime,
    job: u64,
    sequence: u32,
    act: impl FnOnce(&Answer) -> Outcome<T>,
) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let runtime = unsafe { open_runtime(runtime) }?;
    let entry = runtime.shared.jobs.get(job).ok_or_else(|| unknown(job))?;
    let Some(flow) = &entry.flow else {
        return Err(Failure::new(E_ARG, "the job does not stream: submit it with RRT_SAMPLE_STREAM"));
    };
    let answers = flow.drain(&entry.watch);
    let count = answers.list.len();
    let answer = answers.list.get(sequence as usize);
    act(answer.ok_or_else(|| Failure::new(E_RANGE, format!("sequence is {sequence}, the job has {count}")))?)
}

/// Copies what there is from `from` on, as much as fits.
///
/// # Safety
/// `out` is NULL or points to `capacity` elements.
unsafe fn copy<T: Copy>(values: &[T], from: usize, out: *mut T, capacity: usize) -> usize {
    let rest = values.get(from..).unwrap_or_default();
    let count = rest.len().min(capacity);
    if !out.is_null() && count > 0 {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), out, count) };
    }
    count
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_job_peek(
    runtime: *mut rrt_runtime,
    job: u64,
    sequence: u32,
    from: usize,
    ids: *mut u32,
    logprob: *mut f32,
    sample_logprob: *mut f32,
    capacity: usize,
    count: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(count, "count")?;
        let read = |answer: &Answer| {
            // SAFETY: the header's condition on buffers.
            unsafe {
                copy(&answer.logprob, from, logprob, capacity);
                copy(&answer.sample_logprob, from, sample_logprob, capacity);
                Ok(copy(&answer.ids, from, ids, capacity))
            }
        };
        // SAFETY: the header's condition on handles; `count` is not NULL.
        unsafe { count.write(with_answer(runtime, job, sequence, read)?) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_job_peek_text(
    runtime: *mut rrt_runtime,
    job: u64,
    sequence: u32,
    from: usize,
    out: *mut c_char,
    capacity: usize,
    count: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(count, "count")?;
        if out.is_null() && capacity > 0 {
            return Err(null("text"));
        }
        // SAFETY: the header's condition on buffers.
        let read = |answer: &Answer| Ok(unsafe { copy(answer.text.as_bytes(), from, out.cast::<u8>(), capacity) });
        // SAFETY: the header's condition on handles; `count` is not NULL.
        unsafe { count.write(with_answer(runtime, job, sequence, read)?) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
