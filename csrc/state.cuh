// The state, in registers, and its way from segment to segment.
#pragma once

#include <math_constants.h>

#include "decay.cuh"
#include "variant.cuh"
#include "wgmma.cuh"

// Loads and stores past the first cache, in the order in which they are written: the compiler would start all loads at
// once, and has no registers for them.
__device__ inline float4 load_four(const float4* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ inline float load_one(const float* from) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}

// What the state warpgroup does: Sᵀ ← λ^n Sᵀ + (scaled a)ᵀ b, of kE × kD values, as accumulators of its products.
template <class V>
struct StateKeeper {
  using Element = typename V::Element;
  static constexpr int kRows = V::kE / 64;                              // blocks of 64 rows
  static constexpr int kN = V::kD < 128 ? V::kD : 128;                  // columns of a product
  static constexpr int kQuads = V::kD / 8;                              // of values, of a thread, in one of them
  static constexpr int kAtOnce = 8, kParts = kRows * kQuads / kAtOnce;  // quads that are loaded together
  static constexpr int kWarps = 4, kRing = kChainRing;
  static_assert(kParts < kChainCounts);
  static constexpr int kPanelOfState = V::kE * kPanelRow;
  const PassParams& p;
  SharedStorage<V>& shared;
  const int thread, warp, lane;
  float s[kRows][V::kD / 2];

  __device__ StateKeeper(const PassParams& p, SharedStorage<V>& shared, int thread)
      : p(p), shared(shared), thread(thread), warp(thread / 32), lane(thread % 32) {}

  template <class Visit>
  __device__ void visit(const Chunk& chunk, Visit visit) {
    const int d = chunk.d_tile * V::kD + 2 * (lane % 4), e = chunk.e_tile * V::kE + warp * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int i = 0; i < V::kD / 2; ++i) {
        const int at_d = d + i / 4 * 8 + i % 2, at_e = e + m * 64 + i / 2 % 2 * 8;
        if (at_d < p.d && at_e < p.e) visit(s[m][i], at_d, at_e);
      }
    }
  }
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
  __device__ void store_final(const Chunk& chunk) {
    if (p.final == nullptr) return;
    const StateStrides& at = p.final_strides;
    float* to = p.final + chunk.sequence * at.sequence + chunk.head * at.head;
    scale(power(chunk.log2_lambda, 0));  // NaN for a bad decay, however short the sequence
    visit(chunk, [&](float& x, int i, int j) { to[i * at.d + j * at.e] = x; });
  }

  // Values that a warp hands on to the same warp of the block that has the next segment, in parts, so that several
  // blocks hand on at a time. They lie in one of kRing buffers, each of which must have been left by its reader before.
  __device__ float4* carry(const Chunk& chunk, int position) {
    const int64_t buffer = int64_t(chunk.lane) * kRing + position % kRing;
    return reinterpret_cast<float4*>(p.chain) + buffer * (V::kD * V::kE / 4) + thread;
  }
  // For each buffer: the segment whose reader left it last, and for each part the one that it was written for.
  __device__ int* counts(const Chunk& chunk, int position) {
    return p.counts + ((chunk.lane * kWarps + warp) * kRing + position % kRing) * kChainCounts;
  }
  __device__ static void wait_for(const int* count, int least) {
    int seen;
    do {
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
    } while (seen < least);
    __syncwarp();
  }
  __device__ void announce(int* count, int value) {
    __threadfence();
    __syncwarp();
    if (lane == 0) asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(count), "r"(value) : "memory");
  }

  // s becomes the state before the segment, and the state after it goes on to the next block: equation (9).
  __device__ void begin_output(const Chunk& chunk) {
    const int position = chunk.position;
    const float carried = power(chunk.log2_lambda, chunk.length);
    float4* to = carry(chunk, position + 1);
    const float4* from = carry(chunk, position);
    const auto before = [&](int quad) {
      return chunk.starts ? initial(chunk, quad) : load_four(from + quad * kWarpgroup);
    };
    if (!chunk.ends) wait_for(counts(chunk, position + 1), position + 2 - kRing);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (!chunk.starts) wait_for(counts(chunk, position) + 1 + part, position);
      if (chunk.ends) continue;
      float4 b[kAtOnce];
#pragma unroll
      for (int x = 0; x < kAtOnce; ++x) b[x] = before(part * kAtOnce + x);
#pragma unroll
      for (int x = 0; x < kAtOnce; ++x) {
        const int quad = part * kAtOnce + x;
        const float* own = &s[quad / kQuads][quad % kQuads * 4];
        __stcg(to + quad * kWarpgroup, make_float4(fmaf(carried, b[x].x, own[0]), fmaf(carried, b[x].y, own[1]),
                                                   fmaf(carried, b[x].z, own[2]), fmaf(carried, b[x].w, own[3])));
      }
      announce(counts(chunk, position + 1) + 1 + part, position + 1);
    }
    // Read once more: the products want the new values in the registers of the old ones.
