// Masked attention of wide heads and the gradient of masks as PyTorch sees them, and every check of what they are
// given; as `binding.cpp`.
#include <torch/csrc/stable/library.h>

#include "mask_gradient.h"
#include "masked_wide.h"
#include "tensors.h"

namespace {

constexpr int64_t kMostUnits = int64_t(1) << 31;
constexpr int kColumns = 64;  // of a panel

// Operands (B, heads × parts, tokens, width) of a call, whose first one names their type, device and batch.
struct Operands {
  const Tensor& like;
  int64_t heads, parts;

  Operands(const Tensor& like, int64_t heads, int64_t parts) : like(like), heads(heads), parts(parts) {
    const bool bfloat16 = like.scalar_type() == ScalarType::BFloat16;
    CHECK(bfloat16 || like.scalar_type() == ScalarType::Half, "expected bfloat16 or float16");
    CHECK(parts == 1 || (bfloat16 && (parts == 2 || parts == 3)), "parts: expected 1, or 2 or 3 of bfloat16, got ",
          parts);
    CHECK(heads > 0, "heads: expected a number from 1, got ", heads);
  }
  // For the copy engine, in boxes of `rows` tokens and `columns`.
  TiledTensor tiled(const Tensor& x, const char* name, int64_t tokens, int64_t width, int columns, int rows) const {
    check_same(x, name, like.scalar_type(), like);
    check_shape(x, name, {like.size(0), x.size(1), tokens, width});
    CHECK(parts == 1 || (x.is_contiguous() && x.size(1) % parts == 0), name, ": expected contiguous, of whole parts");
    return ::tiled(x, name, heads * parts, columns, rows);
  }
  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()));
    return count;
  }
  bool is_bfloat16() const { return like.scalar_type() == ScalarType::BFloat16; }
};

WideTile tile_of(int64_t columns, int64_t parts) {
  for (const WideTile tile : {kSquareTile, kLongTile, kPartsTile})
    if (columns == tile.columns && (parts > 1) == (columns == kPartsTile.columns)) return tile;
  CHECK(false, "tile_columns: expected ", kPartsTile.columns, " for parts, else ", kSquareTile.columns, " or ",
        kLongTile.columns, ", got ", columns);
  return kLongTile;
}

int tiles_of(int64_t length, int tile) { return (length + tile - 1) / tile; }

// Scores (pairs, parts, rows, width) of a slab that begins with a pair, a query and a key of so many.
Slab slab_of(const Tensor& scores, const char* name, const Operands& of, int64_t pair, int64_t row, int64_t key,
             int64_t queries, int64_t keys) {
  check_same(scores, name, of.like.scalar_type(), of.like);
  check_shape(scores, name, {scores.size(0), of.parts, scores.size(2), scores.size(3)});
  CHECK(scores.is_contiguous() && scores.size(3) % 8 == 0 && reinterpret_cast<uintptr_t>(scores.data_ptr()) % 16 == 0,
        name, ": expected contiguous, of rows of 16 bytes");
  Slab slab{};
  slab.pair = pair, slab.pairs = scores.size(0), slab.row = row, slab.rows = scores.size(2), slab.key = key;
  slab.width = scores.size(3), slab.keys = std::min<int64_t>(slab.width, keys - key);
  CHECK(pair >= 0 && slab.pairs > 0 && pair + slab.pairs <= of.like.size(0) * of.heads, name,
        ": expected pairs of batch and head");
  CHECK(row >= 0 && row % 64 == 0 && slab.rows > 0 && row + slab.rows <= queries, name, ": expected some queries");
  CHECK(key >= 0 && key % 64 == 0 && slab.keys > 0 && slab.width < slab.keys + 8, name, ": expected some keys");
  CHECK(row + slab.rows == queries || slab.rows % 64 == 0, name, ": expected a multiple of 64 queries, or the last");
  CHECK(key + slab.keys == keys || slab.keys % 64 == 0, name, ": expected a multiple of 64 keys, or the last");
  const bool whole = slab.rows == queries && slab.keys == keys;
  CHECK(whole || slab.pairs == 1, name, ": expected whole pairs, or a part of one");
  return slab;
}

// Whether the copy engine can read a mask.
bool fits_boxes(const Tensor& mask) {
  for (int dim = 0; dim < 3; ++dim)
    if (mask.size(dim) > 1 && (mask.stride(dim) % 8 != 0 || (dim == 2 && mask.stride(dim) == 0))) return false;
  return mask.size(3) % 8 == 0 && mask.stride(3) == 1 && reinterpret_cast<uintptr_t>(mask.data_ptr()) % 16 == 0;
}

