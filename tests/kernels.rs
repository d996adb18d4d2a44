//! Twins: every CPU path and every shader variant against formulas written out here in f64.
//!
//! Shapes are 1, odd, prime, and around the tiles; values include zeros of both signs, subnormals, the largest f16,
//! infinities and NaN. Tolerances come from one table. The products of the GPU have a file of their own, and so has the
//! software model of the matrix units' tiling.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, clippy::too_many_arguments)]

#[path = "kernels/adapters.rs"]
mod adapters;
#[path = "kernels/attention_tiles.rs"]
mod attention_in_tiles;
#[path = "kernels/attention.rs"]
mod attention_twins;
mod common;
#[path = "kernels/products.rs"]
mod products;
#[path = "kernels/tiles.rs"]
mod tiles;

use std::sync::OnceLock;

use bytemuck::{Pod, bytes_of, cast_slice, pod_collect_to_vec};
use common::{devices, isas};
use rewardrt::backend::cpu::Pool;
use rewardrt::backend::gpu::{Flags, Format, Gpu, GpuOptions, Selection, dispatch_once, pack_tiles};
use rewardrt::kernels::linear::{Arithmetic, Precision, Quantised, Weight};
use rewardrt::kernels::*;
use rewardrt::weights::{Dtype, WeightFormat};

/// |difference| ≤ tolerance · (Σ of the magnitudes that were added, or the result's own): f32 rounding over a sum.
fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        // Weights are exact in f32 whatever they are stored as.
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => 3e-6,
    }
}

/// A reproducible sequence of floats in (−1, 1).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / 8_388_608.0) - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.next() + 1.0) / 2.0 * n as f32) as usize % n
    }
}

/// A GPU to test on, and the same one with every index and loop of a shader checked.
struct Device {
    gpu: Gpu,
    checked: Gpu,
}

impl Device {
    /// Runs a kernel and returns its buffers.
    fn run<P: Pod>(
        &self,
        kernel: &Kernel,
        flags: Flags,
        params: &P,
        storage: &[Vec<u8>],
        groups: [u32; 3],
    ) -> Vec<Vec<u8>> {
        let mut buffers = storage.to_vec();
        dispatch_once(&self.gpu, kernel, flags, bytes_of(params), &mut buffers, groups).unwrap();
        buffers
    }

    /// The same, with checks as well: they change no bit.
    fn run_checked<P: Pod>(
        &self,
        kernel: &Kernel,
        flags: Flags,
        params: &P,
        storage: &[Vec<u8>],
        groups: [u32; 3],
    ) -> Vec<Vec<u8>> {
        let buffers = self.run(kernel, flags, params, storage, groups);
        let mut checked = storage.to_vec();
        dispatch_once(&self.checked, kernel, flags, bytes_of(params), &mut checked, groups).unwrap();
        assert!(checked == buffers, "{} {flags:?}: checks change the result", kernel.name);
        buffers
    }

    fn has_f16(&self) -> bool {
        self.gpu.info().has_f16
    }
}

/// The GPUs to test on.
fn gpus() -> &'static [Device] {
    static GPUS: OnceLock<Vec<Device>> = OnceLock::new();
    GPUS.get_or_init(|| {
        let open = |device: &String| {
            let selection = Selection::parse(device).unwrap();
            let with = |shader_checks| {
                let options = GpuOptions { shader_checks, ..GpuOptions::default() };
                Gpu::select(&selection, &options).unwrap().unwrap()
            };
            Device { gpu: with(false), checked: with(true) }
        };
        devices().iter().filter(|d| *d != "cpu").map(open).collect()
    })
}

#[track_caller]
fn compare(what: &str, got: &[f32], want: &[f64], scale: &[f64], dtype: Dtype) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, ((g, w), s)) in got.iter().zip(want).zip(scale).enumerate() {
        let g64 = f64::from(*g);
        let same = (g64.is_nan() && w.is_nan()) || g64 == *w;
        assert!(
            same || (g64 - w).abs() <= tolerance(dtype) * s.max(1e-30),
            "{what} [{i}]: {g}, the formula gives {w} (scale {s})"
        );
    }
}

