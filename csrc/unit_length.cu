// A warp takes a vector at a time: read once, kept in registers, the result written once.
#include "unit_length.h"

#include "element.cuh"

#include <math_constants.h>

namespace {

constexpr int kThreads = 256, kMostWidth = 1024;

// Where a row of a tensor begins.
template <class Element>
__device__ const Element* row_of(const View& view, const UnitLengthParams& p, int64_t row) {
  const int64_t pair = row / p.tokens;
  return static_cast<const Element*>(view.data) + pair / p.heads * view.batch + pair % p.heads * view.head +
         row % p.tokens * view.token;
}

// What a lane holds of a vector: every 32nd pack of kPack neighbouring elements.
template <class Element, int kPack, int kPacks>
struct Part {
  struct alignas(kPack * sizeof(Element)) Pack {
    Element values[kPack];
  };
  float values[kPacks][kPack];

  __device__ void load(const Element* row, int width) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = (i * 32 + threadIdx.x % 32) * kPack;
      Pack pack{};
      if (at < width) pack = *reinterpret_cast<const Pack*>(row + at);
#pragma unroll
      for (int j = 0; j < kPack; ++j) values[i][j] = float(pack.values[j]);
    }
  }
  __device__ void store(Element* row, int width) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = (i * 32 + threadIdx.x % 32) * kPack;
      Pack pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.values[j] = Element(values[i][j]);
      if (at < width) *reinterpret_cast<Pack*>(row + at) = pack;
    }
  }
  // use(value) for each, by reference.
  template <class Use>
  __device__ void each(Use use) {
#pragma unroll
    for (auto& pack : values)
#pragma unroll
      for (float& value : pack) use(value);
  }
};

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

template <class Element, int kPack, int kPacks>
__global__ void __launch_bounds__(kThreads) unit_length_kernel(const __grid_constant__ UnitLengthParams p) {
  using Part = Part<Element, kPack, kPacks>;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= p.rows) return;
  Part x, grad;
  x.load(row_of<Element>(p.x, p, row), p.width);
  const bool backward = p.grad.data != nullptr;
  if (backward) grad.load(row_of<Element>(p.grad, p, row), p.width);
  // Times a power of two, which changes no digit: the square of a large number overflows. NaN stays, infinity becomes
  // NaN.
  float largest = 0.f;
  x.each([&](float value) { largest = fmaxf(largest, fabsf(value)); });
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
  const float factor = ldexpf(1.f, -max(min(ilogbf(largest), 126), -126)), least = float(kMinLength) * factor;
  float squares = 0.f;
  x.each([&](float& value) { value *= factor, squares = fmaf(value, value, squares); });
  const float measured = sqrtf(sum_of_warp(squares)), length = measured < least ? least : measured;
  const float inverse = isfinite(length) ? 1.f / length : CUDART_NAN_F;
  x.each([&](float& value) { value *= inverse; });
  Element* out = static_cast<Element*>(p.out) + row * p.width;
  if (!backward) return x.store(out, p.width);
  float along = 0.f;
#pragma unroll
  for (int i = 0; i < kPacks * kPack; ++i) {
    const float unit = x.values[i / kPack][i % kPack];
    along = fmaf(grad.values[i / kPack][i % kPack], unit, along);
  }
  along = sum_of_warp(along);
  if (measured <= least) along = 0.f;  // shorter vectors are divided by a constant
#pragma unroll
  for (int i = 0; i < kPacks * kPack; ++i) {
    float& value = grad.values[i / kPack][i % kPack];
    value = fmaf(-along, x.values[i / kPack][i % kPack], value) * (factor * inverse);
  }
  grad.store(out, p.width);
}

template <class Element, int kPack>
cudaError_t launch(const UnitLengthParams& p, cudaStream_t stream) {
  constexpr int kMost = kMostWidth / 32 / kPack, kFew = kMost >= 4 ? kMost / 4 : 1;
  const int64_t blocks = (p.rows * 32 + kThreads - 1) / kThreads;
  if (p.width <= kFew * 32 * kPack)
    unit_length_kernel<Element, kPack, kFew><<<dim3(blocks), kThreads, 0, stream>>>(p);
  else
    unit_length_kernel<Element, kPack, kMost><<<dim3(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// Whether packs of `bytes` bytes begin where they may.
bool aligned(const View& view, int width, int element, int bytes) {
  for (const int64_t offset :
       {view.batch * element, view.head * element, view.token * element, int64_t(width) * element})
    if (offset % bytes != 0) return false;
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
}

}  // namespace

cudaError_t run_unit_length(const UnitLengthParams& p, ElementType type, cudaStream_t stream) {
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  return with_element(type, [&](auto element) {
    using Element = decltype(element);
    constexpr int kPack = 16 / sizeof(Element);
    const bool packs = aligned(p.x, p.width, sizeof(Element), 16) && aligned(p.grad, p.width, sizeof(Element), 16) &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    return packs ? launch<Element, kPack>(p, stream) : launch<Element, 1>(p, stream);
  });
}
