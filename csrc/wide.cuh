// Large products for wide heads: what `wide_prepare.cuh` and `wide_outputs.cuh` share.
//
// One warp copies tiles to a ring of stages, 64 deep along the sum of the product, and two or three warpgroups multiply
// them: 64 rows each, all columns. Every tile is boxes of 64 rows of 64 columns as the copy engine brings them,
// whatever the dims of the product that lie along rows and columns: the tensor cores take either.
#pragma once

#include <math_constants.h>

#include "async.cuh"
#include "decay.cuh"
#include "put_out.cuh"
#include "segments.cuh"
#include "tile.cuh"
#include "wgmma.cuh"
#include "wide.h"

template <class Element_, int kGroups_, int kN_>
struct Wide {
  using Element = Element_;
  static constexpr int kGroups = kGroups_, kRows = 64 * kGroups;  // warpgroups that multiply
  static constexpr int kN = kN_, kPanels = kN / kPanel;           // columns
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup, kConsumers = kGroups * kWarpgroup;
  static constexpr int kStages = 4, kDepth = 64;
  static constexpr int kStageBytes = (kGroups + kPanels) * kPanelBytes;
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 224 : 152, kProducerRegisters = 56;
  static_assert(kGroups * kConsumerRegisters + kProducerRegisters <= (kGroups + 1) * kFirstRegisters);
};

// A tile of one output: rows of a chunk.
struct OutputUnit {
  int output;  // which, or -1 behind the last unit
  int head, batch, column_tile;
  int start, length;        // of the chunk
  int first;                // row in the chunk
  int state;                // where the state lies that is read, or -1
  int initial;              // whether that is the first one of a sequence
  int first_block, blocks;  // of 64 tokens, whose values scores weigh
  float log_lambda;
};

template <class T>
struct alignas(1024) WideShared {
  uint8_t stages[T::kStages][T::kStageBytes];  // the left tile, a box for each warpgroup, and the right one
  uint8_t staging[T::kGroups][kPanelBytes];    // results on their way to memory
  union {
    alignas(8) float weights[kMostChunk];  // powers of λ, by token or by distance
    int bad[T::kN];  // of each column, the token from which on it is not finite, in the direction of the pass
  };
  int found[T::kStages];  // whether some values of a stage are not finite
  Barrier full[T::kStages], empty[T::kStages], met;
  OutputUnit units[2];  // of which one is being worked on
  Barrier unit_full[2], unit_empty[2];
};

template <class T>
__device__ void init_barriers(WideShared<T>& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(T::kGroups * kWarpgroup / 32 * kArriving);
    }
    shared.met.init(T::kGroups * kWarpgroup / 32 * kArriving);
    for (int& found : shared.found) found = false;
    for (int unit = 0; unit < 2; ++unit) {
      shared.unit_full[unit].init(1);
      shared.unit_empty[unit].init(T::kGroups * kWarpgroup / 32 * kArriving);
    }
    fence_barrier_init();
  }
  __syncthreads();
}

// Head and row of the batch of a tensor.
struct HeadOf {
  const TiledTensor& tensor;
  int head, row;
  __device__ HeadOf(const TiledTensor& tensor, int head, int batch)
      : tensor(tensor), head(head / tensor.group), row(batch * tensor.batch) {}
};

// log λ of a head, or NaN.
__device__ inline float decay_of(const Work& work, const float* log_decay, int head) {
  return work.valid ? log_decay_of(log_decay, head) : CUDART_NAN_F;
}

// The one thread that copies. All warpgroups wait for it: a stage is two copies, where panels are whole.
template <class T>
struct Producer {
  WideShared<T>& shared;
  int step = 0;

  // Waits for the next stage, and says how much comes.
  __device__ int claim(int bytes = T::kStageBytes) {
    const int stage = step % T::kStages;
    if (step >= T::kStages) shared.empty[stage].wait(parity(step, T::kStages) ^ 1);
    ++step;
    shared.full[stage].arrive_expecting(bytes);
    return stage;
  }
  // The left tile and the right one, each of panels side by side, of 64 rows, or one panel of more rows: as their maps
  // say, and `across`.
  __device__ void left(int stage, const HeadOf& from, int panel, int token, bool across) {
    copy<T::kGroups>(shared.stages[stage], stage, from, panel, token, across);
  }
  __device__ void right(int stage, const HeadOf& from, int panel, int token, bool across) {
    copy<T::kPanels>(shared.stages[stage] + T::kGroups * kPanelBytes, stage, from, panel, token, across);
  }

 private:
  template <int kBoxes>
  __device__ void copy(uint8_t* to, int stage, const HeadOf& from, int panel, int token, bool across) {
    const TiledTensor& tensor = from.tensor;
    if (!across || tensor.at_once) {
      copy_box(to, tensor.map, shared.full[stage], Keep::kNormal, tensor.corner(panel, token, from.head, from.row));
    } else {
#pragma unroll 1
      for (int i = 0; i < kBoxes; ++i)
        copy_box(to + i * kPanelBytes, tensor.map, shared.full[stage], Keep::kNormal,
                 tensor.corner(panel + i, token, from.head, from.row));
    }
  }
};

