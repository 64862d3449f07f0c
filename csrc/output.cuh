// Outputs of a chunk: masked scores times values, and what is read from the state.
#pragma once

#include <math_constants.h>

#include "lengths.cuh"
#include "neighbour.cuh"
#include "variant.cuh"
#include "wgmma.cuh"

// Which tiles of a stage one output is made of: (left rightᵀ ⊙ M) values + left S, S the state or for the `second` of
// two its transpose. The first is the gradient of v, the second that of k.
template <class V>
struct Operands {
  static_assert(!V::kBoth || V::kD == V::kE);
  uint8_t *left, *right, *values, *through;

  __device__ Operands(const Stage<V>& tile, bool second) {
    if constexpr (!V::kBoth) {
      left = tile.q, right = tile.k, values = tile.v, through = tile.x;
    } else {
      left = second ? tile.v : tile.k, right = second ? tile.x : tile.q, values = second ? tile.q : tile.x;
      through = tile.k;
    }
  }
};

// What an output warpgroup does.
template <class V>
struct OutputMaker {
  using Element = typename V::Element;
  static constexpr int kColumns = V::kE, kPanelOfState = V::kE * kPanelRow;
  const PassParams& p;
  SharedStorage<V>& shared;
  const int group;
  const bool second;  // makes the second of two outputs
  int phases = 0;     // a bit for each stage: parity of the barriers that only chunks with outputs pass

  __device__ OutputMaker(const PassParams& p, SharedStorage<V>& shared, int group)
      : p(p), shared(shared), group(group), second(V::kBoth && group == 1) {}

  // Whether the neighbour's output is added to this one.
  __device__ bool keeps() const { return V::kSums && second == keeps_second(); }
  __device__ int phase_of(int stage) const { return phases >> stage & 1; }

