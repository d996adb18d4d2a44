//! Shaders → pipelines, one per kernel and variant, built when a model first needs it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::device::Gpu;
use crate::error::Result;
use crate::kernels::{Access, Kernel};
use crate::weights::Dtype;

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
    pub dtype: Option<Dtype>,
    /// Weights are 8-bit integers with scales, whatever they were stored as.
    pub int8: bool,
    /// Keys and values are 16-bit floats.
    pub half_kv: bool,
    /// The output is 16-bit floats.
    pub half_out: bool,
    /// E, for the kernel that takes fewer queries at a time where heads are large.
    pub head_dim: u32,
}

impl Flags {
    fn is_set(self, name: &str) -> bool {
        match name {
            "SUBGROUP" => self.subgroup,
            "NATIVE_F16" => self.f16 && self.dtype == Some(Dtype::F16),
            "VEC4" => self.vec4,
            "HALF" => self.half_kv || self.half_out,
            "HALF_KV" => self.half_kv,
            "HALF_OUT" => self.half_out,
            "HEAD_ABOVE_128" => self.head_dim > 128,
            "HEAD_ABOVE_256" => self.head_dim > 256,
            "INT8" => self.int8,
            "BF16" => self.dtype == Some(Dtype::BF16),
            "F16_WEIGHTS" => self.dtype == Some(Dtype::F16),
            _ => false,
        }
    }
}

/// Resolves the `#if NAME` / `#else` / `#endif` lines of a shader. Lines stay where they are, so that positions in
/// error messages are those of the file.
pub fn resolve(source: &str, flags: Flags) -> String {
    let mut out = String::with_capacity(source.len());
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
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// The pipelines built so far.
#[derive(Default)]
pub(super) struct Pipelines {
    built: HashMap<(&'static str, Flags), Pipeline>,
}

impl Pipelines {
    /// The pipeline for what `variant` says of weights and rows, with the device's own features.
    pub(super) fn get(&mut self, gpu: &Gpu, kernel: &Kernel, variant: Flags) -> Result<&Pipeline> {
        let flags = Flags { subgroup: gpu.subgroups, f16: gpu.f16, ..variant };
        let key = (kernel.name, flags);
        match self.built.entry(key) {
            Entry::Occupied(built) => Ok(built.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(build(gpu, kernel, flags)?)),
        }
    }
}

pub(super) fn build(gpu: &Gpu, kernel: &Kernel, flags: Flags) -> Result<Pipeline> {
    let what = format!("shader {}", kernel.name);
    gpu.checked(&what, || {
        let source = wgpu::ShaderSource::Wgsl(resolve(kernel.source, flags).into());
        let module = gpu.device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source });
        let entry = |binding: usize, ty: wgpu::BufferBindingType| wgpu::BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
        for (i, (_, access)) in kernel.bindings.iter().enumerate() {
            entries.push(entry(i + 1, wgpu::BufferBindingType::Storage { read_only: *access == Access::Read }));
        }
        let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(kernel.name), entries: &entries };
        let layout = gpu.device.create_bind_group_layout(&descriptor);
        let pipeline_layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        Pipeline { pipeline, layout }
    })
}
