// Heads whose state no multiprocessor holds: what the kernel of `wide_pass.cuh` is told.
#pragma once

#include "params.h"

constexpr int kMostChunk = 512;  // tokens of a chunk of wide heads, at most
constexpr int kMostOutputs = 3;

// What `find_work` of segments.cuh needs: into which pieces sequences are cut, and the direction.
struct Pieces {
  const Segment* table;  // as in PassParams
  int positions, segments, segment_length, tokens, reverse;
};

// out = r (x S) + P w with the states and scores of chunks, or with the transposes of S and P.
struct WideOutput {
  TiledTensor x, w;               // (B, heads, T, depth), (B, heads, T, width)
  TiledTensor states, initial;    // initial: of sequences, in the inputs' type
  TiledTensor scores, out;        // out (B, H, T, width)
  void* out_rows;                 // the same where the copy engine can't write
  int has_initial;                // whether sequences begin with a state
  int transposed_state, reverse;  // reverse: the next chunk's state is read, and scores are transposed
  int own_states, own_scores;     // whether these are made by the same pass, and waited for
  int depth, width, tiles;
};

struct WideParams {
  TiledTensor a, b;           // (B, heads, T, D) and (B, heads, T, E): the state gains aᵀ b
  TiledTensor rows, columns;  // (B, heads, T, depth): what scores are products of
  TiledTensor states;       // (B × chunks of T tokens, H, D, E) in the inputs' type: after the chunk that begins there
  TiledTensor scores;       // (B, H, T, chunk) in the inputs' type
  void* score_rows;         // the same where the copy engine can't write
  Pieces segments, chunks;  // what states walk over from end to end, and of what scores and outputs are
  const float* log_decay;   // (H,) or null
  const float* initial;     // null: zeros
  StateStrides initial_strides;
  float* final;  // may be null
  StateStrides final_strides;
  float* carry;  // (B × segments, H, D, E): the state after each segment; null where sequences are whole
  StateStrides carry_strides;
  int sums;  // whether only what a segment adds to the state is wanted, in `carry`
  WideOutput outputs[kMostOutputs];
  int number;  // of outputs
  int batch, heads, d, e, depth, chunk, reverse;
  int state_tiles, e_tiles;    // of a state, 0 where none is wanted; of its columns
  int score_tiles, row_tiles;  // of a chunk
  int chunk_units;             // pieces of work in a chunk of a head
  int at_once;                 // segments of heads whose states are walked over at a time
  int64_t units;               // pieces of work
  // How many pieces were taken; how many warpgroups have stored their part of a state (B × chunks, H), and of scores
  // (chunks, H). All 0 at first.
  int *ticket, *states_done, *scores_done;
};

// Rows and columns of the products' tiles: kSquareTile or kLongTile.
struct WideTile {
  int rows, columns;
};
constexpr WideTile kSquareTile = {192, 192}, kLongTile = {128, 256};

cudaError_t run_wide_bfloat16(const WideParams& p, WideTile tile, int multiprocessors, cudaStream_t stream);
cudaError_t run_wide_float16(const WideParams& p, WideTile tile, int multiprocessors, cudaStream_t stream);
