// Tensors of PyTorch as kernels are told of them, each checked: strides, states, maps for the copy engine. For
// the bindings alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>

#include <cuda.h>
#include <cuda_runtime.h>

#include "params.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline void check_cuda(cudaError_t error) { CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// The guard alone does nothing where the device is this thread's already, as the first one is of a new thread; but maps
// are made by the driver, which needs the context that the other call makes.
namespace {
struct GuardForMaps : torch::stable::accelerator::DeviceGuard {
  explicit GuardForMaps(int device) : DeviceGuard(device) { check_cuda(cudaSetDevice(device)); }
};
}  // namespace

inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline ElementType element_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBfloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
  return ElementType::kFloat32;
}

inline void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> expected) {
  bool same = x.dim() == int64_t(expected.size());
  int dim = 0;
  for (const int64_t size : expected) same = same && x.size(dim++) == size;
  std::string got, wanted;
  for (int64_t i = 0; i < x.dim(); ++i) got += std::to_string(x.size(i)) + " ";
  for (const int64_t size : expected) wanted += std::to_string(size) + " ";
  CHECK(same, name, ": expected shape ", wanted, "got ", got);
}

inline void check_same(const Tensor& x, const char* name, ScalarType type, const Tensor& like) {
  CHECK(x.scalar_type() == type, name, ": expected ",
        type == ScalarType::Float ? "float32"
        : type == ScalarType::Int ? "int32"
                                  : "the type of the others");
  CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, ": expected on the device of the others");
}

inline void check_heads(const Tensor& x, const char* name, int64_t query_heads) {
  CHECK(x.size(1) > 0 && query_heads % x.size(1) == 0, name, ": expected heads that divide ", query_heads, ", got ",
        x.size(1));
}

inline const float* log_decay_of(const std::optional<Tensor>& log_decay, const Tensor& like, int64_t heads) {
  if (!log_decay) return nullptr;
  check_same(*log_decay, "log_decay", ScalarType::Float, like);
  check_shape(*log_decay, "log_decay", {heads});
  CHECK(log_decay->is_contiguous(), "log_decay: expected contiguous");
  return static_cast<const float*>(log_decay->data_ptr());
}

inline decltype(&cuTensorMapEncodeTiled) find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  CHECK(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// A map of 5 dims, of whose last 4 strides are given, in bytes.
inline CUtensorMap encode(const char* name, void* data, CUtensorMapDataType type, const cuuint64_t (&sizes)[5],
                          const cuuint64_t (&strides)[4], const cuuint32_t (&box)[5], CUtensorMapSwizzle swizzle) {
  static const auto function = find_encode();
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = function(&map, type, 5, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(result == CUDA_SUCCESS, name, ": no tensor map, error ", int(result));
  return map;
}

// A (B, heads, T, width) tensor for the copy engine, in boxes of `rows` tokens and the panels of a tile `columns` wide,
// or of one panel where a panel would end beyond the tensor's width. A dim that is expanded has one entry: `batch`
// becomes 0, and `group` all query heads.
inline TiledTensor tiled(const Tensor& x, const char* name, int64_t query_heads, int columns, cuuint32_t rows = 64) {
  CHECK(x.dim() == 4, name, ": expected 4 dims, got ", x.dim());
  CHECK(x.size(3) % 8 == 0 && x.size(3) > 0, name, ": expected a width that 8 divides, got ", x.size(3));
  CHECK(x.stride(3) == 1, name, ": expected the last dim contiguous");
  check_heads(x, name, query_heads);
  const bool one_row = x.stride(0) == 0 || x.size(0) == 1, one_head = x.stride(1) == 0 || x.size(1) == 1;
  TiledTensor tiled;
  tiled.batch = one_row ? 0 : 1;
  tiled.group = one_head ? query_heads : query_heads / x.size(1);
  tiled.at_once = x.size(3) % 64 == 0;
  const cuuint64_t panels = tiled.at_once ? x.size(3) / 64 : 1;
  const cuuint64_t sizes[5] = {cuuint64_t(x.size(3)) / panels, cuuint64_t(x.size(2)), panels,
                               one_head ? 1 : cuuint64_t(x.size(1)), one_row ? 1 : cuuint64_t(x.size(0))};
  cuuint64_t strides[4] = {cuuint64_t(x.stride(2)) * 2, 64 * 2, cuuint64_t(x.stride(1)) * 2,
                           cuuint64_t(x.stride(0)) * 2};
  for (int i = 0; i < 4; ++i) {
    if (sizes[i + 1] == 1) strides[i] = sizes[0] * 2;  // of no meaning, but it must be a valid one
    CHECK(strides[i] > 0 && strides[i] % 16 == 0, name, ": expected strides of whole 16 bytes");
  }
  CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, ": expected 16-byte aligned");
  const cuuint32_t box[5] = {64, rows, tiled.at_once ? cuuint32_t(columns / 64) : 1, 1, 1};
  tiled.map =
      encode(name, x.data_ptr(), CU_TENSOR_MAP_DATA_TYPE_UINT16, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
  return tiled;
}

// Lengths (B, heads, T or a few more), `at_once` of them.
inline CUtensorMap tiled_lengths(const Tensor& x, const char* name, int tokens, cuuint32_t at_once) {
  const cuuint64_t row = x.size(2) * 4, heads = x.size(1);
  return encode(name, x.data_ptr(), CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                {cuuint64_t(tokens), 1, 1, heads, cuuint64_t(x.size(0))}, {row, row, row, row * heads},
                {at_once, 1, 1, 1, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// The same for the kernels that read memory by themselves.
inline View view_of(const Tensor& x, const char* name, int64_t query_heads) {
  CHECK(x.dim() == 4 && x.stride(3) == 1, name, ": expected 4 dims, the last one contiguous");
  check_heads(x, name, query_heads);
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), int(query_heads / x.size(1))};
}

// `rows`: sequences, at least.
inline float* state_of(const Tensor& x, const char* name, const Tensor& like, int64_t rows, int64_t heads, int64_t d,
                       int64_t e, StateStrides* strides) {
  check_same(x, name, ScalarType::Float, like);
  check_shape(x, name, {std::max(x.size(0), rows), heads, d, e});
  *strides = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  return static_cast<float*>(x.data_ptr());
}
