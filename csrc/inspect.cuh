// Looks at each chunk while its scores are made: weights of its tokens, values that are not finite, and rows of other
// sequences.
#pragma once

#include "decay.cuh"
#include "variant.cuh"

// What a thread of the inspecting warps does.
template <class V>
struct Inspector {
  using Element = typename V::Element;
  static constexpr int kAtOnce = 4;  // loads that wait together
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

  __device__ bool nonfinite_in(const uint8_t* tile, int panels) {
    const uint32_t base = shared_address(tile);
    const int pieces = panels * kChunk * 8;
    bool found = false;
#pragma unroll 1
    for (int first = thread; first < pieces; first += kAtOnce * kInspecting) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i] = load_piece(base + min(first + i * kInspecting, pieces - 1) * 16);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) found |= nonfinite_among<Element>(x[i]);
    }
    return found;
  }

  __device__ void inspect(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes) {
    if (notes.n != chunk.n || __float_as_int(notes.log_lambda) != __float_as_int(chunk.log_lambda)) weigh(chunk, notes);
    const bool cut_off = chunk.cut_off(p);
    if (cut_off) {
      clear_rows(tile.a(), V::kVPanels, chunk.n);
      clear_rows(tile.b(), V::kQPanels, chunk.n);
      sync_threads(1, kInspecting);
    }
    if (chunk.kind == Kind::kOutput) {
      // The values of the first output are a, with kBoth those of the second are b. Some are measured, and so looked
      // at.
      bool first = false, second = false;
      if constexpr (V::kNorm != Norm::kValues) first = nonfinite_in(tile.a(), V::kVPanels);
      if constexpr (V::kBoth && !V::kLengths) second = nonfinite_in(tile.b(), V::kQPanels);
      if constexpr (V::kNorm != Norm::kValues) first = any_thread(1, kInspecting, first);
      if constexpr (V::kBoth && !V::kLengths) second = any_thread(1, kInspecting, second);
      if (thread == 0) notes.nonfinite[0] = first, notes.nonfinite[1] = second;
    }
    if (cut_off) fence_for_async();
  }
};

template <class V>
__device__ void inspect(const PassParams& p, SharedStorage<V>& shared, int thread) {
  Inspector<V> me{p, shared, thread};
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    shared.full[stage].wait(parity(step, V::kStages));
    const Chunk& chunk = shared.chunks[stage];
    const bool end = chunk.kind == Kind::kEnd;
    if (!end) me.inspect(chunk, Stage<V>(shared, stage), shared.notes[stage]);
    shared.ready[stage].arrive();
    if (end) return;
  }
}
