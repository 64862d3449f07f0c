// Copies tiles to shared memory, chunk after chunk of one piece of work after another.
#pragma once

#include "decay.cuh"
#include "variant.cuh"

// The next piece of work of this block: taken in order where pieces wait for earlier ones, so that those are running.
__device__ inline int next_piece(const PassParams& p, int before) {
  if (p.ticket != nullptr) return atomicAdd(p.ticket, 1);
  return before < 0 ? blockIdx.x : before + gridDim.x;
}

// One thread's work, which every chunk waits for: what holds for all chunks of a segment is made once.
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
  __device__ Keep keep(Kind kind) const {
    if (!shared.next.in_turn || p.e_tiles > 1) return Keep::kNormal;
    return kind == Kind::kAdvance ? Keep::kLong : Keep::kShort;
  }

  // Head and row of the batch that a segment reads of a tensor.
  struct Source {
    int head, batch;
    __device__ Source(const TiledTensor& from, const Stretch& of)
        : head(of.head / from.group), batch(of.batch * from.batch) {}
  };

  template <int kPanels>
  __device__ static void copy(uint8_t* to, const TiledTensor& from, const Source& source, Barrier& barrier, Keep keep,
                              int token, int tile) {
    copy_in<kPanels>(to, from, barrier, keep, tile * kPanels, token, source.head, source.batch);
  }

  __device__ static void copy_lengths(Lengths& to, const CUtensorMap& from, const Source& source, Barrier& barrier,
                                      Keep keep, int token) {
    copy_box(to.values, from, barrier, keep, {token / 4 * 4, 0, 0, source.head, source.batch});
  }

  // All chunks of the next segment, once to find its state where later segments need it, and once for the outputs.
  __device__ void segment(int first_token) {
    const Source q_source(p.q, shared.next), k_source(p.k, shared.next), v_source(p.v, shared.next),
        x_source(V::kBoth || V::kLate ? p.x : p.v, shared.next);
    const Source& rows = V::kBoth ? k_source : V::kLate ? x_source : q_source;  // of lengths
    const Source& columns = V::kBoth ? q_source : V::kRowLengths ? k_source : v_source;
    const int e = shared.next.e_tile, length = shared.next.length;
    const int chunks = max(1, (length + kChunk - 1) / kChunk);
    for (int round = shared.next.ends ? 1 : 0; round < 2; ++round) {
      const bool all = round == 1, x = V::kBoth;
      const bool v = all || !V::kBoth, q = all || V::kBoth, k = all || !V::kBoth;
      const int bytes = ((q + k) * V::kQPanels + (v + x) * V::kVPanels) * kPanelBytes +
                        (V::kReadsRows + V::kReadsLengths) * int(sizeof(Lengths::values));
      const Kind kind = all ? Kind::kOutput : Kind::kAdvance;
      const Keep hint = keep(kind);
      for (int i = 0; i < chunks; ++i) {
        const int start = (p.reverse ? chunks - 1 - i : i) * kChunk, token = first_token + start;
        const int stage = claim();
        Chunk& chunk = shared.chunks[stage];
        for (int at = 0; at < int(sizeof(Stretch)); at += 16)
          store_piece(address_now(&chunk) + at, load_piece(address_now(&shared.next) + at));
        chunk.kind = kind;
        chunk.token = token;
        chunk.n = min(kChunk, length - start);
        chunk.first = i == 0;
        chunk.last = i == chunks - 1;
        Barrier& full = shared.full[stage];
        const Stage<V> tile(shared, stage);
        full.arrive_expecting(bytes);
        if (k) copy<V::kQPanels>(tile.k, p.k, k_source, full, hint, token, 0);
        if (q) copy<V::kQPanels>(tile.q, p.q, q_source, full, hint, token, 0);
        if (v) copy<V::kVPanels>(tile.v, p.v, v_source, full, hint, token, e);
        if (x) copy<V::kVPanels>(tile.x, p.x, x_source, full, hint, token, e);
        if constexpr (V::kReadsRows) copy_lengths(shared.lengths[stage][0], p.row_lengths, rows, full, hint, token);
        if constexpr (V::kReadsLengths)
          copy_lengths(shared.lengths[stage][1], p.column_lengths, columns, full, hint, token);
      }
    }
  }
};

// Says in `next` which segment of which head a piece of work is; returns its first token, or -1 behind the last piece.
__device__ inline int find_piece(const PassParams& p, Stretch& next, int piece) {
  const int tiles = p.e_tiles, rows = p.table == nullptr ? p.batch : 1, chains = rows * p.heads * tiles;
  const int positions = p.table == nullptr ? p.positions : p.table[p.positions].sequence;
  if (piece >= positions * chains) return -1;
  const bool all_whole = p.table != nullptr && p.table[p.positions].start == 1;
  const int of = piece % chains, position = piece / chains, place = p.reverse ? positions - 1 - position : position;
  const int head = of / tiles % p.heads;
  next.chain = of, next.position = position, next.in_turn = p.counts != nullptr && !all_whole;
  next.head = head, next.e_tile = of % tiles;
  Work work;
  find_work(p, of / tiles / p.heads * positions + place, work);
  next.starts = work.first, next.ends = work.last, next.length = work.length;
  next.sequence = work.sequence, next.batch = work.batch;
  next.log_lambda = work.valid ? log_decay_of(p.log_decay, head) : CUDART_NAN_F;
  return work.start;
}

template <class V>
__device__ void fetch(const PassParams& p, SharedStorage<V>& shared) {
  Fetcher<V> fetcher{p, shared};
  shared.piece = next_piece(p, -1);
  for (int start; (start = find_piece(p, shared.next, shared.piece)) >= 0; shared.piece = next_piece(p, shared.piece))
    fetcher.segment(start);
  const int stage = fetcher.claim();
  shared.chunks[stage].kind = Kind::kEnd;
  shared.full[stage].arrive();
}
