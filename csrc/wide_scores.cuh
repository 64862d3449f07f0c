// Masked scores inside chunks of wide heads, of those tiles that are not all masked.
#pragma once

#include "wide.cuh"

template <class T>
__device__ void produce_scores(const WideParams& p, Producer<T>& me, const WideUnit& unit) {
  const HeadOf rows(p.rows, unit.head, unit.batch), columns(p.columns, unit.head, unit.batch);
  for (int panel = 0; panel * kPanel < p.depth; ++panel) {
    const int stage = me.claim();
    me.left(stage, rows, panel, unit.start + unit.row_tile * T::kRows, false);
    me.right(stage, columns, panel, unit.start + unit.column_tile * T::kN, false);
  }
}

// Scores times λ^(i-j); chosen, not multiplied where masked: 0 · NaN is NaN.
template <class T>
__device__ void make_scores(const WideParams& p, Consumer<T>& me, const WideUnit& unit) {
  me.sync();  // all are done with the weights of the unit before
  for (int i = threadIdx.x; i < p.chunk; i += T::kConsumers) me.shared.weights[i] = power(unit.log_lambda, i);
  me.sync();
  me.clear();
  me.template multiply<0, 0>((p.depth + kPanel - 1) / kPanel, [](int) {});
  const Lane at;
  const int distance = unit.row_tile * T::kRows + me.group * 64 + at.row - unit.column_tile * T::kN - at.pair;
#pragma unroll
  for (int x = 0; x < T::kN / 2; ++x) {
    const int here = distance + x / 2 % 2 * 8 - x / 4 * 8 - x % 2;
    me.acc[x] = here < 0 ? 0.f : me.acc[x] * me.shared.weights[here];
  }
  const int first = unit.row_tile * T::kRows;
  auto* rows = static_cast<typename T::Element*>(p.score_rows) +
               ((int64_t(unit.batch) * p.heads + unit.head) * p.chunks.tokens + unit.start + first) * p.chunk;
  me.put_out(HeadOf(p.scores, unit.head, unit.batch), unit.column_tile * T::kPanels, unit.start + first,
             {0, unit.length - first, p.chunks.table != nullptr}, rows, p.chunk);
  if (at.thread == 0) announce_stores(p.scores_done + unit.slot * p.heads + unit.head);
}
