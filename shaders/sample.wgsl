// sample: draws one token from a row of logits, which adjust_logits may have changed.
//
// With z = logit / T and w = e^(z − max z): keep the tokens whose z reaches the largest of the k-th largest z (top-k), the
// largest z above which top_p of the remaining mass lies (top-p), and max z + ln(min_p) (min-p). Typical-p keeps of these
// the ones with the smallest deviations |−ln p − H| that hold typical_p of the mass: a band of z. Then invert the
// cumulative distribution of the kept w, in the order of ids, at the uniform number that the host drew.
//
// A workgroup owns row m. Lane j takes the ids j, j + 256, …, four loads at a time; lanes are added 16 by 16. Thresholds
// are found exactly, as keys (integers in the order of z or of the deviation; equal values share a fate): a pass sums
// what lies at or above six bounds and the range shrinks to a seventh. The first bounds lie 0.25·i² below the largest
// value; later ones split the range evenly, by value and by key in turns. Once no lane meets more than 8 tokens in the
// range it keeps them, and the rest of the search leaves the vocabulary alone. For the draw, 8 lanes share each
// of 32 parts of consecutive ids; the part that holds the target is split in the same way until it is one token.
//
// Passes over the V logits, each 4·V bytes: greedy 1, plain 2 (largest; draw); min-p and a mask none more, top-p and top-k
// what their searches take (runtime/kernels/sample.rs has figures), typical-p a search and 2 more, reported ids 1 more.
// Barriers: 8 for plain at 8192 < V ≤ 262144, 2 more for each further pass and for each step of a search in what is kept.
//
// Every sum has an order that depends on V and the row alone. −Inf, which a mask leaves, is never drawn. Counts are
// summed as floats: V < 2^24.
//
// Greedy (negative inverse temperature): the largest z, of equals the smallest id. Infinite temperature (0): all alike.

struct Params {
    rows: u32,
    vocab: u32,
    first: u32,
}

struct Request {
    uniform_number: f32,
    inverse_temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    first_edit: u32,
    edit_count: u32,
    mask_row: u32,
    kept_ids: u32,
    is_active: u32,
}

struct Edit {
    token: u32,
    bias: f32,
    penalty: f32,
    subtract: f32,
    raw: f32,
}

struct Drawn {
    token: u32,
    kept: u32,
    threshold: f32,
    ceiling: f32,
    logprob: f32,
    logit: f32,
}

const LANES = 256u;
// Tokens of a range that a lane can keep.
const SLOTS = 8u;
// Parts the draw chooses among, and the lanes of each.
const PARTS = 32u;
const SHARE = 8u;
const NO_TOKEN = 0xffffffffu;
// Keys of −Inf, of the smallest finite number, of the largest one; anything larger is +Inf or NaN. 0: no token.
const LOWEST_KEY = 0x007fffffu;
const FINITE_KEY = 0x00800000u;
const HIGHEST_KEY = 0xff7fffffu;
const NO_MASK = 0xffffffffu;
const MAX_KEPT_IDS = 1024u;
// e^−110 is zero.
const REACH = 110.0;

// What a search adds up: tokens, their w, or their w by deviation.
const COUNT = 0u;
const MASS = 1u;
const NEAR = 2u;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // (M, V)
@group(0) @binding(2) var<storage, read> requests: array<Request>; // (first + M)
@group(0) @binding(3) var<storage, read> edits: array<Edit>; // (edits of all rows) rising tokens in a row
@group(0) @binding(4) var<storage, read_write> drawn: array<Drawn>; // (first + M)
@group(0) @binding(5) var<storage, read_write> kept_ids: array<u32>; // (M, MAX_KEPT_IDS)

// Each lane's values and what they come to, 16 lanes at a time. A step writes `lane_words`, waits, joins them into
// `group_words`, waits, and reads those, so that two barriers a step are enough.
var<workgroup> lane_words: array<vec4<u32>, 2u * LANES>;
var<workgroup> group_words: array<vec4<u32>, 32>;
// During a search: keys, [slot, lane]. Then: the kept ids in any order.
var<workgroup> held: array<u32, SLOTS * LANES>;
var<workgroup> held_ids: atomic<u32>;

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

// n, in a way that keeps a loop a loop: llvmpipe unrolls loops over a constant and then compiles for seconds.
fn rolled(n: u32) -> u32 {
    return n + (p.rows >> 31u);
}

