// The operators of masked attention as PyTorch sees them, and every check of what they are given; as `binding.cpp`.
#include <torch/csrc/stable/library.h>

#include "masked.h"
#include "masked_inputs.h"
#include "tensors.h"

namespace {

// A mask, or float32 tensor, (B or 1, heads, rows, columns) for the copy engine, in boxes of `rows` rows and the
// panels, of 128 bytes, of `columns` columns; else as `tiled`.
TiledTensor tiled_panels(const Tensor& x, const char* name, int64_t query_heads, int rows, int columns) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  const int64_t bytes = is_float ? 4 : 2, panel = 128 / bytes;
  check_heads(x, name, query_heads);
  CHECK(x.stride(3) == 1 || x.size(3) == 1, name, ": expected the last dim contiguous");
  TiledTensor tiled;
  tiled.batch = x.size(0) == 1 ? 0 : 1;
  tiled.group = query_heads / x.size(1);
  tiled.at_once = x.size(3) % panel == 0;
  const cuuint64_t panels = tiled.at_once ? x.size(3) / panel : 1;
  const cuuint64_t sizes[5] = {cuuint64_t(x.size(3)) / panels, cuuint64_t(x.size(2)), panels, cuuint64_t(x.size(1)),
                               cuuint64_t(x.size(0))};
  cuuint64_t strides[4] = {cuuint64_t(x.stride(2)) * bytes, 128, cuuint64_t(x.stride(1)) * bytes,
                           cuuint64_t(x.stride(0)) * bytes};
  for (int i = 0; i < 4; ++i) {
    if (sizes[i + 1] == 1) strides[i] = 128;  // of no meaning, but it must be a valid one
    CHECK(strides[i] > 0 && strides[i] % 16 == 0, name, ": expected strides of whole 16 bytes");
  }
  CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, ": expected 16-byte aligned");
  const cuuint32_t boxes = tiled.at_once ? columns / panel : 1;
  const cuuint32_t box[5] = {cuuint32_t(panel), cuuint32_t(rows), boxes, 1, 1};
  tiled.map = encode(name, x.data_ptr(), is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
                     sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
  return tiled;
}

// A tensor whose heads are `parts` each.
TiledTensor tiled_parts(const Tensor& x, const char* name, int64_t query_heads, int64_t parts, int width, int rows) {
  if (x.scalar_type() == ScalarType::Float) return tiled_panels(x, name, query_heads, rows, width);
  CHECK(x.size(1) % parts == 0, name, ": expected ", parts, " parts of each head");
  CHECK(parts == 1 || x.stride(1) != 0 || x.size(1) == 1, name, ": expected parts that differ");
  TiledTensor tensor = tiled(x, name, query_heads * parts, width, rows);
  const int64_t heads = x.size(1) / parts;
  CHECK(heads > 0 && query_heads % heads == 0, name, ": expected heads that divide ", query_heads, ", got ", heads);
  if (parts > 1) tensor.group = query_heads / heads;
  return tensor;
}

