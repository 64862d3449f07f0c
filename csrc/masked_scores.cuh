// Scores of a slab times the mask, in the operands' type or in parts: what `masked_products.cuh` multiplies.
#pragma once

#include <algorithm>

#include "element.cuh"
#include "masked_wide.h"
#include "parts.cuh"

// A tile of the scores of a pair in the slab.
template <class T>
struct ScoresUnit {
  int output, pair, row, column;  // pair: in the slab; row, column: where the tile begins in it
  int batch, head;

  __device__ ScoresUnit(const MaskedScoresParams& p, int unit) {
    column = unit % p.column_tiles * T::kN, unit /= p.column_tiles;
    row = unit % p.row_tiles * T::kRows, unit /= p.row_tiles;
    output = unit % p.number, pair = unit / p.number;
    batch = (p.slab.pair + pair) / p.heads, head = (p.slab.pair + pair) % p.heads;
  }
};

// Panels of the tile's columns, and two panels of the mask, a stage: the mask comes while the last products are made.
template <class T>
__device__ void produce_scores(const MaskedScoresParams& p, Producer<T>& me, const ScoresUnit<T>& unit) {
  const MaskedScores& of = p.scores[unit.output];
  const int row = p.slab.row + unit.row, key = p.slab.key + unit.column;
  each_product<T::kParts>([&](int a, int b) {
    const HeadOf rows = part_of(of.rows, unit.head, unit.batch, T::kParts, a);
    const HeadOf columns = part_of(of.columns, unit.head, unit.batch, T::kParts, b);
    for (int panel = 0; panel * kPanel < of.depth; ++panel) {
      const int stage = me.claim();
      me.left(stage, rows, panel, row, false);
      me.right(stage, columns, panel, key, false);
    }
  });
  if (!p.has_boxes) return;
  const HeadOf mask(p.mask_boxes, unit.head, unit.batch);
  for (int panel = 0; panel < T::kPanels; panel += 2) {
    const bool two = panel + 1 < T::kPanels;
    const int stage = me.claim((two ? 2 : 1) * T::kRows * kPanelRow);
    me.left(stage, mask, key / kPanel + panel, row, false);
    if (two) me.right(stage, mask, key / kPanel + panel + 1, row, false);
  }
}

template <class T>
struct ScoresMaker : PartsConsumer<T> {
  using Element = typename T::Element;
  const MaskedScoresParams& p;

  __device__ ScoresMaker(const MaskedScoresParams& p, WideShared<T>& shared, int group)
      : PartsConsumer<T>(shared, group), p(p) {}

  __device__ void make(int index) {
    const ScoresUnit<T> unit(p, index);
    const MaskedScores& of = p.scores[unit.output];
    this->template product<0, 0>((of.depth + kPanel - 1) / kPanel);
    weigh(unit);
    const int64_t part = int64_t(p.slab.rows) * p.slab.width;
    Element* to = static_cast<Element*>(of.out) + unit.pair * T::kParts * part + int64_t(unit.row) * p.slab.width;
#pragma unroll 1
    for (int i = 0; i < T::kParts; ++i) {
      this->put_out(to + i * part + unit.column, p.slab.rows - unit.row, p.slab.width - unit.column, p.slab.width);
      if (i + 1 == T::kParts) break;
#pragma unroll
      for (int x = 0; x < T::kN / 2; x += 2) {
        const float2 rounded = unpack<Element>(pack<Element>(this->acc[x], this->acc[x + 1]));
        this->acc[x] -= rounded.x, this->acc[x + 1] -= rounded.y;
      }
    }
  }

  __device__ void weigh(const ScoresUnit<T>& unit) {
    if (p.mask.type == MaskType::kBool)
      weigh_by<uint8_t>(unit);
    else if (p.mask.type == MaskType::kFloat32)
      weigh_by<float>(unit);
    else if (p.has_boxes)
      weigh_by_boxes();
    else
      weigh_by<Element>(unit);
  }

  // The mask as put_out would leave it in shared memory.
  __device__ void weigh_by_boxes() {
    const Lane at;
#pragma unroll
    for (int panel = 0; panel < T::kPanels; panel += 2) {
      const int stage = this->next([](int) {});
#pragma unroll
      for (int x = 0; x < (panel + 1 < T::kPanels ? 8 : 4); ++x) {
        const uint32_t box = x < 4 ? this->left(stage) : this->right(stage) + this->group * kPanelBytes;
        uint32_t blocks[4];
        load_blocks<false>(blocks, box + at.block(x % 4));
        float* values = &this->acc[panel * 32 + x * 8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 weight = unpack<Element>(blocks[i]);
          values[i * 2] *= weight.x, values[i * 2 + 1] *= weight.y;
        }
      }
      fence_for_async();  // the mask is read before the next box takes its place
      this->release(stage);
      ++this->step;
    }
  }

  // The mask from where it lies. What pads the slab is zero: values times zero could still be NaN.
  template <class Value>
  __device__ void weigh_by(const ScoresUnit<T>& unit) {
    const Lane at;
    const MaskView& mask = p.mask;
    const int row = unit.row + this->group * 64 + at.row, column = unit.column + at.pair;
    const Value* from = static_cast<const Value*>(mask.data) + unit.batch * mask.batch + unit.head * mask.head +
                        (p.slab.row + row) * mask.row + (p.slab.key + column) * mask.column;
    const int rows = p.queries - p.slab.row - row, columns = p.keys - p.slab.key - column;
    if (mask.in_pairs)
      weigh_pairs(from, 8, rows, columns, [](const Value* at, bool first, bool) {
        return first ? *reinterpret_cast<const Pack<Value, 2>*>(at) : Pack<Value, 2>{};
      });
    else
      weigh_pairs(from, 8 * mask.column, rows, columns, [&](const Value* at, bool first, bool second) {
        return Pack<Value, 2>{first ? at[0] : Value(0), second ? at[mask.column] : Value(0)};
      });
  }
  // pair_of(where, whether the first and the second of two neighbours count): their values. `right`: to those 8 columns
  // on.
  template <class Value, class PairOf>
  __device__ void weigh_pairs(const Value* from, int64_t right, int rows, int columns, PairOf pair_of) {
#pragma unroll
    for (int x = 0; x < T::kN / 2; x += 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool first = i * 8 < rows && 0 < columns, second = i * 8 < rows && 1 < columns;
        const Pack<Value, 2> pair = pair_of(from + i * 8 * p.mask.row, first, second);
        float* values = &this->acc[x + i * 2];
        values[0] = first ? values[0] * float(pair.values[0]) : 0.f;
        values[1] = second ? values[1] * float(pair.values[1]) : 0.f;
      }
      from += right, columns -= 8;
      asm volatile("" : "+l"(from), "+r"(columns)::"memory");  // made ahead, addresses would fill the registers
      __builtin_assume(__isGlobal(from));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) masked_scores_kernel(const __grid_constant__ MaskedScoresParams p) {
  work_through<T, ScoresMaker<T>>(p,
                                  [&](Producer<T>& me, int unit) { produce_scores<T>(p, me, ScoresUnit<T>(p, unit)); });
}

template <class Element>
cudaError_t run_masked_scores(const MaskedScoresParams& p, WideTile tile, int multiprocessors, cudaStream_t stream) {
  return with_parts<Element>(tile, p.parts, [&](auto sizes) {
    using T = decltype(sizes);
    return launch_wide<T>(masked_scores_kernel<T>, p, std::min<int64_t>(p.units, multiprocessors), stream);
  });
}