  // left rightᵀ of two tiles.
  template <int kPanels>
  __device__ void start_product(float (&products)[32], const uint8_t* left_tile, const uint8_t* right_tile) {
    const uint32_t left = address_now(left_tile), right = address_now(right_tile);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int offset = panel * kPanelBytes + x * 32;
        wgmma<Element, 64, 0>(products, descriptor(left + offset), descriptor(right + offset), panel + x > 0);
      }
    }
    wgmma_commit();
  }

  // Measures the vectors of the scores' columns, which the state waits for, and waits until those of rows are measured
  // too.
  __device__ void measure_columns(const Stage<V>& tile, Notes<V>& notes, int stage, int step) {
    const Lane at;
    constexpr int kThreads = 2;
    const int row = at.thread / kThreads;
    measure<Element, V::kQPanels, kThreads>(tile.k, row, at.thread % kThreads, [&](Length x) {
      notes.columns[row] = x.unit;
      notes.scaled[row] = x.unit * notes.writing[row];
      shared.lengths[stage][1].values[row] = x.inverse;
    });
    arrive_as_warp(shared.measured[stage]);
    shared.measured[stage].wait(parity(step, V::kStages));
  }

  // left S, or left Sᵀ.
  template <int kTransposed>
  __device__ void start_reading(float (&o)[kColumns / 2], const uint8_t* left_tile, const uint8_t* state) {
    const uint32_t left = address_now(left_tile), right = address_now(state);
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < V::kD / 16; ++x) {
      const uint32_t at = kTransposed ? x * 16 * kPanelRow : x / 4 * kPanelOfState + x % 4 * 32;
      wgmma<Element, kColumns, kTransposed>(
          o, descriptor(left + x / 4 * kPanelBytes + x % 4 * 32),
          kTransposed ? descriptor(right + at, kPanelOfState) : descriptor(right + at), x > 0);
    }
    wgmma_commit();
  }

  // Scores times λ^|i-j| and lengths, as left operand; chosen, not multiplied where masked: 0 · NaN is NaN.
  __device__ void mask(uint32_t (&left)[4][4], const float (&scores)[32], const Notes<V>& notes) {
    const Lane at;
    float rows[2] = {1.f, 1.f};
    if (V::kRowLengths && !second) rows[0] = notes.rows[at.row], rows[1] = notes.rows[at.row + 8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float2 columns = make_float2(1.f, 1.f);
      if constexpr (V::kLengths) columns = *reinterpret_cast<const float2*>(&notes.columns[n * 8 + at.pair]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* weight = &notes.weights[kChunk + at.row + half * 8 - n * 8 - at.pair];
        float a = scores[n * 4 + half * 2], b = scores[n * 4 + half * 2 + 1];
        if constexpr (V::kLengths) a *= columns.x, b *= columns.y;
        if constexpr (V::kRowLengths) a *= rows[half], b *= rows[half];
        a = weight[0] < 0.f ? 0.f : a * weight[0];
        b = weight[-1] < 0.f ? 0.f : b * weight[-1];
        left[n / 2][n % 2 * 2 + half] = pack<Element>(a, b);
      }
    }
  }

  __device__ void scale_rows(float (&o)[kColumns / 2], const Notes<V>& notes) {
    const Lane at;
    float reading[2] = {notes.reading[at.row], notes.reading[at.row + 8]};
    if (V::kRowLengths && !second) reading[0] *= notes.rows[at.row], reading[1] *= notes.rows[at.row + 8];
#pragma unroll
    for (int x = 0; x < kColumns / 2; ++x) o[x] *= reading[x / 2 % 2];
  }

  __device__ void start_values(float (&o)[kColumns / 2], const uint32_t (&scores)[4][4], const Operands<V>& of) {
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
    const Lane at;
    auto& bad = notes.bad[second];
    shared.advanced[stage].wait(parity(step, V::kStages));
    if constexpr (V::kBoth) shared.scored[stage].wait(phase_of(stage));
    for (int x = at.thread; x < kColumns; x += kWarpgroup) bad[x] = 0;
    sync_threads(2 + group, kWarpgroup);
#pragma unroll 1
    for (int x = at.thread; x < kColumns * kChunk / 8; x += kWarpgroup) {
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
    const Lane at;
    const auto& bad = notes.bad[second];
#pragma unroll
    for (int x = 0; x < kColumns / 2; ++x) {
      const int i = at.row + x / 2 % 2 * 8;
      const unsigned long long seen = bad[x / 4 * 8 + at.pair + x % 2];
      if (p.reverse ? seen >> i : seen << (63 - i)) o[x] = CUDART_NAN_F;
    }
  }

  // Lets the vectors through whose unit length the output is taken come where nobody needs k any more.
  __device__ void call_for_vectors(const Chunk& chunk, const Stage<V>& tile, int stage, int step) {
    if (Lane().thread != 0) return;
    shared.scored[stage].wait(phase_of(stage));
    shared.advanced[stage].wait(parity(step, V::kStages));
    shared.through[stage].arrive_expecting(V::kVPanels * kPanelBytes);
    copy_in<V::kVPanels>(tile.x, p.x, shared.through[stage], chunk.in_turn ? Keep::kShort : Keep::kNormal, 0,
                         chunk.token, chunk.head / p.x.group, chunk.batch * p.x.batch);
  }

  // The gradient of u = x / |x| to that of x: (du - (du·u) u) / |x|, equation (4).
  __device__ void through_unit_length(float (&o)[kColumns / 2], const uint8_t* vectors, const Notes<V>& notes) {
    float along[2] = {};
    uint32_t base = address_now(vectors);
    Lane at;
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t x[4];  // as o, in pairs
      load_blocks<false>(x, base + n / 4 * kPanelBytes + at.block(n % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Element>(x[i]);
        along[i % 2] += o[n * 8 + i * 2] * pair.x + o[n * 8 + i * 2 + 1] * pair.y;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      along[half] += __shfl_xor_sync(~0u, along[half], 1);
      along[half] += __shfl_xor_sync(~0u, along[half], 2);
      along[half] *= notes.along[at.row + half * 8];
    }
    const float inverse[2] = {notes.inverse[at.row], notes.inverse[at.row + 8]};
    base = address_now(vectors), at = Lane();
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {  // loaded again: there are no registers for all
      uint32_t x[4];
      load_blocks<false>(x, base + n / 4 * kPanelBytes + at.block(n % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Element>(x[i]);
        float *first = &o[n * 8 + i * 2], *next = first + 1;
        *first = (*first - along[i % 2] * pair.x) * inverse[i % 2];
        *next = (*next - along[i % 2] * pair.y) * inverse[i % 2];
      }
    }
  }

  // To the left tile, which nobody else reads any more, and from where `store` copies it to global memory.
  __device__ void put_down(const float (&o)[kColumns / 2], uint8_t* tile) {
    const Lane at;
    const uint32_t base = shared_address(tile);
#pragma unroll
    for (int x = 0; x < kColumns / 16; ++x) {
      const float* of = &o[x * 8];
      store_blocks(base + x / 4 * kPanelBytes + at.block(x % 4),
                   {pack<Element>(of[0], of[1]), pack<Element>(of[2], of[3]), pack<Element>(of[4], of[5]),
                    pack<Element>(of[6], of[7])});
    }
  }

  // From the left tile to the neighbour, each warp its rows.
  __device__ void give_away(const uint8_t* tile, int outputs) {
    if (outputs > 0) wait_for_cluster(shared.sum_empty, parity(outputs, 1) ^ 1);
    const Lane at;
    const uint32_t there = address_there(shared_address(shared.sum)),
                   barrier = address_there(shared_address(&shared.given)), from = shared_address(tile);
    __syncwarp();
#pragma unroll
    for (int x = 0; x < kColumns / 16; ++x) {
      const int offset = (at.thread / 32 * 16 + x % 4 * 4) * kPanelRow + x / 4 * kPanelBytes + at.lane * 16;
      give(there + offset, load_piece(from + offset), barrier);
    }
  }

  // What the neighbour gave is added, and the sum put in its place.
  __device__ void add_up(const float (&o)[kColumns / 2], int outputs) {
    const Lane at;
    if (at.thread == 0) shared.given.arrive_expecting(V::kSumBytes);
    wait_for_cluster(shared.given, parity(outputs, 1));
    const uint32_t base = shared_address(shared.sum);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      const float* of = &o[n * 8];
      const uint32_t address = base + n / 4 * kPanelBytes + at.block(n % 4);
      uint32_t x[4];
      load_blocks<false>(x, address);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Element>(x[i]);
        x[i] = pack<Element>(pair.x + of[i * 2], pair.y + of[i * 2 + 1]);
      }
      store_blocks(address, x);
    }
    arrive_as_warp(shared.summed);
  }

  // To global memory, of a chunk that ends with its sequence amid others: the copy engine would go on.
  __device__ void store_rows(const Chunk& chunk, const uint8_t* tile) {
    const Lane at;
    const int first = chunk.e_tile * V::kE, width = second ? p.d : p.e;
    Element* out = static_cast<Element*>(second ? p.out_of_k : p.out) +
                   ((int64_t(chunk.batch) * p.heads + chunk.head) * p.tokens + chunk.token) * width + first;
    sync_threads(2 + group, kWarpgroup);
#pragma unroll 1
    for (int x = at.thread; x < chunk.n * (kColumns / 8); x += kWarpgroup) {
      const int i = x / (kColumns / 8), piece = x % (kColumns / 8);
      if (first + piece * 8 < width)
        *reinterpret_cast<uint4*>(out + int64_t(i) * width + piece * 8) =
            load_piece(shared_address(tile) + piece / 8 * kPanelBytes + piece_offset(i, piece % 8));
    }
  }

  __device__ void make(const Chunk& chunk, int stage, int step, int outputs) {
    const Stage<V> tile(shared, stage);
    const Operands<V> of(tile, second);
    Notes<V>& notes = shared.notes[stage];
    const int buffer = outputs % V::kStates;
    float scores[32], o[kColumns / 2];
    uint32_t masked[4][4];
    bool nonfinite = false;
    if constexpr (V::kMeasures) measure_columns(tile, notes, stage, step);
    if (V::kEarly && (V::kRowLengths || chunk.cut_off(p))) shared.ready[stage].wait(parity(step, V::kStages));
    start_product<V::kQPanels>(scores, of.left, of.right);
    shared.state_full[buffer].wait(parity(outputs, V::kStates));
    if constexpr (!V::kStateFences) fence_for_async();
    if (second)
      start_reading<1>(o, of.left, shared.states[buffer]);
    else
      start_reading<0>(o, of.left, shared.states[buffer]);
    if constexpr (V::kEarly) shared.ready[stage].wait(parity(step, V::kStages));
    wgmma_wait<1>();
    wgmma_hold(scores);
    if constexpr (V::kBoth || V::kLate) arrive_as_warp(shared.scored[stage]);
    mask(masked, scores, notes);
    wgmma_wait<0>();
    wgmma_hold(o);
    arrive_as_warp(shared.state_empty[buffer]);
    if constexpr (V::kLate) call_for_vectors(chunk, tile, stage, step);
    scale_rows(o, notes);
    if constexpr (V::kLooksAtA) shared.looked[stage].wait(phase_of(stage));
    for (const int found : notes.nonfinite[second]) nonfinite |= found != 0;
    if (nonfinite) take_out(of.values, notes, stage, step);
    wgmma_hold(o);
    wgmma_hold(masked);
    start_values(o, masked, of);
    wgmma_wait<0>();
    wgmma_hold(o);
    wgmma_hold(masked);
    if (nonfinite) spoil(o, notes);
    if constexpr (V::kLate) {
      shared.through[stage].wait(phase_of(stage));
      shared.measured[stage].wait(parity(step, V::kStages));
    }
    if (V::kThrough && (!V::kBoth || second)) through_unit_length(o, of.through, notes);
    if constexpr (V::kBoth && V::kThrough) {  // one reads the tile that the other puts its output down in
      if (second)
        arrive_as_warp(shared.through[stage]);
      else
        shared.through[stage].wait(phase_of(stage));
    }
    if (!keeps()) {
      put_down(o, of.left);
      if (chunk.cut_off(p)) store_rows(chunk, of.left);
      if constexpr (V::kSums) give_away(of.left, outputs);
    } else if constexpr (V::kThrough) {
      fence_for_async();  // vectors are read before others take their place
    }
    arrive_as_warp(shared.put_down[stage]);
    arrive_as_warp(shared.empty[stage]);
    if constexpr (V::kSums) {
      if (keeps()) add_up(o, outputs);
    }
  }
};

// Of `group` 0 or 1: with kBoth one makes the gradients of v and the other those of k, else they take turns.
template <class V>
__device__ void make_outputs(const PassParams& p, SharedStorage<V>& shared, int group) {
  OutputMaker<V> me(p, shared, group);
  int outputs = 0;
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    (V::kEarly ? shared.full : shared.ready)[stage].wait(parity(step, V::kStages));
    const Chunk& chunk = shared.chunks[stage];
    if (chunk.kind == Kind::kEnd) return;
    const bool output = chunk.kind == Kind::kOutput;
    if (output && (V::kBoth || outputs % 2 == group)) {
      me.make(chunk, stage, step, outputs);
    } else {
      if (V::kMeasures && !output && step % 2 == group)
        me.measure_columns(Stage<V>(shared, stage), shared.notes[stage], stage, step);
      arrive_as_warp(shared.empty[stage]);
    }
    outputs += output;
    me.phases ^= output << stage;
  }
}
