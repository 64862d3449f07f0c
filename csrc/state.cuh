// The state, in registers, and its way from segment to segment.
#pragma once

#include <math_constants.h>

#include "decay.cuh"
#include "variant.cuh"
#include "wgmma.cuh"

// 16 bytes from global to shared memory, behind this thread's back until it waits for all of them.
__device__ inline void copy_four(float4* to, const float4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four values, or zeros. Written out, since of two ways to set the state's registers the compiler makes two states.
__device__ inline float4 load_four(const float4* from, bool zero) {
  float4 x;
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@p ld.shared.v4.f32 {%0, %1, %2, %3}, [%4]; }"
      : "=&f"(x.x), "=&f"(x.y), "=&f"(x.z), "=&f"(x.w)
      : "r"(shared_address(from)), "r"(int(zero))
      : "memory");
  return x;
}

// What the state warpgroup does: Sᵀ ← λ^n Sᵀ + (scaled a)ᵀ b, of kE × kD values, as accumulators of its products.
template <class V>
struct StateKeeper {
  using Element = typename V::Element;
  static constexpr int kRows = V::kE / 64;                // blocks of 64 rows
  static constexpr int kN = V::kD % 128 == 0 ? 128 : 64;  // columns of a product
  static constexpr int kQuads = V::kD / 8;                // of values, of a thread, in one of them
  static constexpr int kPanelOfState = V::kE * kPanelRow;
  const PassParams& p;
  SharedStorage<V>& shared;
  float s[kRows][V::kD / 2];

  __device__ StateKeeper(const PassParams& p, SharedStorage<V>& shared) : p(p), shared(shared) {}

