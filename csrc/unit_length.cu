// kLanes lanes of a warp take a vector, kVectors of them together: read once, kept in registers, written once.
#include "unit_length.h"

#include "element.cuh"

#include <math_constants.h>

namespace {

constexpr int kThreads = 256, kMostWidth = 2048;

// What a lane holds of a vector: every kLanes-th pack of kPack neighbouring elements.
template <class Element, int kPack, int kLanes, int kPacks>
struct Part {
  using Values = Pack<Element, kPack>;
  float values[kPacks * kPack];

  __device__ static int column(int pack) { return (pack * kLanes + threadIdx.x % kLanes) * kPack; }
  __device__ void load(const Element* row, int width) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      Values pack{};
      if (column(i) < width) pack = *reinterpret_cast<const Values*>(row + column(i));
#pragma unroll
      for (int j = 0; j < kPack; ++j) values[i * kPack + j] = float(pack.values[j]);
    }
  }
  __device__ void store(Element* row, int width) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      Values pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.values[j] = Element(values[i * kPack + j]);
      if (column(i) < width) *reinterpret_cast<Values*>(row + column(i)) = pack;
    }
  }
};

// Of all lanes that share a vector.
template <int kLanes, class Combine>
__device__ float over_lanes(float x, Combine combine) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// A power of two which brings x near 1, so that its square is held well. It changes no digit.
__device__ float factor_of(float x) {
  const unsigned exponent = min(__float_as_uint(x) >> 23, 253u);
  return __uint_as_float((254 - exponent) << 23);
}

// Makes u = x / |x|, or of `grad` the gradient of x. NaN stays, infinity becomes NaN.
template <bool kBackward, int kLanes, class Part>
__device__ void convert(Part& x, Part& grad) {
  float largest = 0.f, squares = 0.f, along = 0.f;
  for (const float value : x.values) largest = fmaxf(largest, fabsf(value));
  largest = over_lanes<kLanes>(largest, [](float a, float b) { return fmaxf(a, b); });
  const float factor = factor_of(largest), least = float(kMinLength) * factor;
  for (float& value : x.values) value *= factor, squares = fmaf(value, value, squares);
  const auto plus = [](float a, float b) { return a + b; };
  const float measured = sqrtf(over_lanes<kLanes>(squares, plus)), length = measured < least ? least : measured;
  const float inverse = isfinite(length) ? 1.f / length : CUDART_NAN_F;
  for (float& value : x.values) value *= inverse;
  if constexpr (kBackward) {
    constexpr int kCount = sizeof(x.values) / sizeof(float);
#pragma unroll
    for (int i = 0; i < kCount; ++i) along = fmaf(grad.values[i], x.values[i], along);
    along = over_lanes<kLanes>(along, plus);
    if (measured <= least) along = 0.f;  // shorter vectors are divided by a constant
#pragma unroll
    for (int i = 0; i < kCount; ++i) grad.values[i] = fmaf(-along, x.values[i], grad.values[i]) * (factor * inverse);
  }
}

// A block has neighbouring tokens of a head.
template <class Element, int kPack, int kLanes, int kPacks, int kVectors, bool kBackward>
__global__ void __launch_bounds__(kThreads) unit_length_kernel(const __grid_constant__ UnitLengthParams p) {
  constexpr int kTogether = kThreads / kLanes;
  const unsigned blocks = (unsigned(p.tokens) - 1) / (kTogether * kVectors) + 1, pair = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * (kTogether * kVectors) + threadIdx.x / kLanes;
  const auto row = [&](const View& view, int token) {
    return static_cast<const Element*>(view.data) + pair / p.heads * view.batch + pair % p.heads * view.head +
           token * view.token;
  };
  Part<Element, kPack, kLanes, kPacks> x[kVectors], grad[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int token = min(first + i * kTogether, p.tokens - 1);
    x[i].load(row(p.x, token), p.width);
    if constexpr (kBackward) grad[i].load(row(p.grad, token), p.width);
  }
  Element* out = static_cast<Element*>(p.out) + int64_t(pair) * p.tokens * p.width;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    convert<kBackward, kLanes>(x[i], grad[i]);
    const int token = first + i * kTogether;
    if (token < p.tokens) (kBackward ? grad : x)[i].store(out + int64_t(token) * p.width, p.width);
  }
}

template <class Element, int kPack, int kLanes, int kPacks, int kVectors>
cudaError_t launch(const UnitLengthParams& p, cudaStream_t stream) {
  constexpr int kTokens = kThreads / kLanes * kVectors;
  const int64_t blocks = p.pairs * ((int64_t(p.tokens) + kTokens - 1) / kTokens);
  if (p.grad.data == nullptr)
    unit_length_kernel<Element, kPack, kLanes, kPacks, kVectors, false><<<dim3(blocks), kThreads, 0, stream>>>(p);
  else
    unit_length_kernel<Element, kPack, kLanes, kPacks, kVectors, true><<<dim3(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// The fewest lanes for which a vector is a pack of each; wider ones are several.
template <class Element>
cudaError_t launch_packs(const UnitLengthParams& p, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(Element), kMost = kMostWidth / 32 / kPack;
  if (p.width <= 8 * kPack) return launch<Element, kPack, 8, 1, 2>(p, stream);
  if (p.width <= 16 * kPack) return launch<Element, kPack, 16, 1, 2>(p, stream);
  if (p.width <= 32 * kPack) return launch<Element, kPack, 32, 1, 2>(p, stream);
  return launch<Element, kPack, 32, kMost, 1>(p, stream);
}

// Whether packs of 16 bytes begin where they may.
bool aligned(const View& view, int width, int element) {
  for (const int64_t offset :
       {view.batch * element, view.head * element, view.token * element, int64_t(width) * element})
    if (offset % 16 != 0) return false;
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

}  // namespace

cudaError_t run_unit_length(const UnitLengthParams& p, ElementType type, cudaStream_t stream) {
  if (p.pairs * p.tokens * p.width == 0) return cudaSuccess;
  return with_element(type, [&](auto element) {
    using Element = decltype(element);
    const bool packs = aligned(p.x, p.width, sizeof(Element)) && aligned(p.grad, p.width, sizeof(Element)) &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    return packs ? launch_packs<Element>(p, stream) : launch<Element, 1, 32, kMostWidth / 32, 1>(p, stream);
  });
}
