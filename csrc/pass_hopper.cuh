// One pass of lightning attention over the sequences, for Hopper: equations (1) to (3) of README.md.
//
// A block walks through one segment of one head, chunk by chunk, and its warpgroups share the work:
//   fetch   copies the tiles of q, k and v; with kNorm three of its warps measure their vectors
//   score   makes the masked scores (q kᵀ) ⊙ M of a chunk and a copy of v scaled by what it weighs in the state
//   attend  (one or two) own 64 columns of v each, and keep their part of the state, transposed (E × D), in registers:
//             oᵀ  =  Sᵀ qᵀ, columns scaled, + vᵀ scoresᵀ           (E × C)
//             Sᵀ  ←  λ^n Sᵀ + (scaled v)ᵀ k
// Only `attend` depends on the chunk before, and it does little else than products.
#pragma once

#include "async.cuh"
#include "decay.cuh"
#include "params.h"
#include "segments.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

constexpr int kChunk = 64;  // tokens
constexpr int kWarpgroup = 128;  // threads
constexpr int kMeasuring = 96;  // threads
constexpr int kPanelBytes = kChunk * kPanelRow;

// One compiled kernel. kD, kE: tile of the state; kNorm: divides by lengths; kOutput: without, only states are made.
template <class Element_, int kD_, int kE_, bool kNorm_, bool kOutput_>
struct Variant {
  using Element = Element_;
  static constexpr int kD = kD_, kE = kE_;
  static constexpr bool kNorm = kNorm_, kOutput = kOutput_;
  static constexpr int kAttending = kE / 64;  // warpgroups
  static constexpr int kThreads = (kAttending + 2) * kWarpgroup;
  static constexpr int kBlocks = kD == 64 ? 2 : 1;  // on a multiprocessor
  static constexpr int kQPanels = kOutput ? kD / kPanel : 0, kKPanels = kD / kPanel, kVPanels = kE / kPanel;
  static constexpr int kVectorPanels = kOutput && kNorm ? kVPanels : 0;  // of `through`
  static constexpr int kTileBytes = (kQPanels + kKPanels + kVPanels) * kPanelBytes;
  static constexpr int kStageBytes = kTileBytes + kVectorPanels * kPanelBytes;
  static constexpr int kBuffers = 2;  // of what `score` makes
  // As many stages as fit, with 6 KiB for what is small.
  static constexpr int kStages =
      (227 * 1024 / kBlocks - 6 * 1024 - kBuffers * (kVPanels + (kOutput ? 1 : 0)) * kPanelBytes) / kStageBytes;
  // Registers of a thread: what a block starts with, a multiple of 8, is shared out among its warpgroups.
  static constexpr int kFirstRegisters = 65536 / (kThreads * kBlocks) / 8 * 8;
  static constexpr int kFetchRegisters = 40, kScoreRegisters = kBlocks == 2 ? 88 : 120;
  static constexpr int kLeft =
      ((kAttending + 2) * kFirstRegisters - kFetchRegisters - kScoreRegisters) / kAttending / 8 * 8;
  static constexpr int kAttendRegisters = kLeft < 240 ? kLeft : 240;
};

template <class V>
struct alignas(1024) SharedStorage {
  uint8_t stages[V::kStages][V::kStageBytes];
  uint8_t scaled_values[V::kBuffers][V::kVPanels * kPanelBytes];
  uint8_t scores[V::kOutput ? V::kBuffers : 0][kPanelBytes];
  unsigned long long nonfinite[V::kBuffers][V::kE];  // tokens of the chunk, of each column of v
  int any_nonfinite[V::kBuffers];
  float reading[V::kBuffers][kChunk];  // what token i reads the state with
  float powers[kChunk + 1];
  float weights[2 * kChunk];  // λ^|i-j| at i - j + kChunk, or -1 where masked
  double2 along[V::kVectorPanels > 0 ? 2 : 0][V::kAttending][kChunk];  // of each token: out · x and x · x
  float row_scale[V::kStages][kChunk], column_scale[V::kStages][kChunk];
  Barrier full[V::kStages], measured[V::kStages], empty[V::kStages];
  Barrier ready[V::kBuffers], used[V::kBuffers];
};

// Tiles of a stage.
template <class V>
struct Stage {
  uint8_t *q, *k, *v, *x;

