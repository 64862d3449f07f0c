// Outputs of a chunk: masked scores times values, and what is read from the state.
#pragma once

#include <math_constants.h>

#include "variant.cuh"
#include "wgmma.cuh"

// Which tiles of a stage one output is made of: (left rightᵀ ⊙ M) values + left S, S the state or its transpose.
enum class Role { kSingle, kGradientOfV, kGradientOfK };

template <class V, Role kRole>
struct Operands {
  static constexpr bool kTransposed = kRole == Role::kGradientOfK;  // reads the transpose of the state
  static constexpr int kInner = kTransposed ? V::kE : V::kD, kColumns = kTransposed ? V::kD : V::kE;
  static constexpr bool kThrough = kTransposed ? V::kThrough : V::kThrough && !V::kBoth;
  // Whether scores are divided by the lengths of the vectors of their rows and columns.
  static constexpr bool kColumnLengths = V::kLengths;
  static constexpr bool kRowLengths = V::kLengths && V::kNorm != Norm::kValues && !kTransposed;
  uint8_t *left, *right, *values, *through;

  __device__ explicit Operands(const Stage<V>& tile) {
    if constexpr (kRole == Role::kSingle)
      left = tile.q, right = tile.k, values = tile.v, through = tile.x;
    else if constexpr (kRole == Role::kGradientOfV)
      left = tile.k, right = tile.q, values = tile.x, through = nullptr;
    else
      left = tile.v, right = tile.x, values = tile.q, through = tile.k;
  }
};

// What a thread of an output warpgroup does: it holds two rows, tokens `row` and 8 later, of scores and outputs.
template <class V, Role kRole>
struct OutputMaker {
  using Element = typename V::Element;
  using Of = Operands<V, kRole>;
  static constexpr int kColumns = Of::kColumns;
  static constexpr int kPanelOfState = V::kE * kPanelRow;
  const PassParams& p;
  SharedStorage<V>& shared;
  const int group, thread, lane, row, pair;

  __device__ OutputMaker(const PassParams& p, SharedStorage<V>& shared, int group, int thread)
      : p(p),
        shared(shared),
        group(group),
        thread(thread),
        lane(thread % 32),
        row(thread / 32 * 16 + lane / 4),
        pair(2 * (lane % 4)) {}

