//! The weights of a model on the device: made on any thread, shared by the models before and after an update as far as they
//! agree.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::device::Gpu;
use super::executor::GpuWeights;
use super::layers::{fits_half, gated_scale, rotated_bound};
use super::matrix::{Matrix, Order};
use super::upload::{UploadedBytes, Uploader};
use crate::backend::cpu::Pool;
use crate::backend::{DeviceWeights, Loader};
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::MatrixView;
use crate::kernels::linear::{Precision, Quantised, Weight};
use crate::model::{Head, MatrixId, ModelSpec, Op, Plan, Projection, VectorId};
use crate::weights::{Dtype, WeightFormat, Weights};

/// A matrix of the checkpoint as it is stored.
fn stored<'a>(plan: &Plan, weights: &'a Weights, id: MatrixId) -> Result<MatrixView<'a>> {
    let expected = &plan.matrices[id.0];
    let tensor = weights.get(&expected.name)?;
    Ok(MatrixView::new(tensor.dtype(), tensor.bytes(), expected.shape[0], expected.shape[1]))
}

/// Projections that share an input, merged.
#[derive(Clone)]
pub(super) struct Merged {
    pub matrix: Arc<Matrix>,
    pub bias: Option<wgpu::Buffer>,
    /// The largest magnitude in the bias.
    pub largest_bias: f32,
}

/// A norm's weight.
#[derive(Clone)]
pub(super) struct Norm {
    pub buffer: wgpu::Buffer,
    pub largest: f32,
}

/// What is on the device.
pub struct Resident {
    /// Rows of the matrix units' tiles, if products use them.
    pub(super) tile: Option<u32>,
    pub(super) table: Arc<Matrix>,
    pub(super) head: Arc<Matrix>,
    /// By the first of the matrices that are merged.
    merged: HashMap<MatrixId, Merged>,
    norms: HashMap<VectorId, Norm>,
    pub(super) bytes: u64,
    /// How it came there.
    pub(super) uploaded: UploadedBytes,
}

impl Resident {
    pub(super) fn merged(&self, first: &Projection) -> Result<&Merged> {
        self.merged.get(&first.weight).ok_or_else(|| Error::internal("a product without weights"))
    }

    pub(super) fn norm(&self, weight: VectorId) -> Result<&Norm> {
        self.norms.get(&weight).ok_or_else(|| Error::internal("a norm without weights"))
    }
}

/// Makes [`Resident`] weights.
#[derive(Clone)]
pub(super) struct GpuLoader {
    pub gpu: Arc<Gpu>,
    pub spec: ModelSpec,
    pub plan: Arc<Plan>,
    pub how: GpuWeights,
}

impl GpuLoader {
    /// Rows of the tiles that products of these weights could be computed in.
    pub fn tile(&self, weights: &Weights) -> Result<Option<u32>> {
        match self.gpu.matrix_tile() {
            Some(tile) if self.how.precision == Precision::Auto && self.how.format == WeightFormat::Stored => {
                Ok(can_tile(&self.spec, &self.plan, weights, tile)?.then_some(tile))
            }
            _ => Ok(None),
        }
    }

    /// Uploads what `held` does not have. `Unsupported` if it must be tiles and something is too large for f16.
    pub fn upload(
        &self,
        weights: &Weights,
        tile: Option<u32>,
        held: Option<&Resident>,
        changed: &HashSet<String>,
    ) -> Result<Resident> {
        let pool = &Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
        let mut upload = Upload {
            loader: self,
            weights,
            tile,
            held: held.filter(|h| h.tile == tile),
            changed,
            pool,
            uploader: Uploader::new(&self.gpu, pool, weights),
            quantisable: self.plan.quantisable(&self.spec),
            bytes: 0,
            count: 0,
            underflows: 0,
            merged: HashMap::new(),
            norms: HashMap::new(),
        };
        let (table, head) = upload.ends()?;
        upload.layers()?;
        upload.uploader.finish()?;
        let uploaded = upload.uploader.uploaded;
        let Upload { merged, norms, bytes, count, underflows, .. } = upload;
        log::info!(
            "weights: {} MiB staged, {} MiB copied from where they are mapped",
            uploaded.staged >> 20,
            uploaded.imported >> 20
        );
        if tile.is_some() {
            log::info!("products on matrix units: {count} weights as f16, {underflows} of them rounded (below 2^-14)");
        }
        Ok(Resident { tile, table, head, merged, norms, bytes, uploaded })
    }
}

impl Loader for GpuLoader {
    fn load(
        &self,
        weights: &Weights,
        held: Option<&DeviceWeights>,
        changed: &HashSet<String>,
    ) -> Result<DeviceWeights> {
        let held = held.and_then(|held| match held {
            DeviceWeights::Gpu(held) => Some(&**held),
            DeviceWeights::Cpu(_) => None,
        });
        // Weights that were once too large for f16 are not tried again with every update.
        let tile = if held.is_some_and(|h| h.tile.is_none()) { None } else { self.tile(weights)? };
        let resident = match self.upload(weights, tile, held, changed) {
            Err(error) if tile.is_some() && error.kind() == ErrorKind::Unsupported => {
                log::warn!("matrix units are no longer used: {error}");
                self.upload(weights, None, None, changed)?
            }
            result => result?,
        };
        Ok(DeviceWeights::Gpu(Arc::new(resident)))
    }
}

