// What every product reads.
#if TILES
@group(0) @binding(1) var<storage, read> x: array<f16>; // (T, K) and up to the end of a tile of rows
@group(0) @binding(2) var<storage, read> weight: array<f16>; // (rows of the slice / TILE, K / TILE, TILE, TILE)
#else
#if VEC4
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // (T, K/4)
#else
@group(0) @binding(1) var<storage, read> x: array<f32>; // (T, K)
#endif
#if NATIVE_F16
@group(0) @binding(2) var<storage, read> weight: array<vec4<f16>>; // (rows of the slice, stride/4)
#else
#if INT8
@group(0) @binding(2) var<storage, read> weight: array<vec2<u32>>; // (rows of the slice, stride/8), 4 a word
#else
#if INT4
@group(0) @binding(2) var<storage, read> weight: array<u32>; // (rows of the slice, stride/8), 8 a word
#else
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>; // (rows of the slice, stride) in its dtype, packed
#endif
#endif
#endif
#endif
@group(0) @binding(3) var<storage, read> scales: array<f32>; // (rows of the slice, blocks), or anything if not integers
@group(0) @binding(4) var<storage, read> bias: array<f32>; // (N), or anything without a bias
