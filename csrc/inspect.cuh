// Makes what outputs and state need to know of a chunk: weights of its tokens, lengths, and whether some values are
// not finite; clears rows of other sequences.
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

  // The vectors of the scores' rows.
  __device__ void measure_rows(const Stage<V>& tile, Notes<V>& notes, Lengths& kept) {
    static_assert(kInspecting == kChunk);
    measure<Element, V::kQPanels, 1>(tile.q, thread, 0, [&](Length x) {
      notes.rows[thread] = x.unit;
      kept.values[thread] = x.inverse;
    });
  }

  // The same of lengths that were kept: of the scores' columns or of values, which columns weigh, and of rows. Such a
  // length is NaN where a value is not finite.
  __device__ void use_lengths(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes, const Lengths (&kept)[2]) {
    constexpr bool kOfValues = V::kBoth || !V::kRowLengths;
    constexpr int kPanels = V::kRowLengths ? V::kQPanels : V::kVPanels;
    uint8_t* vectors = V::kBoth ? tile.q : V::kRowLengths ? tile.k : tile.v;
    const float inverse = thread < chunk.n ? kept[1].of(chunk, thread) : 1.f;
    const float column = length_of_kept<Element>(inverse, vectors, kPanels, thread).unit;
    notes.columns[thread] = column;
    notes.scaled[thread] = column * notes.writing[thread];
    if constexpr (kOfValues) {
      const bool nonfinite = __any_sync(~0u, isnan(column));
      if (thread % 32 == 0) notes.nonfinite[V::kBoth][thread / 32] = nonfinite;
    }
    if constexpr (V::kRowLengths)
      notes.rows[thread] = use_length_of_row(chunk, V::kBoth ? tile.k : tile.q, notes, kept[0]);
  }

  // Of the scores' rows, or the vectors that a gradient is taken to. Returns what makes this thread's of unit length.
  __device__ float use_length_of_row(const Chunk& chunk, uint8_t* vectors, Notes<V>& notes, const Lengths& kept) {
    const float inverse = thread < chunk.n ? kept.of(chunk, thread) : 1.f;
    const Length row = length_of_kept<Element>(inverse, vectors, V::kRowLengths ? V::kQPanels : V::kVPanels, thread);
    if constexpr (V::kThrough) notes.inverse[thread] = row.inverse, notes.along[thread] = row.along();
    return row.unit;
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
  int phases = 0;  // as in `output.cuh`
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
    if constexpr (V::kReadsLengths) me.use_lengths(chunk, tile, notes, shared.lengths[stage]);
    arrive_as_warp(shared.ready[stage]);  // the next may come soon, if the state alone needs this one
    if constexpr (V::kMeasures) {
      if (output) me.measure_rows(tile, notes, shared.lengths[stage][0]);
      arrive_as_warp(shared.measured[stage]);
    }
    if constexpr (V::kLate) {
      const auto& kept = shared.lengths[stage][0];
      if (output) {  // vectors are needed where a length alone does not do
        if (__any_sync(~0u, thread < chunk.n && !is_ordinary<typename V::Element>(kept.of(chunk, thread))))
          shared.through[stage].wait(phases >> stage & 1);
        me.use_length_of_row(chunk, tile.x, notes, kept);
        phases ^= 1 << stage;
      }
      arrive_as_warp(shared.measured[stage]);
    }
    if (V::kLooksAtB && output) {
      me.look(tile.b(), notes);
      arrive_as_warp(shared.looked[stage]);
    }
  }
}
