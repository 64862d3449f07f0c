// Outputs and gradients of masked attention from the scores of a slab that `masked_scores.cuh` made:
//
//     o = P v,    dq = A k,    dk = Aᵀ q,    dv = Pᵀ do
//
// Where a slab has a part only of what a sum is over, sums are kept in float32, as registers hold them, for the next.
#pragma once

#include <algorithm>

#include "element.cuh"
#include "masked_wide.h"
#include "parts.cuh"

// A tile of an output for a pair in the slab.
template <class T>
struct ProductUnit {
  int output = 0, pair, row, column, tile;  // row, column: where the tile begins in what the slab adds to
  int batch, head;

  __device__ ProductUnit(const MaskedProductsParams& p, int unit) {
    int per_pair = 0;
    for (int i = 0; i < p.number; ++i) per_pair += tiles_of(p.products[i]);
    pair = p.pairs - 1 - unit / per_pair, tile = unit % per_pair;  // the last first: their scores were made last
    while (tile >= tiles_of(p.products[output])) tile -= tiles_of(p.products[output++]);
    const int across = p.products[output].column_tiles;
    row = tile / across * T::kRows, column = tile % across * T::kN;
    batch = (p.pair + pair) / p.heads, head = (p.pair + pair) % p.heads;
  }
  __device__ static int tiles_of(const MaskedProduct& of) { return of.row_tiles * of.column_tiles; }
};

template <class T>
__device__ void produce_product(const MaskedProductsParams& p, Producer<T>& me, const ProductUnit<T>& unit) {
  const MaskedProduct& of = p.products[unit.output];
  each_product<T::kParts>([&](int a, int b) {
    const HeadOf scores(of.scores, a, unit.pair), w = part_of(of.w, unit.head, unit.batch, T::kParts, b);
    for (int block = 0; block * T::kDepth < of.tokens; ++block) {
      const int stage = me.claim();
      if (of.transposed)
        me.left(stage, scores, unit.row / kPanel, block * T::kDepth, true);
      else
        me.left(stage, scores, block, unit.row, false);
      me.right(stage, w, unit.column / kPanel, of.token + block * T::kDepth, true);
    }
  });
}

template <class T>
struct ProductMaker : PartsConsumer<T> {
  using Element = typename T::Element;
  const MaskedProductsParams& p;

  __device__ ProductMaker(const MaskedProductsParams& p, WideShared<T>& shared, int group)
      : PartsConsumer<T>(shared, group), p(p) {}

  __device__ void make(int index) {
    const ProductUnit<T> unit(p, index);
    const MaskedProduct& of = p.products[unit.output];
    const int blocks = (of.tokens + T::kDepth - 1) / T::kDepth;
    if (of.transposed)
      this->template product<1, 1>(blocks);
    else
      this->template product<0, 1>(blocks);
    if (of.sums != nullptr && !add_up(of, unit.tile)) return;
    const int64_t row = int64_t(p.pair + unit.pair) * of.length + of.first + unit.row;
    const int64_t at = row * of.width + unit.column;
    const int rows = of.rows - unit.row, columns = of.width - unit.column;
    if constexpr (T::kParts == 1)
      this->put_out(static_cast<Element*>(of.out) + at, rows, columns, of.width);
    else
      put_out_rows<T::kPanels>(this->acc, static_cast<float*>(of.out) + at + int64_t(this->group * 64) * of.width,
                               rows - this->group * 64, columns, of.width);
  }

  // With what slabs before have added; whether it is the whole sum, else it is kept for the next.
  __device__ bool add_up(const MaskedProduct& of, int tile) {
    auto sums = reinterpret_cast<float4*>(of.sums) + int64_t(tile) * (T::kN / 8) * T::kConsumers + threadIdx.x;
#pragma unroll
    for (int x = 0; x < T::kN / 2; x += 4) {
      float* values = &this->acc[x];
      float4& sum = sums[x / 4 * T::kConsumers];
      if (!of.begins) {
        const float4 before = sum;
        values[0] += before.x, values[1] += before.y, values[2] += before.z, values[3] += before.w;
      }
      if (!of.ends) sum = make_float4(values[0], values[1], values[2], values[3]);
    }
    return of.ends;
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    masked_products_kernel(const __grid_constant__ MaskedProductsParams p) {
  work_through<T, ProductMaker<T>>(
      p, [&](Producer<T>& me, int unit) { produce_product<T>(p, me, ProductUnit<T>(p, unit)); });
}

template <class Element>
cudaError_t run_masked_products(const MaskedProductsParams& p, WideTile tile, int multiprocessors,
                                cudaStream_t stream) {
  return with_parts<Element>(tile, p.parts, [&](auto sizes) {
    using T = decltype(sizes);
    return launch_wide<T>(masked_products_kernel<T>, p, std::min<int64_t>(p.units, multiprocessors), stream);
  });
}
