// log_sum_exp: joins what the pass over the vocabulary left of each tile of tokens.
//
//   joined[m] = (max l, Σ e^(l − max), Σ e^(l − max)·(l − max), l[target])                 over all tiles of row m
//
// A workgroup owns row m: lane j takes the tiles j, j + 64, … in rising order, then the lanes are joined by halves. A sum
// that is NaN stays NaN.

struct Params {
    rows: u32,
    tiles: u32,
    first: u32,
}

const LANES = 64u;
const LOWEST = -3.4028234e38;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> stats: array<vec4<f32>>; // (M, tiles)
@group(0) @binding(2) var<storage, read_write> joined: array<vec4<f32>>; // (first + M)

var<workgroup> partial: array<vec4<f32>, LANES>;

// Moves sums from their maximum to a larger one.
fn moved(s: vec4<f32>, larger: f32) -> vec4<f32> {
    if s.y == 0.0 {
        return vec4<f32>(larger, 0.0, 0.0, s.w);
    }
    let shift = s.x - larger;
    let shrink = exp(shift);
    return vec4<f32>(larger, s.y * shrink, (s.z + s.y * shift) * shrink, s.w);
}

fn join(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let larger = max(a.x, b.x);
    let c = moved(a, larger);
    let d = moved(b, larger);
    return vec4<f32>(larger, c.y + d.y, c.z + d.z, c.w + d.w);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y * groups.x + group.x;
    let start = min(m, p.rows - 1u) * p.tiles;

    var s = vec4<f32>(LOWEST, 0.0, 0.0, 0.0);
    for (var tile = lane; tile < p.tiles; tile += LANES) {
        s = join(s, stats[start + tile]);
    }
    partial[lane] = s;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] = join(partial[lane], partial[lane + half]);
        }
        workgroupBarrier();
    }
    if lane == 0u && m < p.rows {
        joined[p.first + m] = partial[0];
    }
}
