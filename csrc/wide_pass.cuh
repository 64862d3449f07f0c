// A pass of lightning attention over wide heads, for Hopper: states before chunks, scores inside of them, and outputs.
//
// Blocks take pieces of work in an order in which each needs earlier ones alone, and so waits only for those that run.
// States are walked over by some blocks while others make outputs of the chunks behind them, from what the second cache
// still holds.
#pragma once

#include <algorithm>

#include "wide_outputs.cuh"
#include "wide_scores.cuh"
#include "wide_states.cuh"

// Of the tiles of a chunk's scores, those in a row of them that are not all masked.
template <class T>
__device__ int score_columns(int row_tile) {
  return (row_tile * T::kRows + T::kRows - 1) / T::kN + 1;
}

template <class T>
__device__ void find_state(const WideParams& p, int slot, int head, int tile, WideUnit& unit) {
  Work work;
  if (!find_work(p.segments, slot, work) || (p.sums && work.last)) return;
  unit.make = Make::kState;
  unit.head = head, unit.batch = work.batch, unit.slot = slot;
  unit.row_tile = tile / p.e_tiles, unit.column_tile = tile % p.e_tiles;
  unit.start = work.start, unit.length = work.length;
  unit.first = work.first, unit.last = work.last;
  unit.sequence = work.sequence, unit.carry = work.carry;
  unit.log_lambda = work.valid ? log_decay_of(p.log_decay, head) : CUDART_NAN_F;
}

// Of a chunk: tiles of scores, then those of each output.
template <class T>
__device__ void find_tile(const WideParams& p, int slot, int head, int tile, WideUnit& unit) {
  Work work;
  if (!find_work(p.chunks, slot, work)) return;
  unit.head = head, unit.batch = work.batch, unit.slot = slot;
  unit.start = work.start, unit.length = work.length;
  unit.log_lambda = work.valid ? log_decay_of(p.log_decay, head) : CUDART_NAN_F;
  unit.row_tile = 0;
  if (tile < p.score_tiles) {
    for (int columns; tile >= (columns = score_columns<T>(unit.row_tile)); ++unit.row_tile) tile -= columns;
    unit.column_tile = tile;
    if (unit.row_tile * T::kRows < work.length) unit.make = Make::kScores;
    return;
  }
  tile -= p.score_tiles;
  unit.output = 0;
  while (tile >= p.outputs[unit.output].tiles * p.row_tiles) tile -= p.outputs[unit.output++].tiles * p.row_tiles;
  const WideOutput& of = p.outputs[unit.output];
  unit.column_tile = tile % of.tiles, unit.row_tile = tile / of.tiles;
  if (unit.row_tile * T::kRows >= work.length) return;
  unit.make = Make::kOutput;
  const bool starts = p.reverse ? work.last : work.first, ends = p.reverse ? work.first : work.last;  // of its sequence
  const bool begins = of.reverse ? ends : starts;
  unit.initial = begins && of.has_initial;
  unit.state = unit.initial ? work.sequence : begins ? -1 : work.carry + (of.reverse ? 1 : -1);
  const int all = (work.length + 63) / 64, own = unit.row_tile * T::kGroups;
  unit.first_block = of.reverse ? own : 0;
  unit.blocks = of.reverse ? all - own : min(all, own + T::kGroups);
  unit.score_parts = 0;
  for (int row = 0; row * T::kRows < work.length; ++row) unit.score_parts += score_columns<T>(row) * T::kGroups;
}

