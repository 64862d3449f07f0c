// The pass in float32, with the tensor cores' tf32 products, and the gradient of the decay for every type.
//
// The same walk as in pass_hopper.cuh with plain loads: a block of four warps keeps a tile Sᵀ (64 columns of v × 128 of
// k) in registers, each warp 16 rows. An accumulator of one product is the left operand of the next without a move: a
// thread holds columns 2 t and 2 t + 1 of an 8 × 8 block where a left operand wants t and t + 4, so the sum over a
// block runs in that order, for both operands alike.
//
// kExact: each operand is split in two tf32 numbers, a b ≈ a₁ b₁ + a₁ b₂ + a₂ b₁, as exact as float32 (Ootomo and
// Yokota 2022, arXiv:2203.03341). kDecay: makes no output but its derivative by log λ, multiplied with do and summed:
// with R the derivative of S, equations (5) to (7) of README.md.
#pragma once

#include <climits>

#include "decay.cuh"
#include "element.cuh"
#include "params.h"
#include "segments.cuh"

enum class Make { kStates, kOutput, kDecayGradient };

constexpr int kTokens = 64, kTileD = 128, kTileE = 64, kBlockThreads = 128;
constexpr int kRowD = kTileD + 4, kRowE = kTileE + 4;  // floats; the padding keeps threads on different banks

struct Tiles {
  float q[kTokens][kRowD], k[kTokens][kRowD], v[kTokens][kRowE], scores[kTokens][kRowE];
  float powers[kTokens + 1];
  int first_bad[kTileE], last_bad[kTileE];  // token whose value is not finite, of each column of v
  float sums[kBlockThreads / 32];
};

__device__ inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A left (16 × 8) or right (8 × 8) operand.
template <int kCount, bool kExact>
struct Operand {
  uint32_t high[kCount], low[kExact ? kCount : 1];

  __device__ void set(int i, float x) {
    high[i] = to_tf32(x);
    if constexpr (kExact) {
      const float rest = x - __uint_as_float(high[i]);
      low[i] = to_tf32(isfinite(x) ? rest : 0.f);
    }
  }
};

