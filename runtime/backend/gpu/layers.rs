//! The dispatches from token ids to the final norm, built once: seven a layer, one more where few rows see many keys, and
//! one where matrix units compute the attention of rows that come alone and of many.
//!
//! norm → queries, keys and values (with rope, into the cache) → attention (→ joining
//! its segments) → output product onto the residual stream →
//! norm → gate and up with silu → down product onto the residual stream.

use super::adapters::{Adaptable, HalfBound, Product};
use super::attention::Work;
use super::device::Gpu;
use super::matrix::{Matrix, Order, Slice};
use super::pipelines::{Flags, Format, Pipelines, TileShape};
use super::record::{Bound, Dispatch, Params, fold};
use super::resident::{Merged, Resident};
use crate::error::{Error, Result};
use crate::kernels::{Kernel, attention_tiles, embed, gather_rows, linear, linear_gated, linear_qkv, rms_norm};
use crate::model::{Buf, ModelSpec, Op, Plan, Projection, VectorId};

/// What a step's dispatches depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    /// T.
    pub rows: u32,
    /// M.
    pub outputs: u32,
    /// The step's first row, output, and first output of the step before, in the tables of all steps.
    pub first_row: u32,
    pub first_output: u32,
    pub first_drawn: u32,
    pub attention: Work,
}

pub(super) type Rule = Box<dyn Fn(&Dims) -> Dispatch + Send>;

/// A dispatch whose bindings never change.
pub(super) struct Call {
    pub bound: Bound,
    pub rule: Rule,
    /// Of products that adapters may change.
    pub adaptable: Option<Adaptable>,
}

/// The buffers of a model that do not belong to one op.
pub(super) struct Buffers {
    pub rows: wgpu::Buffer,
    pub tables: wgpu::Buffer,
    /// Tiles of attention.
    pub tiles: wgpu::Buffer,
    /// What attention leaves of segments that are computed side by side.
    pub partials: wgpu::Buffer,
    pub cos_sin: wgpu::Buffer,
    pub picked: wgpu::Buffer,
    /// Draws of the steps at hand.
    pub drawn: wgpu::Buffer,
    pub hidden: wgpu::Buffer,
    /// A norm's output [T, D]; f16 for matrix units.
    pub normed: wgpu::Buffer,
    /// [T, H·E]; f16 where attention uses matrix units.
    pub q: wgpu::Buffer,
    /// [T, H·E]; f16 for matrix units.
    pub attn: wgpu::Buffer,
    /// [T, F]; f16 for matrix units.
    pub gated: wgpu::Buffer,
    pub picked_rows: wgpu::Buffer,
    /// [M, D]; f16 where a language-model head uses matrix units.
    pub last: wgpu::Buffer,
    /// Bound where a product has no bias or no scales.
    pub nothing: wgpu::Buffer,
    /// Keys and values of each layer.
    pub kv: Vec<(wgpu::Buffer, wgpu::Buffer)>,
}

/// What the calls are built from.
pub(super) struct Builder<'a> {
    pub gpu: &'a Gpu,
    pub spec: &'a ModelSpec,
    pub plan: &'a Plan,
    pub resident: &'a Resident,
    pub buffers: &'a Buffers,
    pub pipelines: Pipelines,
    /// Rows of the matrix units' tiles, if products use them.
    pub tile: Option<u32>,
    /// The same, if attention does too.
    pub attention_tile: Option<u32>,
    pub half_kv: bool,
    pub calls: Vec<Call>,
    /// That adapters may change.
    pub products: Vec<Product>,
}

/// How many rows a workgroup should take.
pub(super) fn shape_for(flags: Flags, rows: u32) -> TileShape {
    match flags.format {
        Some(Format::Tiles(tile)) if rows <= tile => TileShape::Narrow,
        Some(Format::Tiles(tile)) if rows <= 4 * tile && !flags.head => TileShape::Medium,
        Some(Format::Tiles(_)) => TileShape::Wide,
        _ if rows == 1 => TileShape::OneRow,
        // Four rows at a time; twice that is still less work than sixteen.
        _ if rows <= 8 => TileShape::Narrow,
        _ => TileShape::Wide,
    }
}

/// The shapes that products of these weights come in.
pub(super) fn shapes(flags: Flags) -> &'static [TileShape] {
    match (flags.is_tiled(), flags.head) {
        (true, false) => &[TileShape::Narrow, TileShape::Medium, TileShape::Wide],
        (true, true) => &[TileShape::Narrow, TileShape::Wide],
        (false, _) => &[TileShape::OneRow, TileShape::Narrow, TileShape::Wide],
    }
}

