// One block for each 64 × 64 tile of a mask; one thread for each eight values that are split; turning by tiles.
#include "masked_inputs.h"

#include <math_constants.h>

#include "element.cuh"
#include "masked.h"

namespace {

constexpr int kThreads = 256;

__device__ inline bool is_used(bool x) { return x; }
template <class Element>
__device__ inline bool is_used(Element x) {
  return float(x) != 0.f;  // so is NaN
}
template <class To>
__device__ inline To weight_of(bool x) {
  return To(x ? 1.f : 0.f);
}
template <class To>
__device__ inline To weight_of(To x) {
  return x;
}

// The same of 16 neighbouring bytes.
template <class Element>
__device__ inline bool any_used(const uint4& x) {
  constexpr uint32_t kNotSigns = sizeof(Element) == 4 ? 0x7FFFFFFFu : 0x7FFF7FFFu;
  return ((x.x | x.y | x.z | x.w) & kNotSigns) != 0;
}

template <class Of, class To>
__global__ void __launch_bounds__(kThreads) mask_kernel(const __grid_constant__ MaskParams p) {
  const int tiles = (p.columns + kMaskTile - 1) / kMaskTile, row_tiles = (p.rows + kMaskTile - 1) / kMaskTile;
  const int first_column = blockIdx.x % tiles * kMaskTile, first_row = blockIdx.x / tiles % row_tiles * kMaskTile;
  const int64_t entry = blockIdx.x / tiles / row_tiles;
  const Of* from = static_cast<const Of*>(p.mask) + entry / p.heads * p.batch_stride + entry % p.heads * p.head_stride;
  To* to = static_cast<To*>(p.copy) + entry * p.rows * p.width;
  bool used = false;
  constexpr int kPiece = 16 / sizeof(Of), kPieces = kMaskTile / kPiece;
  const bool whole = p.in_pieces && first_row + kMaskTile <= p.rows && first_column + kMaskTile <= p.columns;
#pragma unroll
  for (int i = threadIdx.x; i < kMaskTile * kPieces && whole; i += kThreads)
    used |= any_used<Of>(*reinterpret_cast<const uint4*>(from + (first_row + i / kPieces) * p.row_stride +
                                                         first_column + i % kPieces * kPiece));
#pragma unroll 4
  for (int i = threadIdx.x; i < kMaskTile * kMaskTile && !whole; i += kThreads) {
    const int row = first_row + i / kMaskTile, column = first_column + i % kMaskTile;
    if (row >= p.rows || column >= p.columns) continue;
    const Of weight = from[row * p.row_stride + column * p.column_stride];
    used |= is_used(weight);
    if (p.copy != nullptr) to[int64_t(row) * p.width + column] = weight_of<To>(weight);
  }
  used = __syncthreads_or(used);
  if (threadIdx.x == 0 && p.used != nullptr) p.used[blockIdx.x] = used;
}

// Eight neighbouring values, read by fours where kFours.
template <bool kFours>
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ SplitParams p) {
  constexpr int kPack = 8;
  const unsigned at = blockIdx.x * kThreads + threadIdx.x, packs = p.padded / kPack;
  const unsigned row = at / packs, head = row / p.tokens, token = row % p.tokens;
  const int column = at % packs * kPack;
  if (row >= p.rows) return;
  const float* x = static_cast<const float*>(p.x.data) + head / p.heads * p.x.batch + head % p.heads * p.x.head +
                   token * p.x.token + column;
  float values[kPack];
#pragma unroll
  for (int i = 0; i < kPack; i += 4) {
    if constexpr (kFours) {
      const float4 four = column + i < p.width ? *reinterpret_cast<const float4*>(x + i) : float4{};
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) values[j] = column + j < p.width ? x[j] : 0.f;
    }
  }
  auto* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(head) * p.parts * p.tokens + token) * p.padded + column;
  for (int part = 0; part < p.parts; ++part, out += int64_t(p.tokens) * p.padded) {
    Pack<__nv_bfloat16, kPack> rounded;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      __nv_bfloat16& next = rounded.values[i];
      next = __nv_bfloat16(values[i]);
      // The largest float32 numbers would become infinite.
      if (__hisinf(next) && isfinite(values[i])) next = __float2bfloat16_rz(values[i]);
      values[i] = isfinite(values[i]) ? values[i] - float(next) : 0.f;
    }
    *reinterpret_cast<Pack<__nv_bfloat16, kPack>*>(out) = rounded;
  }
}