void masked_attend(const Tensor& x, const Tensor& y, const Tensor& z, const std::optional<Tensor>& second_x,
                   const Tensor& mask, const std::optional<Tensor>& used, const Tensor& out,
                   const std::optional<Tensor>& second_out, int64_t heads, int64_t shares, int64_t parts,
                   bool transposed) {
  const GuardForMaps guard(x.get_device_index());
  const ElementType type = element_type(x, "x");
  const bool tf32 = type == ElementType::kFloat32, is_float = tf32 || parts > 1;
  CHECK(parts == 1 || (parts == 3 && type == ElementType::kBfloat16), "parts: expected 1, or 3 of bfloat16, got ",
        parts);
  const bool float_mask = mask.scalar_type() == ScalarType::Float;
  check_same(mask, "mask", is_float || float_mask ? ScalarType::Float : x.scalar_type(), x);
  MaskedParams p{};
  p.number = second_x ? 2 : 1;
  CHECK(second_x.has_value() == second_out.has_value() && (p.number == 1 || !is_float),
        "second_x, second_out: expected both or none, and none of float32");
  CHECK(heads > 0 && shares > 0 && heads % shares == 0, "shares: expected a divisor of ", heads, ", got ", shares);
  p.batch = x.size(0), p.heads = heads, p.shares = shares, p.rows = x.size(2), p.columns = y.size(2);
  p.transposed = transposed;
  const int64_t z_width = z.size(tf32 ? 2 : 3), widest = std::max(y.size(3), z_width), width = widest <= 64 ? 64 : 128;
  CHECK(widest <= (is_float ? 64 : 128), "expected heads of at most ", is_float ? 64 : 128, ", got ", widest);
  const MaskedTile tile = masked_tile(width, p.number, parts, tf32, float_mask);
  const int rows = tile.groups * 64;
  const auto add = [&](int at, const Tensor& x, const Tensor& out, const char* x_name, const char* out_name,
                       int64_t depth, int64_t out_width) {
    check_same(x, x_name, y.scalar_type(), y);
    check_shape(x, x_name, {p.batch, x.size(1), p.rows, depth});
    p.problems[at].x = tiled_parts(x, x_name, heads, parts, width, rows);
    check_same(out, out_name, is_float ? ScalarType::Float : y.scalar_type(), y);
    check_shape(out, out_name, {p.batch, heads / shares, p.rows, out_width});
    CHECK(out.is_contiguous() && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0, out_name,
          ": expected contiguous, 16-byte aligned");
    p.problems[at].out = out.data_ptr(), p.problems[at].out_width = out_width;
  };
  add(0, x, out, "x", "out", y.size(3), z_width);
  if (second_x) add(1, *second_x, *second_out, "second_x", "second_out", z_width, y.size(3));
  check_same(z, "z", y.scalar_type(), y);
  check_shape(y, "y", {p.batch, y.size(1), p.columns, y.size(3)});
  CHECK(widest % 2 == 0, "expected even widths");
  check_shape(z, "z", {p.batch, z.size(1), tf32 ? z_width : p.columns, tf32 ? (p.columns + 7) / 8 * 8 : z_width});
  p.y = tiled_parts(y, "y", heads, parts, width, tile.columns);
  p.z =
      tf32 ? tiled_panels(z, "z", heads, width, tile.columns) : tiled_parts(z, "z", heads, parts, width, tile.columns);
  const int64_t mask_rows = transposed ? p.columns : p.rows, mask_columns = transposed ? p.rows : p.columns;
  check_shape(mask, "mask", {mask.size(0) == 1 ? 1 : p.batch, mask.size(1), mask_rows, mask_columns});
  p.mask = tiled_panels(mask, "mask", heads, transposed ? tile.columns : rows, transposed ? rows : tile.columns);
  if (used) {
    p.used_heads = mask.size(1), p.used_rows = (mask_rows + kMaskTile - 1) / kMaskTile;
    p.used_columns = (mask_columns + kMaskTile - 1) / kMaskTile;
    check_same(*used, "used", ScalarType::Byte, x);
    check_shape(*used, "used", {mask.size(0), mask.size(1), p.used_rows, p.used_columns});
    CHECK(used->is_contiguous(), "used: expected contiguous");
    p.used = static_cast<const uint8_t*>(used->data_ptr());
  }
  const int64_t units = int64_t(p.batch) * (heads / shares) * ((p.rows + rows - 1) / rows);
  CHECK(units < (int64_t(1) << 30), "too many pieces of work: ", units);
  if (units == 0) return;
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const cudaStream_t stream = stream_of(x);
  if (is_float)
    check_cuda(run_masked_float32(p, tf32, multiprocessors, stream));
  else if (type == ElementType::kBfloat16)
    check_cuda(run_masked_bfloat16(p, width, float_mask, multiprocessors, stream));
  else
    check_cuda(run_masked_float16(p, width, float_mask, multiprocessors, stream));
}

