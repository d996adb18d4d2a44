//! `rewardrt diff`: a delta between two checkpoints.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use rewardrt::Result;
use rewardrt::weights::{DeltaOptions, Encoding, write_delta};

use crate::args::{Diff, EncodingArg};
use crate::sink::print_line;

pub fn run(args: &Diff) -> Result<()> {
    let base_version = args.base_version.unwrap_or_else(|| args.version.unwrap_or(1).saturating_sub(1));
    let encoding = match args.encoding {
        EncodingArg::Xor => Encoding::Xor,
        EncodingArg::Overwrite => Encoding::Overwrite,
    };
    let options = DeltaOptions {
        encoding,
        base_version,
        version: args.version.unwrap_or(base_version.saturating_add(1)),
        level: args.level,
        threads: args.threads,
        ..DeltaOptions::default()
    };
    let begin = Instant::now();
    // Hidden by indicatif when stderr is not a terminal.
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes}, {elapsed} (left: {eta})") {
        bar.set_style(style);
    }
    let report = write_delta(&args.old, &args.new, &args.out, &options, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report?;
    print_line(&format!(
        "{}: version {} to {} ({}), {} of {} tensors changed, {:.1} kB for {:.1} kB ({:.2} %), {:.2} s",
        args.out.display(),
        options.base_version,
        options.version,
        encoding.name(),
        report.changed,
        report.tensors,
        report.bytes_delta as f64 / 1e3,
        report.bytes_old as f64 / 1e3,
        100.0 * report.bytes_delta as f64 / (report.bytes_old as f64).max(1.0),
        begin.elapsed().as_secs_f64()
    ))
}
