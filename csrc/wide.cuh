// Large products for wide heads: what `wide_prepare.cuh` and `wide_outputs.cuh` share.
//
// One warp copies tiles to a ring of stages, 64 deep along the sum of the product, and two or three warpgroups multiply
// them: 64 rows each, all columns. Every tile is boxes of 64 rows of 64 columns as the copy engine brings them,
// whatever the dims of the product that lie along rows and columns: the tensor cores take either.
#pragma once

#include <climits>

#include <math_constants.h>

#include "async.cuh"
#include "cluster.cuh"
#include "decay.cuh"
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
  static constexpr int kStaging = kGroups == 2 ? 2 : 1;  // panels of results on their way to memory, of a warpgroup
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 224 : 152, kProducerRegisters = 56;
};

template <class T>
struct alignas(1024) WideShared {
  uint8_t stages[T::kStages][T::kStageBytes];  // the left tile, a box for each warpgroup, and the right one
  uint8_t staging[T::kGroups][T::kStaging][kPanelBytes];
  union {
    alignas(8) float weights[kMostChunk];  // powers of λ, by token or by distance
    int bad[T::kN];  // of each column, the token from which on it is not finite, in the direction of the pass
  };
  Barrier full[T::kStages], empty[T::kStages];
};

// Where a block stands among those that share tiles: those of one row have the same left tile, those of one column the
// same right one.
struct Place {
  const ClusterShape shape;
  const int base;  // the cluster's rank of the first
  const int row, column;

  // The cluster holds as many of these shapes as fit.
  __device__ explicit Place(const ClusterShape& shape)
      : shape(shape),
        base(rank_in_cluster() / (shape.rows * shape.columns) * (shape.rows * shape.columns)),
        row((rank_in_cluster() - base) / shape.columns),
        column((rank_in_cluster() - base) % shape.columns) {}
  __device__ int rank(int row, int column) const { return base + row * shape.columns + column; }
  __device__ int blocks_to_wait_for() const { return shape.rows + shape.columns - 1; }
};

template <class T>
__device__ void init_barriers(WideShared<T>& shared, const Place& place) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(place.blocks_to_wait_for() * T::kGroups * kWarpgroup / 32 * kArriving);
    }
    fence_barrier_init();
  }
  sync_cluster();
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

// The one thread that copies.
template <class T>
struct Producer {
  WideShared<T>& shared;
  const Place& place;
  const uint16_t left_ranks, right_ranks;  // to whom it copies boxes of the tiles
  int step = 0;

  __device__ Producer(WideShared<T>& shared, const Place& place)
      : shared(shared),
        place(place),
        left_ranks(1 << place.rank(place.row, 0) | 1 << place.rank(place.row, place.shape.columns - 1)),
        right_ranks(1 << place.rank(0, place.column) | 1 << place.rank(place.shape.rows - 1, place.column)) {}

  // Waits for the next stage, and says that so many boxes come.
  __device__ int claim(int boxes = T::kGroups + T::kPanels) {
    const int stage = step % T::kStages;
    if (step >= T::kStages) shared.empty[stage].wait(parity(step, T::kStages) ^ 1);
    ++step;
    shared.full[stage].arrive_expecting(boxes * kPanelBytes);
    return stage;
  }
  __device__ void box(uint16_t ranks, int stage, int box, const HeadOf& from, int panel, int token) {
    uint8_t* to = shared.stages[stage] + box * kPanelBytes;
    const Corner corner = from.tensor.corner(panel, token, from.head, from.row);
    if ((ranks & (ranks - 1)) == 0)
      copy_box(to, from.tensor.map, shared.full[stage], Keep::kNormal, corner);
    else
      copy_box_to(ranks, to, from.tensor.map, shared.full[stage], Keep::kNormal, corner);
  }
  // This block's share of the left tile's boxes from `first` on: side by side, or one below the other.
  __device__ void left(int stage, const HeadOf& from, int panel, int token, bool across, int first = 0,
                       int end = T::kGroups) {
#pragma unroll
    for (int i = 0; i < T::kGroups; ++i)
      if (i >= first && i < end && i % place.shape.columns == place.column)
        box(left_ranks, stage, i, from, panel + (across ? i : 0), token + (across ? 0 : i * 64));
  }
  // And of the right one's.
  __device__ void right(int stage, const HeadOf& from, int panel, int token, bool across) {
#pragma unroll
    for (int i = 0; i < T::kPanels; ++i)
      if (i % place.shape.rows == place.row)
        box(right_ranks, stage, T::kGroups + i, from, panel + (across ? i : 0), token + (across ? 0 : i * 64));
  }
};

