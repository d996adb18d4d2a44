// gather_rows: packs the rows that asked for an output.
//
//   out[m, d] = x[index[first + m], d]
//
// A workgroup owns row m.

struct Params {
    rows: u32,
    width: u32,
    first: u32,
}

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> index: array<u32>; // (first + M)
@group(0) @binding(2) var<storage, read> x: array<f32>; // (T, D)
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // (M, D)

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let m = group.y * groups.x + group.x;
    if m >= p.rows {
        return;
    }
    for (var d = local; d < p.width; d += 64u) {
        out[m * p.width + d] = x[index[p.first + m] * p.width + d];
    }
}
