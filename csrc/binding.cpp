// The operators as PyTorch sees them, and every check of what they are given. Python allocates, these fill.
//
// PyTorch's stable ABI: one library serves all versions from 2.10 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "combine.h"
#include "step.h"
#include "tensors.h"
#include "unit_length.h"
#include "variants.h"

namespace {

// What all passes share. Returns the number of segments.
int64_t fill(PassParams& p, const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
             const std::optional<Tensor>& initial, const std::optional<Tensor>& table, int64_t heads,
             int64_t segment_length, bool reverse, Tile tile) {
  element_type(k, "k");
  check_same(v, "v", k.scalar_type(), k);
  CHECK(segment_length > 0 && segment_length % 64 == 0, "segment_length: expected a multiple of 64, got ",
        segment_length);
  p.batch = k.size(0), p.heads = heads, p.tokens = k.size(2), p.d = k.size(3), p.e = v.size(3);
  check_shape(v, "v", {p.batch, v.size(1), p.tokens, p.e});
  p.log_decay = log_decay_of(log_decay, k, heads);
  p.segment_length = segment_length;
  p.positions = p.segments = (p.tokens + segment_length - 1) / segment_length;
  int64_t slots = int64_t(p.batch) * p.segments;
  if (table) {
    check_same(*table, "table", ScalarType::Int, k);
    CHECK(table->dim() == 2 && table->size(1) == 4 && table->is_contiguous(), "table: expected (segments + 1, 4)");
    CHECK(p.batch == 1, "table: expected a batch of 1, got ", p.batch);
    p.table = static_cast<const Segment*>(table->data_ptr());
    slots = p.positions = table->size(0) - 1;
  }
  if (initial) p.initial = state_of(*initial, "initial", k, table ? 1 : p.batch, heads, p.d, p.e, &p.initial_strides);
  p.reverse = reverse;
  p.d_tiles = (p.d + tile.d - 1) / tile.d;
  p.e_tiles = (p.e + tile.e - 1) / tile.e;
  const int64_t blocks = slots * heads * p.d_tiles * p.e_tiles;
  CHECK(blocks < (int64_t(1) << 31), "too many segments: ", blocks, " blocks");
  return slots;
}

void check_two_bytes(const Tensor& k, bool expected) {
  CHECK((k.scalar_type() != ScalarType::Float) == expected, "k: expected ",
        expected ? "bfloat16 or float16" : "float32");
}

void plan(const Tensor& cu_seqlens, int64_t tokens, int64_t segment_length, int64_t whole, const Tensor& table) {
  CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.is_contiguous() && cu_seqlens.is_cuda(),
        "cu_seqlens: expected contiguous int32 on a GPU");
  check_same(table, "table", ScalarType::Int, cu_seqlens);
  CHECK(segment_length > 0, "segment_length: expected a number from 1, got ", segment_length);
  const int64_t sequences = cu_seqlens.numel() - 1, slots = table.size(0) - 1;
  CHECK(slots >= tokens / segment_length + sequences && table.is_contiguous() && table.size(1) == 4,
        "table: expected room for every segment");
  const torch::stable::accelerator::DeviceGuard guard(cu_seqlens.get_device_index());
  check_cuda(run_plan(static_cast<const int*>(cu_seqlens.data_ptr()), sequences, tokens, segment_length, whole,
                      static_cast<Segment*>(table.data_ptr()), slots, stream_of(cu_seqlens)));
}

void states_float32(const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
                    const std::optional<Tensor>& initial, const std::optional<Tensor>& table, const Tensor& carry,
                    int64_t heads, int64_t segment_length, bool reverse, bool exact) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  check_two_bytes(k, false);
  PassParams p{};
  const int64_t slots = fill(p, k, v, log_decay, initial, table, heads, segment_length, reverse, kFloat32Tile);
  p.k_view = view_of(k, "k", heads);
  p.v_view = view_of(v, "v", heads);
  p.carry = state_of(carry, "carry", k, 1, heads, p.d, p.e, &p.carry_strides);
  check_shape(carry, "carry", {int64_t(p.batch) * p.segments, heads, p.d, p.e});
  CHECK(carry.is_contiguous(), "carry: expected contiguous");
  const cudaStream_t stream = stream_of(k);
  check_cuda(run_pass_float32(p, false, exact, slots * heads * p.d_tiles * p.e_tiles, stream));
  check_cuda(run_scan(p, slots, stream));
}

