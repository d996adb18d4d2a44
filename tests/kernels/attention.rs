//! Attention and the cache it reads: the CPU twin, and the shaders over tiles, segments and half floats.

use super::*;

#[test]
fn attention_and_kv_write_twins() {
    for (heads, kv_heads, head_dim, window) in [
        (1, 1, 2, None),
        (6, 2, 20, None),
        (9, 3, 64, Some(5)),
        (4, 4, 33, Some(16)),
        (2, 1, 130, Some(70)),
        (16, 2, 6, None),
        (7, 1, 80, Some(65)),
        (2, 2, 512, None),
    ] {
        let lengths = [1usize, 16, 17, 90, 131];
        let blocks = 24;
        let mut numbers = Numbers((heads * head_dim) as u64);
        let (mut rows, mut tables, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        let mut free: Vec<u32> = (0..blocks as u32).map(|b| b * 7 % blocks as u32).collect();
        for len in lengths {
            let table = tables.len() as u32;
            tables.extend(free.drain(..len.div_ceil(KV_BLOCK)));
            spans.push(rows.len()..rows.len() + len);
            for p in 0..len {
                let block = tables[table as usize + p / KV_BLOCK];
                let slot = block * KV_BLOCK as u32 + (p % KV_BLOCK) as u32;
                rows.push(RowMeta { token: 0, position: p as u32, slot, table });
            }
        }
        let (t, width) = (rows.len(), kv_heads * head_dim);
        let (q, k, v) = (numbers.floats(t * heads * head_dim), numbers.floats(t * width), numbers.floats(t * width));
        let mut want = vec![0.0f64; q.len()];
        for span in &spans {
            for row in span.clone() {
                let position = row - span.start;
                let first = window.map_or(0, |w: usize| (position + 1).saturating_sub(w));
                for h in 0..heads {
                    let kv_head = h * kv_heads / heads;
                    let at =
                        |values: &[f32], row: usize, e: usize| f64::from(values[row * width + kv_head * head_dim + e]);
                    let score = |p: usize| -> f64 {
                        let qs = &q[(row * heads + h) * head_dim..][..head_dim];
                        let dot: f64 =
                            qs.iter().enumerate().map(|(e, q)| f64::from(*q) * at(&k, span.start + p, e)).sum();
                        dot / (head_dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (first..=position).map(score).collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    for e in 0..head_dim {
                        let sum: f64 = scores
                            .iter()
                            .enumerate()
                            .map(|(i, s)| (s - max).exp() / total * at(&v, span.start + first + i, e))
                            .sum();
                        want[(row * heads + h) * head_dim + e] = sum;
                    }
                }
            }
        }
        let ones = vec![1.0; want.len()];
        // NaN where nothing was written: what is stale must not be read.
        let empty = vec![f32::NAN; blocks * KV_BLOCK * width];
        let (mut keys, mut values) = (empty.clone(), empty.clone());
        kv_write::kv_write_alone(&rows, &k, &v, kv_heads, &mut keys, &mut values);
        for isa in isas() {
            let mut out = vec![0.0; q.len()];
            let inputs = attention::Inputs {
                rows: &rows,
                tables: &tables,
                q: &q,
                keys: &keys,
                values: &values,
                heads,
                kv_heads,
                head_dim,
                window,
            };
            attention::attention_alone(isa, inputs, &mut out);
            compare(&format!("attention {} E{head_dim}", isa.name()), &out, &want, &ones, Dtype::F32);
        }
        for device in gpus() {
            let call = Paged {
                rows: rows.clone(),
                tables: tables.clone(),
                q: q.clone(),
                keys: keys.clone(),
                values: values.clone(),
                heads,
                kv_heads,
                head_dim,
                window,
            };
            let (what, out) =
                (format!("attention gpu E{head_dim}"), call.on(device, &call.tiles(), 1, Halves::default()));
            compare(&what, &out, &want, &ones, Dtype::F32);
        }
    }
}

/// An attention call over a cache.
#[derive(Clone)]
pub(super) struct Paged {
    pub rows: Vec<RowMeta>,
    pub tables: Vec<u32>,
    pub q: Vec<f32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
}

/// The positions of each sequence's rows.
pub(super) type Sequences<'a> = &'a [&'a [usize]];

/// What is stored as f16.
#[derive(Clone, Copy, Debug, Default)]
struct Halves {
    kv: bool,
    out: bool,
}

impl Paged {
    /// Random contents. Each sequence has the keys up to its last position, and rows at the positions given.
    pub(super) fn new([group, kv_heads, head_dim]: [usize; 3], window: Option<usize>, sequences: Sequences) -> Paged {
        let mut numbers = Numbers((group * 1000 + head_dim) as u64);
        let lengths: Vec<usize> = sequences.iter().map(|s| s.last().unwrap() + 1).collect();
        let blocks = lengths.iter().map(|n| n.div_ceil(KV_BLOCK)).sum::<usize>() + 3;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        let (mut rows, mut tables) = (Vec::new(), Vec::new());
        // NaN where nothing was written: what is stale must not be read.
        let size = KV_BLOCK * kv_heads * head_dim;
        let (mut keys, mut values) = (vec![f32::NAN; blocks * size], vec![f32::NAN; blocks * size]);
        for (sequence, length) in sequences.iter().zip(lengths) {
            let table = tables.len();
            tables.extend((0..length.div_ceil(KV_BLOCK)).map(|_| free.swap_remove(numbers.below(free.len()))));
            rows.extend(sequence.iter().map(|&p| {
                let slot = tables[table + p / KV_BLOCK] * KV_BLOCK as u32 + (p % KV_BLOCK) as u32;
                RowMeta { token: 0, position: p as u32, slot, table: table as u32 }
            }));
            for position in 0..length {
                for at in 0..kv_heads * head_dim {
                    let [key, value] = places(tables[table + position / KV_BLOCK], position, at, [kv_heads, head_dim]);
                    (keys[key], values[value]) = (4.0 * numbers.next(), numbers.next());
                }
            }
        }
        let q = numbers.floats(rows.len() * group * kv_heads * head_dim);
        Paged { rows, tables, q, keys, values, heads: group * kv_heads, kv_heads, head_dim, window }
    }

    /// The same for some of the rows.
    pub(super) fn only(&self, rows: std::ops::Range<usize>) -> Paged {
        let width = self.heads * self.head_dim;
        let q = self.q[rows.start * width..rows.end * width].to_vec();
        Paged { rows: self.rows[rows].to_vec(), q, ..self.clone() }
    }

    fn tiles(&self) -> Vec<[u32; 2]> {
        attention::tiles(&self.rows, self.heads / self.kv_heads, self.head_dim)
    }

    /// Where element `e` of the key and of the value of a row's sequence at `position` and of a query's kv head are.
    pub(super) fn places(&self, row: usize, position: usize, head: usize, e: usize) -> [usize; 2] {
        let block = self.tables[self.rows[row].table as usize + position / KV_BLOCK];
        let kv_head = head / (self.heads / self.kv_heads);
        places(block, position, kv_head * self.head_dim + e, [self.kv_heads, self.head_dim])
    }

    /// The softmax formula.
    pub(super) fn formula(&self) -> Vec<f64> {
        let (width, mut want) = (self.head_dim, Vec::new());
        for (row, meta) in self.rows.iter().enumerate() {
            let last = meta.position as usize;
            for head in 0..self.heads {
                let q = &self.q[(row * self.heads + head) * width..][..width];
                let seen = attention::first_key(last, self.window)..=last;
                let score = |p: usize| {
                    let key = |e| f64::from(self.keys[self.places(row, p, head, e)[0]]);
                    q.iter().enumerate().map(|(e, q)| f64::from(*q) * key(e)).sum::<f64>() / (width as f64).sqrt()
                };
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let mut sums = vec![0.0; width];
                for (p, score) in seen.zip(scores) {
                    let weight = (score - max).exp() / total;
                    for (e, sum) in sums.iter_mut().enumerate() {
                        *sum += weight * f64::from(self.values[self.places(row, p, head, e)[1]]);
                    }
                }
                want.extend(sums);
            }
        }
        want
    }

    /// What the shader gives with so many segments side by side, joined where there are several.
    fn on(&self, device: &Device, tiles: &[[u32; 2]], segments: usize, halves: Halves) -> Vec<f32> {
        let stored = |v: &[f32], half| if half { Dtype::F16.from_f32(v) } else { bytes(v) };
        let read = |v: &[u8]| if halves.out { Dtype::F16.to_f32(v) } else { floats(v) };
        let (rows, heads, head_dim) = (self.rows.len() as u32, self.heads as u32, self.head_dim as u32);
        let flags = Flags {
            vec4: head_dim % 4 == 0,
            half_kv: halves.kv,
            half_out: halves.out,
            f16: halves.kv || halves.out,
            head_dim,
            ..Flags::default()
        };
        let params = attention::Params {
            rows,
            heads,
            kv_heads: self.kv_heads as u32,
            head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window.unwrap_or(0) as u32,
            segments: segments as u32,
            first_meta: 2,
            first_tile: 1,
        };
        // Behind two rows and a tile of another step.
        let before = [RowMeta { token: 9, position: 9, slot: 9, table: 0 }; 2];
        let tiles_before = [[0u32, 2]];
        let partials = attention::partials_len(self.rows.len(), self.heads, self.head_dim, segments).unwrap();
        let empty = stored(&vec![f32::NAN; self.q.len()], halves.out);
        let storage = [
            [cast_slice(&before), cast_slice::<_, u8>(&self.rows)].concat(),
            [cast_slice(&tiles_before), cast_slice::<_, u8>(tiles)].concat(),
            cast_slice(&self.tables).to_vec(),
            bytes(&self.q),
            stored(&self.keys, halves.kv),
            stored(&self.values, halves.kv),
            empty.clone(),
            bytes(&vec![f32::NAN; if segments > 1 { partials } else { 4 }]),
        ];
        let groups = attention::workgroups(&params, tiles.len());
        // What is checked takes its time: small calls only.
        let small = self.rows.len() * self.heads < 300;
        let run = if small { Device::run_checked } else { Device::run };
        let mut storage = run(device, &attention::KERNEL, flags, &params, &storage, groups);
        let (partials, out) = (storage.remove(7), storage.remove(6));
        if segments == 1 {
            return read(&out);
        }
        let params = attention_join::Params { rows, heads, head_dim, segments: segments as u32 };
        let groups = attention_join::workgroups(&params);
        let run = if small { Device::run_checked } else { Device::run };
        let out = run(device, &attention_join::KERNEL, flags, &params, &[partials.clone(), empty], groups).remove(1);
        let (out, mut twin) = (read(&out), vec![0.0; self.q.len()]);
        if !halves.out {
            attention_join::attention_join(&floats(&partials), segments, self.head_dim, &mut twin);
            let twin: Vec<f64> = twin.into_iter().map(f64::from).collect();
            compare("attention_join", &out, &twin, &vec![1.0; twin.len()], Dtype::F32);
        }
        out
    }
}

/// Shapes around tiles, blocks, chunks and segments: against the formula; and the same bits however the rows are cut
/// into tiles, the segments walked or dispatched side by side, and whoever shares the step.
#[test]
fn attention_on_the_gpu_is_the_formula_and_batch_invariant() {
    let short: Sequences = &[&[15, 16, 17], &[0], &[62, 63, 64, 65, 66, 67]];
    let long: Sequences = &[&[15, 16, 17], &[1023, 1024, 1025], &[63, 64, 65], &[0, 1], &[2500]];
    let lone: Sequences = &[&[1022, 1023, 1024, 1025], &[17]];
    let prefill: Vec<usize> = (0..140).collect();
    let cases: [(usize, usize, usize, Option<usize>, Sequences); 14] = [
        (1, 1, 1, None, short),
        (3, 2, 8, None, long),
        (4, 1, 20, Some(17), long),
        (7, 1, 20, Some(1000), long),
        (20, 1, 8, Some(64), lone),
        (1, 2, 64, Some(1), short),
        (3, 1, 64, None, &[&prefill, &[5, 6]]),
        (7, 2, 64, Some(64), short),
        (20, 1, 80, None, short),
        (4, 2, 128, None, lone),
        (3, 1, 33, None, short),
        (3, 1, 130, None, short),
        (20, 1, 256, Some(17), short),
        (3, 1, 512, None, short),
    ];
    for device in gpus() {
        for (group, kv_heads, head_dim, window, sequences) in cases {
            let what = format!("attention gpu {group} heads E{head_dim} window {window:?}");
            let call = Paged::new([group, kv_heads, head_dim], window, sequences);
            let (tiles, want) = (call.tiles(), call.formula());
            let out = call.on(device, &tiles, 1, Halves::default());
            compare(&what, &out, &want, &vec![1.0; want.len()], Dtype::F32);

            let alone: Vec<[u32; 2]> = (0..call.rows.len() as u32).map(|row| [row, 1]).collect();
            assert_eq!(bits(&call.on(device, &alone, 1, Halves::default())), bits(&out), "{what}: a row a tile");
            let segments = attention::segments(&call.rows, &tiles, window);
            let side_by_side = call.on(device, &tiles, segments.max(2), Halves::default());
            assert_eq!(bits(&side_by_side), bits(&out), "{what}: {segments} segments side by side");
            let from = call.rows.len() / 2;
            let some = call.only(from..call.rows.len());
            let out_some = some.on(device, &some.tiles(), 1, Halves::default());
            assert_eq!(bits(&out_some), bits(&out[from * call.heads * head_dim..]), "{what}: half of the rows");
        }
    }
}

/// Keys and values, or the output, in 16 bits: the formula over the rounded numbers, and the rounded formula.
#[test]
fn attention_in_half_precision() {
    for device in gpus().iter().filter(|d| d.has_f16()) {
        for (group, head_dim, window) in [(4, 64, None), (3, 33, Some(17))] {
            let mut call = Paged::new([group, 2, head_dim], window, &[&[15, 16, 17], &[1024], &[63, 64, 65]]);
            for stored in [&mut call.keys, &mut call.values] {
                stored.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32());
            }
            let exact = call.on(device, &call.tiles(), 1, Halves::default());
            let halves = Halves { kv: true, out: false };
            let what = format!("attention f16 E{head_dim}");
            let want = call.formula();
            let out = call.on(device, &call.tiles(), 1, halves);
            compare(&what, &out, &want, &vec![1.0; want.len()], Dtype::F32);
            assert_eq!(bits(&call.on(device, &call.tiles(), 2, halves)), bits(&out), "{what}: side by side");
            for segments in [1, 2] {
                let halves = Halves { kv: segments == 2, out: true };
                for (got, exact) in call.on(device, &call.tiles(), segments, halves).iter().zip(&exact) {
                    let most = exact.abs() / 1024.0 + 1e-7;
                    assert!((got - exact).abs() <= most, "{what}: {got} is {exact} rounded");
                }
            }
        }
    }
}

/// What is not finite stays with the rows that see it, also among those of a tile.
#[test]
fn attention_keeps_nan_to_the_rows_that_see_it() {
    for device in gpus() {
        for window in [None, Some(3)] {
            let call = Paged::new([3, 1, 20], window, &[&[9, 10, 11, 12, 13, 14], &[4]]);
            let (tiles, width) = (call.tiles(), call.heads * call.head_dim);
            let out = call.on(device, &tiles, 1, Halves::default());
            assert!(out.iter().all(|v| v.is_finite()));
            // Position 11 is seen from row 2 on, within the window by rows 2 to 4.
            let seen = |row: usize| (2..6).contains(&row) && (window.is_none() || row < 5);
            for (what, broken, number) in [(0, "key", f32::NAN), (1, "value", f32::NAN), (1, "value", f32::INFINITY)] {
                let mut call = call.clone();
                let places: Vec<[usize; 2]> = (0..call.head_dim).map(|e| call.places(0, 11, 0, e)).collect();
                for place in places {
                    [&mut call.keys, &mut call.values][what][place[what]] = number;
                }
                for segments in [1, 2] {
                    let got = call.on(device, &tiles, segments, Halves::default());
                    for (row, (got, clean)) in got.chunks_exact(width).zip(out.chunks_exact(width)).enumerate() {
                        let right =
                            if seen(row) { got.iter().all(|v| !v.is_finite()) } else { bits(got) == bits(clean) };
                        assert!(right, "{broken} {number}, window {window:?}, {segments} segments, row {row}: {got:?}");
                    }
                }
            }
            let mut call = call.clone();
            call.q[width + 20] = f32::NAN;
            let got = call.on(device, &tiles, 1, Halves::default());
            for (i, (got, clean)) in got.chunks_exact(20).zip(out.chunks_exact(20)).enumerate() {
                let right = if i == 4 { got.iter().all(|v| v.is_nan()) } else { bits(got) == bits(clean) };
                assert!(right, "a query that is NaN: query {i}: {got:?}");
            }
        }
    }
}