/// The dispatch of a product with `count` weight rows.
pub(super) fn product<T: bytemuck::Pod>(
    flags: Flags,
    [rows, count, k]: [u32; 3],
    slice_bytes: u64,
    params: &T,
) -> Dispatch {
    let shape = shape_for(flags, rows);
    let [tile_rows, tile_cols] = Flags { shape, ..flags }.workgroup_tile();
    let input = if flags.is_tiled() { 2 } else { 4 };
    let (t, n, k) = (u64::from(rows), u64::from(count), u64::from(k));
    Dispatch {
        shape,
        params: Params::of(params),
        groups: [rows.div_ceil(tile_rows), count.div_ceil(tile_cols), 1],
        bytes: slice_bytes + t * (input * k + 4 * n),
        multiply_adds: t * n * k,
    }
}

pub(super) fn slice_bytes(slice: &Slice) -> u64 {
    slice.buffer.size() + slice.scales.as_ref().map_or(0, wgpu::Buffer::size)
}

/// A product's constants, for all of its rows.
fn base(matrix: &Matrix, slice: &Slice, has_bias: bool) -> linear::Params {
    linear::Params {
        rows: 0,
        k: matrix.cols,
        stride: matrix.stride,
        count: slice.count,
        first: slice.first,
        out_stride: matrix.rows,
        has_bias: u32::from(has_bias),
        slice_row: 0,
        x_first: 0,
        accumulate: 0,
        scale: 1.0,
    }
}

/// A kernel whose workgroups own a row each.
fn by_row<T: bytemuck::Pod>(rows: u32, bytes_a_row: u64, params: &T) -> Dispatch {
    Dispatch {
        shape: TileShape::Narrow,
        params: Params::of(params),
        groups: fold(rows),
        bytes: u64::from(rows) * bytes_a_row,
        multiply_adds: 0,
    }
}

