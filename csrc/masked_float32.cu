// Masked attention in float32, by two or three bfloat16 numbers for each value.
#include "masked_pass.cuh"

cudaError_t run_masked_float32(MaskedParams& p, int parts, int multiprocessors, cudaStream_t stream) {
  return parts == 2 ? launch_masked<MaskedOf<__nv_bfloat16, float, 64, 1, 2>>(p, multiprocessors, stream)
                    : launch_masked<MaskedOf<__nv_bfloat16, float, 64, 1, 3>>(p, multiprocessors, stream);
}
