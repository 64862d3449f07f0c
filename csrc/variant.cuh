// One compiled pass for Hopper: its sizes, what a block shares, and the order of its chunks.
#pragma once

#include "async.cuh"
#include "params.h"
#include "segments.cuh"
#include "tile.cuh"

constexpr int kChunk = 64;       // tokens
constexpr int kWarpgroup = 128;  // threads
constexpr int kMeasuring = 96;   // threads
constexpr int kPanelBytes = kChunk * kPanelRow;

// One compiled kernel. kD, kE: tile of the state; kNorm: divides by lengths; kOutput: without, only states are made.
template <class Element_, int kD_, int kE_, bool kNorm_, bool kOutput_>
struct Variant {
  using Element = Element_;
  static constexpr int kD = kD_, kE = kE_;
  static constexpr bool kNorm = kNorm_, kOutput = kOutput_;
  static constexpr int kAttending = kE / 64;  // warpgroups
  static constexpr int kThreads = (kAttending + 2) * kWarpgroup;
  static constexpr int kBlocks = kD == 64 ? 2 : 1;  // on a multiprocessor
  static constexpr int kQPanels = kOutput ? kD / kPanel : 0, kKPanels = kD / kPanel, kVPanels = kE / kPanel;
  static constexpr int kVectorPanels = kOutput && kNorm ? kVPanels : 0;  // of `through`
  static constexpr int kTileBytes = (kQPanels + kKPanels + kVPanels) * kPanelBytes;
  static constexpr int kStageBytes = kTileBytes + kVectorPanels * kPanelBytes;
  static constexpr int kBuffers = 2;  // of what `score` makes
  // As many stages as fit, with 6 KiB for what is small.
  static constexpr int kStages =
      (227 * 1024 / kBlocks - 6 * 1024 - kBuffers * (kVPanels + (kOutput ? 1 : 0)) * kPanelBytes) / kStageBytes;
  // Registers of a thread: what a block starts with, a multiple of 8, is shared out among its warpgroups.
  static constexpr int kFirstRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static constexpr int kFetchRegisters = 40, kScoreRegisters = kBlocks == 2 ? 88 : 120;
  static constexpr int kLeft =
      ((kAttending + 2) * kFirstRegisters - kFetchRegisters - kScoreRegisters) / kAttending / 8 * 8;
  static constexpr int kAttendRegisters = kLeft < 240 ? kLeft : 240;
};

template <class V>
struct alignas(1024) SharedStorage {
  uint8_t stages[V::kStages][V::kStageBytes];
  uint8_t scaled_values[V::kBuffers][V::kVPanels * kPanelBytes];
  uint8_t scores[V::kOutput ? V::kBuffers : 0][kPanelBytes];
  unsigned long long nonfinite[V::kBuffers][V::kE];  // tokens of the chunk, of each column of v
  int any_nonfinite[V::kBuffers];
  float reading[V::kBuffers][kChunk];  // what token i reads the state with
  float powers[kChunk + 1];
  float weights[2 * kChunk];                                           // λ^|i-j| at i - j + kChunk, or -1 where masked
  double2 along[V::kVectorPanels > 0 ? 2 : 0][V::kAttending][kChunk];  // of each token: out · x and x · x
  float row_scale[V::kStages][kChunk], column_scale[V::kStages][kChunk];
  Barrier full[V::kStages], measured[V::kStages], empty[V::kStages];
  Barrier ready[V::kBuffers], used[V::kBuffers];
};

// Tiles of a stage.
template <class V>
struct Stage {
  uint8_t *q, *k, *v, *x;

  __device__ Stage(SharedStorage<V>& shared, int stage)
      : q(shared.stages[stage]),
        k(q + V::kQPanels * kPanelBytes),
        v(k + V::kKPanels * kPanelBytes),
        x(v + V::kVPanels * kPanelBytes) {}
};

// The chunks of a segment in the order of the pass.
struct Walk {
  int chunks, length;
  bool reverse;

  __device__ Walk(const Work& work, bool reverse)
      : chunks((work.length + kChunk - 1) / kChunk), length(work.length), reverse(reverse) {}
  __device__ int start(int step) const { return (reverse ? chunks - 1 - step : step) * kChunk; }
  __device__ int tokens(int step) const { return min(kChunk, length - start(step)); }
};

// Parity of the phase that a barrier of `count` is in at a step.
__device__ inline int parity(int step, int count) { return step / count & 1; }
