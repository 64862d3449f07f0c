// The operators of wide heads as PyTorch sees them, and every check of what they are given; as `binding.cpp`.
#include <torch/csrc/stable/library.h>

#include "tensors.h"
#include "variants.h"
#include "wide.h"

namespace {

Pieces pieces_of(const std::optional<Tensor>& table, const Tensor& like, int64_t length, bool reverse) {
  CHECK(length > 0 && length % 64 == 0, "segment_length, chunk: expected a multiple of 64, got ", length);
  Pieces pieces{};
  pieces.tokens = like.size(2), pieces.segment_length = length, pieces.reverse = reverse;
  pieces.positions = pieces.segments = (like.size(2) + length - 1) / length;
  if (table) {
    check_same(*table, "table", ScalarType::Int, like);
    CHECK(table->dim() == 2 && table->size(1) == 4 && table->is_contiguous(), "table: expected (segments + 1, 4)");
    CHECK(like.size(0) == 1, "table: expected a batch of 1, got ", like.size(0));
    pieces.table = static_cast<const Segment*>(table->data_ptr());
    pieces.positions = table->size(0) - 1;
  }
  return pieces;
}

int64_t slots_of(const Pieces& pieces, int64_t batch) {
  return pieces.table == nullptr ? batch * pieces.segments : pieces.positions;
}

// Boxes of a tile of products that is copied at once: rows, and columns of panels.
struct Boxes {
  int rows, columns;
};
// The left tile and the right one of a stage, with 64 rows or one panel of them.
Boxes left_across(WideTile tile) { return {64, tile.rows}; }
Boxes left_down(WideTile tile) { return {tile.rows, 64}; }
Boxes right_across(WideTile tile) { return {64, tile.columns}; }
Boxes right_down(WideTile tile) { return {tile.columns, 64}; }

// A tensor (B, heads, T, width).
TiledTensor boxes_of(const Tensor& x, const char* name, const Tensor& like, int64_t heads, int64_t width, Boxes boxes) {
  check_same(x, name, like.scalar_type(), like);
  check_shape(x, name, {like.size(0), x.size(1), like.size(2), width});
  return tiled(x, name, heads, boxes.columns, boxes.rows);
}

// The states that chunks hand on, scores or outputs: contiguous, in the inputs' type.
void* memory_of(const Tensor& x, const char* name, const Tensor& like, std::initializer_list<int64_t> expected) {
  check_same(x, name, like.scalar_type(), like);
  check_shape(x, name, expected);
  CHECK(x.is_contiguous(), name, ": expected contiguous");
  CHECK(x.size(3) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, ": expected rows of 16 bytes");
  return x.data_ptr();
}

// The same for the copy engine.
TiledTensor boxes_of_own(const Tensor& x, const char* name, const Tensor& like, std::initializer_list<int64_t> expected,
                         Boxes boxes) {
  memory_of(x, name, like, expected);
  return tiled(x, name, x.size(1), boxes.columns, boxes.rows);
}

WideTile tile_of(int64_t rows) {
  CHECK(rows == kSquareTile.rows || rows == kLongTile.rows, "tile: expected ", kSquareTile.rows, " or ", kLongTile.rows,
        " rows, got ", rows);
  return rows == kSquareTile.rows ? kSquareTile : kLongTile;
}

int* ticket_of(const Tensor& ticket, const Tensor& like) {
  check_same(ticket, "ticket", ScalarType::Int, like);
  check_shape(ticket, "ticket", {1});
  return static_cast<int*>(ticket.data_ptr());
}

void check_chunk(const Tensor& x, int64_t chunk) {
  CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, "expected bfloat16 or float16");
  CHECK(chunk <= kMostChunk, "chunk: expected at most ", kMostChunk, ", got ", chunk);
}

cudaError_t run(const PrepareParams& p, const Tensor& like, WideTile tile, cudaStream_t stream) {
  return like.scalar_type() == ScalarType::BFloat16 ? run_prepare_bfloat16(p, tile, stream)
                                                    : run_prepare_float16(p, tile, stream);
}

