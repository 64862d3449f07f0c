// Lengths of the vectors of a tile.
#pragma once

#include <math_constants.h>

#include "variant.cuh"

struct Length {
  float unit;     // what makes the row of the tile, as it now is, of unit length
  float inverse;  // 1 / |x| of the row as it was
  bool constant;  // shorter vectors are divided by kMinLength
};

// Of a row whose square the types can't hold well: it is first multiplied by a power of two, in place, which changes no
// digit.
template <class Element>
__device__ __noinline__ Length length_of_extreme(uint8_t* tile, int panels, int row) {
  const auto address = [&](int piece) {
    return shared_address(tile) + piece / 8 * kPanelBytes + piece_offset(row, piece % 8);
  };
  float largest = 0.f;
  bool finite = true;
  for (int piece = 0; piece < panels * 8; ++piece) {
    const uint4 x = load_piece(address(piece));
    for (const uint32_t word : {x.x, x.y, x.z, x.w}) {
      const float2 pair = unpack<Element>(word);
      finite &= isfinite(pair.x) && isfinite(pair.y);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  if (!finite) return {CUDART_NAN_F, CUDART_NAN_F, false};
  if (largest == 0.f) return {float(1. / kMinLength), float(1. / kMinLength), true};
  int exponent;
  frexpf(largest, &exponent);
  const float scale = ldexpf(1.f, -max(min(exponent, 126), -126));
  float squares = 0.f;
  for (int piece = 0; piece < panels * 8; ++piece) {
    uint4 x = load_piece(address(piece));
    for (uint32_t* word : {&x.x, &x.y, &x.z, &x.w}) {
      const float2 pair = unpack<Element>(*word);
      *word = pack<Element>(pair.x * scale, pair.y * scale);
      squares += pair.x * scale * (pair.x * scale) + pair.y * scale * (pair.y * scale);
    }
    store_piece(address(piece), x);
  }
  fence_for_async();
  const float length = sqrtf(squares), least = float(kMinLength) * scale;
  const float unit = 1.f / fmaxf(length, least);
  return {unit, unit * scale, length <= least};
}

template <class Element>
__device__ inline Length length_of(float square, uint8_t* tile, int panels, int row) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  constexpr float kLeast = kHalf ? 0x1p-8f : 0x1p-39f, kMost = kHalf ? 0x1p12f : 0x1p80f;
  if (!(square >= kLeast && square <= kMost)) return length_of_extreme<Element>(tile, panels, row);
  const float unit = rsqrtf(square);
  return {unit, unit, false};
}

// Calls use(row, length) for each row of a tile, in one of the two threads of a warpgroup that share it: that of even
// number, in the warp whose rows of products they are.
template <class Element, int kPanels, class Use>
__device__ inline void measure(uint8_t* tile, int thread, Use use) {
  constexpr int kHalf = kPanels == 1 ? 4 : 8;  // pieces of a panel for one thread
  const int row = thread / 2, half = thread % 2;
  float sums[4] = {};
#pragma unroll
  for (int panel = 0; panel < (kPanels + 1) / 2; ++panel) {
    // The two threads read from different panels, and so that neighbours are on other banks; or halves of the only one.
    const uint32_t base =
        shared_address(tile) + (kPanels == 1 ? 0 : panel * 2 + half) * kPanelBytes + piece_offset(row, half * 4);
#pragma unroll
    for (int first = 0; first < kHalf; first += 4) {
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = load_piece(base ^ (first + i) << 4);
#pragma unroll
      for (int w = 0; w < 16; ++w) {
        const float2 pair = unpack<Element>((&x[w / 4].x)[w % 4]);
        sums[w % 4] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sums[w % 4]));
      }
    }
  }
  float square = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  square += __shfl_xor_sync(~0u, square, 1);
  if (half == 0) use(row, length_of<Element>(square, tile, kPanels, row));
}
