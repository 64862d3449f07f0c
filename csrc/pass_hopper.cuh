// One pass of lightning attention over the sequences, for Hopper: equations (1) to (3) of README.md.
//
// A block walks through one segment of one head, chunk by chunk. Its last warpgroup fetches tiles of q, k and v; each of
// the others owns 64 columns of v and keeps their part of the state, transposed (E × D), in registers:
//   scores  q kᵀ, masked, to shared memory                (each warpgroup makes its share of the columns)
//   oᵀ   =  Sᵀ qᵀ, columns scaled, + vᵀ scoresᵀ           (E × C)
//   Sᵀ  ←   λ^n Sᵀ + (scaled vᵀ) k
// so that whatever is left operand of a product comes from registers, where it can be scaled or rounded on the way.
#pragma once

#include "async.cuh"
#include "decay.cuh"
#include "params.h"
#include "segments.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

constexpr int kChunk = 64;  // tokens
constexpr int kWarpgroup = 128;  // threads
constexpr int kPanelBytes = kChunk * kPanelRow;

// One compiled kernel. kD, kE: tile of the state; kNorm: divides by lengths; kOutput: without, only states are made.
template <class Element_, int kD_, int kE_, bool kNorm_, bool kOutput_>
struct Variant {
  using Element = Element_;
  static constexpr int kD = kD_, kE = kE_;
  static constexpr bool kNorm = kNorm_, kOutput = kOutput_;
  static constexpr int kConsumers = kE / 64;  // warpgroups
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kBlocks = kConsumers == 1 ? 2 : 1;  // on a multiprocessor
  static constexpr int kQPanels = kOutput ? kD / kPanel : 0, kKPanels = kD / kPanel, kVPanels = kE / kPanel;
  static constexpr int kStageBytes = (kQPanels + kKPanels + kVPanels) * kPanelBytes;
  static constexpr int kStages = kD == 256 && kOutput ? 2 : 3;
  static constexpr int kScoreColumns = kChunk / kConsumers;  // of each warpgroup
  static constexpr int kProducerRegisters = kNorm ? 40 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 1 ? 248 - kProducerRegisters : 252 - kProducerRegisters / 2;
};

template <class V>
struct alignas(1024) SharedStorage {
  uint8_t stages[V::kStages][V::kStageBytes];
  uint8_t scores[V::kOutput ? 2 : 0][kPanelBytes];
  uint8_t out[V::kOutput ? V::kVPanels : 0][kPanelBytes];
  float powers[kChunk + 1];
  float weights[2 * kChunk];  // λ^|i-j| at i - j + kChunk, or -1 where masked
  uint64_t nonfinite[V::kE];  // tokens of the chunk, of each column of v
  float row_scale[V::kStages][kChunk], column_scale[V::kStages][kChunk];
  Barrier full[V::kStages], scaled[V::kStages], empty[V::kStages];
};

// Fetches the tiles of each chunk; with kNorm, the other warps measure their vectors.
template <class V>
__device__ void fetch(const PassParams& p, SharedStorage<V>& shared, const Work& work, int head, int d_tile, int e_tile) {
  const int chunks = (work.length + kChunk - 1) / kChunk;
  for (int step = 0; step < chunks; ++step) {
    const int stage = step % V::kStages, chunk = p.reverse ? chunks - 1 - step : step;
    const int token = work.start + chunk * kChunk;
    if (step >= V::kStages) shared.empty[stage].wait((step / V::kStages - 1) & 1);
    shared.full[stage].arrive_expecting(V::kStageBytes);
    uint8_t* to = shared.stages[stage];
    for (int i = 0; i < V::kQPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.q, shared.full[stage], d_tile * V::kD + i * kPanel, token, head / p.q_group, work.batch * p.q_batch);
    for (int i = 0; i < V::kKPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.k, shared.full[stage], d_tile * V::kD + i * kPanel, token, head / p.k_group, work.batch * p.k_batch);
    for (int i = 0; i < V::kVPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.v, shared.full[stage], e_tile * V::kE + i * kPanel, token, head / p.v_group, work.batch * p.v_batch);
  }
}

