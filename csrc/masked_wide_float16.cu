// Masked attention of wide heads in float16.
#include "masked_products.cuh"
#include "masked_scores.cuh"

cudaError_t run_masked_scores_float16(const MaskedScoresParams& p, WideTile tile, int multiprocessors,
                                      cudaStream_t stream) {
  return run_masked_scores<__half>(p, tile, multiprocessors, stream);
}

cudaError_t run_masked_products_float16(const MaskedProductsParams& p, WideTile tile, int multiprocessors,
                                        cudaStream_t stream) {
  return run_masked_products<__half>(p, tile, multiprocessors, stream);
}
