// sample: draws one token from a row of logits, which adjust_logits may have changed.
//
// With z = logit / T and w = e^(z − max z): keep the tokens whose z reaches the largest of the k-th largest z (top-k), the
// largest z above which top_p of the remaining mass lies (top-p), and max z + ln(min_p) (min-p). Typical-p keeps of these
// the ones with the smallest deviations |−ln p − H| that hold typical_p of the mass: a band of z. Then invert the
// cumulative distribution of the kept w, in the order of ids, at the uniform number that the host drew.
//
// A workgroup owns row m. Lane j owns the contiguous ids j·V/256 .. (j + 1)·V/256. Thresholds are found by bisecting
// the 32 bits of z (or of the deviation) as an ordered integer, exactly; equal values share a fate. −Inf, which a mask
// leaves, is never kept.
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
const NO_TOKEN = 0xffffffffu;
const LOWEST = -3.4028234e38;
// The key of −Inf; the next one is that of the smallest finite number.
const LOWEST_KEY = 0x007fffffu;
const NO_MASK = 0xffffffffu;
const MAX_KEPT_IDS = 1024u;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // (M, V)
@group(0) @binding(2) var<storage, read> requests: array<Request>; // (first + M)
@group(0) @binding(3) var<storage, read> edits: array<Edit>; // (edits of all rows) rising tokens in a row
@group(0) @binding(4) var<storage, read_write> drawn: array<Drawn>; // (first + M)
@group(0) @binding(5) var<storage, read_write> kept_ids: array<u32>; // (M, MAX_KEPT_IDS)

var<workgroup> floats: array<f32, LANES>;
var<workgroup> ints: array<u32, LANES>;

fn sum_floats(lane: u32, v: f32) -> f32 {
    floats[lane] = v;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            floats[lane] += floats[lane + half];
        }
        workgroupBarrier();
    }
    let total = floats[0];
    workgroupBarrier();
    return total;
}

fn sum_ints(lane: u32, v: u32) -> u32 {
    ints[lane] = v;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            ints[lane] += ints[lane + half];
        }
        workgroupBarrier();
    }
    let total = ints[0];
    workgroupBarrier();
    return total;
}

fn max_ints(lane: u32, v: u32) -> u32 {
    ints[lane] = v;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            ints[lane] = max(ints[lane], ints[lane + half]);
        }
        workgroupBarrier();
    }
    let largest = ints[0];
    workgroupBarrier();
    return largest;
}

// Order-preserving map of floats to integers, and back. −0 counts as +0: equal values have equal keys. (Adding zero
// would do, if compilers did not drop it.)
fn key_of(z: f32) -> u32 {
    let bits = select(bitcast<u32>(z), 0u, bitcast<u32>(z) == 0x80000000u);
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn float_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}

