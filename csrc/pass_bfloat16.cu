// The passes for bfloat16.
#include "pass_dispatch.cuh"

cudaError_t run_pass_bfloat16(const PassParams& p, Tile tile, bool output, int64_t blocks, cudaStream_t stream) {
  return dispatch_pass<__nv_bfloat16>(p, tile, output, blocks, stream);
}
