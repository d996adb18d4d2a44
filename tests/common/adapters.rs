//! Adapter folders that tests make.

use std::path::Path;

use rewardrt::weights::Dtype;
use serde_json::{Map, Value, json};

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
        let bytes = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let data = &bytes[8 + length..];
        let tensor = |(name, info): (&String, &Value)| {
            let numbers = |key: &str| -> Vec<usize> {
                info[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
            };
            let [begin, end] = numbers("data_offsets")[..] else { panic!("{name}") };
            let dtype = Dtype::ALL.into_iter().find(|d| info["dtype"] == d.name()).unwrap();
            Tensor { name: name.clone(), shape: numbers("shape"), values: dtype.to_f32(&data[begin..end]) }
        };
        let tensors = header.iter().filter(|(name, _)| *name != "__metadata__").map(tensor).collect();
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
        let (mut header, mut data) = (Map::new(), Vec::new());
        for tensor in &self.tensors {
            let start = data.len();
            data.extend(Dtype::F32.from_f32(&tensor.values));
            let info = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()]});
            header.insert(tensor.name.clone(), info);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        std::fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
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