impl Builder<'_> {
    pub(super) fn push(
        &mut self,
        kernel: &Kernel,
        flags: Flags,
        shapes: &[TileShape],
        storage: &[&wgpu::Buffer],
        rule: Rule,
    ) -> Result<()> {
        let bound = Bound::new(self.gpu, &mut self.pipelines, kernel, flags, shapes, storage)?;
        self.calls.push(Call { bound, rule, adaptable: None });
        Ok(())
    }

    /// The same for a slice of the product that was described last.
    fn push_product(
        &mut self,
        kernel: &'static Kernel,
        flags: Flags,
        storage: &[&wgpu::Buffer],
        rule: Rule,
    ) -> Result<()> {
        let shapes = shapes(flags);
        self.push(kernel, flags, shapes, storage, rule)?;
        let storage = storage.iter().map(|b| (*b).clone()).collect();
        if let (Some(call), Some(product)) = (self.calls.last_mut(), self.products.len().checked_sub(1)) {
            call.adaptable = Some(Adaptable { product, kernel, flags, shapes, storage });
        }
        Ok(())
    }

    /// Describes a product of these parts for adapters.
    fn describe(&mut self, parts: &[&Projection], order: Order, x: &wgpu::Buffer, scale: f32, bound: HalfBound) {
        let shapes: Vec<&[usize]> = parts.iter().map(|p| &self.plan.matrices[p.weight.0].shape[..]).collect();
        self.products.push(Product {
            weights: parts.iter().map(|p| p.weight).collect(),
            order,
            lengths: shapes.iter().map(|shape| shape[0]).collect(),
            k: shapes.first().map_or(0, |shape| shape[1]),
            x: x.clone(),
            scale,
            half_in: self.tile.is_some(),
            bound: if self.tile.is_some() { bound } else { HalfBound::None },
        });
    }

    /// A norm over all rows, or over the rows that have outputs; the Euclidean length that a row of it can have.
    fn norm(
        &mut self,
        x: &wgpu::Buffer,
        weight: VectorId,
        out: &wgpu::Buffer,
        all: bool,
        half_out: bool,
    ) -> Result<f32> {
        let norm = self.resident.norm(weight)?;
        let (width, eps) = (self.spec.hidden_size as u32, self.spec.rms_norm_eps);
        let bytes = u64::from(width) * if half_out { 6 } else { 8 };
        let rule: Rule = Box::new(move |d| {
            let rows = if all { d.rows } else { d.outputs };
            by_row(rows, bytes, &rms_norm::Params { rows, width, eps })
        });
        let flags = Flags { half_out, ..Flags::default() };
        self.push(&rms_norm::KERNEL, flags, &[TileShape::Narrow], &[x, &norm.buffer, out], rule)?;
        Ok(norm.length(self.spec))
    }

    /// Builds the calls of every op.
    pub(super) fn layers(&mut self) -> Result<()> {
        let (plan, spec) = (self.plan, self.spec);
        let half = self.tile.is_some();
        // What the down product's input was divided by.
        let mut gated_scale = 1.0f32;
        let mut ops = plan.ops.iter();
        while let Some(op) = ops.next() {
            let b = self.buffers;
            match op {
                Op::Embed { .. } => self.embed()?,
                Op::Linear { norm: Some(norm), parts, .. } => {
                    let layer = match (ops.next(), ops.next(), ops.next()) {
                        (Some(Op::Rope { .. }), Some(Op::Rope { .. }), Some(Op::KvWrite { layer })) => *layer,
                        _ => return Err(Error::internal("the plan has products that the GPU cannot fuse")),
                    };
                    let length = self.norm(&b.hidden, *norm, &b.normed, true, half)?;
                    self.qkv(layer, &parts.iter().map(|(p, _)| p).collect::<Vec<_>>(), length)?;
                }
                Op::Attention { layer } => self.attention(*layer)?,
                Op::LinearAdd { x: Buf::Attn, part, .. } => {
                    self.onto_residual(&b.attn, part, 1.0)?;
                }
                Op::LinearAdd { part, .. } => self.onto_residual(&b.gated, part, 1.0 / gated_scale)?,
                Op::LinearGated { norm, gate, up, .. } => {
                    let length = self.norm(&b.hidden, *norm, &b.normed, true, half)?;
                    gated_scale = self.gated(gate, up, length)?;
                }
                Op::GatherRows { .. } => {
                    let width = spec.hidden_size as u32;
                    let storage = [&b.picked, &b.hidden, &b.picked_rows];
                    let rule: Rule = Box::new(move |d| {
                        let params = gather_rows::Params { rows: d.outputs, width, first: d.first_output };
                        by_row(d.outputs, 8 * u64::from(width), &params)
                    });
                    self.push(&gather_rows::KERNEL, Flags::default(), &[TileShape::Narrow], &storage, rule)?;
                }
                Op::RmsNorm { weight, .. } => {
                    let language_model = matches!(spec.head, crate::model::Head::LanguageModel { .. });
                    self.norm(&b.picked_rows, *weight, &b.last, false, half && language_model)?;
                }
                Op::Linear { norm: None, .. } | Op::Rope { .. } | Op::KvWrite { .. } => {
                    return Err(Error::internal("the plan has an op that the GPU cannot fuse"));
                }
            }
        }
        Ok(())
    }

    fn embed(&mut self) -> Result<()> {
        let b = self.buffers;
        let matrix = &self.resident.table;
        for slice in &matrix.slices {
            let (width, stride, first, count) = (matrix.cols, matrix.stride, slice.first, slice.count);
            let storage = [&b.rows, &b.drawn, &slice.buffer, &b.hidden];
            let rule: Rule = Box::new(move |d| {
                let (first_meta, first_drawn) = (d.first_row, d.first_drawn);
                let params = embed::Params { rows: d.rows, width, stride, first, count, first_meta, first_drawn };
                by_row(d.rows, 6 * u64::from(width), &params)
            });
            self.push(&embed::KERNEL, matrix.variant(), &[TileShape::Narrow], &storage, rule)?;
        }
        Ok(())
    }

    fn qkv(&mut self, layer: usize, parts: &[&Projection], length: f32) -> Result<()> {
        let spec = self.spec;
        let (heads, kv_heads, head_dim) = (spec.heads as u32, spec.kv_heads as u32, spec.head_dim as u32);
        let order = Order::rotated(spec);
        let Some(first) = parts.first() else { return Err(Error::internal("no projections")) };
        let merged = self.resident.merged(first)?;
        let (rest, factor) = rotated_bound(spec, length, merged, self.tile.is_some())?;
        let (matrix, bias) = (&merged.matrix, merged.bias.as_ref());
        let b = self.buffers;
        self.describe(parts, order, &b.normed, 1.0, HalfBound::Rotated { length, rest, factor });
        let (keys, values) = &b.kv[layer];
        let half_q = self.attention_tile.is_some();
        let q_scale = if half_q { attention_tiles::query_scale(spec.head_dim) } else { 1.0 };
        let flags = Flags { half_kv: self.half_kv, half_q, ..matrix.variant() };
        for slice in &matrix.slices {
            let scales = slice.scales.as_ref().unwrap_or(&b.nothing);
            let storage =
                [&b.normed, &slice.buffer, scales, bias.unwrap_or(&b.nothing), &b.rows, &b.cos_sin, &b.q, keys, values];
            let (k, stride, count, first) = (matrix.cols, matrix.stride, slice.count, slice.first);
            let (has_bias, bytes) = (u32::from(bias.is_some()), slice_bytes(slice));
            let rule: Rule = Box::new(move |d| {
                let params = linear_qkv::Params {
                    rows: d.rows,
                    k,
                    stride,
                    count,
                    first,
                    has_bias,
                    slice_row: 0,
                    x_first: 0,
                    heads,
                    kv_heads,
                    head_dim,
                    first_meta: d.first_row,
                    q_scale,
                };
                product(flags, [d.rows, count, k], bytes, &params)
            });
            self.push_product(&linear_qkv::KERNEL, flags, &storage, rule)?;
        }
        Ok(())
    }

    fn onto_residual(&mut self, x: &wgpu::Buffer, part: &Projection, scale: f32) -> Result<()> {
        let Merged { matrix, bias, .. } = self.resident.merged(part)?;
        self.describe(&[part], Order::Plain, x, scale, HalfBound::None);
        let b = self.buffers;
        let flags = matrix.variant();
        for slice in &matrix.slices {
            let scales = slice.scales.as_ref().unwrap_or(&b.nothing);
            let storage = [x, &slice.buffer, scales, bias.as_ref().unwrap_or(&b.nothing), &b.hidden];
            let base = linear::Params { accumulate: 1, scale, ..base(matrix, slice, bias.is_some()) };
            let bytes = slice_bytes(slice);
            let rule: Rule = Box::new(move |d| {
                let params = linear::Params { rows: d.rows, ..base };
                product(flags, [d.rows, base.count, base.k], bytes, &params)
            });
            self.push_product(&linear::KERNEL, flags, &storage, rule)?;
        }
        Ok(())
    }

    /// The gated products; what their result is multiplied by to fit f16.
    fn gated(&mut self, gate: &Projection, up: &Projection, length: f32) -> Result<f32> {
        let merged = self.resident.merged(gate)?;
        let (factor, scale) = gated_scale(length, merged, self.tile.is_some())?;
        let Merged { matrix, bias, .. } = merged;
        let b = self.buffers;
        self.describe(
            &[gate, up],
            Order::Interleaved,
            &b.normed,
            1.0,
            HalfBound::Gated { length, rest: factor, scale },
        );
        let flags = Flags { half_out: self.tile.is_some(), ..matrix.variant() };
        for slice in &matrix.slices {
            let scales = slice.scales.as_ref().unwrap_or(&b.nothing);
            let storage = [&b.normed, &slice.buffer, scales, bias.as_ref().unwrap_or(&b.nothing), &b.gated];
            let base = base(matrix, slice, bias.is_some());
            let bytes = slice_bytes(slice);
            let rule: Rule = Box::new(move |d| {
                let params = linear_gated::Params {
                    rows: d.rows,
                    k: base.k,
                    stride: base.stride,
                    count: base.count,
                    first: base.first,
                    out_stride: base.out_stride / 2,
                    has_bias: base.has_bias,
                    slice_row: 0,
                    x_first: 0,
                    scale,
                };
                product(flags, [d.rows, base.count, base.k], bytes, &params)
            });
            self.push_product(&linear_gated::KERNEL, flags, &storage, rule)?;
        }
        Ok(scale)
    }
}

