// The list of compiled passes, each for both 2-byte types.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

// VARIANT(kD, kE, norm, outputs): a tile of the state; which vectors are divided by their length; which outputs it
// makes. The smallest tile that holds q and k is used, and several where v is wider. Heads wider than 256 are those of
// wide.h.
#define FOR_EACH_VARIANT(VARIANT)    \
  VARIANT(64, 64, kNone, kOne)       \
  VARIANT(64, 64, kMeasured, kOne)   \
  VARIANT(64, 64, kValues, kOne)     \
  VARIANT(64, 64, kNone, kBoth)      \
  VARIANT(64, 64, kKept, kBoth)      \
  VARIANT(128, 128, kNone, kOne)     \
  VARIANT(128, 128, kMeasured, kOne) \
  VARIANT(128, 128, kValues, kOne)   \
  VARIANT(128, 128, kNone, kBoth)    \
  VARIANT(128, 128, kNone, kSums)    \
  VARIANT(128, 128, kKept, kBoth)    \
  VARIANT(128, 128, kKept, kSums)    \
  VARIANT(192, 64, kNone, kOne)      \
  VARIANT(192, 64, kMeasured, kOne)  \
  VARIANT(192, 64, kKept, kOne)      \
  VARIANT(192, 64, kValues, kOne)    \
  VARIANT(256, 64, kNone, kOne)      \
  VARIANT(256, 64, kMeasured, kOne)  \
  VARIANT(256, 64, kKept, kOne)      \
  VARIANT(256, 64, kValues, kOne)

struct Tile {
  int d, e;
};

// Tile for a state of d × e.
inline Tile tile_of(int d, int e) {
  if (d <= 64 && e <= 64) return {64, 64};
  if (d <= 128) return {128, 128};
  return d <= 192 ? Tile{192, 64} : Tile{256, 64};
}

// The tile of the kernels for float32 and for the gradient of the decay.
constexpr Tile kFloat32Tile = {128, 64};

// Run a pass over `pieces` of work, segments of heads.
cudaError_t run_pass_bfloat16(const PassParams& p, Tile tile, int pieces, int multiprocessors, cudaStream_t stream);
cudaError_t run_pass_float16(const PassParams& p, Tile tile, int pieces, int multiprocessors, cudaStream_t stream);
// Without `output` it only makes the states of segments. `exact`: as precise as float32, else tf32.
cudaError_t run_pass_float32(const PassParams& p, bool output, bool exact, int64_t blocks, cudaStream_t stream);

// Sum of do ⊙ ∂o / ∂log λ and dS ⊙ ∂S / ∂log λ, one number a block, to p.partial.
cudaError_t run_decay_gradient(const PassParams& p, ElementType type, bool exact, int64_t blocks, cudaStream_t stream);

// Adds to each segment's state what came before its segment.
cudaError_t run_scan(const PassParams& p, int64_t slots, cudaStream_t stream);

// Cuts packed sequences into segments, unless none is longer than `whole`: table (slots + 1).
cudaError_t run_plan(const int* cu_seqlens, int sequences, int tokens, int segment_length, int whole, Segment* table,
                     int slots, cudaStream_t stream);
