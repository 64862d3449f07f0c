// Masked attention in bfloat16.
#include "masked_pass.cuh"

cudaError_t run_masked_bfloat16(MaskedParams& p, int width, bool float_mask, int multiprocessors, cudaStream_t stream) {
  return float_mask ? run_masked<__nv_bfloat16, float>(p, width, multiprocessors, stream)
                    : run_masked<__nv_bfloat16, __nv_bfloat16>(p, width, multiprocessors, stream);
}
