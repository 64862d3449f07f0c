// What masked attention's tensors become before its kernels read them.
#pragma once

#include "params.h"

// A mask (B or 1, H or 1, rows, columns) of any strides, in elements: whether its tiles are used, and a copy of it that
// the copy engine takes, which is left out where it takes the mask itself.
struct MaskParams {
  const void* mask;
  int64_t batch_stride, head_stride, row_stride, column_stride;
  int heads, rows, columns;
  int64_t entries;  // B or 1 times H or 1
  void* copy;       // (entries, rows, width); may be null
  int width;
  int in_pieces;  // whether there is no copy, and rows are made of 16 bytes that may be read at once
  uint8_t* used;  // (entries, tiles of rows, tiles of columns), MaskedParams; may be null
};
// `of` 1 byte (bool), 2 or 4 bytes; the copy has the type `to`.
cudaError_t run_mask(const MaskParams& p, ElementType to, bool of_bool, cudaStream_t stream);

// float32 x (B, heads, T, width), of any strides but the last, as a sum of bfloat16 numbers: (B, heads, parts, T,
// padded width), each the rest that the ones before leave. Equation (12) of README.md.
struct SplitParams {
  View x;
  void* out;
  int64_t rows;  // B × heads × T
  int heads, tokens, width, padded, parts;
};
cudaError_t run_split(const SplitParams& p, cudaStream_t stream);

// float32 x (B, heads, T, width), rows of whole 16 bytes, as `run_masked_float32` takes x and y of tf32, rounded, or z,
// turned as well: (B, heads, width, padded T), zeros behind the end.
struct TurnParams {
  View x;
  float *turned, *rounded;  // either may be null
  int64_t pairs;            // B × heads
  int heads, tokens, padded, width;
};
cudaError_t run_turn(const TurnParams& p, cudaStream_t stream);