// 1 / |x| of a row of a tile. A row whose square, or whose 1 / |x|, the types can't hold well is first multiplied by a
// power of two, in place, which changes no digit.
template <class Element, int kPanels>
__device__ float inverse_length(uint8_t* tile, int row) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  constexpr float kLeast = kHalf ? 0x1p-8f : 0x1p-80f, kMost = kHalf ? 0x1p12f : 0x1p80f;
  constexpr float kMinLength = 1e-6f;  // shorter vectors are divided by it, as in ops/numerics.py
  const uint32_t base = shared_address(tile);
  float squares = 0.f, largest = 0.f;
#pragma unroll 2
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint4 x = load_piece(base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8));
    for (uint32_t word : {x.x, x.y, x.z, x.w}) {
      const float2 pair = unpack<Element>(word);
      squares += pair.x * pair.x + pair.y * pair.y;
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  if ((squares >= kLeast && squares <= kMost) || largest == 0.f || largest > 3.4e38f || squares != squares)
    return 1.f / fmaxf(sqrtf(squares), kMinLength);
  int exponent;
  frexpf(largest, &exponent);
  exponent = max(min(exponent, 126), -126);
  const float scale = ldexpf(1.f, -exponent);
  squares = 0.f;
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint32_t address = base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8);
    uint4 x = load_piece(address);
    for (uint32_t* word : {&x.x, &x.y, &x.z, &x.w}) {
      const float2 pair = unpack<Element>(*word);
      *word = pack<Element>(pair.x * scale, pair.y * scale);
      squares += pair.x * scale * (pair.x * scale) + pair.y * scale * (pair.y * scale);
    }
    store_piece(address, x);
  }
  return 1.f / fmaxf(sqrtf(squares), kMinLength * scale);
}

// Two warps: the scales of one chunk after another.
template <class V>
__device__ void measure(const PassParams& p, SharedStorage<V>& shared, const Work& work, int row) {
  using Element = typename V::Element;
  const int chunks = (work.length + kChunk - 1) / kChunk;
  for (int step = 0; step < chunks; ++step) {
    const int stage = step % V::kStages;
    shared.full[stage].wait((step / V::kStages) & 1);
    uint8_t* q = shared.stages[stage];
    uint8_t* k = q + V::kQPanels * kPanelBytes;
    uint8_t* v = k + V::kKPanels * kPanelBytes;
    float queries = 1.f, columns;
    if constexpr (V::kOutput)
      if (p.norm == Norm::kQueriesAndKeys) queries = inverse_length<Element, V::kQPanels>(q, row);
    if (p.norm == Norm::kValues)
      columns = inverse_length<Element, V::kVPanels>(v, row);
    else
      columns = inverse_length<Element, V::kKPanels>(k, row);
    shared.row_scale[stage][row] = queries;
    shared.column_scale[stage][row] = columns;
    fence_for_async();
    shared.scaled[stage].arrive();
  }
}

// A warpgroup's part of the state, (64 columns of v) × kD, as accumulators of its products.
template <int kD>
struct State {
  float s[kD / 2];
  int d, e;  // of s[0]

  __device__ State(int d_tile, int e_first) {
    const int thread = threadIdx.x % kWarpgroup;
    d = d_tile * kD + 2 * (thread % 4);
    e = e_first + thread / 32 * 16 + thread % 32 / 4;
  }
  template <class Visit>
  __device__ void visit(const PassParams& p, Visit visit) {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) {
      const int at_d = d + i / 4 * 8 + i % 2, at_e = e + i / 2 % 2 * 8;
      if (at_d < p.d && at_e < p.e) visit(s[i], at_d, at_e);
    }
  }
  __device__ void zero() {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) s[i] = 0.f;
  }
  __device__ void load(const PassParams& p, const float* from, const StateStrides& at, int sequence, int head) {
    from += sequence * at.sequence + head * at.head;
    visit(p, [&](float& x, int i, int j) { x = from[i * at.d + j * at.e]; });
  }
  __device__ void store(const PassParams& p, float* to, const StateStrides& at, int sequence, int head) {
    to += sequence * at.sequence + head * at.head;
    visit(p, [&](float& x, int i, int j) { to[i * at.d + j * at.e] = x; });
  }
};