  __device__ Stage(SharedStorage<V>& shared, int stage)
      : q(shared.stages[stage]), k(q + V::kQPanels * kPanelBytes), v(k + V::kKPanels * kPanelBytes), x(v + V::kVPanels * kPanelBytes) {}
};

// The chunks of a segment in the order of the pass.
struct Walk {
  int chunks, length;
  bool reverse;

  __device__ Walk(const Work& work, bool reverse)
      : chunks((work.length + kChunk - 1) / kChunk), length(work.length), reverse(reverse) {}
  __device__ int start(int step) const { return (reverse ? chunks - 1 - step : step) * kChunk; }
  __device__ int tokens(int step) const { return min(kChunk, length - start(step)); }
};

// Parity of the phase that a barrier of `count` is in at a step.
__device__ inline int parity(int step, int count) { return step / count & 1; }

// Fetches the tiles of each chunk; with kNorm, the other warps measure their vectors.
template <class V>
__device__ void fetch(const PassParams& p, SharedStorage<V>& shared, const Work& work, int head, int d_tile, int e_tile) {
  const Walk walk(work, p.reverse);
  for (int step = 0; step < walk.chunks; ++step) {
    const int stage = step % V::kStages, token = work.start + walk.start(step);
    if (step >= V::kStages) shared.empty[stage].wait(parity(step, V::kStages) ^ 1);
    shared.full[stage].arrive_expecting(p.through ? V::kStageBytes : V::kTileBytes);
    uint8_t* to = shared.stages[stage];
    for (int i = 0; i < V::kQPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.q, shared.full[stage], d_tile * V::kD + i * kPanel, token, head / p.q_group, work.batch * p.q_batch);
    for (int i = 0; i < V::kKPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.k, shared.full[stage], d_tile * V::kD + i * kPanel, token, head / p.k_group, work.batch * p.k_batch);
    for (int i = 0; i < V::kVPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.v, shared.full[stage], e_tile * V::kE + i * kPanel, token, head / p.v_group, work.batch * p.v_batch);
    for (int i = 0; i < V::kVectorPanels && p.through; ++i, to += kPanelBytes)
      copy_tile(to, p.x, shared.full[stage], i * kPanel, token, head / p.x_group, work.batch * p.x_batch);
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
  float parts[4] = {};  // four sums, so that none waits for the one before
#pragma unroll 2
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint4 x = load_piece(base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = unpack<Element>((&x.x)[w]);
      parts[w] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, parts[w]));
    }
  }
  float squares = (parts[0] + parts[1]) + (parts[2] + parts[3]), largest = 0.f;
  if (squares >= kLeast && squares <= kMost) return rsqrtf(squares);
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint4 x = load_piece(base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8));
    for (uint32_t word : {x.x, x.y, x.z, x.w}) {
      const float2 pair = unpack<Element>(word);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  if (largest == 0.f || !isfinite(largest) || isnan(squares)) return 1.f / fmaxf(sqrtf(squares), kMinLength);
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

// Three warps: the scales of one chunk after another.
template <class V>
__device__ void measure(const PassParams& p, SharedStorage<V>& shared, const Work& work, int thread) {
  using Element = typename V::Element;
  const Walk walk(work, p.reverse);
  for (int step = 0; step < walk.chunks; ++step) {
    const int stage = step % V::kStages;
    shared.full[stage].wait(parity(step, V::kStages));
    const Stage<V> tile(shared, stage);
    const bool queries = V::kOutput && p.norm == Norm::kQueriesAndKeys;
    for (int x = thread; x < 2 * kChunk; x += kMeasuring) {
      const int row = x % kChunk;
      if (x < kChunk) {
        shared.column_scale[stage][row] = p.norm == Norm::kValues
                                              ? inverse_length<Element, V::kVPanels>(tile.v, row)
                                              : inverse_length<Element, V::kKPanels>(tile.k, row);
      } else if constexpr (V::kOutput) {
        shared.row_scale[stage][row] = queries ? inverse_length<Element, V::kQPanels>(tile.q, row) : 1.f;
      }
    }
    fence_for_async();
    shared.measured[stage].arrive();
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

// Makes what `attend` needs of each chunk besides the state.
template <class V>
struct Scorer {
  using Element = typename V::Element;
  static constexpr int kPieces = kChunk * V::kE / 8 / kWarpgroup;  // of v, of a thread: 8 columns of one token each
  const PassParams& p;
  SharedStorage<V>& shared;
  const int thread;

  // Tokens and columns of piece x, and where it lies.
  __device__ int token(int x) const { return x % 4 * 16 + thread / 8; }
  __device__ int column(int x) const { return x / 4 * kPanel + thread % 8 * 8; }
  __device__ int offset(int x) const { return x / 4 * kPanelBytes + piece_offset(token(x), thread % 8); }

  // λ^… with which token i reads the state and token j is written to it, in a chunk of n tokens.
  __device__ float reading(int i, int n) const { return shared.powers[p.reverse ? max(n - 1 - i, 0) : i + 1]; }
  __device__ float writing(int j, int n) const { return shared.powers[p.reverse ? j + 1 : max(n - 1 - j, 0)]; }

  // Returns whether a value of this thread is not finite.
  __device__ bool scale_values(const uint8_t* v, uint8_t* scaled, int stage, int n) {
    bool nonfinite = false;
#pragma unroll
    for (int x = 0; x < kPieces; ++x) {
      const int j = token(x);
      uint4 piece = load_piece(shared_address(v) + offset(x));
      if (j >= n) piece = make_uint4(0, 0, 0, 0);
      nonfinite |= nonfinite_among<Element>(piece);
      float factor = writing(j, n);
      if constexpr (V::kNorm) factor *= shared.column_scale[stage][j];
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        const float2 pair = unpack<Element>(*word);
        *word = pack<Element>(pair.x * factor, pair.y * factor);
      }
      store_piece(shared_address(scaled) + offset(x), piece);
    }
    return nonfinite;
  }

  // Scores (64 × 64) times λ^|i-j| to shared memory; chosen, not multiplied where masked: 0 · NaN is NaN.
  __device__ void mask_scores(const float (&scores)[32], uint8_t* to, int stage, int n) {
    const uint32_t base = shared_address(to);
    const int row = thread / 32 * 16 + thread % 32 / 4, pair = 2 * (thread % 4);
#pragma unroll
    for (int x = 0; x < 32; x += 2) {
      const int i = row + x / 2 % 2 * 8, j = x / 4 * 8 + pair;
      const float* weight = &shared.weights[kChunk + i - j];
      float a = scores[x] * weight[0], b = scores[x + 1] * weight[-1];
      if constexpr (V::kNorm) {
        const float of_row = shared.row_scale[stage][i];
        a *= of_row * shared.column_scale[stage][j];
        b *= of_row * shared.column_scale[stage][j + 1];
      }
      if (weight[0] < 0.f || j >= n) a = 0.f;
      if (weight[-1] < 0.f || j + 1 >= n) b = 0.f;
      store_word(base + piece_offset(i, j / 8) + j % 8 * 2, pack<Element>(a, b));
    }
  }

  // Rows behind the end of a sequence belong to another one: times zero they could still be NaN.
  __device__ void clear_rows(uint8_t* tile, int panels, int n) {
    for (int x = thread; x < panels * kChunk * 8; x += kWarpgroup)
      if (x / 8 % kChunk >= n) store_piece(shared_address(tile) + x * 16, make_uint4(0, 0, 0, 0));
  }

  // Notes which tokens hold a value that is not finite, for each column, and clears those values: `attend` puts NaN into
  // the outputs from there on, and a token changes nothing before it.
  __device__ void take_out_nonfinite(uint8_t* v, unsigned long long (&tokens)[V::kE]) {
    for (int x = thread; x < V::kE; x += kWarpgroup) tokens[x] = 0;
    sync_threads(1, kWarpgroup);
    for (int x = 0; x < kPieces; ++x) {
      uint4 piece = load_piece(shared_address(v) + offset(x));
      int e = column(x);
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        if (any_nonfinite<Element>(*word & 0xFFFF)) atomicOr(&tokens[e], 1ull << token(x)), *word &= 0xFFFF0000u;
        if (any_nonfinite<Element>(*word >> 16)) atomicOr(&tokens[e + 1], 1ull << token(x)), *word &= 0xFFFFu;
        e += 2;
      }
      store_piece(shared_address(v) + offset(x), piece);
    }
  }
};

template <class V>
__device__ void score(const PassParams& p, SharedStorage<V>& shared, const Work& work) {
  using Element = typename V::Element;
  Scorer<V> me{p, shared, int(threadIdx.x) % kWarpgroup};
  const Walk walk(work, p.reverse);
  for (int step = 0; step < walk.chunks; ++step) {
    const int stage = step % V::kStages, buffer = step % V::kBuffers, n = walk.tokens(step);
    const Stage<V> tile(shared, stage);
    shared.full[stage].wait(parity(step, V::kStages));
    if constexpr (V::kNorm) shared.measured[stage].wait(parity(step, V::kStages));
    float scores[32];
    if constexpr (V::kOutput) {
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < V::kD / 16; ++x) {
        const int at = x / 4 * kPanelBytes + x % 4 * 32;
        wgmma<Element, 64, 0, 0>(scores, descriptor(shared_address(tile.q) + at), descriptor(shared_address(tile.k) + at), x > 0);
      }
      wgmma_commit();
    }
    if (step >= V::kBuffers) shared.used[buffer].wait(parity(step, V::kBuffers) ^ 1);
    const bool nonfinite = me.scale_values(tile.v, shared.scaled_values[buffer], stage, n);
    if constexpr (V::kOutput) {
      wgmma_wait<0>();
      wgmma_hold(scores);
      me.mask_scores(scores, shared.scores[buffer], stage, n);
      const bool any = any_thread(1, kWarpgroup, nonfinite);
      if (any) me.take_out_nonfinite(tile.v, shared.nonfinite[buffer]);
      if (me.thread == 0) shared.any_nonfinite[buffer] = any;
      if (me.thread < kChunk) {
        float factor = me.reading(me.thread, n);
        if constexpr (V::kNorm) factor *= shared.row_scale[stage][me.thread];
        shared.reading[buffer][me.thread] = factor;
      }
      if (n < kChunk) me.clear_rows(tile.v, V::kVPanels, n);
    }
    if (n < kChunk) {
      sync_threads(1, kWarpgroup);  // all have read v
      me.clear_rows(tile.k, V::kKPanels, n);
    }
    fence_for_async();
    shared.ready[buffer].arrive();
  }
}