fn sum(lane: u32, mine: Eight) -> Eight {
    lane_words[lane] = bitcast<vec4<u32>>(mine.a);
    lane_words[LANES + lane] = bitcast<vec4<u32>>(mine.b);
    workgroupBarrier();
    if lane < 32u {
        let first = lane / 16u * LANES + lane % 16u;
        var total = vec4<f32>(0.0);
        for (var i = first; i < rolled(first + LANES); i += 32u) {
            total += bitcast<vec4<f32>>(lane_words[i]) + bitcast<vec4<f32>>(lane_words[i + 16u]);
        }
        group_words[lane] = bitcast<vec4<u32>>(total);
    }
    workgroupBarrier();
    var total = Eight(vec4<f32>(0.0), vec4<f32>(0.0));
    for (var i = 0u; i < rolled(16u); i += 2u) {
        total.a += bitcast<vec4<f32>>(group_words[i]) + bitcast<vec4<f32>>(group_words[i + 1u]);
        total.b += bitcast<vec4<f32>>(group_words[16u + i]) + bitcast<vec4<f32>>(group_words[17u + i]);
    }
    return total;
}

// (Largest key, its smallest id, smallest key) of two sets of tokens together.
fn joined(a: vec3<u32>, b: vec3<u32>) -> vec3<u32> {
    let largest = max(a.x, b.x);
    let id = min(select(NO_TOKEN, a.y, a.x == largest), select(NO_TOKEN, b.y, b.x == largest));
    return vec3<u32>(largest, id, min(a.z, b.z));
}

fn join(lane: u32, mine: vec3<u32>) -> vec3<u32> {
    lane_words[lane] = vec4<u32>(mine, 0u);
    workgroupBarrier();
    if lane < 16u {
        var all = lane_words[lane].xyz;
        for (var i = 16u; i < rolled(LANES); i += 16u) {
            all = joined(all, lane_words[lane + i].xyz);
        }
        group_words[lane] = vec4<u32>(all, 0u);
    }
    workgroupBarrier();
    var all = group_words[0].xyz;
    for (var i = 1u; i < rolled(16u); i++) {
        all = joined(all, group_words[i].xyz);
    }
    return all;
}

