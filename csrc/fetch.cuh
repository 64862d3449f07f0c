// Copies tiles to shared memory and measures their vectors.
#pragma once

#include "variant.cuh"

// Fetches the tiles of each chunk; with kNorm, the other warps measure their vectors.
template <class V>
__device__ void fetch(const PassParams& p, SharedStorage<V>& shared, const Work& work, int head, int d_tile,
                      int e_tile) {
  const Walk walk(work, p.reverse);
  for (int step = 0; step < walk.chunks; ++step) {
    const int stage = step % V::kStages, token = work.start + walk.start(step);
    if (step >= V::kStages) shared.empty[stage].wait(parity(step, V::kStages) ^ 1);
    shared.full[stage].arrive_expecting(p.through ? V::kStageBytes : V::kTileBytes);
    uint8_t* to = shared.stages[stage];
    for (int i = 0; i < V::kQPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.q, shared.full[stage], d_tile * V::kD + i * kPanel, token, head / p.q_group,
                work.batch * p.q_batch);
    for (int i = 0; i < V::kKPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.k, shared.full[stage], d_tile * V::kD + i * kPanel, token, head / p.k_group,
                work.batch * p.k_batch);
    for (int i = 0; i < V::kVPanels; ++i, to += kPanelBytes)
      copy_tile(to, p.v, shared.full[stage], e_tile * V::kE + i * kPanel, token, head / p.v_group,
                work.batch * p.v_batch);
    for (int i = 0; i < V::kVectorPanels && p.through; ++i, to += kPanelBytes)
      copy_tile(to, p.x, shared.full[stage], i * kPanel, token, head / p.x_group, work.batch * p.x_batch);
  }
}

// 1 / |x| of a row of a tile. A row whose square, or whose 1 / |x|, the types can't hold well is first multiplied by a
// power of two, in place, which changes no digit.
template <class Element, int kPanels>
__device__ float inverse_length(uint8_t* tile, int row) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  constexpr float kLeast = kHalf ? 0x1p-8f : 0x1p-80f, kMost = kHalf ? 0x1p12f : 0x1p80f;
  const uint32_t base = shared_address(tile);
  float parts[4] = {};  // four sums, so that none waits for the one before
#pragma unroll 2
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint4 x = load_piece(base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = unpack<Element>((&x.x)[w]);
      parts[w] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, parts[w]));
    }
  }
  float squares = (parts[0] + parts[1]) + (parts[2] + parts[3]), largest = 0.f;
  if (squares >= kLeast && squares <= kMost) return rsqrtf(squares);
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint4 x = load_piece(base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8));
    for (uint32_t word : {x.x, x.y, x.z, x.w}) {
      const float2 pair = unpack<Element>(word);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  if (largest == 0.f || !isfinite(largest) || isnan(squares)) return 1.f / fmaxf(sqrtf(squares), float(kMinLength));
  int exponent;
  frexpf(largest, &exponent);
  exponent = max(min(exponent, 126), -126);
  const float scale = ldexpf(1.f, -exponent);
  squares = 0.f;
  for (int piece = 0; piece < kPanels * 8; ++piece) {
    const uint32_t address = base + piece / 8 * kPanelBytes + piece_offset(row, piece % 8);
    uint4 x = load_piece(address);
    for (uint32_t* word : {&x.x, &x.y, &x.z, &x.w}) {
      const float2 pair = unpack<Element>(*word);
      *word = pack<Element>(pair.x * scale, pair.y * scale);
      squares += pair.x * scale * (pair.x * scale) + pair.y * scale * (pair.y * scale);
    }
    store_piece(address, x);
  }
  return 1.f / fmaxf(sqrtf(squares), float(kMinLength) * scale);
}

// Three warps: the scales of one chunk after another.
template <class V>
__device__ void measure(const PassParams& p, SharedStorage<V>& shared, const Work& work, int thread) {
  using Element = typename V::Element;
  const Walk walk(work, p.reverse);
  for (int step = 0; step < walk.chunks; ++step) {
    const int stage = step % V::kStages;
    shared.full[stage].wait(parity(step, V::kStages));
    const Stage<V> tile(shared, stage);
    const bool queries = V::kOutput && p.norm == Norm::kQueriesAndKeys;
    for (int x = thread; x < 2 * kChunk; x += kMeasuring) {
      const int row = x % kChunk;
      if (x < kChunk) {
        shared.column_scale[stage][row] = p.norm == Norm::kValues ? inverse_length<Element, V::kVPanels>(tile.v, row)
                                                                  : inverse_length<Element, V::kKPanels>(tile.k, row);
      } else if constexpr (V::kOutput) {
        shared.row_scale[stage][row] = queries ? inverse_length<Element, V::kQPanels>(tile.q, row) : 1.f;
      }
    }
    fence_for_async();
    shared.measured[stage].arrive();
  }
}
