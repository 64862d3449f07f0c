// Outputs of wide heads: equations (1) and (3) of README.md as products of tiles
//
//     o = r (q S) + P v        P the masked scores of a chunk
//
// and their like for gradients, with the transpose of S or P.
#pragma once

#include "wide.cuh"

template <class T>
__device__ void produce_output(const WideParams& p, Producer<T>& me, const WideUnit& unit) {
  const WideOutput& of = p.outputs[unit.output];
  const int columns = unit.column_tile * T::kPanels, first = unit.row_tile * T::kRows;
  if (unit.state >= 0) {
    if (of.own_states && !unit.initial)
      wait_for_parts(p.states_done + unit.state * p.heads + unit.head, p.state_tiles * T::kGroups);
    const HeadOf x(of.x, unit.head, unit.batch), state(unit.initial ? of.initial : of.states, unit.head, unit.state);
    for (int panel = 0; panel * kPanel < of.depth; ++panel) {
      const int stage = me.claim();
      me.left(stage, x, panel, unit.start + first, false);
      if (of.transposed_state)
        me.right(stage, state, panel, columns * kPanel, false);
      else
        me.right(stage, state, columns, panel * kPanel, true);
    }
  }
  if (of.own_scores) wait_for_parts(p.scores_done + unit.slot * p.heads + unit.head, unit.score_parts);
  const HeadOf scores(of.scores, unit.head, unit.batch), w(of.w, unit.head, unit.batch);
  for (int i = 0; i < unit.blocks; ++i) {
    const int stage = me.claim(), block = unit.first_block + i;
    if (of.reverse)
      me.left(stage, scores, first / 64, unit.start + block * 64, true);
    else
      me.left(stage, scores, block, unit.start + first, false);
    me.right(stage, w, columns, unit.start + block * 64, true);
  }
}

template <class T>
struct WideOutputMaker {
  using Element = typename T::Element;
  Consumer<T>& me;
  const WideParams& p;
  const WideUnit& unit;
  bool spoiled = false;  // whether values were found that are not finite

  // Looks at values of tokens that some rows of this tile must not see, before they are multiplied: masked scores are
  // 0, and 0 · NaN is NaN.
  __device__ void look(int stage, int token, bool reverse) {
    const uint32_t base = me.right(stage) + threadIdx.x * 16;
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
    if (any_of_threads(1, T::kConsumers, found)) take_out(stage, token, reverse);
  }

  // Takes them out, and keeps from which token on each column is not finite, in the order of the pass.
  __device__ void take_out(int stage, int token, bool reverse) {
    auto& bad = me.shared.bad;
    if (!spoiled) {
      for (int x = threadIdx.x; x < T::kN; x += T::kConsumers) bad[x] = reverse ? -1 : INT_MAX;
      me.sync();
    }
    spoiled = true;
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
      const uint32_t address = me.right(stage) + x * 16;
      uint4 piece = load_piece(address);
      for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
        if (any_nonfinite<Element>(*word & 0xFFFF)) found(column, token + row), *word &= 0xFFFF0000u;
        if (any_nonfinite<Element>(*word >> 16)) found(column + 1, token + row), *word &= 0xFFFFu;
        column += 2;
      }
      store_piece(address, piece);
    }
    fence_for_async();
    me.sync();
  }
  __device__ void spoil(int first, bool reverse) {
    const Lane at;
#pragma unroll
    for (int x = 0; x < T::kN / 2; ++x) {
      const int row = first + me.group * 64 + at.row + x / 2 % 2 * 8;
      const int bad = me.shared.bad[x / 4 * 8 + at.pair + x % 2];
      if (reverse ? row <= bad : row >= bad) me.acc[x] = CUDART_NAN_F;
    }
    me.sync();
  }

  __device__ void make() {
    const WideOutput& of = p.outputs[unit.output];
    const int length = unit.length, first = unit.row_tile * T::kRows, own = first / 64;
    const bool reverse = of.reverse;
    me.clear();
    if (unit.state >= 0) {
      const int panels = (of.depth + kPanel - 1) / kPanel;
      const auto nothing = [](int) {};
      const int row = first + me.group * 64 + Lane().row;
      const auto reads = [&](int i) { return power(unit.log_lambda, reverse ? max(length - 1 - i, 0) : i + 1); };
      const float above = reads(row), below = reads(row + 8);
      if (of.transposed_state) {
        me.template multiply<0, 0>(panels, nothing);
        me.scale(above, below);
      } else {
        me.template multiply<0, 1>(panels, nothing);
        me.scale(above, below);
      }
    }
    int block = unit.first_block;
    const auto inspect = [&](int stage) {
      if (p.chunks.table != nullptr && block * 64 + 64 > length)
        me.clear_rows(stage, reverse ? 0 : T::kGroups, length - block * 64);
      if (block >= own && block < own + T::kGroups) look(stage, block * 64, reverse);
      ++block;
    };
    // Rows of this warpgroup see what comes before or from their own block on.
    const int mine = own + me.group, end = unit.first_block + unit.blocks;
    if (reverse) {
      const int before = min(mine, end) - unit.first_block;
      me.pass_by(before, inspect);
      me.template multiply<1, 1>(unit.blocks - before, inspect);
    } else {
      const int seen = mine * 64 < length ? mine + 1 - unit.first_block : 0;
      me.template multiply<0, 1>(seen, inspect);
      me.pass_by(unit.blocks - seen, inspect);
    }
    if (spoiled) spoil(first, reverse);
    const int token = unit.start + first;
    Element* rows = static_cast<Element*>(of.out_rows) +
                    ((int64_t(unit.batch) * p.heads + unit.head) * p.chunks.tokens + token) * of.width;
    me.put_out(HeadOf(of.out, unit.head, unit.batch), unit.column_tile * T::kPanels, token,
               {0, length - first, p.chunks.table != nullptr}, rows, of.width);
  }
};