void fill_mask(MaskedScoresParams& p, const Tensor& mask, const Operands& of, WideTile tile) {
  const ScalarType type = mask.scalar_type();
  CHECK(type == ScalarType::Bool || type == ScalarType::Float || (of.parts == 1 && type == of.like.scalar_type()),
        "mask: expected bool, float32 or the type of the others");
  CHECK(mask.is_cuda() && mask.get_device_index() == of.like.get_device_index(),
        "mask: expected on the device of the others");
  CHECK(mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == of.like.size(0)) &&
            (mask.size(1) == 1 || mask.size(1) == of.heads),
        "mask: expected (B or 1, H or 1, queries, keys)");
  p.queries = mask.size(2), p.keys = mask.size(3);
  p.mask.data = mask.data_ptr();
  p.mask.batch = mask.size(0) == 1 ? 0 : mask.stride(0), p.mask.head = mask.size(1) == 1 ? 0 : mask.stride(1);
  p.mask.row = mask.stride(2), p.mask.column = mask.stride(3);
  p.mask.type = type == ScalarType::Bool    ? MaskType::kBool
                : type == ScalarType::Float ? MaskType::kFloat32
                                            : MaskType::kTwoBytes;
  const auto even = [](int64_t x) { return x % 2 == 0; };
  p.mask.in_pairs = p.mask.column == 1 && even(p.keys) && even(p.mask.row) && even(p.mask.head) && even(p.mask.batch) &&
                    reinterpret_cast<uintptr_t>(p.mask.data) % (2 * mask.element_size()) == 0;
  p.has_boxes = p.mask.type == MaskType::kTwoBytes && fits_boxes(mask);
  if (p.has_boxes) p.mask_boxes = tiled(mask, "mask", of.heads, kColumns, tile.rows);
}

void masked_scores(const std::optional<Tensor>& q, const std::optional<Tensor>& k, const std::optional<Tensor>& grad_o,
                   const std::optional<Tensor>& v, const Tensor& mask, const std::optional<Tensor>& p_scores,
                   const std::optional<Tensor>& a_scores, int64_t heads, int64_t parts, int64_t pair, int64_t row,
                   int64_t key, int64_t tile_columns) {
  const GuardForMaps guard(mask.get_device_index());
  CHECK(q.has_value() == p_scores.has_value() && k.has_value() == p_scores.has_value(), "p: expected with q and k");
  CHECK(grad_o.has_value() == a_scores.has_value() && v.has_value() == a_scores.has_value(),
        "a: expected with grad_o and v");
  CHECK(p_scores || a_scores, "expected p, a or both");
  const Operands of(p_scores ? *q : *grad_o, heads, parts);
  const WideTile tile = tile_of(tile_columns, parts);
  MaskedScoresParams p{};
  p.heads = heads, p.parts = parts;
  fill_mask(p, mask, of, tile);
  const auto add = [&](const Tensor& rows, const Tensor& columns, const Tensor& scores, const char* name) {
    MaskedScores& to = p.scores[p.number];
    to.depth = rows.size(3);
    to.rows = of.tiled(rows, name, p.queries, to.depth, kColumns, tile.rows);
    to.columns = of.tiled(columns, name, p.keys, to.depth, kColumns, tile.columns);
    const Slab slab = slab_of(scores, name, of, pair, row, key, p.queries, p.keys);
    CHECK(p.number == 0 || (slab.pairs == p.slab.pairs && slab.rows == p.slab.rows && slab.width == p.slab.width),
          "p, a: expected one shape");
    p.slab = slab;
    to.out = scores.data_ptr();
    ++p.number;
  };
  if (p_scores) add(*q, *k, *p_scores, "q, k, p");
  if (a_scores) add(*grad_o, *v, *a_scores, "grad_o, v, a");
  p.row_tiles = tiles_of(p.slab.rows, tile.rows), p.column_tiles = tiles_of(p.slab.width, tile.columns);
  p.units = int64_t(p.number) * p.slab.pairs * p.row_tiles * p.column_tiles;
  CHECK(p.units < kMostUnits, "too many pieces of work: ", p.units);
  const cudaStream_t stream = stream_of(mask);
  check_cuda(of.is_bfloat16() ? run_masked_scores_bfloat16(p, tile, of.multiprocessors(), stream)
                              : run_masked_scores_float16(p, tile, of.multiprocessors(), stream));
}