// Which tokens a tile of results belongs to.
struct RowsOf {
  int token;   // the first
  int n;       // how many there are
  bool alone;  // whether what lies behind them belongs to others
};

// A thread of the warpgroups that multiply.
template <class T>
struct Consumer {
  using Element = typename T::Element;
  WideShared<T>& shared;
  const Place& place;
  const int group;
  int step = 0;
  float acc[T::kN / 2];  // 64 × kN, as wgmma.cuh says

  __device__ Consumer(WideShared<T>& shared, const Place& place, int group)
      : shared(shared), place(place), group(group) {}

  __device__ uint32_t left(int stage) const { return shared_address(shared.stages[stage]) + group * kPanelBytes; }
  __device__ uint32_t right(int stage) const { return shared_address(shared.stages[stage]) + T::kGroups * kPanelBytes; }
  // Gives a stage back to all who copy to it.
  __device__ void release(int stage) {
    Barrier& empty = shared.empty[stage];
    arrive_as_warp(empty);
    if (threadIdx.x % 32 < kArriving) {
      if (place.shape.columns > 1) give_back_in(empty, place.rank(place.row, place.column ^ 1));
      if (place.shape.rows > 1) give_back_in(empty, place.rank(place.row ^ 1, place.column));
    }
  }
  __device__ void sync() { sync_threads(1, T::kConsumers); }

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

  // To memory, panel by panel: by the copy engine, or row by row amid others. `rows` is the first of its rows there, of
  // `width` columns; this warpgroup has those from group · 64 on.
  __device__ void put_out(const HeadOf& to, int first_panel, int first_row, const RowsOf& of, void* rows, int width) {
    const int n = of.n - group * 64;
    if (n <= 0) return;
    const bool by_rows = of.alone && n < 64;
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel) {
      const Lane at;
      const int column = (first_panel + panel) * kPanel;
      if (column >= width) break;
      uint8_t* staged = shared.staging[group][panel % T::kStaging];
      if (at.thread == 0) wait_for_stores<T::kStaging - 1>();
      sync_threads(2 + group, kWarpgroup);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float* values = &acc[panel * 32 + x * 8];
        store_blocks(shared_address(staged) + at.block(x),
                     {pack<Element>(values[0], values[1]), pack<Element>(values[2], values[3]),
                      pack<Element>(values[4], values[5]), pack<Element>(values[6], values[7])});
      }
      fence_for_async();
      sync_threads(2 + group, kWarpgroup);
      if (by_rows) {
        for (int x = at.thread; x < n * 8; x += kWarpgroup) {
          const int i = x / 8, piece = x % 8;
          if (column + piece * 8 < width)
            *reinterpret_cast<uint4*>(static_cast<Element*>(rows) + int64_t(group * 64 + i) * width + column +
                                      piece * 8) = load_piece(shared_address(staged) + piece_offset(i, piece));
        }
        sync_threads(2 + group, kWarpgroup);
      } else if (at.thread == 0) {
        store_box(to.tensor.map, staged, Keep::kNormal,
                  to.tensor.corner(first_panel + panel, first_row + group * 64, to.head, to.row));
        commit_stores();
      }
    }
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
    if (threadIdx.x % kWarpgroup == 0) wait_for_stores();
  }
  sync_cluster();  // others may still copy to this block's memory
}

// How a kernel is launched in clusters.
template <class T>
struct WideLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  WideLaunch(int blocks_of_cluster, cudaStream_t stream) {
    static_assert(sizeof(WideShared<T>) <= 227 * 1024);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(blocks_of_cluster), 1, 1};
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = sizeof(WideShared<T>);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  template <class Params>
  cudaError_t operator()(void (*kernel)(Params), const Params& p, int64_t blocks) {
    const cudaError_t error = allow(kernel);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(blocks);
    return cudaLaunchKernelEx(&config, kernel, p);
  }
  // How many clusters run at a time.
  template <class Params>
  cudaError_t clusters_at_once(void (*kernel)(Params), int* clusters) {
    const cudaError_t error = allow(kernel);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(cluster.val.clusterDim.x);
    return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  }

 private:
  template <class Params>
  cudaError_t allow(void (*kernel)(Params)) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes);
  }
};

// run(T), with the sizes of a tile.
template <class Element, class Run>
cudaError_t with_wide(WideTile tile, Run run) {
  return tile.rows == kSquareTile.rows ? run(Wide<Element, kSquareTile.rows / 64, kSquareTile.columns>{})
                                       : run(Wide<Element, kLongTile.rows / 64, kLongTile.columns>{});
}
