//! The GPU's products, in every format of weights and shape of tile: against f64 sums, and to the same bits whatever the
//! shape, the adapter's features, the slices of the weight and the company of a row.

use rewardrt::backend::gpu::TileShape;

use super::*;

/// What lies where nobody may look, or write.
const UNTOUCHED: f32 = -77.25;

/// How weights may lie on a device, with the flag for native f16.
pub(super) fn formats(device: &Device, k: usize) -> Vec<Flags> {
    let of = |format, f16| Flags { format: Some(format), f16, ..Flags::default() };
    let mut all: Vec<Flags> = Dtype::ALL.into_iter().map(|dtype| of(Format::Rows(dtype), false)).collect();
    all.extend([of(Format::Int8, false), of(Format::Int4, false)]);
    if device.has_f16() {
        all.push(of(Format::Rows(Dtype::F16), true));
        let tiles = [8, 16].into_iter().filter(|tile| k.is_multiple_of(*tile));
        all.extend(tiles.map(|tile| Flags { emulated: true, ..of(Format::Tiles(tile as u32), true) }));
    }
    all
}

/// The variants that must have the same bits: shapes, and what the adapter may have.
pub(super) fn same_bits(device: &Device, flags: Flags, k: usize, case: usize) -> Vec<Flags> {
    let tiled = flags.is_tiled();
    let mut shapes = vec![TileShape::Narrow, TileShape::Wide];
    if !tiled {
        shapes.push(TileShape::OneRow);
    } else if !flags.head {
        shapes.push(TileShape::Medium);
    }
    let mut all: Vec<Flags> = shapes.into_iter().map(|shape| Flags { shape, ..flags }).collect();
    if !tiled {
        // One of what the adapter may have: the cases take turns.
        let (subgroup, vec4, wide) = (device.gpu.info().has_subgroups, k.is_multiple_of(4), TileShape::Wide);
        all.push(match case % 4 {
            0 => Flags { subgroup, vec4, ..flags },
            1 => Flags { subgroup, shape: wide, ..flags },
            2 => Flags { vec4, shape: wide, ..flags },
            _ => Flags { subgroup, vec4, shape: TileShape::OneRow, ..flags },
        });
    }
    all
}

/// Inputs and a weight as a kernel of this format reads them, and the values that it sees.
pub(super) struct Operands {
    pub stride: u32,
    /// x, weight, scales.
    storage: [Vec<u8>; 3],
    pub x: Vec<f64>,
    pub w: Vec<f32>,
}

impl Operands {
    pub fn new(flags: Flags, x: &[f32], w: &[f32], k: usize) -> Operands {
        let n = w.len() / k;
        let through = |dtype: Dtype, v: &[f32]| dtype.to_f32(&dtype.from_f32(v));
        let mut exact_x = x.to_vec();
        let (weight, scales, stride, exact_w) = match flags.format.unwrap() {
            Format::Rows(dtype) => {
                let stored = dtype.from_f32(w);
                let (padded, stride) = padded_rows(&stored, n, k, dtype.size());
                (padded, vec![0; 4], stride, dtype.to_f32(&stored))
            }
            Format::Tiles(tile) => {
                exact_x = through(Dtype::F16, x);
                // NaN beyond the end: whoever is there must not be used.
                let mut padded = w.to_vec();
                padded.resize(n.next_multiple_of(64) * k, f32::NAN);
                let packed = pack_tiles(&padded, padded.len() / k, k, tile as usize, 64);
                (cast_slice(&packed).to_vec(), vec![0; 4], k as u32, through(Dtype::F16, w))
            }
            format => {
                let stored = bytes(w);
                let view = MatrixView::new(Dtype::F32, &stored, n, k);
                let mut exact = vec![0.0; n * k];
                if format == Format::Int8 {
                    let quantised = linear::Int8Matrix::quantise(view, &Pool::new(1)).unwrap();
                    exact.chunks_exact_mut(k).enumerate().for_each(|(i, row)| quantised.view().read_f32(i, row));
                    let (quants, scales) = (quantised.view().quants(), bytes(quantised.view().scales()));
                    (cast_slice(quants).to_vec(), scales, k.next_multiple_of(linear::INT8_BLOCK) as u32, exact)
                } else {
                    let quantised = linear::Int4Matrix::quantise(view, &Pool::new(1)).unwrap();
                    exact.chunks_exact_mut(k).enumerate().for_each(|(i, row)| quantised.view().read_f32(i, row));
                    let (quants, scales) = (quantised.view().quants(), bytes(quantised.view().scales()));
                    (cast_slice(quants).to_vec(), scales, k.next_multiple_of(linear::INT4_BLOCK) as u32, exact)
                }
            }
        };
        let on_device = if flags.is_tiled() {
            let mut padded = x.to_vec();
            padded.resize((x.len() / k + 64) * k, f32::NAN);
            Dtype::F16.from_f32(&padded)
        } else {
            bytes(x)
        };
        let x = exact_x.iter().map(|v| f64::from(*v)).collect();
        Operands { stride, storage: [on_device, weight, scales], x, w: exact_w }
    }

