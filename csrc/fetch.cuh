// Copies tiles to shared memory, chunk after chunk of one piece of work after another.
#pragma once

#include "decay.cuh"
#include "variant.cuh"

// The next piece of work of this block: taken in order where pieces wait for earlier ones, so that those are running.
__device__ inline int next_piece(const PassParams& p, int before) {
  if (p.ticket != nullptr) return atomicAdd(p.ticket, 1);
  return before < 0 ? blockIdx.x : before + gridDim.x;
}

template <class V>
struct Fetcher {
  const PassParams& p;
  SharedStorage<V>& shared;
  int step = 0;

  // Waits for the stage of the next chunk.
  __device__ int claim() {
    const int stage = step % V::kStages;
    if (step >= V::kStages) shared.empty[stage].wait(parity(step, V::kStages) ^ 1);
    ++step;
    return stage;
  }

  // What a cut sequence reads twice stays for the second time, in which all the rest passes through.
  __device__ Keep keep(const Chunk& chunk) const {
    if (!chunk.in_turn || p.d_tiles * p.e_tiles > 1) return Keep::kNormal;
    return chunk.kind == Kind::kAdvance ? Keep::kLong : Keep::kShort;
  }

  __device__ void copy(uint8_t* to, int panels, const CUtensorMap& map, Barrier& barrier, int column,
                       const Chunk& chunk, int head, int batch) {
    for (int i = 0; i < panels; ++i)
      copy_tile(to + i * kPanelBytes, map, barrier, keep(chunk), column + i * kPanel, chunk.token, head, batch);
  }

  __device__ void send(const Chunk& chunk) {
    const int stage = claim();
    Barrier& full = shared.full[stage];
    shared.chunks[stage] = chunk;
    const Stage<V> tile(shared, stage);
    const bool all = chunk.kind == Kind::kOutput, x = V::kBoth || (V::kThrough && all);
    const bool v = all || !V::kBoth, q = all || V::kBoth, k = all || !V::kBoth;
    full.arrive_expecting(((q + k) * V::kQPanels + (v + x) * V::kVPanels) * kPanelBytes);
    const int d = chunk.d_tile * V::kD, e = chunk.e_tile * V::kE;
    if (k) copy(tile.k, V::kQPanels, p.k, full, d, chunk, chunk.head / p.k_group, chunk.batch * p.k_batch);
    if (v) copy(tile.v, V::kVPanels, p.v, full, e, chunk, chunk.head / p.v_group, chunk.batch * p.v_batch);
    if (q) copy(tile.q, V::kQPanels, p.q, full, d, chunk, chunk.head / p.q_group, chunk.batch * p.q_batch);
    if (x) copy(tile.x, V::kVPanels, p.x, full, e, chunk, chunk.head / p.x_group, chunk.batch * p.x_batch);
  }

  // All chunks of a segment, once to find its state where later segments need it, and once for the outputs.
  __device__ void segment(const Work& work, Chunk chunk) {
    const int chunks = max(1, (work.length + kChunk - 1) / kChunk);
    for (int round = work.last ? 1 : 0; round < 2; ++round) {
      chunk.kind = round == 0 ? Kind::kAdvance : Kind::kOutput;
      for (int x = 0; x < chunks; ++x) {
        const int start = (p.reverse ? chunks - 1 - x : x) * kChunk;
        chunk.token = work.start + start;
        chunk.n = min(kChunk, work.length - start);
        chunk.first = x == 0;
        chunk.last = x == chunks - 1;
        send(chunk);
      }
    }
  }
};

template <class V>
__device__ void fetch(const PassParams& p, SharedStorage<V>& shared) {
  Fetcher<V> fetcher{p, shared};
  const int tiles = p.d_tiles * p.e_tiles, rows = p.table == nullptr ? p.batch : 1, chains = rows * p.heads * tiles;
  const int positions = p.table == nullptr ? p.positions : p.table[p.positions].sequence;
  const bool all_whole = p.table != nullptr && p.table[p.positions].start == 1;
  for (int piece = next_piece(p, -1); piece < positions * chains; piece = next_piece(p, piece)) {
    const int of = piece % chains, position = piece / chains, place = p.reverse ? positions - 1 - position : position;
    const int head = of / tiles % p.heads, tile = of % tiles;
    Work work;
    find_work(p, of / tiles / p.heads * positions + place, work);
    Chunk chunk{};
    chunk.starts = work.first, chunk.ends = work.last, chunk.length = work.length;
    chunk.sequence = work.sequence, chunk.batch = work.batch, chunk.head = head;
    chunk.d_tile = tile / p.e_tiles, chunk.e_tile = tile % p.e_tiles;
    chunk.chain = of, chunk.position = position, chunk.in_turn = p.counts != nullptr && !all_whole;
    chunk.log_lambda = work.valid ? log_decay_of(p.log_decay, head) : CUDART_NAN_F;
    fetcher.segment(work, chunk);
  }
  const int stage = fetcher.claim();
  shared.chunks[stage].kind = Kind::kEnd;
  shared.full[stage].arrive();
}
