// The passes for float16.
#include "pass_dispatch.cuh"

cudaError_t run_pass_float16(const PassParams& p, Tile tile, int pieces, int multiprocessors, cudaStream_t stream) {
  return dispatch_pass<__half>(p, tile, pieces, multiprocessors, stream);
}
