// One compiled pass for Hopper: its sizes, and what the warpgroups of a block share.
#pragma once

#include "async.cuh"
#include "params.h"
#include "segments.cuh"
#include "tile.cuh"

constexpr int kChunk = kPanel;   // tokens
constexpr int kInspecting = 64;  // threads

// One compiled kernel. kD, kE: tile of the state.
template <class Element_, int kD_, int kE_, Norm kNorm_, Outputs kOutputs>
struct Variant {
  using Element = Element_;
  static constexpr int kD = kD_, kE = kE_;
  static constexpr Norm kNorm = kNorm_;
  static constexpr bool kBoth = kOutputs != Outputs::kOne,
                        kSums = kOutputs == Outputs::kSums;  // two outputs, added up or not
  static constexpr bool kLengths = kNorm != Norm::kNone;
  static constexpr bool kMeasures = kNorm == Norm::kMeasured;  // lengths; else they come with the tiles
  static constexpr bool kReadsLengths = kLengths && !kMeasures, kRowLengths = kLengths && kNorm != Norm::kValues;
  // Whether the output is taken through unit length, of vectors that come when there is room for them, or the second
  // is.
  static constexpr bool kLate = kNorm == Norm::kValues && kD == kE, kThrough = kLate || (kBoth && kLengths);
  static constexpr bool kReadsRows = kThrough || kNorm == Norm::kKept;
  // Who looks for values that are not finite: the state at a, `inspect` at b, or lengths say it.
  static constexpr bool kLooksAtA = kNorm != Norm::kValues, kLooksAtB = kBoth && !kLengths;
  // Who makes the state's copy visible to the tensor cores: the state, where the outputs have less time, or they.
  static constexpr bool kStateFences = kBoth || kE < kD;
  static constexpr int kThreads = 4 * kWarpgroup;
  // Registers of a thread, of the 512 that four warpgroups share: what the compiler needs without spilling.
  static constexpr bool kSmall = kD * kE <= 64 * 64, kDeep = kD > 128;
  static constexpr int kFirstRegisters = 128;
  static constexpr int kFetchRegisters = kSmall ? 72 : 48;
  static constexpr int kStateRegisters = kSmall ? 152 : kDeep ? 192 : 208;
  static constexpr int kOutputRegisters = (512 - kFetchRegisters - kStateRegisters) / 16 * 8;
  static constexpr int kQPanels = kD / kPanel, kVPanels = kE / kPanel;  // q and k; v and x
  static constexpr int kTileBytes = (2 * kQPanels + kVPanels) * kPanelBytes;
  static constexpr int kStageBytes = kTileBytes + (kBoth ? kVPanels * kPanelBytes : 0);
  static constexpr int kStateBytes = kD * kE * 2;
  static constexpr int kStates = 2;  // copies of the state that outputs are read from; of float32 there is room for one
  // What a stage needs beside its tiles: Notes, Chunk, barriers and, where they are used, lengths; at most.
  static constexpr int kNotes = kChunk * (16 + 24 * kLengths + 8 * kThrough) + 256 + 8 * (1 + kBoth) * kE;
  static constexpr int kSumBytes = kSums ? kVPanels * kPanelBytes : 128;
  // As many stages as fit; 1 KiB of the 227 is left for what there is once.
  static constexpr int kFit = (226 * 1024 - kStates * kStateBytes - kSumBytes) / (kStageBytes + kNotes);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  // Whether state and outputs begin with a stage before its weights are known: of few stages all time counts.
  static constexpr bool kEarly = kStages == 2 && !kMeasures;
};

enum class Kind : int {
  kAdvance,  // only the state moves on, to find what a segment adds to it
  kOutput,
  kEnd,
};

// What `fetch` says of all chunks of a segment.
struct alignas(16) Stretch {
  int starts, ends;  // whether the segment is that of its sequence
  int length;
  int sequence, batch, head, e_tile;
  int chain, position;  // of the head and tile, and of the segment in it, in the order of the pass
  int in_turn;          // whether states are handed on along the chain
  float log_lambda;
};

// And of the one in a stage.
struct Chunk : Stretch {
  Kind kind;
  int token, n;     // the first one in its row, and how many
  int first, last;  // whether it is the first, the last of its segment, in the order of the pass