// What a thread of an attending warpgroup does with its columns of v.
template <class V>
struct Attender {
  using Element = typename V::Element;
  const PassParams& p;
  SharedStorage<V>& shared;
  const int group, thread, warp, row, pair;  // row, pair: of this thread in an 8 × 8 block of accumulators

  __device__ Attender(const PassParams& p, SharedStorage<V>& shared)
      : p(p),
        shared(shared),
        group(threadIdx.x / kWarpgroup),
        thread(threadIdx.x % kWarpgroup),
        warp(thread / 32),
        row(thread % 32 / 4),
        pair(2 * (thread % 4)) {}

  // Times what each token reads the state with.
  __device__ void scale_output(float (&o)[32], const float (&reading)[kChunk]) {
#pragma unroll
    for (int x = 0; x < 32; x += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = x / 4 * 8 + pair + c;
        o[x + c] *= reading[i];
        o[x + c + 2] *= reading[i];
      }
    }
  }

  // NaN in o from the first token on that brought a value that is not finite.
  __device__ void put_back_nonfinite(float (&o)[32], const unsigned long long (&tokens)[V::kE]) {
#pragma unroll
    for (int x = 0; x < 32; ++x) {
      const int i = x / 4 * 8 + pair + x % 2;
      const uint64_t seen = tokens[group * kPanel + warp * 16 + row + x / 2 % 2 * 8];
      if (p.reverse ? seen >> i : seen << (63 - i)) o[x] = CUDART_NAN_F;
    }
  }

  // Gradients of unit lengths to gradients of the vectors: (du - (du·u) u) / |x|, equation (4), from shared memory to
  // global memory. Sums are float64, since the square of a large number overflows.
  __device__ void through_unit_length(const uint8_t* gradients, const uint8_t* vectors, Element* to, int buffer, int n,
                                      int e) {
    constexpr double kMinLength = 1e-6;  // as in ops/numerics.py
    const uint32_t from = shared_address(gradients), x = shared_address(vectors);
    auto& along = shared.along[buffer];
#pragma unroll 1
    for (int i = thread / 8; i < kChunk; i += kWarpgroup / 8) {
      const uint4 du_piece = load_piece(from + piece_offset(i, thread % 8)), x_piece = load_piece(x + piece_offset(i, thread % 8));
      double product = 0., square = 0.;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 du = unpack<Element>((&du_piece.x)[w]), at = unpack<Element>((&x_piece.x)[w]);
        product += double(du.x) * at.x + double(du.y) * at.y;
        square += double(at.x) * at.x + double(at.y) * at.y;
      }
      for (int lanes = 4; lanes > 0; lanes /= 2) {
        product += __shfl_xor_sync(~0u, product, lanes);
        square += __shfl_xor_sync(~0u, square, lanes);
      }
      if (thread % 8 == 0) along[group][i] = make_double2(product, square);
    }
    sync_threads(4, V::kAttending * kWarpgroup);
