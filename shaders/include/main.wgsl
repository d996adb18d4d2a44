// The entry point of a kernel that ends a product with its own finish(thread, first_row, first_column), which finds the
// tile's sums in workgroup memory. Workgroups: x over tiles of rows, y over tiles of columns, so that neighbours in time
// share weights.
@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
#if BY_SUBGROUP
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
#else
    @builtin(local_invocation_index) thread: u32,
#endif
) {
    let first_row = group.x * ROWS;
    let first_column = group.y * COLS;
#if BY_SUBGROUP
    let thread = subgroup * subgroup_size + in_subgroup;
#endif
#if TILES
#if BY_SUBGROUP
    products(thread, subgroup, subgroups, in_subgroup, first_row, first_column);
#else
    products(thread, thread / 32u, THREADS / 32u, thread % 32u, first_row, first_column);
#endif
#else
    products(thread, first_row, first_column);
#endif
    finish(thread, first_row, first_column);
}