template <bool kExact>
__device__ inline void multiply(float (&d)[4], const Operand<4, kExact>& a, const Operand<2, kExact>& b) {
  if constexpr (kExact) {
    // The tensor cores cut sums off where they should round: long sums are made outside.
    float small[4] = {}, large[4] = {};
    multiply_tf32(small, a.low, b.high);
    multiply_tf32(small, a.high, b.low);
    multiply_tf32(large, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += large[i] + small[i];
  } else {
    multiply_tf32(d, a.high, b.high);
  }
}

// Rows of a tensor (B, heads, T, width) to shared memory; what lies outside is zero.
template <class Element, int kColumns, int kRow>
__device__ inline void load_tile(float (&to)[kTokens][kRow], const View& x, int batch, int head, int64_t token, int n,
                                 int column, int width) {
  const Element* from =
      static_cast<const Element*>(x.data) + batch * x.batch + head * x.head + token * x.token + column;
  for (int at = threadIdx.x; at < kTokens * kColumns; at += kBlockThreads) {
    const int row = at / kColumns, c = at % kColumns;
    to[row][c] = row < n && column + c < width ? float(from[row * x.token + c]) : 0.f;
  }
}

template <class Element, Make kMake, bool kExact>
__global__ void __launch_bounds__(kBlockThreads, kMake == Make::kDecayGradient ? 1 : 2)
    float32_kernel(const __grid_constant__ PassParams p) {
  constexpr bool kDecay = kMake == Make::kDecayGradient, kOutput = kMake != Make::kStates;
  constexpr int kBlocks = kTileD / 8;
  extern __shared__ __align__(16) uint8_t memory[];
  Tiles& shared = *reinterpret_cast<Tiles*>(memory);
  const int tiles = p.d_tiles * p.e_tiles, tile = blockIdx.x % tiles, head = blockIdx.x / tiles % p.heads;
  Work work;
  if (!find_work(p, blockIdx.x / tiles / p.heads, work)) return;
  if (!kOutput && work.last) return;
  float log_lambda = log_decay_of(p.log_decay, head);
  if (!work.valid) log_lambda = CUDART_NAN_F;
  if (threadIdx.x <= kTokens) shared.powers[threadIdx.x] = power(log_lambda, threadIdx.x);

  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, pair = 2 * (threadIdx.x % 4);
  const int first_d = tile / p.e_tiles * kTileD, first_e = tile % p.e_tiles * kTileE;
  const int e = first_e + warp * 16 + row;
  float state[kBlocks][4] = {}, slope[kDecay ? kBlocks : 1][4] = {};  // Sᵀ and Rᵀ
  const auto visit = [&](auto& values, auto use) {
#pragma unroll
    for (int x = 0; x < kBlocks * 4; ++x) {
      const int at_d = first_d + x / 4 * 8 + pair + x % 2, at_e = e + x / 2 % 2 * 8;
      if (at_d < p.d && at_e < p.e) use(values[x / 4][x % 4], at_d, at_e);
    }
  };
  const auto load = [&](const float* from, const StateStrides& at, int sequence) {
    from += sequence * at.sequence + head * at.head;
    visit(state, [&](float& s, int i, int j) { s = from[i * at.d + j * at.e]; });
  };
  const auto store = [&](float* to, const StateStrides& at, int sequence) {
    to += sequence * at.sequence + head * at.head;
    visit(state, [&](float& s, int i, int j) { to[i * at.d + j * at.e] = s; });
  };
  if (work.first) {
    if (p.initial != nullptr) load(p.initial, p.initial_strides, work.sequence);
  } else if (kOutput) {
    load(p.carry, p.carry_strides, p.reverse ? work.carry + 1 : work.carry - 1);
  }
  float total = 0.f;  // of do ⊙ ∂o / ∂log λ
  const int chunks = (work.length + kTokens - 1) / kTokens;
  for (int step = 0; step < chunks; ++step) {
    const int chunk = p.reverse ? chunks - 1 - step : step, n = min(kTokens, work.length - chunk * kTokens);
    const int64_t token = work.start + chunk * kTokens;
    __syncthreads();
    if constexpr (kOutput)
      load_tile<Element, kTileD>(shared.q, p.q_view, work.batch, head / p.q_view.group, token, n, first_d, p.d);
    load_tile<Element, kTileD>(shared.k, p.k_view, work.batch, head / p.k_view.group, token, n, first_d, p.d);
    load_tile<Element, kTileE>(shared.v, p.v_view, work.batch, head / p.v_view.group, token, n, first_e, p.e);
    if (threadIdx.x < kTileE) shared.first_bad[threadIdx.x] = INT_MAX, shared.last_bad[threadIdx.x] = -1;
    __syncthreads();
    const auto reading = [&](int i) { return shared.powers[p.reverse ? max(n - 1 - i, 0) : i + 1]; };
    const auto writing = [&](int j) { return shared.powers[p.reverse ? j + 1 : max(n - 1 - j, 0)]; };

    if constexpr (kOutput) {
      for (int at = threadIdx.x; at < kTokens * kTileE; at += kBlockThreads) {
        if (isfinite(shared.v[at / kTileE][at % kTileE])) continue;
        atomicMin(&shared.first_bad[at % kTileE], at / kTileE);
        atomicMax(&shared.last_bad[at % kTileE], at / kTileE);
      }
      // Scores of this warp's 16 queries.
      float scores[kTokens / 8][4] = {};
      for (int block = 0; block < kBlocks; ++block) {
        Operand<4, kExact> a;
#pragma unroll
        for (int x = 0; x < 4; ++x) a.set(x, shared.q[warp * 16 + row + x % 2 * 8][block * 8 + pair + x / 2]);
#pragma unroll
        for (int m = 0; m < kTokens / 8; ++m) {
          Operand<2, kExact> b;
#pragma unroll
          for (int x = 0; x < 2; ++x) b.set(x, shared.k[m * 8 + row][block * 8 + pair + x]);
          multiply<kExact>(scores[m], a, b);
        }
      }
#pragma unroll
      for (int x = 0; x < kTokens / 2; ++x) {
        const int i = warp * 16 + row + x / 2 % 2 * 8, j = x / 4 * 8 + pair + x % 2,
                  distance = p.reverse ? j - i : i - j;
        float weight = power(log_lambda, max(distance, 0));
        if constexpr (kDecay) weight *= distance;
        shared.scores[i][j] = distance < 0 || j >= n ? 0.f : scores[x / 4][x % 4] * weight;
      }
      // oᵀ = Sᵀ qᵀ, and with kDecay Rᵀ qᵀ; this warp's 16 columns of v.
      float o[kTokens / 8][4] = {}, slopes[kDecay ? kTokens / 8 : 1][4] = {};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        Operand<4, kExact> a, of_slope;
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          a.set(x, state[block][x % 2 * 2 + x / 2]);
          if constexpr (kDecay) of_slope.set(x, slope[block][x % 2 * 2 + x / 2]);
        }
#pragma unroll
        for (int m = 0; m < kTokens / 8; ++m) {
          Operand<2, kExact> b;
#pragma unroll
          for (int x = 0; x < 2; ++x) b.set(x, shared.q[m * 8 + row][block * 8 + pair + x]);
          multiply<kExact>(o[m], a, b);
          if constexpr (kDecay) multiply<kExact>(slopes[m], of_slope, b);
        }
      }
#pragma unroll
      for (int x = 0; x < kTokens / 2; ++x) {
        const int i = x / 4 * 8 + pair + x % 2;
        float& y = o[x / 4][x % 4];
        if constexpr (kDecay) y = y * (i + 1) + slopes[x / 4][x % 4];
        y *= reading(i);
      }
      __syncthreads();
      for (int block = 0; block < kTokens / 8; ++block) {
        Operand<4, kExact> a;
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const float value = shared.v[block * 8 + pair + x / 2][warp * 16 + row + x % 2 * 8];
          a.set(x, isfinite(value) ? value : 0.f);
        }
#pragma unroll
        for (int m = 0; m < kTokens / 8; ++m) {
          Operand<2, kExact> b;
#pragma unroll
          for (int x = 0; x < 2; ++x) b.set(x, shared.scores[m * 8 + row][block * 8 + pair + x]);
          multiply<kExact>(o[m], a, b);
        }
      }
#pragma unroll
      for (int x = 0; x < kTokens / 2; ++x) {
        const int i = x / 4 * 8 + pair + x % 2, mine = warp * 16 + row + x / 2 % 2 * 8, column = first_e + mine;
        float y = o[x / 4][x % 4];
        if (p.reverse ? i <= shared.last_bad[mine] : i >= shared.first_bad[mine]) y = CUDART_NAN_F;
        if (i >= n || column >= p.e) continue;
        if constexpr (kDecay) {
          const View& g = p.grad_view;
          total += y * float(static_cast<const Element*>(
                           g.data)[work.batch * g.batch + head * g.head + (token + i) * g.token + column]);
        } else if (p.partial != nullptr) {
          const int64_t part = int64_t(tile / p.e_tiles) * p.batch + work.batch;
          p.partial[((part * p.heads + head) * p.tokens + token + i) * p.e + column] = y;
        } else {
          const int64_t at = (int64_t(work.batch) * p.heads + head) * p.tokens + token + i;
          static_cast<float*>(p.out)[at * p.e + column] = y;
        }
      }
    }
    // Sᵀ ← λ^n Sᵀ + (scaled vᵀ) k, and Rᵀ likewise.
    const float carried = shared.powers[n];