// What a thread of a warpgroup does with its part of a chunk.
template <class V>
struct Consumer {
  using Element = typename V::Element;
  const PassParams& p;
  SharedStorage<V>& shared;
  const int group, thread, warp, row, pair;  // row, pair: of this thread in an 8 × 8 block of accumulators

  __device__ Consumer(const PassParams& p, SharedStorage<V>& shared)
      : p(p),
        shared(shared),
        group(threadIdx.x / kWarpgroup),
        thread(threadIdx.x % kWarpgroup),
        warp(thread / 32),
        row(thread % 32 / 4),
        pair(2 * (thread % 4)) {}
  // Token of score n of this thread.
  __device__ int query(int n) const { return warp * 16 + row + n / 2 % 2 * 8; }
  __device__ int key(int n) const { return group * V::kScoreColumns + n / 4 * 8 + pair + n % 2; }

  // λ^… with which token i reads the state and token j is written to it, in a chunk of n tokens.
  __device__ float reading(int i, int n) const { return shared.powers[p.reverse ? max(n - 1 - i, 0) : i + 1]; }
  __device__ float writing(int j, int n) const { return shared.powers[p.reverse ? j + 1 : max(n - 1 - j, 0)]; }

  __device__ void mask_scores(const float (&scores)[V::kScoreColumns / 2], uint8_t* to, int stage, int n) {
    const uint32_t base = shared_address(to);
#pragma unroll
    for (int x = 0; x < V::kScoreColumns / 2; x += 2) {
      const int i = query(x), j = key(x);
      const float* weight = &shared.weights[kChunk + i - j];
      float a = scores[x] * weight[0], b = scores[x + 1] * weight[-1];
      if constexpr (V::kNorm) {
        const float of_row = shared.row_scale[stage][i];
        a *= of_row * shared.column_scale[stage][j];
        b *= of_row * shared.column_scale[stage][j + 1];
      }
      if (weight[0] < 0.f || j >= n) a = 0.f;  // chosen, not multiplied: 0 · NaN is NaN
      if (weight[-1] < 0.f || j + 1 >= n) b = 0.f;
      store_word(base + piece_offset(i, j / 8) + j % 8 * 2, pack<Element>(a, b));
    }
  }