fn magnitudes(want: &[f64]) -> Vec<f64> {
    want.iter().map(|w| w.abs().max(1e-3)).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    cast_slice(values).to_vec()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    pod_collect_to_vec(bytes)
}

/// Where element `at` of [G · E] of a position's key and of its value lie, in [blocks, G, E, P] and [blocks, G, P, E].
fn places(block: u32, position: usize, at: usize, [kv_heads, head_dim]: [usize; 2]) -> [usize; 2] {
    let (start, e, j) = ((block as usize * kv_heads + at / head_dim) * head_dim, at % head_dim, position % KV_BLOCK);
    [(start + e) * KV_BLOCK + j, start * KV_BLOCK + j * head_dim + e]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Rows padded to whole groups of eight elements, as the upload does.
fn padded_rows(stored: &[u8], rows: usize, cols: usize, size: usize) -> (Vec<u8>, u32) {
    let stride = cols.next_multiple_of(8);
    let mut out = Vec::new();
    for row in stored.chunks_exact(cols * size).take(rows) {
        out.extend_from_slice(row);
        out.resize(out.len() + (stride - cols) * size, 0);
    }
    (out, stride as u32)
}

/// The inputs as an arithmetic reads them.
fn as_read(x: &[f32], k: usize, arithmetic: Arithmetic) -> Vec<f64> {
    let bf16 = |v: f32| half::bf16::from_f32(v).to_f32();
    match arithmetic {
        Arithmetic::Fma => x.iter().map(|v| f64::from(*v)).collect(),
        Arithmetic::Bf16 | Arithmetic::Amx { terms: 1 } => x.iter().map(|v| f64::from(bf16(*v))).collect(),
        Arithmetic::Amx { .. } => x.iter().map(|v| f64::from(bf16(*v)) + f64::from(bf16(v - bf16(*v)))).collect(),
        Arithmetic::Int8 | Arithmetic::Int4 => {
            let row = |row: &[f32]| {
                let most = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let q: Vec<f64> = row.iter().map(|v| f64::from((v * (32767.0 / most)).round_ties_even())).collect();
                q.into_iter().map(|q| q * f64::from(most / 32767.0)).collect::<Vec<_>>()
            };
            x.chunks_exact(k).flat_map(row).collect()
        }
    }
}

/// What a product must be, and the magnitudes that were added up for it.
fn product(x: &[f64], w: &[f32], k: usize, bias: Option<&[f32]>) -> (Vec<f64>, Vec<f64>) {
    let (mut want, mut scale) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(k) {
        for (j, w) in w.chunks_exact(k).enumerate() {
            let products: Vec<f64> = row.iter().zip(w).map(|(a, b)| a * f64::from(*b)).collect();
            let b = bias.map_or(0.0, |b| f64::from(b[j]));
            want.push(products.iter().sum::<f64>() + b);
            scale.push(products.iter().map(|p| p.abs()).sum::<f64>() + b.abs());
        }
    }
    (want, scale)
}

/// Rows, columns, K: 1, odd, prime, and around the tiles of every instruction set.
const LINEAR_SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 3, 8),
    (2, 8, 7),
    (3, 9, 65),
    (4, 24, 64),
    (5, 17, 100),
    (7, 25, 33),
    (6, 12, 96),
    (13, 50, 129),
    (17, 33, 31),
    (32, 16, 160),
    (1, 64, 576),
    (70, 300, 40),
    (13, 61, 8195),
];