// A block rounds 64 tokens of 64 columns, and turns them.
constexpr int kTurn = 64, kFours = kTurn / 4;
__global__ void __launch_bounds__(kThreads) turn_kernel(const __grid_constant__ TurnParams p) {
  __shared__ float tile[kTurn][kTurn + 1];
  const int across = (p.width + kTurn - 1) / kTurn, along = (p.padded + kTurn - 1) / kTurn;
  const int first_column = blockIdx.x % across * kTurn, first_token = blockIdx.x / across % along * kTurn;
  const int64_t pair = blockIdx.x / across / along;
  const float* from = static_cast<const float*>(p.x.data) + pair / p.heads * p.x.batch + pair % p.heads * p.x.head;
#pragma unroll
  for (int i = threadIdx.x; i < kTurn * kFours; i += kThreads) {
    const int token = first_token + i / kFours, column = first_column + i % kFours * 4;
    const bool inside = token < p.tokens && column < p.width;
    float4 x = inside ? *reinterpret_cast<const float4*>(from + token * p.x.token + column) : float4{};
    for (float* value : {&x.x, &x.y, &x.z, &x.w}) *value = __uint_as_float(to_tf32(*value));
    if (p.rounded != nullptr && inside)
      *reinterpret_cast<float4*>(p.rounded + (pair * p.tokens + token) * p.width + column) = x;
    float* to = &tile[i % kFours * 4][i / kFours];
    to[0] = x.x, to[kTurn + 1] = x.y, to[2 * (kTurn + 1)] = x.z, to[3 * (kTurn + 1)] = x.w;
  }
  if (p.turned == nullptr) return;
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTurn * kFours; i += kThreads) {
    const int row = i / kFours, place = i % kFours * 4;
    if (first_token + place >= p.padded || first_column + row >= p.width) continue;
    const float* x = &tile[row][place / 8 * 8 + place / 4 % 2];
    *reinterpret_cast<float4*>(p.turned + (pair * p.width + first_column + row) * p.padded + first_token + place) =
        make_float4(x[0], x[2], x[4], x[6]);
  }
}

template <class Of, class To>
cudaError_t launch_mask(const MaskParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.columns + kMaskTile - 1) / kMaskTile, row_tiles = (p.rows + kMaskTile - 1) / kMaskTile;
  mask_kernel<Of, To><<<dim3(p.entries * tiles * row_tiles), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t run_mask(const MaskParams& p, ElementType to, bool of_bool, cudaStream_t stream) {
  return with_element(to, [&](auto element) {
    using To = decltype(element);
    return of_bool ? launch_mask<bool, To>(p, stream) : launch_mask<To, To>(p, stream);
  });
}

cudaError_t run_split(const SplitParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows * (p.padded / 8) + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  bool fours = p.width % 4 == 0 && reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0;
  for (const int64_t stride : {p.x.batch, p.x.head, p.x.token}) fours = fours && stride % 4 == 0;
  (fours ? split_kernel<true> : split_kernel<false>)<<<dim3(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t run_turn(const TurnParams& p, cudaStream_t stream) {
  const int64_t across = (p.width + kTurn - 1) / kTurn, blocks = p.pairs * across * ((p.padded + kTurn - 1) / kTurn);
  if (blocks == 0) return cudaSuccess;
  turn_kernel<<<dim3(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}