    /// x, weight, scales, bias, and what else a kernel binds.
    pub fn storage(&self, bias: &[f32], rest: &[Vec<u8>]) -> Vec<Vec<u8>> {
        [&self.storage[..], &[bytes(bias)], rest].concat()
    }
}

/// Workgroups of a product.
pub(super) fn groups(flags: Flags, rows: usize, count: usize) -> [u32; 3] {
    let [tile_rows, tile_cols] = flags.workgroup_tile();
    [(rows as u32).div_ceil(tile_rows), (count as u32).div_ceil(tile_cols), 1]
}

/// The order of the rows of queries, keys and values: the two elements of a pair are neighbours.
pub(super) fn rotated(row: usize, rotated_heads: usize, head_dim: usize) -> usize {
    let (head, i) = (row / head_dim, row % head_dim);
    if head < rotated_heads { head * head_dim + i / 2 + i % 2 * (head_dim / 2) } else { row }
}

/// Rows of `w` in another order.
pub(super) fn reordered(w: &[f32], k: usize, order: impl Fn(usize) -> usize) -> Vec<f32> {
    (0..w.len() / k).flat_map(|row| w[order(row) * k..][..k].to_vec()).collect()
}

pub(super) fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

/// Rows, columns, K: around the tiles, the lanes, and the chunks of the matrix units.
const SHAPES: [(usize, usize, usize); 13] = [
    (1, 1, 1),
    (3, 15, 7),
    (4, 16, 8),
    (5, 17, 9),
    (9, 65, 63),
    (17, 65, 64),
    (33, 17, 65),
    (5, 65, 300),
    (4, 17, 16),
    (17, 16, 112),
    (1, 65, 128),
    (33, 65, 144),
    (70, 130, 208),
];