#pragma unroll 1
    for (int i = thread / 8; i < n; i += kWarpgroup / 8) {
      if (e + thread % 8 * 8 >= p.e) continue;
      double product = along[0][i].x, square = along[0][i].y;
      if constexpr (V::kAttending > 1) product += along[1][i].x, square += along[1][i].y;
      const double length = fmax(sqrt(square), kMinLength);
      const float scale = float(1. / length);
      const double factor = length > kMinLength ? product / square : 0.;  // else divided by a constant
      uint4 piece = load_piece(from + piece_offset(i, thread % 8));
      const uint4 x_piece = load_piece(x + piece_offset(i, thread % 8));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t& word = (&piece.x)[w];
        const float2 du = unpack<Element>(word), at = unpack<Element>((&x_piece.x)[w]);
        word = pack<Element>((du.x - float(factor * at.x)) * scale, (du.y - float(factor * at.y)) * scale);
      }
      *reinterpret_cast<uint4*>(to + i * p.out_token + thread % 8 * 8) = piece;
    }
  }

  // oᵀ (64 × tokens) of this warpgroup to o (tokens × 64) in global memory, by way of its own panel of v, which is used up.
  __device__ void store_output(const float (&o)[32], const Work& work, int head, int token, int n, int d_tile, int e,
                               uint8_t* staging, const uint8_t* vectors, int buffer) {
    if (p.partial != nullptr) {
      const int64_t base = ((int64_t(d_tile) * p.batch + work.batch) * p.heads + head) * p.tokens + token;
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        const int i = x / 4 * 8 + pair + x % 2, column = e + warp * 16 + row + x / 2 % 2 * 8;
        if (i < n && column < p.e) p.partial[(base + i) * p.e + column] = o[x];
      }
      return;
    }
    const uint32_t base = shared_address(staging);
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
    if constexpr (V::kVectorPanels > 0)
      if (p.through) return through_unit_length(staging, vectors + group * kPanelBytes, to, buffer, n, e);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int i = x * 16 + thread / 8, piece = thread % 8;
      if (i < n && e + piece * 8 < p.e)
        *reinterpret_cast<uint4*>(to + i * p.out_token + piece * 8) = load_piece(base + piece_offset(i, piece));
    }
  }
};

