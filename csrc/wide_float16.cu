// Wide heads in float16.
#include "wide_pass.cuh"

cudaError_t run_wide_float16(const WideParams& p, WideTile tile, int multiprocessors, cudaStream_t stream) {
  return run_wide<__half>(p, tile, multiprocessors, stream);
}
