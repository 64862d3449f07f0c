// Looks at each chunk before it is used: weights of its tokens, lengths of its vectors, and what must not be
// multiplied.
#pragma once

#include "decay.cuh"
#include "variant.cuh"

// x (16 × 16) times xᵀ, of which the diagonal is wanted: one 8 × 8 block for each half of the rows.
template <class Element>
__device__ inline void multiply_by_itself(float (&upper)[4], float (&lower)[4], const uint32_t (&x)[4]) {
#define PRODUCT(TYPE, D, B1, B2)                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])                       \
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(B1), "r"(B2))
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    PRODUCT("bf16", upper, x[0], x[2]);
    PRODUCT("bf16", lower, x[1], x[3]);
  } else {
    PRODUCT("f16", upper, x[0], x[2]);
    PRODUCT("f16", lower, x[1], x[3]);
  }
#undef PRODUCT
}

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
  const float length = sqrtf(squares), least = float(kMinLength) * scale;
  const float unit = 1.f / fmaxf(length, least);
  return {unit, unit * scale, length <= least};
}

// What a thread of the inspecting warps does.
template <class V>
struct Inspector {
  using Element = typename V::Element;
  const PassParams& p;
  SharedStorage<V>& shared;
  const int thread;

  // Powers of λ. Tokens behind the end of a sequence have no meaning.
  __device__ float reading(const Chunk& chunk, int i) const {
    return power(chunk.log2_lambda, p.reverse ? max(chunk.n - 1 - i, 0) : i + 1);
  }
  __device__ float writing(const Chunk& chunk, int j) const {
    return power(chunk.log2_lambda, p.reverse ? j + 1 : max(chunk.n - 1 - j, 0));
  }

  __device__ void weigh(const Chunk& chunk, Notes<V>& notes) {
    for (int x = thread; x < 2 * kChunk; x += kInspecting) {
      const int later = x - kChunk, distance = p.reverse ? -later : later;
      notes.weights[x] = distance < 0 ? -1.f : power(chunk.log2_lambda, distance);
    }
    for (int i = thread; i < kChunk; i += kInspecting) {
      notes.reading[i] = reading(chunk, i);
      if constexpr (!V::kLengths) notes.writing[i] = writing(chunk, i);
    }
  }

  // Calls use(row, length) for each row of a tile, on the thread of this warp that knows it.
  template <int kPanels, class Use>
  __device__ void measure(uint8_t* tile, int block, Use use) {
    constexpr bool kHalf = std::is_same_v<Element, __half>;
    constexpr float kLeast = kHalf ? 0x1p-8f : 0x1p-39f, kMost = kHalf ? 0x1p12f : 0x1p80f;
    const int lane = thread % 32;
    const uint32_t base = shared_address(tile);
    float upper[4] = {}, lower[4] = {};
#pragma unroll 2
    for (int x = 0; x < kPanels * 4; ++x) {
      uint32_t rows[4];
      load_blocks<false>(rows,
                         base + x / 4 * kPanelBytes + piece_offset(block * 16 + lane % 16, x % 4 * 2 + lane / 16));
      multiply_by_itself<Element>(upper, lower, rows);
    }
    const int row = lane / 4;
    if (row / 2 != lane % 4) return;  // not on the diagonal
    for (int half = 0; half < 2; ++half) {
      const float square = half == 0 ? (row % 2 ? upper[1] : upper[0]) : (row % 2 ? lower[3] : lower[2]);
      const int at = block * 16 + half * 8 + row;
      if (square >= kLeast && square <= kMost) {
        const float unit = rsqrtf(square);
        use(at, Length{unit, unit, false});
      } else {
        use(at, length_of_extreme<Element>(tile, kPanels, at));
      }
    }
  }