// Order-preserving map of floats to integers, and back. −0 counts as +0: equal values have equal keys. (Adding zero
// would do, if compilers did not drop it.) NaN, by its bits since compilers assume that there is none, is the largest.
fn key_of(z: f32) -> u32 {
    let bits = select(bitcast<u32>(z), 0u, bitcast<u32>(z) == 0x80000000u);
    let key = select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
    return select(key, 0xffffffffu, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn float_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}

// A row, and what a pass needs to know of it.
struct Row {
    start: u32,
    inverse_temperature: f32,
    max_z: f32,
}

fn key_at(row: Row, v: u32) -> u32 {
    let l = logits[row.start + v];
    let masked = row.inverse_temperature == 0.0 && bitcast<u32>(l) == 0xff800000u;
    return key_of(l * select(row.inverse_temperature, 1.0, row.inverse_temperature < 0.0 || masked));
}

// Keys of z of the tokens v, v + stride, …; 0 from `end` on.
fn keys_at(row: Row, v: u32, stride: u32, end: u32) -> vec4<u32> {
    let ids = vec4<u32>(v) + vec4<u32>(0u, 1u, 2u, 3u) * stride;
    let safe = min(ids, vec4<u32>(end - 1u));
    let keys = vec4<u32>(key_at(row, safe.x), key_at(row, safe.y), key_at(row, safe.z), key_at(row, safe.w));
    return select(vec4<u32>(0u), keys, ids < vec4<u32>(end));
}

// ln w. Through the key, so that no compiler joins the product with the difference in one place only.
fn log_weight(row: Row, key: u32) -> f32 {
    return float_of(key) - row.max_z;
}

// A search for the largest key such that what lies at or above it reaches a target.
struct Search {
    by: u32,
    // Smallest key of z that takes part.
    floor: u32,
    // What is left to search, both included.
    low: u32,
    high: u32,
    // COUNT: the tokens wanted; else the share of the mass.
    wanted: f32,
    // NEAR: ln Σ w − H.
    centre: f32,
}

// The key of −|deviation| of a token: −ln p − H = (ln Σ w − H) − ln w.
fn nearness(centre: f32, log_w: f32) -> u32 {
    return key_of(-abs(centre - log_w));
}

fn bound(s: Search, level: u32, i: u32) -> u32 {
    var key = 0u;
    if level == 0u {
        key = key_of(float_of(s.high) - 0.25 * f32(i * i));
    } else if level % 2u == 1u {
        let part = f32(i) / 7.0;
        key = key_of(float_of(s.high) * (1.0 - part) + float_of(s.low) * part);
    } else {
        // Makes the range a seventh, whatever the values are.
        let keys = s.high - s.low + 1u;
        key = s.high + 1u - min(i * ((keys + 6u) / 7u), keys);
    }
    return clamp(key, s.low, s.high);
}

// The key of a token, or 0 if there are fewer tokens than wanted.
fn search(row: Row, lane: u32, asked: Search) -> u32 {
    var s = asked;
    var target_sum = 0.0;
    var above = 0.0;
    var is_held = false;
    for (var level = 0u; level == 0u || s.low < s.high; level++) {
        let near = vec4<u32>(bound(s, level, 1u), bound(s, level, 2u), bound(s, level, 3u), bound(s, level, 4u));
        let far = vec3<u32>(bound(s, level, 5u), bound(s, level, 6u), s.low);
        // What is at or above the bounds 1 to 4; 5, 6 and the low end; tokens in the range.
        var my_near = vec4<f32>(0.0);
        var my_far = vec3<f32>(0.0);
        var members = 0u;
        let end = select(p.vocab, SLOTS * LANES, is_held);
        for (var v = lane; v < end; v += 4u * LANES) {
            var keys = vec4<u32>(0u);
            if is_held {
                keys = vec4<u32>(held[v], held[v + LANES], held[v + 2u * LANES], held[v + 3u * LANES]);
            } else {
                keys = keys_at(row, v, LANES, p.vocab);
            }
            for (var i = 0u; i < 4u; i++) {
                let key = keys.x;
                keys = keys.yzwx;
                let log_w = log_weight(row, key);
                let place = select(key, nearness(s.centre, log_w), s.by == NEAR);
                if key >= s.floor && place >= s.low && place <= s.high {
                    let amount = select(exp(log_w), 1.0, s.by == COUNT);
                    if amount > 0.0 {
                        my_near += select(vec4<f32>(0.0), vec4<f32>(amount), vec4<u32>(place) >= near);
                        my_far += select(vec3<f32>(0.0), vec3<f32>(amount), vec3<u32>(place) >= far);
                        if !is_held && members < SLOTS {
                            held[members * LANES + lane] = key;
                        }
                        members += 1u;
                    }
                }
            }
        }
        if !is_held {
            for (var i = members; i < SLOTS; i++) {
                held[i * LANES + lane] = 0u;
            }
        }
        // From here on all lanes compute the same.
        let all = sum(lane, Eight(my_near, vec4<f32>(my_far, select(0.0, 1.0, members > SLOTS))));
        is_held = all.b.w == 0.0;
        if level == 0u {
            if s.by == COUNT && all.b.z < s.wanted {
                return 0u;
            }
            target_sum = select(s.wanted * all.b.z, s.wanted, s.by == COUNT);
        }
        // The last token takes what rounding leaves over: the range never loses all of its tokens.
        let reach = min(target_sum, above + all.b.z);
        var sums = all.a;
        var bounds = near;
        var high = s.high;
        var skipped = 0.0;
        for (var i = 0u; i < rolled(7u); i++) {
            if i == 4u {
                sums = all.b;
                bounds = vec4<u32>(far, 0u);
            }
            s.low = bounds.x;
            if sums.x > 0.0 && above + sums.x >= reach {
                break;
            }
            high = bounds.x - 1u;
            skipped = sums.x;
            sums = sums.yzwx;
            bounds = bounds.yzwx;
        }
        s.high = high;
        above += skipped;
    }
    return s.low;
}

// ln Σ w − H of the tokens from `low` on, which is Σ w ln w / Σ w since H = ln Σ w − Σ w ln w / Σ w.
fn typical_centre(row: Row, lane: u32, low: u32) -> f32 {
    var mine = vec4<f32>(0.0);
    for (var v = lane; v < p.vocab; v += 4u * LANES) {
        var keys = keys_at(row, v, LANES, p.vocab);
        for (var i = 0u; i < 4u; i++) {
            if keys.x >= low {
                let log_w = log_weight(row, keys.x);
                let w = exp(log_w);
                mine += vec4<f32>(w, w * log_w, 0.0, 0.0);
            }
            keys = keys.yzwx;
        }
    }
    let all = sum(lane, Eight(mine, vec4<f32>(0.0))).a;
    return all.y / all.x;
}

// The smallest and the largest key of z among the tokens that are near enough.
fn typical_band(row: Row, lane: u32, s: Search, nearest: u32) -> vec2<u32> {
    var mine = vec3<u32>(0u, NO_TOKEN, NO_TOKEN);
    for (var v = lane; v < p.vocab; v += 4u * LANES) {
        var keys = keys_at(row, v, LANES, p.vocab);
        for (var i = 0u; i < 4u; i++) {
            let key = keys.x;
            keys = keys.yzwx;
            let log_w = log_weight(row, key);
            if key >= s.floor && nearness(s.centre, log_w) >= nearest && exp(log_w) > 0.0 {
                mine = vec3<u32>(max(mine.x, key), NO_TOKEN, min(mine.z, key));
            }
        }
    }
    return join(lane, mine).zx;
}

// The logit of a token as the model gave it.
fn raw_logit(r: Request, start: u32, token: u32) -> f32 {
    var low = 0u;
    var high = r.edit_count;
    while low < high {
        let middle = (low + high) / 2u;
        if edits[r.first_edit + middle].token < token {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    if low < r.edit_count && edits[r.first_edit + low].token == token {
        return edits[r.first_edit + low].raw;
    }
    return logits[start + token];
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
    let r = requests[p.first + m];
    if r.is_active != 1u {
        return;
    }
    let infinity = bitcast<f32>(0x7f800000u | (p.rows & 0u));
    var row = Row(m * p.vocab, r.inverse_temperature, 0.0);

    // 1. The largest z, its smallest id, and the smallest finite z.
    var mine = vec3<u32>(0u, NO_TOKEN, NO_TOKEN);
    for (var v = lane; v < p.vocab; v += 4u * LANES) {
        var keys = keys_at(row, v, LANES, p.vocab);
        for (var i = 0u; i < 4u; i++) {
            if keys.x > mine.x {
                mine.x = keys.x;
                mine.y = v + i * LANES;
            }
            mine.z = min(mine.z, select(NO_TOKEN, keys.x, keys.x >= FINITE_KEY));
            keys = keys.yzwx;
        }
    }
    if lane == 0u {
        atomicStore(&held_ids, 0u);
    }
    let ends = join(lane, mine);
    let top_key = ends.x;
    let best = ends.y;
    row.max_z = float_of(top_key);
    if top_key < FINITE_KEY || top_key > HIGHEST_KEY {
        if lane == 0u {
            let nan = bitcast<f32>(0x7fc00000u | (p.rows & 0u));
            drawn[p.first + m] = Drawn(NO_TOKEN, 0u, nan, nan, nan, nan);
        }
        return;
    }
    if r.inverse_temperature < 0.0 {
        if lane == 0u {
            drawn[p.first + m] = Drawn(best, 1u, row.max_z, infinity, 0.0, raw_logit(r, row.start, best));
        }
        return;
    }

    // 2. The threshold and the ceiling, as keys. One call of the search in a loop, since compilers copy what is called.
    var threshold = select(FINITE_KEY, LOWEST_KEY, r.mask_row == NO_MASK);
    var ceiling = 0xffffffffu;
    for (var by = COUNT; by <= NEAR; by++) {
        if by == NEAR && r.min_p > 0.0 {
            threshold = max(threshold, min(key_of(row.max_z + log(r.min_p)), top_key));
        }
        let is_on = array<bool, 3>(r.top_k > 0u && r.top_k < p.vocab, r.top_p < 1.0, r.typical_p < 1.0);
        if !is_on[by] {
            continue;
        }
        // The w of smaller ones are zero.
        let low = max(max(threshold, ends.z), key_of(row.max_z - REACH));
        var s = Search(by, low, low, top_key, r.top_p, 0.0);
        if by == COUNT {
            s = Search(by, FINITE_KEY, ends.z, top_key, f32(r.top_k), 0.0);
        } else if by == NEAR {
            let centre = typical_centre(row, lane, low);
            let farthest = min(nearness(centre, 0.0), nearness(centre, log_weight(row, low)));
            s = Search(by, low, farthest, key_of(0.0), r.typical_p, centre);
        }
        let found = search(row, lane, s);
        if by == NEAR {
            let band = typical_band(row, lane, s, found);
            threshold = band.x;
            ceiling = band.y;
        } else {
            threshold = max(threshold, found);
        }
    }

    // 3. The draw: the part of the ids in which the target lies, again and again. The first round also counts the
    // kept tokens.
    var first = 0u;
    var len = p.vocab;
    var total = 0.0;
    var kept = 0u;
    var wanted = 0.0;
    var below = 0.0;
    var part = 0u;
    var holder = 0u;
    // All lanes compute the same `part`, from V alone.
    for (var round = 0u; part != SHARE; round++) {
        part = (len + PARTS * SHARE - 1u) / (PARTS * SHARE) * SHARE;
        let end = min(min(first + len, p.vocab), first + (lane / SHARE + 1u) * part);
        var my_sum = 0.0;
        var my_kept = 0u;
        for (var v = first + lane / SHARE * part + lane % SHARE; v < end; v += 4u * SHARE) {
            var keys = keys_at(row, v, SHARE, end);
            for (var i = 0u; i < 4u; i++) {
                let key = keys.x;
                keys = keys.yzwx;
                if key >= threshold && key <= ceiling {
                    my_sum += select(0.0, exp(log_weight(row, key)), key > LOWEST_KEY);
                    my_kept += 1u;
                }
            }
        }
        lane_words[lane % SHARE * PARTS + lane / SHARE] = vec4<u32>(bitcast<u32>(my_sum), my_kept, 0u, 0u);
        workgroupBarrier();
        if lane < PARTS {
            var sum = bitcast<f32>(lane_words[lane].x);
            var count = lane_words[lane].y;
            for (var i = 1u; i < rolled(SHARE); i++) {
                sum += bitcast<f32>(lane_words[i * PARTS + lane].x);
                count += lane_words[i * PARTS + lane].y;
            }
            group_words[lane] = vec4<u32>(bitcast<u32>(sum), count, 0u, 0u);
        }
        workgroupBarrier();
        if round == 0u {
            for (var i = 0u; i < rolled(PARTS); i++) {
                total += bitcast<f32>(group_words[i].x);
                kept += group_words[i].y;
            }
            wanted = r.uniform_number * total;
        }
        // The last part with a kept token takes what rounding leaves over.
        holder = 0u;
        var next = below;
        for (var i = 0u; i < rolled(PARTS) && next <= wanted; i++) {
            let sum = bitcast<f32>(group_words[i].x);
            if sum > 0.0 {
                holder = i;
                below = next;
                next += sum;
            }
        }
        first += holder * part;
        len = part;
    }

    // 4. The ids, where they are few: collected in any order, and put where their ranks say.
    if kept <= min(r.kept_ids, MAX_KEPT_IDS) {
        for (var v = lane; v < p.vocab; v += 4u * LANES) {
            var keys = keys_at(row, v, LANES, p.vocab);
            for (var i = 0u; i < 4u; i++) {
                if keys.x >= threshold && keys.x <= ceiling {
                    held[atomicAdd(&held_ids, 1u)] = v + i * LANES;
                }
                keys = keys.yzwx;
            }
        }
        workgroupBarrier();
        let ids = vec4<u32>(held[lane], held[LANES + lane], held[2u * LANES + lane], held[3u * LANES + lane]);
        var ranks = vec4<u32>(0u);
        for (var i = 0u; i < kept; i++) {
            ranks += select(vec4<u32>(0u), vec4<u32>(1u), vec4<u32>(held[i]) < ids);
        }
        for (var i = 0u; i < 4u; i++) {
            if i * LANES + lane < kept {
                kept_ids[m * MAX_KEPT_IDS + ranks[i]] = ids[i];
            }
        }
    }

    // 5. The last round had one token a lane.
    if lane == 0u {
        var token = best;
        for (var i = 0u; i < rolled(SHARE); i++) {
            let w = bitcast<f32>(lane_words[i * PARTS + holder].x);
            if w > 0.0 {
                token = first + i;
                below += w;
                if below > wanted {
                    break;
                }
            }
        }
        let top = select(float_of(ceiling), infinity, ceiling == 0xffffffffu);
        // One token alone is certain, whatever rounding says.
        let logprob = select(log_weight(row, key_at(row, token)) - log(total), 0.0, kept == 1u);
        drawn[p.first + m] = Drawn(token, kept, float_of(threshold), top, logprob, raw_logit(r, row.start, token));
    }
}
