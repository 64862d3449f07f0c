// Masked linear attention of narrow heads, out = ((x yᵀ) ⊙ M) z: equation (10) of README.md.
//
// A block keeps rows of x in shared memory and their sums of out in registers, a warpgroup 64 of each, and one warp
// copies tiles of y, z and M to a ring of stages. No softmax: scores are final as soon as they are made.
#pragma once

#include "element.cuh"
#include "masked_fetch.cuh"
#include "put_out.cuh"
#include "split.cuh"
#include "wgmma.cuh"

// A thread of the warpgroups that multiply.
template <class T>
struct MaskedConsumer {
  using Element = typename T::Element;
  static constexpr int kScores = T::kN / 2, kOut = T::kWidth / 2, kBlocks = T::kN / 16;
  // Products along the width and along columns: 32 bytes of a row each.
  static constexpr int kSteps = T::kWidth * int(sizeof(Element)) / 32, kZSteps = T::kN * int(sizeof(Element)) / 32;
  const MaskedParams& p;
  MaskedShared<T>& shared;
  const int group;
  int step = 0;
  float out[T::kProblems][kOut], scores[T::kTogether][kScores];
  float tile_out[T::kOutside ? kOut : 1] = {};  // of the last tile alone
  using Weighed = uint32_t[T::kParts][kZSteps][4];
  using Weights = uint32_t[kBlocks][T::kFloatMask ? 8 : 4];
  Weighed weighed[T::kTogether] = {};  // scores ⊙ M as left operands
  uint32_t x[T::kKeepX ? T::kProblems : 1][T::kParts][T::kKeepX ? kSteps : 1][4];

  __device__ MaskedConsumer(const MaskedParams& p, MaskedShared<T>& shared, int group)
      : p(p), shared(shared), group(group) {}

  __device__ uint32_t x_address(int problem, int part) const {
    return shared_address(shared.x[problem][part]) + group * kPanelBytes;
  }
  __device__ uint32_t stream(int stage, int which, int part) const {
    return shared_address(shared.stages[stage]) + (which * T::kParts + part) * T::kYBytes;
  }

  __device__ void load_x() {
    if constexpr (T::kKeepX) {
      const Lane at;
#pragma unroll
      for (int problem = 0; problem < T::kProblems; ++problem)
#pragma unroll
        for (int part = 0; part < T::kParts; ++part)
#pragma unroll
          for (int i = 0; i < kSteps; ++i) load_x(x[problem][part][i], x_address(problem, part), at, i);
      fence_for_async();
      arrive_as_warp(shared.x_empty);
    }
  }

  __device__ static void load_x(uint32_t (&to)[4], uint32_t address, const Lane& at, int step) {
    if constexpr (T::kTf32) {
      address += step / 4 * T::kXPanelBytes + at.pair * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[i] = to_tf32(__uint_as_float(load_word(address + piece_offset(at.row + i % 2 * 8, step % 4 * 2 + i / 2))));
    } else {
      load_blocks<false>(to, address + at.block(step));
    }
  }

  // Real instructions, which change nothing: the compiler (nvcc 13.0) would take left operands that stay the same in a
  // loop for those of the other product, and overwrite them.
  __device__ void renew_x() {
    if constexpr (T::kKeepX) {
      const int zero = p.number >> 8;
#pragma unroll
      for (int i = 0; i < T::kParts * kSteps * 4; ++i)
        asm volatile("xor.b32 %0, %0, %1;" : "+r"(x[0][i / 4 / kSteps][i / 4 % kSteps][i % 4]) : "r"(zero));
    }
  }

  __device__ void make_scores(float (&to)[kScores], int problem, int stage) {
    wgmma_hold(to);
    wgmma_fence();
    int add = 0;
    each_product<T::kParts>([&](int a, int b) {
      const uint32_t y = stream(stage, problem, b);
#pragma unroll
      for (int i = 0; i < kSteps; ++i, add = 1) {
        const uint64_t right = descriptor(y + i / 4 * T::kYPanelBytes + i % 4 * 32);
        if constexpr (T::kTf32)
          wgmma_tf32(to, x[problem][a][i], right, add);
        else if constexpr (T::kKeepX)
          wgmma<Element, T::kN, 0>(to, x[problem][a][i], right, add);
        else
          wgmma<Element, T::kN, 0>(to, descriptor(x_address(problem, a) + i / 4 * T::kXPanelBytes + i % 4 * 32), right,
                                   add);
      }
    });
    wgmma_commit();
  }

