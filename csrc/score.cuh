// The masked scores of a chunk, and its values scaled by what they weigh in the state.
#pragma once

#include "variant.cuh"
#include "wgmma.cuh"

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

  // Notes which tokens hold a value that is not finite, for each column, and clears those values: `attend` puts NaN
  // into the outputs from there on, and a token changes nothing before it.
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
        wgmma<Element, 64, 0, 0>(scores, descriptor(shared_address(tile.q) + at),
                                 descriptor(shared_address(tile.k) + at), x > 0);
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
