//! An open device: buffers, submissions and waits, with every way they fail turned into an error.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::cache::ShaderCache;
use super::import::HostImport;
use super::pipelines::Flags;
use super::select::{DeviceInfo, Selection, describe, find};
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::KV_BLOCK;

/// A submission that takes longer counts as a lost device.
const SUBMISSION_LIMIT: Duration = Duration::from_secs(120);
/// One wait, so that a lost device is noticed in between.
const WAIT: Duration = Duration::from_millis(500);
/// Panics of waits for one submission before the device counts as lost.
const WAIT_PANICS: u32 = 3;

/// Whether products use a GPU's matrix units (cooperative matrices: f16 inputs, f32 sums).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatrixUnits {
    /// Where the adapter has them, the weights are 16-bit floats, and the precision allows it.
    #[default]
    Auto,
    /// Never: nothing is rounded.
    Off,
    /// Computed by ordinary instructions with the same indices, in tiles of so many rows, 8 or 16: slow, to test them on
    /// adapters that have none.
    Emulated(u32),
}

/// How a GPU is used.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// Keeps compiled shaders in this folder; `None`: they are compiled at each start.
    pub shader_cache: Option<PathBuf>,
    /// Whether products use matrix units.
    pub matrix_units: MatrixUnits,
    /// Lets the order of additions depend on how many rows a step has, where matrix units are used: to measure what it costs
    /// that it does not.
    pub batch_variant: bool,
    /// Compiles shaders with checks of every index and loop: for tests, at a cost.
    pub shader_checks: bool,
    /// Uploads all weights through staging buffers, also those that the device could copy from the mapped file itself
    /// (Vulkan on Linux, VK_EXT_external_memory_host).
    pub stage_weights: bool,
}

/// An open GPU.
pub struct Gpu {
    info: DeviceInfo,
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) limits: wgpu::Limits,
    pub(super) subgroups: bool,
    pub(super) f16: bool,
    pub(super) timestamps: bool,
    pub(super) shader_checks: bool,
    pub(super) batch_variant: bool,
    pub(super) cache: Mutex<Option<ShaderCache>>,
    /// `None`: it cannot, or must not.
    pub(super) host_import: Option<HostImport>,
    matrix_units: MatrixUnits,
    /// Rows of the square tiles that the matrix units multiply.
    tile: Option<u32>,
    /// What the test of the matrix units found.
    tested: OnceLock<Option<u32>>,
    /// The same, of attention.
    attention_tested: OnceLock<bool>,
    lost: Arc<AtomicBool>,
    /// First error that no scope caught.
    uncaptured: Arc<Mutex<Option<String>>>,
}

impl Gpu {
    /// Opens the device that `selection` means; `None` for the CPU.
    ///
    /// # Errors
    /// `NoDevice` if nothing matches, `Gpu` if it cannot be opened.
    pub fn select(selection: &Selection, options: &GpuOptions) -> Result<Option<Gpu>> {
        match find(selection)? {
            Some(adapter) => caught("opening the device", || Self::open(&adapter, options))?.map(Some),
            None => Ok(None),
        }
    }

