// What outputs of wide heads are made of: states before chunks, and masked scores inside of them. Equations (2) and (3)
// of README.md with chunks of hundreds of tokens.
//
// A block takes a tile of one head's state and walks over a segment with it, or makes a tile of one chunk's scores.
#pragma once

#include "wide.cuh"

// A tile of a state along a segment.
struct StateUnit {
  Work work;
  int head, d_tile, e_tile;
  int chunks, walked;  // of the segment, and how many of them count
  bool used;

  __device__ StateUnit(const PrepareParams& p, int unit) {
    const int tiles = p.d_tiles * p.e_tiles, tile = unit % tiles;
    d_tile = tile / p.e_tiles, e_tile = tile % p.e_tiles;
    head = unit / tiles % p.heads;
    used = find_work(p.segments, unit / tiles / p.heads, work) && !(p.sums && work.last);
    chunks = used ? (work.length + p.chunk - 1) / p.chunk : 0;
    // The state after a sequence is wanted only if asked for.
    walked = used && !p.sums && work.last && p.final == nullptr ? chunks - 1 : chunks;
    used = used && (p.sums || walked > 0 || p.final != nullptr);
  }
  // The i-th chunk in the order of the pass: its first token, and how many.
  __device__ int start(const PrepareParams& p, int i) const {
    return work.start + (p.reverse ? chunks - 1 - i : i) * p.chunk;
  }
  __device__ int tokens(const PrepareParams& p, int start) const {
    return min(p.chunk, work.start + work.length - start);
  }
};

// A tile of a chunk's scores, of those that are not all masked.
template <class T>
struct ScoreUnit {
  Work work;
  int head, row_tile = 0, column_tile;
  bool used;

  __device__ ScoreUnit(const PrepareParams& p, int unit) {
    column_tile = unit % p.score_tiles;
    for (int columns; column_tile >= (columns = columns_of(row_tile)); ++row_tile) column_tile -= columns;
    head = unit / p.score_tiles % p.heads;
    used = find_work(p.chunks, unit / p.score_tiles / p.heads, work) && row_tile * T::kRows < work.length;
  }
  __device__ static int columns_of(int row_tile) { return (row_tile * T::kRows + T::kRows - 1) / T::kN + 1; }
};

template <class T>
__device__ void produce_state(const PrepareParams& p, WideShared<T>& shared, const StateUnit& unit) {
  Producer<T> me{shared};
  const HeadOf a(p.a, unit.head, unit.work.batch), b(p.b, unit.head, unit.work.batch);
  for (int i = 0; i < unit.walked; ++i) {
    const int start = unit.start(p, i), n = unit.tokens(p, start);
    for (int token = 0; token < n; token += T::kDepth) {
      const int stage = me.claim();
      me.left(stage, a, unit.d_tile * T::kGroups, start + token, true);
      me.right(stage, b, unit.e_tile * T::kPanels, start + token, true);
    }
  }
}

template <class T>
__device__ void produce_scores(const PrepareParams& p, WideShared<T>& shared, const ScoreUnit<T>& unit) {
  Producer<T> me{shared};
  const HeadOf rows(p.rows, unit.head, unit.work.batch), columns(p.columns, unit.head, unit.work.batch);
  for (int panel = 0; panel * kPanel < p.depth; ++panel) {
    const int stage = me.claim();
    me.left(stage, rows, panel, unit.work.start + unit.row_tile * T::kRows, false);
    me.right(stage, columns, panel, unit.work.start + unit.column_tile * T::kN, false);
  }
}

// What warpgroups do with a tile of the state: S ← λ^n S + Σ_j w_j a_jᵀ b_j over each chunk of n tokens.
template <class T>
struct StateMaker : Consumer<T> {
  using Element = typename T::Element;
  static constexpr int kHalf = 2;  // of the 4 products of a stage
  using Left = uint32_t[kHalf][4];
  const PrepareParams& p;
  const StateUnit& unit;
  const float log_lambda;
  int weighed = 0;  // for chunks of how many tokens the weights are