  // Whether rows of the tiles belong to another sequence.
  __device__ bool cut_off(const PassParams& p) const { return n < kChunk && p.table != nullptr; }
};

// What there is to know of a stage, by token of the chunk: `inspect` finds it, lengths the outputs too.
template <class V>
struct Notes {
  float log_lambda;  // of which the weights are, for chunks of n tokens
  int n;
  float carried;                     // λ^n
  float weights[2 * kChunk];         // λ^|i-j| at i - j + kChunk, or -1 where masked
  alignas(8) float writing[kChunk];  // what token j weighs in the state
  float reading[kChunk];             // what token i reads the state with
  alignas(8) float columns[V::kLengths ? kChunk : 1];
  float rows[V::kRowLengths ? kChunk : 1];                                   // 1 / |x| of what scores are made of
  alignas(8) float scaled[V::kLengths ? kChunk : 1];                         // writing, times columns
  float inverse[V::kThrough ? kChunk : 1], along[V::kThrough ? kChunk : 1];  // of rows: Length of lengths.cuh
  // Whether warps found something that is not finite in the values of the first output and the second.
  int nonfinite[2][kWarpgroup / 32];
  unsigned long long bad[1 + V::kBoth][V::kE];  // which tokens, for each column; else undefined
};

// 1 / |x| of the vectors of a chunk. Those that were kept begin 0 to 3 tokens before it.
struct alignas(128) Lengths {
  float values[kLengthsAtOnce];

  __device__ float of(const Chunk& chunk, int token) const { return values[token + chunk.token % 4]; }
};

template <class V>
struct alignas(1024) SharedStorage {
  uint8_t stages[V::kStages][V::kStageBytes];
  uint8_t states[V::kStates][V::kStateBytes];        // transposed: kE rows in panels of 64 of the kD columns
  uint8_t sum[V::kSumBytes];                         // of this block's output and its neighbour's
  Lengths lengths[V::kLengths ? V::kStages : 1][2];  // row_lengths and column_lengths of PassParams
  Chunk chunks[V::kStages];
  Stretch next;  // of `fetch`, which has no registers for it: the segment it copies
  int piece;     // and which piece of work that is
  Notes<V> notes[V::kStages];
  // A stage is full when its tiles have come, ready when they are inspected, measured when lengths are known, empty
  // when all are done with it. Before that the state has advanced; and of outputs alone, values were looked at, scores
  // are made, vectors through which a gradient goes are read, or with kLate have come, and outputs are put down.
  Barrier full[V::kStages], ready[V::kStages], measured[V::kStages], empty[V::kStages];
  Barrier looked[V::kStages], advanced[V::kStages], scored[V::kStages], through[V::kStages], put_down[V::kStages];
  Barrier state_full[V::kStates], state_empty[V::kStates];
  Barrier given, summed, sum_empty;  // an output has come from the neighbour, is added up, is stored
};

// Tiles of a stage. With kBoth x is do, else with kLate the vectors through whose unit length a gradient is taken.
template <class V>
struct Stage {
  uint8_t *q, *k, *v, *x;

  __device__ Stage(SharedStorage<V>& shared, int stage)
      : q(shared.stages[stage]),
        k(q + V::kQPanels * kPanelBytes),
        v(k + V::kQPanels * kPanelBytes),
        x(V::kBoth ? v + V::kVPanels * kPanelBytes : k) {}
  // The state gains aᵀ b for each token.
  __device__ uint8_t* a() const { return V::kBoth ? x : v; }
  __device__ uint8_t* b() const { return V::kBoth ? q : k; }
};

// Copies panels of a tile from memory; what lies outside of the tensor arrives as zeros.
template <int kPanels>
__device__ inline void copy_in(uint8_t* to, const TiledTensor& from, Barrier& barrier, Keep keep, int panel, int token,
                               int head, int row) {
  if (kPanels == 1 || from.at_once) {
    copy_box(to, from.map, barrier, keep, from.corner(panel, token, head, row));
  } else {
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i)
      copy_box(to + i * kPanelBytes, from.map, barrier, keep, from.corner(panel + i, token, head, row));
  }
}
