// silu_mul: the gated activation of the MLP.
//
//   up[i] ← gate[i] / (1 + e^(−gate[i])) · up[i]                                          i in 0 .. T·F
//
// A thread owns an element; 256 a workgroup, workgroups folded into x and y.

struct Params {
    len: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>; // (T, F)
@group(0) @binding(2) var<storage, read_write> up: array<f32>; // (T, F)

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + local;
    if i < p.len {
        let g = gate[i];
        up[i] *= g / (1.0 + exp(-g));
    }
}
