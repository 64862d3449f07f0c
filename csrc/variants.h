// The list of compiled passes: each row is a tile of the state, for both types, with and without norm and output.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

// TILE(kD, kE): the smallest that holds a head is used; wider heads take several of the last.
#define FOR_EACH_TILE(TILE) \
  TILE(64, 64)              \
  TILE(128, 128)            \
  TILE(256, 64)

struct Tile {
  int d, e;
};

// Tile for a state of d × e.
inline Tile tile_of(int d, int e) {
#define FITS(kD, kE) \
  if (d <= kD && e <= kE) return {kD, kE};
  FOR_EACH_TILE(FITS)
#undef FITS
  return d <= 128 ? Tile{128, 128} : Tile{256, 64};
}

// The tile of the kernels for float32 and for the gradient of the decay.
constexpr Tile kFloat32Tile = {128, 64};

// Run a pass; without `output` it only makes states.
cudaError_t run_pass_bfloat16(const PassParams& p, Tile tile, bool output, int64_t blocks, cudaStream_t stream);
cudaError_t run_pass_float16(const PassParams& p, Tile tile, bool output, int64_t blocks, cudaStream_t stream);
// `exact`: as precise as float32, else tf32.
cudaError_t run_pass_float32(const PassParams& p, bool output, bool exact, int64_t blocks, cudaStream_t stream);

// Sum of do ⊙ ∂o / ∂log λ and dS ⊙ ∂S / ∂log λ, one number a block, to p.partial.
cudaError_t run_decay_gradient(const PassParams& p, ElementType type, bool exact, int64_t blocks, cudaStream_t stream);

// Adds to each segment's state what came before its segment.
cudaError_t run_scan(const PassParams& p, int64_t slots, cudaStream_t stream);

// Cuts packed sequences into segments: table (slots + 1).
cudaError_t run_plan(const int* cu_seqlens, int sequences, int tokens, int segment_length, Segment* table, int slots,
                     cudaStream_t stream);
