// Masked attention of wide heads: what the kernels of `masked_scores.cuh` and `masked_products.cuh` are told.
#pragma once

#include "wide.h"

constexpr WideTile kPartsTile = {128, 128};  // of operands in parts; else kSquareTile or kLongTile

// A range of the scores, which is in memory at a time: whole pairs of batch and head, or queries and keys of one pair.
struct Slab {
  int pair, pairs, row, rows, key, keys;
  int width;  // of a row in memory: keys, and zeros up to a multiple of 8
};

enum class MaskType : int { kBool, kTwoBytes, kFloat32 };

// A mask (B, H, queries, keys) of any strides, in elements.
struct MaskView {
  const void* data;
  int64_t batch, head, row, column;
  MaskType type;
  int in_pairs;  // whether two neighbours of a row, the first one even, are adjacent, aligned, and both there
};

// out = (rows columnsᵀ) ⊙ mask
struct MaskedScores {
  TiledTensor rows, columns;  // (B, heads × parts, queries, depth), (B, heads × parts, keys, depth)
  void* out;                  // (pairs, parts, rows, width) of the slab
  int depth;
};

struct MaskedScoresParams {
  MaskedScores scores[2];
  int number;
  TiledTensor mask_boxes;  // the mask, where the copy engine can read it
  int has_boxes;
  MaskView mask;
  Slab slab;
  int heads, queries, keys, parts;
  int row_tiles, column_tiles;
  int64_t units;  // pieces of work
};

// out = scores w, or scoresᵀ w, of one slab or of several after each other.
struct MaskedProduct {
  TiledTensor scores;  // (pairs, parts, rows, width) of the slab
  TiledTensor w;       // (B, heads × parts, tokens, width)
  void* out;           // (B, heads, length, width), in float32 where operands are parts
  float* sums;  // what slabs have added up so far, as threads hold it: (tiles, kN / 8, threads, 4); null for one slab
  int begins, ends;  // whether this slab is the first, or the last, to add to these rows
  int transposed;
  int length, first, rows;  // rows of out: all, and those that the slab adds to
  int token, tokens;        // of w, that the slab weighs
  int width, row_tiles, column_tiles;
};

constexpr int kMostProducts = 3;

struct MaskedProductsParams {
  MaskedProduct products[kMostProducts];
  int number;
  int pair, pairs, heads, parts;  // pair: the slab's first
  int64_t units;                  // pieces of work
};

cudaError_t run_masked_scores_bfloat16(const MaskedScoresParams& p, WideTile tile, int multiprocessors,
                                       cudaStream_t stream);
cudaError_t run_masked_scores_float16(const MaskedScoresParams& p, WideTile tile, int multiprocessors,
                                      cudaStream_t stream);
cudaError_t run_masked_products_bfloat16(const MaskedProductsParams& p, WideTile tile, int multiprocessors,
                                         cudaStream_t stream);
cudaError_t run_masked_products_float16(const MaskedProductsParams& p, WideTile tile, int multiprocessors,
                                        cudaStream_t stream);
