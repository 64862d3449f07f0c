// The state, in registers, and the outputs that are read from it.
#pragma once

#include <math_constants.h>

#include "variant.cuh"
#include "wgmma.cuh"

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
    const uint32_t from = shared_address(gradients), x = shared_address(vectors);
    auto& along = shared.along[buffer];
#pragma unroll 1
    for (int i = thread / 8; i < kChunk; i += kWarpgroup / 8) {
      const uint4 du_piece = load_piece(from + piece_offset(i, thread % 8)),
                  x_piece = load_piece(x + piece_offset(i, thread % 8));
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

  // oᵀ (64 × tokens) of this warpgroup to o (tokens × 64) in global memory, by way of its own panel of v, which is used
  // up.
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
__device__ void attend(const PassParams& p, SharedStorage<V>& shared, const Work& work, int head, int d_tile,
                       int e_tile) {
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
      const uint32_t values = shared_address(tile.v) + me.group * kPanelBytes,
                     scores = shared_address(shared.scores[buffer]);
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
      me.store_output(o, work, head, work.start + walk.start(step), n, d_tile, e, tile.v + me.group * kPanelBytes,
                      tile.x, buffer);
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
      for (int x = 0; x < V::kD / 2; ++x)
        state.s[x] *= shared.powers[0];  // NaN for a bad decay, however short the sequence
      state.store(p, p.final, p.final_strides, work.sequence, head);
    }
  } else {
    state.store(p, p.carry, p.carry_strides, work.carry, head);
  }
}
