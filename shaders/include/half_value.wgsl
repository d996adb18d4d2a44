// The value of sixteen f16 bits, exactly: unpack2x16float is not to be had everywhere, and may flush subnormals.
#if F16_WEIGHTS
fn half_value(bits: u32) -> f32 {
    let exponent = bits >> 10u & 31u;
    let mantissa = bits & 1023u;
    let normal = bitcast<f32>((exponent + 112u) << 23u | mantissa << 13u);
    let special = bitcast<f32>(0x7f800000u | mantissa << 13u);
    let magnitude = select(select(normal, special, exponent == 31u), f32(mantissa) * 5.9604645e-8, exponent == 0u);
    return select(magnitude, -magnitude, bits >= 0x8000u);
}
#endif