  // The vectors of columns of the scores, and those of their rows, or through whose length the gradient goes.
  __device__ void measure_all(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes) {
    for (int block = thread / 32; block < 8; block += kInspecting / 32) {
      if (block < 4) {
        const auto use = [&](int row, Length x) {
          notes.columns[row] = x.unit;
          notes.writing[row] = writing(chunk, row) * x.unit;
        };
        if constexpr (V::kNorm == Norm::kValues)
          measure<V::kVPanels>(tile.v, block, use);
        else
          measure<V::kQPanels>(tile.b(), block, use);
      } else if (chunk.kind == Kind::kOutput) {
        const auto use = [&](int row, Length x) {
          notes.rows[row] = x.unit;
          if constexpr (V::kThrough)
            notes.inverse[row] = x.inverse, notes.along[row] = x.constant ? 0.f : x.unit * x.unit;
        };
        if constexpr (V::kNorm == Norm::kValues)
          measure<V::kVPanels>(tile.x, block - 4, use);
        else
          measure<V::kQPanels>(V::kBoth ? tile.k : tile.q, block - 4, use);
      }
    }
  }

  // Rows behind the end of a sequence belong to another one: times zero they could still be NaN.
  __device__ void clear_rows(uint8_t* tile, int panels, int n) {
    for (int x = thread; x < panels * kChunk * 8; x += kInspecting)
      if (x / 8 % kChunk >= n) store_piece(shared_address(tile) + x * 16, make_uint4(0, 0, 0, 0));
  }

  __device__ bool any_bad(const uint8_t* tile, int panels, int n) {
    bool bad = false;
#pragma unroll 2
    for (int x = thread; x < panels * kChunk * 8; x += kInspecting)
      bad |= x / 8 % kChunk < n && nonfinite_among<Element>(load_piece(shared_address(tile) + x * 16));
    return bad;
  }

  // Notes which tokens hold a value that is not finite, for each column, and clears those values: whoever multiplies
  // the tile puts NaN where they belong, and a token changes nothing before it.
  template <int kColumns>
  __device__ void take_out(uint8_t* tile, unsigned long long (&tokens)[kColumns], unsigned long long& any) {
    for (int x = thread; x < kColumns; x += kInspecting) tokens[x] = 0;
    if (thread == 0) any = 0;
    sync_threads(1, kInspecting);
    for (int x = thread; x < kColumns / kPanel * kChunk * 8; x += kInspecting) {
      const int row = x / 8 % kChunk, column = x / 8 / kChunk * kPanel + (x % 8 ^ row % 8) * 8;
      uint4 piece = load_piece(shared_address(tile) + x * 16);
      int at = column;
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        if (any_nonfinite<Element>(*word & 0xFFFF)) mark(tokens[at], any, row), *word &= 0xFFFF0000u;
        if (any_nonfinite<Element>(*word >> 16)) mark(tokens[at + 1], any, row), *word &= 0xFFFFu;
        at += 2;
      }
      store_piece(shared_address(tile) + x * 16, piece);
    }
  }
  __device__ static void mark(unsigned long long& tokens, unsigned long long& any, int token) {
    atomicOr(&tokens, 1ull << token);
    atomicOr(&any, 1ull << token);
  }

  __device__ void inspect(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes) {
    weigh(chunk, notes);
    if (chunk.n < kChunk && p.table != nullptr) {
      clear_rows(tile.a(), V::kVPanels, chunk.n);
      clear_rows(tile.b(), V::kQPanels, chunk.n);
      sync_threads(1, kInspecting);
    }
    if constexpr (V::kLengths) measure_all(chunk, tile, notes);
    bool bad = any_bad(tile.a(), V::kVPanels, chunk.n);
    if constexpr (V::kBoth) bad |= any_bad(tile.b(), V::kQPanels, chunk.n);
    bad = any_thread(1, kInspecting, bad);
    if (bad) {
      take_out(tile.a(), notes.bad_v, notes.any_bad_v);
      if constexpr (V::kBoth) take_out(tile.b(), notes.bad_q, notes.any_bad_q);
      sync_threads(1, kInspecting);
    }
    if (thread == 0) notes.any_bad = bad;
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
    fence_for_async();
    shared.ready[stage].arrive();
    if (end) return;
  }
}
