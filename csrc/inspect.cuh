// Makes what outputs and state need to know of a chunk: weights of its tokens, and whether some values are not finite;
// clears rows of other sequences.
#pragma once

#include "decay.cuh"
#include "lengths.cuh"
#include "variant.cuh"

// What a thread of the inspecting warps does.
template <class V>
struct Inspector {
  using Element = typename V::Element;
  static constexpr int kAtOnce = 8;  // loads that wait together
  const PassParams& p;
  SharedStorage<V>& shared;
  const int thread;

  // Powers of λ, which stay from one use of the stage to the next; tokens behind the end of a sequence have no meaning.
  __device__ void weigh(const Chunk& chunk, Notes<V>& notes) {
    for (int x = thread; x < 2 * kChunk; x += kInspecting) {
      const int later = x - kChunk, distance = p.reverse ? -later : later;
      notes.weights[x] = distance < 0 ? -1.f : power(chunk.log_lambda, distance);
    }
    for (int i = thread; i < kChunk; i += kInspecting) {
      notes.reading[i] = power(chunk.log_lambda, p.reverse ? max(chunk.n - 1 - i, 0) : i + 1);
      notes.writing[i] = power(chunk.log_lambda, p.reverse ? i + 1 : max(chunk.n - 1 - i, 0));
    }
    sync_threads(1, kInspecting);  // all have seen what was known, and see the weights
    if (thread == 0)
      notes.n = chunk.n, notes.log_lambda = chunk.log_lambda, notes.carried = power(chunk.log_lambda, chunk.n);
  }

  // Rows behind the end of a sequence belong to another one: times zero they could still be NaN.
  __device__ void clear_rows(uint8_t* tile, int panels, int n) {
    for (int x = thread; x < panels * kChunk * 8; x += kInspecting)
      if (x / 8 % kChunk >= n) store_piece(shared_address(tile) + x * 16, make_uint4(0, 0, 0, 0));
  }

  __device__ void prepare(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes) {
    if (notes.n != chunk.n || __float_as_int(notes.log_lambda) != __float_as_int(chunk.log_lambda)) weigh(chunk, notes);
    if (chunk.cut_off(p)) {
      clear_rows(tile.a(), V::kVPanels, chunk.n);
      clear_rows(tile.b(), V::kQPanels, chunk.n);
      fence_for_async();
      sync_threads(1, kInspecting);
    }
  }

  // The vectors of the scores' rows, or through whose length a gradient goes.
  __device__ void measure_rows(const Stage<V>& tile, Notes<V>& notes) {
    constexpr int kPanels = V::kNorm == Norm::kValues ? V::kVPanels : V::kQPanels;
    static_assert(kInspecting == kChunk);
    uint8_t* rows = V::kNorm == Norm::kValues ? tile.x : V::kBoth ? tile.k : tile.q;
    measure<Element, kPanels, 1>(rows, thread, 0, [&](Length x) {
      notes.rows[thread] = x.unit;
      if constexpr (V::kThrough)
        notes.inverse[thread] = x.inverse, notes.along[thread] = x.constant ? 0.f : x.unit * x.unit;
    });
  }

  // Whether a value of b is not finite: the values of the second output. Those of the first pass through the state's
  // hands, and vectors are measured.
  __device__ void look(const uint8_t* b, Notes<V>& notes) {
    const uint32_t base = shared_address(b) + thread * 16;
    NonfiniteSearch<Element> search[kAtOnce];
#pragma unroll 1
    for (int first = 0; first < V::kQPanels * kPanelBytes; first += kAtOnce * kInspecting * 16) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i] = load_piece(base + first + i * kInspecting * 16);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        for (const uint32_t word : {x[i].x, x[i].y, x[i].z, x[i].w}) search[i].add(word);
    }
    bool found = false;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) found |= search[i].found();
    found = __any_sync(~0u, found);
    if (thread % 32 == 0) notes.nonfinite[1][thread / 32] = found;
  }
};

template <class V>
__device__ void inspect(const PassParams& p, SharedStorage<V>& shared, int thread) {
  Inspector<V> me{p, shared, thread};
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    shared.full[stage].wait(parity(step, V::kStages));
    const Chunk& chunk = shared.chunks[stage];
    if (chunk.kind == Kind::kEnd) {
      arrive_as_warp(shared.ready[stage]);
      return;
    }
    const Stage<V> tile(shared, stage);
    Notes<V>& notes = shared.notes[stage];
    const bool output = chunk.kind == Kind::kOutput;
    me.prepare(chunk, tile, notes);
    arrive_as_warp(shared.ready[stage]);  // the next may come soon, if the state alone needs this one
    if constexpr (V::kLengths) {
      constexpr bool kScores = V::kNorm != Norm::kValues;  // of their rows; else through whose length a gradient goes
      if (output) me.measure_rows(tile, notes);
      arrive_as_warp((kScores ? shared.measured : shared.looked)[stage]);
    }
    if (V::kLooksAtB && output) {
      me.look(tile.b(), notes);
      arrive_as_warp(shared.looked[stage]);
    }
  }
}
