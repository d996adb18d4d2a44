//! Flags of `rewardrt serve`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;

use super::models::NamedModel;
use crate::args::{Loading, RewardArg, bytes, reward};

#[derive(ClapArgs)]
#[command(group = clap::ArgGroup::new("served").required(true).multiple(true))]
pub struct Serve {
    /// A model that samples, and the name that requests call it by [default name: the folder's]; may be given more than
    /// once.
    #[arg(long, value_name = "NAME=PATH", group = "served")]
    pub model: Vec<NamedModel>,
    /// A model that scores, by the rule that its head implies or by RULE: sequence, judge:LABEL,LABEL[,…]; may be given
    /// more than once.
    #[arg(long, value_name = "NAME=PATH[:RULE]", group = "served", value_parser = reward)]
    pub reward: Vec<RewardArg>,
    /// The address to listen on. Others than loopback let the network in: give a token then.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// The port; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Ask for `Authorization: Bearer TOKEN`, the token that this file holds, on everything but /health.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Requests under way at a time; others wait for their place, as long as --timeout lets them.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    pub max_concurrent: usize,
    /// Requests that wait or are under way; more are answered with 429.
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = at_least_one)]
    pub max_queue: usize,
    /// Bytes of their bodies, with an optional suffix K, M or G; more are answered with 429.
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = body_bytes)]
    pub max_queued_bytes: usize,
    /// Tokens that the requests under way may come to, prompts included, an alternative counted as a token; others wait. A
    /// request that could come to more by itself is refused.
    #[arg(long, value_name = "N", default_value_t = 1 << 22, value_parser = at_least_one)]
    pub max_queued_tokens: usize,
    /// Longest body of a request, in bytes, with an optional suffix K, M or G.
    #[arg(long, value_name = "BYTES", default_value = "4M", value_parser = body_bytes)]
    pub max_body: usize,
    /// Seconds that a request may take, its body included; then its work is cancelled and it is answered with 504.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds, allow_negative_numbers = true)]
    pub timeout: Duration,
    /// Seconds that requests under way have to end after SIGINT or SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, allow_negative_numbers = true)]
    pub drain: Duration,
    #[command(flatten)]
    pub loading: Loading,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    // The largest number of permits that a semaphore has everywhere.
    match text.parse() {
        Ok(n) if (1..1 << 29).contains(&n) => Ok(n),
        _ => Err("it must be a number from 1 to 536870911".into()),
    }
}

fn body_bytes(text: &str) -> std::result::Result<usize, String> {
    match bytes(text).map(usize::try_from)? {
        Ok(n) if n < 1 << 38 => Ok(n),
        _ => Err("it must be less than 256G".into()),
    }
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let number: f64 = text.parse().map_err(|e| format!("{e}"))?;
    match Duration::try_from_secs_f64(number) {
        // Beyond a year a clock's arithmetic is the limit.
        Ok(time) if time <= Duration::from_secs(366 * 24 * 3600) => Ok(time),
        _ => Err("it must be seconds, from 0 to a year".into()),
    }
}
