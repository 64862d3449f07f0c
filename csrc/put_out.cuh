// From registers to memory: what a warpgroup has of a product.
#pragma once

#include "async.cuh"
#include "tile.cuh"

// To memory, the first rows and columns that count, of rows `width` apart; the warpgroup's 64 rows begin `first` rows
// behind `to`. Each warp turns its 16 rows of a panel in shared memory, so that 8 lanes write a row's 128 bytes, and
// waits for nobody. `staged`: 8 KiB of the warpgroup.
template <class Element, int kPanels>
__device__ inline void put_out_rows(const float (&acc)[kPanels * 32], uint32_t staged, Element* to, int first, int rows,
                                    int columns, int width) {
  const Lane at;
  const int first_row = at.thread / 32 * 16 + at.lane / 8, piece = at.lane % 8;
  to += int64_t(first + first_row) * width + piece * 8;
  rows -= first + first_row;
  columns -= piece * 8;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float* values = &acc[panel * 32 + x * 8];
      store_blocks(staged + at.block(x), {pack<Element>(values[0], values[1]), pack<Element>(values[2], values[3]),
                                          pack<Element>(values[4], values[5]), pack<Element>(values[6], values[7])});
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i * 4 < rows && panel * kPanel < columns)
        *reinterpret_cast<uint4*>(to + int64_t(i * 4) * width + panel * kPanel) =
            load_piece(staged + piece_offset(first_row + i * 4, piece));
    }
    __syncwarp();
  }
}

// The same in float32, without a detour: four lanes write 32 neighbouring bytes.
template <int kPanels>
__device__ inline void put_out_rows(const float (&acc)[kPanels * 32], float* to, int rows, int columns, int width) {
  const Lane at;
  to += int64_t(at.row) * width + at.pair;
#pragma unroll
  for (int x = 0; x < kPanels * 32; x += 2) {
    const int row = x / 2 % 2 * 8, column = x / 4 * 8;
    if (at.row + row < rows && at.pair + column < columns)
      *reinterpret_cast<float2*>(to + int64_t(row) * width + column) = make_float2(acc[x], acc[x + 1]);
  }
}