  __device__ StateMaker(const PrepareParams& p, WideShared<T>& shared, int group, const StateUnit& unit)
      : Consumer<T>(shared, group), p(p), unit(unit), log_lambda(decay_of(unit.work, p.log_decay, unit.head)) {}

  // For each pair of neighbours that this thread has of the tile, in a state of these strides: visit(first, second).
  template <class Value, class Visit>
  __device__ void each_pair(Value* state, const StateStrides& at, int64_t sequence, Visit visit) {
    const Lane lane;
    const int d = unit.d_tile * T::kRows + this->group * 64 + lane.row, e = unit.e_tile * T::kN + lane.pair;
    Value* from = state + sequence * at.sequence + unit.head * at.head + d * at.d + e * at.e;
#pragma unroll
    for (int x = 0; x < T::kN / 2; x += 2) {
      const int row = x / 2 % 2 * 8, column = x / 4 * 8;
      Value* here = from + row * at.d + column * at.e;
      if (d + row < p.d && e + column < p.e) visit(x, here, here + at.e);
    }
  }
  __device__ void begin() {
    this->clear();
    const auto load = [&](int x, const float* first, const float* second) {
      this->acc[x] = *first, this->acc[x + 1] = *second;
    };
    if (unit.work.first) {
      if (p.initial != nullptr) each_pair(p.initial, p.initial_strides, unit.work.sequence, load);
    } else if (!p.sums) {
      Work before;
      find_work(p.segments, unit.work.slot + (p.reverse ? 1 : -1), before);
      each_pair(static_cast<const float*>(p.carry), p.carry_strides, before.carry, load);
    }
  }
  __device__ void store(float* state, const StateStrides& at, int64_t sequence) {
    const float factor = isnan(log_lambda) ? CUDART_NAN_F : 1.f;  // however short the sequence
    each_pair(state, at, sequence, [&](int x, float* first, float* second) {
      *first = this->acc[x] * factor, *second = this->acc[x + 1] * factor;
    });
  }

  // What each token of a chunk of n weighs in the state.
  __device__ void weigh(int n) {
    if (n == weighed) return;
    weighed = n;
    this->sync();
    for (int i = threadIdx.x; i < p.chunk; i += T::kConsumers)
      this->shared.weights[i] = power(log_lambda, p.reverse ? i + 1 : max(n - 1 - i, 0));
    this->sync();
  }

  // aᵀ of half a stage, each token times its weight, as left operand.
  __device__ void load_left(Left& left, int stage, int half, int token) {
    const Lane at;
    const uint32_t base = this->left(stage) + half * kHalf * 16 * kPanelRow +
                          piece_offset(at.lane / 16 * 8 + at.lane % 8, at.thread / 32 * 2 + at.lane / 8 % 2);
    const uint32_t weights = shared_address(this->shared.weights) + (token + half * kHalf * 16 + at.pair) * 4;
#pragma unroll
    for (int x = 0; x < kHalf; ++x) load_blocks<true>(left[x], base + x * 16 * kPanelRow);
#pragma unroll
    for (int x = 0; x < kHalf; ++x) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 of = load_pair(weights + x * 64 + i / 2 * 32), pair = unpack<Element>(left[x][i]);
        left[x][i] = pack<Element>(pair.x * of.x, pair.y * of.y);
      }
    }
  }
  // The half's products run when it returns; those of `other`, the half before it, are done.
  __device__ void advance(Left& left, Left& other, int stage, int half, int token) {
    load_left(left, stage, half, token);
    const uint32_t b = this->right(stage) + half * kHalf * 16 * kPanelRow;
    wgmma_hold(left);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kHalf; ++x)
      wgmma<Element, T::kN, 1>(this->acc, left[x], descriptor(b + x * 16 * kPanelRow, kPanelBytes), 1);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_hold(other);
  }

  __device__ void walk() {
    begin();
    for (int i = 0; i < unit.walked; ++i) {
      const int start = unit.start(p, i), n = unit.tokens(p, start);
      weigh(n);
      const float carried = power(log_lambda, n);
      this->scale(carried, carried);
      wgmma_hold(this->acc);
      Left left[2] = {};
      for (int token = 0; token < n; token += T::kDepth, ++this->step) {
        const int stage = this->next([&](int stage) {
          if (n - token < T::kDepth && p.segments.table != nullptr) this->clear_rows(stage, 0, n - token);
        });
        advance(left[0], left[1], stage, 0, token);
        if (token > 0) this->release((this->step - 1) % T::kStages);
        advance(left[1], left[0], stage, 1, token);
      }
      wgmma_wait<0>();
      wgmma_hold(this->acc);
      wgmma_hold(left[1]);
      this->release((this->step - 1) % T::kStages);
      if (p.sums || (unit.work.last && i == unit.chunks - 1)) continue;
      const int d = unit.d_tile * T::kRows, e = unit.e_tile * T::kN;
      const int64_t after = (unit.work.batch * p.chunks.segments + start / p.chunk) * p.heads + unit.head;
      this->put_out(static_cast<Element*>(p.states) + (after * p.d + d) * p.e + e, p.d - d, p.e - e, p.e);
    }
    if (p.sums)
      store(p.carry, p.carry_strides, unit.work.carry);
    else if (unit.work.last && p.final != nullptr)
      store(p.final, p.final_strides, unit.work.sequence);
  }
};