// out (B, H, length, width) = scores w, or scoresᵀ w.
struct Product {
  const std::optional<Tensor>&scores, &w, &out, &sums;
  bool transposed;
};

void masked_products(const std::optional<Tensor>& p_scores, const std::optional<Tensor>& a_scores,
                     const std::optional<Tensor>& q, const std::optional<Tensor>& k,
                     const std::optional<Tensor>& grad_o, const std::optional<Tensor>& dq,
                     const std::optional<Tensor>& dk, const std::optional<Tensor>& dv,
                     const std::optional<Tensor>& dq_sums, const std::optional<Tensor>& dk_sums,
                     const std::optional<Tensor>& dv_sums, int64_t parts, int64_t pair, int64_t row, int64_t key,
                     int64_t tile_columns) {
  CHECK(dq || dk || dv, "expected dq, dk or dv");
  const Tensor& some = dq ? *dq : dk ? *dk : *dv;
  const GuardForMaps guard(some.get_device_index());
  const WideTile tile = tile_of(tile_columns, parts);
  MaskedProductsParams p{};
  p.heads = some.size(1), p.parts = parts, p.pair = pair;
  const std::optional<Tensor>& first = dq ? k : dk ? q : grad_o;
  CHECK(first, "expected what scores weigh");
  const Operands of(*first, p.heads, parts);
  int64_t tiles = 0;
  const auto add = [&](const Product& x, const char* name) {
    if (!x.out) return;
    CHECK(x.scores && x.w, name, ": expected with its scores and what they weigh");
    MaskedProduct& to = p.products[p.number++];
    const int64_t length = x.out->size(2), tokens = x.w->size(2);
    const Slab slab = x.transposed ? slab_of(*x.scores, name, of, pair, row, key, tokens, length)
                                   : slab_of(*x.scores, name, of, pair, row, key, length, tokens);
    CHECK(p.pairs == 0 || slab.pairs == p.pairs, name, ": expected as many pairs as the others");
    p.pairs = slab.pairs;
    to.width = x.w->size(3), to.length = length, to.transposed = x.transposed;
    to.scores = tiled(*x.scores, name, parts, x.transposed ? tile.rows : kColumns, x.transposed ? 64 : tile.rows);
    to.w = of.tiled(*x.w, name, tokens, to.width, tile.columns, 64);
    check_same(*x.out, name, parts == 1 ? of.like.scalar_type() : ScalarType::Float, of.like);
    check_shape(*x.out, name, {of.like.size(0), p.heads, length, to.width});
    CHECK(x.out->is_contiguous() && reinterpret_cast<uintptr_t>(x.out->data_ptr()) % 16 == 0, name,
          ": expected contiguous and 16-byte aligned");
    to.out = x.out->data_ptr();
    to.first = x.transposed ? slab.key : slab.row, to.rows = x.transposed ? slab.keys : slab.rows;
    to.token = x.transposed ? slab.row : slab.key, to.tokens = x.transposed ? slab.rows : slab.keys;
    to.begins = to.token == 0, to.ends = to.token + to.tokens == tokens;
    to.row_tiles = tiles_of(to.rows, tile.rows), to.column_tiles = tiles_of(to.width, tile.columns);
    tiles += int64_t(to.row_tiles) * to.column_tiles;
    if (to.begins && to.ends) return;
    CHECK(x.sums, name, ": expected sums where slabs add to each other");
    check_same(*x.sums, name, ScalarType::Float, of.like);
    CHECK(x.sums->is_contiguous() && reinterpret_cast<uintptr_t>(x.sums->data_ptr()) % 16 == 0 &&
              x.sums->numel() >= int64_t(to.row_tiles) * to.column_tiles * tile.rows * tile.columns,
          name, ": expected sums of whole tiles");
    to.sums = static_cast<float*>(x.sums->data_ptr());
  };
  add({a_scores, k, dq, dq_sums, false}, "a, k, dq");
  add({a_scores, q, dk, dk_sums, true}, "a, q, dk");
  add({p_scores, grad_o, dv, dv_sums, true}, "p, grad_o, dv");
  p.units = p.pairs * tiles;
  CHECK(p.units < kMostUnits, "too many pieces of work: ", p.units);
  const cudaStream_t stream = stream_of(some);
  check_cuda(of.is_bfloat16() ? run_masked_products_bfloat16(p, tile, of.multiprocessors(), stream)
                              : run_masked_products_float16(p, tile, of.multiprocessors(), stream));
}

