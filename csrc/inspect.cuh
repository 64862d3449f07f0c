// Looks at each chunk before it is used: weights of its tokens, lengths of its vectors, what is not finite, and rows of
// other sequences.
#pragma once

#include "decay.cuh"
#include "variant.cuh"

struct Length {
  float unit;     // what makes the row of the tile, as it now is, of unit length
  float inverse;  // 1 / |x| of the row as it was
  bool constant;  // shorter vectors are divided by kMinLength
};

// Of a row whose square the types can't hold well: it is first multiplied by a power of two, in place, which changes no
// digit.
template <class Element>
__device__ __noinline__ Length length_of_extreme(uint8_t* tile, int panels, int row) {
  const auto address = [&](int piece) {
    return shared_address(tile) + piece / 8 * kPanelBytes + piece_offset(row, piece % 8);
  };
  float largest = 0.f;
  bool finite = true;
  for (int piece = 0; piece < panels * 8; ++piece) {
    const uint4 x = load_piece(address(piece));
    for (const uint32_t word : {x.x, x.y, x.z, x.w}) {
      const float2 pair = unpack<Element>(word);
      finite &= isfinite(pair.x) && isfinite(pair.y);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  if (!finite) return {CUDART_NAN_F, CUDART_NAN_F, false};
  if (largest == 0.f) return {float(1. / kMinLength), float(1. / kMinLength), true};
  int exponent;
  frexpf(largest, &exponent);
  const float scale = ldexpf(1.f, -max(min(exponent, 126), -126));
  float squares = 0.f;
  for (int piece = 0; piece < panels * 8; ++piece) {
    uint4 x = load_piece(address(piece));
    for (uint32_t* word : {&x.x, &x.y, &x.z, &x.w}) {
      const float2 pair = unpack<Element>(*word);
      *word = pack<Element>(pair.x * scale, pair.y * scale);
      squares += pair.x * scale * (pair.x * scale) + pair.y * scale * (pair.y * scale);
    }
    store_piece(address(piece), x);
  }
  fence_for_async();
  const float length = sqrtf(squares), least = float(kMinLength) * scale;
  const float unit = 1.f / fmaxf(length, least);
  return {unit, unit * scale, length <= least};
}

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

  // Calls use(row, length) for each row of a tile; returns whether one of them is not finite. A thread takes the part
  // of a row that lies in one panel, its neighbours take the others.
  template <int kPanels, class Use>
  __device__ bool measure(uint8_t* tile, Use use) {
    constexpr bool kHalf = std::is_same_v<Element, __half>;
    constexpr float kLeast = kHalf ? 0x1p-8f : 0x1p-39f, kMost = kHalf ? 0x1p12f : 0x1p80f;
    bool nonfinite = false;
#pragma unroll 1
    for (int part = thread; part < kChunk * kPanels; part += kInspecting) {
      const int row = part / kPanels;
      const uint32_t base = shared_address(tile) + part % kPanels * kPanelBytes +
                            piece_offset(row, part % kPanels * (8 / kPanels));  // neighbours on other banks
      float sums[4] = {};
#pragma unroll
      for (int first = 0; first < 8; first += kAtOnce) {
        uint4 x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) x[i] = load_piece(base ^ (first + i) << 4);
#pragma unroll
        for (int w = 0; w < 4 * kAtOnce; ++w) {
          const float2 pair = unpack<Element>((&x[w / 4].x)[w % 4]);
          sums[w % 4] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sums[w % 4]));
        }
      }
      float square = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
      for (int lanes = 1; lanes < kPanels; lanes *= 2) square += __shfl_xor_sync(~0u, square, lanes);
      if (part % kPanels != 0) continue;
      if (square >= kLeast && square <= kMost) {
        const float unit = rsqrtf(square);
        use(row, Length{unit, unit, false});
      } else {
        const Length length = length_of_extreme<Element>(tile, kPanels, row);
        use(row, length);
        nonfinite |= isnan(length.unit);
      }
    }
    return nonfinite;
  }

  // The vectors of columns of the scores, and those of their rows, or through whose length the gradient goes.
  // Returns whether one of the first is not finite.
  __device__ bool measure_all(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes) {
    constexpr int kPanels = V::kNorm == Norm::kValues ? V::kVPanels : V::kQPanels;
    uint8_t* of_columns = V::kNorm == Norm::kValues ? tile.v : tile.b();
    uint8_t* of_rows = V::kNorm == Norm::kValues ? tile.x : V::kBoth ? tile.k : tile.q;
    const bool nonfinite = measure<kPanels>(of_columns, [&](int row, Length x) {
      notes.columns[row] = x.unit;
      notes.scaled[row] = x.unit * notes.writing[row];
    });
    if (chunk.kind == Kind::kAdvance) return false;
    measure<kPanels>(of_rows, [&](int row, Length x) {
      notes.rows[row] = x.unit;
      if constexpr (V::kThrough) notes.inverse[row] = x.inverse, notes.along[row] = x.constant ? 0.f : x.unit * x.unit;
    });
    return nonfinite;
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
    const bool cut_off = chunk.n < kChunk && p.table != nullptr;
    if (cut_off) {
      clear_rows(tile.a(), V::kVPanels, chunk.n);
      clear_rows(tile.b(), V::kQPanels, chunk.n);
      sync_threads(1, kInspecting);
    }
    bool of_lengths = false;
    if constexpr (V::kLengths) of_lengths = measure_all(chunk, tile, notes);
    if (chunk.kind == Kind::kOutput) {
      // The values of the outputs: those of the first are a, with kBoth those of the second are b. Some were measured.
      bool first = of_lengths, second = of_lengths;
      if constexpr (V::kNorm != Norm::kValues) first = nonfinite_in(tile.a(), V::kVPanels);
      if constexpr (V::kBoth && !V::kLengths) second = nonfinite_in(tile.b(), V::kQPanels);
      first = any_thread(1, kInspecting, first);
      if constexpr (V::kBoth) second = any_thread(1, kInspecting, second);
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