#[test]
fn linear_twins_on_the_gpu() {
    for device in gpus() {
        for (case, (t, n, k)) in SHAPES.into_iter().enumerate() {
            for flags in formats(device, k) {
                let mut numbers = Numbers((t * 1000 + n * 10 + k) as u64);
                // Rows and columns before those that are used, and behind: of the weight, whole tiles of every shape.
                let (x_first, slice_row, first) = ([0, 3][case % 2], [0, 64][case / 2 % 2], case % 3);
                let (with_bias, accumulates, scale) = (case % 2 == 1, case % 3 == 1, [1.0, 4.0][case / 3 % 2]);
                let out_stride = first + n + 2;
                let x = numbers.floats((x_first + t) * k);
                let w = numbers.floats((slice_row + n) * k);
                let bias = numbers.floats(out_stride);
                let operands = Operands::new(flags, &x, &w, k);
                let before = if accumulates { numbers.floats(t * out_stride) } else { vec![UNTOUCHED; t * out_stride] };
                let params = linear::Params {
                    rows: t as u32,
                    k: k as u32,
                    stride: operands.stride,
                    count: n as u32,
                    first: first as u32,
                    out_stride: out_stride as u32,
                    has_bias: u32::from(with_bias),
                    slice_row: slice_row as u32,
                    x_first: x_first as u32,
                    accumulate: u32::from(accumulates),
                    scale,
                };
                let storage = operands.storage(&bias, &[bytes(&before)]);
                let (sums, sizes) = product(&operands.x[x_first * k..], &operands.w[slice_row * k..], k, None);
                let (mut want, mut magnitude): (Vec<f64>, Vec<f64>) =
                    before.iter().map(|v| (f64::from(*v), f64::from(v.abs()))).unzip();
                for (i, (sum, size)) in sums.iter().zip(&sizes).enumerate() {
                    let at = i / n * out_stride + first + i % n;
                    let b = if with_bias { f64::from(bias[first + i % n]) } else { 0.0 };
                    let old = if accumulates { f64::from(before[at]) } else { 0.0 };
                    want[at] = sum * f64::from(scale) + b + old;
                    magnitude[at] = size * f64::from(scale) + b.abs() + old.abs();
                }
                let mut bits_of_first = None;
                for (i, flags) in same_bits(device, flags, k, case).into_iter().enumerate() {
                    let what = format!("linear {flags:?} T{t} N{n} K{k}");
                    // With checks once a shape of tile.
                    let run = if case % 5 == 3 && i < 3 { Device::run_checked } else { Device::run };
                    let out = run(device, &linear::KERNEL, flags, &params, &storage, groups(flags, t, n));
                    let out = floats(&out[4]);
                    compare(&what, &out, &want, &magnitude, Dtype::F32);
                    assert_eq!(bits(&out), *bits_of_first.get_or_insert(bits(&out)), "{what}: other bits");
                }
                // A row alone, as it is computed then: its bits are those that it has in company.
                let shape = if flags.is_tiled() { TileShape::Narrow } else { TileShape::OneRow };
                let flags = Flags { shape, ..flags };
                let row = t - 1;
                let alone = linear::Params { rows: 1, x_first: (x_first + row) as u32, ..params };
                let mut storage = storage;
                storage[4] = bytes(&before[row * out_stride..]);
                let out = device.run(&linear::KERNEL, flags, &alone, &storage, groups(flags, 1, n));
                let company = &bits_of_first.unwrap()[row * out_stride..];
                assert_eq!(bits(&floats(&out[4])), company, "linear {flags:?} T{t} N{n} K{k}: row {row} alone");
            }
        }
    }
}

/// What is not finite reaches the elements that it is a part of, and no others.
#[test]
fn linear_keeps_nan_and_infinity_to_their_elements() {
    let (t, n, k) = (5, 18, 16);
    for device in gpus() {
        for flags in formats(device, k).into_iter().filter(|f| !matches!(f.format, Some(Format::Int8 | Format::Int4))) {
            let mut numbers = Numbers(31);
            let (mut x, mut w) = (numbers.floats(t * k), numbers.floats(n * k));
            x[2 * k + 3] = f32::NAN;
            x[4 * k + 5] = f32::INFINITY;
            w[7 * k] = f32::NAN;
            w[17 * k + 9] = f32::NEG_INFINITY;
            let operands = Operands::new(flags, &x, &w, k);
            let (want, sizes) = product(&operands.x, &operands.w, k, None);
            let params = linear::Params {
                rows: t as u32,
                k: k as u32,
                stride: operands.stride,
                count: n as u32,
                first: 0,
                out_stride: n as u32,
                has_bias: 0,
                slice_row: 0,
                x_first: 0,
                accumulate: 0,
                scale: 1.0,
            };
            let storage = operands.storage(&[0.0], &[bytes(&vec![UNTOUCHED; t * n])]);
            for flags in (0..4).flat_map(|case| same_bits(device, flags, k, case)) {
                let out = device.run(&linear::KERNEL, flags, &params, &storage, groups(flags, t, n));
                compare(&format!("linear {flags:?}"), &floats(&out[4]), &want, &sizes, Dtype::F32);
            }
        }
    }
}