/// Every CPU arithmetic that this machine has.
#[test]
fn linear_twins_on_the_cpu() {
    let mut seen = std::collections::HashSet::new();
    for (t, n, k) in LINEAR_SHAPES {
        let mut numbers = Numbers((t * 1000 + n * 10 + k) as u64);
        let x = numbers.floats(t * k);
        let mut weights = numbers.floats(n * k);
        for (i, v) in [65504.0f32, -0.0, 6e-8, 1e-20].into_iter().enumerate() {
            if i < weights.len() {
                weights[i] = v;
            }
        }
        let bias = numbers.floats(n);
        for dtype in Dtype::ALL {
            // At an odd address: files do not promise alignment.
            let mut unaligned = vec![0u8];
            unaligned.extend_from_slice(&dtype.from_f32(&weights));
            let view = MatrixView::new(dtype, &unaligned[1..], n, k);
            let exact = dtype.to_f32(&unaligned[1..]);
            let int8 = linear::Int8Matrix::quantise(view, &Pool::new(1)).unwrap();
            let int4 = linear::Int4Matrix::quantise(view, &Pool::new(1)).unwrap();
            let (mut from_int8, mut from_int4) = (vec![0.0; n * k], vec![0.0; n * k]);
            for (row, (a, b)) in from_int8.chunks_exact_mut(k).zip(from_int4.chunks_exact_mut(k)).enumerate() {
                int8.view().read_f32(row, a);
                int4.view().read_f32(row, b);
            }
            for (weight, w) in [
                (Weight::Stored(view), &exact),
                (Weight::Int8(int8.view()), &from_int8),
                (Weight::Int4(int4.view()), &from_int4),
            ] {
                for isa in isas() {
                    for precision in [Precision::Auto, Precision::F32] {
                        let arithmetic = Arithmetic::of(isa, precision, [weight]);
                        seen.insert(format!("{} {arithmetic:?}", isa.name()));
                        for bias in [None, Some(&bias[..])] {
                            let (want, scale) = product(&as_read(&x, k, arithmetic), w, k, bias);
                            let mut out = vec![f32::NAN; t * n];
                            linear::linear_alone(isa, precision, &x, weight, bias, &mut out);
                            let what = format!("linear {} {arithmetic:?} {dtype:?} T{t} N{n} K{k}", isa.name());
                            compare(&what, &out, &want, &scale, dtype);
                        }
                    }
                }
            }
        }
    }
    println!("{seen:?}");
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if common::emulates_amx() {
        assert!(common::amx_emulator::emulated() > 1000, "the AMX path was not taken");
    }
    assert!(isas().iter().all(|isa| seen.iter().any(|s| s.starts_with(isa.name()))));
}