void prepare_mask(const Tensor& mask, const std::optional<Tensor>& copy, const std::optional<Tensor>& used) {
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  CHECK(mask.dim() == 4, "mask: expected 4 dims, got ", mask.dim());
  const bool of_bool = mask.scalar_type() == ScalarType::Bool;
  CHECK(!of_bool || copy, "copy: expected for a mask of bool");
  MaskParams p{};
  p.mask = mask.data_ptr();
  p.batch_stride = mask.stride(0), p.head_stride = mask.stride(1);
  p.row_stride = mask.stride(2), p.column_stride = mask.stride(3);
  p.heads = mask.size(1), p.rows = mask.size(2), p.columns = mask.size(3);
  p.entries = mask.size(0) * mask.size(1);
  const ElementType type = element_type(copy ? *copy : mask, copy ? "copy" : "mask");
  if (copy) {
    p.width = copy->size(3);
    check_same(*copy, "copy", of_bool ? copy->scalar_type() : mask.scalar_type(), mask);
    check_shape(*copy, "copy", {mask.size(0), mask.size(1), p.rows, std::max<int64_t>(p.width, p.columns)});
    CHECK(copy->is_contiguous(), "copy: expected contiguous");
    p.copy = copy->data_ptr();
  }
  p.in_pieces = !copy && p.column_stride == 1 && reinterpret_cast<uintptr_t>(p.mask) % 16 == 0;
  for (const int64_t stride : {p.batch_stride, p.head_stride, p.row_stride})
    p.in_pieces = p.in_pieces && stride * mask.element_size() % 16 == 0;
  const int64_t rows = (p.rows + kMaskTile - 1) / kMaskTile, columns = (p.columns + kMaskTile - 1) / kMaskTile;
  if (used) {
    check_same(*used, "used", ScalarType::Byte, mask);
    check_shape(*used, "used", {mask.size(0), mask.size(1), rows, columns});
    CHECK(used->is_contiguous(), "used: expected contiguous");
    p.used = static_cast<uint8_t*>(used->data_ptr());
  }
  CHECK(p.entries * rows * columns < (int64_t(1) << 31), "mask: too many tiles");
  if (p.entries * rows * columns > 0) check_cuda(run_mask(p, type, of_bool, stream_of(mask)));
}

void split(const Tensor& x, const Tensor& out, int64_t parts) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CHECK(parts == 2 || parts == 3, "parts: expected 2 or 3, got ", parts);
  check_same(x, "x", ScalarType::Float, x);
  SplitParams p{};
  p.x = view_of(x, "x", x.size(1));
  check_same(out, "out", ScalarType::BFloat16, x);
  check_shape(out, "out", {x.size(0), x.size(1) * parts, x.size(2), (x.size(3) + 7) / 8 * 8});
  CHECK(out.is_contiguous(), "out: expected contiguous");
  p.out = out.data_ptr();
  p.heads = x.size(1), p.tokens = x.size(2), p.width = x.size(3), p.padded = out.size(3), p.parts = parts;
  p.rows = int64_t(x.size(0)) * x.size(1) * x.size(2);
  CHECK(p.rows * p.padded / 8 < (int64_t(1) << 31), "x: too large");
  CHECK(reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0, "out: expected 16-byte aligned");
  check_cuda(run_split(p, stream_of(x)));
}

void turn(const Tensor& x, const std::optional<Tensor>& turned, const std::optional<Tensor>& rounded) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_same(x, "x", ScalarType::Float, x);
  TurnParams p{};
  p.x = view_of(x, "x", x.size(1));
  p.heads = x.size(1), p.tokens = x.size(2), p.width = x.size(3), p.padded = (p.tokens + 7) / 8 * 8;
  for (const int64_t whole : {p.x.batch, p.x.head, p.x.token, int64_t(p.width)})
    CHECK(whole % 4 == 0 && reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0, "x: expected rows of whole 16 bytes");
  const auto memory = [&](const Tensor& out, const char* name, int64_t rows, int64_t columns) {
    check_same(out, name, ScalarType::Float, x);
    check_shape(out, name, {x.size(0), p.heads, rows, columns});
    CHECK(out.is_contiguous() && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0, name,
          ": expected contiguous, 16-byte aligned");
    return static_cast<float*>(out.data_ptr());
  };
  if (turned) p.turned = memory(*turned, "turned", p.width, p.padded);
  if (rounded) p.rounded = memory(*rounded, "rounded", p.tokens, p.width);
  p.pairs = x.size(0) * x.size(1);
  CHECK(p.pairs * (p.padded / 64 + 1) * (p.width / 64 + 1) < (int64_t(1) << 31), "x: too large");
  check_cuda(run_turn(p, stream_of(x)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transnormer_kernels, m) {
  m.def(
      "masked_attend(Tensor x, Tensor y, Tensor z, Tensor? second_x, Tensor mask, Tensor? used, Tensor(a!) out,"
      " Tensor(b!)? second_out, int heads, int shares, int parts, bool transposed) -> ()");
  m.def("prepare_mask(Tensor mask, Tensor(a!)? copy, Tensor(b!)? used) -> ()");
  m.def("split(Tensor x, Tensor(a!) out, int parts) -> ()");
  m.def("turn(Tensor x, Tensor(a!)? turned, Tensor(b!)? rounded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transnormer_kernels, CUDA, m) {
  m.impl("masked_attend", TORCH_BOX(&masked_attend));
  m.impl("prepare_mask", TORCH_BOX(&prepare_mask));
  m.impl("split", TORCH_BOX(&split));
  m.impl("turn", TORCH_BOX(&turn));
}