void wide_prepare(const Tensor& a, const Tensor& b, const Tensor& rows, const Tensor& columns,
                  const std::optional<Tensor>& log_decay, const std::optional<Tensor>& initial,
                  const std::optional<Tensor>& segment_table, const std::optional<Tensor>& chunk_table,
                  const std::optional<Tensor>& carry, const std::optional<Tensor>& states, const Tensor& scores,
                  const std::optional<Tensor>& final, const Tensor& ticket, int64_t segment_length, int64_t chunk,
                  int64_t tile_rows, bool reverse) {
  const GuardForMaps guard(a.get_device_index());
  check_chunk(a, chunk);
  CHECK(segment_length % chunk == 0, "segment_length: expected a multiple of ", chunk, ", got ", segment_length);
  PrepareParams p{};
  p.batch = a.size(0), p.heads = scores.size(1), p.d = a.size(3), p.e = b.size(3), p.depth = rows.size(3);
  p.chunk = chunk, p.reverse = reverse;
  const WideTile tile = tile_of(tile_rows);
  p.a = boxes_of(a, "a", a, p.heads, p.d, left_across(tile));
  p.b = boxes_of(b, "b", a, p.heads, p.e, right_across(tile));
  p.rows = boxes_of(rows, "rows", a, p.heads, p.depth, left_down(tile));
  p.columns = boxes_of(columns, "columns", a, p.heads, p.depth, right_down(tile));
  p.segments = pieces_of(segment_table, a, segment_length, reverse);
  p.chunks = pieces_of(chunk_table, a, chunk, reverse);
  p.scores = memory_of(scores, "scores", a, {p.batch, p.heads, a.size(2), chunk});
  p.log_decay = log_decay_of(log_decay, a, p.heads);
  p.ticket = ticket_of(ticket, a);
  const int64_t sequences = chunk_table ? 1 : p.batch;
  if (initial) p.initial = state_of(*initial, "initial", a, sequences, p.heads, p.d, p.e, &p.initial_strides);
  if (final) p.final = state_of(*final, "final", a, sequences, p.heads, p.d, p.e, &p.final_strides);
  CHECK(states.has_value() == (p.chunks.segments > 1), "states: expected with more than one chunk");
  if (states) p.states = memory_of(*states, "states", a, {int64_t(p.batch) * p.chunks.segments, p.heads, p.d, p.e});
  p.d_tiles = (p.d + tile.rows - 1) / tile.rows, p.e_tiles = (p.e + tile.columns - 1) / tile.columns;
  for (int row = 0; row < chunk; row += tile.rows) p.score_tiles += (row + tile.rows - 1) / tile.columns + 1;
  const int64_t slots = slots_of(p.segments, p.batch);
  p.state_units = states || final ? slots * p.heads * p.d_tiles * p.e_tiles : 0;
  CHECK(carry.has_value() == (p.segments.segments > 1), "carry: expected with more than one segment");
  const int64_t score_units = slots_of(p.chunks, p.batch) * p.heads * p.score_tiles;
  CHECK(p.state_units + score_units < int64_t(1) << 31, "too many pieces of work: ", p.state_units + score_units);
  const cudaStream_t stream = stream_of(a);
  if (carry) {
    p.carry = state_of(*carry, "carry", a, 1, p.heads, p.d, p.e, &p.carry_strides);
    check_shape(*carry, "carry", {int64_t(p.batch) * p.segments.segments, p.heads, p.d, p.e});
    CHECK(carry->is_contiguous(), "carry: expected contiguous");
    p.sums = true;
    check_cuda(run(p, a, tile, stream));
    p.sums = false;
    PassParams of_scan{};
    of_scan.carry = p.carry, of_scan.carry_strides = p.carry_strides, of_scan.log_decay = p.log_decay;
    of_scan.table = p.segments.table, of_scan.positions = p.segments.positions, of_scan.segments = p.segments.segments;
    of_scan.segment_length = segment_length, of_scan.tokens = p.segments.tokens, of_scan.reverse = reverse;
    of_scan.heads = p.heads, of_scan.d = p.d, of_scan.e = p.e;
    check_cuda(run_scan(of_scan, slots, stream));
  }
  p.score_units = score_units;
  check_cuda(run(p, a, tile, stream));
}

// What all outputs of a call share.
struct Outputs {
  WideOutputParams p{};
  const Tensor& like;
  const WideTile tile;

  Outputs(const Tensor& q, const std::optional<Tensor>& log_decay, const std::optional<Tensor>& table,
          const Tensor& ticket, int64_t heads, int64_t chunk, int64_t tile_rows)
      : like(q), tile(tile_of(tile_rows)) {
    check_chunk(q, chunk);
    p.batch = q.size(0), p.heads = heads;
    p.chunks = pieces_of(table, q, chunk, false);
    p.log_decay = log_decay_of(log_decay, q, p.heads);
    p.ticket = ticket_of(ticket, q);
    p.row_tiles = (std::min<int64_t>(chunk, p.chunks.tokens) + tile.rows - 1) / tile.rows;
  }

