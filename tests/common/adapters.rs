//! Adapter folders that tests make.

use std::path::Path;

use rewardrt::weights::Dtype;
use safetensors::serialize_to_file;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::checkpoints::{self, Owned};

/// The folder of a golden adapter.
pub fn folder(name: &str) -> std::path::PathBuf {
    super::golden("adapters").join(name)
}

/// A tensor in a file that a test writes.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// An adapter folder in the making.
#[derive(Clone)]
pub struct Files {
    pub config: Value,
    pub tensors: Vec<Tensor>,
}

impl Files {
    /// A golden adapter, to change something about it.
    pub fn golden(name: &str) -> Self {
        let folder = folder(name);
        let config = serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        let tensor = |t: Owned| Tensor { values: t.dtype.to_f32(&t.bytes), name: t.name, shape: t.shape };
        let tensors = checkpoints::tensors(&folder).into_iter().map(tensor).collect();
        Files { config, tensors }
    }

    /// An adapter of these modules of a model with L layers: `(name, N, K)` each. The values depend on the seed alone.
    pub fn random(layers: usize, modules: &[(&str, usize, usize)], rank: usize, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.6
        };
        let mut tensors = Vec::new();
        for layer in 0..layers {
            for (module, n, k) in modules {
                for (factor, shape) in [("A", vec![rank, *k]), ("B", vec![*n, rank])] {
                    let name = format!("base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight");
                    let values = (0..shape.iter().product()).map(|_| next()).collect();
                    tensors.push(Tensor { name, shape, values });
                }
            }
        }
        let targets: Vec<&str> = modules.iter().map(|(name, ..)| name.rsplit('.').next().unwrap()).collect();
        let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
                            "target_modules": targets});
        Files { config, tensors }
    }

    /// Writes the folder, which must exist.
    pub fn write(&self, folder: &Path) {
        std::fs::write(folder.join("adapter_config.json"), self.config.to_string()).unwrap();
        let bytes: Vec<Vec<u8>> = self.tensors.iter().map(|t| Dtype::F32.from_f32(&t.values)).collect();
        let mut views = Vec::new();
        for (t, bytes) in self.tensors.iter().zip(&bytes) {
            views.push((&t.name, TensorView::new(safetensors::Dtype::F32, t.shape.clone(), bytes).unwrap()));
        }
        serialize_to_file(views, None, &folder.join("adapter_model.safetensors")).unwrap();
    }

    /// The tensor whose name ends so.
    pub fn tensor(&mut self, end: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name.ends_with(end)).unwrap()
    }
}

/// The modules of `llama-tied`, as [`Files::random`] takes them.
pub const TIED: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 48, 48),
    ("self_attn.k_proj", 48, 48),
    ("self_attn.v_proj", 48, 48),
    ("self_attn.o_proj", 48, 48),
    ("mlp.gate_proj", 80, 48),
    ("mlp.up_proj", 80, 48),
    ("mlp.down_proj", 48, 80),
];
