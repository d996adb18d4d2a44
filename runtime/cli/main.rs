//! The `rewardrt` command. Results on stdout or `--out`, logs on stderr; exit 0 ok, 1 failed, 2 bad input or usage.

mod answer;
mod args;
mod bench;
mod devices;
mod diff;
mod inspect;
mod jobs;
mod logprobs;
mod record;
mod rollout;
mod sample;
mod sampling;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod sink;
mod synth;

use std::process::ExitCode;

use clap::Parser;
use rewardrt::{Error, ErrorKind};

fn main() -> ExitCode {
    let args = args::Args::parse();
    let level = if args.verbose { "info" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format_timestamp(None)
        .target(env_logger::Target::Stderr)
        .init();
    let result = match &args.command {
        args::Command::Devices(a) => devices::run(a),
        args::Command::Inspect(a) => inspect::run(a),
        args::Command::Sample(a) => sample::run(a),
        args::Command::Rollout(a) => rollout::run(a),
        args::Command::Logprobs(a) => logprobs::run(a),
        args::Command::Score(a) => score::run(a),
        args::Command::Synth(a) => synth::run(a),
        args::Command::Bench(a) => bench::run(a),
        args::Command::Diff(a) => diff::run(a),
        #[cfg(feature = "serve")]
        args::Command::Serve(a) => serve::run(a),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader went away (`| head`): nothing is left to say.
        Err(error) if error.kind() == ErrorKind::Cancelled => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("rewardrt: {error}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &Error) -> u8 {
    if error.is_input() { 2 } else { 1 }
}