  // The warpgroup is the block's first. Asked for where it is used: there are no registers to keep it.
  __device__ static int thread() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
  }
  __device__ static int warp() { return thread() / 32; }
  __device__ static int lane() { return thread() % 32; }

  __device__ void zero() {
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int i = 0; i < V::kD / 2; ++i) s[m][i] = 0.f;
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int i = 0; i < V::kD / 2; ++i) s[m][i] *= factor;
  }
  // Where a thread's first value lies in a state of these strides. Widths are multiples of 8, so that of the blocks of
  // 8 × 8 that follow all lies within the state, or nothing.
  __device__ int64_t offset(const Chunk& chunk, const StateStrides& at) {
    return chunk.sequence * at.sequence + chunk.head * at.head + 2 * (lane() % 4) * at.d +
           (first_row(chunk) + lane() / 4) * at.e;
  }
  __device__ int first_row(const Chunk& chunk) const { return chunk.e_tile * V::kE + warp() * 16; }

  __device__ void store_final(const Chunk& chunk) {
    if (p.final == nullptr) return;
    const StateStrides at = p.final_strides;
    float* to = p.final + offset(chunk, at);
    scale(isnan(chunk.log_lambda) ? CUDART_NAN_F : 1.f);  // however short the sequence
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        const float* x = &s[m][n * 4];
        float* here = to + n * 8 * at.d + m * 64 * at.e;
        const int d = n * 8, e = first_row(chunk) + m * 64;
        if (d < p.d && e < p.e) here[0] = x[0], here[at.d] = x[1];
        if (d < p.d && e + 8 < p.e) here[8 * at.e] = x[2], here[8 * at.e + at.d] = x[3];
      }
    }
  }

  // Values that a warp hands on to the same warp of the block that has the next segment. Two buffers are enough: who
  // writes one has waited for the last reader of it.
  __device__ float4* carry(const Chunk& chunk, int position) {
    const int64_t buffer = int64_t(chunk.chain) * 2 + position % 2;
    return reinterpret_cast<float4*>(p.chain) + buffer * (V::kD * V::kE / 4) + thread();
  }
  // Segments that this warp's like has done with, of all sequences in the order of the pass.
  __device__ int* announced(const Chunk& chunk) { return p.counts + chunk.chain * 4 + warp(); }
  __device__ void wait_for_turn(const Chunk& chunk) {
    int seen;
    do {
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(announced(chunk)) : "memory");
    } while (seen < chunk.position);
    __syncwarp();
  }
  __device__ void announce(const Chunk& chunk) {
    __threadfence();
    __syncwarp();
    if (lane() == 0)
      asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(announced(chunk)), "r"(chunk.position + 1) : "memory");
  }

  // s becomes the state before the segment, and the state after it goes on to the next block: equation (9). The state
  // passes through the room of the copies that outputs are read from, of which none is in use.
  __device__ void begin_output(const Chunk& chunk) {
    const bool zeros = chunk.starts && chunk.ends && p.initial == nullptr;
    float4* room = reinterpret_cast<float4*>(shared.states) + thread();
    if (chunk.in_turn) wait_for_turn(chunk);
    if (!zeros) {
      const float4* from = carry(chunk, chunk.position);
#pragma unroll 4
      for (int quad = 0; quad < kRows * kQuads; ++quad) {
        if (chunk.starts)
          room[quad * kWarpgroup] = initial(chunk, quad);
        else
          copy_four(room + quad * kWarpgroup, from + quad * kWarpgroup);
      }
      wait_for_copies();
    }
    if (!chunk.ends) {
      const float carried = power(chunk.log_lambda, chunk.length);
      float4* to = carry(chunk, chunk.position + 1);
#pragma unroll
      for (int quad = 0; quad < kRows * kQuads; ++quad) {
        const float4 b = room[quad * kWarpgroup];
        const float* own = &s[quad / kQuads][quad % kQuads * 4];
        __stcg(to + quad * kWarpgroup, make_float4(fmaf(carried, b.x, own[0]), fmaf(carried, b.y, own[1]),
                                                   fmaf(carried, b.z, own[2]), fmaf(carried, b.w, own[3])));
      }
    }
    if (chunk.in_turn) announce(chunk);
#pragma unroll
    for (int quad = 0; quad < kRows * kQuads; ++quad) {
      const float4 b = load_four(room + quad * kWarpgroup, zeros);
      float* own = &s[quad / kQuads][quad % kQuads * 4];
      own[0] = b.x, own[1] = b.y, own[2] = b.z, own[3] = b.w;
    }
    sync_threads(4, kWarpgroup);  // before the room is used otherwise
  }

  // Four values of the initial state.
  __device__ float4 initial(const Chunk& chunk, int quad) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (p.initial == nullptr) return x;
    const StateStrides& at = p.initial_strides;
    const int n = quad % kQuads, m = quad / kQuads;
    const float* from = p.initial + offset(chunk, at) + n * 8 * at.d + m * 64 * at.e;
    const int d = n * 8, e = first_row(chunk) + m * 64;
    if (d < p.d && e < p.e) x.x = from[0], x.y = from[at.d];
    if (d < p.d && e + 8 < p.e) x.z = from[8 * at.e], x.w = from[8 * at.e + at.d];
    return x;
  }

  // A copy in the inputs' type, for the outputs of this chunk.
  __device__ void show(int buffer) {
    const uint32_t base = address_now(shared.states[buffer]);
    const int row = warp() * 16 + lane() % 16;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int x = 0; x < V::kD / 16; ++x) {
        const float* of = &s[m][x * 8];
        store_blocks(base + x / 4 * kPanelOfState + piece_offset(m * 64 + row, x % 4 * 2 + lane() / 16),
                     {pack<Element>(of[0], of[1]), pack<Element>(of[2], of[3]), pack<Element>(of[4], of[5]),
                      pack<Element>(of[6], of[7])});
      }
    }
  }

  // Left operand of 64 rows: aᵀ, each token times what it weighs in the state.
  using Left = uint32_t[4][4];

  __device__ void load_left(Left& left, const uint8_t* a, const Notes<V>& notes, NonfiniteSearch<Element>& search) {
    const uint32_t base = address_now(a) + piece_offset(lane() / 16 * 8 + lane() % 8, warp() * 2 + lane() / 8 % 2);
    const uint32_t weights = address_now(V::kLengths ? notes.scaled : notes.writing) + lane() % 4 * 8;
#pragma unroll
    for (int x = 0; x < 4; ++x) load_blocks<true>(left[x], base + x * 16 * kPanelRow);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 of = load_pair(weights + x * 64 + i * 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (V::kLooksAtA) search.add(left[x][i + half]);
          const float2 pair = unpack<Element>(left[x][i + half]);
          left[x][i + half] = pack<Element>(pair.x * of.x, pair.y * of.y);
        }
      }
    }
  }

  // Says whether a was found finite.
  __device__ void tell(const NonfiniteSearch<Element>& search, int stage) {
    if constexpr (V::kLooksAtA) {
      const bool found = __any_sync(~0u, search.found());
      if (shared.chunks[stage].kind != Kind::kOutput) return;
      if (lane() == 0) shared.notes[stage].nonfinite[0][warp()] = found;
      arrive_as_warp(shared.looked[stage]);
    }
  }

  __device__ void start_advance(int m, const Left& left, const Stage<V>& tile, float carried) {
#pragma unroll
    for (int i = 0; i < V::kD / 2; ++i) s[m][i] *= carried;
    wgmma_hold(s[m]);
    const uint32_t right = address_now(tile.b());
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int part = 0; part < V::kD / kN; ++part)
        wgmma<Element, kN, 1>(*reinterpret_cast<float (*)[kN / 2]>(&s[m][part * kN / 2]), left[x],
                              descriptor(right + part * kN / kPanel * kPanelBytes + x * 16 * kPanelRow, kPanelBytes),
                              1);
    wgmma_commit();
  }
};

