// The language extensions that a product's variant needs.
#if F16
enable f16;
#endif
#if MATRIX
enable wgpu_cooperative_matrix;
#endif
