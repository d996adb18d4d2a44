//! Each CPU twin on one thread at the shapes of SmolLM2-135M (D 576, F 1536, H 9, G 3, E 64, V 49152); and the GPU's products
//! at the same shapes, on the device that `REWARDRT_BENCH_DEVICE` names.
#![allow(missing_docs, clippy::expect_used)]

use std::hint::black_box;

use bytemuck::{Pod, bytes_of, cast_slice};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rewardrt::backend::cpu::Pool;
use rewardrt::backend::gpu::{Flags, Format, Gpu, GpuOptions, Probe, Selection, TileShape, pack_tiles};
use rewardrt::kernels::linear::{Precision, Weight};
use rewardrt::kernels::*;
use rewardrt::weights::Dtype;

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

fn isa() -> Isa {
    Isa::detect().expect("REWARDRT_ISA")
}

fn linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    for (n, k) in [(1536, 576), (576, 1536)] {
        let weights = floats(n * k);
        for dtype in Dtype::ALL {
            let stored = dtype.from_f32(&weights);
            let view = MatrixView::new(dtype, &stored, n, k);
            let int8 = linear::Int8Matrix::quantise(view, &Pool::new(1)).expect("finite weights");
            let int4 = linear::Int4Matrix::quantise(view, &Pool::new(1)).expect("finite weights");
            let mut cases = vec![("auto", Precision::Auto, Weight::Stored(view))];
            if dtype == Dtype::BF16 {
                cases.push(("f32", Precision::F32, Weight::Stored(view)));
                cases.push(("int8", Precision::Auto, Weight::Int8(int8.view())));
                cases.push(("int4", Precision::Auto, Weight::Int4(int4.view())));
            }
            for (what, precision, weight) in cases {
                for rows in [1, 8, 64, 256] {
                    let (x, mut out) = (floats(rows * k), vec![0.0; rows * n]);
                    group.throughput(Throughput::Elements((2 * rows * n * k) as u64));
                    let id = BenchmarkId::new(format!("{} {what} {n}x{k}", dtype.name()), rows);
                    group.bench_function(id, |b| {
                        b.iter(|| linear::linear_alone(isa(), precision, &x, weight, None, black_box(&mut out)));
                    });
                }
            }
        }
    }
}

fn row_wise(c: &mut Criterion) {
    let isa = isa();
    let (x, weight) = (floats(64 * 576), floats(576));
    let mut out = vec![0.0; x.len()];
    c.bench_function("rms_norm/64x576", |b| b.iter(|| rms_norm::rms_norm(isa, &x, &weight, 1e-5, black_box(&mut out))));
    let (gate, mut up) = (floats(64 * 1536), floats(64 * 1536));
    c.bench_function("silu_mul/64x1536", |b| b.iter(|| silu_mul::silu_mul(isa, &gate, black_box(&mut up))));
    let (cos_sin, mut q) = (floats(64 * 64), floats(64 * 576));
    c.bench_function("rope/64x9x64", |b| b.iter(|| rope::rope(isa, &cos_sin, 32, 9, black_box(&mut q))));
    let index: Vec<u32> = (0..64).rev().collect();
    c.bench_function("gather_rows/64x576", |b| {
        b.iter(|| gather_rows::gather_rows(&index, &x, 576, black_box(&mut out)));
    });
    let stored = Dtype::BF16.from_f32(&floats(1000 * 576));
    let table = MatrixView::new(Dtype::BF16, &stored, 1000, 576);
    let rows: Vec<RowMeta> = (0..64).map(|i| RowMeta { token: i * 13, ..RowMeta::default() }).collect();
    c.bench_function("embed/64x576", |b| b.iter(|| embed::embed(&rows, table, black_box(&mut out))));
}

fn attention(c: &mut Criterion) {
    let isa = isa();
    let mut group = c.benchmark_group("attention");
    for len in [128usize, 1024] {
        let blocks = len / KV_BLOCK;
        let (keys, values, q) = (floats(len * 192), floats(len * 192), floats(576));
        let tables: Vec<u32> = (0..blocks as u32).collect();
        let rows = [RowMeta { position: len as u32 - 1, slot: len as u32 - 1, ..RowMeta::default() }];
        let mut out = vec![0.0; 576];
        group.bench_function(BenchmarkId::new("9/3x64, keys", len), |b| {
            b.iter(|| {
                let inputs = attention::Inputs {
                    rows: &rows,
                    tables: &tables,
                    q: &q,
                    keys: &keys,
                    values: &values,
                    heads: 9,
                    kv_heads: 3,
                    head_dim: 64,
                    window: None,
                };
                attention::attention_alone(isa, inputs, black_box(&mut out));
            });
        });
    }
    let rows: Vec<RowMeta> = (0..64).map(|i| RowMeta { position: i, slot: i, ..RowMeta::default() }).collect();
    let (k, v) = (floats(64 * 192), floats(64 * 192));
    let (mut keys, mut values) = (vec![0.0; 64 * 192], vec![0.0; 64 * 192]);
    group.bench_function("kv_write/64x3x64", |b| {
        b.iter(|| kv_write::kv_write_alone(&rows, &k, &v, 3, black_box(&mut keys), black_box(&mut values)));
    });
}