void attend_float32(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
                    const std::optional<Tensor>& initial, const std::optional<Tensor>& table,
                    const std::optional<Tensor>& carry, const Tensor& out, const std::optional<Tensor>& final,
                    int64_t segment_length, bool reverse, bool exact) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  check_two_bytes(k, false);
  PassParams p{};
  const int64_t heads = out.size(out.dim() - 3);
  const int64_t slots = fill(p, k, v, log_decay, initial, table, heads, segment_length, reverse, kFloat32Tile);
  check_same(q, "q", k.scalar_type(), k);
  check_shape(q, "q", {p.batch, q.size(1), p.tokens, p.d});
  p.q_view = view_of(q, "q", heads);
  p.k_view = view_of(k, "k", heads);
  p.v_view = view_of(v, "v", heads);
  CHECK(carry.has_value() == (p.segments > 1), "carry: expected with more than one segment");
  if (carry) {
    p.carry = state_of(*carry, "carry", k, 1, heads, p.d, p.e, &p.carry_strides);
    check_shape(*carry, "carry", {int64_t(p.batch) * p.segments, heads, p.d, p.e});
  }
  check_same(out, "out", ScalarType::Float, k);
  CHECK(out.is_contiguous(), "out: expected contiguous");
  if (out.dim() == 5) {
    check_shape(out, "out", {p.d_tiles, p.batch, heads, p.tokens, p.e});
    p.partial = static_cast<float*>(out.data_ptr());
  } else {
    check_shape(out, "out", {p.batch, heads, p.tokens, p.e});
    CHECK(p.d_tiles == 1, "out: expected parts");
    p.out = out.data_ptr();
  }
  if (final) p.final = state_of(*final, "final", k, table ? 1 : p.batch, heads, p.d, p.e, &p.final_strides);
  check_cuda(run_pass_float32(p, true, exact, slots * heads * p.d_tiles * p.e_tiles, stream_of(k)));
}

// Lengths of vectors: kept where the output is made, if asked for, and read where gradients are, of rows (`of_rows` may
// be null) and columns.
void fill_lengths(PassParams& p, const Tensor* of_rows, const Tensor& of_columns, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& columns) {
  const bool read = p.norm == Norm::kKept || p.norm == Norm::kValues;
  CHECK(columns.has_value() || !read, "column_lengths: expected where they are read");
  CHECK(rows.has_value() == (columns && of_rows != nullptr), "row_lengths: expected with column_lengths, of rows");
  if (!columns) return;
  CHECK(p.norm != Norm::kNone, "row_lengths, column_lengths: expected only with a norm");
  const int64_t tokens = (p.tokens + 3) / 4 * 4;  // rows of whole 16 bytes
  const auto check = [&](const Tensor& x, const char* name, const Tensor& of) {
    check_same(x, name, ScalarType::Float, of);
    check_shape(x, name, {of.size(0), of.size(1), tokens});
    CHECK(x.is_contiguous(), name, ": expected contiguous");
  };
  check(*columns, "column_lengths", of_columns);
  p.column_lengths = tiled_lengths(*columns, "column_lengths", p.tokens, read ? kLengthsAtOnce : 64);
  if (rows) {
    check(*rows, "row_lengths", *of_rows);
    p.row_lengths = tiled_lengths(*rows, "row_lengths", p.tokens, read ? kLengthsAtOnce : 64);
    p.kept_rows = static_cast<float*>(rows->data_ptr());
  }
  p.kept_columns = static_cast<float*>(columns->data_ptr());
  p.kept_stride = tokens;
  p.kept_group = p.heads / of_columns.size(1);
  p.keeps = !read;
}

void attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& x,
            const std::optional<Tensor>& row_lengths, const std::optional<Tensor>& column_lengths,
            const std::optional<Tensor>& log_decay, const std::optional<Tensor>& initial,
            const std::optional<Tensor>& table, const std::optional<Tensor>& chain, const std::optional<Tensor>& counts,
            const Tensor& out, const std::optional<Tensor>& out_of_k, const std::optional<Tensor>& final,
            int64_t segment_length, bool reverse, int64_t norm) {
  const GuardForMaps guard(k.get_device_index());
  check_two_bytes(k, true);
  const Tile tile = tile_of(k.size(3), v.size(3));
  PassParams p{};
  const bool both = out_of_k.has_value();
  CHECK(x || !both, "x: expected where it is used");
  CHECK(out.dim() == 4, "out: expected 4 dims, got ", out.dim());
  const int64_t heads = both ? x->size(1) : out.size(1);
  p.outputs = !both ? Outputs::kOne : out.size(1) == heads ? Outputs::kBoth : Outputs::kSums;
  const int64_t out_heads = p.outputs == Outputs::kSums ? heads / 2 : heads;
  CHECK(p.outputs != Outputs::kSums || (heads % 2 == 0 && tile.d == 128 && !table && !chain),
        "out: expected as many heads as x has, or half of an even number for whole sequences in tiles of 128");
  const int64_t slots = fill(p, k, v, log_decay, initial, table, heads, segment_length, reverse, tile);
  CHECK(p.d_tiles == 1, "k: expected at most ", tile.d, " wide, got ", p.d);
  check_same(q, "q", k.scalar_type(), k);
  check_shape(q, "q", {p.batch, q.size(1), p.tokens, p.d});
  p.q = tiled(q, "q", heads, tile.d);
  p.k = tiled(k, "k", heads, tile.d);
  p.v = tiled(v, "v", heads, tile.e);
  CHECK(p.outputs != Outputs::kSums || (heads / k.size(1) % 2 == 0 && heads / v.size(1) % 2 == 0),
        "k, v: expected an even number of heads of out for each");
  CHECK(norm >= 0 && norm <= int(Norm::kValues), "norm: expected 0 to 3, got ", norm);
  p.norm = Norm(norm);
  const bool late = p.norm == Norm::kValues && tile.d == tile.e;  // Variant::kLate
  CHECK(p.norm != Norm::kValues || !late || p.e_tiles == 1, "norm: expected vectors no wider than a tile");
  CHECK(x.has_value() == (both || late), "x: expected where it is used");
  if (x) {
    check_same(*x, "x", k.scalar_type(), k);
    check_shape(*x, "x", {p.batch, heads, p.tokens, p.e});
    p.x = tiled(*x, "x", heads, tile.e);
  }
  if (p.norm == Norm::kValues)
    fill_lengths(p, late ? &*x : nullptr, v, row_lengths, column_lengths);
  else
    fill_lengths(p, both ? &k : &q, both ? q : k, row_lengths, column_lengths);
  check_same(out, "out", k.scalar_type(), k);
  check_shape(out, "out", {p.batch, out_heads, p.tokens, p.e});
  CHECK(out.is_contiguous(), "out: expected contiguous");
  p.out = out.data_ptr();
  p.out_tiles = tiled(out, "out", heads, tile.e);
  if (both) {
    check_same(*out_of_k, "out_of_k", k.scalar_type(), k);
    check_shape(*out_of_k, "out_of_k", {p.batch, out_heads, p.tokens, p.d});
    CHECK(out_of_k->is_contiguous() && p.e_tiles == 1, "out_of_k: expected contiguous, and one tile");
    p.out_of_k = out_of_k->data_ptr();
    p.out_of_k_tiles = tiled(*out_of_k, "out_of_k", heads, tile.d);
  }
  const int64_t chains = (table ? 1 : p.batch) * heads * p.e_tiles;
  CHECK(chain.has_value() == (p.segments > 1) && counts.has_value() == chain.has_value(),
        "chain, counts: expected with more than one segment");
  if (chain) {
    check_same(*chain, "chain", ScalarType::Float, k);
    check_same(*counts, "counts", ScalarType::Int, k);
    CHECK(chain->is_contiguous() && chain->numel() == chains * 2 * tile.d * tile.e,
          "chain: expected two states a chain");
    CHECK(counts->is_contiguous() && counts->numel() == chains * 4 + 1, "counts: expected 4 a chain, and one");
    p.chain = static_cast<float*>(chain->data_ptr());
    p.counts = static_cast<int*>(counts->data_ptr());
    p.ticket = p.counts + chains * 4;
  }
  if (final) p.final = state_of(*final, "final", k, table ? 1 : p.batch, heads, p.d, p.e, &p.final_strides);
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, k.get_device_index()));
  const int pieces = slots * heads * p.e_tiles;
  const cudaStream_t stream = stream_of(k);
  if (k.scalar_type() == ScalarType::BFloat16)
    check_cuda(run_pass_bfloat16(p, tile, pieces, multiprocessors, stream));
  else
    check_cuda(run_pass_float16(p, tile, pieces, multiprocessors, stream));
}

