// Masked linear attention of narrow heads, out = ((x yᵀ) ⊙ M) z: equation (10) of README.md.
//
// A block keeps rows of x and their sums of out in registers, a warpgroup 64 of each, and one warp copies tiles of y, z
// and M to a ring of stages. No softmax: scores are final as soon as they are made.
#pragma once

#include "async.cuh"
#include "masked.h"
#include "put_out.cuh"
#include "wgmma.cuh"

// kProblems: 1 or 2; kParts: how many bfloat16 numbers a value is split in; kGroups: warpgroups that multiply; kN:
// columns of a stage.
template <class Element_, class Weight_, int kWidth_, int kProblems_, int kParts_, int kGroups_, int kN_>
struct Masked {
  using Element = Element_;
  using Weight = Weight_;  // of the mask, Element or float
  static constexpr int kWidth = kWidth_, kProblems = kProblems_, kParts = kParts_, kGroups = kGroups_, kN = kN_;
  static constexpr bool kTf32 = std::is_same_v<Element, float>;
  static constexpr int kPanelColumns = kPanelRow / int(sizeof(Element));
  static constexpr int kRows = 64 * kGroups, kPanels = kWidth / kPanelColumns;
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  // The tensor cores cut sums off where they should round: where that counts, long ones are made outside.
  static constexpr bool kOutside = kParts == 3;
  static constexpr bool kFloat = kParts > 1 || kTf32, kFloatMask = std::is_same_v<Weight, float>;
  // Of float32 x is read from registers: a product 64 wide is else bound by shared memory.
  static constexpr bool kKeepX = kFloat;
  // Problems whose scores are made at a time: registers hold no more of wide ones.
  static constexpr int kTogether = kWidth == 64 && kN == 64 ? kProblems : 1;
  static constexpr int kXPanelBytes = kRows * kPanelRow, kYPanelBytes = kN * kPanelRow;
  static constexpr int kXBytes = kPanels * kXPanelBytes, kYBytes = kPanels * kYPanelBytes;
  // Tensor cores take 4-byte numbers along the sum alone: z comes transposed, its columns along rows.
  static constexpr int kZPanels = kTf32 ? kN / kPanelColumns : kPanels;
  static constexpr int kZPanelBytes = (kTf32 ? kWidth : kN) * kPanelRow;
  static_assert(kZPanels * kZPanelBytes == kYBytes);
  static constexpr int kMaskPanel = kPanelRow / int(sizeof(Weight));  // columns of a panel of the mask
  static constexpr int kMaskBytes = kRows * kN * int(sizeof(Weight));
  static constexpr int kStageBytes = 2 * kParts * kYBytes + kMaskBytes;
  static constexpr int kStagingBytes = kFloat ? 1024 : kGroups * kPanelBytes;
  static constexpr int kFit = (226 * 1024 - kProblems * kParts * kXBytes - kStagingBytes) / kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static_assert(kStages >= 2);
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8, kProducerRegisters = 40;
  static constexpr int kFree = ((kGroups + 1) * kFirstRegisters - kProducerRegisters) / kGroups / 8 * 8;
  static constexpr int kConsumerRegisters = kFree < 240 ? kFree : 240;
};

// A tile of rows of out.
struct MaskedUnit {
  int batch, head, first;  // head: of out; first: row

  // Tiles of rows of some heads are neighbours: those at work at a time read the same of the mask, and of y and z.
  __device__ MaskedUnit(const MaskedParams& p, int index, int tile_rows) {
    const int heads = p.heads / p.shares, pairs = p.batch * heads, per_group = kPairsTogether * p.row_tiles;
    const int group = index / per_group, rest = index % per_group;
    const int together = min(kPairsTogether, pairs - group * kPairsTogether);
    const int pair = group * kPairsTogether + rest % together;
    batch = pair / heads, head = pair % heads, first = rest / together * tile_rows;
  }
};

