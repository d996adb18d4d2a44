// rms_norm: normalises each row by its root mean square.
//
//   out[t, d] = x[t, d] / √(mean_d x[t, d]² + eps) · weight[d]
//
// A workgroup owns row t: lane j adds the squares of the elements j, j + 256, …, then the lanes are added by halves. So
// the order depends on D alone.

#if HALF_OUT
enable f16;
#endif

struct Params {
    rows: u32,
    width: u32,
    eps: f32,
}

const LANES = 256u;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>; // (T, D)
@group(0) @binding(2) var<storage, read> weight: array<f32>; // (D)
#if HALF_OUT
@group(0) @binding(3) var<storage, read_write> out: array<f16>; // (T, D)
#else
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // (T, D)
#endif

var<workgroup> partial: array<f32, LANES>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let t = group.y * groups.x + group.x;
    let row = min(t, p.rows - 1u) * p.width;

    // 1. Squares of this lane.
    var sum = 0.0;
    for (var d = lane; d < p.width; d += LANES) {
        sum = fma(x[row + d], x[row + d], sum);
    }

    // 2. Lanes by halves.
    partial[lane] = sum;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            partial[lane] += partial[lane + half];
        }
        workgroupBarrier();
    }

    // 3. Scale.
    if t < p.rows {
        let scale = 1.0 / sqrt(partial[0] / f32(p.width) + p.eps);
        for (var d = lane; d < p.width; d += LANES) {
            let value = x[row + d] * scale * weight[d];
#if HALF_OUT
            out[row + d] = f16(value);
#else
            out[row + d] = value;
#endif
        }
    }
}
