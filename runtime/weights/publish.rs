//! Folders that appear whole or not at all: what a trainer saves a checkpoint with, and how deltas are written.
//!
//! A reader that looks at a folder while it is being filled sees half a checkpoint, and a machine that loses power keeps
//! names whose bytes never reached the disk. So a folder is filled under another name, every file and the folder are
//! synced, the folder gets its name in one step, and the folder above is synced. Whoever finds the name finds all of it;
//! that it *is* a checkpoint is what [`super::Checkpoint::open`] finds out from the headers and the index alone.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, io_error};

/// Gives the finished folder `partial` its name `folder`, on the same file system.
///
/// # Errors
/// `Argument` if `folder` exists; `Io` if a file cannot be synced or the name cannot be given. `partial` is then as it was.
pub fn publish(partial: &Path, folder: &Path) -> Result<()> {
    refuse_existing(folder)?;
    sync_tree(partial)?;
    // Another process may have made the folder meanwhile: then this fails, unless it is empty.
    fs::rename(partial, folder).map_err(|e| io_error(folder, e))?;
    match folder.parent() {
        Some(above) if !above.as_os_str().is_empty() => sync_folder(above),
        _ => sync_folder(Path::new(".")),
    }
}

fn refuse_existing(folder: &Path) -> Result<()> {
    if folder.symlink_metadata().is_ok() {
        return Err(Error::argument(format!("{}: it exists; name a folder that does not", folder.display())));
    }
    Ok(())
}

fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| io_error(folder, e))? {
        let path = entry.map_err(|e| io_error(folder, e))?.path();
        let fail = |e| io_error(&path, e);
        if fs::metadata(&path).map_err(fail)?.is_dir() {
            sync_tree(&path)?;
        } else {
            // Windows syncs only what is open for writing.
            let file = OpenOptions::new().read(true).write(cfg!(windows)).open(&path).map_err(fail)?;
            file.sync_all().map_err(fail)?;
        }
    }
    sync_folder(folder)
}

/// Makes the names in a folder durable. Windows cannot open a folder as a file; its journal keeps the names.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(windows) {
        return Ok(());
    }
    let fail = |e| io_error(folder, e);
    File::open(folder).map_err(fail)?.sync_all().map_err(fail)
}

/// A folder that has another name until it is complete, and goes away if it never is.
pub struct PartialFolder {
    partial: PathBuf,
    folder: PathBuf,
}

impl PartialFolder {
    /// Makes an empty folder beside `folder`.
    ///
    /// # Errors
    /// `Argument` if `folder` exists or does not end in a name; `Io` or `NotFound` if the folder above is not there.
    pub fn create(folder: &Path) -> Result<Self> {
        refuse_existing(folder)?;
        let Some(name) = folder.file_name() else {
            return Err(Error::argument(format!("{}: it must end in the name of a folder", folder.display())));
        };
        let mut partial = name.to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        let partial = folder.with_file_name(partial);
        fs::create_dir(&partial).map_err(|e| io_error(&partial, e))?;
        Ok(PartialFolder { partial, folder: folder.to_owned() })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives it the name that it was created for; see [`publish`].
    ///
    /// # Errors
    /// As [`publish`]; the folder is then gone.
    pub fn publish(self) -> Result<()> {
        publish(&self.partial, &self.folder)
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        // Gone after `publish`. Best effort: the error that led here is the one to report.
        let _ = fs::remove_dir_all(&self.partial);
    }
}
