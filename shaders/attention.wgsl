// attention: causal attention over the paged cache, ragged rows, with a sliding window where there is one.
//
//   out[t, h] = Σ_j w[j] · value[j] / Σ_j w[j],   w[j] = 2^(q[t, h] · key[j] · log2(e) / √E − max)
//
// over the keys j ≤ position[t] of the row's sequence and of kv head h·G/H (j > position − window).
//
// A workgroup owns a tile: the heads of a kv head times some consecutive rows of one sequence, QUERIES in all, which
// share every load. Dispatch: x a tile of rows, y a kv head (times what H/G exceeds QUERIES), z a segment of keys.
//
// Keys come in chunks of 64 and segments of SEGMENT, at fixed positions. A segment is computed by itself, over its
// chunks in rising order, with a running maximum m, the total l of the weights and the sums o; then the segments are
// joined in rising order. With S = 1 the workgroup walks them all and writes `out`; with more, it takes the z-th that
// its tile sees and writes (m, l, o), which attention_join joins by the same expressions: the same bits.
//
// Threads: LANES for every 4 queries. Lane i of the first 16 takes the scores of keys 4i to 4i + 3; each lane owns the
// sums of elements 4i to 4i + 3, and of those LANES vectors further. A key that a query does not see adds nothing to
// it, not even a zero: its bits depend on its position, window and keys, not on who shares the tile.
//
// Limits: E ≤ 512 (the flags HEAD_ABOVE_128 and HEAD_ABOVE_256 say which QUERIES it takes); 22 KiB of workgroup memory.

#if F16
enable f16;
#endif

struct Params {
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scale: f32,
    window: u32,
    segments: u32,
    first_meta: u32,
    first_tile: u32,
}

// Rank-1 sums: four scores of each of four keys, or four elements of each of four queries.
struct Square {
    x: vec4<f32>,
    y: vec4<f32>,
    z: vec4<f32>,
    w: vec4<f32>,
}

const P = 16u;
const KEYS = 64u;
const SEGMENT = 1024u;
const BLOCKS = SEGMENT / P;
const THREADS = 64u;
#if HEAD_ABOVE_256
const QUERIES = 4u;
#else
#if HEAD_ABOVE_128
const QUERIES = 8u;
#else
const QUERIES = 16u;
#endif
#endif
const GROUPS = QUERIES / 4u;
const LANES = THREADS / GROUPS;
const SCORERS = 16u;
const LOWEST = -3.4028234e38;
const LOG2_E = 1.442695;

#if HALF_KV
alias Stored = f16;
#else
alias Stored = f32;
#endif
#if HALF_OUT
alias Out = f16;
#else
alias Out = f32;
#endif

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>; // (first_meta + T) token, position, slot, table
@group(0) @binding(2) var<storage, read> tiles: array<vec2<u32>>; // (first_tile + tiles) first row, count of rows
@group(0) @binding(3) var<storage, read> tables: array<u32>; // (blocks of all sequences)
@group(0) @binding(4) var<storage, read> q: array<f32>; // (T, H, E)
@group(0) @binding(5) var<storage, read> keys: array<vec4<Stored>>; // (blocks, G, E, P) four keys a vector
#if VEC4
@group(0) @binding(6) var<storage, read> values: array<vec4<Stored>>; // (blocks, G, P, E) four elements a vector
#else
@group(0) @binding(6) var<storage, read> values: array<Stored>; // (blocks, G, P, E)
#endif
@group(0) @binding(7) var<storage, read_write> out: array<Out>; // (T, H, E) if S = 1
@group(0) @binding(8) var<storage, read_write> partials: array<f32>; // (S, T, H, 2 + E) m, l, o if S > 1

var<workgroup> places: array<u32, QUERIES>; // t·H + h of each query; the last query again where there are fewer
var<workgroup> spans: array<vec2<u32>, QUERIES>; // the first and the last key it sees
var<workgroup> queries: array<vec4<f32>, 2048u / 4u>; // (E, QUERIES), scaled
var<workgroup> blocks: array<u32, BLOCKS>; // the first element of each block of the segment
var<workgroup> tops: array<vec4<f32>, GROUPS * 17u>; // of each scorer, with a gap: what every lane reads
var<workgroup> weights: array<vec4<f32>, GROUPS * 65u>; // (QUERIES / 4, key % 4, key / 4), with a gap
var<workgroup> joined: array<vec4<f32>, 8u * THREADS>; // (query % 4 and which vector, owner): sums, all segments so far
var<workgroup> stats: array<vec2<f32>, QUERIES>; // m and l of each query at last

fn first_key(position: u32) -> u32 {
    return select(0u, position + 1u - min(p.window, position + 1u), p.window > 0u);
}

