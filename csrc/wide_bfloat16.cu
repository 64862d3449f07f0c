// Wide heads in bfloat16.
#include "wide_outputs.cuh"
#include "wide_prepare.cuh"

cudaError_t run_prepare_bfloat16(const PrepareParams& p, WideTile tile, cudaStream_t stream) {
  return run_prepare<__nv_bfloat16>(p, tile, stream);
}

cudaError_t run_wide_outputs_bfloat16(const WideOutputParams& p, WideTile tile, int multiprocessors,
                                      cudaStream_t stream) {
  return run_wide_outputs<__nv_bfloat16>(p, tile, multiprocessors, stream);
}