void decay_gradient(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                    const std::optional<Tensor>& initial, const std::optional<Tensor>& table, const Tensor& grad_o,
                    const std::optional<Tensor>& grad_state, const Tensor& parts, bool exact) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const int64_t heads = q.size(1), length = (q.size(2) + 63) / 64 * 64;
  PassParams p{};
  const int64_t slots = fill(p, k, v, log_decay, initial, table, heads, length, false, kFloat32Tile);
  p.k_view = view_of(k, "k", heads);
  p.v_view = view_of(v, "v", heads);
  check_same(q, "q", k.scalar_type(), k);
  check_shape(q, "q", {p.batch, heads, p.tokens, p.d});
  p.q_view = view_of(q, "q", heads);
  check_same(grad_o, "grad_o", k.scalar_type(), k);
  check_shape(grad_o, "grad_o", {p.batch, heads, p.tokens, p.e});
  p.grad_view = view_of(grad_o, "grad_o", heads);
  if (grad_state)
    p.final_grad = state_of(*grad_state, "grad_state", k, table ? 1 : p.batch, heads, p.d, p.e, &p.final_strides);
  const int64_t tiles = int64_t(p.d_tiles) * p.e_tiles;
  check_same(parts, "parts", ScalarType::Float, k);
  check_shape(parts, "parts", {slots, heads, tiles});
  CHECK(parts.is_contiguous(), "parts: expected contiguous");
  p.partial = static_cast<float*>(parts.data_ptr());
  check_cuda(run_decay_gradient(p, element_type(k, "k"), exact, slots * heads * tiles, stream_of(k)));
}

void combine(const Tensor& parts, int64_t dim, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const ElementType type = element_type(out, "out");
  check_same(parts, "parts", out.scalar_type(), out);
  CHECK(dim >= 0 && dim < parts.dim() && parts.dim() == out.dim() + 1, "parts: expected one dim more than out has");
  CombineParams p{parts.data_ptr(), out.data_ptr(), 1, 1, int(parts.size(dim))};
  for (int64_t i = 0; i < out.dim(); ++i) {
    CHECK(parts.size(i + (i >= dim)) == out.size(i), "parts: expected the sizes of out");
    (i < dim ? p.outer : p.inner) *= out.size(i);
  }
  CHECK(parts.is_contiguous() && out.is_contiguous(), "parts, out: expected contiguous");
  const bool aligned = (reinterpret_cast<uintptr_t>(p.parts) | reinterpret_cast<uintptr_t>(p.out)) % 16 == 0;
  CHECK(type == ElementType::kFloat32 || (p.inner % 8 == 0 && aligned),
        "parts, out: expected 16-byte aligned, and parts of whole 16 bytes");
  check_cuda(run_combine(p, type, stream_of(out)));
}

