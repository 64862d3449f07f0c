// Outputs of wide heads from what `wide_prepare.cuh` made: equations (1) and (3) of README.md as products of tiles
//
//     o = r (q S) + P v        P the masked scores of a chunk
//
// and their like for gradients, with the transpose of S or P.
#pragma once

#include <algorithm>

#include "wide.cuh"

// Which unit that is; false where there is nothing to do.
template <class T>
__device__ bool find_unit(const WideOutputParams& p, int index, OutputUnit& unit) {
  int per_head = 0;
  for (int i = 0; i < p.number; ++i) per_head += p.outputs[i].tiles;
  per_head *= p.row_tiles;
  const int pair = index / per_head;  // chunk and head
  int rest = index % per_head, output = 0;
  while (rest >= p.outputs[output].tiles * p.row_tiles) rest -= p.outputs[output++].tiles * p.row_tiles;
  const WideOutput& of = p.outputs[output];
  int slot = pair / p.heads;
  if (p.chunks.table == nullptr) {
    const int chunk = slot / p.batch;
    slot = slot % p.batch * p.chunks.segments + (p.last_first ? p.chunks.segments - 1 - chunk : chunk);
  }
  const int first = rest / of.tiles * T::kRows;
  Work work;
  if (!find_work(p.chunks, slot, work) || first >= work.length) return false;
  unit.output = output;
  unit.head = pair % p.heads;
  unit.batch = work.batch;
  unit.column_tile = rest % of.tiles;
  unit.start = work.start, unit.length = work.length;
  unit.first = first;
  const bool begins = of.reverse ? work.last : work.first;
  unit.initial = begins && of.has_initial;
  unit.state = unit.initial ? work.sequence : begins ? -1 : work.carry + (of.reverse ? 1 : -1);
  const int all = (work.length + 63) / 64, own = first / 64;
  unit.first_block = of.reverse ? own : 0;
  unit.blocks = of.reverse ? all - own : min(all, own + T::kGroups);
  unit.log_lambda = decay_of(work, p.log_decay, unit.head);
  return true;
}

template <class T>
__device__ void produce_output(const WideOutputParams& p, Producer<T>& me, const OutputUnit& unit) {
  const WideOutput& of = p.outputs[unit.output];
  if (unit.state >= 0) {
    const HeadOf x(of.x, unit.head, unit.batch), state(unit.initial ? of.initial : of.states, unit.head, unit.state);
    const int columns = unit.column_tile * T::kPanels, token = unit.start + unit.first;
    for (int panel = 0; panel * kPanel < of.depth; ++panel) {
      const int stage = me.claim();
      me.left(stage, x, panel, token, false);
      if (of.transposed_state)
        me.right(stage, state, panel, columns * kPanel, false);
      else
        me.right(stage, state, columns, panel * kPanel, true);
    }
  }
  const HeadOf scores(of.scores, unit.head, unit.batch), w(of.w, unit.head, unit.batch);
  for (int i = 0; i < unit.blocks; ++i) {
    const int stage = me.claim(), block = unit.first_block + i;
    if (of.reverse)
      me.left(stage, scores, unit.first / 64, unit.start + block * 64, true);
    else
      me.left(stage, scores, block, unit.start + unit.first, false);
    me.right(stage, w, unit.column_tile * T::kPanels, unit.start + block * 64, true);
  }
}

// Units are found by the thread that copies, which tells them to the others. They are taken in order, so that those at
// work at a time are neighbours, which read the same.
template <class T>
__device__ void produce_outputs(const WideOutputParams& p, WideShared<T>& shared) {
  Producer<T> me{shared};
  for (int number = 0;; ++number) {
    const int place = number % 2;
    if (number >= 2) shared.unit_empty[place].wait(parity(number, 2) ^ 1);
    OutputUnit& unit = shared.units[place];
    int index;
    do {
      index = atomicAdd(p.ticket, 1);
    } while (index < p.units && !find_unit<T>(p, index, unit));
    if (index >= p.units) unit.output = -1;
    shared.unit_full[place].arrive();
    if (index >= p.units) return;
    produce_output(p, me, unit);
  }
}

template <class T>
struct WideOutputMaker : Consumer<T> {
  using Element = typename T::Element;
  const WideOutputParams& p;
  bool spoiled = false;  // whether values were found that are not finite

  __device__ WideOutputMaker(const WideOutputParams& p, WideShared<T>& shared, int group)
      : Consumer<T>(shared, group), p(p) {}