/// Half of the largest f16: sums and rotations are rounded.
pub(super) const HALF_BOUND: f32 = 32_752.0;
/// Below this the smaller results would be lost among f16's subnormals.
pub(super) const LEAST_SCALE: f32 = 1.0 / 4096.0;

/// An error if `what` can be larger than f16 allows.
pub(super) fn fits_half(what: &str, bound: f32) -> Result<()> {
    if bound <= HALF_BOUND {
        return Ok(());
    }
    Err(Error::unsupported(format!("{what} can be as large as {bound:e}, too much for f16")))
}

/// How large queries, keys and values can become for inputs of a length: before the rotation, and the rotation's factor.
pub(super) fn rotated_bound(spec: &ModelSpec, length: f32, merged: &Merged, is_tiled: bool) -> Result<(f32, f32)> {
    // Rotation mixes two elements, and yarn scales it.
    let (_, rope_factor) = spec.rope.frequencies(0);
    let factor = std::f32::consts::SQRT_2 * rope_factor.abs().max(1.0);
    let rest = length * merged.matrix.half.longest_row() + merged.largest_bias;
    if is_tiled {
        fits_half("the normed inputs", length)?;
        // Queries are scaled down after that.
        fits_half("queries, keys and values", rest * factor)?;
    }
    Ok((rest, factor))
}

/// How large a factor of the gated products can become for inputs of a length, and what their result is multiplied by to
/// fit f16.
pub(super) fn gated_scale(length: f32, merged: &Merged, is_tiled: bool) -> Result<(f32, f32)> {
    let mut scale = 1.0f32;
    // |silu(g)| ≤ |g|, and neither factor is larger than the lengths of a row and of the input allow.
    let factor = length * merged.matrix.half.longest_row() + merged.largest_bias;
    if is_tiled {
        fits_half("the normed inputs", length)?;
        while factor * factor * scale > HALF_BOUND {
            scale /= 2.0;
        }
        if scale < LEAST_SCALE {
            return Err(Error::unsupported(format!(
                "mlp: results can be as large as {:e}, too much for f16",
                factor * factor
            )));
        }
    }
    Ok((factor, scale))
}