/// Queries, keys and values: rotated, and in the slots of the cache; in one slice and in two.
#[test]
fn linear_qkv_twins() {
    // T, H, G, E, K.
    for (case, [t, heads, kv_heads, head_dim, k]) in
        [[1, 3, 1, 2, 9], [5, 4, 2, 6, 33], [18, 3, 3, 20, 64], [37, 2, 1, 64, 112]].into_iter().enumerate()
    {
        let (rotated_heads, width) = (heads + kv_heads, kv_heads * head_dim);
        let n = (heads + 2 * kv_heads) * head_dim;
        let mut numbers = Numbers((heads * 100 + head_dim) as u64);
        let (x, w, bias) = (numbers.floats(t * k), numbers.floats(n * k), numbers.floats(n));
        let (first_meta, blocks) = (2, 4);
        let rows: Vec<RowMeta> = (0..first_meta + t)
            .map(|i| RowMeta { token: 0, position: i as u32, slot: (i * 37 % (blocks * KV_BLOCK)) as u32, table: 0 })
            .collect();
        let cos_sin = random_angles(&mut numbers, first_meta + t, head_dim / 2);
        let order = |row| rotated(row, rotated_heads, head_dim);
        let ordered_bias = reordered(&bias, 1, order);
        for device in gpus() {
            for flags in formats(device, k) {
                let operands = Operands::new(flags, &x, &reordered(&w, k, order), k);
                // What the formula gives, in the order of the heads.
                let mut natural = vec![0.0; n * k];
                operands.w.chunks_exact(k).enumerate().for_each(|(row, w)| {
                    natural[order(row) * k..][..k].copy_from_slice(w);
                });
                let has_bias = case % 2 == 1;
                let (mut y, sizes) = product(&operands.x, &natural, k, has_bias.then_some(&bias[..]));
                let most = sizes.iter().fold(0.0f64, |m, s| m.max(*s));
                for (row, y) in y.chunks_exact_mut(n).enumerate() {
                    let angles = &cos_sin[(first_meta + row) * head_dim..][..head_dim];
                    rotate(&mut y[..rotated_heads * head_dim], angles, rotated_heads, head_dim / 2);
                }
                let cache = blocks * KV_BLOCK * width;
                let mut want_q = Vec::new();
                let (mut want_keys, mut want_values) =
                    (vec![f64::from(UNTOUCHED); cache], vec![f64::from(UNTOUCHED); cache]);
                for (row, y) in y.chunks_exact(n).enumerate() {
                    let (q, kv) = y.split_at(heads * head_dim);
                    want_q.extend_from_slice(q);
                    let slot = rows[first_meta + row].slot as usize;
                    for at in 0..width {
                        let [key, value] = places((slot / KV_BLOCK) as u32, slot, at, [kv_heads, head_dim]);
                        (want_keys[key], want_values[value]) = (kv[at], kv[width + at]);
                    }
                }
                let params = linear_qkv::Params {
                    rows: t as u32,
                    k: k as u32,
                    stride: operands.stride,
                    count: n as u32,
                    first: 0,
                    has_bias: u32::from(has_bias),
                    slice_row: 0,
                    x_first: 0,
                    heads: heads as u32,
                    kv_heads: kv_heads as u32,
                    head_dim: head_dim as u32,
                    first_meta: first_meta as u32,
                    q_scale: 1.0,
                };
                let storage_of = |half_kv: bool| {
                    let kv = |v: &[f32]| if half_kv { Dtype::F16.from_f32(v) } else { bytes(v) };
                    let (q, empty) = (bytes(&vec![f32::NAN; t * heads * head_dim]), kv(&vec![UNTOUCHED; cache]));
                    let rest = [cast_slice(&rows).to_vec(), bytes(&cos_sin), q, empty.clone(), empty];
                    operands.storage(&ordered_bias, &rest)
                };
                let mut first_bits = None;
                for (i, flags) in same_bits(device, flags, k, case).into_iter().enumerate() {
                    let what = format!("linear_qkv {flags:?} H{heads} G{kv_heads} E{head_dim}");
                    let run = if case == 1 && i < 3 { Device::run_checked } else { Device::run };
                    let out = run(device, &linear_qkv::KERNEL, flags, &params, &storage_of(false), groups(flags, t, n));
                    for (got, want) in out[6..].iter().zip([&want_q, &want_keys, &want_values]) {
                        compare(&what, &floats(got), want, &vec![2.0 * most; want.len()], Dtype::F32);
                    }
                    assert!(out[6..] == *first_bits.get_or_insert(out[6..].to_vec()), "{what}: other bits");
                }
                let whole = first_bits.unwrap();
                if device.has_f16() {
                    let flags = Flags { f16: true, half_kv: true, ..flags };
                    let out = device.run(&linear_qkv::KERNEL, flags, &params, &storage_of(true), groups(flags, t, n));
                    assert!(out[6] == whole[0]);
                    for (half, exact) in out[7..].iter().zip(&whole[1..]) {
                        rounded(&format!("linear_qkv {flags:?}"), &Dtype::F16.to_f32(half), &floats(exact));
                    }
                    // Queries as attention_tiles reads them.
                    let flags = Flags { half_q: true, ..flags };
                    let params = linear_qkv::Params { q_scale: 0.75, ..params };
                    let mut storage = storage_of(true);
                    storage[6] = Dtype::F16.from_f32(&vec![f32::NAN; t * heads * head_dim]);
                    let scaled: Vec<f32> = floats(&whole[0]).iter().map(|q| 0.75 * q).collect();
                    let half = device.run(&linear_qkv::KERNEL, flags, &params, &storage, groups(flags, t, n));
                    rounded(&format!("linear_qkv {flags:?}"), &Dtype::F16.to_f32(&half[6]), &scaled);
                    assert!(half[7..] == out[7..]);
                }
                if n > 64 {
                    // The first 64 rows, then the others: of the same buffer, where slices have their own.
                    let mut storage = storage_of(false);
                    for (first, count) in [(0, 64), (64, n - 64)] {
                        let (first, count) = (first as u32, count as u32);
                        let params = linear_qkv::Params { first, slice_row: first, count, ..params };
                        let groups = groups(flags, t, count as usize);
                        storage = device.run(&linear_qkv::KERNEL, flags, &params, &storage, groups);
                    }
                    assert!(storage[6..] == whole, "linear_qkv {flags:?} in slices");
                }
            }
        }
    }
}

