// Lengths of the vectors of a tile, from the diagonal of its product with itself.
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

// Squares of the lengths of rows 16 w + lane / 4 and 8 more of a tile, for lanes of warp w: the diagonal of tile tileᵀ,
// whose values lie as in `wgmma.cuh`. Four lanes have the same rows, one of them has the value.
__device__ inline float2 diagonal(const float (&products)[32], int warp, int lane) {
  float found[2][2] = {};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (w != warp) continue;
    found[0][0] = products[8 * w], found[0][1] = products[8 * w + 1];
    found[1][0] = products[8 * w + 6], found[1][1] = products[8 * w + 7];
  }
  const int odd = lane / 4 % 2, from = lane / 4 * 4 + lane / 8;
  return make_float2(__shfl_sync(~0u, odd ? found[0][1] : found[0][0], from),
                     __shfl_sync(~0u, odd ? found[1][1] : found[1][0], from));
}