// The block's units: its turns go forth and back, so that all blocks have as much where work grows along the order.
// Returns -1 behind the last one.
__device__ inline int unit_of_turn(const MaskedParams& p, int& turn) {
  const int blocks = gridDim.x, at = turn % 2 ? blocks - 1 - blockIdx.x : blockIdx.x, index = turn * blocks + at;
  ++turn;
  return index < p.units ? index : -1;
}

// Rounded to tf32, of which the tensor cores read the upper bits alone.
__device__ inline uint32_t to_tf32(uint32_t x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
  return rounded;
}

template <class T>
struct alignas(1024) MaskedShared {
  uint8_t x[T::kProblems][T::kParts][T::kXBytes];
  uint8_t stages[T::kStages][T::kStageBytes];  // parts of y, parts of z, the mask
  uint8_t staging[T::kStagingBytes];
  int last[T::kStages];  // whether it is the last one of a unit
  Barrier x_full, x_empty, full[T::kStages], empty[T::kStages];
};

// One warp: all lanes look for tiles that are used, the first one copies.
template <class T>
struct MaskedProducer {
  const MaskedParams& p;
  MaskedShared<T>& shared;
  int step = 0, number = 0;  // stages and units so far

  // Panels of `rows` rows from `token` on; each is one box, or all are.
  __device__ static void copy(uint8_t* to, int panels, int panel_bytes, const TiledTensor& from, Barrier& barrier,
                              int first_panel, int panel_columns, int token, int head, int batch) {
    if (from.at_once) {
      copy_box(to, from.map, barrier, Keep::kNormal, {0, token, first_panel, head, batch});
    } else {
#pragma unroll 1
      for (int i = 0; i < panels; ++i)
        copy_box(to + i * panel_bytes, from.map, barrier, Keep::kNormal,
                 {(first_panel + i) * panel_columns, token, 0, head, batch});
    }
  }
  __device__ static void copy_parts(uint8_t* to, int bytes, int panel_bytes, const TiledTensor& from, Barrier& barrier,
                                    int token, int head, int batch) {
    for (int part = 0; part < T::kParts; ++part)
      copy(to + part * bytes, T::kPanels, panel_bytes, from, barrier, 0, T::kPanelColumns, token,
           head / from.group * T::kParts + part, batch * from.batch);
  }
  __device__ void copy_z(uint8_t* to, Barrier& barrier, int column, int head, int batch) {
    if constexpr (T::kTf32)
      copy(to, T::kZPanels, T::kZPanelBytes, p.z, barrier, column / T::kPanelColumns, T::kPanelColumns, 0,
           head / p.z.group, batch * p.z.batch);
    else
      copy_parts(to, T::kYBytes, T::kYPanelBytes, p.z, barrier, column, head, batch);
  }

  __device__ void rows(const MaskedUnit& unit) {
    if (number > 0) shared.x_empty.wait((number - 1) & 1);
    ++number;
    shared.x_full.arrive_expecting(sizeof(shared.x));
    for (int problem = 0; problem < T::kProblems; ++problem)
      copy_parts(shared.x[problem][0], T::kXBytes, T::kXPanelBytes, p.problems[problem].x, shared.x_full, unit.first,
                 unit.head * p.shares, unit.batch);
  }

  __device__ void tile(const MaskedUnit& unit, int head, int tile, bool last) {
    const int stage = step % T::kStages, column = tile * T::kN;
    if (step >= T::kStages) shared.empty[stage].wait(parity(step, T::kStages) ^ 1);
    ++step;
    shared.last[stage] = last;
    Barrier& full = shared.full[stage];
    full.arrive_expecting(T::kStageBytes);
    uint8_t* to = shared.stages[stage];
    copy_parts(to, T::kYBytes, T::kYPanelBytes, p.y, full, column, head, unit.batch);
    to += T::kParts * T::kYBytes;
    copy_z(to, full, column, head, unit.batch);
    to += T::kParts * T::kYBytes;
    const int mask_head = head / p.mask.group, mask_batch = unit.batch * p.mask.batch;
    if (p.transposed)
      copy(to, T::kRows / T::kMaskPanel, T::kN * kPanelRow, p.mask, full, unit.first / T::kMaskPanel, T::kMaskPanel,
           column, mask_head, mask_batch);
    else
      copy(to, T::kN / T::kMaskPanel, T::kRows * kPanelRow, p.mask, full, column / T::kMaskPanel, T::kMaskPanel,
           unit.first, mask_head, mask_batch);
  }

