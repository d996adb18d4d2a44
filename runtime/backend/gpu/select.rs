//! Which device: what there is, and what a selection means.

use crate::error::{Error, ErrorKind, Result};

/// What kind of thing an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceType {
    /// A GPU with its own memory.
    Discrete,
    /// A GPU that shares the CPU's memory.
    Integrated,
    /// A GPU given to a virtual machine.
    Virtual,
    /// Software on the CPU, such as llvmpipe: for correctness, not for speed.
    Software,
    /// Something else.
    Other,
}

impl DeviceType {
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub const fn name(self) -> &'static str {
        match self {
            DeviceType::Discrete => "discrete",
            DeviceType::Integrated => "integrated",
            DeviceType::Virtual => "virtual",
            DeviceType::Software => "software",
            DeviceType::Other => "other",
        }
    }

    /// Order of preference for `auto` and `gpu`; software never is.
    fn rank(self) -> Option<u8> {
        match self {
            DeviceType::Discrete => Some(0),
            DeviceType::Integrated => Some(1),
            DeviceType::Virtual => Some(2),
            DeviceType::Other => Some(3),
            DeviceType::Software => None,
        }
    }
}

/// An adapter that wgpu found.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The adapter's name.
    pub name: String,
    /// Driver and version.
    pub driver: String,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// What kind of thing it is.
    pub device_type: DeviceType,
    /// Largest storage binding in bytes: larger weights are split by rows.
    pub max_binding: u64,
    /// Shaders may use 16-bit floats.
    pub has_f16: bool,
    /// Shaders may use subgroup operations.
    pub has_subgroups: bool,
    /// Rows of the square tiles that its matrix units multiply (f16 inputs, f32 sums); `None`: it has none that are of use.
    pub matrix_tile: Option<u32>,
}

/// What a caller asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// A real GPU if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A real GPU.
    Gpu,
    /// The first adapter, software included, whose name or driver contains this, ignoring case.
    Named(String),
}

impl Selection {
    /// Parses `auto`, `cpu`, `gpu` or `gpu:PART`.
    ///
    /// # Errors
    /// `Argument` for anything else.
    pub fn parse(text: &str) -> Result<Selection> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Selection::Auto),
            None if text == "cpu" => Ok(Selection::Cpu),
            None if text == "gpu" => Ok(Selection::Gpu),
            Some(("gpu", part)) if !part.is_empty() => Ok(Selection::Named(part.to_owned())),
            _ => Err(Error::argument(format!("device {text:?} is not one of: auto, cpu, gpu, gpu:PART-OF-NAME"))),
        }
    }
}

pub(super) fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    })
}

fn adapters() -> Vec<wgpu::Adapter> {
    pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()))
}

pub(super) fn describe(adapter: &wgpu::Adapter) -> DeviceInfo {
    let (info, features) = (adapter.get_info(), adapter.features());
    DeviceInfo {
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        backend: info.backend.to_str().to_owned(),
        device_type: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => DeviceType::Discrete,
            wgpu::DeviceType::IntegratedGpu => DeviceType::Integrated,
            wgpu::DeviceType::VirtualGpu => DeviceType::Virtual,
            wgpu::DeviceType::Cpu => DeviceType::Software,
            wgpu::DeviceType::Other => DeviceType::Other,
        },
        max_binding: adapter.limits().max_storage_buffer_binding_size,
        has_f16: features.contains(wgpu::Features::SHADER_F16),
        has_subgroups: features.contains(wgpu::Features::SUBGROUP),
        matrix_tile: matrix_tile(adapter),
        name: info.name,
    }
}

/// Rows of the square tiles that an adapter multiplies with f16 inputs and f32 sums.
fn matrix_tile(adapter: &wgpu::Adapter) -> Option<u32> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let needed = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16;
    if !adapter.features().contains(needed) {
        return None;
    }
    let properties = adapter.cooperative_matrix_properties();
    let usable = properties.iter().filter(|p| (p.ab_type, p.cr_type) == (F16, F32));
    let square = usable.filter(|p| p.m_size == p.n_size && p.n_size == p.k_size).map(|p| p.m_size);
    square.filter(|tile| [8, 16].contains(tile)).max()
}

/// Every adapter, in the order in which `auto` prefers them; software last.
///
/// # Errors
/// `Gpu` if the graphics API panics while enumerating.
pub fn list_devices() -> Result<Vec<DeviceInfo>> {
    let mut list =
        super::device::caught("enumerating adapters", || adapters().iter().map(describe).collect::<Vec<_>>())?;
    list.sort_by_key(|d| d.device_type.rank().unwrap_or(u8::MAX));
    Ok(list)
}

/// The adapter that a selection means; `None` for the CPU.
pub(super) fn find(selection: &Selection) -> Result<Option<wgpu::Adapter>> {
    if *selection == Selection::Cpu {
        return Ok(None);
    }
    let mut found = super::device::caught("enumerating adapters", adapters)?;
    found.sort_by_key(|a| describe(a).device_type.rank().unwrap_or(u8::MAX));
    let all: Vec<String> = found.iter().map(|a| describe(a).name).collect();
    let chosen = found.into_iter().find(|adapter| {
        let info = describe(adapter);
        match selection {
            Selection::Named(part) => {
                let part = part.to_lowercase();
                info.name.to_lowercase().contains(&part) || info.driver.to_lowercase().contains(&part)
            }
            _ => info.device_type.rank().is_some(),
        }
    });
    if chosen.is_none() && *selection != Selection::Auto {
        let tried =
            if all.is_empty() { "no adapter was found".to_owned() } else { format!("found: {}", all.join(", ")) };
        let what = match selection {
            Selection::Named(part) => format!("no adapter matches gpu:{part}"),
            _ => "no GPU (software adapters count only when named)".to_owned(),
        };
        return Err(Error::new(ErrorKind::NoDevice, format!("{what}; {tried}")));
    }
    Ok(chosen)
}
