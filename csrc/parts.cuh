// Large products of wide heads whose operands may be float32 numbers in parts, and how blocks share them out.
#pragma once

#include "masked_wide.h"
#include "split.cuh"
#include "wide.cuh"

// Sizes of a tile, of operands in kParts; 1: of a 2-byte type, as they are.
template <class Element, int kGroups, int kN, int kParts_ = 1>
struct InParts : Wide<Element, kGroups, kN> {
  static constexpr int kParts = kParts_, kProducts = kParts * (kParts + 1) / 2;
  static_assert(kParts == 1 || std::is_same_v<Element, __nv_bfloat16>);
};

// A head of a tensor (B, heads × parts, T, width).
__device__ inline HeadOf part_of(const TiledTensor& tensor, int head, int batch, int parts, int part) {
  HeadOf of(tensor, head, batch);
  of.head = of.head * parts + part;
  return of;
}

template <class T>
struct PartsConsumer : Consumer<T> {
  using Consumer<T>::Consumer;

  static constexpr int kAtOnce = 4;  // stages whose sum the tensor cores make

  // acc = a product whose sum is `count` stages long. Tensor cores cut sums off where they should round, and with 3
  // parts that is seen: long sums are made outside of them.
  template <int kTransposeLeft, int kTransposeRight>
  __device__ void product(int count) {
    const auto nothing = [](int) {};
    if constexpr (T::kParts < 3) {
      this->clear();
      this->template multiply<kTransposeLeft, kTransposeRight>(count * T::kProducts, nothing);
    } else {
      float sum[T::kN / 2] = {};
      for (int left = count * T::kProducts; left > 0; left -= kAtOnce) {
        this->clear();
        this->template multiply<kTransposeLeft, kTransposeRight>(min(left, kAtOnce), nothing);
#pragma unroll
        for (int x = 0; x < T::kN / 2; ++x) sum[x] += this->acc[x];
      }
#pragma unroll
      for (int x = 0; x < T::kN / 2; ++x) this->acc[x] = sum[x];
    }
  }
};

// Blocks of which each takes every gridDim-th unit of work: make(unit).
template <class Make>
__device__ void each_unit(int64_t units, Make make) {
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) make(int(unit));
}

// What a block does with all its units: produce(producer, unit) by the thread that copies, Maker::make(unit) by the
// warpgroups that multiply.
template <class T, class Maker, class Params, class Produce>
__device__ void work_through(const Params& p, Produce produce) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<WideShared<T>*>(memory);
  init_barriers(shared);
  by_role<T>(
      [&] {
        Producer<T> me{shared};
        each_unit(p.units, [&](int unit) { produce(me, unit); });
      },
      [&](int group) {
        Maker me(p, shared, group);
        each_unit(p.units, [&](int unit) { me.make(unit); });
      });
}

// run(T), with the sizes of a tile of operands in so many parts.
template <class Element, class Run>
cudaError_t with_parts(WideTile tile, int parts, Run run) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    if (parts == 2) return run(InParts<Element, kPartsTile.rows / 64, kPartsTile.columns, 2>{});
    if (parts == 3) return run(InParts<Element, kPartsTile.rows / 64, kPartsTile.columns, 3>{});
  }
  return tile.rows == kSquareTile.rows ? run(InParts<Element, kSquareTile.rows / 64, kSquareTile.columns>{})
                                       : run(InParts<Element, kLongTile.rows / 64, kLongTile.columns>{});
}