// A thread of the warpgroups that multiply.
template <class T>
struct Consumer {
  using Element = typename T::Element;
  WideShared<T>& shared;
  const int group;
  int step = 0, meetings = 0;
  float acc[T::kN / 2];  // 64 × kN, as wgmma.cuh says

  __device__ Consumer(WideShared<T>& shared, int group) : shared(shared), group(group) {}

  __device__ uint32_t left(int stage) const { return shared_address(shared.stages[stage]) + group * kPanelBytes; }
  __device__ uint32_t right(int stage) const { return shared_address(shared.stages[stage]) + T::kGroups * kPanelBytes; }
  __device__ void release(int stage) { arrive_as_warp(shared.empty[stage]); }
  // All warpgroups meet, wherever in the code each of them is: one may multiply a stage that another lets go by.
  __device__ void sync() {
    arrive_as_warp(shared.met);
    shared.met.wait(meetings++ & 1);
  }

  __device__ void clear() {
#pragma unroll
    for (float& x : acc) x = 0.f;
  }
  __device__ void scale(float above, float below) {
#pragma unroll
    for (int x = 0; x < T::kN / 2; ++x) acc[x] *= x / 2 % 2 ? below : above;
  }

  // Waits for the next stage, which `look` sees before anything is multiplied.
  template <class Look>
  __device__ int next(Look look) {
    const int stage = step % T::kStages;
    shared.full[stage].wait(parity(step, T::kStages));
    look(stage);
    return stage;
  }
  // Lets `count` stages go by, of which others need some.
  template <class Look>
  __device__ void pass_by(int count, Look look) {
    for (int i = 0; i < count; ++i, ++step) release(next(look));
  }
  // Adds `count` stages to acc. kTransposeLeft, kTransposeRight: the tile's rows lie along the sum.
  template <int kTransposeLeft, int kTransposeRight, class Look>
  __device__ void multiply(int count, Look look) {
    constexpr int kWhere = kTransposeLeft * 2 + kTransposeRight;
    wgmma_hold(acc);
    for (int i = 0; i < count; ++i, ++step) {
      const int stage = next(look);
      const uint32_t a = left(stage), b = right(stage);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < T::kDepth / 16; ++x) {
        constexpr int kAcross = 16 * kPanelRow, kAlong = 32;  // bytes to the next 16 of the sum
        wgmma<Element, T::kN, kTransposeRight, kTransposeLeft>(
            acc, descriptor(a + x * (kTransposeLeft ? kAcross : kAlong)),
            kTransposeRight ? descriptor(b + x * kAcross, kPanelBytes) : descriptor(b + x * kAlong), 1);
      }
      wgmma_commit();
      wgmma_wait<1, kWhere>();
      if (i > 0) release((step - 1) % T::kStages);
    }
    wgmma_wait<0, kWhere>();
    wgmma_hold(acc);
    if (count > 0) release((step - 1) % T::kStages);
  }

  // Rows behind the end of a sequence belong to another one: times zero they could still be NaN. Boxes from `first` on.
  __device__ void clear_rows(int stage, int first, int n) {
    const uint32_t base = shared_address(shared.stages[stage]);
    for (int x = first * 512 + int(threadIdx.x); x < (T::kGroups + T::kPanels) * 512; x += T::kConsumers)
      if (x / 8 % 64 >= n) store_piece(base + x * 16, make_uint4(0, 0, 0, 0));
    fence_for_async();
    sync();
  }

  // To memory, the first rows and columns that count, of rows `width` apart; `to` is where the tile begins.
  __device__ void put_out(Element* to, int rows, int columns, int width) {
    put_out_rows<Element, T::kPanels>(acc, shared_address(shared.staging[group]), to, group * 64, rows, columns, width);
  }
};

// Splits the block: produce() by one thread, consume(group) by the warpgroups that multiply.
template <class T, class Produce, class Consume>
__device__ void by_role(Produce produce, Consume consume) {
  // By a shuffle, so that the compiler knows it to be the same for a warp.
  const int group = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (group == T::kGroups) {
    set_registers<T::kProducerRegisters, T::kFirstRegisters>();
    if (threadIdx.x % kWarpgroup == 0) produce();
  } else {
    set_registers<T::kConsumerRegisters, T::kFirstRegisters>();
    consume(group);
  }
}

template <class T, class Params>
cudaError_t launch_wide(void (*kernel)(Params), const Params& p, int64_t blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(WideShared<T>);
  static_assert(kBytes <= 227 * 1024);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(blocks), T::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

// run(T), with the sizes of a tile.
template <class Element, class Run>
cudaError_t with_wide(WideTile tile, Run run) {
  return tile.rows == kSquareTile.rows ? run(Wide<Element, kSquareTile.rows / 64, kSquareTile.columns>{})
                                       : run(Wide<Element, kLongTile.rows / 64, kLongTile.columns>{});
}
