// add: the residual stream takes what a block computed.
//
//   y[i] ← y[i] + x[i]                                                                    i in 0 .. T·D
//
// A thread owns an element; 256 a workgroup, workgroups folded into x and y.

struct Params {
    len: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>; // (T, D)
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // (T, D)

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + local;
    if i < p.len {
        y[i] += x[i];
    }
}
