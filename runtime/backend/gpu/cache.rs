//! Compiled pipelines on disk, so that a second start does not compile them again.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

/// Before the driver's own bytes: what the file is, and their hash. Drivers check who wrote a cache, not whether it is whole.
const MAGIC: &[u8; 8] = b"RRTPIPE1";

/// The driver's pipeline cache, and the file it is kept in.
pub(super) struct ShaderCache {
    cache: wgpu::PipelineCache,
    file: PathBuf,
    loaded: Option<u64>,
}

impl ShaderCache {
    /// Opens the cache of this adapter in `folder`; `None` where the adapter has none.
    pub(super) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, folder: &Path) -> Option<Self> {
        let file = folder.join(wgpu::util::pipeline_cache_key(info)?);
        let bytes = std::fs::read(&file).ok();
        let data = bytes.as_deref().and_then(checked);
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("rewardrt"), data, fallback: true };
        // SAFETY: the bytes are those that `save` got from a driver: their hash says so.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(ShaderCache { cache, loaded: data.map(xxh3_64), file })
    }

    pub(super) fn get(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes the file anew if something was compiled. A cache that cannot be written costs time, not results.
    pub(super) fn save(&mut self) {
        let Some(data) = self.cache.get_data() else { return };
        let hash = xxh3_64(&data);
        if self.loaded == Some(hash) {
            return;
        }
        let bytes = [&MAGIC[..], &hash.to_le_bytes(), &data].concat();
        match write(&self.file, &bytes) {
            Ok(()) => self.loaded = Some(hash),
            Err(error) => log::warn!("{}: the shader cache cannot be written: {error}", self.file.display()),
        }
    }
}

/// The driver's bytes, if the file is whole.
fn checked(bytes: &[u8]) -> Option<&[u8]> {
    let (hash, data) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*hash) == xxh3_64(data)).then_some(data)
}

/// Another process finds the old file or the new one.
fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = file.with_extension(std::process::id().to_string());
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, file).inspect_err(|_| {
        // What is left is only rubbish.
        let _ = std::fs::remove_file(&temporary);
    })
}