  // vᵀ of this warpgroup (64 × tokens) as left operand of four products; tokens from n on are zeros.
  __device__ void load_values(uint32_t (&v)[4][4], const uint8_t* panel, int n) {
    const int lane = thread % 32, block = lane / 8;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int token = step * 16 + block / 2 * 8 + lane % 8;
      load_transposed(v[step], shared_address(panel) + piece_offset(token, warp * 2 + block % 2));
    }
    if (n == kChunk) return;
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      const int j = x / 4 * 16 + x / 2 % 2 * 8 + pair;
      if (j >= n) v[x / 4][x % 4] = 0;
      if (j + 1 >= n) v[x / 4][x % 4] &= 0xFFFF;
    }
  }

  __device__ void scale_values(uint32_t (&scaled)[4][4], const uint32_t (&v)[4][4], int stage, int n) {
#pragma unroll
    for (int x = 0; x < 16; x += 2) {
      const int j = x / 4 * 16 + x / 2 % 2 * 8 + pair;
      float a = writing(j, n), b = writing(j + 1, n);
      if constexpr (V::kNorm) a *= shared.column_scale[stage][j], b *= shared.column_scale[stage][j + 1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 values = unpack<Element>(v[x / 4][x % 4 + half]);
        scaled[x / 4][x % 4 + half] = pack<Element>(values.x * a, values.y * b);
      }
    }
  }

  // Clears values that are not finite, and notes of which tokens they were; false if there are none.
  __device__ bool take_out_nonfinite(uint32_t (&v)[4][4]) {
    if (!__any_sync(~0u, nonfinite_among<Element>(v))) return false;
    uint64_t tokens[2] = {0, 0};  // for the two columns of v that are this thread's rows
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      uint32_t& word = v[x / 4][x % 4];
      const int j = x / 4 * 16 + x / 2 % 2 * 8 + pair;
      if (any_nonfinite<Element>(word & 0xFFFF)) tokens[x % 2] |= 1ull << j, word &= 0xFFFF0000u;
      if (any_nonfinite<Element>(word >> 16)) tokens[x % 2] |= 2ull << j, word &= 0xFFFFu;
    }
    for (uint64_t& seen : tokens) {  // of the four threads that share a row
      seen |= __shfl_xor_sync(~0u, seen, 1);
      seen |= __shfl_xor_sync(~0u, seen, 2);
    }
    for (int half = 0; half < 2; ++half) shared.nonfinite[group * kPanel + warp * 16 + row + half * 8] = tokens[half];
    __syncwarp();
    return true;
  }

  // NaN in o from the first token on that brought a value that is not finite.
  __device__ void put_back_nonfinite(float (&o)[32]) {
#pragma unroll
    for (int x = 0; x < 32; ++x) {
      const int i = x / 4 * 8 + pair + x % 2;
      const uint64_t seen = shared.nonfinite[group * kPanel + warp * 16 + row + x / 2 % 2 * 8];
      if (p.reverse ? seen >> i : seen << (63 - i)) o[x] = CUDART_NAN_F;
    }
  }

  // Rows of k behind the sequence's end belong to another: in the product with zeros they could still be NaN.
  __device__ void clear_rows(uint8_t* k, int n) {
    for (int x = threadIdx.x; x < V::kKPanels * kChunk * 8; x += V::kConsumers * kWarpgroup)
      if (x / 8 % kChunk >= n) store_piece(shared_address(k) + x * 16, make_uint4(0, 0, 0, 0));
  }

  // oᵀ (64 × tokens) of this warpgroup to o (tokens × 64) in global memory.
  __device__ void store_output(const float (&o)[32], const Work& work, int head, int token, int n, int d_tile, int e) {
    if (p.partial != nullptr) {
      const int64_t base = ((int64_t(d_tile) * p.batch + work.batch) * p.heads + head) * p.tokens + token;
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        const int i = x / 4 * 8 + pair + x % 2, column = e + warp * 16 + row + x / 2 % 2 * 8;
        if (i < n && column < p.e) p.partial[(base + i) * p.e + column] = o[x];
      }
      return;
    }
    const uint32_t base = shared_address(shared.out[group]);
    const int lane = thread % 32, block = lane / 8;
#pragma unroll
    for (int x = 0; x < 32; x += 8) {
      const int token_of_block = x / 4 * 8 + block / 2 * 8 + lane % 8;
      store_transposed(base + piece_offset(token_of_block, warp * 2 + block % 2), pack<Element>(o[x], o[x + 1]),
                       pack<Element>(o[x + 2], o[x + 3]), pack<Element>(o[x + 4], o[x + 5]),
                       pack<Element>(o[x + 6], o[x + 7]));
    }
    sync_threads(2 + group, kWarpgroup);
    Element* to = static_cast<Element*>(p.out) + work.batch * p.out_batch + head * p.out_head + token * p.out_token + e;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int i = x * 16 + thread / 8, piece = thread % 8;
      if (i < n && e + piece * 8 < p.e)
        *reinterpret_cast<uint4*>(to + i * p.out_token + piece * 8) = load_piece(base + piece_offset(i, piece));
    }
  }
};