// square[i] + a[i] · v
fn add_outer(square: Square, a: vec4<f32>, v: vec4<f32>) -> Square {
    return Square(
        fma(vec4<f32>(a.x), v, square.x),
        fma(vec4<f32>(a.y), v, square.y),
        fma(vec4<f32>(a.z), v, square.z),
        fma(vec4<f32>(a.w), v, square.w),
    );
}

// The same for those queries i that see the key.
fn add_seen(square: Square, a: vec4<f32>, v: vec4<f32>, seen: vec4<bool>) -> Square {
    let sum = add_outer(square, a, v);
    return Square(
        select(square.x, sum.x, seen.x),
        select(square.y, sum.y, seen.y),
        select(square.z, sum.z, seen.z),
        select(square.w, sum.w, seen.w),
    );
}

fn times(square: Square, a: vec4<f32>) -> Square {
    return Square(square.x * a.x, square.y * a.y, square.z * a.z, square.w * a.w);
}

// 2^(before − now), 1 where they are equal.
fn ratio(before: vec4<f32>, now: vec4<f32>) -> vec4<f32> {
    return select(exp2(before - now), vec4<f32>(1.0), before == now);
}

// Elements e to e + 3 of the value that begins at element `at`; what lies beyond E is of no use.
fn value(at: u32, e: u32) -> vec4<f32> {
#if VEC4
    return vec4<f32>(values[(at + e) / 4u]);
#else
    let last = at + p.head_dim - 1u;
    let i = at + e;
    return vec4<f32>(
        f32(values[i]),
        f32(values[min(i + 1u, last)]),
        f32(values[min(i + 2u, last)]),
        f32(values[min(i + 3u, last)]),
    );
#endif
}

fn partial_at(query: u32, z: u32) -> u32 {
    return (z * p.rows * p.heads + places[query]) * (p.head_dim + 2u);
}

