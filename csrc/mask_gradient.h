// The gradient of a mask of any values: what the kernel of `mask_gradient.cuh` is told.
#pragma once

#include "params.h"

constexpr int kGradientRows = 128;  // of a tile of the mask

// Columns of a tile, for operands in so many parts.
constexpr int gradient_columns(int parts) { return parts == 1 ? 128 : 64; }

// dM = (dO Vᵀ) ⊙ (Q Kᵀ), summed over the pairs of batch and head that share an entry of the mask.
struct MaskGradientParams {
  TiledTensor q, grad_o, k, v;  // (B, heads × parts, queries, d), (.., queries, e), (.., keys, d), (.., keys, e)
  void* out;                    // (mask_batch, mask_heads, queries, keys), in float32 or the operands' type
  int in_float32;
  // (shares, mask_batch, mask_heads, queries, keys), or null with one share: pairs are divided among shares.
  float* partial;
  int batch, heads, mask_batch, mask_heads;
  int queries, keys, d, e;
  int parts, shares, row_tiles, column_tiles;
  int64_t units;  // pieces of work
};

// With the sum of shares.
cudaError_t run_mask_gradient_bfloat16(const MaskGradientParams& p, int multiprocessors, cudaStream_t stream);
cudaError_t run_mask_gradient_float16(const MaskGradientParams& p, int multiprocessors, cudaStream_t stream);