  __device__ void start_scores(float (&scores)[32], const Of& of) {
    const uint32_t left = address_now(of.left), right = address_now(of.right);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < Of::kInner / kPanel; ++panel) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int at = panel * kPanelBytes + x * 32;
        wgmma<Element, 64, 0>(scores, descriptor(left + at), descriptor(right + at), panel + x > 0);
      }
    }
    wgmma_commit();
  }

  __device__ void start_reading(float (&o)[kColumns / 2], const Of& of, const uint8_t* state) {
    const uint32_t left = address_now(of.left), right = address_now(state);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < Of::kInner / kPanel; ++panel) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const uint64_t a = descriptor(left + panel * kPanelBytes + x * 32);
        if constexpr (Of::kTransposed)
          wgmma<Element, kColumns, 1>(o, a, descriptor(right + (panel * 4 + x) * 16 * kPanelRow, kPanelOfState),
                                      panel + x > 0);
        else
          wgmma<Element, kColumns, 0>(o, a, descriptor(right + panel * kPanelOfState + x * 32), panel + x > 0);
      }
    }
    wgmma_commit();
  }

  // Scores times λ^|i-j| and lengths, as left operand; chosen, not multiplied where masked: 0 · NaN is NaN.
  __device__ void mask(uint32_t (&left)[4][4], const float (&scores)[32], const Notes<V>& notes) {
    float lengths[2] = {1.f, 1.f};
    if constexpr (Of::kRowLengths) lengths[0] = notes.rows[row], lengths[1] = notes.rows[row + 8];
#pragma unroll
    for (int x = 0; x < 32; x += 2) {
      const int i = row + x / 2 % 2 * 8, j = x / 4 * 8 + pair;
      const float* weight = &notes.weights[kChunk + i - j];
      float a = scores[x] * weight[0], b = scores[x + 1] * weight[-1];
      if constexpr (Of::kRowLengths) a *= lengths[x / 2 % 2], b *= lengths[x / 2 % 2];
      if constexpr (Of::kColumnLengths) a *= notes.columns[j], b *= notes.columns[j + 1];
      if (weight[0] < 0.f) a = 0.f;
      if (weight[-1] < 0.f) b = 0.f;
      left[x / 8][x / 2 % 4] = pack<Element>(a, b);
    }
  }

  __device__ void scale_rows(float (&o)[kColumns / 2], const Notes<V>& notes) {
    float reading[2] = {notes.reading[row], notes.reading[row + 8]};
    if constexpr (Of::kRowLengths) reading[0] *= notes.rows[row], reading[1] *= notes.rows[row + 8];
#pragma unroll
    for (int x = 0; x < kColumns / 2; ++x) o[x] *= reading[x / 2 % 2];
  }

  __device__ void start_values(float (&o)[kColumns / 2], const uint32_t (&scores)[4][4], const Of& of) {
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < 4; ++x)
      wgmma<Element, kColumns, 1>(o, scores[x], descriptor(shared_address(of.values) + x * 16 * kPanelRow, kPanelBytes),
                                  1);
    wgmma_commit();
  }

  // Takes values that are not finite out of the tile, once all others have read it, and notes where they were: times
  // a masked score, 0, they would change the output of earlier tokens.
  __device__ void take_out(uint8_t* values, Notes<V>& notes, int stage, int step) {
    auto& bad = notes.bad[kRole == Role::kGradientOfK];
    shared.advanced[stage].wait(parity(step, V::kStages));
    if constexpr (V::kBoth) shared.scored[stage].wait(parity(step, V::kStages));
    for (int x = thread; x < kColumns; x += kWarpgroup) bad[x] = 0;
    sync_threads(2 + group, kWarpgroup);
#pragma unroll 1
    for (int x = thread; x < kColumns * kChunk / 8; x += kWarpgroup) {
      const int token = x / 8 % kChunk;
      int column = x / 8 / kChunk * kPanel + (x % 8 ^ token % 8) * 8;
      uint4 piece = load_piece(shared_address(values) + x * 16);
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        if (any_nonfinite<Element>(*word & 0xFFFF)) atomicOr(&bad[column], 1ull << token), *word &= 0xFFFF0000u;
        if (any_nonfinite<Element>(*word >> 16)) atomicOr(&bad[column + 1], 1ull << token), *word &= 0xFFFFu;
        column += 2;
      }
      store_piece(shared_address(values) + x * 16, piece);
    }
    fence_for_async();
    sync_threads(2 + group, kWarpgroup);
  }

  // NaN from the first token on that brought a value that is not finite.
  __device__ void spoil(float (&o)[kColumns / 2], const Notes<V>& notes) {
    const auto& bad = notes.bad[kRole == Role::kGradientOfK];
#pragma unroll
    for (int x = 0; x < kColumns / 2; ++x) {
      const int i = row + x / 2 % 2 * 8;
      const unsigned long long seen = bad[x / 4 * 8 + pair + x % 2];
      if (p.reverse ? seen >> i : seen << (63 - i)) o[x] = CUDART_NAN_F;
    }
  }

  // The gradient of u = x / |x| to that of x: (du - (du·u) u) / |x|, equation (4).
  __device__ void through_unit_length(float (&o)[kColumns / 2], const uint8_t* vectors, const Notes<V>& notes) {
    const uint32_t base = shared_address(vectors) + pair * 2;
    const auto vector = [&](int x) {
      return unpack<Element>(load_word(base + x / 32 * kPanelBytes + piece_offset(row + x / 2 % 2 * 8, x / 4 % 8)));
    };
    float along[2] = {};
#pragma unroll
    for (int x = 0; x < kColumns / 2; x += 2) {
      const float2 v = vector(x);
      along[x / 2 % 2] += o[x] * v.x + o[x + 1] * v.y;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      along[half] += __shfl_xor_sync(~0u, along[half], 1);
      along[half] += __shfl_xor_sync(~0u, along[half], 2);
      along[half] *= notes.along[row + half * 8];
    }
    const float inverse[2] = {notes.inverse[row], notes.inverse[row + 8]};
#pragma unroll
    for (int x = 0; x < kColumns / 2; x += 2) {
      const float2 v = vector(x);
      o[x] = (o[x] - along[x / 2 % 2] * v.x) * inverse[x / 2 % 2];
      o[x + 1] = (o[x + 1] - along[x / 2 % 2] * v.y) * inverse[x / 2 % 2];
    }
  }

  // To global memory, by way of the left tile, which nobody else reads any more. The copy engine does it, but for
  // chunks that end with their sequence amid others.
  __device__ void store(const float (&o)[kColumns / 2], const Chunk& chunk, uint8_t* staging) {
    const uint32_t base = shared_address(staging);
#pragma unroll
    for (int x = 0; x < kColumns / 16; ++x) {
      const float* of = &o[x * 8];
      store_blocks(base + x / 4 * kPanelBytes + piece_offset(row - lane / 4 + lane % 16, x % 4 * 2 + lane / 16),
                   {pack<Element>(of[0], of[1]), pack<Element>(of[2], of[3]), pack<Element>(of[4], of[5]),
                    pack<Element>(of[6], of[7])});
    }
    fence_for_async();  // of the copy that follows, and of the tile that takes the place of this one
    const int first = Of::kTransposed ? 0 : chunk.e_tile * V::kE;
    if (chunk.n < kChunk && p.table != nullptr) {
      sync_threads(2 + group, kWarpgroup);
      const int width = Of::kTransposed ? p.d : p.e;
      Element* out = static_cast<Element*>(Of::kTransposed ? p.out_of_k : p.out) +
                     ((int64_t(chunk.batch) * p.heads + chunk.head) * p.tokens + chunk.token) * width + first;
#pragma unroll 1
      for (int x = thread; x < chunk.n * (kColumns / 8); x += kWarpgroup) {
        const int i = x / (kColumns / 8), piece = x % (kColumns / 8);
        if (first + piece * 8 < width)
          *reinterpret_cast<uint4*>(out + int64_t(i) * width + piece * 8) =
              load_piece(base + piece / 8 * kPanelBytes + piece_offset(i, piece % 8));
      }
      return;
    }
    sync_threads(2 + group, kWarpgroup);
    if (thread != 0) return;
#pragma unroll
    for (int panel = 0; panel < kColumns / kPanel; ++panel)
      store_tile(Of::kTransposed ? p.out_of_k_map : p.out_map, staging + panel * kPanelBytes,
                 chunk.in_turn ? Keep::kShort : Keep::kNormal, first + panel * kPanel, chunk.token, chunk.head,
                 chunk.batch);
    commit_stores();
  }

  // The part of one tile of d, in float32.
  __device__ void store_part(const float (&o)[kColumns / 2], const Chunk& chunk) {
    const int first = chunk.e_tile * V::kE + pair;
    const int64_t head = (int64_t(chunk.d_tile) * p.batch + chunk.batch) * p.heads + chunk.head;
    float* out = p.partial + (head * p.tokens + chunk.token) * p.e + first;
#pragma unroll
    for (int x = 0; x < kColumns / 2; x += 2) {
      const int i = row + x / 2 % 2 * 8, column = x / 4 * 8;
      if (i < chunk.n && first + column < p.e)
        *reinterpret_cast<float2*>(out + int64_t(i) * p.e + column) = make_float2(o[x], o[x + 1]);
    }
  }

  __device__ void make(const Chunk& chunk, const Stage<V>& tile, Notes<V>& notes, int stage, int step, int outputs) {
    const Of of(tile);
    const int buffer = outputs % V::kStates;
    const bool nonfinite = notes.nonfinite[kRole == Role::kGradientOfK];
    float scores[32], o[kColumns / 2];
    uint32_t masked[4][4];
    start_scores(scores, of);
    wgmma_wait<0>();
    wgmma_hold(scores);
    if constexpr (V::kBoth) arrive_as_warp(shared.scored[stage]);
    mask(masked, scores, notes);
    shared.state_full[buffer].wait(parity(outputs, V::kStates));
    start_reading(o, of, shared.states[buffer]);
    if (nonfinite) take_out(of.values, notes, stage, step);
    wgmma_wait<0>();
    wgmma_hold(o);
    arrive_as_warp(shared.state_empty[buffer]);
    scale_rows(o, notes);
    wgmma_hold(o);
    wgmma_hold(masked);
    start_values(o, masked, of);
    wgmma_wait<0>();
    wgmma_hold(o);
    wgmma_hold(masked);
    if (nonfinite) spoil(o, notes);
    if constexpr (Of::kThrough) through_unit_length(o, of.through, notes);
    if constexpr (V::kBoth && V::kThrough) {  // one reads the tile that the other stages its output in
      if constexpr (Of::kThrough)
        arrive_as_warp(shared.through[stage]);
      else
        shared.through[stage].wait(parity(step, V::kStages));
    }
    if (kRole == Role::kSingle && p.partial != nullptr)
      store_part(o, chunk);
    else
      store(o, chunk, of.left);
  }
};

