//! Checkpoints as a trainer sees them: named tensors in memory, changed a little, saved to folders.

use std::path::Path;

use rewardrt::weights::{Dtype, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{SafeTensors, serialize_to_file};

/// A tensor in a trainer's memory.
#[derive(Clone, PartialEq)]
pub struct Owned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Owned {
    pub fn data(&self) -> TensorData<'_> {
        TensorData { name: &self.name, dtype: self.dtype, shape: &self.shape, bytes: &self.bytes, checksum: None }
    }

    /// The same values in another dtype.
    pub fn to(&self, dtype: Dtype) -> Owned {
        Owned { dtype, bytes: dtype.from_f32(&self.dtype.to_f32(&self.bytes)), ..self.clone() }
    }
}

/// Every tensor of a model folder, in name order.
pub fn tensors(folder: &Path) -> Vec<Owned> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = match view.dtype() {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::BF16,
                other => panic!("{other}"),
            };
            all.push(Owned { name, dtype, shape: view.shape().to_vec(), bytes: view.data().to_vec() });
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// The checkpoint one training step later: every value moves a little, in a way that `salt` names.
pub fn trained(tensors: &[Owned], salt: u32) -> Vec<Owned> {
    let mut state = 0x9e37_79b9u32.wrapping_mul(salt + 1);
    let mut moved = |v: &f32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        v * (1.0 + (state >> 16) as f32 / 65536.0 * 0.4) + ((state >> 8) & 0xff) as f32 / 256.0 * 0.02 - 0.01
    };
    let next = |t: &Owned| {
        let values: Vec<f32> = t.dtype.to_f32(&t.bytes).iter().map(&mut moved).collect();
        Owned { bytes: t.dtype.from_f32(&values), ..t.clone() }
    };
    tensors.iter().map(next).collect()
}

/// Saves tensors as `folder/model.safetensors`, with the other files of `like`.
pub fn save(tensors: &[Owned], like: &Path, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for entry in std::fs::read_dir(like).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") && !path.to_string_lossy().contains("index") {
            std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
    }
    let mut views = Vec::new();
    for t in tensors {
        let dtype = match t.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
        };
        views.push((t.name.clone(), TensorView::new(dtype, t.shape.clone(), &t.bytes).unwrap()));
    }
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}
