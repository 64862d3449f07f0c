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

// Boxes of a tile of products that is copied at once: rows, and columns of panels.
struct Boxes {
  int rows, columns;
};
// The left tile and the right one of a stage, with 64 rows or one panel of them.
Boxes left_across(WideTile tile) { return {64, tile.rows}; }
Boxes left_down(WideTile tile) { return {tile.rows, 64}; }
Boxes right_across(WideTile tile) { return {64, tile.columns}; }
Boxes right_down(WideTile tile) { return {tile.columns, 64}; }
constexpr Boxes kStored = {64, 64};

// A tensor (B, heads, T, width).
TiledTensor boxes_of(const Tensor& x, const char* name, const Tensor& like, int64_t heads, int64_t width, Boxes boxes) {
  check_same(x, name, like.scalar_type(), like);
  check_shape(x, name, {like.size(0), x.size(1), like.size(2), width});
  return tiled(x, name, heads, boxes.columns, boxes.rows);
}

// The states that chunks hand on, scores or outputs: contiguous, in the inputs' type.
TiledTensor boxes_of_own(const Tensor& x, const char* name, const Tensor& like, std::initializer_list<int64_t> expected,
                         Boxes boxes) {
  check_same(x, name, like.scalar_type(), like);
  check_shape(x, name, expected);
  CHECK(x.is_contiguous(), name, ": expected contiguous");
  return tiled(x, name, x.size(1), boxes.columns, boxes.rows);
}

WideTile tile_of(int64_t rows) {
  CHECK(rows == kSquareTile.rows || rows == kLongTile.rows, "tile: expected ", kSquareTile.rows, " or ", kLongTile.rows,
        " rows, got ", rows);
  return rows == kSquareTile.rows ? kSquareTile : kLongTile;
}

// One pass: what it is given, and how it is cut into pieces of work.
class WidePass {
 public:
  // The state gains aᵀ b for each token, scores are of rows and columns.
  WidePass(const Tensor& a, const Tensor& b, const Tensor& rows, const Tensor& columns,
           const std::optional<Tensor>& log_decay, const std::optional<Tensor>& initial,
           const std::optional<Tensor>& segment_table, const std::optional<Tensor>& chunk_table,
           const std::optional<Tensor>& carry, const std::optional<Tensor>& states, const Tensor& scores,
           const std::optional<Tensor>& final, const Tensor& done, int64_t segment_length, int64_t chunk,
           int64_t tile_rows, int64_t at_once, bool reverse)
      : like_(a), tile_(tile_of(tile_rows)) {
    CHECK(a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Half,
          "expected bfloat16 or float16");
    CHECK(chunk <= kMostChunk, "chunk: expected at most ", kMostChunk, ", got ", chunk);
    CHECK(segment_length % chunk == 0, "segment_length: expected a multiple of ", chunk, ", got ", segment_length);
    CHECK(at_once > 0, "at_once: expected a number from 1, got ", at_once);
    p_.batch = a.size(0), p_.heads = scores.size(1), p_.d = a.size(3), p_.e = b.size(3), p_.depth = rows.size(3);
    p_.chunk = chunk, p_.reverse = reverse, p_.at_once = at_once;
    p_.a = boxes_of(a, "a", a, p_.heads, p_.d, left_across(tile_));
    p_.b = boxes_of(b, "b", a, p_.heads, p_.e, right_across(tile_));
    p_.rows = boxes_of(rows, "rows", a, p_.heads, p_.depth, left_down(tile_));
    p_.columns = boxes_of(columns, "columns", a, p_.heads, p_.depth, right_down(tile_));
    p_.segments = pieces_of(segment_table, a, segment_length, reverse);
    p_.chunks = pieces_of(chunk_table, a, chunk, reverse);
    p_.scores = boxes_of_own(scores, "scores", a, {p_.batch, p_.heads, a.size(2), chunk}, kStored);
    p_.score_rows = scores.data_ptr();
    p_.log_decay = log_decay_of(log_decay, a, p_.heads);
    const int64_t sequences = chunk_table ? 1 : p_.batch, chunks = int64_t(p_.batch) * p_.chunks.segments;
    if (initial) p_.initial = state_of(*initial, "initial", a, sequences, p_.heads, p_.d, p_.e, &p_.initial_strides);
    if (final) p_.final = state_of(*final, "final", a, sequences, p_.heads, p_.d, p_.e, &p_.final_strides);
    CHECK(states.has_value() == (p_.chunks.segments > 1), "states: expected with more than one chunk");
    if (states) p_.states = boxes_of_own(*states, "states", a, {chunks, p_.heads, p_.d, p_.e}, kStored);
    p_.e_tiles = (p_.e + tile_.columns - 1) / tile_.columns;
    if (states || final) p_.state_tiles = (p_.d + tile_.rows - 1) / tile_.rows * p_.e_tiles;
    CHECK(carry.has_value() == (p_.segments.segments > 1), "carry: expected with more than one segment");
    if (carry) {
      p_.carry = state_of(*carry, "carry", a, 1, p_.heads, p_.d, p_.e, &p_.carry_strides);
      check_shape(*carry, "carry", {int64_t(p_.batch) * p_.segments.segments, p_.heads, p_.d, p_.e});
      CHECK(carry->is_contiguous(), "carry: expected contiguous");
    }
    check_same(done, "done", ScalarType::Int, a);
    check_shape(done, "done", {2 + (chunks + slots_of(p_.chunks)) * p_.heads});
    CHECK(done.is_contiguous(), "done: expected contiguous");
    p_.ticket = static_cast<int*>(done.data_ptr());
    p_.states_done = p_.ticket + 2;
    p_.scores_done = p_.states_done + chunks * p_.heads;
  }

