//! Runs a long list as jobs of bounded size, two at a time so that the engine never idles between them.

use std::collections::VecDeque;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rewardrt::{Job, Result};

/// Sequences in a job.
const PER_JOB: usize = 512;

/// Submits `items` in order, each with `drawn` sequences of which `per_item` come back, and hands every result with its
/// number to `each`.
pub fn run<I, T>(
    items: &[I],
    per_item: usize,
    drawn: usize,
    submit: impl Fn(usize, &[I]) -> Result<Job<Vec<T>>>,
    mut each: impl FnMut(usize, T) -> Result<()>,
) -> Result<()> {
    // Hidden by indicatif when stderr is not a terminal.
    let bar = ProgressBar::new((items.len() * per_item) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} sequences, {elapsed} (left: {eta})") {
        bar.set_style(style);
    }
    let items_per_job = (PER_JOB / drawn.max(1)).max(1);
    let mut pending: VecDeque<Job<Vec<T>>> = VecDeque::new();
    let mut done = 0;
    let mut chunks = items.chunks(items_per_job).enumerate();
    loop {
        while pending.len() < 2
            && let Some((i, chunk)) = chunks.next()
        {
            pending.push_back(submit(i * items_per_job, chunk)?);
        }
        let Some(job) = pending.pop_front() else { break };
        while !job.wait_timeout(Duration::from_millis(100)) {
            bar.set_position(done as u64 + job.progress().0 as u64);
        }
        for result in job.wait()? {
            each(done, result)?;
            done += 1;
        }
        bar.set_position(done as u64);
    }
    bar.finish_and_clear();
    Ok(())
}
