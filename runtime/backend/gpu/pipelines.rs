//! Shaders → pipelines, one per kernel and variant, built when a model first needs it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::PoisonError;

use super::cache::ShaderCache;
use super::device::Gpu;
use crate::error::Result;
use crate::kernels::{Access, Kernel};
use crate::weights::Dtype;

/// What shaders share: the text of `#include NAME`.
const INCLUDES: [(&str, &str); 7] = [
    ("adapter", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/adapter.wgsl"))),
    ("enable", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/enable.wgsl"))),
    ("half_value", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/half_value.wgsl"))),
    ("inputs", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/inputs.wgsl"))),
    ("main", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/main.wgsl"))),
    ("products", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/products.wgsl"))),
    ("tiles", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/include/tiles.wgsl"))),
];

/// How weights lie on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Rows as stored in the checkpoint.
    Rows(Dtype),
    /// 8-bit integers with scales.
    Int8,
    /// 4-bit integers with scales.
    Int4,
    /// f16 in square tiles of this many rows, for the matrix units.
    Tiles(u32),
}

/// How many rows and columns of a product a workgroup takes. The results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TileShape {
    /// One row; ordinary instructions only, since matrix units have no smaller tile.
    OneRow,
    /// Few rows: weights are read at the memory's speed.
    #[default]
    Narrow,
    /// Up to four tiles of rows; matrix units only.
    Medium,
    /// Many rows.
    Wide,
}

/// What a shader's `#if` lines may ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags {
    /// The adapter has subgroups of at least 8 lanes.
    pub subgroup: bool,
    /// The adapter has 16-bit floats.
    pub f16: bool,
    /// Rows are whole vec4s.
    pub vec4: bool,
    /// How weights are stored; `None` for kernels without weights.
    pub format: Option<Format>,
    /// Rows and columns of a workgroup, for products.
    pub shape: TileShape,
    /// The product is the pass over the vocabulary.
    pub head: bool,
    /// Matrix units are computed by the shader itself.
    pub emulated: bool,
    /// Many rows are not added up as few are.
    pub one_chunk: bool,
    /// The output is f16.
    pub half_out: bool,
    /// Keys and values are f16.
    pub half_kv: bool,
    /// The input is f16, of a kernel without weights.
    pub half_in: bool,
    /// Rows have adapters.
    pub adapters: bool,
    /// Queries are f16.
    pub half_q: bool,
    /// E, for the kernels of attention, which take fewer queries at a time where heads are large.
    pub head_dim: u32,
}

impl Flags {
    fn tile(self) -> Option<u32> {
        if let Some(Format::Tiles(size)) = self.format { Some(size) } else { None }
    }

    fn native_f16(self) -> bool {
        self.f16 && self.format == Some(Format::Rows(Dtype::F16))
    }

    /// True for a product on matrix units.
    pub fn is_tiled(self) -> bool {
        self.tile().is_some()
    }

    /// True if the shader needs 16-bit floats.
    pub fn needs_f16(self) -> bool {
        let half = self.half_out || self.half_kv || self.half_in || self.half_q;
        self.native_f16() || self.tile().is_some() || half
    }

    /// True if the shader needs matrix units.
    pub fn needs_matrix_units(self) -> bool {
        self.tile().is_some() && !self.emulated
    }

    fn is_set(self, name: &str) -> bool {
        let tiles = self.tile().is_some();
        match name {
            "SUBGROUP" => self.subgroup && !tiles,
            "BY_SUBGROUP" => {
                if tiles {
                    !self.emulated
                } else {
                    self.subgroup
                }
            }
            "F16" => self.needs_f16(),
            "NATIVE_F16" => self.native_f16(),
            "HALF_TABLE" => self.native_f16() || tiles,
            "VEC4" => self.vec4,
            "INT8" => self.format == Some(Format::Int8),
            "INT4" => self.format == Some(Format::Int4),
            "BF16" => self.format == Some(Format::Rows(Dtype::BF16)),
            "F16_WEIGHTS" => self.format == Some(Format::Rows(Dtype::F16)),
            "TILES" => tiles,
            "TILE8" => self.tile() == Some(8),
            "MATRIX" => self.needs_matrix_units(),
            "EMULATED" => self.emulated,
            "ONE_CHUNK" => self.one_chunk,
            "ONE_ROW" => self.shape == TileShape::OneRow,
            "WIDE" => self.shape == TileShape::Wide,
            "MEDIUM" => self.shape == TileShape::Medium,
            "HEAD" => self.head,
            "FOUR" => tiles && (self.shape == TileShape::Medium || (self.head && self.shape == TileShape::Narrow)),
            "HALF_OUT" => self.half_out,
            "HALF_KV" => self.half_kv,
            "HALF_IN" => self.half_in,
            "ADAPTERS" => self.adapters,
            "HALF_Q" => self.half_q,
            "HEAD_ABOVE_64" => self.head_dim > 64,
            "HEAD_ABOVE_128" => self.head_dim > 128,
            "HEAD_ABOVE_256" => self.head_dim > 256,
            _ => false,
        }
    }

    /// Rows and columns of a product that a workgroup owns: the constants of shaders/include.
    pub fn workgroup_tile(self) -> [u32; 2] {
        match (self.tile(), self.shape, self.head) {
            (None, TileShape::OneRow, head) => [1, if head { 64 } else { 16 }],
            (None, TileShape::Wide, _) => [16, 64],
            (None, _, true) => [4, 64],
            (None, _, false) => [4, 16],
            (Some(tile), TileShape::Wide, _) => [4 * tile, 4 * tile],
            (Some(tile), _, true) => [tile, 4 * tile],
            (Some(tile), TileShape::Medium, false) => [4 * tile, tile],
            (Some(tile), _, false) => [tile, tile],
        }
    }
}

/// Resolves the `#include NAME` and `#if NAME` / `#else` / `#endif` lines of a shader. Outside includes lines stay where
/// they are, so that positions in error messages are those of the file up to the first include.
pub fn resolve(source: &str, flags: Flags) -> String {
    let mut out = String::with_capacity(source.len());
    append(source, flags, &mut out);
    out
}

fn append(source: &str, flags: Flags, out: &mut String) {
    let mut open: Vec<bool> = Vec::new();
    for line in source.lines() {
        let word = line.trim();
        if let Some(name) = word.strip_prefix("#if ") {
            open.push(flags.is_set(name.trim()));
        } else if word == "#else" {
            if let Some(last) = open.last_mut() {
                *last = !*last;
            }
        } else if word == "#endif" {
            open.pop();
        } else if open.iter().all(|o| *o) {
            match word.strip_prefix("#include ") {
                // A name that is not there leaves a line that does not parse.
                Some(name) => match INCLUDES.iter().find(|(known, _)| *known == name) {
                    Some((_, text)) => append(text, flags, out),
                    None => out.push_str(line),
                },
                None => out.push_str(line),
            }
        }
        out.push('\n');
    }
}

/// A pipeline and how it is bound.
#[derive(Clone)]
pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// The pipelines built so far. Variants of a kernel share its layout, and so a bind group, but for those with adapters.
#[derive(Clone, Default)]
pub(super) struct Pipelines {
    /// With adapters and without.
    layouts: HashMap<(&'static str, bool), wgpu::BindGroupLayout>,
    built: HashMap<(&'static str, Flags), Pipeline>,
}

impl Pipelines {
    /// The pipeline for a variant, with the device's own features.
    pub(super) fn get(&mut self, gpu: &Gpu, kernel: &Kernel, variant: Flags) -> Result<Pipeline> {
        let flags = Flags {
            subgroup: gpu.subgroups,
            f16: gpu.f16,
            emulated: gpu.emulates(variant),
            one_chunk: gpu.batch_variant && variant.is_tiled() && variant.shape == TileShape::Wide,
            ..variant
        };
        let layout = match self.layouts.entry((kernel.name, flags.adapters)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(layout(gpu, kernel, flags.adapters)?),
        };
        match self.built.entry((kernel.name, flags)) {
            Entry::Occupied(built) => Ok(built.get().clone()),
            Entry::Vacant(place) => Ok(place.insert(build(gpu, kernel, layout, flags)?).clone()),
        }
    }
}

pub(super) fn layout(gpu: &Gpu, kernel: &Kernel, adapters: bool) -> Result<wgpu::BindGroupLayout> {
    let entry = |(i, (_, access)): (usize, (&str, Access))| wgpu::BindGroupLayoutEntry {
        binding: i as u32 + 1,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: access == Access::Read },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    };
    let entries: Vec<_> = kernel.bindings(adapters).enumerate().map(entry).collect();
    let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(kernel.name), entries: &entries };
    gpu.checked(kernel.name, || gpu.device.create_bind_group_layout(&descriptor))
}

pub(super) fn build(gpu: &Gpu, kernel: &Kernel, layout: &wgpu::BindGroupLayout, flags: Flags) -> Result<Pipeline> {
    let what = format!("shader {}", kernel.name);
    let cache = gpu.cache.lock().unwrap_or_else(PoisonError::into_inner);
    gpu.checked(&what, || {
        let source = wgpu::ShaderSource::Wgsl(resolve(kernel.source, flags).into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source };
        let module = if gpu.shader_checks {
            gpu.device.create_shader_module(descriptor)
        } else {
            // SAFETY: loops end and indices are in range, for what is bound has the sizes that the Plan says, and token
            // ids, slots and block tables are checked by the engine. Tests run the same shaders with the checks.
            unsafe { gpu.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let pipeline_layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.name),
            bind_group_layouts: &[Some(layout)],
            immediate_size: kernel.params_size as u32,
        });
        let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Every shader writes workgroup memory before it reads it.
                zero_initialize_workgroup_memory: gpu.shader_checks,
                ..Default::default()
            },
            cache: cache.as_ref().map(ShaderCache::get),
        });
        Pipeline { pipeline, layout: layout.clone() }
    })
}