fn vocabulary(c: &mut Criterion) {
    let isa = isa();
    let logits: Vec<f32> = floats(49152).iter().map(|l| l * 8.0).collect();
    c.bench_function("log_sum_exp/49152", |b| {
        b.iter(|| logits.chunks(log_sum_exp::CHUNK).map(|c| log_sum_exp::log_sum_exp(isa, c).sum).sum::<f32>());
    });
    c.bench_function("top_k/49152, k 20", |b| b.iter(|| top_k::top_k(&logits, 20)));
    let plain = sample::Request { uniform: 0.4, ..sample::Request::default() };
    let mut scratch = sample::Scratch::default();
    for (name, request) in [
        ("plain", plain),
        ("top-k 50", sample::Request { top_k: 50, ..plain }),
        ("top-p 0.9", sample::Request { top_p: 0.9, ..plain }),
        ("typical-p 0.9", sample::Request { typical_p: 0.9, ..plain }),
    ] {
        c.bench_function(&format!("sample/49152, {name}"), |b| {
            b.iter(|| sample::sample(isa, &logits, &request, &mut scratch))
        });
    }
}

/// What a parallel loop costs when it has nothing to do.
fn pool(c: &mut Criterion) {
    for threads in [1, 2] {
        let pool = Pool::new(threads);
        c.bench_function(&format!("pool/16 empty tasks, {threads} threads"), |b| {
            b.iter(|| pool.run(16, &|i| _ = black_box(i)));
        });
    }
}

/// A product of the GPU: its kernel, N, K, and what makes the rest of its call.
struct Product {
    kernel: &'static Kernel,
    n: usize,
    k: usize,
    /// The same call of this kernel, which has so many tiles of columns.
    call: fn(linear::Params, usize) -> Call,
}

/// Parameters, and the buffers behind the bias.
type Call = (Vec<u8>, Vec<Vec<u8>>);

fn call<P: Pod>(params: P, buffers: &[Vec<u8>]) -> Call {
    (bytes_of(&params).to_vec(), buffers.to_vec())
}

const PRODUCTS: [Product; 4] = [
    Product {
        kernel: &linear::KERNEL,
        n: 576,
        k: 1536,
        call: |p, _| call(p, &[vec![0; 4 * (p.rows * p.out_stride) as usize]]),
    },
    Product {
        kernel: &linear_qkv::KERNEL,
        n: 960,
        k: 576,
        call: |p, _| {
            let linear::Params { rows, k, stride, count, .. } = p;
            let shape = linear_qkv::Params {
                rows,
                k,
                stride,
                count,
                first: 0,
                has_bias: 0,
                slice_row: 0,
                x_first: 0,
                heads: 9,
                kv_heads: 3,
                head_dim: 64,
                first_meta: 0,
                q_scale: 1.0,
            };
            let meta: Vec<RowMeta> = (0..rows).map(|i| RowMeta { slot: i, ..RowMeta::default() }).collect();
            let of = |width: usize| vec![0; 4 * (rows as usize).next_multiple_of(KV_BLOCK) * width];
            call(shape, &[cast_slice(&meta).to_vec(), of(64), of(576), of(192), of(192)])
        },
    },
    Product {
        kernel: &linear_gated::KERNEL,
        n: 3072,
        k: 576,
        call: |p, _| {
            let linear::Params { rows, k, stride, count, .. } = p;
            let shape = linear_gated::Params {
                rows,
                k,
                stride,
                count,
                first: 0,
                out_stride: count / 2,
                has_bias: 0,
                slice_row: 0,
                x_first: 0,
                scale: 1.0,
            };
            call(shape, &[vec![0; (2 * rows * count) as usize]])
        },
    },
    Product {
        kernel: &head::KERNEL,
        n: 49152,
        k: 576,
        call: |p, tiles| {
            let linear::Params { rows, k, stride, count, .. } = p;
            let shape = head::Params {
                rows,
                k,
                stride,
                count,
                first: 0,
                slice_row: 0,
                x_first: 0,
                vocab: count,
                tiles: tiles as u32,
                keep: 0,
                first_target: 0,
            };
            call(shape, &[vec![0; 4 * rows as usize], vec![0; 16], vec![0; 16 * rows as usize * tiles]])
        },
    },
];