void unit_length(const Tensor& x, const std::optional<Tensor>& grad, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  UnitLengthParams p{};
  p.x = view_of(x, "x", x.size(1));
  if (grad) {
    check_same(*grad, "grad", x.scalar_type(), x);
    check_shape(*grad, "grad", {x.size(0), x.size(1), x.size(2), x.size(3)});
    p.grad = view_of(*grad, "grad", x.size(1));
  }
  CHECK(x.size(3) <= 2048, "x: expected at most 2048 wide, got ", x.size(3));
  check_same(out, "out", x.scalar_type(), x);
  check_shape(out, "out", {x.size(0), x.size(1), x.size(2), x.size(3)});
  CHECK(out.is_contiguous(), "out: expected contiguous");
  p.out = out.data_ptr();
  p.pairs = x.size(0) * x.size(1), p.heads = x.size(1), p.tokens = x.size(2), p.width = x.size(3);
  CHECK(p.pairs * ((int64_t(p.tokens) + 7) / 8) < int64_t(1) << 31, "x: too many vectors");
  check_cuda(run_unit_length(p, element_type(x, "x"), stream_of(x)));
}

void step(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
          const Tensor& state, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  StepParams p{};
  p.batch = q.size(0), p.heads = q.size(1), p.d = q.size(3), p.e = v.size(3);
  const ElementType type = element_type(q, "q");
  check_shape(q, "q", {p.batch, p.heads, 1, p.d});
  check_shape(k, "k", {p.batch, k.size(1), 1, p.d});
  check_shape(v, "v", {p.batch, v.size(1), 1, p.e});
  check_same(k, "k", q.scalar_type(), q);
  check_same(v, "v", q.scalar_type(), q);
  CHECK(q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1, "q, k, v: expected the last dim contiguous");
  check_heads(k, "k", p.heads);
  check_heads(v, "v", p.heads);
  check_same(state, "state", ScalarType::Float, q);
  check_shape(state, "state", {p.batch, p.heads, p.d, p.e});
  check_same(out, "out", q.scalar_type(), q);
  check_shape(out, "out", {p.batch, p.heads, 1, p.e});
  CHECK(state.is_contiguous() && out.is_contiguous(), "state, out: expected contiguous");
  CHECK(reinterpret_cast<uintptr_t>(state.data_ptr()) % 16 == 0, "state: expected 16-byte aligned");
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.out = out.data_ptr();
  p.q_batch = q.stride(0), p.q_head = q.stride(1);
  p.k_batch = k.stride(0), p.k_head = k.stride(1), p.k_group = p.heads / k.size(1);
  p.v_batch = v.stride(0), p.v_head = v.stride(1), p.v_group = p.heads / v.size(1);
  p.log_decay = log_decay_of(log_decay, q, p.heads);
  p.state = static_cast<float*>(state.data_ptr());
  check_cuda(run_step(p, type, stream_of(q)));
}

}  // namespace

STABLE_TORCH_LIBRARY(transnormer_kernels, m) {
  m.def("plan(Tensor cu_seqlens, int tokens, int segment_length, int whole, Tensor(a!) table) -> ()");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor? x, Tensor(a!)? row_lengths, Tensor(b!)? column_lengths,"
      " Tensor? log_decay, Tensor? initial, Tensor? table, Tensor(c!)? chain, Tensor(d!)? counts, Tensor(e!) out,"
      " Tensor(f!)? out_of_k, Tensor(g!)? final, int segment_length, bool reverse, int norm) -> ()");
  m.def(
      "states_float32(Tensor k, Tensor v, Tensor? log_decay, Tensor? initial, Tensor? table, Tensor(a!) carry,"
      " int heads, int segment_length, bool reverse, bool exact) -> ()");
  m.def(
      "attend_float32(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial, Tensor? table, Tensor? carry,"
      " Tensor(a!) out, Tensor(b!)? final, int segment_length, bool reverse, bool exact) -> ()");
  m.def(
      "decay_gradient(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? initial, Tensor? table, Tensor grad_o,"
      " Tensor? grad_state, Tensor(a!) parts, bool exact) -> ()");
  m.def("combine(Tensor parts, int dim, Tensor(a!) out) -> ()");
  m.def("unit_length(Tensor x, Tensor? grad, Tensor(a!) out) -> ()");
  m.def("step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transnormer_kernels, CUDA, m) {
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("states_float32", TORCH_BOX(&states_float32));
  m.impl("attend_float32", TORCH_BOX(&attend_float32));
  m.impl("decay_gradient", TORCH_BOX(&decay_gradient));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("unit_length", TORCH_BOX(&unit_length));
  m.impl("step", TORCH_BOX(&step));
}