  // Whether a tile of columns has weights that are not zero.
  __device__ bool used(const MaskedUnit& unit, int head, int tile) const {
    if (tile * T::kN >= p.columns) return false;
    if (p.used == nullptr) return true;
    const int row = unit.first / kMaskTile, column = tile * (T::kN / kMaskTile);
    const int first_row = p.transposed ? column : row, first_column = p.transposed ? row : column;
    const int rows = p.transposed ? T::kN / kMaskTile : T::kGroups, columns = p.transposed ? T::kGroups : T::kN / 64;
    const int entry = unit.batch * p.mask.batch * p.used_heads + head / p.mask.group;
    bool found = false;
    for (int i = first_row; i < min(first_row + rows, p.used_rows); ++i)
      for (int j = first_column; j < min(first_column + columns, p.used_columns); ++j)
        found |= p.used[(int64_t(entry) * p.used_rows + i) * p.used_columns + j] != 0;
    return found;
  }

  __device__ void walk(int lane) {
    const int tiles = (p.columns + T::kN - 1) / T::kN;
    int turn = 0;
    for (int index; (index = unit_of_turn(p, turn)) >= 0;) {
      const MaskedUnit unit(p, index, T::kRows);
      if (lane == 0) rows(unit);
      // A tile is copied when the next one is found, or the end: it says which it is.
      int before_head = unit.head * p.shares, before = -1;
      for (int share = 0; share < p.shares; ++share) {
        const int head = unit.head * p.shares + share;
        for (int first = 0; first < tiles; first += 32) {
          for (unsigned list = __ballot_sync(~0u, used(unit, head, first + lane)); list != 0; list &= list - 1) {
            if (lane == 0 && before >= 0) tile(unit, before_head, before, false);
            before_head = head, before = first + __ffs(list) - 1;
          }
        }
      }
      if (lane == 0) tile(unit, before_head, max(before, 0), true);
      __syncwarp();
    }
  }
};

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
      arrive_as_warp(shared.x_empty);
    }
  }

  __device__ static void load_x(uint32_t (&to)[4], uint32_t address, const Lane& at, int step) {
    if constexpr (T::kTf32) {
      address += step / 4 * T::kXPanelBytes + at.pair * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[i] = to_tf32(load_word(address + piece_offset(at.row + i % 2 * 8, step % 4 * 2 + i / 2)));
    } else {
      load_blocks<false>(to, address + at.block(step));
    }
  }

  // The products of parts a and b for which a + b < kParts, the smallest first: use(a, b).
  template <class Use>
  __device__ static void each_product(Use use) {
#pragma unroll
    for (int sum = T::kParts - 1; sum >= 0; --sum)
#pragma unroll
      for (int a = 0; a <= sum; ++a) use(a, sum - a);
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
    each_product([&](int a, int b) {
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
        weighed[0][i / 2][i % 2] = to_tf32(__float_as_uint(pair.x));
        weighed[0][i / 2][i % 2 + 2] = to_tf32(__float_as_uint(pair.y));
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
    each_product([&](int a, int b) {
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

template <class Element, class Weight, int kWidth, int kProblems, int kParts>
struct MaskedOf {
  static constexpr MaskedTile kTile =
      masked_tile(kWidth, kProblems, kParts, std::is_same_v<Element, float>, std::is_same_v<Weight, float>);
  using T = Masked<Element, Weight, kWidth, kProblems, kParts, kTile.groups, kTile.columns>;
};

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
