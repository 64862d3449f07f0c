// Masked linear attention of narrow heads: what the kernel of `masked_pass.cuh` is told.
#pragma once

#include "params.h"

// out = ((x yᵀ) ⊙ M) z, of one problem or of two that share the mask; the second one's streams are those of the first
// with their places changed. Rows are those of x and out, columns those of y and z.
struct MaskedParams {
  struct Problem {
    TiledTensor x;  // (B, heads, rows, width)
    void* out;      // (B, out heads, rows, out_width), contiguous
    int out_width;
  } problems[2];
  TiledTensor y, z;     // (B, heads, columns, width)
  TiledTensor mask;     // (B or 1, H or 1, rows, columns), or with `transposed` (.., columns, rows)
  const uint8_t* used;  // of each 64 × 64 tile of the mask, whether it is not all zero; null: all may be
  int used_rows, used_columns, used_heads;
  int transposed;
  int number;        // of problems
  int batch, heads;  // query heads
  int shares;        // neighbouring heads that are added up in one of out
  int rows, columns;
  int row_tiles;
  int units;  // pieces of work: tiles of rows of out
};

constexpr int kMaskTile = 64;       // tokens, of `used`
constexpr int kPairsTogether = 32;  // rows of the batch and heads whose tiles are neighbours in the order of work

// Warpgroups of 64 rows each, and columns of a stage.
struct MaskedTile {
  int groups, columns;
};
constexpr MaskedTile masked_tile(int width, int problems, int parts, bool tf32, bool float_mask) {
  if (width > 64 || problems == 2 || parts > 1 || tf32) return {2, 64};
  return float_mask ? MaskedTile{3, 64} : MaskedTile{2, 128};
}

// Heads no wider than `width`, 64 or 128; of float32 64, as three bfloat16 parts or as `tf32`, with z transposed: (B,
// heads, width, columns), each 8 columns in the order 0, 2, 4, 6, 1, 3, 5, 7.
cudaError_t run_masked_bfloat16(MaskedParams& p, int width, bool float_mask, int multiprocessors, cudaStream_t stream);
cudaError_t run_masked_float16(MaskedParams& p, int width, bool float_mask, int multiprocessors, cudaStream_t stream);
cudaError_t run_masked_float32(MaskedParams& p, bool tf32, int multiprocessors, cudaStream_t stream);
