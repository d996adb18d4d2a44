//! The bytes of one file: mapped or read.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

use crate::error::{Error, ErrorKind, Result, io_error};

enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

/// A file's identity when it was opened, to notice that somebody rewrote it in place.
#[derive(PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Stamp { len: metadata.len(), modified: metadata.modified().ok() }
    }
}

pub(super) struct FileBytes {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    bytes: Bytes,
}

impl FileBytes {
    pub(super) fn open(path: &Path, use_mmap: bool) -> Result<Self> {
        let fail = |e| io_error(path, e);
        // Opening a pipe would wait for its other end.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::new(ErrorKind::Io, format!("{}: not a regular file", path.display())));
        }
        let mut file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        let stamp = Stamp::of(&metadata);
        let bytes = if use_mmap {
            // SAFETY: the map is read-only. That nobody shortens the file while it is mapped is a condition that
            // `LoadOptions::use_mmap` states; `check_unchanged` narrows the window.
            Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(fail)?)
        } else {
            let len = usize::try_from(stamp.len)
                .map_err(|_| Error::limit(format!("{}: {} bytes do not fit in memory", path.display(), stamp.len)))?;
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(len).map_err(|_| {
                Error::new(ErrorKind::HostMemory, format!("{}: no memory for {len} bytes", path.display()))
            })?;
            (&mut file).take(stamp.len).read_to_end(&mut buffer).map_err(fail)?;
            Bytes::Read(buffer)
        };
        let source = FileBytes { path: path.to_owned(), file, stamp, bytes };
        source.check_unchanged()?;
        Ok(source)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(_))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Read(bytes) => bytes,
        }
    }

    /// Fails if the file's length or modification time is no longer what it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|e| io_error(&self.path, e))?;
        if Stamp::of(&now) == self.stamp && self.as_slice().len() as u64 == self.stamp.len {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Io,
            format!("{}: the file was changed while it was being loaded", self.path.display()),
        ))
    }
}
