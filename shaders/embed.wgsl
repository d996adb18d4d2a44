// embed: token ids to vectors.
//
//   out[t, d] = table[token[t], d]                                                        as f32, exact
//
// A workgroup owns row t. The table may be bound in slices of rows; rows whose token is in another slice are left
// alone. Table rows are `stride` elements apart, a whole number of u32.

#if NATIVE_F16
enable f16;
#endif

struct Params {
    rows: u32,
    width: u32,
    stride: u32,
    first: u32,
    count: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>; // (T) token, position, slot, table
#if NATIVE_F16
@group(0) @binding(2) var<storage, read> table: array<f16>; // (count, stride)
#else
@group(0) @binding(2) var<storage, read> table: array<u32>; // (count, stride) in its dtype, packed
#endif
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // (T, D)

#if F16_WEIGHTS
// The value of sixteen f16 bits, exactly: unpack2x16float is not to be had everywhere, and may flush subnormals.
fn half_value(bits: u32) -> f32 {
    let exponent = bits >> 10u & 31u;
    let mantissa = bits & 1023u;
    let normal = bitcast<f32>((exponent + 112u) << 23u | mantissa << 13u);
    let special = bitcast<f32>(0x7f800000u | mantissa << 13u);
    let magnitude = select(select(normal, special, exponent == 31u), f32(mantissa) * 5.9604645e-8, exponent == 0u);
    return select(magnitude, -magnitude, bits >= 0x8000u);
}
#endif

fn element(i: u32) -> f32 {
#if BF16
    let word = table[i / 2u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));
#else
#if NATIVE_F16
    return f32(table[i]);
#else
#if F16_WEIGHTS
    return half_value(table[i / 2u] >> (i % 2u * 16u) & 0xffffu);
#else
    return bitcast<f32>(table[i]);
#endif
#endif
#endif
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.rows {
        return;
    }
    let token = rows[t].x;
    if token < p.first || token >= p.first + p.count {
        return;
    }
    for (var d = local; d < p.width; d += 64u) {
        out[t * p.width + d] = element((token - p.first) * p.stride + d);
    }
}
