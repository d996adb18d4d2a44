// What the adapter of row t adds to a sum of column n of N, the output of the part-th of the products that share an input:
//
//   Σ_j down[t, 1 + part · rank + j] · b[j, n],   j in rising order
//
// before anything else happens to the sum. The sum of a row without an adapter, or whose adapter leaves these products as
// they are, keeps its bits. lora_down.wgsl says what `adapters` and `down` hold.
#if ADAPTERS
const NO_ADAPTER = 0xffffffffu;

fn with_adapter(sum: f32, t: u32, part: u32, column: u32, columns: u32) -> f32 {
    let row = t * adapters[0];
    let slot = down[row];
    if slot == NO_ADAPTER {
        return sum;
    }
    let rank = adapters[4u + 4u * slot + 2u];
    if rank == 0u {
        return sum;
    }
    let b = adapters[4u + 4u * slot + 1u] + column;
    let first = row + 1u + part * rank;
    var delta = 0.0;
    for (var j = 0u; j < rank; j++) {
        delta = fma(bitcast<f32>(down[first + j]), bitcast<f32>(adapters[b + j * columns]), delta);
    }
    return sum + delta;
}

// What a row's results are multiplied by to fit f16 with its adapter, or its sums because their inputs were: a power of two.
fn adapter_scale(t: u32) -> f32 {
    let slot = down[t * adapters[0]];
    if slot == NO_ADAPTER {
        return 1.0;
    }
    return bitcast<f32>(adapters[4u + 4u * slot + 3u]);
}
#endif
