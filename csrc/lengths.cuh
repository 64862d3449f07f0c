// Lengths of the vectors of a tile.
#pragma once

#include <math_constants.h>

#include "variant.cuh"

struct Length {
  float unit;     // what makes the row of the tile, as it now is, of unit length
  float inverse;  // 1 / |x| of the row as it was
  bool constant;  // shorter vectors are divided by kMinLength

  // What the part of a gradient along the row is multiplied with: 1 / |x|², or 0 for vectors divided by a constant.
  __device__ float along() const { return constant ? 0.f : unit * unit; }
};

// Multiplies a row by a power of two, in place: no digit changes but of what is too small to count beside the rest.
// Returns the sum of its squares.
template <class Element>
__device__ inline float scale_row(uint8_t* tile, int panels, int row, float scale) {
  float squares = 0.f;
  for (int piece = 0; piece < panels * 8; ++piece) {
    const uint32_t address = shared_address(tile) + piece / 8 * kPanelBytes + piece_offset(row, piece % 8);
    uint4 x = load_piece(address);
    for (uint32_t* word : {&x.x, &x.y, &x.z, &x.w}) {
      const float2 pair = unpack<Element>(*word), scaled = make_float2(pair.x * scale, pair.y * scale);
      *word = pack<Element>(scaled.x, scaled.y);
      squares += scaled.x * scaled.x + scaled.y * scaled.y;
    }
    store_piece(address, x);
  }
  fence_for_async();
  return squares;
}

// Of a row whose square the types can't hold well: it is first multiplied by a power of two.
// kCaller only makes it a function for each caller: the compiler gives up registers of warpgroups that share one.
template <class Element, int kCaller>
__device__ __noinline__ Length length_of_extreme(uint8_t* tile, int panels, int row) {
  float largest = 0.f;
  bool finite = true;
  for (int piece = 0; piece < panels * 8; ++piece) {
    const uint4 x = load_piece(shared_address(tile) + piece / 8 * kPanelBytes + piece_offset(row, piece % 8));
    for (const uint32_t word : {x.x, x.y, x.z, x.w}) {
      const float2 pair = unpack<Element>(word);
      finite &= isfinite(pair.x) && isfinite(pair.y);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  if (!finite) return {CUDART_NAN_F, CUDART_NAN_F, false};
  if (largest == 0.f) return {1.f, float(1. / kMinLength), true};  // by any number: but 10^6 is infinite in float16
  int exponent;
  frexpf(largest, &exponent);
  const float scale = ldexpf(1.f, -max(min(exponent, 126), -126));
  const float length = sqrtf(scale_row<Element>(tile, panels, row, scale)), least = float(kMinLength) * scale;
  const float unit = 1.f / fmaxf(length, least);
  return {unit, unit * scale, length <= least};
}

// Lengths of which the square is held well.
template <class Element>
struct Ordinary {
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static constexpr float kLeast = kHalf ? 0x1p-4f : 0x1p-19f, kMost = kHalf ? 0x1p6f : 0x1p40f;
  static_assert(kLeast > kMinLength);
};

template <class Element, int kCaller>
__device__ inline Length length_of(float square, uint8_t* tile, int panels, int row) {
  constexpr float kLeast = Ordinary<Element>::kLeast, kMost = Ordinary<Element>::kMost;
  if (!(square >= kLeast * kLeast && square <= kMost * kMost))
    return length_of_extreme<Element, kCaller>(tile, panels, row);
  const float unit = rsqrtf(square);
  return {unit, unit, false};
}

// The same of a row, or a part of it, of which 1 / |x| was kept.
template <class Element>
__device__ inline bool is_ordinary(float inverse) {
  return inverse >= 1.f / Ordinary<Element>::kMost && inverse <= 1.f / Ordinary<Element>::kLeast;
}
template <class Element>
__device__ __noinline__ Length length_of_kept_extreme(float inverse, uint8_t* tile, int panels, int row) {
  if (isnan(inverse)) return {inverse, inverse, false};
  const float scale = __uint_as_float(max(__float_as_uint(inverse) & 0x7f800000u, 1u << 23));
  scale_row<Element>(tile, panels, row, scale);
  return {inverse / scale, inverse, inverse >= float(1. / kMinLength)};
}
template <class Element>
__device__ inline Length length_of_kept(float inverse, uint8_t* tile, int panels, int row) {
  if (!is_ordinary<Element>(inverse)) return length_of_kept_extreme<Element>(inverse, tile, panels, row);
  return {inverse, inverse, false};
}

// Calls use(length) in one of the kThreads neighbouring threads that share a row of a tile, the one with part 0.
template <class Element, int kPanels, int kThreads, class Use>
__device__ inline void measure(uint8_t* tile, int row, int part, Use use) {
  constexpr int kPieces = 8 / kThreads, kAtOnce = 4;  // pieces of a panel, for a thread
  static_assert(kPieces % kAtOnce == 0);
  const uint32_t base = shared_address(tile) + piece_offset(row, part * kPieces);
  float sums[4] = {};
#pragma unroll 1
  for (int piece = 0; piece < kPanels * kPieces; piece += kAtOnce) {
    const uint32_t here = (base ^ piece % kPieces << 4) + piece / kPieces * kPanelBytes;
    uint4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = load_piece(here ^ i << 4);
#pragma unroll
    for (int w = 0; w < 4 * kAtOnce; ++w) {
      const float2 pair = unpack<Element>((&x[w / 4].x)[w % 4]);
      sums[w % 4] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sums[w % 4]));
    }
  }
  float square = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
  for (int lanes = 1; lanes < kThreads; lanes *= 2) square += __shfl_xor_sync(~0u, square, lanes);
  if (part == 0) use(length_of<Element, kThreads>(square, tile, kPanels, row));
}
