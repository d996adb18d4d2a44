// attention_tiles: attention on matrix units, whose inputs are f16 and whose sums are f32.
//
//   out[t, h] = Σ_j w[j] · value[j] / Σ_j w[j],   w[j] = f16(2^14 · 2^(q[t, h] · key[j] − max))
//
// over the keys of attention; q comes multiplied by log2(e) / √E. Beside the two products everything is f32. 2^14 keeps
// all bits of weights down to 2^-28 of the largest; it cancels.
//
// A workgroup owns the queries of a tile. Narrow: the heads of a kv head, TILE at most, of one row. Wide: a head of up to
// QUERIES consecutive rows of one sequence. Dispatch: x a tile; y a kv head (times what H/G exceeds TILE), wide: a head;
// z a segment of keys. Chunks, segments and how they are joined are those of attention.
//
// Threads: subgroups share the tiles of the scores and of the sums. In between LANES threads have a query: lane i the keys
// and elements ≡ i (mod LANES). The additions of a query are the same in either shape.
//
// A query multiplies all values of the chunks of its tile, those it does not see by zero. So everything bound as values
// must be finite, also where nothing was stored yet: linear_qkv stores nothing else. Keys may be anything. Tiles that do
// not cross a multiple of QUERIES positions end in a chunk that all their queries see: a sum that has begun is never
// passed through a chunk for nothing.
//
// Limits: E a multiple of TILE, ≤ 512; HEAD_ABOVE_… says how much room it takes, 32 KiB of workgroup memory up to 256.
// Rows of q are read up to the end of a tile. EMULATED computes what the matrix units would, with the same indices.

#include enable

struct Params {
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    segments: u32,
    first_meta: u32,
    first_tile: u32,
}

#if TILE8
const TILE = 8u;
#else
const TILE = 16u;
#endif
#if HEAD_ABOVE_128
const QUERIES = TILE;
#if HEAD_ABOVE_256
const MOST_E = 512u;
#else
const MOST_E = 256u;
#endif
#else
#if WIDE
const QUERIES = 32u;
#else
const QUERIES = TILE;
#endif
#if HEAD_ABOVE_64
const MOST_E = 128u;
#else
const MOST_E = 64u;
#endif
#endif
const P = 16u;
const KEYS = 64u;
const SEGMENT = 1024u;
const BLOCKS = SEGMENT / P;
const LANES = 8u;
const THREADS = QUERIES * LANES;
const KEY_TILES = KEYS / TILE;
// With a gap: neighbouring queries in other banks.
const KEY_STRIDE = KEYS + 8u;
const SUM_STRIDE = MOST_E + 8u;
const LOWEST = -3.4028234e38;
const LARGEST_WEIGHT = 16384.0;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>; // (first_meta + T) token, position, slot, table
@group(0) @binding(2) var<storage, read> tiles: array<vec2<u32>>; // (first_tile + tiles) first row, count of rows
@group(0) @binding(3) var<storage, read> tables: array<u32>; // (blocks of all sequences)
@group(0) @binding(4) var<storage, read> q: array<f16>; // (T, H, E) and up to the end of a tile of rows
@group(0) @binding(5) var<storage, read> keys: array<f16>; // (blocks, G, E, P)
@group(0) @binding(6) var<storage, read> values: array<f16>; // (blocks, G, P, E)
@group(0) @binding(7) var<storage, read_write> out: array<f16>; // (T, H, E) if S = 1
@group(0) @binding(8) var<storage, read_write> partials: array<f32>; // (S, T, H, 2 + E) m, l, o if S > 1

var<workgroup> blocks: array<u32, BLOCKS>; // the first element of each block of the segment
var<workgroup> scores: array<f32, QUERIES * KEY_STRIDE>; // (QUERIES, KEYS)
var<workgroup> weights: array<f16, QUERIES * KEY_STRIDE>; // (QUERIES, KEYS)
var<workgroup> sums: array<f32, QUERIES * SUM_STRIDE>; // (QUERIES, E), of the segment so far
var<workgroup> tops: array<f32, THREADS>; // of each thread: what all lanes of a query read