template <class V>
__device__ void consume(const PassParams& p, SharedStorage<V>& shared, const Work& work, int head, int d_tile, int e_tile) {
  using Element = typename V::Element;
  constexpr bool kOneCopy = V::kD == 256;  // no registers for the values and the scaled values at a time
  constexpr int kSteps = V::kD / 16, kBatch = V::kD == 256 ? 4 : kSteps;  // products that read the state, at a time
  Consumer<V> me(p, shared);
  const int e = e_tile * V::kE + me.group * kPanel;
  State<V::kD> state(d_tile, e);
  state.zero();
  if (work.first) {
    if (p.initial != nullptr) state.load(p, p.initial, p.initial_strides, work.sequence, head);
  } else if constexpr (V::kOutput) {
    state.load(p, p.carry, p.carry_strides, p.reverse ? work.carry + 1 : work.carry - 1, head);
  }
  const int chunks = (work.length + kChunk - 1) / kChunk;
  float scores[V::kScoreColumns / 2];
  // Starts on the scores of a chunk, in the background.
  const auto score = [&](int step) {
    const int stage = step % V::kStages;
    const uint32_t q = shared_address(shared.stages[stage]), k = q + V::kQPanels * kPanelBytes;
    shared.full[stage].wait((step / V::kStages) & 1);
    if constexpr (V::kNorm) shared.scaled[stage].wait((step / V::kStages) & 1);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kSteps; ++x) {
      const int at = x / 4 * kPanelBytes + x % 4 * 32;
      wgmma<Element, V::kScoreColumns>(scores, descriptor(q + at),
                                       descriptor(k + at + me.group * V::kScoreColumns * kPanelRow), x > 0);
    }
    wgmma_commit();
  };
  uint32_t left[kBatch][4];
  // Rounds part of the state to left operands.
  const auto round_state = [&](int batch) {
#pragma unroll
    for (int x = 0; x < kBatch * 4; ++x) {
      const int at = batch * kBatch * 8 + x * 2;
      left[x / 4][x % 4] = pack<Element>(state.s[at], state.s[at + 1]);
    }
  };
  if (V::kOutput && chunks > 0) {
    round_state(0);
    score(0);
    wgmma_wait<0>();
    wgmma_hold(scores);
  }
  for (int step = 0; step < chunks; ++step) {
    const int stage = step % V::kStages, chunk = p.reverse ? chunks - 1 - step : step;
    const int n = min(kChunk, work.length - chunk * kChunk);
    uint8_t* q = shared.stages[stage];
    uint8_t* k = q + V::kQPanels * kPanelBytes;
    uint8_t* v = k + V::kKPanels * kPanelBytes;
    const uint32_t q_address = shared_address(q), k_address = shared_address(k);
    const float carried = shared.powers[n];
    uint32_t values[4][4], scaled[4][4];
    bool any_nonfinite = false;
    float o[32];
    uint8_t* masked = nullptr;
    if constexpr (V::kOutput) {
      masked = shared.scores[step % 2];
#pragma unroll
      for (int batch = 0; batch < kSteps / kBatch; ++batch) {
        if (batch > 0) round_state(batch);
        wgmma_fence();
#pragma unroll
        for (int x = 0; x < kBatch; ++x) {
          const int at = batch * kBatch + x;
          wgmma<Element, 64, 0>(o, left[x], descriptor(q_address + at / 4 * kPanelBytes + at % 4 * 32), at > 0);
        }
        wgmma_commit();
        if (batch == 0) {
          // While these products run, what the next ones need is made.
          me.mask_scores(scores, masked, stage, n);
          me.load_values(values, v + me.group * kPanelBytes, n);
          if (!kOneCopy) me.scale_values(scaled, values, stage, n);
          any_nonfinite = me.take_out_nonfinite(values);
        }
        if (batch + 1 < kSteps / kBatch) wgmma_wait<0>();
      }
#pragma unroll
      for (int x = 0; x < V::kD / 2; ++x) state.s[x] *= carried;
      if (n < kChunk) me.clear_rows(k, n);
      fence_for_async();
      wgmma_wait<0>();
      wgmma_hold(o);
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        const int i = x / 4 * 8 + me.pair + x % 2;
        float scale = me.reading(i, n);
        if constexpr (V::kNorm) scale *= shared.row_scale[stage][i];
        o[x] *= scale;
      }
      sync_threads(1, V::kConsumers * kWarpgroup);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < 4; ++x)
        wgmma<Element, 64, 0>(o, values[x], descriptor(shared_address(masked) + x * 32), 1);
      wgmma_commit();
      if constexpr (kOneCopy) {
        wgmma_wait<0>();
        wgmma_hold(o);
        me.load_values(values, v + me.group * kPanelBytes, n);
        me.scale_values(scaled, values, stage, n);
        wgmma_fence();
      }
    } else {
      shared.full[stage].wait((step / V::kStages) & 1);
      if constexpr (V::kNorm) shared.scaled[stage].wait((step / V::kStages) & 1);
      me.load_values(values, v + me.group * kPanelBytes, n);
      me.scale_values(scaled, values, stage, n);
#pragma unroll
      for (int x = 0; x < V::kD / 2; ++x) state.s[x] *= carried;
      if (n < kChunk) {
        me.clear_rows(k, n);
        fence_for_async();
        sync_threads(1, V::kConsumers * kWarpgroup);
      }
      wgmma_fence();
    }