  // Looks at values of tokens that some rows of this tile must not see, before they are multiplied: masked scores are
  // 0, and 0 · NaN is NaN.
  __device__ void look(int stage, int token, bool reverse) {
    const uint32_t base = this->right(stage) + threadIdx.x * 16;
    constexpr int kPieces = T::kPanels * 512 / T::kConsumers, kAtOnce = kPieces % 4 == 0 ? 4 : 2;
    static_assert(kPieces % kAtOnce == 0 && T::kPanels * 512 % T::kConsumers == 0);
    NonfiniteSearch<Element> search[kAtOnce];
#pragma unroll 1
    for (int x = 0; x < kPieces; x += kAtOnce) {
      uint4 piece[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) piece[i] = load_piece(base + (x + i) * T::kConsumers * 16);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        for (const uint32_t word : {piece[i].x, piece[i].y, piece[i].z, piece[i].w}) search[i].add(word);
    }
    bool found = false;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) found |= search[i].found();
    if (__any_sync(~0u, found) && threadIdx.x % 32 == 0) this->shared.found[stage] = true;
    this->sync();
    if (this->shared.found[stage]) take_out(stage, token, reverse);
  }

  // Takes them out, and keeps from which token on each column is not finite, in the order of the pass.
  __device__ void take_out(int stage, int token, bool reverse) {
    auto& bad = this->shared.bad;
    if (!spoiled)
      for (int x = threadIdx.x; x < T::kN; x += T::kConsumers) bad[x] = reverse ? -1 : kMostChunk;
    spoiled = true;
    this->sync();
    if (threadIdx.x == 0) this->shared.found[stage] = false;  // all have seen it
    const auto found = [&](int column, int at) {
      if (reverse)
        atomicMax(&bad[column], at);
      else
        atomicMin(&bad[column], at);
    };
#pragma unroll 1
    for (int x = threadIdx.x; x < T::kPanels * 512; x += T::kConsumers) {
      const int row = x / 8 % 64;
      int column = x / 512 * kPanel + (x % 8 ^ row % 8) * 8;
      const uint32_t address = this->right(stage) + x * 16;
      uint4 piece = load_piece(address);
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        if (any_nonfinite<Element>(*word & 0xFFFF)) found(column, token + row), *word &= 0xFFFF0000u;
        if (any_nonfinite<Element>(*word >> 16)) found(column + 1, token + row), *word &= 0xFFFFu;
        column += 2;
      }
      store_piece(address, piece);
    }
    fence_for_async();
    this->sync();
  }
  // NaN from the first token on that brought a value that is not finite.
  __device__ void spoil(int first, bool reverse) {
    const Lane at;
    const int row = first + this->group * 64 + at.row;
    const uint32_t bad = shared_address(this->shared.bad) + at.pair * 4;
#pragma unroll
    for (int x = 0; x < T::kN / 2; ++x) {
      const int from = load_word(bad + (x / 4 * 8 + x % 2) * 4), distance = row + x / 2 % 2 * 8 - from;
      if (reverse ? distance <= 0 : distance >= 0) this->acc[x] = CUDART_NAN_F;
    }
    this->sync();
    spoiled = false;
  }

  __device__ void make(const OutputUnit& unit) {
    const WideOutput& of = p.outputs[unit.output];
    const int length = unit.length, own = unit.first / 64;
    const bool reverse = of.reverse;
    this->clear();
    if (unit.state >= 0) {
      const int panels = (of.depth + kPanel - 1) / kPanel;
      const auto nothing = [](int) {};
      const int row = unit.first + this->group * 64 + Lane().row;
      const auto reads = [&](int i) { return power(unit.log_lambda, reverse ? max(length - 1 - i, 0) : i + 1); };
      const float above = reads(row), below = reads(row + 8);
      if (of.transposed_state) {
        this->template multiply<0, 0>(panels, nothing);
        this->scale(above, below);
      } else {
        this->template multiply<0, 1>(panels, nothing);
        this->scale(above, below);
      }
    }
    int block = unit.first_block;
    const auto inspect = [&](int stage) {
      if (p.chunks.table != nullptr && block * 64 + 64 > length)
        this->clear_rows(stage, reverse ? 0 : T::kGroups, length - block * 64);
      if (block >= own && block < own + T::kGroups) look(stage, block * 64, reverse);
      ++block;
    };
    // Rows of this warpgroup see what comes before or from their own block on.
    const int mine = own + this->group, end = unit.first_block + unit.blocks;
    if (reverse) {
      const int before = min(mine, end) - unit.first_block;
      this->pass_by(before, inspect);
      this->template multiply<1, 1>(unit.blocks - before, inspect);
    } else {
      const int seen = mine * 64 < length ? mine + 1 - unit.first_block : 0;
      this->template multiply<0, 1>(seen, inspect);
      this->pass_by(unit.blocks - seen, inspect);
    }
    if (spoiled) spoil(unit.first, reverse);
    const int column = unit.column_tile * T::kN;
    const int64_t token = (int64_t(unit.batch) * p.heads + unit.head) * p.chunks.tokens + unit.start + unit.first;
    this->put_out(static_cast<Element*>(of.out) + token * of.width + column, length - unit.first, of.width - column,
                  of.width);
  }
};

template <class T>
__device__ void consume_outputs(const WideOutputParams& p, WideShared<T>& shared, int group) {
  WideOutputMaker<T> me(p, shared, group);
  for (int number = 0;; ++number) {
    const int place = number % 2;
    shared.unit_full[place].wait(parity(number, 2));
    const OutputUnit& unit = shared.units[place];
    if (unit.output < 0) return;
    me.make(unit);
    arrive_as_warp(shared.unit_empty[place]);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) wide_outputs_kernel(const __grid_constant__ WideOutputParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<WideShared<T>*>(memory);
  init_barriers(shared);
  by_role<T>([&] { produce_outputs<T>(p, shared); }, [&](int group) { consume_outputs<T>(p, shared, group); });
}

template <class Element>
cudaError_t run_wide_outputs(const WideOutputParams& p, WideTile tile, int multiprocessors, cudaStream_t stream) {
  return with_wide<Element>(tile, [&](auto sizes) {
    using T = decltype(sizes);
    return launch_wide<T>(wide_outputs_kernel<T>, p, std::min<int64_t>(p.units, multiprocessors), stream);
  });
}