fn z_of(r: Request, start: u32, v: u32) -> f32 {
    let l = logits[start + v];
    let masked = r.inverse_temperature == 0.0 && bitcast<u32>(l) == 0xff800000u;
    return l * select(r.inverse_temperature, 1.0, r.inverse_temperature < 0.0 || masked);
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
    let exists = m < p.rows;
    let row = min(m, p.rows - 1u);
    let r = requests[p.first + row];
    let start = row * p.vocab;
    let each = (p.vocab + LANES - 1u) / LANES;
    let from_token = min(lane * each, p.vocab);
    let to_token = min(from_token + each, p.vocab);

    // 1. The largest z and its smallest id; a NaN or an infinite maximum ends the row.
    var my_key = 0u;
    var my_best = NO_TOKEN;
    var broken = 0u;
    for (var v = from_token; v < to_token; v++) {
        let z = z_of(r, start, v);
        // NaN and +Inf by their bits: compilers assume that there are none.
        let bits = bitcast<u32>(logits[start + v]);
        if z != z || bits == 0x7f800000u || (bits & 0x7fffffffu) > 0x7f800000u {
            broken = 1u;
        } else if my_best == NO_TOKEN || key_of(z) > my_key {
            my_key = key_of(z);
            my_best = v;
        }
    }
    let top_key = max_ints(lane, my_key);
    let max_z = float_of(top_key);
    let best = ~max_ints(lane, select(0u, ~my_best, my_best != NO_TOKEN && my_key == top_key));
    let any_broken = max_ints(lane, broken) == 1u || !(abs(max_z) <= -LOWEST);

    // 2. The threshold, as a key: bisect the bits from the top.
    var threshold = select(LOWEST_KEY + 1u, LOWEST_KEY, r.mask_row == NO_MASK);
    if r.top_k > 0u && r.top_k < p.vocab {
        var key = 0u;
        for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
            var count = 0u;
            for (var v = from_token; v < to_token; v++) {
                count += select(0u, 1u, key_of(z_of(r, start, v)) >= (key | bit));
            }
            if sum_ints(lane, count) >= r.top_k {
                key |= bit;
            }
        }
        threshold = max(threshold, key);
    }
    if r.top_p < 1.0 {
        var mass = 0.0;
        for (var v = from_token; v < to_token; v++) {
            let z = z_of(r, start, v);
            mass += select(0.0, exp(z - max_z), key_of(z) >= threshold);
        }
        let wanted = r.top_p * sum_floats(lane, mass);
        var key = 0u;
        for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
            let candidate = max(threshold, key | bit);
            var above = 0.0;
            for (var v = from_token; v < to_token; v++) {
                let z = z_of(r, start, v);
                above += select(0.0, exp(z - max_z), key_of(z) >= candidate);
            }
            if sum_floats(lane, above) >= wanted && (key | bit) <= top_key {
                key |= bit;
            }
        }
        threshold = max(threshold, key);
    }
    if r.min_p > 0.0 {
        threshold = max(threshold, min(key_of(max_z + log(r.min_p)), top_key));
    }

    var ceiling = 0xffffffffu;
    if r.typical_p < 1.0 {
        var mass = 0.0;
        var weighted = 0.0;
        for (var v = from_token; v < to_token; v++) {
            let z = z_of(r, start, v);
            if key_of(z) >= max(threshold, LOWEST_KEY + 1u) {
                mass += exp(z - max_z);
                weighted += exp(z - max_z) * (z - max_z);
            }
        }
        let all = sum_floats(lane, mass);
        let log_all = log(all);
        let entropy = log_all - sum_floats(lane, weighted) / all;
        // Keys of −deviation: the largest ones are kept. Weights that are zero do not count.
        var my_largest = 0u;
        for (var v = from_token; v < to_token; v++) {
            let z = z_of(r, start, v);
            if key_of(z) >= max(threshold, LOWEST_KEY + 1u) && exp(z - max_z) > 0.0 {
                my_largest = max(my_largest, key_of(-abs((log_all - (z - max_z)) - entropy)));
            }
        }
        let largest = max_ints(lane, my_largest);
        var key = 0u;
        for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
            var near = 0.0;
            for (var v = from_token; v < to_token; v++) {
                let z = z_of(r, start, v);
                if key_of(z) >= max(threshold, LOWEST_KEY + 1u) {
                    let deviation = key_of(-abs((log_all - (z - max_z)) - entropy));
                    near += select(0.0, exp(z - max_z), deviation >= (key | bit));
                }
            }
            if sum_floats(lane, near) >= r.typical_p * all && (key | bit) <= largest {
                key |= bit;
            }
        }
        var my_low = 0u;
        var my_high = 0u;
        for (var v = from_token; v < to_token; v++) {
            let z = z_of(r, start, v);
            let deviation = key_of(-abs((log_all - (z - max_z)) - entropy));
            if key_of(z) >= max(threshold, LOWEST_KEY + 1u) && exp(z - max_z) > 0.0 && deviation >= key {
                my_low = max(my_low, ~key_of(z));
                my_high = max(my_high, key_of(z));
            }
        }
        threshold = ~max_ints(lane, my_low);
        ceiling = max_ints(lane, my_high);
    }

    // 3. Weights of the kept tokens, summed lane by lane.
    var my_sum = 0.0;
    var my_kept = 0u;
    for (var v = from_token; v < to_token; v++) {
        let z = z_of(r, start, v);
        if key_of(z) >= threshold && key_of(z) <= ceiling {
            my_sum += exp(z - max_z);
            my_kept += 1u;
        }
    }
    let kept = sum_ints(lane, my_kept);
    let is_drawn = exists && r.is_active == 1u && !any_broken;
    let reports = is_drawn && r.inverse_temperature >= 0.0 && kept <= min(r.kept_ids, MAX_KEPT_IDS);
    ints[lane] = my_kept;
    workgroupBarrier();
    if reports && my_kept > 0u {
        var place = m * MAX_KEPT_IDS;
        for (var i = 0u; i < lane; i++) {
            place += ints[i];
        }
        for (var v = from_token; v < to_token; v++) {
            let key = key_of(z_of(r, start, v));
            if key >= threshold && key <= ceiling {
                kept_ids[place] = v;
                place += 1u;
            }
        }
    }
    workgroupBarrier();
    floats[lane] = my_sum;
    ints[lane] = select(0u, 1u, my_sum > 0.0);
    workgroupBarrier();

    // 4. One lane walks the lanes' sums, then the tokens of the one that holds the target.
    if lane == 0u && exists && r.is_active == 1u {
        let infinity = bitcast<f32>(0x7f800000u | (p.rows & 0u));
        var result = Drawn(best, 1u, max_z, infinity, 0.0, 0.0);
        if any_broken {
            let nan = bitcast<f32>(0x7fc00000u | (p.rows & 0u));
            result = Drawn(NO_TOKEN, 0u, nan, nan, nan, nan);
        } else {
            if r.inverse_temperature >= 0.0 {
                var total = 0.0;
                var last_lane = 0u;
                for (var i = 0u; i < LANES; i++) {
                    total += floats[i];
                    if ints[i] == 1u {
                        last_lane = i;
                    }
                }
                let wanted = r.uniform_number * total;
                var below = 0.0;
                var holder = last_lane;
                for (var i = 0u; i < last_lane; i++) {
                    if below + floats[i] > wanted {
                        holder = i;
                        break;
                    }
                    below += floats[i];
                }
                var token = best;
                for (var v = holder * each; v < min((holder + 1u) * each, p.vocab); v++) {
                    let z = z_of(r, start, v);
                    let w = exp(z - max_z);
                    if key_of(z) >= threshold && key_of(z) <= ceiling && w > 0.0 {
                        // The last kept token takes what rounding leaves over.
                        token = v;
                        below += w;
                        if below > wanted {
                            break;
                        }
                    }
                }
                let z = z_of(r, start, token);
                let top = select(float_of(ceiling), infinity, ceiling == 0xffffffffu);
                // One token alone is certain, whatever rounding says.
                let logprob = select((z - max_z) - log(total), 0.0, kept == 1u);
                result = Drawn(token, kept, float_of(threshold), top, logprob, 0.0);
            }
            result.logit = raw_logit(r, start, result.token);
        }
        drawn[p.first + m] = result;
    }
}