#pragma unroll
    for (int x = 0; x < kBlocks * 4; ++x) {
      float& s = state[x / 4][x % 4];
      if constexpr (kDecay) slope[x / 4][x % 4] = carried * (slope[x / 4][x % 4] + n * s);
      s *= carried;
    }
    for (int block = 0; block < kTokens / 8; ++block) {
      Operand<4, kExact> a, of_slope;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int j = block * 8 + pair + x / 2;
        const float value = j < n ? shared.v[j][warp * 16 + row + x % 2 * 8] * writing(j) : 0.f;
        a.set(x, value);
        if constexpr (kDecay) of_slope.set(x, j < n ? value * (n - 1 - j) : 0.f);
      }
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        Operand<2, kExact> b;
#pragma unroll
        for (int x = 0; x < 2; ++x) b.set(x, shared.k[block * 8 + pair + x][m * 8 + row]);
        multiply<kExact>(state[m], a, b);
        if constexpr (kDecay) multiply<kExact>(slope[m], of_slope, b);
      }
    }
  }
  if constexpr (kDecay) {
    if (p.final_grad != nullptr) {
      const float* grad = p.final_grad + work.sequence * p.final_strides.sequence + head * p.final_strides.head;
      visit(slope, [&](float& s, int i, int j) { total += s * grad[i * p.final_strides.d + j * p.final_strides.e]; });
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
    if (threadIdx.x % 32 == 0) shared.sums[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0)
      p.partial[blockIdx.x] = (shared.sums[0] + shared.sums[1] + shared.sums[2] + shared.sums[3]) * shared.powers[0];
  } else if constexpr (kOutput) {
    if (!work.last || p.final == nullptr) return;
    __syncthreads();
#pragma unroll
    for (int x = 0; x < kBlocks * 4; ++x) state[x / 4][x % 4] *= shared.powers[0];  // NaN for a bad decay
    store(p.final, p.final_strides, work.sequence);
  } else {
    store(p.carry, p.carry_strides, work.carry);
  }
}

template <class Element, Make kMake, bool kExact>
cudaError_t launch_float32(const PassParams& p, int64_t blocks, cudaStream_t stream) {
  const auto kernel = float32_kernel<Element, kMake, kExact>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Tiles));
  if (error != cudaSuccess) return error;
  kernel<<<dim3(blocks), kBlockThreads, sizeof(Tiles), stream>>>(p);
  return cudaGetLastError();
}