/// A weight as a product reads it, its scales, and elements from row to row.
fn on_device(format: Format, n: usize, k: usize) -> (Vec<u8>, Vec<u8>, usize) {
    let values = floats(n * k);
    match format {
        Format::Rows(dtype) => (dtype.from_f32(&values), Vec::new(), k),
        Format::Tiles(tile) => (cast_slice(&pack_tiles(&values, n, k, tile as usize, 64)).to_vec(), Vec::new(), k),
        _ => {
            let stored = Dtype::F32.from_f32(&values);
            let view = MatrixView::new(Dtype::F32, &stored, n, k);
            if format == Format::Int8 {
                let int8 = linear::Int8Matrix::quantise(view, &Pool::new(1)).expect("finite weights");
                let stride = k.next_multiple_of(linear::INT8_BLOCK);
                (cast_slice(int8.view().quants()).to_vec(), cast_slice(int8.view().scales()).to_vec(), stride)
            } else {
                let int4 = linear::Int4Matrix::quantise(view, &Pool::new(1)).expect("finite weights");
                let stride = k.next_multiple_of(linear::INT4_BLOCK);
                (cast_slice(int4.view().quants()).to_vec(), cast_slice(int4.view().scales()).to_vec(), stride)
            }
        }
    }
}

fn gpu_products(c: &mut Criterion) {
    let Ok(device) = std::env::var("REWARDRT_BENCH_DEVICE") else { return };
    let selection = Selection::parse(&device).expect("REWARDRT_BENCH_DEVICE");
    let Some(gpu) = Gpu::select(&selection, &GpuOptions::default()).expect("the device") else { return };
    let mut formats = vec![Format::Rows(Dtype::BF16), Format::Int8, Format::Int4];
    formats.extend(gpu.matrix_tile().map(Format::Tiles));
    for Product { kernel, n, k, call } in PRODUCTS {
        let mut group = c.benchmark_group(format!("gpu {}", kernel.name));
        group.sample_size(10);
        for &format in &formats {
            let (weight, scales, stride) = on_device(format, n, k);
            let has_f16 = gpu.info().has_f16;
            let head = kernel.name == "head";
            let plain = Flags { format: Some(format), f16: has_f16, vec4: true, head, ..Flags::default() };
            let mut shapes = vec![TileShape::Narrow, TileShape::Wide];
            if !plain.is_tiled() {
                shapes.push(TileShape::OneRow);
            } else if !head {
                shapes.push(TileShape::Medium);
            }
            for (shape, rows) in shapes.iter().flat_map(|shape| [1usize, 8, 64, 256].map(|rows| (*shape, rows))) {
                let flags = Flags { shape, subgroup: gpu.info().has_subgroups, ..plain };
                let [tile_rows, tile_cols] = flags.workgroup_tile().map(|t| t as usize);
                let params = linear::Params {
                    rows: rows as u32,
                    k: k as u32,
                    stride: stride as u32,
                    count: n as u32,
                    first: 0,
                    out_stride: n as u32,
                    has_bias: 0,
                    slice_row: 0,
                    x_first: 0,
                    accumulate: 0,
                    scale: 1.0,
                };
                let (params, rest) = call(params, n.div_ceil(tile_cols));
                let x = floats(rows.next_multiple_of(64) * k);
                let x = if flags.is_tiled() { Dtype::F16.from_f32(&x) } else { Dtype::F32.from_f32(&x) };
                let storage = [vec![x, weight.clone(), scales.clone(), Vec::new()], rest].concat();
                let probe = Probe::new(&gpu, kernel, flags, &storage).expect("the kernel");
                let groups = [rows.div_ceil(tile_rows) as u32, n.div_ceil(tile_cols) as u32, 1];
                group.throughput(Throughput::Elements((2 * rows * n * k) as u64));
                group.bench_function(BenchmarkId::new(format!("{format:?} {shape:?} {n}x{k}"), rows), |b| {
                    b.iter_custom(|times| probe.run(&params, groups, times).expect("the dispatches"));
                });
            }
        }
    }
}

criterion_group!(benches, pool, linear, row_wise, attention, vocabulary, gpu_products);
criterion_main!(benches);
