// rms_norm: scales each row to unit root mean square.
//
//   out[t, d] = x[t, d] / sqrt(mean_d(x[t, d]²) + eps) · weight[d]
//
// A workgroup owns row t: lane j sums the squares d ≡ j (mod 64) in rising d, then the lanes are added by halves.

struct Params {
    rows: u32,
    width: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>; // (T, D)
@group(0) @binding(2) var<storage, read> weight: array<f32>; // (D)
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // (T, D)

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let t = group.y * groups.x + group.x;
    let row = min(t, p.rows - 1u) * p.width;

    // 1. Squares of this lane.
    var sum = 0.0;
    for (var d = lane; d < p.width; d += 64u) {
        sum += x[row + d] * x[row + d];
    }

    // 2. Lanes by halves.
    partial[lane] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    // 3. Scale.
    if t < p.rows {
        let scale = 1.0 / sqrt(partial[0] / f32(p.width) + p.eps);
        for (var d = lane; d < p.width; d += 64u) {
            out[row + d] = x[row + d] * scale * weight[d];
        }
    }
}