// One segment further for a query's sums, unless it saw nothing there.
fn join(slot: u32, now: vec4<f32>, a: f32, b: f32, unseen: bool) {
    let before = joined[slot];
    joined[slot] = select(fma(before, vec4<f32>(a), now * b), before, unseen);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let e_count = p.head_dim;
    let heads_per_kv = p.heads / p.kv_heads;
    let head_tiles = (heads_per_kv + QUERIES - 1u) / QUERIES;
    let kv_head = workgroup.y / head_tiles;
    let first_head = workgroup.y % head_tiles * QUERIES;
    let heads = min(QUERIES, heads_per_kv - first_head);
    let tile = tiles[p.first_tile + workgroup.x];
    let count = min(tile.y * heads, QUERIES);

    // 1. The queries of the tile, and the segments that they see.
    if thread < QUERIES {
        let i = min(thread, count - 1u);
        let t = tile.x + i / heads;
        let position = rows[p.first_meta + t].y;
        places[thread] = t * p.heads + kv_head * heads_per_kv + first_head + i % heads;
        spans[thread] = vec2<u32>(first_key(position), position);
    }
    workgroupBarrier();
    let table = rows[p.first_meta + tile.x].w;
    let first = first_key(rows[p.first_meta + tile.x].y);
    let last = rows[p.first_meta + tile.x + tile.y - 1u].y;
    let alone = p.segments <= 1u;
    var segment = first / SEGMENT;
    var end = last / SEGMENT + 1u;
    if !alone {
        segment += workgroup.z;
        end = min(end, segment + 1u);
        if segment >= end {
            if thread < count {
                let at = partial_at(thread, workgroup.z);
                partials[at] = LOWEST;
                partials[at + 1u] = 0.0;
            }
            return;
        }
    }
    let scale = p.scale * LOG2_E;
    for (var i = thread; i < e_count * GROUPS; i += THREADS) {
        let four = i % GROUPS * 4u;
        let e = i / GROUPS;
        queries[i] = scale * vec4<f32>(
            q[places[four] * e_count + e],
            q[places[four + 1u] * e_count + e],
            q[places[four + 2u] * e_count + e],
            q[places[four + 3u] * e_count + e],
        );
    }

    // This thread's four queries, and its part of their work.
    let group = thread / LANES;
    let lane = thread % LANES;
    let query = group * 4u;
    let live = query < count;
    let scores_keys = live && lane < SCORERS;
    let e0 = lane * 4u;
    let e1 = e0 + LANES * 4u;
    let owns0 = live && e0 < e_count;
    let owns1 = live && e1 < e_count;
    let firsts = vec4<u32>(spans[query].x, spans[query + 1u].x, spans[query + 2u].x, spans[query + 3u].x);
    let lasts = vec4<u32>(spans[query].y, spans[query + 1u].y, spans[query + 2u].y, spans[query + 3u].y);
    // Rows of a tile rise.
    let group_first = firsts.x;
    let group_last = lasts.w;
    let zero = vec4<f32>(0.0);
    let nothing = Square(zero, zero, zero, zero);

    var joined_max = vec4<f32>(LOWEST);
    var joined_total = zero;
    for (var i = 0u; i < 8u; i++) {
        joined[i * THREADS + thread] = zero;
    }
    for (; segment < end; segment++) {
        // 2. Where the blocks of the segment lie; one that nobody sees is represented by one that is there.
        let block = clamp(segment * BLOCKS + thread, first / P, last / P);
        blocks[thread] = (tables[table + block] * p.kv_heads + kv_head) * P * e_count;
        workgroupBarrier();

        var running_max = vec4<f32>(LOWEST);
        var lane_total = zero; // over the keys that this lane scores
        var sums0 = nothing;
        var sums1 = nothing;
        let segment_last = min(last, segment * SEGMENT + SEGMENT - 1u);
        for (var start = max(first, segment * SEGMENT) / KEYS * KEYS; start <= segment_last; start += KEYS) {
            let chunk_block = start % SEGMENT / P;

            // 3. Scores of four keys, in rising e, and their maximum.
            var scores = nothing;
            let key = start + lane * 4u;
            let seen0 = (vec4<u32>(key) >= firsts) & (vec4<u32>(key) <= lasts);
            let seen1 = (vec4<u32>(key + 1u) >= firsts) & (vec4<u32>(key + 1u) <= lasts);
            let seen2 = (vec4<u32>(key + 2u) >= firsts) & (vec4<u32>(key + 2u) <= lasts);
            let seen3 = (vec4<u32>(key + 3u) >= firsts) & (vec4<u32>(key + 3u) <= lasts);
            if scores_keys {
                var at = blocks[chunk_block + lane / 4u] / 4u + lane % 4u;
                var i = group;
                var e = 0u;
                for (; e + 4u <= e_count; e += 4u) {
                    let key0 = vec4<f32>(keys[at]);
                    let key1 = vec4<f32>(keys[at + 4u]);
                    let key2 = vec4<f32>(keys[at + 8u]);
                    let key3 = vec4<f32>(keys[at + 12u]);
                    scores = add_outer(scores, key0, queries[i]);
                    scores = add_outer(scores, key1, queries[i + GROUPS]);
                    scores = add_outer(scores, key2, queries[i + 2u * GROUPS]);
                    scores = add_outer(scores, key3, queries[i + 3u * GROUPS]);
                    at += 16u;
                    i += 4u * GROUPS;
                }
                for (; e < e_count; e++) {
                    scores = add_outer(scores, vec4<f32>(keys[at]), queries[i]);
                    at += 4u;
                    i += GROUPS;
                }
                let lowest = vec4<f32>(LOWEST);
                tops[group * 17u + lane] = max(
                    max(select(lowest, scores.x, seen0), select(lowest, scores.y, seen1)),
                    max(select(lowest, scores.z, seen2), select(lowest, scores.w, seen3)),
                );
            }
            workgroupBarrier();

            // 4. Weights. Every lane of a query finds the same maximum.
            var new_max = running_max;
            if live {
                for (var i = 0u; i < SCORERS; i++) {
                    new_max = max(new_max, tops[group * 17u + i]);
                }
            }
            let shrink = ratio(running_max, new_max);
            running_max = new_max;
            if scores_keys {
                let w0 = select(zero, exp2(scores.x - new_max), seen0);
                let w1 = select(zero, exp2(scores.y - new_max), seen1);
                let w2 = select(zero, exp2(scores.z - new_max), seen2);
                let w3 = select(zero, exp2(scores.w - new_max), seen3);
                let at = group * 65u + lane;
                weights[at] = w0;
                weights[at + 16u] = w1;
                weights[at + 32u] = w2;
                weights[at + 48u] = w3;
                lane_total = fma(lane_total, shrink, (w0 + w1) + (w2 + w3));
            }
            workgroupBarrier();

            // 5. Values, in rising key.
            if owns0 {
                sums0 = times(sums0, shrink);
                sums1 = times(sums1, shrink);
                if all(firsts <= vec4<u32>(start)) && all(lasts >= vec4<u32>(start + KEYS - 1u)) {
                    var w = group * 65u;
                    for (var b = 0u; b < KEYS / P; b++) {
                        var at = blocks[chunk_block + b];
                        for (var j = 0u; j < P; j += 4u) {
                            let at1 = at + e_count;
                            let at2 = at1 + e_count;
                            let at3 = at2 + e_count;
                            let v0 = value(at, e0);
                            let v1 = value(at1, e0);
                            let v2 = value(at2, e0);
                            let v3 = value(at3, e0);
                            var u0: vec4<f32>;
                            var u1: vec4<f32>;
                            var u2: vec4<f32>;
                            var u3: vec4<f32>;
                            if owns1 {
                                u0 = value(at, e1);
                                u1 = value(at1, e1);
                                u2 = value(at2, e1);
                                u3 = value(at3, e1);
                            }
                            let w0 = weights[w];
                            let w1 = weights[w + 16u];
                            let w2 = weights[w + 32u];
                            let w3 = weights[w + 48u];
                            sums0 = add_outer(sums0, w0, v0);
                            sums0 = add_outer(sums0, w1, v1);
                            sums0 = add_outer(sums0, w2, v2);
                            sums0 = add_outer(sums0, w3, v3);
                            if owns1 {
                                sums1 = add_outer(sums1, w0, u0);
                                sums1 = add_outer(sums1, w1, u1);
                                sums1 = add_outer(sums1, w2, u2);
                                sums1 = add_outer(sums1, w3, u3);
                            }
                            at = at3 + e_count;
                            w++;
                        }
                    }
                } else {
                    let to = min(group_last, start + KEYS - 1u);
                    for (var key = max(group_first, start); key <= to; key++) {
                        let j = key - start;
                        let seen = (vec4<u32>(key) >= firsts) & (vec4<u32>(key) <= lasts);
                        let at = blocks[chunk_block + j / P] + j % P * e_count;
                        let w = weights[group * 65u + j % 4u * 16u + j / 4u];
                        sums0 = add_seen(sums0, w, value(at, e0), seen);
                        if owns1 {
                            sums1 = add_seen(sums1, w, value(at, e1), seen);
                        }
                    }
                }
            }
        }

        // 6. The segment's totals, over the lanes in rising order.
        if scores_keys {
            tops[group * 17u + lane] = lane_total;
        }
        workgroupBarrier();
        var total = zero;
        if live {
            for (var i = 0u; i < SCORERS; i++) {
                total += tops[group * 17u + i];
            }
        }

        // 7. Join it, or leave that to attention_join.
        if alone {
            let unseen = (running_max == vec4<f32>(LOWEST)) & (total == zero);
            let both = max(joined_max, running_max);
            let a = ratio(joined_max, both);
            let b = ratio(running_max, both);
            joined_total = select(fma(joined_total, a, total * b), joined_total, unseen);
            joined_max = select(both, joined_max, unseen);
            join(thread, sums0.x, a.x, b.x, unseen.x);
            join(thread + THREADS, sums0.y, a.y, b.y, unseen.y);
            join(thread + 2u * THREADS, sums0.z, a.z, b.z, unseen.z);
            join(thread + 3u * THREADS, sums0.w, a.w, b.w, unseen.w);
            join(thread + 4u * THREADS, sums1.x, a.x, b.x, unseen.x);
            join(thread + 5u * THREADS, sums1.y, a.y, b.y, unseen.y);
            join(thread + 6u * THREADS, sums1.z, a.z, b.z, unseen.z);
            join(thread + 7u * THREADS, sums1.w, a.w, b.w, unseen.w);
        } else {
            joined_total = total;
            joined_max = running_max;
            joined[thread] = sums0.x;
            joined[thread + THREADS] = sums0.y;
            joined[thread + 2u * THREADS] = sums0.z;
            joined[thread + 3u * THREADS] = sums0.w;
            joined[thread + 4u * THREADS] = sums1.x;
            joined[thread + 5u * THREADS] = sums1.y;
            joined[thread + 6u * THREADS] = sums1.z;
            joined[thread + 7u * THREADS] = sums1.w;
        }
    }

    // 8. Out they go, neighbours by neighbouring threads.
    if lane == 0u {
        stats[query] = vec2<f32>(joined_max.x, joined_total.x);
        stats[query + 1u] = vec2<f32>(joined_max.y, joined_total.y);
        stats[query + 2u] = vec2<f32>(joined_max.z, joined_total.z);
        stats[query + 3u] = vec2<f32>(joined_max.w, joined_total.w);
    }
    workgroupBarrier();
    if !alone && thread < count {
        let at = partial_at(thread, workgroup.z);
        partials[at] = stats[thread].x;
        partials[at + 1u] = stats[thread].y;
    }
    for (var i = thread; i < count * e_count; i += THREADS) {
        let owner = i / e_count;
        let e = i % e_count;
        let slot = owner % 4u + e / (4u * LANES) * 4u;
        let sum = joined[slot * THREADS + owner / 4u * LANES + e / 4u % LANES][e % 4u];
        if alone {
            let inverse = 1.0 / stats[owner].y;
            out[places[owner] * e_count + e] = Out(sum * inverse);
        } else {
            partials[partial_at(owner, workgroup.z) + 2u + e] = sum;
        }
    }
}
