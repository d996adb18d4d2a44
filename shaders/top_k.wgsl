// top_k: the K largest logits of a row, largest first; of equal ones the smaller id first.
//
//   best[m, i] = (token, logit) with i larger ones before it
//
// A workgroup owns row m; lane j takes the ids j, j + 256, …, four loads at a time.
// 1. Each lane finds its largest logit. The K-th largest of these 256 is no larger than the K-th of all: a floor.
// 2. What reaches the floor is collected, in any order; a token's place is the number of those that come before it.
// Two passes over the V logits and three barriers, where at most 1280 tokens reach the floor (for K = 128 and ids without
// a pattern about 180 do). Where more do, the K-th largest is searched exactly, an eighth of the range of keys a pass (11
// at most); then what is larger is collected, and of what equals it the smallest ids, until there are K.
//
// NaN is never among the best; missing places are token 0xffffffff. K ≤ 128.

struct Params {
    rows: u32,
    vocab: u32,
    k: u32,
}

struct Candidate {
    token: u32,
    logit: f32,
}

const LANES = 256u;
// What step 2 can collect: fewer than K larger ones, fewer than K equal ones, and the four equal ones of each lane.
const ROOM = 1280u;
const NO_TOKEN = 0xffffffffu;
const LOWEST = -3.4028234e38;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // (M, V)
@group(0) @binding(2) var<storage, read_write> best: array<Candidate>; // (M, K)

var<workgroup> lane_keys: array<u32, LANES>;
var<workgroup> floor_key: u32;
// Tokens collected: (key, ~id), in any order.
var<workgroup> found: array<vec2<u32>, ROOM>;
var<workgroup> found_count: atomic<u32>;
// Tokens at or above each bound. A step of the search uses one row and clears the next one, which nobody reads any more.
var<workgroup> reached: array<array<atomic<u32>, 8>, 3>;

// n, in a way that keeps a loop a loop: llvmpipe unrolls loops over a constant and then compiles for long.
fn rolled(n: u32) -> u32 {
    return n + (p.rows >> 31u);
}

// Order-preserving map of floats to integers: −0 counts as +0, NaN is 0.
fn key_at(start: u32, v: u32) -> u32 {
    let stored = bitcast<u32>(logits[start + v]);
    let bits = select(stored, 0u, stored == 0x80000000u);
    let key = select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
    return select(key, 0u, (bits & 0x7fffffffu) > 0x7f800000u);
}

// Keys of the tokens v, v + 256, v + 512, v + 768; 0 beyond V.
fn keys_at(start: u32, v: u32) -> vec4<u32> {
    let ids = vec4<u32>(v, v + LANES, v + 2u * LANES, v + 3u * LANES);
    let safe = min(ids, vec4<u32>(p.vocab - 1u));
    let keys = vec4<u32>(key_at(start, safe.x), key_at(start, safe.y), key_at(start, safe.z), key_at(start, safe.w));
    return select(vec4<u32>(0u), keys, ids < vec4<u32>(p.vocab));
}

// Collects the tokens of a tile whose keys are in a range.
fn collect(start: u32, v: u32, low: u32, high: u32) {
    var keys = keys_at(start, v);
    for (var i = 0u; i < rolled(4u); i++) {
        // Once there is no room, how many more there are does not matter.
        if keys.x >= low && keys.x <= high && atomicLoad(&found_count) <= ROOM {
            let slot = atomicAdd(&found_count, 1u);
            if slot < ROOM {
                found[slot] = vec2<u32>(keys.x, ~(v + i * LANES));
            }
        }
        keys = keys.yzwx;
    }
}