// Which piece of work that is.
template <class T>
__device__ WideUnit find_unit(const WideParams& p, int64_t index) {
  WideUnit unit;
  unit.make = index < p.units ? Make::kNothing : Make::kEnd;
  if (index >= p.units) return unit;
  if (p.chunks.table != nullptr) {  // packed: all states, then all chunks
    const int64_t states = int64_t(p.segments.positions) * p.heads * p.state_tiles;
    if (index < states) {
      const int chain = index / p.state_tiles;
      find_state<T>(p, chain / p.heads, chain % p.heads, index % p.state_tiles, unit);
    } else {
      const int pair = (index - states) / p.chunk_units, slot = pair / p.heads;
      find_tile<T>(p, p.reverse ? p.chunks.positions - 1 - slot : slot, pair % p.heads,
                   (index - states) % p.chunk_units, unit);
    }
    return unit;
  }
  // Some segments of heads at a time: their states, then their chunks, one of each segment after another.
  const int chains = p.batch * p.segments.segments * p.heads, chunks = p.segments.segment_length / p.chunk;
  const int64_t of_group = int64_t(p.at_once) * (p.state_tiles + chunks * p.chunk_units);
  const int first = index / of_group * p.at_once, size = min(p.at_once, chains - first);
  int rest = index % of_group;
  if (rest < size * p.state_tiles) {
    const int chain = first + rest / p.state_tiles;
    find_state<T>(p, chain / p.heads, chain % p.heads, rest % p.state_tiles, unit);
    return unit;
  }
  rest -= size * p.state_tiles;
  const int i = rest / (size * p.chunk_units), chain = first + rest / p.chunk_units % size, slot = chain / p.heads;
  const int chunk = slot % p.segments.segments * chunks + (p.reverse ? chunks - 1 - i : i);
  if (chunk < p.chunks.segments)
    find_tile<T>(p, slot / p.segments.segments * p.chunks.segments + chunk, chain % p.heads, rest % p.chunk_units,
                 unit);
  return unit;
}

// The thread that copies finds the units, and tells them to the others.
template <class T>
__device__ void produce(const WideParams& p, WideShared<T>& shared) {
  Producer<T> me{shared};
  for (int number = 0;;) {
    const WideUnit unit = find_unit<T>(p, atomicAdd(p.ticket, 1));
    if (unit.make == Make::kNothing) continue;
    const int place = number % 2;
    if (number >= 2) shared.unit_empty[place].wait(parity(number, 2) ^ 1);
    ++number;
    shared.units[place] = unit;
    shared.unit_full[place].arrive();
    if (unit.make == Make::kEnd) return;
    if (unit.make == Make::kState)
      produce_state<T>(p, me, unit);
    else if (unit.make == Make::kScores)
      produce_scores<T>(p, me, unit);
    else
      produce_output<T>(p, me, unit);
  }
}

template <class T>
__device__ void consume(const WideParams& p, WideShared<T>& shared, int group) {
  Consumer<T> me(shared, group);
  for (int number = 0;; ++number) {
    const int place = number % 2;
    shared.unit_full[place].wait(parity(number, 2));
    const WideUnit& unit = shared.units[place];
    const Make make = unit.make;
    if (make == Make::kEnd) return;
    if (make == Make::kState)
      StateMaker<T>{me, p, unit}.walk();
    else if (make == Make::kScores)
      make_scores<T>(p, me, unit);
    else
      WideOutputMaker<T>{me, p, unit}.make();
    arrive_as_warp(shared.unit_empty[place]);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) wide_kernel(const __grid_constant__ WideParams p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<WideShared<T>*>(memory);
  init_barriers(shared);
  by_role<T>([&] { produce<T>(p, shared); }, [&](int group) { consume<T>(p, shared, group); });
}

// Launches the kernel on as many blocks as run at a time.
template <class T>
cudaError_t launch_wide(const WideParams& p, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(WideShared<T>);
  static_assert(kBytes <= 227 * 1024);
  const cudaError_t error = cudaFuncSetAttribute(wide_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  wide_kernel<T><<<dim3(std::min<int64_t>(p.units, multiprocessors)), T::kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Element>
cudaError_t run_wide(const WideParams& p, WideTile tile, int multiprocessors, cudaStream_t stream) {
  if (tile.rows == kSquareTile.rows)
    return launch_wide<Wide<Element, kSquareTile.rows / 64, kSquareTile.columns>>(p, multiprocessors, stream);
  return launch_wide<Wide<Element, kLongTile.rows / 64, kLongTile.columns>>(p, multiprocessors, stream);
}
