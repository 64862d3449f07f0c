// Masked attention of wide heads in bfloat16, and in float32 by parts of bfloat16.
#include "masked_products.cuh"
#include "masked_scores.cuh"

cudaError_t run_masked_scores_bfloat16(const MaskedScoresParams& p, WideTile tile, int multiprocessors,
                                       cudaStream_t stream) {
  return run_masked_scores<__nv_bfloat16>(p, tile, multiprocessors, stream);
}

cudaError_t run_masked_products_bfloat16(const MaskedProductsParams& p, WideTile tile, int multiprocessors,
                                         cudaStream_t stream) {
  return run_masked_products<__nv_bfloat16>(p, tile, multiprocessors, stream);
}
