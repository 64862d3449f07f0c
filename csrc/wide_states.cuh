// States before chunks of wide heads: equation (2) of README.md with chunks of hundreds of tokens.
#pragma once

#include "wide.cuh"

// The chunks of a segment, in the order of the pass.
struct Walk {
  const WideParams& p;
  const WideUnit& unit;
  const int chunks;

  __device__ Walk(const WideParams& p, const WideUnit& unit)
      : p(p), unit(unit), chunks((unit.length + p.chunk - 1) / p.chunk) {}
  // How many count: the state after a sequence is wanted only if asked for.
  __device__ int walked() const { return !p.sums && unit.last && p.final == nullptr ? chunks - 1 : chunks; }
  // First token of the i-th, and how many there are.
  __device__ int start(int i) const { return unit.start + (p.reverse ? chunks - 1 - i : i) * p.chunk; }
  __device__ int tokens(int start) const { return min(p.chunk, unit.start + unit.length - start); }
};

template <class T>
__device__ void produce_state(const WideParams& p, Producer<T>& me, const WideUnit& unit) {
  const HeadOf a(p.a, unit.head, unit.batch), b(p.b, unit.head, unit.batch);
  const Walk walk(p, unit);
  for (int i = 0; i < walk.walked(); ++i) {
    const int start = walk.start(i), n = walk.tokens(start);
    for (int token = 0; token < n; token += T::kDepth) {
      const int stage = me.claim();
      me.left(stage, a, unit.row_tile * T::kGroups, start + token, true);
      me.right(stage, b, unit.column_tile * T::kPanels, start + token, true);
    }
  }
}

// What warpgroups do with a tile of the state: S ← λ^n S + Σ_j w_j a_jᵀ b_j over each chunk of n tokens.
template <class T>
struct StateMaker {
  using Element = typename T::Element;
  static constexpr int kHalf = 2;  // of the 4 products of a stage
  using Left = uint32_t[kHalf][4];
  Consumer<T>& me;
  const WideParams& p;
  const WideUnit& unit;
  int weighed = 0;        // for chunks of how many tokens the weights are
  int* stored = nullptr;  // where to say that a state has been

  // For each pair of neighbours that this thread has of the tile, in a state of these strides: visit(first, second).
  template <class Value, class Visit>
  __device__ void each_pair(Value* state, const StateStrides& at, int64_t sequence, Visit visit) {
    const Lane lane;
    const int d = unit.row_tile * T::kRows + me.group * 64 + lane.row, e = unit.column_tile * T::kN + lane.pair;
    Value* from = state + sequence * at.sequence + unit.head * at.head + d * at.d + e * at.e;
#pragma unroll
    for (int x = 0; x < T::kN / 2; x += 2) {
      const int row = x / 2 % 2 * 8, column = x / 4 * 8;
      Value* here = from + row * at.d + column * at.e;
      if (d + row < p.d && e + column < p.e) visit(x, here, here + at.e);
    }
  }
  __device__ void begin() {
    me.clear();
    const auto load = [&](int x, const float* first, const float* second) {
      me.acc[x] = *first, me.acc[x + 1] = *second;
    };
    if (unit.first) {
      if (p.initial != nullptr) each_pair(p.initial, p.initial_strides, unit.sequence, load);
    } else if (!p.sums) {
      Work before;
      find_work(p.segments, unit.slot + (p.reverse ? 1 : -1), before);
      each_pair(static_cast<const float*>(p.carry), p.carry_strides, before.carry, load);
    }
  }
  __device__ void store(float* state, const StateStrides& at, int64_t sequence) {
    const float factor = isnan(unit.log_lambda) ? CUDART_NAN_F : 1.f;  // however short the sequence
    each_pair(state, at, sequence, [&](int x, float* first, float* second) {
      *first = me.acc[x] * factor, *second = me.acc[x + 1] * factor;
    });
  }

  // What each token of a chunk of n weighs in the state.
  __device__ void weigh(int n) {
    if (n == weighed) return;
    weighed = n;
    me.sync();
    for (int i = threadIdx.x; i < p.chunk; i += T::kConsumers)
      me.shared.weights[i] = power(unit.log_lambda, p.reverse ? i + 1 : max(n - 1 - i, 0));
    me.sync();
  }

  // aᵀ of half a stage, each token times its weight, as left operand.
  __device__ void load_left(Left& left, int stage, int half, int token) {
    const Lane at;
    const uint32_t base = me.left(stage) + half * kHalf * 16 * kPanelRow +
                          piece_offset(at.lane / 16 * 8 + at.lane % 8, at.thread / 32 * 2 + at.lane / 8 % 2);
    const uint32_t weights = shared_address(me.shared.weights) + (token + half * kHalf * 16 + at.pair) * 4;
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
    const uint32_t b = me.right(stage) + half * kHalf * 16 * kPanelRow;
    wgmma_hold(left);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kHalf; ++x)
      wgmma<Element, T::kN, 1>(me.acc, left[x], descriptor(b + x * 16 * kPanelRow, kPanelBytes), 1);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_hold(other);
  }

  // By the thread that stored it, once it has surely come to memory.
  __device__ void announce() {
    if (stored != nullptr && Lane().thread == 0) announce_stores(stored);
    stored = nullptr;
  }

  __device__ void walk() {
    const Walk walk(p, unit);
    begin();
    for (int i = 0; i < walk.walked(); ++i) {
      const int start = walk.start(i), n = walk.tokens(start);
      weigh(n);
      const float carried = power(unit.log_lambda, n);
      me.scale(carried, carried);
      wgmma_hold(me.acc);
      Left left[2] = {};
      for (int token = 0; token < n; token += T::kDepth, ++me.step) {
        const int stage = me.next([&](int stage) {
          if (n - token < T::kDepth && p.segments.table != nullptr) me.clear_rows(stage, 0, n - token);
        });
        advance(left[0], left[1], stage, 0, token);
        if (token > 0) me.release((me.step - 1) % T::kStages);
        advance(left[1], left[0], stage, 1, token);
        if (token == T::kDepth) announce();
      }
      wgmma_wait<0>();
      wgmma_hold(me.acc);
      wgmma_hold(left[1]);
      me.release((me.step - 1) % T::kStages);
      announce();
      if (p.sums || (unit.last && i == walk.chunks - 1)) continue;
      const int after = unit.batch * p.chunks.segments + start / p.chunk;
      me.put_out(HeadOf(p.states, unit.head, after), unit.column_tile * T::kPanels, unit.row_tile * T::kRows,
                 {0, p.d - unit.row_tile * T::kRows, false}, nullptr, p.e);
      stored = p.states_done + after * p.heads + unit.head;
    }
    announce();
    if (p.sums)
      store(p.carry, p.carry_strides, unit.carry);
    else if (unit.last && p.final != nullptr)
      store(p.final, p.final_strides, unit.sequence);
  }
};
