//! The weights as the CPU's kernels read them.

use std::collections::HashSet;
use std::sync::Arc;

use super::{CpuOptions, Product, view};
use crate::backend::{DeviceWeights, Loader};
use crate::error::Result;
use crate::kernels::linear::{Columns, Quantised, Then, Weight};
use crate::kernels::lora_up::Delta;
use crate::model::{MatrixId, ModelSpec, Plan, Projection};
use crate::weights::{Tensor, Weights};

/// The weights of a model: in the checkpoint's own bytes, and what is made of them.
#[derive(Clone, Default)]
pub struct CpuWeights {
    /// By [`MatrixId`].
    pub(super) matrices: Vec<Tensor>,
    /// By [`MatrixId`], where the weight is quantised.
    pub(super) quantised: Vec<Option<Arc<Quantised>>>,
    /// By [`VectorId`](crate::model::VectorId).
    pub(super) vectors: Vec<Arc<[f32]>>,
    /// Bytes of the tensors that are not in mapped files.
    in_memory: u64,
}

impl CpuWeights {
    pub(super) fn weight(&self, id: MatrixId) -> Weight<'_> {
        match &self.quantised[id.0] {
            Some(matrix) => matrix.weight(),
            None => Weight::Stored(view(&self.matrices[id.0])),
        }
    }

    fn columns<'a>(&'a self, p: &Projection, delta: Option<Delta<'a>>) -> Columns<'a> {
        Columns { weight: self.weight(p.weight), bias: p.bias.map(|b| &self.vectors[b.0][..]), delta }
    }

    /// `delta(i)`: what adapters add to the product's i-th projection.
    pub(super) fn then<'a>(&'a self, product: &Product, delta: impl Fn(usize) -> Option<Delta<'a>>) -> Then<'a> {
        match product {
            Product::Store(p) => Then::Store(self.columns(p, delta(0))),
            Product::Add(p) => Then::Add(self.columns(p, delta(0))),
            Product::Gated { gate, up } => {
                Then::Gated { gate: self.columns(gate, delta(0)), up: self.columns(up, delta(1)) }
            }
        }
    }

    /// Bytes in memory of its own, and bytes in mapped files.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let mapped = self.matrices.iter().filter(|m| m.is_mapped()).map(|m| m.bytes().len() as u64).sum();
        let quantised: u64 = self.quantised.iter().flatten().map(|m| m.bytes() as u64).sum();
        let vectors: u64 = self.vectors.iter().map(|v| 4 * v.len() as u64).sum();
        (self.in_memory + quantised + vectors, mapped)
    }
}

/// Makes [`CpuWeights`] of a model's tensors.
pub(super) struct CpuLoader {
    pub spec: ModelSpec,
    pub plan: Arc<Plan>,
    pub options: CpuOptions,
}

impl CpuLoader {
    /// As [`Loader::load`].
    pub fn make(&self, weights: &Weights, held: Option<&CpuWeights>, changed: &HashSet<String>) -> Result<CpuWeights> {
        let plan = &self.plan;
        let held = held.filter(|h| h.matrices.len() == plan.matrices.len());
        let kept = |name: &String| held.filter(|_| !changed.contains(name));
        let matrices = plan.matrices.iter().map(|m| weights.get(&m.name).cloned()).collect::<Result<Vec<Tensor>>>()?;
        let mut quantised: Vec<Option<Arc<Quantised>>> = vec![None; matrices.len()];
        for id in plan.quantisable(&self.spec) {
            let name = &plan.matrices[id.0].name;
            if let Some(held) = kept(name) {
                quantised[id.0] = held.quantised[id.0].clone();
                continue;
            }
            quantised[id.0] = Quantised::of(self.options.format, view(&matrices[id.0]), &self.options.pool)
                .map_err(|e| e.at(format!("tensor {name:?}")))?
                .map(Arc::new);
        }
        let vector = |(i, name): (usize, &String)| -> Result<Arc<[f32]>> {
            match kept(name) {
                Some(held) => Ok(held.vectors[i].clone()),
                None => Ok(weights.get(name)?.to_f32().into()),
            }
        };
        let vectors = plan.vectors.iter().map(|v| &v.name).enumerate().map(vector).collect::<Result<_>>()?;
        Ok(CpuWeights { matrices, quantised, vectors, in_memory: weights.bytes_in_memory() })
    }
}

impl Loader for CpuLoader {
    fn load(
        &self,
        weights: &Weights,
        held: Option<&DeviceWeights>,
        changed: &HashSet<String>,
    ) -> Result<DeviceWeights> {
        let held = held.and_then(|held| match held {
            DeviceWeights::Cpu(held) => Some(&**held),
            DeviceWeights::Gpu(_) => None,
        });
        Ok(DeviceWeights::Cpu(Arc::new(self.make(weights, held, changed)?)))
    }
}
