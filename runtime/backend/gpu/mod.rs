//! The GPU executor: the shaders, through wgpu, over copies of the weights.

mod adapters;
mod attention;
mod blocks;
mod buffers;
mod cache;
mod device;
mod executor;
mod head;
#[cfg(target_os = "linux")]
mod import;
#[cfg(not(target_os = "linux"))]
#[path = "no_import.rs"]
mod import;
mod layers;
mod limits;
mod matrix;
mod pipelines;
mod probe;
mod readback;
mod record;
mod resident;
mod select;
mod self_test;
mod upload;

pub use device::{Gpu, GpuOptions, MatrixUnits};
pub(crate) use executor::scratch_bytes;
pub use executor::{GpuExecutor, GpuWeights, Sizes};
pub use pipelines::{Flags, Format, TileShape, resolve};
pub use probe::{Probe, dispatch_once};
pub use resident::Resident;
pub use select::{DeviceInfo, DeviceType, Selection, list_devices};
pub use self_test::{pack_tiles, tiled_attention, tiled_product};
pub use upload::UploadedBytes;