#pragma unroll
    for (int x = 0; x < 4; ++x)
      wgmma<Element, V::kD, 1>(state.s, scaled[x], descriptor(k_address + x * 16 * kPanelRow, kPanelBytes), 1);
    wgmma_commit();
    if constexpr (V::kOutput) {
      if constexpr (!kOneCopy) {
        wgmma_wait<1>();
        wgmma_hold(o);
      }
      if (any_nonfinite) me.put_back_nonfinite(o);
      me.store_output(o, work, head, work.start + chunk * kChunk, n, d_tile, e);
      score(min(step + 1, chunks - 1));  // after the last chunk for nothing: a branch would make the products wait
      wgmma_wait<1>();
      wgmma_hold(state.s);
      round_state(0);
      wgmma_wait<0>();
      wgmma_hold(scores);
    } else {
      wgmma_wait<0>();
      wgmma_hold(state.s);
    }
    if (threadIdx.x % 32 == 0) shared.empty[stage].arrive();
  }
  if constexpr (V::kOutput) {
    if (work.last && p.final != nullptr) {
#pragma unroll
      for (int x = 0; x < V::kD / 2; ++x) state.s[x] *= shared.powers[0];  // NaN for a bad decay, however short the sequence
      state.store(p, p.final, p.final_strides, work.sequence, head);
    }
  } else {
    state.store(p, p.carry, p.carry_strides, work.carry, head);
  }
}

template <class V>
__global__ void __launch_bounds__(V::kThreads, V::kBlocks) pass_kernel(const __grid_constant__ PassParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<SharedStorage<V>*>(memory);
  const int tiles = p.d_tiles * p.e_tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.x / tiles % p.heads;
  Work work;
  if (!find_work(p, blockIdx.x / tiles / p.heads, work)) return;
  if (!V::kOutput && work.last) return;  // nobody needs the state after it
  float log2_lambda = log2_decay(p.log_decay, head);
  if (!work.valid) log2_lambda = CUDART_NAN_F;
  if (threadIdx.x <= kChunk) shared.powers[threadIdx.x] = power(log2_lambda, threadIdx.x);
  if (threadIdx.x < 2 * kChunk) {
    const int later = threadIdx.x - kChunk, distance = p.reverse ? -later : later;
    shared.weights[threadIdx.x] = distance < 0 ? -1.f : power(log2_lambda, distance);
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < V::kStages; ++stage) {
      shared.full[stage].init(1);
      shared.scaled[stage].init(kChunk);
      shared.empty[stage].init(V::kConsumers * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= V::kConsumers * kWarpgroup) {
    fewer_registers<V::kProducerRegisters>();
    const int thread = threadIdx.x - V::kConsumers * kWarpgroup;
    if (thread == 0)
      fetch<V>(p, shared, work, head, tile / p.e_tiles, tile % p.e_tiles);
    else if (V::kNorm && thread >= 64)
      measure<V>(p, shared, work, thread - 64);
  } else {
    more_registers<V::kConsumerRegisters>();
    consume<V>(p, shared, work, head, tile / p.e_tiles, tile % p.e_tiles);
  }
}

// Launches the kernel on `blocks` blocks.
template <class V>
cudaError_t launch_pass(const PassParams& p, int64_t blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<V>);
  static_assert(kBytes <= 227 * 1024);
  cudaError_t error = cudaFuncSetAttribute(pass_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  pass_kernel<V><<<dim3(blocks), V::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}
