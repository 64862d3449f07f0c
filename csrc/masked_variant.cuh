// The sizes of a compiled kernel of masked attention, the work of its blocks, and what a block shares.
#pragma once

#include <type_traits>

#include "async.cuh"
#include "masked.h"
#include "tile.cuh"

// kProblems: 1 or 2; kParts: how many bfloat16 numbers a value is split in; kGroups: warpgroups that multiply; kN:
// columns of a stage.
template <class Element_, class Weight_, int kWidth_, int kProblems_, int kParts_, int kGroups_, int kN_>
struct Masked {
  using Element = Element_;
  using Weight = Weight_;  // of the mask, Element or float
  static constexpr int kWidth = kWidth_, kProblems = kProblems_, kParts = kParts_, kGroups = kGroups_, kN = kN_;
  static constexpr bool kTf32 = std::is_same_v<Element, float>;
  static constexpr int kPanelColumns = kPanelRow / int(sizeof(Element));
  static constexpr int kRows = 64 * kGroups, kPanels = kWidth / kPanelColumns;
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  // The tensor cores cut sums off where they should round: where that counts, long ones are made outside.
  static constexpr bool kOutside = kParts == 3;
  static constexpr bool kFloat = kParts > 1 || kTf32, kFloatMask = std::is_same_v<Weight, float>;
  // Of float32 x is read from registers: a product 64 wide is else bound by shared memory.
  static constexpr bool kKeepX = kFloat;
  // Problems whose scores are made at a time: registers hold no more of wide ones.
  static constexpr int kTogether = kWidth == 64 && kN == 64 ? kProblems : 1;
  static constexpr int kXPanelBytes = kRows * kPanelRow, kYPanelBytes = kN * kPanelRow;
  static constexpr int kXBytes = kPanels * kXPanelBytes, kYBytes = kPanels * kYPanelBytes;
  // Tensor cores take 4-byte numbers along the sum alone: z comes transposed, its columns along rows.
  static constexpr int kZPanels = kTf32 ? kN / kPanelColumns : kPanels;
  static constexpr int kZPanelBytes = (kTf32 ? kWidth : kN) * kPanelRow;
  static_assert(kZPanels * kZPanelBytes == kYBytes);
  static constexpr int kMaskPanel = kPanelRow / int(sizeof(Weight));  // columns of a panel of the mask
  static constexpr int kMaskBytes = kRows * kN * int(sizeof(Weight));
  static constexpr int kStageBytes = 2 * kParts * kYBytes + kMaskBytes;
  static constexpr int kStagingBytes = kFloat ? 1024 : kGroups * kPanelBytes;
  static constexpr int kFit = (226 * 1024 - kProblems * kParts * kXBytes - kStagingBytes) / kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static_assert(kStages >= 2);
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8, kProducerRegisters = 40;
  static constexpr int kFree = ((kGroups + 1) * kFirstRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kFree < 240 ? kFree : 240;
};

// A tile of rows of out.
struct MaskedUnit {
  int batch, head, first;  // head: of out; first: row

  // Tiles of rows of some heads are neighbours: those at work at a time read the same of the mask, and of y and z.
  __device__ MaskedUnit(const MaskedParams& p, int index, int tile_rows) {
    const int heads = p.heads / p.shares, pairs = p.batch * heads, per_group = kPairsTogether * p.row_tiles;
    const int group = index / per_group, rest = index % per_group;
    const int together = min(kPairsTogether, pairs - group * kPairsTogether);
    const int pair = group * kPairsTogether + rest % together;
    batch = pair / heads, head = pair % heads, first = rest / together * tile_rows;
  }
};

// The block's units: its turns go forth and back, so that all blocks have as much where work grows along the order.
// Returns -1 behind the last one.
__device__ inline int unit_of_turn(const MaskedParams& p, int& turn) {
  const int blocks = gridDim.x, at = turn % 2 ? blocks - 1 - blockIdx.x : blockIdx.x, index = turn * blocks + at;
  ++turn;
  return index < p.units ? index : -1;
}

template <class T>
struct alignas(1024) MaskedShared {
  uint8_t x[T::kProblems][T::kParts][T::kXBytes];
  uint8_t stages[T::kStages][T::kStageBytes];  // parts of y, parts of z, the mask
  uint8_t staging[T::kStagingBytes];
  int last[T::kStages];  // whether it is the last one of a unit
  Barrier x_full, x_empty, full[T::kStages], empty[T::kStages];
};

template <class Element, class Weight, int kWidth, int kProblems, int kParts>
struct MaskedOf {
  static constexpr MaskedTile kTile =
      masked_tile(kWidth, kProblems, kParts, std::is_same_v<Element, float>, std::is_same_v<Weight, float>);
  using T = Masked<Element, Weight, kWidth, kProblems, kParts, kTile.groups, kTile.columns>;
};
