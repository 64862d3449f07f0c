// Masked attention in float16.
#include "masked_pass.cuh"

cudaError_t run_masked_float16(MaskedParams& p, int width, bool float_mask, int multiprocessors, cudaStream_t stream) {
  return float_mask ? run_masked<__half, float>(p, width, multiprocessors, stream)
                    : run_masked<__half, __half>(p, width, multiprocessors, stream);
}