  // Of the mask as it lies in a stage: the weights of a thread's scores[8 block] to [8 block + 7], packed as they are.
  __device__ void load_weights(Weights& w, int stage) const {
    const Lane at;
    const uint32_t mask = stream(stage, 2, 0);
    if constexpr (!T::kFloatMask) {
      const uint32_t across = mask + group * T::kN * kPanelRow +
                              piece_offset(at.lane / 16 * 8 + at.lane % 8, at.thread / 32 * 2 + at.lane / 8 % 2);
      if (T::kProblems == 2 || p.transposed) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) load_blocks<true>(w[block], across + block * 16 * kPanelRow);
      } else {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
          load_blocks<false>(w[block],
                             mask + block / 4 * T::kRows * kPanelRow + group * kPanelBytes + at.block(block % 4));
      }
    } else if (T::kProblems == 2 || p.transposed) {
#pragma unroll
      for (int i = 0; i < kBlocks * 4; ++i) {
        const int row = at.row + i % 2 * 8, column = i / 2 * 8 + at.pair;
        const uint32_t panel = mask + (group * 2 + row / 32) * T::kN * kPanelRow + row % 4 * 4;
        w[i / 4][i % 4 * 2] = load_word(panel + piece_offset(column, row % 32 / 4));
        w[i / 4][i % 4 * 2 + 1] = load_word(panel + piece_offset(column + 1, row % 32 / 4));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBlocks * 4; ++i) {
        const int row = at.row + i % 2 * 8, column = i / 2 * 8 + at.pair;
        const uint32_t panel = mask + (column / 32 * T::kRows + group * 64) * kPanelRow;
        const float2 pair = load_pair(panel + piece_offset(row, column % 32 / 4) + column % 4 * 4);
        w[i / 4][i % 4 * 2] = __float_as_uint(pair.x), w[i / 4][i % 4 * 2 + 1] = __float_as_uint(pair.y);
      }
    }
  }

  __device__ void weigh(float (&of)[kScores], const Weights& weights, Weighed& weighed) {
    wgmma_hold(of);
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i) {
      float2 pair;
      if constexpr (T::kFloatMask)
        pair = make_float2(__uint_as_float(weights[i / 4][i % 4 * 2]), __uint_as_float(weights[i / 4][i % 4 * 2 + 1]));
      else
        pair = unpack<Element>(weights[i / 4][i % 4]);
      pair.x *= of[2 * i], pair.y *= of[2 * i + 1];
      if constexpr (T::kTf32) {  // neighbours stand at 0 and 4 of 8 along the sum: z has them so
        weighed[0][i / 2][i % 2] = to_tf32(pair.x);
        weighed[0][i / 2][i % 2 + 2] = to_tf32(pair.y);
      } else {
#pragma unroll
        for (int part = 0; part < T::kParts; ++part) {
          const uint32_t packed = pack<Element>(pair.x, pair.y);
          weighed[part][i / 4][i % 4] = packed;
          if (part + 1 < T::kParts) {
            const float2 taken = unpack<Element>(packed);
            pair.x -= taken.x, pair.y -= taken.y;
          }
        }
      }
    }
  }

  // to (+)= weighed scores times z, or y for the second problem.
  __device__ void multiply(float (&to)[kOut], Weighed& weighed, int problem, int stage, int add) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) wgmma_hold(weighed[part]);
    wgmma_hold(to);
    wgmma_fence();
    each_product<T::kParts>([&](int a, int b) {
      const uint32_t z = stream(stage, 1 - problem, b);
#pragma unroll
      for (int i = 0; i < kZSteps; ++i, add = 1) {
        if constexpr (T::kTf32)
          wgmma_tf32(to, weighed[a][i], descriptor(z + i / 4 * T::kZPanelBytes + i % 4 * 32), add);
        else
          wgmma<Element, T::kWidth, 1>(to, weighed[a][i], descriptor(z + i * 16 * kPanelRow, T::kZPanelBytes), add);
      }
    });
    wgmma_commit();
  }
  // Until then they read their left operands, which must stay where they are.
  __device__ void wait_for_products() {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < T::kTogether; ++i)
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) wgmma_hold(weighed[i][part]);
    if constexpr (T::kOutside) {
      wgmma_hold(tile_out);
#pragma unroll
      for (int i = 0; i < kOut; ++i) out[0][i] += tile_out[i];
    }
  }
  __device__ void release(int of_step) { arrive_as_warp(shared.empty[of_step % T::kStages]); }

  // Returns whether it was the last tile of the unit. Products with z run on into the next tile; while this warpgroup
  // weighs, the tensor cores have the others' products.
  __device__ bool tile(bool first) {
    const int stage = step % T::kStages;
    shared.full[stage].wait(parity(step, T::kStages));
    const bool last = shared.last[stage];
    Weights weights;
    renew_x();
#pragma unroll
    for (int from = 0; from < T::kProblems; from += T::kTogether) {
#pragma unroll
      for (int i = 0; i < T::kTogether; ++i) make_scores(scores[i], from + i, stage);
      if (from == 0 && !T::kOutside) load_weights(weights, stage);  // while scores are made
      wait_for_products();
      if (from == 0 && !first) release(step - 1);
      if (!T::kKeepX && last && from + T::kTogether == T::kProblems) arrive_as_warp(shared.x_empty);
      if (T::kOutside) load_weights(weights, stage);  // there are no registers for them before
#pragma unroll
      for (int i = 0; i < T::kTogether; ++i) weigh(scores[i], weights, weighed[i]);
#pragma unroll
      for (int i = 0; i < T::kTogether; ++i) {
        if constexpr (T::kOutside)
          multiply(tile_out, weighed[i], from + i, stage, 0);
        else
          multiply(out[from + i], weighed[i], from + i, stage, 1);
      }
    }
    ++step;
    return last;
  }

  __device__ void put_out(const MaskedUnit& unit, int problem) {
    const auto& to = p.problems[problem];
    const int64_t row = (int64_t(unit.batch) * (p.heads / p.shares) + unit.head) * p.rows + unit.first;
    const int rows = p.rows - unit.first, width = to.out_width;
    if constexpr (T::kFloat)
      put_out_rows<T::kWidth / kPanel>(out[problem], static_cast<float*>(to.out) + (row + group * 64) * width,
                                       rows - group * 64, width, width);
    else
      put_out_rows<Element, T::kPanels>(out[problem], shared_address(shared.staging) + group * kPanelBytes,
                                        static_cast<Element*>(to.out) + row * width, group * 64, rows, width, width);
  }

  __device__ void walk() {
    int turn = 0, number = 0;
    for (int index; (index = unit_of_turn(p, turn)) >= 0; ++number) {
      const MaskedUnit unit(p, index, T::kRows);
      shared.x_full.wait(number & 1);
      load_x();
#pragma unroll
      for (int problem = 0; problem < T::kProblems; ++problem)
#pragma unroll
        for (float& value : out[problem]) value = 0.f;
      if constexpr (T::kOutside) {
#pragma unroll
        for (float& value : tile_out) value = 0.f;
      }
      for (bool first = true, last = false; !last; first = false) last = tile(first);
      wait_for_products();
#pragma unroll
      for (int problem = 0; problem < T::kProblems; ++problem) wgmma_hold(out[problem]);
      release(step - 1);
#pragma unroll
      for (int problem = 0; problem < T::kProblems; ++problem) put_out(unit, problem);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) masked_kernel(const __grid_constant__ MaskedParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<MaskedShared<T>*>(memory);
  if (threadIdx.x == 0) {
    shared.x_full.init(1);
    shared.x_empty.init(T::kGroups * 4 * kArriving);
    for (int stage = 0; stage < T::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(T::kGroups * 4 * kArriving);
    }
    fence_barrier_init();
  }
  __syncthreads();
  // By a shuffle, so that the compiler knows it to be the same for a warp.
  const int group = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (group == T::kGroups) {
    set_registers<T::kProducerRegisters, T::kFirstRegisters>();
    if (threadIdx.x % kWarpgroup < 32) MaskedProducer<T>{p, shared}.walk(threadIdx.x % 32);
  } else {
    set_registers<T::kConsumerRegisters, T::kFirstRegisters>();
    MaskedConsumer<T>(p, shared, group).walk();
  }
}

template <class Of>
cudaError_t launch_masked(MaskedParams& p, int multiprocessors, cudaStream_t stream) {
  using T = typename Of::T;
  constexpr int kBytes = sizeof(MaskedShared<T>);
  static_assert(kBytes <= 227 * 1024);
  p.row_tiles = (p.rows + T::kRows - 1) / T::kRows;
  p.units = int64_t(p.batch) * (p.heads / p.shares) * p.row_tiles;
  const auto kernel = masked_kernel<T>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(p.units < multiprocessors ? p.units : multiprocessors), T::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Element, class Weight>
cudaError_t run_masked(MaskedParams& p, int width, int multiprocessors, cudaStream_t stream) {
  if (width == 64)
    return p.number == 1 ? launch_masked<MaskedOf<Element, Weight, 64, 1, 1>>(p, multiprocessors, stream)
                         : launch_masked<MaskedOf<Element, Weight, 64, 2, 1>>(p, multiprocessors, stream);
  return p.number == 1 ? launch_masked<MaskedOf<Element, Weight, 128, 1, 1>>(p, multiprocessors, stream)
                       : launch_masked<MaskedOf<Element, Weight, 128, 2, 1>>(p, multiprocessors, stream);
}