/// An element's bits do not depend on how many rows or columns are computed with it.
#[test]
fn linear_is_batch_invariant() {
    for (t, n, k) in [(11, 29, 77), (67, 130, 192), (8, 40, 9000)] {
        let mut numbers = Numbers(5);
        let (x, weights) = (numbers.floats(t * k), numbers.floats(n * k));
        for dtype in Dtype::ALL {
            let stored = dtype.from_f32(&weights);
            let all_rows = MatrixView::new(dtype, &stored, n, k);
            let int8 = linear::Int8Matrix::quantise(all_rows, &Pool::new(1)).unwrap();
            let int4 = linear::Int4Matrix::quantise(all_rows, &Pool::new(1)).unwrap();
            for isa in isas() {
                for precision in [Precision::Auto, Precision::F32] {
                    for weight in [Weight::Stored(all_rows), Weight::Int8(int8.view()), Weight::Int4(int4.view())] {
                        let mut all = vec![0.0; t * n];
                        linear::linear_alone(isa, precision, &x, weight, None, &mut all);
                        // Every count of rows from the front, then every row alone.
                        for rows in 1..t {
                            let mut some = vec![0.0; rows * n];
                            linear::linear_alone(isa, precision, &x[..rows * k], weight, None, &mut some);
                            let same = some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{} {precision:?} {dtype:?} {rows} rows", isa.name());
                        }
                        for (row, expected) in x.chunks_exact(k).zip(all.chunks_exact(n)) {
                            let mut one = vec![0.0; n];
                            linear::linear_alone(isa, precision, row, weight, None, &mut one);
                            let same = one.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{} {precision:?} {dtype:?}", isa.name());
                        }
                    }
                    for format in [WeightFormat::Stored, WeightFormat::Int8, WeightFormat::Int4] {
                        let product = |view, out: &mut [f32]| {
                            let quantised = Quantised::of(format, view, &Pool::new(1)).unwrap();
                            let weight = quantised.as_ref().map_or(Weight::Stored(view), Quantised::weight);
                            linear::linear_alone(isa, precision, &x, weight, None, out);
                        };
                        let mut all = vec![0.0f32; t * n];
                        product(all_rows, &mut all);
                        for (j, w) in stored.chunks_exact(dtype.size() * k).enumerate() {
                            let mut column = vec![0.0f32; t];
                            product(MatrixView::new(dtype, w, 1, k), &mut column);
                            let wanted = all.iter().skip(j).step_by(n);
                            let same = column.iter().zip(wanted).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{} {precision:?} {dtype:?} {format:?} column {j}", isa.name());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn linear_keeps_nan_and_infinity() {
    for dtype in Dtype::ALL {
        let weights = dtype.from_f32(&[1.0, 2.0, 3.0]);
        let view = MatrixView::new(dtype, &weights, 1, 3);
        for isa in isas() {
            for precision in [Precision::Auto, Precision::F32] {
                let mut out = [0.0; 4];
                let inf = f32::INFINITY;
                let x = [f32::NAN, 0.0, 0.0, inf, 1.0, 1.0, inf, f32::NEG_INFINITY, 0.0, 1.0, 0.0, 0.0];
                linear::linear_alone(isa, precision, &x, view.into(), None, &mut out);
                let [nan, infinite, both, one] = out;
                let right = nan.is_nan() && infinite == inf && both.is_nan() && one == 1.0;
                assert!(right, "{} {precision:?} {dtype:?}: {out:?}", isa.name());
                // Integers have no infinity: such a row is NaN as a whole, and no other row is.
                for (format, off) in [(WeightFormat::Int8, 0.01), (WeightFormat::Int4, 0.2)] {
                    let quantised = Quantised::of(format, view, &Pool::new(1)).unwrap().unwrap();
                    linear::linear_alone(isa, Precision::Auto, &x, quantised.weight(), None, &mut out);
                    assert!(out[..3].iter().all(|v| v.is_nan()) && (out[3] - 1.0).abs() < off, "{out:?}");
                }
            }
        }
    }
}

#[test]
fn embed_twins() {
    // Width 32: whole tiles.
    for (vocab, width) in [(37, 21), (90, 32)] {
        let mut numbers = Numbers(3);
        let tokens: Vec<u32> = (0..19).map(|_| numbers.below(vocab) as u32).collect();
        let meta = |token| RowMeta { token, ..RowMeta::default() };
        let rows: Vec<RowMeta> = tokens.iter().map(|&t| meta(t)).collect();
        for dtype in Dtype::ALL {
            let values = numbers.floats(vocab * width);
            let stored = dtype.from_f32(&values);
            let exact = dtype.to_f32(&stored);
            let row = |token: u32| exact[token as usize * width..][..width].to_vec();
            let want: Vec<f32> = tokens.iter().flat_map(|&t| row(t)).collect();
            let mut out = vec![0.0; rows.len() * width];
            embed::embed(&rows, MatrixView::new(dtype, &stored, vocab, width), &mut out);
            assert_eq!(out, want);

            // Two rows of another step first; rows 4 and 7 follow draws, row 9 a row without a draw.
            let drawn_words = [9, 9, tokens[4], tokens[7], top_k::NO_TOKEN].map(|token| [token, 1, 2, 3, 4, 5]);
            let mut rows: Vec<RowMeta> = [meta(1), meta(2)].into_iter().chain(rows.clone()).collect();
            for (row, draw) in [(4, 0), (7, 1), (9, 2)] {
                rows[2 + row].token = embed::FROM_DRAW | draw;
            }
            let mut want = want;
            want[9 * width..10 * width].copy_from_slice(&row(0));
            for device in gpus() {
                let mut formats = vec![Flags { format: Some(Format::Rows(dtype)), ..Flags::default() }];
                if dtype == Dtype::F16 && device.has_f16() {
                    formats.push(Flags { f16: true, ..formats[0] });
                    let tiles = [8, 16].map(|tile| Flags { format: Some(Format::Tiles(tile)), ..formats[1] });
                    formats.extend(tiles.into_iter().filter(|_| width % 16 == 0));
                }
                for flags in formats {
                    // In two slices, as a table beyond a binding's limit is.
                    let mut out = bytes(&vec![f32::NAN; 19 * width]);
                    let cut = if vocab > 64 { 64 } else { 20 };
                    for (first, count) in [(0, cut), (cut, vocab - cut)] {
                        let (table, stride) = match flags.format {
                            Some(Format::Tiles(tile)) => {
                                let slice = &exact[first * width..(first + count) * width];
                                let packed = pack_tiles(slice, count, width, tile as usize, 64);
                                (cast_slice(&packed).to_vec(), width as u32)
                            }
                            _ => {
                                let row_bytes = width * dtype.size();
                                let slice = &stored[first * row_bytes..(first + count) * row_bytes];
                                padded_rows(slice, count, width, dtype.size())
                            }
                        };
                        let params = embed::Params {
                            rows: 19,
                            width: width as u32,
                            stride,
                            first: first as u32,
                            count: count as u32,
                            first_meta: 2,
                            first_drawn: 2,
                        };
                        let storage = [cast_slice(&rows).to_vec(), cast_slice(&drawn_words).to_vec(), table, out];
                        out = device.run_checked(&embed::KERNEL, flags, &params, &storage, [19, 1, 1]).remove(3);
                    }
                    assert_eq!(floats(&out), want, "{flags:?}");
                }
            }
        }
    }
}

#[test]
fn rms_norm_twins() {
    for (rows, width) in [(1, 1), (3, 7), (2, 63), (3, 64), (5, 65), (2, 257), (4, 576), (2, 1000)] {
        let mut numbers = Numbers(width as u64);
        let (mut x, weight) = (numbers.floats(rows * width), numbers.floats(width));
        x[0] = 1e-20;
        let eps = 1e-5f32;
        let mut want = Vec::new();
        for row in x.chunks_exact(width) {
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            want.extend(row.iter().zip(&weight).map(|(v, w)| f64::from(*v) * scale * f64::from(*w)));
        }
        for isa in isas() {
            let mut out = vec![0.0; x.len()];
            rms_norm::rms_norm(isa, &x, &weight, eps, &mut out);
            compare(&format!("rms_norm {} {width}", isa.name()), &out, &want, &magnitudes(&want), Dtype::F32);
        }
        for device in gpus() {
            let params = rms_norm::Params { rows: rows as u32, width: width as u32, eps };
            let (kernel, groups) = (&rms_norm::KERNEL, [rows as u32, 1, 1]);
            let storage = [bytes(&x), bytes(&weight), bytes(&vec![f32::NAN; x.len()])];
            let out = floats(&device.run_checked(kernel, Flags::default(), &params, &storage, groups)[2]);
            compare(&format!("rms_norm gpu {width}"), &out, &want, &magnitudes(&want), Dtype::F32);
            if device.has_f16() {
                let flags = Flags { f16: true, half_out: true, ..Flags::default() };
                let storage = [bytes(&x), bytes(&weight), vec![0; 2 * x.len()]];
                let half = Dtype::F16.to_f32(&device.run_checked(kernel, flags, &params, &storage, groups)[2]);
                rounded(&format!("rms_norm f16 {width}"), &half, &out);
            }
        }
    }
}

/// `half` is `exact` rounded to f16, in either direction.
#[track_caller]
fn rounded(what: &str, half: &[f32], exact: &[f32]) {
    assert_eq!(half.len(), exact.len(), "{what}");
    for (i, (half, exact)) in half.iter().zip(exact).enumerate() {
        let same = half.is_nan() && exact.is_nan();
        assert!(same || (half - exact).abs() <= exact.abs() / 1024.0 + 1e-7, "{what} [{i}]: {half} is {exact} rounded");
    }
}

#[test]
fn silu_mul_on_the_cpu() {
    let mut numbers = Numbers(9);
    let mut gate: Vec<f32> = numbers.floats(1031).iter().map(|v| v * 30.0).collect();
    gate[..7].copy_from_slice(&[0.0, -0.0, 100.0, -100.0, f32::NAN, f32::INFINITY, -87.0]);
    let up = numbers.floats(1031);
    let silu: Vec<f64> =
        gate.iter().zip(&up).map(|(g, u)| f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u)).collect();
    for isa in isas() {
        let mut out = up.clone();
        silu_mul::silu_mul(isa, &gate, &mut out);
        compare(&format!("silu_mul {}", isa.name()), &out, &silu, &magnitudes(&silu), Dtype::F32);
    }
}

/// cos and sin [rows, 2, half] of random angles.
fn random_angles(numbers: &mut Numbers, rows: usize, half: usize) -> Vec<f32> {
    let both = |a: Vec<f32>| a.iter().map(|v| v.cos()).chain(a.iter().map(|v| v.sin())).collect::<Vec<_>>();
    (0..rows).flat_map(|_| both(numbers.floats(half))).collect()
}

/// (a, b) ← (a·cos − b·sin, b·cos + a·sin) for every pair of `heads` heads a row.
fn rotate(x: &mut [f64], cos_sin: &[f32], heads: usize, half: usize) {
    for (row, angles) in x.chunks_exact_mut(heads * 2 * half).zip(cos_sin.chunks_exact(2 * half)) {
        for head in row.chunks_exact_mut(2 * half) {
            for i in 0..half {
                let (a, b) = (head[i], head[i + half]);
                let (c, s) = (f64::from(angles[i]), f64::from(angles[half + i]));
                (head[i], head[i + half]) = (a * c - b * s, b * c + a * s);
            }
        }
    }
}

#[test]
fn rope_on_the_cpu() {
    let (rows, heads, half) = (5, 3, 7);
    let mut numbers = Numbers(11);
    let x = numbers.floats(rows * heads * 2 * half);
    let cos_sin = random_angles(&mut numbers, rows, half);
    let mut want: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    rotate(&mut want, &cos_sin, heads, half);
    for isa in isas() {
        let mut out = x.clone();
        rope::rope(isa, &cos_sin, half, heads, &mut out);
        compare(&format!("rope {}", isa.name()), &out, &want, &vec![1.0; x.len()], Dtype::F32);
    }
}

#[test]
fn gather_rows_twins() {
    let (index, width) = ([4u32, 0, 0, 2], 67);
    let x = Numbers(12).floats(5 * width);
    let want: Vec<f32> = index.iter().flat_map(|i| x[*i as usize * width..][..width].to_vec()).collect();
    let mut out = vec![0.0; want.len()];
    gather_rows::gather_rows(&index, &x, width, &mut out);
    assert_eq!(out, want);
    for device in gpus() {
        // Behind three rows of another step.
        let params = gather_rows::Params { rows: 4, width: width as u32, first: 3 };
        let index: Vec<u32> = [1, 1, 1].into_iter().chain(index).collect();
        let storage = [cast_slice(&index).to_vec(), bytes(&x), bytes(&vec![f32::NAN; want.len()])];
        let out = device.run_checked(&gather_rows::KERNEL, Flags::default(), &params, &storage, [4, 1, 1]);
        assert_eq!(floats(&out[2]), want);
    }
}

/// Attention over a cache that kv_write filled, against the softmax formula; blocks in random places.
fn logit_rows(vocab: usize) -> Vec<Vec<f32>> {
    let mut numbers = Numbers(vocab as u64);
    let mut plain: Vec<f32> = numbers.floats(vocab).iter().map(|v| v * 8.0).collect();
    let steep: Vec<f32> = plain.iter().map(|v| v * 20.0).collect();
    let mut masked = vec![f32::NEG_INFINITY; vocab];
    masked[vocab / 2] = 3.0;
    let mut ties: Vec<f32> = plain.iter().map(|v| v.round()).collect();
    ties[0] = 9.0;
    ties[vocab - 1] = 9.0;
    plain[vocab / 3] = -0.0;
    vec![plain, steep, masked, ties]
}

#[test]
fn log_sum_exp_twins() {
    for vocab in [3, 100, 513, 2000] {
        let rows = logit_rows(vocab);
        let mut want = Vec::new();
        for row in &rows {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let d = |l: &f32| f64::from(*l) - f64::from(max);
            let sum: f64 = row.iter().map(|l| d(l).exp()).sum();
            let weighted: f64 = row.iter().filter(|l| l.is_finite()).map(|l| d(l).exp() * d(l)).sum();
            want.push([f64::from(max), sum, weighted]);
        }
        let scale = |w: &[f64; 3]| [w[0].abs().max(1.0), w[1], w[1] * 20.0];
        for isa in isas() {
            for (row, want) in rows.iter().zip(&want) {
                let chunks: Vec<_> = row.chunks(log_sum_exp::CHUNK).map(|c| log_sum_exp::log_sum_exp(isa, c)).collect();
                let s = log_sum_exp::Stats::join(&chunks);
                compare(
                    &format!("log_sum_exp {} V{vocab}", isa.name()),
                    &[s.max, s.sum, s.weighted],
                    want,
                    &scale(want),
                    Dtype::F32,
                );
            }
            let mut broken = rows[0].clone();
            broken[1] = f32::NAN;
            assert!(log_sum_exp::log_sum_exp(isa, &broken).logprob(0.0).is_nan());
            broken[1] = f32::INFINITY;
            assert!(!log_sum_exp::log_sum_exp(isa, &broken).logprob(0.0).is_finite());
        }
        for device in gpus() {
            // Tiles of 64 tokens, as the pass over the vocabulary leaves them, with the targets' logits.
            let targets = [1usize, 2, vocab / 2, usize::MAX];
            let stats = |(row, target): (&Vec<f32>, &usize)| -> Vec<log_sum_exp::RowStats> {
                let tile = |(i, tile): (usize, &[f32])| {
                    let target_logit = target.checked_sub(64 * i).and_then(|t| tile.get(t)).copied().unwrap_or(0.0);
                    let mut stats = log_sum_exp::log_sum_exp(isas()[0], tile);
                    stats.max = stats.max.max(f32::MIN);
                    log_sum_exp::RowStats { stats, target_logit }
                };
                row.chunks(64).enumerate().map(tile).collect()
            };
            let mut all: Vec<log_sum_exp::RowStats> = rows.iter().zip(&targets).flat_map(stats).collect();
            let tiles = vocab.div_ceil(64);
            // A fifth row with a NaN in its last tile.
            all.extend_from_within(..tiles);
            all.last_mut().unwrap().stats.sum = f32::NAN;
            let params = log_sum_exp::Params { rows: 5, tiles: tiles as u32, first: 2 };
            let storage = [cast_slice(&all).to_vec(), bytes(&[7.0; 4 * 7])];
            let got = device.run_checked(&log_sum_exp::KERNEL, Flags::default(), &params, &storage, [5, 1, 1]);
            let got: Vec<log_sum_exp::RowStats> = pod_collect_to_vec(&got[1]);
            assert!(got[..2].iter().all(|s| s.stats.max == 7.0 && s.target_logit == 7.0));
            assert!(got[6].stats.sum.is_nan() && got[6].stats.logprob(0.0).is_nan());
            for (i, (got, want)) in got[2..].iter().zip(&want).enumerate() {
                let s = got.stats;
                let what = format!("log_sum_exp gpu V{vocab}");
                compare(&what, &[s.max, s.sum, s.weighted], want, &scale(want), Dtype::F32);
                let logit = rows[i].get(targets[i]).copied().unwrap_or(0.0);
                assert_eq!(got.target_logit, logit);
            }
        }
    }
}

#[test]
fn top_k_twins() {
    for vocab in [3, 100, 700] {
        let rows = logit_rows(vocab);
        let k = 5;
        let want: Vec<Vec<u32>> = rows
            .iter()
            .map(|row| {
                let mut ids: Vec<u32> = (0..vocab as u32).collect();
                ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
                ids.resize(k, top_k::NO_TOKEN);
                ids.truncate(k);
                ids
            })
            .collect();
        for (row, want) in rows.iter().zip(&want) {
            let got: Vec<u32> = top_k::top_k(row, k).iter().map(|c| c.token).collect();
            assert_eq!(&got, want);
        }
        for device in gpus() {
            let params = top_k::Params { rows: 4, vocab: vocab as u32, k: k as u32 };
            let storage = [bytes(&rows.concat()), vec![0; 4 * k * 8]];
            let got = device.run_checked(&top_k::KERNEL, Flags::default(), &params, &storage, [4, 1, 1]);
            let got: Vec<top_k::Candidate> = pod_collect_to_vec(&got[1]);
            let tokens: Vec<u32> = got.iter().map(|c| c.token).collect();
            assert_eq!(tokens, want.concat());
        }
    }
    assert!(top_k::top_k(&[f32::NAN, 1.0], 2)[1].token == top_k::NO_TOKEN);
}

/// Rows in which more tokens reach the shader's floor than it has room for, and fewer than K.
#[test]
fn top_k_of_hard_rows() {
    for vocab in [1usize, 255, 257, 1000, 20_000] {
        let plain: Vec<f32> = Numbers(vocab as u64).floats(vocab).iter().map(|v| v * 8.0).collect();
        let equal = vec![-0.0; vocab];
        let two: Vec<f32> = (0..vocab).map(|v| if v % 7 == 3 { 1.0 } else { 0.0 }).collect();
        let lanes: Vec<f32> =
            plain.iter().enumerate().map(|(v, l)| if v % 256 < 100 { l + 50.0 } else { *l }).collect();
        let odd = |(v, l): (usize, &f32)| match v % 5 {
            0 => f32::NAN,
            1 => f32::NEG_INFINITY,
            2 => f32::INFINITY,
            _ => *l,
        };
        let odd: Vec<f32> = plain.iter().enumerate().map(odd).collect();
        let few: Vec<f32> = (0..vocab).map(|v| if v == vocab / 2 { 1.0 } else { -f32::NAN }).collect();
        let rows = [plain, equal, two, lanes, odd, few];
        for k in [1, 20, top_k::MAX_K] {
            let want: Vec<top_k::Candidate> = rows.iter().flat_map(|row| top_k::top_k(row, k)).collect();
            for device in gpus() {
                let params = top_k::Params { rows: rows.len() as u32, vocab: vocab as u32, k: k as u32 };
                let storage = [bytes(&rows.concat()), vec![0; rows.len() * k * 8]];
                let groups = [rows.len() as u32, 1, 1];
                let got = device.run(&top_k::KERNEL, Flags::default(), &params, &storage, groups);
                let got: Vec<top_k::Candidate> = pod_collect_to_vec(&got[1]);
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    assert_eq!(got.token, want.token, "V{vocab} K{k} row {} place {}", i / k, i % k);
                    assert!(want.token == top_k::NO_TOKEN || got.logit == want.logit);
                }
            }
        }
    }
}
