// The gradient of a mask: dM = (dO Vᵀ) ⊙ (Q Kᵀ), summed over the pairs of batch and head that share it.
//
// A block keeps a tile of dM in registers and walks over the pairs, of each making a tile of both products. Pairs are
// divided among `shares` where tiles alone don't fill the GPU; what these sum is added up by a second kernel.
#pragma once

#include <algorithm>

#include "element.cuh"
#include "mask_gradient.h"
#include "parts.cuh"

template <class Element, int kParts>
struct GradientTile : InParts<Element, kGradientRows / 64, gradient_columns(kParts), kParts> {
  static constexpr int kStages = 6;
};

// A tile of an entry of the mask, and a share of its pairs.
struct GradientUnit {
  int share, entry, row, column;  // row, column: where the tile begins
  int mask_batch, mask_head, heads, first, end;

  __device__ GradientUnit(const MaskGradientParams& p, int unit, int rows, int columns) {
    column = unit % p.column_tiles * columns, unit /= p.column_tiles;
    row = unit % p.row_tiles * rows, unit /= p.row_tiles;
    const int entries = p.mask_batch * p.mask_heads;
    entry = unit % entries, share = unit / entries;
    mask_batch = entry / p.mask_heads, mask_head = entry % p.mask_heads;
    heads = p.heads / p.mask_heads;
    const int64_t pairs = int64_t(p.batch / p.mask_batch) * heads;
    first = pairs * share / p.shares, end = pairs * (share + 1) / p.shares;
  }
  // Of a pair; a dim that the mask has is one step long.
  __device__ int batch_of(int pair) const { return mask_batch + pair / heads; }
  __device__ int head_of(int pair) const { return mask_head + pair % heads; }
};

template <class T>
__device__ void produce_gradient(const MaskGradientParams& p, Producer<T>& me, const GradientUnit& unit) {
  const auto stream = [&](const TiledTensor& rows, const TiledTensor& columns, int depth, int pair) {
    const int head = unit.head_of(pair), batch = unit.batch_of(pair);
    each_product<T::kParts>([&](int a, int b) {
      const HeadOf left = part_of(rows, head, batch, T::kParts, a), right = part_of(columns, head, batch, T::kParts, b);
      for (int panel = 0; panel * kPanel < depth; ++panel) {
        const int stage = me.claim();
        me.left(stage, left, panel, unit.row, false);
        me.right(stage, right, panel, unit.column, false);
      }
    });
  };
  for (int pair = unit.first; pair < unit.end; ++pair) {
    stream(p.q, p.k, p.d, pair);
    stream(p.grad_o, p.v, p.e, pair);
  }
}

template <class T>
struct GradientMaker : PartsConsumer<T> {
  using Element = typename T::Element;
  const MaskGradientParams& p;

  __device__ GradientMaker(const MaskGradientParams& p, WideShared<T>& shared, int group)
      : PartsConsumer<T>(shared, group), p(p) {}

  __device__ void make(int index) {
    const GradientUnit unit(p, index, T::kRows, T::kN);
    float scores[T::kN / 2], sum[T::kN / 2] = {};
    for (int pair = unit.first; pair < unit.end; ++pair) {
      this->template product<0, 0>((p.d + kPanel - 1) / kPanel);
#pragma unroll
      for (int x = 0; x < T::kN / 2; ++x) scores[x] = this->acc[x];
      this->template product<0, 0>((p.e + kPanel - 1) / kPanel);
#pragma unroll
      for (int x = 0; x < T::kN / 2; ++x) sum[x] += scores[x] * this->acc[x];
    }
#pragma unroll
    for (int x = 0; x < T::kN / 2; ++x) this->acc[x] = sum[x];
    const int64_t entry = int64_t(unit.share) * p.mask_batch * p.mask_heads + unit.entry;
    const int64_t at = (entry * p.queries + unit.row) * p.keys + unit.column;
    const int rows = p.queries - unit.row, columns = p.keys - unit.column;
    if (p.partial != nullptr)
      store(p.partial + at, rows, columns);
    else if (p.in_float32)
      store(static_cast<float*>(p.out) + at, rows, columns);
    else if (p.keys % 8 == 0)
      this->put_out(static_cast<Element*>(p.out) + at, rows, columns, p.keys);
    else
      store(static_cast<Element*>(p.out) + at, rows, columns);
  }

  // To memory, the first rows and columns that count. Rows of an odd length are aligned to one value only.
  template <class Out>
  __device__ void store(Out* to, int rows, int columns) {
    const Lane at;
    const int row = this->group * 64 + at.row;
    const bool aligned = p.keys % 2 == 0;
    to += int64_t(row) * p.keys + at.pair;
    rows -= row, columns -= at.pair;
#pragma unroll
    for (int x = 0; x < T::kN / 2; x += 2) {
      const int below = x / 2 % 2 * 8, column = x / 4 * 8;
      if (below >= rows || column >= columns) continue;
      Out* here = to + int64_t(below) * p.keys + column;
      const Pack<Out, 2> pair{Out(this->acc[x]), Out(this->acc[x + 1])};
      if (aligned) {
        *reinterpret_cast<Pack<Out, 2>*>(here) = pair;
      } else {
        here[0] = pair.values[0];
        if (column + 1 < columns) here[1] = pair.values[1];
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) mask_gradient_kernel(const __grid_constant__ MaskGradientParams p) {
  work_through<T, GradientMaker<T>>(
      p, [&](Producer<T>& me, int unit) { produce_gradient<T>(p, me, GradientUnit(p, unit, T::kRows, T::kN)); });
}

// Adds up what shares made, one after another.
template <class Out>
__global__ void sum_shares_kernel(const float* partial, Out* out, int64_t count, int shares) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  float sum = 0.f;
#pragma unroll 4
  for (int share = 0; share < shares; ++share) sum += partial[share * count + at];
  out[at] = Out(sum);
}

template <class Out>
cudaError_t sum_shares(const MaskGradientParams& p, cudaStream_t stream) {
  constexpr int kSumThreads = 256;
  const int64_t count = int64_t(p.mask_batch) * p.mask_heads * p.queries * p.keys;
  sum_shares_kernel<Out><<<dim3((count + kSumThreads - 1) / kSumThreads), kSumThreads, 0, stream>>>(
      p.partial, static_cast<Out*>(p.out), count, p.shares);
  return cudaGetLastError();
}

template <class Element, int kParts>
cudaError_t run_mask_gradient(const MaskGradientParams& p, int multiprocessors, cudaStream_t stream) {
  using T = GradientTile<Element, kParts>;
  const int64_t blocks = std::min<int64_t>(p.units, multiprocessors);
  const cudaError_t error = launch_wide<T>(mask_gradient_kernel<T>, p, blocks, stream);
  if (error != cudaSuccess || p.partial == nullptr) return error;
  return p.in_float32 ? sum_shares<float>(p, stream) : sum_shares<Element>(p, stream);
}