/// Gate and up interleaved; in one slice and in two; the result as f16.
#[test]
fn linear_gated_twins() {
    // T, F, K.
    for (case, [t, width, k]) in [[1, 1, 5], [5, 9, 32], [18, 40, 64], [66, 33, 208]].into_iter().enumerate() {
        let n = 2 * width;
        let mut numbers = Numbers((width * 10 + k) as u64);
        // Gates of some size: silu is not almost linear there.
        let (x, w) = (numbers.floats(t * k), numbers.floats(n * k).iter().map(|v| v * 3.0).collect::<Vec<_>>());
        let bias = numbers.floats(n);
        let (has_bias, scale) = (case % 2 == 1, [1.0, 0.125][case / 2 % 2]);
        for device in gpus() {
            for flags in formats(device, k) {
                let operands = Operands::new(flags, &x, &w, k);
                let (sums, sizes) = product(&operands.x, &operands.w, k, has_bias.then_some(&bias[..]));
                let mut want = Vec::new();
                let mut magnitude = Vec::new();
                for (pair, size) in sums.chunks_exact(2).zip(sizes.chunks_exact(2)) {
                    want.push(silu(pair[0]) * pair[1] * f64::from(scale));
                    magnitude.push((size[0] + 1.0) * (size[1] + 1.0) * f64::from(scale));
                }
                let params = linear_gated::Params {
                    rows: t as u32,
                    k: k as u32,
                    stride: operands.stride,
                    count: n as u32,
                    first: 0,
                    out_stride: width as u32,
                    has_bias: u32::from(has_bias),
                    slice_row: 0,
                    x_first: 0,
                    scale,
                };
                let storage = operands.storage(&bias, &[bytes(&vec![f32::NAN; t * width])]);
                let mut first_bits = None;
                for (i, flags) in same_bits(device, flags, k, case).into_iter().enumerate() {
                    let what = format!("linear_gated {flags:?} T{t} F{width} K{k}");
                    let run = if case == 1 && i < 3 { Device::run_checked } else { Device::run };
                    let out = run(device, &linear_gated::KERNEL, flags, &params, &storage, groups(flags, t, n));
                    compare(&what, &floats(&out[4]), &want, &magnitude, Dtype::F32);
                    assert!(out[4] == *first_bits.get_or_insert(out[4].clone()), "{what}: other bits");
                }
                let whole = first_bits.unwrap();
                if device.has_f16() {
                    let flags = Flags { f16: true, half_out: true, ..flags };
                    let mut storage = storage.clone();
                    storage[4] = vec![0; 2 * t * width];
                    let out = device.run(&linear_gated::KERNEL, flags, &params, &storage, groups(flags, t, n));
                    rounded(&format!("linear_gated {flags:?}"), &Dtype::F16.to_f32(&out[4]), &floats(&whole));
                }
                if n > 64 {
                    let mut storage = storage;
                    for (first, count) in [(0, 64), (64, n - 64)] {
                        let (first, count) = (first as u32, count as u32);
                        let params = linear_gated::Params { first, slice_row: first, count, ..params };
                        let groups = groups(flags, t, count as usize);
                        storage = device.run(&linear_gated::KERNEL, flags, &params, &storage, groups);
                    }
                    assert!(storage[4] == whole, "linear_gated {flags:?} in slices");
                }
            }
        }
    }
}

