// Masked attention in float32: as tf32, or as three bfloat16 numbers for each value, which are as exact as it.
#include "masked_pass.cuh"

cudaError_t run_masked_float32(MaskedParams& p, bool tf32, int multiprocessors, cudaStream_t stream) {
  return tf32 ? launch_masked<MaskedOf<float, float, 64, 1, 1>>(p, multiprocessors, stream)
              : launch_masked<MaskedOf<__nv_bfloat16, float, 64, 1, 3>>(p, multiprocessors, stream);
}