void mask_gradient(const Tensor& q, const Tensor& k, const Tensor& grad_o, const Tensor& v, const Tensor& out,
                   const std::optional<Tensor>& partial, int64_t heads, int64_t parts) {
  const GuardForMaps guard(q.get_device_index());
  const Operands of(q, heads, parts);
  MaskGradientParams p{};
  p.batch = q.size(0), p.heads = heads, p.parts = parts;
  p.queries = q.size(2), p.keys = k.size(2), p.d = q.size(3), p.e = v.size(3);
  const int columns = gradient_columns(parts);
  p.q = of.tiled(q, "q", p.queries, p.d, kColumns, kGradientRows);
  p.grad_o = of.tiled(grad_o, "grad_o", p.queries, p.e, kColumns, kGradientRows);
  p.k = of.tiled(k, "k", p.keys, p.d, kColumns, columns);
  p.v = of.tiled(v, "v", p.keys, p.e, kColumns, columns);
  p.in_float32 = out.scalar_type() == ScalarType::Float;
  check_same(out, "out", p.in_float32 || parts > 1 ? ScalarType::Float : q.scalar_type(), q);
  check_shape(out, "out", {out.size(0), out.size(1), p.queries, p.keys});
  p.mask_batch = out.size(0), p.mask_heads = out.size(1);
  CHECK((p.mask_batch == 1 || p.mask_batch == p.batch) && (p.mask_heads == 1 || p.mask_heads == heads),
        "out: expected (B or 1, H or 1, queries, keys)");
  CHECK(out.is_contiguous() && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0,
        "out: expected contiguous and 16-byte aligned");
  p.out = out.data_ptr();
  p.shares = 1;
  if (partial) {
    check_same(*partial, "partial", ScalarType::Float, q);
    check_shape(*partial, "partial", {partial->size(0), p.mask_batch, p.mask_heads, p.queries, p.keys});
    CHECK(partial->is_contiguous() && reinterpret_cast<uintptr_t>(partial->data_ptr()) % 16 == 0,
          "partial: expected contiguous and 16-byte aligned");
    p.partial = static_cast<float*>(partial->data_ptr());
    p.shares = partial->size(0);
  }
  const int64_t pairs = int64_t(p.batch / p.mask_batch) * (heads / p.mask_heads);
  CHECK(p.shares > 0 && p.shares <= pairs, "partial: expected 1 to ", pairs, " shares, got ", p.shares);
  p.row_tiles = tiles_of(p.queries, kGradientRows), p.column_tiles = tiles_of(p.keys, columns);
  p.units = int64_t(p.shares) * p.mask_batch * p.mask_heads * p.row_tiles * p.column_tiles;
  CHECK(p.units > 0 && p.units < kMostUnits, "out: expected some tiles, fewer than 2^31, got ", p.units);
  const cudaStream_t stream = stream_of(q);
  check_cuda(of.is_bfloat16() ? run_mask_gradient_bfloat16(p, of.multiprocessors(), stream)
                              : run_mask_gradient_float16(p, of.multiprocessors(), stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transnormer_kernels, m) {
  m.def(
      "masked_scores(Tensor? q, Tensor? k, Tensor? grad_o, Tensor? v, Tensor mask, Tensor(a!)? p, Tensor(b!)? a,"
      " int heads, int parts, int pair, int row, int key, int tile_columns) -> ()");
  m.def(
      "masked_products(Tensor? p, Tensor? a, Tensor? q, Tensor? k, Tensor? grad_o, Tensor(a!)? dq, Tensor(b!)? dk,"
      " Tensor(c!)? dv, Tensor(d!)? dq_sums, Tensor(e!)? dk_sums, Tensor(f!)? dv_sums, int parts, int pair, int row,"
      " int key, int tile_columns) -> ()");
  m.def(
      "mask_gradient(Tensor q, Tensor k, Tensor grad_o, Tensor v, Tensor(a!) out, Tensor(b!)? partial, int heads,"
      " int parts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transnormer_kernels, CUDA, m) {
  m.impl("masked_scores", TORCH_BOX(&masked_scores));
  m.impl("masked_products", TORCH_BOX(&masked_products));
  m.impl("mask_gradient", TORCH_BOX(&mask_gradient));
}
