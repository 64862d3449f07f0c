// Wide heads in float16.
#include "wide_outputs.cuh"
#include "wide_prepare.cuh"

cudaError_t run_prepare_float16(const PrepareParams& p, WideTile tile, cudaStream_t stream) {
  return run_prepare<__half>(p, tile, stream);
}

cudaError_t run_wide_outputs_float16(const WideOutputParams& p, WideTile tile, int multiprocessors,
                                     cudaStream_t stream) {
  return run_wide_outputs<__half>(p, tile, multiprocessors, stream);
}