#pragma unroll
    for (int quad = 0; quad < kRows * kQuads; ++quad) {
      const float4 b = before(quad);
      float* own = &s[quad / kQuads][quad % kQuads * 4];
      own[0] = b.x, own[1] = b.y, own[2] = b.z, own[3] = b.w;
    }
    if (p.counts == nullptr) return;
    wait_for(counts(chunk, position), position + 1 - kRing);
    announce(counts(chunk, position), position + 1);
  }

  // Four values of the initial state.
  __device__ float4 initial(const Chunk& chunk, int quad) {
    if (p.initial == nullptr) return make_float4(0.f, 0.f, 0.f, 0.f);
    const StateStrides& at = p.initial_strides;
    const int d = chunk.d_tile * V::kD + 2 * (lane % 4) + quad % kQuads * 8;
    const int e = chunk.e_tile * V::kE + warp * 16 + lane / 4 + quad / kQuads * 64;
    const float* from = p.initial + chunk.sequence * at.sequence + chunk.head * at.head + d * at.d + e * at.e;
    const auto load = [&](int i, int j) {
      return d + i < p.d && e + j < p.e ? load_one(from + i * at.d + j * at.e) : 0.f;
    };
    return make_float4(load(0, 0), load(1, 0), load(0, 8), load(1, 8));
  }

  // A copy in the inputs' type, for the outputs of this chunk.
  __device__ void show(int buffer) {
    const uint32_t base = shared_address(shared.states[buffer]);
    const int row = warp * 16 + lane % 16;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int x = 0; x < V::kD / 16; ++x) {
        const float* of = &s[m][x * 8];
        store_blocks(base + x / 4 * kPanelOfState + piece_offset(m * 64 + row, x % 4 * 2 + lane / 16),
                     {pack<Element>(of[0], of[1]), pack<Element>(of[2], of[3]), pack<Element>(of[4], of[5]),
                      pack<Element>(of[6], of[7])});
      }
    }
  }

  // aᵀ, each token times what it weighs in the state.
  __device__ void load_left(uint32_t (&left)[4][4], const uint8_t* a, const float (&writing)[kChunk]) {
    const uint32_t base = shared_address(a);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      load_blocks<true>(left[x], base + piece_offset(x * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 weights = *reinterpret_cast<const float2*>(&writing[x * 16 + i / 2 * 8 + lane % 4 * 2]);
        const float2 pair = unpack<Element>(left[x][i]);
        left[x][i] = pack<Element>(pair.x * weights.x, pair.y * weights.y);
      }
    }
  }

  __device__ void advance(const Chunk& chunk, const Stage<V>& tile, const Notes<V>& notes) {
    uint32_t left[kRows][4][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) load_left(left[m], tile.a() + m * kPanelBytes, notes.writing);
    scale(power(chunk.log2_lambda, chunk.n));
#pragma unroll
    for (int m = 0; m < kRows; ++m) wgmma_hold(s[m]), wgmma_hold(left[m]);
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int part = 0; part < V::kD / kN; ++part)
          wgmma<Element, kN, 1>(
              *reinterpret_cast<float (*)[kN / 2]>(&s[m][part * kN / 2]), left[m][x],
              descriptor(shared_address(tile.b()) + part * kN / kPanel * kPanelBytes + x * 16 * kPanelRow, kPanelBytes),
              1);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < kRows; ++m) wgmma_hold(s[m]), wgmma_hold(left[m]);
    if (notes.any_bad) spoil(chunk, notes);
  }

  // NaN for what was taken out of the tiles.
  __device__ void spoil(const Chunk& chunk, const Notes<V>& notes) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int i = 0; i < V::kD / 2; ++i) {
        bool bad = notes.bad_v[m * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8] != 0;
        if constexpr (V::kBoth) bad |= notes.bad_q[lane % 4 * 2 + i / 4 * 8 + i % 2] != 0;
        if (bad) s[m][i] = CUDART_NAN_F;
      }
    }
  }
};

template <class V>
__device__ void keep_state(const PassParams& p, SharedStorage<V>& shared, int thread) {
  StateKeeper<V> me(p, shared, thread);
  int outputs = 0;
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    shared.ready[stage].wait(parity(step, V::kStages));
    const Chunk& chunk = shared.chunks[stage];
    if (chunk.kind == Kind::kEnd) return;
    if (chunk.kind == Kind::kOutput) {
      if (chunk.first) me.begin_output(chunk);
      const int buffer = outputs % V::kStates;
      if (outputs >= V::kStates) shared.state_empty[buffer].wait(parity(outputs, V::kStates) ^ 1);
      me.show(buffer);
      fence_for_async();
      shared.state_full[buffer].arrive();
      ++outputs;
    } else if (chunk.first) {
      me.zero();
    }
    me.advance(chunk, Stage<V>(shared, stage), shared.notes[stage]);
    if (chunk.kind == Kind::kOutput && chunk.last && chunk.ends) me.store_final(chunk);
    arrive_as_warp(shared.empty[stage]);
  }
}
