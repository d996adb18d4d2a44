//! The GPU executor: the shaders, through wgpu, over copies of the weights.

mod device;
mod executor;
mod head;
mod pipelines;
mod probe;
mod select;
mod upload;

pub use device::Gpu;
pub use executor::GpuExecutor;
pub(crate) use executor::scratch_bytes;
pub use pipelines::{Flags, resolve};
pub use probe::dispatch_once;
pub use select::{DeviceInfo, DeviceType, Selection, list_devices};
