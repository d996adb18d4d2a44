// log_sum_exp: what log-probabilities and entropy of a row need, in one pass with a running maximum.
//
//   stats[m] = (max l, Σ e^(l − max), Σ e^(l − max)·(l − max), l[target])                 l = logits[m, ·]
//
// A workgroup owns row m: lane j takes the logits v ≡ j (mod 256) in rising v, then the lanes are joined by halves.
// A logit of −Inf adds nothing; NaN makes both sums NaN.

struct Params {
    rows: u32,
    vocab: u32,
}

const LANES = 256u;
const LOWEST = -3.4028234e38;

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // (M, V)
@group(0) @binding(2) var<storage, read> targets: array<u32>; // (M), not below V: none
@group(0) @binding(3) var<storage, read_write> stats: array<vec4<f32>>; // (M)

// max, Σ e^(l − max), Σ e^(l − max)·(l − max)
var<workgroup> partial: array<vec3<f32>, LANES>;

// Moves sums from their maximum to a larger one.
fn moved(s: vec3<f32>, larger: f32) -> vec3<f32> {
    if s.y == 0.0 {
        return vec3<f32>(larger, 0.0, 0.0);
    }
    let shift = s.x - larger;
    let shrink = exp(shift);
    return vec3<f32>(larger, s.y * shrink, (s.z + s.y * shift) * shrink);
}

fn join(a: vec3<f32>, b: vec3<f32>) -> vec3<f32> {
    let larger = max(a.x, b.x);
    let c = moved(a, larger);
    let d = moved(b, larger);
    return vec3<f32>(larger, c.y + d.y, c.z + d.z);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y * groups.x + group.x;
    let start = min(m, p.rows - 1u) * p.vocab;

    // 1. This lane's logits.
    var s = vec3<f32>(LOWEST, 0.0, 0.0);
    for (var v = lane; v < p.vocab; v += LANES) {
        let l = logits[start + v];
        if l >= LOWEST {
            if l > s.x {
                s = moved(s, l);
            }
            let shift = l - s.x;
            let e = exp(shift);
            s.y += e;
            s.z += e * shift;
        } else if l != l {
            // NaN stays NaN whatever follows.
            s.y = l;
        }
    }

    // 2. Lanes by halves.
    partial[lane] = s;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] = join(partial[lane], partial[lane + half]);
        }
        workgroupBarrier();
    }

    if lane == 0u && m < p.rows {
        let target_token = targets[m];
        var target_logit = 0.0;
        if target_token < p.vocab {
            target_logit = logits[start + target_token];
        }
        stats[m] = vec4<f32>(partial[0], target_logit);
    }
}