#if EMULATED
// The elements lane, lane + 32, … of a tile.
struct Sums {
    at: array<f32, 8>,
}

// Tiles of queries and of keys.
fn add_scores(q_at: u32, q_stride: u32, key_at: u32, c: Sums, lane: u32) -> Sums {
    var s = c;
    for (var i = 0u; i < TILE * TILE / 32u; i++) {
        let element = lane + 32u * i;
        for (var e = 0u; e < TILE; e++) {
            let a = f32(q[q_at + element / TILE * q_stride + e]);
            let b = f32(keys[key_at + e * P + element % TILE]);
            s.at[i] = fma(a, b, s.at[i]);
        }
    }
    return s;
}

// Tiles of weights and of values.
fn add_values(weight_at: u32, value_at: u32, c: Sums, lane: u32) -> Sums {
    var s = c;
    for (var i = 0u; i < TILE * TILE / 32u; i++) {
        let element = lane + 32u * i;
        for (var j = 0u; j < TILE; j++) {
            let a = f32(weights[weight_at + element / TILE * KEY_STRIDE + j]);
            let b = f32(values[value_at + j * p.head_dim + element % TILE]);
            s.at[i] = fma(a, b, s.at[i]);
        }
    }
    return s;
}

fn load_sums(at: u32, lane: u32) -> Sums {
    var s: Sums;
    for (var i = 0u; i < TILE * TILE / 32u; i++) {
        let element = lane + 32u * i;
        s.at[i] = sums[at + element / TILE * SUM_STRIDE + element % TILE];
    }
    return s;
}

fn store_sums(c: Sums, at: u32, lane: u32) {
    for (var i = 0u; i < TILE * TILE / 32u; i++) {
        let element = lane + 32u * i;
        sums[at + element / TILE * SUM_STRIDE + element % TILE] = c.at[i];
    }
}

fn store_scores(c: Sums, at: u32, lane: u32) {
    for (var i = 0u; i < TILE * TILE / 32u; i++) {
        let element = lane + 32u * i;
        scores[at + element / TILE * KEY_STRIDE + element % TILE] = c.at[i];
    }
}
#else
#if TILE8
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
alias Sums = coop_mat8x8<f32, C>;
#else
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;
#endif
#endif

fn first_key(position: u32) -> u32 {
    return select(0u, position + 1u - min(p.window, position + 1u), p.window > 0u);
}

// 2^(before − now), 1 where they are equal.
fn ratio(before: f32, now: f32) -> f32 {
    return select(exp2(before - now), 1.0, before == now);
}

// Every eighth of a query's scores.
fn four_scores(at: u32) -> vec4<f32> {
    return vec4<f32>(scores[at], scores[at + LANES], scores[at + 2u * LANES], scores[at + 3u * LANES]);
}

fn store_weights(at: u32, four: vec4<f16>) {
    weights[at] = four.x;
    weights[at + LANES] = four.y;
    weights[at + 2u * LANES] = four.z;
    weights[at + 3u * LANES] = four.w;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
#if BY_SUBGROUP
    @builtin(subgroup_id) unit: u32,
    @builtin(num_subgroups) units: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) in_unit: u32,
#else
    @builtin(local_invocation_index) thread: u32,
