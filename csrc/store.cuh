// Copies outputs from shared to global memory, and so gives their stages back.
#pragma once

#include "neighbour.cuh"

template <int kPanels>
__device__ inline void copy_out(const TiledTensor& to, const uint8_t* tile, const Chunk& chunk, int first_panel) {
  const Keep hint = chunk.in_turn ? Keep::kShort : Keep::kNormal;
  const int batch = chunk.batch * to.batch;
  if (kPanels == 1 || to.at_once) {
    store_box(to.map, tile, hint, to.corner(first_panel, chunk.token, chunk.head, batch));
  } else {
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i)
      store_box(to.map, tile + i * kPanelBytes, hint, to.corner(first_panel + i, chunk.token, chunk.head, batch));
  }
}

// Lengths of a chunk's queries, and of its keys by the first of the heads that share them.
__device__ inline void copy_lengths_out(const PassParams& p, const Lengths (&lengths)[2], const Chunk& chunk) {
  const int head = chunk.head / p.kept_group;
  const bool of_keys = head * p.kept_group == chunk.head;
  if (!chunk.cut_off(p) && chunk.token % 4 == 0) {
    store_box(p.row_lengths, lengths[0].values, Keep::kNormal, {chunk.token, 0, 0, chunk.head, chunk.batch});
    if (of_keys) store_box(p.column_lengths, lengths[1].values, Keep::kNormal, {chunk.token, 0, 0, head, chunk.batch});
  } else {  // amid other sequences
    const int heads = p.heads / p.kept_group;
    float* rows = p.kept_rows + (int64_t(chunk.batch) * p.heads + chunk.head) * p.kept_stride + chunk.token;
    float* columns = p.kept_columns + (int64_t(chunk.batch) * heads + head) * p.kept_stride + chunk.token;
    for (int i = 0; i < chunk.n; ++i) {
      rows[i] = lengths[0].values[i];
      if (of_keys) columns[i] = lengths[1].values[i];
    }
  }
}

// The sum of this block's output and its neighbour's, which needs the stage no longer.
template <class V>
__device__ void store_sum(const PassParams& p, SharedStorage<V>& shared, const Chunk& chunk, int stage, int outputs) {
  Chunk of_both = chunk;
  of_both.head /= 2;
  shared.empty[stage].arrive();
  shared.summed.wait(parity(outputs, 1));
  fence_for_async();
  copy_out<V::kVPanels>(keeps_second() ? p.out_of_k_tiles : p.out_tiles, shared.sum, of_both, 0);
  commit_stores();
  wait_for_stores();
  arrive_in(shared.sum_empty, rank_in_cluster() ^ 1);
}

// One thread's work.
template <class V>
__device__ void store_outputs(const PassParams& p, SharedStorage<V>& shared) {
  int phases = 0, outputs = 0;  // phases as in `output.cuh`
  for (int step = 0;; ++step) {
    const int stage = step % V::kStages;
    shared.full[stage].wait(parity(step, V::kStages));
    const Chunk& chunk = shared.chunks[stage];
    if (chunk.kind == Kind::kEnd) return;
    shared.advanced[stage].wait(parity(step, V::kStages));
    if (chunk.kind != Kind::kOutput) {
      shared.empty[stage].arrive();
      continue;
    }
    const Stage<V> tile(shared, stage);
    const int phase = phases >> stage & 1;
    if constexpr (V::kBoth) shared.scored[stage].wait(phase);  // passed, but `synccheck` wants each phase waited for
    shared.put_down[stage].wait(phase);
    fence_for_async();  // after all that was written to the tiles: for the copies from here, and those to come
    if constexpr (V::kSums) {
      store_sum(p, shared, chunk, stage, outputs);
    } else {
      if (V::kMeasures && p.keeps && chunk.e_tile == 0) copy_lengths_out(p, shared.lengths[stage], chunk);
      if (!chunk.cut_off(p)) {  // else the warpgroup that makes outputs stores them
        if constexpr (V::kBoth) {
          copy_out<V::kVPanels>(p.out_tiles, tile.k, chunk, 0);
          copy_out<V::kQPanels>(p.out_of_k_tiles, tile.v, chunk, 0);
        } else {
          copy_out<V::kVPanels>(p.out_tiles, tile.q, chunk, chunk.e_tile * V::kVPanels);
        }
      }
      commit_stores();
      wait_for_stores();
      shared.empty[stage].arrive();
    }
    phases ^= 1 << stage;
    ++outputs;
  }
}
