// Heads whose state no multiprocessor holds: what the kernels of `wide_prepare.cuh` and `wide_outputs.cuh` are told.
#pragma once

#include "params.h"

constexpr int kMostChunk = 2048;  // tokens of a chunk of wide heads, at most

// What `find_work` of segments.cuh needs: into which pieces sequences are cut, and the direction.
struct Pieces {
  const Segment* table;  // as in PassParams
  int positions, segments, segment_length, tokens, reverse;
};

// States before chunks and scores inside of them, for `wide_outputs.cuh`.
struct PrepareParams {
  TiledTensor a, b;           // (B, heads, T, D) and (B, heads, T, E): the state gains aᵀ b
  TiledTensor rows, columns;  // (B, heads, T, depth): what scores are products of
  void* states;             // (B × chunks of T tokens, H, D, E) in the inputs' type: after the chunk that begins there
  void* scores;             // (B, H, T, chunk) in the inputs' type
  Pieces segments, chunks;  // what states walk over from end to end, and of what scores are
  const float* log_decay;   // (H,) or null
  const float* initial;     // null: zeros
  StateStrides initial_strides;
  float* final;  // may be null
  StateStrides final_strides;
  float* carry;  // (B × segments, H, D, E): the state after each segment; null where sequences are whole
  StateStrides carry_strides;
  int sums;  // whether only the state after each segment is wanted, in `carry`: begun with `initial` or with zeros
  int batch, heads, d, e, depth, chunk, reverse;
  int d_tiles, e_tiles, score_tiles;  // of the state, and of a chunk's scores
  int64_t state_units, score_units;   // pieces of work
  int* ticket;                        // set to 0, for the outputs that follow
};

// out = r (x S) + P w with what was prepared, or with the transpose of S and P.
struct WideOutput {
  TiledTensor x, w;             // (B, heads, T, depth), (B, heads, T, width)
  TiledTensor states, initial;  // initial: of sequences, in the inputs' type
  TiledTensor scores;
  void* out;                      // (B, H, T, width)
  int has_initial;                // whether sequences begin with a state
  int transposed_state, reverse;  // reverse: the next chunk's state is read, and scores are transposed
  int depth, width, tiles;
};

constexpr int kMostOutputs = 3;

struct WideOutputParams {
  WideOutput outputs[kMostOutputs];
  int number;
  Pieces chunks;
  const float* log_decay;
  int batch, heads;
  int row_tiles;   // of a chunk
  int last_first;  // whether the last chunks of rows come first: they were prepared last
  int64_t units;   // pieces of work
  int* ticket;     // how many of them were taken, 0 at first
};

// Rows and columns of the products' tiles: kSquareTile or kLongTile.
struct WideTile {
  int rows, columns;
};

constexpr WideTile kSquareTile = {192, 192}, kLongTile = {128, 256};

cudaError_t run_prepare_bfloat16(const PrepareParams& p, WideTile tile, cudaStream_t stream);
cudaError_t run_prepare_float16(const PrepareParams& p, WideTile tile, cudaStream_t stream);
cudaError_t run_wide_outputs_bfloat16(const WideOutputParams& p, WideTile tile, int multiprocessors,
                                      cudaStream_t stream);
cudaError_t run_wide_outputs_float16(const WideOutputParams& p, WideTile tile, int multiprocessors,
                                     cudaStream_t stream);