  // An output from the states (.., H, D, E), read as they are or `transposed`, and scores: those of this pass, or of
  // one before.
  void add(const Tensor& x, const Tensor& w, const std::optional<Tensor>& states, const std::optional<Tensor>& initial,
           const Tensor& scores, const Tensor& out, bool transposed, bool reverse, bool own_states, bool own_scores) {
    WideOutput& of = p_.outputs[p_.number++];
    of.depth = x.size(3), of.width = w.size(3);
    const int64_t d = transposed ? of.width : of.depth, e = transposed ? of.depth : of.width;
    of.x = boxes_of(x, "x", like_, p_.heads, of.depth, left_down(tile_));
    of.w = boxes_of(w, "w", like_, p_.heads, of.width, right_across(tile_));
    of.scores = boxes_of_own(scores, "scores", like_, {p_.batch, p_.heads, p_.chunks.tokens, p_.chunk},
                             reverse ? left_across(tile_) : left_down(tile_));
    of.out = boxes_of_own(out, "out", like_, {p_.batch, p_.heads, p_.chunks.tokens, of.width}, kStored);
    of.out_rows = out.data_ptr();
    CHECK(states.has_value() == (p_.chunks.segments > 1), "states: expected with more than one chunk");
    of.has_initial = initial.has_value();
    const Boxes of_state = transposed ? right_down(tile_) : right_across(tile_);
    const int64_t chunks = int64_t(p_.batch) * p_.chunks.segments;
    if (states) of.states = boxes_of_own(*states, "states", like_, {chunks, p_.heads, d, e}, of_state);
    if (initial) of.initial = boxes_of_own(*initial, "initial", like_, {initial->size(0), p_.heads, d, e}, of_state);
    of.transposed_state = transposed, of.reverse = reverse, of.own_states = own_states, of.own_scores = own_scores;
    of.tiles = (of.width + tile_.columns - 1) / tile_.columns;
  }

  void run() {
    if (p_.carry != nullptr) add_up_segments();
    const int rows = std::min(p_.chunk, p_.chunks.tokens);
    for (int row = 0; row < p_.chunk; row += tile_.rows) p_.score_tiles += (row + tile_.rows - 1) / tile_.columns + 1;
    p_.row_tiles = (rows + tile_.rows - 1) / tile_.rows;
    p_.chunk_units = p_.score_tiles;
    for (int i = 0; i < p_.number; ++i) p_.chunk_units += p_.outputs[i].tiles * p_.row_tiles;
    const int64_t chunks = p_.chunks.table != nullptr ? slots_of(p_.chunks)
                                                      : slots_of(p_.segments) * (p_.segments.segment_length / p_.chunk);
    launch(state_units() + chunks * p_.heads * p_.chunk_units);
  }

 private:
  int64_t slots_of(const Pieces& pieces) const {
    return pieces.table == nullptr ? int64_t(p_.batch) * pieces.segments : pieces.positions;
  }
  int64_t state_units() const { return slots_of(p_.segments) * p_.heads * p_.state_tiles; }

