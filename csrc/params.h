// What a pass over the sequences is told: shared by the kernels and the binding.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

enum class ElementType { kFloat32, kBfloat16, kFloat16 };

// Strides, in elements, of a state S (sequences, H, D, E).
struct StateStrides {
  int64_t sequence, head, d, e;
};

// A tensor (B, heads, T, width) of any strides, last dim contiguous; in elements.
struct View {
  const void* data;
  int64_t batch, head, token;
  int group;  // query heads that share a head
};

// Of a box that the copy engine moves.
struct Corner {
  int column, token, panel, head, batch;
};

// The same for the copy engine: dims (columns, T, panels of 64 columns, heads, B).
struct TiledTensor {
  CUtensorMap map;
  int batch;    // 0: one row of the batch serves all
  int group;    // query heads that share a head
  int at_once;  // whether one copy takes all panels of a tile; else each is a copy, at its column

  // Where the box that begins with a panel does.
  __device__ Corner corner(int panel, int token, int head, int row) const {
    return at_once ? Corner{0, token, panel, head, row} : Corner{panel * 64, token, 0, head, row};
  }
};

// Lengths are copied from the last token before that 4 divides: the copy engine begins where 16 bytes do.
constexpr int kLengthsAtOnce = 64 + 4;

constexpr double kMinLength = 1e-6;  // shorter vectors are divided by it: MIN_LENGTH of ops/numerics.py

// Which vectors are divided by their length: q and k, r and c in equations (1) and (2) of README.md, by lengths that
// the pass measures or that were kept; or v, by lengths that were kept.
enum class Norm : int { kNone = 0, kMeasured = 1, kKept = 2, kValues = 3 };

// What a pass makes: one output; the gradients of k and v together; or those of each two neighbouring heads, added up.
enum class Outputs : int { kOne, kBoth, kSums };

// Where a piece of a sequence lies. Pieces of one sequence are neighbours in the list.
struct Segment {
  int sequence, start, length;
  int ends;  // bit 0: begins its sequence, bit 1: ends it
};

struct PassParams {
  // (B, heads, T, width), of 2-byte types. x is the gradient of the output where gradients of k and v are made
  // together, else the vectors through whose unit length the output, a gradient, is taken.
  TiledTensor q, k, v, x;
  // 1 / |x|, (B, heads, T) in float32: of q and k, which are written where `keeps` and the output is made; else they
  // are read, of vectors in the places of r and c in equations (1) and (2) of README.md, or of x and those in the place
  // of c.
  CUtensorMap row_lengths, column_lengths;
  float *kept_rows, *kept_columns;  // the same where the copy engine can't write, a row every kept_stride
  int64_t kept_stride;
  int kept_group;  // query heads that share a head of k
  int keeps;
  View q_view, k_view, v_view;  // the same tensors, where the copy engine is not used
  // (B, H, T, E), contiguous, in the inputs' type; (B, H, T, D), the gradient of k, where it is made together with that
  // of v; or (tiles of D, B, H, T, E) in float32, to be added up.
  void *out, *out_of_k;
  TiledTensor out_tiles, out_of_k_tiles;
  float* partial;
  const float* log_decay;  // (H,) or null
  const float* initial;    // null: zeros
  StateStrides initial_strides;
  float* final;                // may be null
  StateStrides final_strides;  // also of final_grad
  View grad_view;              // gradients of the output and the final state, for that of the decay
  const float* final_grad;
  // The state from segment to segment. By the copy engine's passes: two states for each head and tile, how many
  // segments each of 4 warps has done with, and how many pieces of work were taken; counts and ticket begin at 0.
  float* chain;
  int *counts, *ticket;
  // In float32: (B × segments, H, D, E), the state after each segment. Wide heads take `scan_kernel` for the same.
  float* carry;
  StateStrides carry_strides;
  // Of packed sequences, else null. One more entry: how many are used; 1 if all sequences are whole; -1 for bad bounds.
  const Segment* table;
  int positions;  // length of the table without that entry, or segments of a row
  int segments;   // of each row of the batch, were it one sequence
  int segment_length;
  int batch, heads, tokens, d, e;
  int d_tiles, e_tiles;
  int reverse;
  Norm norm;
  Outputs outputs;
};