  // Of the states (.., H, D, E) each is read as it is, or `transposed`.
  void add(const Tensor& x, const Tensor& w, const std::optional<Tensor>& states, const std::optional<Tensor>& initial,
           const Tensor& scores, const Tensor& out, bool transposed, bool reverse) {
    WideOutput& of = p.outputs[p.number++];
    of.depth = x.size(3), of.width = w.size(3);
    const int64_t d = transposed ? of.width : of.depth, e = transposed ? of.depth : of.width;
    of.x = boxes_of(x, "x", like, p.heads, of.depth, left_down(tile));
    of.w = boxes_of(w, "w", like, p.heads, of.width, right_across(tile));
    of.scores = boxes_of_own(scores, "scores", like, {p.batch, p.heads, p.chunks.tokens, p.chunks.segment_length},
                             reverse ? left_across(tile) : left_down(tile));
    of.out = memory_of(out, "out", like, {p.batch, p.heads, p.chunks.tokens, of.width});
    CHECK(states.has_value() == (p.chunks.segments > 1), "states: expected with more than one chunk");
    of.has_initial = initial.has_value();
    const Boxes of_state = transposed ? right_down(tile) : right_across(tile);
    const int64_t chunks = int64_t(p.batch) * p.chunks.segments;
    if (states) of.states = boxes_of_own(*states, "states", like, {chunks, p.heads, d, e}, of_state);
    if (initial) of.initial = boxes_of_own(*initial, "initial", like, {initial->size(0), p.heads, d, e}, of_state);
    of.transposed_state = transposed, of.reverse = reverse;
    of.tiles = (of.width + tile.columns - 1) / tile.columns;
  }

  void run() {
    int64_t tiles = 0;
    for (int i = 0; i < p.number; ++i) tiles += p.outputs[i].tiles;
    p.units = slots_of(p.chunks, p.batch) * p.heads * p.row_tiles * tiles;
    CHECK(p.units < (int64_t(1) << 31) - (1 << 16), "too many pieces of work: ", p.units);
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, like.get_device_index()));
    const cudaStream_t stream = stream_of(like);
    check_cuda(like.scalar_type() == ScalarType::BFloat16 ? run_wide_outputs_bfloat16(p, tile, multiprocessors, stream)
                                                          : run_wide_outputs_float16(p, tile, multiprocessors, stream));
  }
};

void wide_forward(const Tensor& q, const Tensor& v, const std::optional<Tensor>& log_decay,
                  const std::optional<Tensor>& table, const std::optional<Tensor>& states,
                  const std::optional<Tensor>& initial, const Tensor& scores, const Tensor& out, const Tensor& ticket,
                  int64_t chunk, int64_t tile_rows) {
  const GuardForMaps guard(q.get_device_index());
  Outputs outputs(q, log_decay, table, ticket, out.size(1), chunk, tile_rows);
  outputs.p.last_first = true;
  outputs.add(q, v, states, initial, scores, out, false, false);
  outputs.run();
}

void wide_backward(const Tensor& grad_o, const Tensor& q, const Tensor& k, const Tensor& v,
                   const std::optional<Tensor>& log_decay, const std::optional<Tensor>& table,
                   const std::optional<Tensor>& states, const std::optional<Tensor>& initial, const Tensor& scores,
                   const std::optional<Tensor>& grad_states, const std::optional<Tensor>& grad_final,
                   const Tensor& grad_scores, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                   const Tensor& ticket, int64_t chunk, int64_t tile_rows) {
  const GuardForMaps guard(q.get_device_index());
  Outputs outputs(q, log_decay, table, ticket, dq.size(1), chunk, tile_rows);
  outputs.add(grad_o, k, states, initial, grad_scores, dq, true, false);
  outputs.add(v, q, grad_states, grad_final, grad_scores, dk, true, true);
  outputs.add(k, grad_o, grad_states, grad_final, scores, dv, false, true);
  outputs.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transnormer_kernels, m) {
  m.def(
      "wide_prepare(Tensor a, Tensor b, Tensor rows, Tensor columns, Tensor? log_decay, Tensor? initial,"
      " Tensor? segment_table, Tensor? chunk_table, Tensor(a!)? carry, Tensor(b!)? states, Tensor(c!) scores,"
      " Tensor(d!)? final, Tensor(e!) ticket, int segment_length, int chunk, int tile_rows, bool reverse) -> ()");
  m.def(
      "wide_forward(Tensor q, Tensor v, Tensor? log_decay, Tensor? table, Tensor? states, Tensor? initial,"
      " Tensor scores, Tensor(a!) out, Tensor(b!) ticket, int chunk, int tile_rows) -> ()");
  m.def(
      "wide_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? table, Tensor? states,"
      " Tensor? initial, Tensor scores, Tensor? grad_states, Tensor? grad_final, Tensor grad_scores, Tensor(a!) dq,"
      " Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) ticket, int chunk, int tile_rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transnormer_kernels, CUDA, m) {
  m.impl("wide_prepare", TORCH_BOX(&wide_prepare));
  m.impl("wide_forward", TORCH_BOX(&wide_forward));
  m.impl("wide_backward", TORCH_BOX(&wide_backward));
}