// Of `group` 0 or 1: with kBoth one makes the gradients of v and the other those of k, else they take turns.
template <class V>
__device__ void make_outputs(const PassParams& p, SharedStorage<V>& shared, int group, int thread) {
  int outputs = 0, held = -1;  // stage that this warp has not left yet, since the copy engine reads from it
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    shared.ready[stage].wait(parity(step, V::kStages));
    if (held >= 0) {
      if (thread == 0) wait_for_stores();
      arrive_as_warp(shared.empty[held]);
      held = -1;
    }
    const Chunk& chunk = shared.chunks[stage];
    if (chunk.kind == Kind::kEnd) return;
    const bool output = chunk.kind == Kind::kOutput, mine = output && (V::kBoth || outputs % 2 == group);
    if (mine) {
      const Stage<V> tile(shared, stage);
      Notes<V>& notes = shared.notes[stage];
      if constexpr (!V::kBoth) {
        OutputMaker<V, Role::kSingle>(p, shared, group, thread).make(chunk, tile, notes, stage, step, outputs);
      } else if (group == 0) {
        OutputMaker<V, Role::kGradientOfV>(p, shared, group, thread).make(chunk, tile, notes, stage, step, outputs);
      } else {
        OutputMaker<V, Role::kGradientOfK>(p, shared, group, thread).make(chunk, tile, notes, stage, step, outputs);
      }
    } else if constexpr (V::kBoth) {
      arrive_as_warp(shared.scored[stage]);
      if (V::kThrough && group == 1) arrive_as_warp(shared.through[stage]);
    }
    outputs += output;
    if (mine && thread < 32)
      held = stage;
    else
      arrive_as_warp(shared.empty[stage]);
  }
}