    fn open(adapter: &wgpu::Adapter, options: &GpuOptions) -> Result<Gpu> {
        let info = describe(adapter);
        let limits = adapter.limits();
        let mut wanted = wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_F16
            | wgpu::Features::PIPELINE_CACHE
            | wgpu::Features::TIMESTAMP_QUERY;
        let has_f16 = adapter.features().contains(wgpu::Features::SHADER_F16);
        let tile = match options.matrix_units {
            MatrixUnits::Auto => info.matrix_tile,
            MatrixUnits::Emulated(tile) if ![8, 16].contains(&tile) => {
                return Err(Error::argument(format!("matrix units in tiles of {tile} rows; 8 or 16")));
            }
            MatrixUnits::Emulated(tile) if has_f16 => Some(tile),
            MatrixUnits::Emulated(_) => {
                return Err(Error::unsupported(format!(
                    "{}: matrix units are emulated in f16, which it lacks",
                    info.name
                )));
            }
            _ => None,
        };
        let mut experimental = wgpu::ExperimentalFeatures::disabled();
        if options.matrix_units == MatrixUnits::Auto && tile.is_some() {
            wanted |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            // SAFETY: what they compute is tested before it is used.
            experimental = unsafe { wgpu::ExperimentalFeatures::enabled() };
        }
        if !adapter.features().contains(wgpu::Features::IMMEDIATES) || limits.max_immediate_size < MOST_PARAMS {
            return Err(Error::unsupported(format!(
                "{}: {} bytes of immediates, {MOST_PARAMS} are needed",
                info.name, limits.max_immediate_size
            )));
        }
        let features = (adapter.features() & wanted) | wgpu::Features::IMMEDIATES;
        // Shuffles over eight lanes need eight lanes.
        let subgroups = features.contains(wgpu::Features::SUBGROUP) && adapter.get_info().subgroup_min_size >= 8;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("rewardrt"),
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: experimental,
            ..wgpu::DeviceDescriptor::default()
        };
        let importing = if options.stage_weights { None } else { HostImport::open(adapter, &descriptor) };
        let (device, queue, host_import) = match importing {
            Some(Ok((device, queue, import))) => (device, queue, Some(import)),
            refused => {
                if let Some(Err(error)) = refused {
                    log::debug!("{}: not opened to import the host's memory: {error}", info.name);
                }
                let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
                    .map_err(|e| Error::gpu(format!("{}: the device cannot be opened: {e}", info.name)))?;
                (device, queue, None)
            }
        };
        let lost = Arc::new(AtomicBool::new(false));
        let uncaptured = Arc::new(Mutex::new(None));
        let slot = uncaptured.clone();
        // The default handler panics.
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            slot.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
        }));
        let flag = lost.clone();
        device.set_device_lost_callback(move |_, message| {
            log::error!("device lost: {message}");
            flag.store(true, Ordering::SeqCst);
        });
        let f16 = features.contains(wgpu::Features::SHADER_F16);
        let cache = match &options.shader_cache {
            Some(folder) if features.contains(wgpu::Features::PIPELINE_CACHE) => {
                ShaderCache::open(&device, &adapter.get_info(), folder)
            }
            _ => None,
        };
        Ok(Gpu {
            info,
            device,
            queue,
            limits,
            subgroups,
            f16,
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            shader_checks: options.shader_checks,
            batch_variant: options.batch_variant,
            cache: Mutex::new(cache),
            host_import,
            matrix_units: options.matrix_units,
            tile,
            tested: OnceLock::new(),
            attention_tested: OnceLock::new(),
            lost,
            uncaptured,
        })
    }

    /// Rows of the tiles that matrix units multiply here, if they were tested and found right.
    pub fn matrix_tile(&self) -> Option<u32> {
        *self.tested.get_or_init(|| {
            let tile = self.tile?;
            match super::self_test::matrix_units(self, tile) {
                Ok(()) => Some(tile),
                Err(error) => {
                    log::warn!("{}: matrix units are not used: {error}", self.info.name);
                    None
                }
            }
        })
    }

    /// True if attention on the matrix units was tested as well, and found right.
    pub fn matrix_attention(&self) -> bool {
        *self.attention_tested.get_or_init(|| {
            let Some(tile) = self.matrix_tile() else { return false };
            let tested = super::self_test::attention(self, tile);
            if let Err(error) = &tested {
                log::warn!("{}: attention uses no matrix units: {error}", self.info.name);
            }
            tested.is_ok()
        })
    }

    /// True if a shader of this variant computes itself what matrix units would.
    pub(super) fn emulates(&self, variant: Flags) -> bool {
        variant.is_tiled() && matches!(self.matrix_units, MatrixUnits::Emulated(_))
    }

    /// True for llvmpipe and its like, whose submissions take seconds.
    pub(super) fn is_software(&self) -> bool {
        self.info.device_type == super::select::DeviceType::Software
    }

    /// Keeps what was compiled for the next start.
    pub(super) fn save_shaders(&self) {
        if let Some(cache) = &mut *self.cache.lock().unwrap_or_else(PoisonError::into_inner) {
            cache.save();
        }
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Ends the device: every later call fails with `DeviceLost`. For tests of that path.
    pub fn destroy(&self) {
        self.lost.store(true, Ordering::SeqCst);
        self.device.destroy();
    }

    /// Behaves like a device whose bindings hold `bytes`: for tests of the splitting.
    pub fn limit_bindings(&mut self, bytes: u64) {
        self.limits.max_storage_buffer_binding_size = self.limits.max_storage_buffer_binding_size.min(bytes);
    }

    /// Behaves like a device whose buffers hold `bytes`: for tests of what is bounded.
    pub fn limit_buffers(&mut self, bytes: u64) {
        self.limits.max_buffer_size = self.limits.max_buffer_size.min(bytes);
    }

    /// Positions whose keys of one layer, of elements of `kv_element` bytes, fit a storage binding.
    pub fn most_kv_tokens(&self, kv_width: usize, kv_element: usize) -> usize {
        let bytes = self.max_binding() / (kv_element * kv_width) as u64;
        usize::try_from(bytes).unwrap_or(usize::MAX) / KV_BLOCK * KV_BLOCK
    }

    /// Memory that the threads of a workgroup may share.
    pub fn workgroup_bytes(&self) -> usize {
        self.limits.max_compute_workgroup_storage_size as usize
    }

    /// Largest storage binding, a multiple of 256.
    pub(super) fn max_binding(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size) / 256 * 256
    }

    /// A buffer of at least `bytes`.
    pub(super) fn buffer(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        // At least a parameter struct, and whole 16-byte units.
        let size = bytes.max(64).next_multiple_of(16);
        if size > self.limits.max_buffer_size {
            return Err(Error::limit(format!(
                "{label}: {size} bytes, a buffer of this device holds {}",
                self.limits.max_buffer_size
            )));
        }
        let usage = usage | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.checked(label, || self.device.create_buffer(&descriptor))
    }

    /// Runs calls that create something and returns it, or the error they raised.
    pub(super) fn checked<T>(&self, what: &str, create: impl FnOnce() -> T) -> Result<T> {
        self.alive()?;
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let created = caught(what, create);
        let validation = pollster::block_on(validation.pop());
        let internal = pollster::block_on(internal.pop());
        let memory = pollster::block_on(memory.pop());
        if let Some(error) = memory {
            return Err(Error::new(ErrorKind::DeviceMemory, format!("{what}: {error}")));
        }
        if let Some(error) = validation.or(internal) {
            return Err(Error::gpu(format!("{what}: {error}")));
        }
        self.alive()?;
        created
    }

    /// True once nothing can be computed on it any more.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Fails if the device is lost or an error came from outside every scope.
    pub(super) fn alive(&self) -> Result<()> {
        if self.is_lost() {
            return Err(Error::new(ErrorKind::DeviceLost, format!("{}: the device was lost", self.info.name)));
        }
        match self.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(message) => Err(Error::gpu(message)),
            None => Ok(()),
        }
    }

    /// Waits until `submission` is done, at most [`SUBMISSION_LIMIT`].
    pub(super) fn wait(&self, submission: wgpu::SubmissionIndex) -> Result<()> {
        let start = Instant::now();
        let mut panics = 0;
        loop {
            self.alive()?;
            let wait = wgpu::PollType::Wait { submission_index: Some(submission.clone()), timeout: Some(WAIT) };
            // A device that is lost during the wait makes `poll` panic. So does, once, a wait that times out just as another
            // thread's submission finds the queue empty (wgpu-core 30 asserts on what it read before that).
            let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(wait)));
            match polled {
                Ok(Ok(_)) => return self.alive(),
                Ok(Err(wgpu::PollError::Timeout)) if start.elapsed() < SUBMISSION_LIMIT => {}
                Ok(Err(wgpu::PollError::Timeout)) => {
                    self.lost.store(true, Ordering::SeqCst);
                    let message = format!("{}: no answer for {} s", self.info.name, SUBMISSION_LIMIT.as_secs());
                    return Err(Error::new(ErrorKind::DeviceLost, message));
                }
                Ok(Err(error)) => return Err(Error::gpu(error.to_string())),
                Err(_) if panics < WAIT_PANICS => panics += 1,
                Err(_) => {
                    self.lost.store(true, Ordering::SeqCst);
                    return self.alive();
                }
            }
        }
    }

    /// Waits for the answer to `map_async` after the submission it waited for is done.
    pub(super) fn mapped(&self, answer: &std::sync::mpsc::Receiver<bool>) -> Result<()> {
        // Another thread that polls the device may be the one to call back, a moment later. After a loss nobody does.
        if answer.recv_timeout(WAIT) != Ok(true) {
            self.alive()?;
            return Err(Error::gpu("the buffer was not mapped"));
        }
        Ok(())
    }

    /// Reads the first `bytes` of a MAP_READ buffer after `submission`.
    pub(super) fn read(&self, buffer: &wgpu::Buffer, bytes: u64, submission: wgpu::SubmissionIndex) -> Result<Vec<u8>> {
        let bytes = bytes.next_multiple_of(8);
        let (sender, mapped) = std::sync::mpsc::channel();
        self.checked("reading back", || {
            buffer.slice(0..bytes).map_async(wgpu::MapMode::Read, move |result| {
                // Who no longer waits does not want to know.
                let _ = sender.send(result.is_ok());
            });
        })?;
        let copy = self.wait(submission).and_then(|()| {
            self.mapped(&mapped)?;
            let view = buffer.slice(0..bytes).get_mapped_range();
            view.map(|v| v.to_vec()).map_err(|e| Error::gpu(format!("reading back: {e}")))
        });
        // Also after an error, or the next step would find it mapped.
        caught("unmapping", || buffer.unmap())?;
        copy
    }
}

/// Bytes of immediates that the largest parameter struct needs.
pub(super) const MOST_PARAMS: u32 = 64;

/// Turns a panic inside the graphics API into an error.
pub(super) fn caught<T>(what: &str, f: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f))
        .map_err(|p| Error::gpu(format!("{what}: the graphics API panicked: {}", crate::engine::panic_text(&*p))))
}