template <class V>
__device__ void keep_state(const PassParams& p, SharedStorage<V>& shared) {
  using Keeper = StateKeeper<V>;
  Keeper me(p, shared);
  typename Keeper::Left left[Keeper::kRows];
  int outputs = 0;
  const auto wait_for_copy = [&](int output) {  // the one that this output takes the place of
    if (output >= V::kStates) shared.state_empty[output % V::kStates].wait(parity(output, V::kStates) ^ 1);
  };
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    (V::kEarly ? shared.full : shared.ready)[stage].wait(parity(step, V::kStages));
    const Chunk& chunk = shared.chunks[stage];
    if (chunk.kind == Kind::kEnd) return;
    if (chunk.kind == Kind::kOutput) {
      const int buffer = outputs % V::kStates;
      wait_for_copy(outputs);
      if (chunk.first) {
        wait_for_copy(outputs + 1);
        me.begin_output(chunk);
      }
      me.show(buffer);
      if constexpr (V::kStateFences) fence_for_async();
      arrive_as_warp(shared.state_full[buffer]);
      ++outputs;
    } else if (chunk.first) {
      me.zero();
    }
    const Stage<V> tile(shared, stage);
    const Notes<V>& notes = shared.notes[stage];
    if constexpr (V::kEarly) shared.ready[stage].wait(parity(step, V::kStages));
    if constexpr (V::kMeasures) shared.measured[stage].wait(parity(step, V::kStages));
    NonfiniteSearch<typename V::Element> search;
#pragma unroll
    for (int m = 0; m < Keeper::kRows; ++m) {  // the second half is loaded while the first is multiplied
      me.load_left(left[m], tile.a() + m * kPanelBytes, notes, search);
      me.start_advance(m, left[m], tile, notes.carried);
    }
    me.tell(search, stage);
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Keeper::kRows; ++m) wgmma_hold(me.s[m]), wgmma_hold(left[m]);
    if (chunk.kind == Kind::kOutput && chunk.last && chunk.ends) me.store_final(chunk);
    arrive_as_warp(shared.advanced[stage]);
  }
}
