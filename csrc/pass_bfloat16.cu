// The passes for bfloat16.
#include "pass_dispatch.cuh"

cudaError_t run_pass_bfloat16(const PassParams& p, Tile tile, int pieces, int multiprocessors, cudaStream_t stream) {
  return dispatch_pass<__nv_bfloat16>(p, tile, pieces, multiprocessors, stream);
}