// The K-th largest key, which is at least `floor`. All lanes get the same.
fn kth_largest(start: u32, lane: u32, floor: u32) -> u32 {
    var low = floor;
    var high = 0xff800000u;
    for (var level = 0u; low < high; level++) {
        let keys = high - low + 1u;
        let step = keys / 8u + select(0u, 1u, keys % 8u > 0u);
        let i = vec4<u32>(1u, 2u, 3u, 4u);
        let near = high + 1u - min(i * step, vec4<u32>(keys));
        let far = high + 1u - min((i + 4u) * step, vec4<u32>(keys));
        var near_count = vec4<u32>(0u);
        var far_count = vec4<u32>(0u);
        for (var v = lane; v < p.vocab; v += 4u * LANES) {
            var keys = keys_at(start, v);
            for (var i = 0u; i < 4u; i++) {
                near_count += select(vec4<u32>(0u), vec4<u32>(1u), vec4<u32>(keys.x) >= near);
                far_count += select(vec4<u32>(0u), vec4<u32>(1u), vec4<u32>(keys.x) >= far);
                keys = keys.yzwx;
            }
        }
        if lane < 8u {
            atomicStore(&reached[(level + 1u) % 3u][lane], 0u);
        }
        let now = level % 3u;
        for (var i = 0u; i < rolled(4u); i++) {
            atomicAdd(&reached[now][i], near_count.x);
            atomicAdd(&reached[now][i + 4u], far_count.x);
            near_count = near_count.yzwx;
            far_count = far_count.yzwx;
        }
        workgroupBarrier();
        let bounds = array<u32, 8>(near.x, near.y, near.z, near.w, far.x, far.y, far.z, far.w);
        for (var i = 0u; i < rolled(8u); i++) {
            low = bounds[i];
            if atomicLoad(&reached[now][i]) >= p.k {
                break;
            }
            high = bounds[i] - 1u;
        }
    }
    return low;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y * groups.x + group.x;
    if m >= p.rows {
        return;
    }
    let start = m * p.vocab;

    // 1. The floor.
    var largest = vec4<u32>(0u);
    for (var v = lane; v < p.vocab; v += 4u * LANES) {
        largest = max(largest, keys_at(start, v));
    }
    let mine = max(max(largest.x, largest.y), max(largest.z, largest.w));
    lane_keys[lane] = mine;
    if lane == 0u {
        atomicStore(&found_count, 0u);
    }
    if lane < 8u {
        atomicStore(&reached[0][lane], 0u);
    }
    workgroupBarrier();
    var rank = 0u;
    for (var i = 0u; i < LANES; i++) {
        let other = lane_keys[i];
        rank += select(0u, 1u, other > mine || (other == mine && i < lane));
    }
    if rank == p.k - 1u {
        floor_key = mine;
    }
    workgroupBarrier();

    // 2. What reaches it; NaN and what lies beyond V do not.
    let floor = max(floor_key, 1u);
    for (var v = lane; v < p.vocab; v += 4u * LANES) {
        collect(start, v, floor, 0xff800000u);
    }
    workgroupBarrier();
    if atomicLoad(&found_count) > ROOM {
        let key = kth_largest(start, lane, floor);
        workgroupBarrier();
        if lane == 0u {
            atomicStore(&found_count, 0u);
        }
        workgroupBarrier();
        for (var v = lane; v < p.vocab; v += 4u * LANES) {
            collect(start, v, key + 1u, 0xff800000u);
        }
        workgroupBarrier();
        // Of equal ones the smallest ids, a tile of 1024 at a time. All lanes see the same count.
        for (var tile = 0u; tile < p.vocab && atomicLoad(&found_count) < p.k; tile += 4u * LANES) {
            workgroupBarrier();
            if tile + lane < p.vocab {
                collect(start, tile + lane, key, key);
            }
            workgroupBarrier();
        }
    }

    // 3. Each to its place.
    let count = min(atomicLoad(&found_count), ROOM);
    for (var c = lane; c < count; c += LANES) {
        let one = found[c];
        var place = 0u;
        for (var i = 0u; i < count; i++) {
            let other = found[i];
            place += select(0u, 1u, other.x > one.x || (other.x == one.x && other.y > one.y));
        }
        if place < p.k {
            best[m * p.k + place] = Candidate(~one.y, logits[start + ~one.y]);
        }
    }
    for (var i = count + lane; i < p.k; i += LANES) {
        best[m * p.k + i] = Candidate(NO_TOKEN, LOWEST);
    }
}
