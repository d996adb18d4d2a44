//! `rewardrt serve` from the outside: the built command, plain HTTP, and values that equal the Rust API's.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;
#[path = "serve/completions.rs"]
mod completions;
#[path = "serve/errors.rs"]
mod errors;
#[path = "serve/limits.rs"]
mod limits;
#[path = "serve/outside.rs"]
mod outside;
#[path = "serve/rewards.rs"]
mod rewards;
#[path = "serve/server.rs"]
mod server;