template <class V>
__device__ void attend(const PassParams& p, SharedStorage<V>& shared, const Work& work, int head, int d_tile, int e_tile) {
  using Element = typename V::Element;
  constexpr int kSteps = V::kD / 16, kBatch = V::kD == 256 ? 4 : kSteps;  // products that read the state, at a time
  Attender<V> me(p, shared);
  const int e = e_tile * V::kE + me.group * kPanel;
  State<V::kD> state(d_tile, e);
  state.zero();
  if (work.first) {
    if (p.initial != nullptr) state.load(p, p.initial, p.initial_strides, work.sequence, head);
  } else if constexpr (V::kOutput) {
    state.load(p, p.carry, p.carry_strides, p.reverse ? work.carry + 1 : work.carry - 1, head);
  }
  const Walk walk(work, p.reverse);
  for (int step = 0; step < walk.chunks; ++step) {
    const int stage = step % V::kStages, buffer = step % V::kBuffers, n = walk.tokens(step);
    const Stage<V> tile(shared, stage);
    const float carried = shared.powers[n];
    shared.full[stage].wait(parity(step, V::kStages));
    if constexpr (V::kNorm) shared.measured[stage].wait(parity(step, V::kStages));
    float o[32];
    if constexpr (V::kOutput) {
#pragma unroll
      for (int batch = 0; batch < kSteps / kBatch; ++batch) {
        uint32_t left[kBatch][4];
#pragma unroll
        for (int x = 0; x < kBatch * 4; ++x) {
          const int at = batch * kBatch * 8 + x * 2;
          left[x / 4][x % 4] = pack<Element>(state.s[at], state.s[at + 1]);
        }
        wgmma_fence();
#pragma unroll
        for (int x = 0; x < kBatch; ++x) {
          const int at = batch * kBatch + x;
          wgmma<Element>(o, left[x], descriptor(shared_address(tile.q) + at / 4 * kPanelBytes + at % 4 * 32), at > 0);
        }
        wgmma_commit();
        if (batch + 1 < kSteps / kBatch) wgmma_wait<0>();
      }
    }
#pragma unroll
    for (int x = 0; x < V::kD / 2; ++x) state.s[x] *= carried;
    shared.ready[buffer].wait(parity(step, V::kBuffers));
    if constexpr (V::kOutput) {
      wgmma_wait<0>();
      wgmma_hold(o);
      me.scale_output(o, shared.reading[buffer]);
    }
    wgmma_fence();
    if constexpr (V::kOutput) {
      const uint32_t values = shared_address(tile.v) + me.group * kPanelBytes, scores = shared_address(shared.scores[buffer]);
#pragma unroll
      for (int x = 0; x < 4; ++x)
        wgmma<Element, 64, 1, 0>(o, descriptor(values + x * 16 * kPanelRow), descriptor(scores + x * 32), 1);
      wgmma_commit();
    }
    const uint32_t scaled = shared_address(shared.scaled_values[buffer]) + me.group * kPanelBytes;
#pragma unroll
    for (int x = 0; x < 4; ++x)
      wgmma<Element, V::kD, 1, 1>(state.s, descriptor(scaled + x * 16 * kPanelRow),
                                  descriptor(shared_address(tile.k) + x * 16 * kPanelRow, kPanelBytes), 1);
    wgmma_commit();
    if constexpr (V::kOutput) {
      wgmma_wait<1>();
      wgmma_hold(o);
      if (shared.any_nonfinite[buffer]) me.put_back_nonfinite(o, shared.nonfinite[buffer]);
      me.store_output(o, work, head, work.start + walk.start(step), n, d_tile, e,
                      tile.v + me.group * kPanelBytes, tile.x, buffer);
    }
    wgmma_wait<0>();
    wgmma_hold(state.s);
    fence_for_async();  // of what was written over v, before the next copy
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      shared.empty[stage].arrive();
      shared.used[buffer].arrive();
    }
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
      shared.measured[stage].init(kMeasuring);
      shared.empty[stage].init(V::kAttending * 4);
    }
    for (int buffer = 0; buffer < V::kBuffers; ++buffer) {
      shared.ready[buffer].init(kWarpgroup);
      shared.used[buffer].init(V::kAttending * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int d_tile = tile / p.e_tiles, e_tile = tile % p.e_tiles;
  if (threadIdx.x < V::kAttending * kWarpgroup) {
    more_registers<V::kAttendRegisters>();
    attend<V>(p, shared, work, head, d_tile, e_tile);
  } else if (threadIdx.x < (V::kAttending + 1) * kWarpgroup) {
    set_registers<V::kScoreRegisters, V::kFirstRegisters>();
    score<V>(p, shared, work);
  } else {
    fewer_registers<V::kFetchRegisters>();
    const int thread = threadIdx.x - (V::kAttending + 1) * kWarpgroup;
    if (thread == 0)
      fetch<V>(p, shared, work, head, d_tile, e_tile);
    else if (V::kNorm && thread >= kWarpgroup - kMeasuring)
      measure<V>(p, shared, work, thread - (kWarpgroup - kMeasuring));
  }
}

// Launches the kernel on `blocks` blocks.
template <class V>
cudaError_t launch_pass(const PassParams& p, int64_t blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<V>);
  static_assert(kBytes <= 227 * 1024 / V::kBlocks);
  cudaError_t error = cudaFuncSetAttribute(pass_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  pass_kernel<V><<<dim3(blocks), V::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}