  // What each segment adds to the state, and from that the state after each.
  void add_up_segments() {
    p_.sums = true;
    launch(state_units());
    p_.sums = false;
    ++p_.ticket;
    PassParams scan{};
    scan.carry = p_.carry, scan.carry_strides = p_.carry_strides, scan.log_decay = p_.log_decay;
    scan.table = p_.segments.table, scan.positions = p_.segments.positions, scan.segments = p_.segments.segments;
    scan.segment_length = p_.segments.segment_length, scan.tokens = p_.segments.tokens, scan.reverse = p_.reverse;
    scan.heads = p_.heads, scan.d = p_.d, scan.e = p_.e;
    check_cuda(run_scan(scan, slots_of(p_.segments), stream_of(like_)));
  }

  void launch(int64_t units) {
    CHECK(units < (int64_t(1) << 31) - 1024, "too many pieces of work: ", units);
    p_.units = units;
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, like_.get_device_index()));
    const cudaStream_t stream = stream_of(like_);
    check_cuda(like_.scalar_type() == ScalarType::BFloat16 ? run_wide_bfloat16(p_, tile_, multiprocessors, stream)
                                                           : run_wide_float16(p_, tile_, multiprocessors, stream));
  }

  const Tensor& like_;
  const WideTile tile_;
  WideParams p_{};
};

void wide_forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
                  const std::optional<Tensor>& initial, const std::optional<Tensor>& rounded_initial,
                  const std::optional<Tensor>& segment_table, const std::optional<Tensor>& chunk_table,
                  const std::optional<Tensor>& carry, const std::optional<Tensor>& states, const Tensor& scores,
                  const std::optional<Tensor>& final, const Tensor& done, const Tensor& out, int64_t segment_length,
                  int64_t chunk, int64_t tile_rows, int64_t at_once) {
  const GuardForMaps guard(q.get_device_index());
  WidePass pass(k, v, q, k, log_decay, initial, segment_table, chunk_table, carry, states, scores, final, done,
                segment_length, chunk, tile_rows, at_once, false);
  pass.add(q, v, states, rounded_initial, scores, out, false, false, true, true);
  pass.run();
}

void wide_backward(const Tensor& grad_o, const Tensor& q, const Tensor& k, const Tensor& v,
                   const std::optional<Tensor>& log_decay, const std::optional<Tensor>& grad_final,
                   const std::optional<Tensor>& rounded_grad_final, const std::optional<Tensor>& rounded_initial,
                   const std::optional<Tensor>& segment_table, const std::optional<Tensor>& chunk_table,
                   const std::optional<Tensor>& carry, const std::optional<Tensor>& states, const Tensor& scores,
                   const std::optional<Tensor>& grad_states, const Tensor& grad_scores,
                   const std::optional<Tensor>& grad_initial, const Tensor& done, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv, int64_t segment_length, int64_t chunk, int64_t tile_rows, int64_t at_once) {
  const GuardForMaps guard(q.get_device_index());
  WidePass pass(q, grad_o, grad_o, v, log_decay, grad_final, segment_table, chunk_table, carry, grad_states,
                grad_scores, grad_initial, done, segment_length, chunk, tile_rows, at_once, true);
  pass.add(grad_o, k, states, rounded_initial, grad_scores, dq, true, false, false, true);
  pass.add(v, q, grad_states, rounded_grad_final, grad_scores, dk, true, true, true, true);
  pass.add(k, grad_o, grad_states, rounded_grad_final, scores, dv, false, true, true, false);
  pass.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transnormer_kernels, m) {
  m.def(
      "wide_forward(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial, Tensor? rounded_initial,"
      " Tensor? segment_table, Tensor? chunk_table, Tensor(a!)? carry, Tensor(b!)? states, Tensor(c!) scores,"
      " Tensor(d!)? final, Tensor(e!) done, Tensor(f!) out, int segment_length, int chunk, int tile_rows, int at_once)"
      " -> ()");
  m.def(
      "wide_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? grad_final,"
      " Tensor? rounded_grad_final, Tensor? rounded_initial, Tensor? segment_table, Tensor? chunk_table,"
      " Tensor(a!)? carry, Tensor? states, Tensor scores, Tensor(b!)? grad_states, Tensor(c!) grad_scores,"
      " Tensor(d!)? grad_initial, Tensor(e!) done, Tensor(f!) dq, Tensor(g!) dk, Tensor(h!) dv, int segment_length,"
      " int chunk, int tile_rows, int at_once) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transnormer_kernels, CUDA, m) {
  m.impl("wide_forward", TORCH_BOX(&wide_forward));
  m.impl("wide_backward", TORCH_BOX(&wide_backward));
}
