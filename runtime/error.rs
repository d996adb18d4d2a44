//! One error type for the whole library: a kind a program can branch on, and a message for a person.

use std::fmt;

/// The result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the terms a caller can act on. The C ABI maps each kind to one status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A request field has a value outside its range.
    Argument,
    /// The operating system refused a read.
    Io,
    /// A file does not follow its format.
    Format,
    /// The file is well formed and asks for something this version does not do.
    Unsupported,
    /// Tensors are missing, superfluous or have another shape than the config says.
    Shape,
    /// A stated limit (size, count, memory budget, context) would be exceeded.
    Limit,
    /// The chat template failed or ran out of its allowance.
    Template,
    /// The queue is full: retry later.
    Full,
    /// The job was cancelled.
    Cancelled,
    /// No such file, job or name.
    NotFound,
    /// The object is in use.
    Busy,
    /// It is not in the state that the call expects: another version, or an update that has ended.
    Conflict,
    /// It was given before.
    Duplicate,
    /// It did not happen within the time given; nothing changed.
    Timeout,
    /// No device matches the selection.
    NoDevice,
    /// The device has no memory left.
    DeviceMemory,
    /// The host has no memory left.
    HostMemory,
    /// The device was lost; the runtime must be opened anew.
    DeviceLost,
    /// The graphics API reported an error that is not the caller's.
    Gpu,
    /// A result that must be finite is NaN or infinite.
    NonFinite,
    /// A bug in this library: a panic was caught. The runtime is poisoned.
    Internal,
    /// The runtime was poisoned by an earlier internal error.
    Poisoned,
}

/// An error: a kind, and a message that says what was wrong, where, and what would be right.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// An error of `kind` with a message for a person.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// The kind a program can branch on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Puts `place` (a file, a tensor, a field, a line) in front of the message.
    pub fn at(self, place: impl fmt::Display) -> Self {
        Error { kind: self.kind, message: format!("{place}: {}", self.message) }
    }

    /// True for errors that the caller's input caused: another input can succeed, repeating this one cannot.
    pub fn is_input(&self) -> bool {
        use ErrorKind::*;
        matches!(self.kind, Argument | Format | Unsupported | Shape | Template | Limit | NotFound | NoDevice)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident;)*) => {
        impl Error { $($(#[$doc])* pub(crate) fn $name(message: impl Into<String>) -> Self {
            Error::new(ErrorKind::$kind, message)
        })* }
    };
}

constructors! {
    argument => Argument;
    format => Format;
    unsupported => Unsupported;
    limit => Limit;
    template => Template;
    gpu => Gpu;
    internal => Internal;
}

/// An I/O error with the path it happened at.
pub(crate) fn io_error(path: &std::path::Path, error: std::io::Error) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::OutOfMemory => ErrorKind::HostMemory,
        std::io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("{}: {error}", path.display()))
}

/// Multiplies sizes that came from outside, in the widest type, and says which product overflowed.
pub(crate) fn checked_size(what: &str, factors: &[usize]) -> Result<usize> {
    factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor))
        .filter(|&size| size <= isize::MAX as usize)
        .ok_or_else(|| Error::limit(format!("{what}: the product of {factors:?} does not fit in memory")))
}

/// Allocates `len` copies of `value`, reporting exhaustion as an error instead of aborting.
pub(crate) fn try_vec<T: Clone>(what: &str, value: T, len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| {
        let bytes = len.saturating_mul(size_of::<T>());
        Error::new(ErrorKind::HostMemory, format!("{what}: no memory for {bytes} bytes"))
    })?;
    vec.resize(len, value);
    Ok(vec)
}