// Scores times λ^(i-j); chosen, not multiplied where masked: 0 · NaN is NaN.
template <class T>
__device__ void make_scores(const PrepareParams& p, WideShared<T>& shared, int group, const ScoreUnit<T>& unit) {
  Consumer<T> me(shared, group);
  const float log_lambda = decay_of(unit.work, p.log_decay, unit.head);
  for (int i = threadIdx.x; i < p.chunk; i += T::kConsumers) shared.weights[i] = power(log_lambda, i);
  me.sync();
  const int panels = (p.depth + kPanel - 1) / kPanel;
  const auto nothing = [](int) {};
  me.clear();
  me.template multiply<0, 0>(panels, nothing);
  const Lane at;
  const int distance = unit.row_tile * T::kRows + group * 64 + at.row - unit.column_tile * T::kN - at.pair;
#pragma unroll
  for (int x = 0; x < T::kN / 2; ++x) {
    const int here = distance + x / 2 % 2 * 8 - x / 4 * 8 - x % 2;
    me.acc[x] = here < 0 ? 0.f : me.acc[x] * shared.weights[here];
  }
  const int row = unit.row_tile * T::kRows, column = unit.column_tile * T::kN;
  const int64_t token = (int64_t(unit.work.batch) * p.heads + unit.head) * p.chunks.tokens + unit.work.start + row;
  me.put_out(static_cast<typename T::Element*>(p.scores) + token * p.chunk + column, unit.work.length - row,
             p.chunk - column, p.chunk);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) prepare_kernel(const __grid_constant__ PrepareParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<WideShared<T>*>(memory);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;
  if (blockIdx.x < p.state_units) {  // first, since they take longest
    const StateUnit unit(p, blockIdx.x);
    if (!unit.used) return;
    init_barriers(shared);
    by_role<T>([&] { produce_state<T>(p, shared, unit); },
               [&](int group) { StateMaker<T>(p, shared, group, unit).walk(); });
  } else {
    const ScoreUnit<T> unit(p, blockIdx.x - p.state_units);
    if (!unit.used) return;
    init_barriers(shared);
    by_role<T>([&] { produce_scores<T>(p, shared, unit); }, [&](int group) { make_scores<T>(p, shared, group, unit); });
  }
}

template <class Element>
cudaError_t run_prepare(const PrepareParams& p, WideTile tile, cudaStream_t stream) {
  return with_wide<Element>(tile, [&](auto sizes) {
    using T = decltype(sizes);
    const int64_t blocks = p.state_units + p.score_units;
    return blocks == 0 ? cudaSuccess : launch_wide<T>(prepare_kernel<T>, p, blocks, stream);
  });
}
