// Wide heads in bfloat16.
#include "wide_pass.cuh"

cudaError_t run_wide_bfloat16(const WideParams& p, WideTile tile, int multiprocessors, cudaStream_t stream) {
  return run_wide<__nv_bfloat16>(p, tile, multiprocessors, stream);
}