#endif
) {
#if BY_SUBGROUP
    let thread = unit * subgroup_size + in_unit;
#else
    let unit = thread / 32u;
    let units = THREADS / 32u;
    let in_unit = thread % 32u;
#endif
    let e_count = p.head_dim;
    let heads_per_kv = p.heads / p.kv_heads;
    let tile = tiles[p.first_tile + workgroup.x];

    // 1. The queries of the tile: where they begin in q, and this thread's one.
    let query = thread / LANES;
    let lane = thread % LANES;
#if WIDE
    let head = workgroup.y;
    let kv_head = head / heads_per_kv;
    let count = tile.y;
    let q_stride = p.heads * e_count;
    let row = min(query, count - 1u);
    let place = (tile.x + row) * p.heads + head;
    let position = rows[p.first_meta + tile.x + row].y;
#else
    let head_tiles = (heads_per_kv + QUERIES - 1u) / QUERIES;
    let kv_head = workgroup.y / head_tiles;
    let first_head = workgroup.y % head_tiles * QUERIES;
    let head = kv_head * heads_per_kv + first_head;
    let count = min(QUERIES, heads_per_kv - first_head);
    let q_stride = e_count;
    let place = tile.x * p.heads + head + min(query, count - 1u);
    let position = rows[p.first_meta + tile.x].y;
#endif
    let q_start = (tile.x * p.heads + head) * e_count;
    let live = query < count;
    // Who is past the end sees nothing.
    let seen_first = vec4<u32>(select(1u, first_key(position), live));
    let seen_last = vec4<u32>(select(0u, position, live));

    // 2. The segments that they see.
    let first = first_key(rows[p.first_meta + tile.x].y);
    let last = rows[p.first_meta + tile.x + tile.y - 1u].y;
    let table = rows[p.first_meta + tile.x].w;
    let alone = p.segments <= 1u;
    let partial_at = (workgroup.z * p.rows * p.heads + place) * (e_count + 2u);
    var segment = first / SEGMENT;
    var end = last / SEGMENT + 1u;
    if !alone {
        segment += workgroup.z;
        end = min(end, segment + 1u);
        // No return: matrices want control flow that is uniform as far as a validator sees.
        if segment >= end && live && lane == 0u {
            partials[partial_at] = LOWEST;
            partials[partial_at + 1u] = 0.0;
        }
    }

    let row_tiles = (count + TILE - 1u) / TILE;
    let column_tiles = e_count / TILE;
    let score_at = query * KEY_STRIDE + lane;
    let sum_at = query * SUM_STRIDE + lane;
    let zero = vec4<f32>(0.0);
    let lowest = vec4<f32>(LOWEST);
    // All segments so far, of the elements of this lane.
    var joined: array<f32, MOST_E / LANES>;
    var joined_max = LOWEST;
    var joined_total = 0.0;
    for (; segment < end; segment++) {
        // 3. Where the blocks of the segment lie; one that nobody sees is represented by one that is there.
        for (var i = thread; i < BLOCKS; i += THREADS) {
            let block = clamp(segment * BLOCKS + i, first / P, last / P);
            blocks[i] = (tables[table + block] * p.kv_heads + kv_head) * P * e_count;
        }
        for (var e = 0u; e < e_count; e += LANES) {
            sums[sum_at + e] = 0.0;
        }
        workgroupBarrier();

        var running_max = LOWEST;
        var lane_total = 0.0; // of the weights that this thread computes
        let segment_last = min(last, segment * SEGMENT + SEGMENT - 1u);
        for (var start = max(first, segment * SEGMENT) / KEYS * KEYS; start <= segment_last; start += KEYS) {
            let chunk_block = start % SEGMENT / P;

            // 4. Scores, in rising e.
            for (var part = unit; part < row_tiles * KEY_TILES; part += units) {
                let row = part / KEY_TILES * TILE;
                let key = part % KEY_TILES * TILE;
                let q_at = q_start + row * q_stride;
                let key_at = blocks[chunk_block + key / P] + key % P;
                var c: Sums;
                for (var e = 0u; e < e_count; e += TILE) {
#if EMULATED
                    c = add_scores(q_at + e, q_stride, key_at + e * P, c, in_unit);
#else
                    let a = coopLoadT<Left>(&q[q_at + e], q_stride);
                    let b = coopLoadT<Right>(&keys[key_at + e * P], P);
                    c = coopMultiplyAdd(a, b, c);
#endif
                }
#if EMULATED
                store_scores(c, row * KEY_STRIDE + key, in_unit);
#else
                coopStoreT(c, &scores[row * KEY_STRIDE + key], KEY_STRIDE);
#endif
            }
            workgroupBarrier();

            // 5. Their maximum: every lane of a query finds the same one.
            let key0 = vec4<u32>(start + lane) + vec4<u32>(0u, LANES, 2u * LANES, 3u * LANES);
            let key1 = key0 + 4u * LANES;
            let seen0 = (key0 >= seen_first) & (key0 <= seen_last);
            let seen1 = (key1 >= seen_first) & (key1 <= seen_last);
            let scores0 = four_scores(score_at);
            let scores1 = four_scores(score_at + 4u * LANES);
            let top = max(select(lowest, scores0, seen0), select(lowest, scores1, seen1));
            tops[thread] = max(max(top.x, top.y), max(top.z, top.w));
            workgroupBarrier();
            var new_max = running_max;
            for (var i = 0u; i < LANES; i++) {
                new_max = max(new_max, tops[query * LANES + i]);
            }
            let shrink = ratio(running_max, new_max);
            running_max = new_max;

            // 6. Weights. The total counts them as they are rounded: what is lost cancels.
            let weights0 = vec4<f16>(LARGEST_WEIGHT * select(zero, exp2(scores0 - new_max), seen0));
            let weights1 = vec4<f16>(LARGEST_WEIGHT * select(zero, exp2(scores1 - new_max), seen1));
            store_weights(score_at, weights0);
            store_weights(score_at + 4u * LANES, weights1);
            let four = vec4<f32>(weights0) + vec4<f32>(weights1);
            lane_total = fma(lane_total, shrink, (four.x + four.y) + (four.z + four.w));
            if shrink != 1.0 {
                for (var e = 0u; e < e_count; e += LANES) {
                    sums[sum_at + e] *= shrink;
                }
            }
            workgroupBarrier();

            // 7. Values, in rising key.
            for (var part = unit; part < row_tiles * column_tiles; part += units) {
                let row = part / column_tiles * TILE;
                let column = part % column_tiles * TILE;
                let at = row * SUM_STRIDE + column;
#if EMULATED
                var c = load_sums(at, in_unit);
#else
                var c = coopLoadT<Sums>(&sums[at], SUM_STRIDE);
#endif
                for (var key = 0u; key < KEYS; key += TILE) {
                    let weight_at = row * KEY_STRIDE + key;
                    let value_at = blocks[chunk_block + key / P] + key % P * e_count + column;
#if EMULATED
                    c = add_values(weight_at, value_at, c, in_unit);
#else
                    let a = coopLoadT<Left>(&weights[weight_at], KEY_STRIDE);
                    let b = coopLoadT<Right>(&values[value_at], e_count);
                    c = coopMultiplyAdd(a, b, c);
#endif
                }
#if EMULATED
                store_sums(c, at, in_unit);
#else
                coopStoreT(c, &sums[at], SUM_STRIDE);
#endif
            }
        }

        // 8. The segment's total, over the lanes in rising order.
        tops[thread] = lane_total;
        workgroupBarrier();
        var total = 0.0;
        for (var i = 0u; i < LANES; i++) {
            total += tops[query * LANES + i];
        }

        // 9. Join it, or leave that to attention_join.
        if alone {
            if !(running_max == LOWEST && total == 0.0) {
                let both = max(joined_max, running_max);
                let a = ratio(joined_max, both);
                let b = ratio(running_max, both);
                joined_total = fma(joined_total, a, total * b);
                joined_max = both;
                for (var e = 0u; e < e_count; e += LANES) {
                    joined[e / LANES] = fma(joined[e / LANES], a, sums[sum_at + e] * b);
                }
            }
        } else if live {
            if lane == 0u {
                partials[partial_at] = running_max;
                partials[partial_at + 1u] = total;
            }
            for (var e = 0u; e < e_count; e += LANES) {
                partials[partial_at + 2u + lane + e] = sums[sum_at + e];
            }
        }
    }

    // 10. Out they go.
    if alone && live {
        let inverse = 1.0 / joined_total;
        for (var e = 0u; e < e_count; e += LANES) {
            out[place * e_count + lane + e] = f16(joined[e / LANES] * inverse);
        }
    }
}