/// An upload under way.
struct Upload<'a> {
    loader: &'a GpuLoader,
    weights: &'a Weights,
    tile: Option<u32>,
    held: Option<&'a Resident>,
    changed: &'a HashSet<String>,
    pool: &'a Pool,
    uploader: Uploader<'a>,
    /// Matrices that may be held in another format than they are stored in.
    quantisable: Vec<MatrixId>,
    bytes: u64,
    count: u64,
    underflows: u64,
    merged: HashMap<MatrixId, Merged>,
    norms: HashMap<VectorId, Norm>,
}

impl<'a> Upload<'a> {
    fn is_quantised(&self, id: MatrixId) -> bool {
        self.loader.how.format != WeightFormat::Stored && self.quantisable.contains(&id)
    }

    /// What is held, if these tensors have not changed.
    fn kept(&self, names: &[&String]) -> Option<&'a Resident> {
        self.held.filter(|_| !names.iter().any(|name| self.changed.contains(*name)))
    }

    fn matrix_name(&self, id: MatrixId) -> &'a String {
        &self.loader.plan.matrices[id.0].name
    }

    /// The embedding table, and the head.
    fn ends(&mut self) -> Result<(Arc<Matrix>, Arc<Matrix>)> {
        let (plan, spec) = (&self.loader.plan, &self.loader.spec);
        let head = plan.head;
        let table = plan.ops.iter().find_map(|op| if let Op::Embed { table, .. } = op { Some(*table) } else { None });
        let table = table.ok_or_else(|| Error::internal("a plan without an embedding"))?;
        let tied = table == head;
        let language_model = matches!(spec.head, Head::LanguageModel { .. });
        let kept = self.kept(&[self.matrix_name(table)]).map(|held| held.table.clone());
        let table = match kept {
            Some(table) => self.keep(table),
            None if tied && self.tile.is_some() => self.product("embedding", &[table], Order::Plain, true)?,
            // As stored, also where its product form is quantised.
            None => self.as_stored("embedding", table)?,
        };
        if tied && !self.is_quantised(head) {
            return Ok((table.clone(), table));
        }
        let kept = self.kept(&[self.matrix_name(head)]).map(|held| held.head.clone());
        let head = match kept {
            Some(head) => self.keep(head),
            None if language_model => self.product("head", &[head], Order::Plain, true)?,
            None => self.as_stored("score head", head)?,
        };
        Ok((table, head))
    }

    fn keep(&mut self, matrix: Arc<Matrix>) -> Arc<Matrix> {
        self.bytes += matrix.bytes();
        matrix
    }

    fn as_stored(&mut self, name: &str, id: MatrixId) -> Result<Arc<Matrix>> {
        let part = Weight::Stored(stored(&self.loader.plan, self.weights, id)?);
        let matrix = Matrix::upload(&mut self.uploader, &self.loader.gpu, name, &[part], Order::Plain, None)?;
        Ok(self.keep(Arc::new(matrix)))
    }

    /// What matrices multiply with, merged.
    fn product(&mut self, name: &str, ids: &[MatrixId], order: Order, tiled: bool) -> Result<Arc<Matrix>> {
        // What is quantised is let go of once it is on the device.
        let mut integers = Vec::new();
        let mut views = Vec::new();
        for id in ids {
            let view = stored(&self.loader.plan, self.weights, *id)?;
            let format = if self.is_quantised(*id) { self.loader.how.format } else { WeightFormat::Stored };
            let quantised = Quantised::of(format, view, self.pool)
                .map_err(|e| e.at(format!("tensor {:?}", self.matrix_name(*id))))?;
            integers.push(quantised);
            views.push(view);
        }
        let weight =
            |(quantised, view)| Option::map_or(Option::as_ref(quantised), Weight::Stored(view), Quantised::weight);
        let parts: Vec<Weight> = integers.iter().zip(views).map(weight).collect();
        let tile = if tiled { self.tile } else { None };
        let matrix = Matrix::upload(&mut self.uploader, &self.loader.gpu, name, &parts, order, tile)?;
        if matrix.half.overflows() > 0 {
            return Err(Error::unsupported(format!(
                "{name}: {} weights are beyond the range of f16",
                matrix.half.overflows()
            )));
        }
        self.underflows += matrix.half.underflows();
        self.count += u64::from(matrix.rows) * u64::from(matrix.cols);
        Ok(self.keep(Arc::new(matrix)))
    }

    fn vector(&self, id: VectorId) -> Result<Vec<f32>> {
        Ok(self.weights.get(&self.loader.plan.vectors[id.0].name)?.to_f32())
    }

    fn upload_vector(&mut self, name: &str, values: &[f32]) -> Result<wgpu::Buffer> {
        let gpu = &self.loader.gpu;
        let buffer = gpu.buffer(name, values.len() as u64 * 4, wgpu::BufferUsages::STORAGE)?;
        gpu.checked(name, || gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(values)))?;
        Ok(buffer)
    }

    /// Merged projections with their biases.
    fn merge(&mut self, name: &str, projections: &[&Projection], order: Order) -> Result<Merged> {
        let Some(first) = projections.first() else { return Err(Error::internal("a product of nothing")) };
        let plan = &self.loader.plan;
        let mut names: Vec<&String> = projections.iter().map(|p| self.matrix_name(p.weight)).collect();
        names.extend(projections.iter().filter_map(|p| p.bias).map(|id| &plan.vectors[id.0].name));
        let merged = match self.kept(&names).map(|held| held.merged(first).cloned()) {
            Some(held) => {
                let held = held?;
                self.bytes += held.matrix.bytes();
                held
            }
            None => {
                let ids: Vec<MatrixId> = projections.iter().map(|p| p.weight).collect();
                let matrix = self.product(name, &ids, order, true)?;
                let (bias, largest_bias) = self.bias(name, projections, order)?;
                Merged { matrix, bias, largest_bias }
            }
        };
        self.bytes += merged.bias.as_ref().map_or(0, wgpu::Buffer::size);
        self.merged.insert(first.weight, merged.clone());
        Ok(merged)
    }

    /// The biases of merged projections, if there is any, and their largest magnitude.
    fn bias(&mut self, name: &str, projections: &[&Projection], order: Order) -> Result<(Option<wgpu::Buffer>, f32)> {
        if projections.iter().all(|p| p.bias.is_none()) {
            return Ok((None, 0.0));
        }
        let mut vectors = Vec::new();
        for p in projections {
            vectors.push(p.bias.map(|id| self.vector(id)).transpose()?);
        }
        let lengths: Vec<usize> = projections.iter().map(|p| self.loader.plan.matrices[p.weight.0].shape[0]).collect();
        let vectors: Vec<Option<&[f32]>> = vectors.iter().map(Option::as_deref).collect();
        let merged = order.merge(&vectors, &lengths);
        // NaN is as little to be had in f16 as what is too large.
        let largest = merged.iter().fold(0.0f32, |m, v| if v.is_nan() { f32::INFINITY } else { m.max(v.abs()) });
        Ok((Some(self.upload_vector(name, &merged)?), largest))
    }

    /// A norm's weight; the Euclidean length that a row of its output can have.
    fn norm(&mut self, weight: VectorId) -> Result<f32> {
        let name = &self.loader.plan.vectors[weight.0].name;
        let norm = match self.kept(&[name]).map(|held| held.norm(weight).cloned()) {
            Some(held) => held?,
            None => {
                let values = self.vector(weight)?;
                let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                Norm { buffer: self.upload_vector("norm", &values)?, largest }
            }
        };
        self.bytes += norm.buffer.size();
        let length = norm.length(&self.loader.spec);
        self.norms.insert(weight, norm);
        Ok(length)
    }

    /// What the layers need. With tiles also whether their results fit f16, as far as numbers known now can tell.
    fn layers(&mut self) -> Result<()> {
        let spec = &self.loader.spec;
        let plan = self.loader.plan.clone();
        let half = self.tile.is_some();
        for op in &plan.ops {
            match op {
                Op::Linear { norm: Some(norm), parts, .. } => {
                    let length = self.norm(*norm)?;
                    let parts: Vec<&Projection> = parts.iter().map(|(p, _)| p).collect();
                    let merged = self.merge("queries, keys, values", &parts, Order::rotated(spec))?;
                    rotated_bound(spec, length, &merged, half)?;
                }
                Op::LinearAdd { part, .. } => {
                    self.merge("product onto the residual stream", &[part], Order::Plain)?;
                }
                Op::LinearGated { norm, gate, up, .. } => {
                    let length = self.norm(*norm)?;
                    let merged = self.merge("mlp gate and up", &[gate, up], Order::Interleaved)?;
                    gated_scale(length, &merged, half)?;
                }
                Op::RmsNorm { weight, .. } => {
                    let length = self.norm(*weight)?;
                    if half && matches!(spec.head, Head::LanguageModel { .. }) {
                        fits_half("the final norm", length)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Norm {
    /// The Euclidean length that a row of the norm's output can have.
    pub fn length(&self, spec: &ModelSpec) -> f32 {
        self.largest * (spec.hidden_size as f32).sqrt()
    }
}

/// True if the products of a model can be f16 in tiles: 16-bit weights, and whole tiles along K.
fn can_tile(spec: &ModelSpec, plan: &Plan, weights: &Weights, tile: u32) -> Result<bool> {
    let whole = [spec.hidden_size, spec.q_width(), spec.intermediate_size].iter().all(|n| n % tile as usize == 0);
    for id in plan.quantisable(spec) {
        if weights.get(&plan.matrices[id.0].name)?.dtype() == Dtype::F32 {
            return Ok(false);
        }
    }
    Ok(whole)
}
