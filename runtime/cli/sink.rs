//! Where results go: stdout, or a file that appears when it is complete.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rewardrt::{Error, ErrorKind, Result};
use serde::Serialize;

pub struct Sink {
    writer: Box<dyn Write>,
    /// Temporary and final name.
    file: Option<(PathBuf, PathBuf)>,
}

fn failed(place: &str, error: &io::Error) -> Error {
    // A closed pipe is the reader's way of saying enough.
    let kind = if error.kind() == io::ErrorKind::BrokenPipe { ErrorKind::Cancelled } else { ErrorKind::Io };
    Error::new(kind, format!("{place}: {error}"))
}

impl Sink {
    pub fn open(out: Option<&Path>) -> Result<Self> {
        let Some(path) = out else {
            return Ok(Sink { writer: Box::new(BufWriter::new(io::stdout())), file: None });
        };
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial).map_err(|e| failed(&partial.display().to_string(), &e))?;
        Ok(Sink { writer: Box::new(BufWriter::new(file)), file: Some((partial, path.to_owned())) })
    }

    /// Writes one object as a line.
    pub fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(value).map_err(|e| Error::new(ErrorKind::Internal, e.to_string()))?;
        writeln!(self.writer, "{line}").map_err(|e| failed("writing results", &e))
    }

    /// Flushes, and gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        self.writer.flush().map_err(|e| failed("writing results", &e))?;
        if let Some((partial, path)) = self.file.take() {
            std::fs::rename(&partial, &path).map_err(|e| failed(&path.display().to_string(), &e))?;
        }
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Some((partial, _)) = &self.file {
            // Best effort: the error that led here is the one to report.
            let _ = std::fs::remove_file(partial);
        }
    }
}

/// Prints a line, with a closed pipe as an error instead of a panic.
pub fn print_line(line: &str) -> Result<()> {
    writeln!(io::stdout(), "{line}").map_err(|e| failed("stdout", &e))
}