/// Max, Σ e^(l − max) and Σ e^(l − max)·(l − max) of logits; −Inf adds nothing.
fn statistics(logits: &[f32]) -> [f64; 3] {
    let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let (mut sum, mut weighted) = (0.0, 0.0);
    for l in logits.iter().filter(|l| **l != f32::NEG_INFINITY) {
        let shift = f64::from(*l) - max;
        sum += shift.exp();
        weighted += shift.exp() * shift;
    }
    [max, sum, weighted]
}

/// The pass over the vocabulary and what joins its tiles: logits, statistics and targets, in slices and at once.
#[test]
fn head_and_log_sum_exp_twins() {
    // M, V, K: less than a tile of tokens, whole tiles, and several with a rest.
    for (case, [rows, vocab, k]) in [[1, 37, 9], [5, 128, 32], [18, 150, 64], [66, 193, 112]].into_iter().enumerate() {
        let mut numbers = Numbers((vocab * 10 + k) as u64);
        let (x_first, first_target, targets_before) = (3, 2, [1u32, 1]);
        // Every row begins with 1, so that a weight of −Inf makes logits of −Inf.
        let mut x = numbers.floats((x_first + rows) * k);
        x.iter_mut().step_by(k).for_each(|v| *v = 1.0);
        let mut w: Vec<f32> = numbers.floats(vocab * k).iter().map(|v| v * 4.0).collect();
        // Targets in every tile, in the last token, and none.
        let mut targets: Vec<u32> = (0..rows).map(|m| (m * 67 % vocab) as u32).collect();
        targets[rows - 1] = vocab as u32 - 1;
        if rows > 2 {
            targets[1] = u32::MAX;
            targets[2] = vocab as u32;
        }
        if rows > 5 {
            // A row that is NaN all over.
            x[(x_first + rows - 1) * k + 1] = f32::NAN;
        }
        let all_targets = [&targets_before[..], &targets].concat();
        for device in gpus() {
            for flags in formats(device, k).into_iter().map(|flags| Flags { head: true, ..flags }) {
                let integers = matches!(flags.format, Some(Format::Int8 | Format::Int4));
                if !integers {
                    // A token, and a whole tile of 64 where there are several.
                    w[vocab / 3 * k] = f32::NEG_INFINITY;
                    (64..128).filter(|_| vocab > 128).for_each(|v| w[v * k] = f32::NEG_INFINITY);
                } else {
                    w.iter_mut().filter(|v| v.is_infinite()).for_each(|v| *v = 0.25);
                }
                let operands = Operands::new(flags, &x, &w, k);
                let (want, sizes) = product(&operands.x[x_first * k..], &operands.w, k, None);
                let [_, cols] = flags.workgroup_tile();
                let tiles = vocab.div_ceil(cols as usize);
                let params = head::Params {
                    rows: rows as u32,
                    k: k as u32,
                    stride: operands.stride,
                    count: vocab as u32,
                    first: 0,
                    slice_row: 0,
                    x_first: x_first as u32,
                    vocab: vocab as u32,
                    tiles: tiles as u32,
                    keep: 1,
                    first_target,
                };
                let empty = bytes(&vec![UNTOUCHED; rows * vocab]);
                let rest =
                    [cast_slice(&all_targets).to_vec(), empty.clone(), bytes(&vec![UNTOUCHED; rows * tiles * 4])];
                let storage = operands.storage(&[0.0], &rest);
                let mut first_bits = None;
                for (i, flags) in same_bits(device, flags, k, case).into_iter().enumerate() {
                    let what = format!("head {flags:?} M{rows} V{vocab} K{k}");
                    let run = if rows == 5 && i < 3 { Device::run_checked } else { Device::run };
                    let out = run(device, &head::KERNEL, flags, &params, &storage, groups(flags, rows, vocab));
                    compare(&what, &floats(&out[5]), &want, &sizes, Dtype::F32);
                    let logits_and_stats = (bits(&floats(&out[5])), bits(&floats(&out[6])));
                    assert!(
                        logits_and_stats == *first_bits.get_or_insert(logits_and_stats.clone()),
                        "{what}: other bits"
                    );
                }
                let (logits, stats) = first_bits.unwrap();
                let logits: Vec<f32> = logits.into_iter().map(f32::from_bits).collect();
                let stats: Vec<log_sum_exp::RowStats> = pod_collect_to_vec(&stats);
                let what = format!("head {flags:?} M{rows} V{vocab} K{k}");
                for (m, (logits, stats)) in logits.chunks_exact(vocab).zip(stats.chunks_exact(tiles)).enumerate() {
                    for (i, (logits, got)) in logits.chunks(cols as usize).zip(stats).enumerate() {
                        let target = (targets[m] as usize).checked_sub(i * cols as usize);
                        let logit = target.and_then(|t| logits.get(t)).copied().unwrap_or(0.0);
                        assert!(got.target_logit == logit || logit.is_nan() && got.target_logit.is_nan(), "{what}");
                        if logits.iter().any(|l| l.is_nan()) {
                            assert!(got.stats.sum.is_nan(), "{what}: row {m}, tile {i}");
                            continue;
                        }
                        let want = statistics(logits);
                        let stats = [got.stats.max, got.stats.sum, got.stats.weighted];
                        // What exp makes of a rounded argument: up to 20 times 2^-24.
                        let scale = [want[0].abs().max(1.0), 4.0 * want[1], 20.0 * want[1].max(1.0)];
                        compare(&format!("{what}: row {m}, tile {i}"), &stats, &want, &scale, Dtype::F32);
                    }
                }

                // Nothing is kept, but the statistics are the same; in slices of 64 tokens.
                let mut storage = storage;
                for first in (0..vocab).step_by(64) {
                    let count = 64.min(vocab - first);
                    let (first, count) = (first as u32, count as u32);
                    let params = head::Params { first, slice_row: first, count, keep: 0, ..params };
                    let groups = groups(flags, rows, count as usize);
                    storage = device.run(&head::KERNEL, flags, &params, &storage, groups);
                }
                assert!(storage[5] == empty, "{what}: logits that nobody asked for");
                assert_eq!(bits(&floats(&storage[6])), bits(cast_slice(&stats)), "{what}: in slices");

                let params = log_sum_exp::Params { rows: rows as u32, tiles: tiles as u32, first: 1 };
                let joined = [cast_slice(&stats).to_vec(), bytes(&vec![UNTOUCHED; 4 * (rows + 1)])];
                let plain = Flags::default();
                let joined = device.run(&log_sum_exp::KERNEL, plain, &params, &joined, [rows as u32, 1, 1]);
                let joined: Vec<log_sum_exp::RowStats> = pod_collect_to_vec(&joined[1]);
                assert_eq!(joined[0].stats.max, UNTOUCHED);
                for (m, (logits, got)) in logits.chunks_exact(vocab).zip(&joined[1..]).enumerate() {
                    let logit = logits.get(targets[m] as usize).copied().unwrap_or(0.0);
                    if logits.iter().any(|l| l.is_nan()) {
                        assert!(got.stats.logprob(logit).is_nan() && got.stats.entropy().is_nan(), "{what}: row {m}");
                        continue;
                    }
                    let [max, sum, weighted] = statistics(logits);
                    let logprob = f64::from(logit) - max - sum.ln();
                    let entropy = sum.ln() - weighted / sum;
                    assert_eq!(got.target_logit, logit, "{what}: row {m}");
                    let stats = [got.stats.logprob(logit), got.stats.entropy()];
                    compare(&format!("{what}: row {m}"), &stats, &[logprob, entropy], &[20.0, 20.0], Dtype::F32);
                }
            }
        }
    }
}
