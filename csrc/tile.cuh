// Tiles of 2-byte elements in shared memory: panels of 64 columns, a row of a panel is 128 bytes, swizzled.
//
// A tile of R rows and 64 p columns is p panels, one after another, of R rows. The 16-byte piece c of row r lies where
// c ^ (r % 8) would: rows are then read and columns are written without bank conflicts, and it is the layout that the
// copy engine and the tensor cores call the 128-byte swizzle.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int kPanel = 64;                   // columns
constexpr int kPanelRow = 128;               // bytes
constexpr int kPanelBytes = 64 * kPanelRow;  // of 64 rows
constexpr int kWarpgroup = 128;              // threads

__device__ inline int piece_offset(int row, int piece) { return row * kPanelRow + ((piece ^ (row & 7)) << 4); }

// Where a thread of a warpgroup stands: it holds two rows, `row` and 8 later, of the result of a product, and from
// column `pair` on two of every 8 columns. Asked for where it is used: else the compiler keeps all that follows.
struct Lane {
  int thread, lane, row, pair;
  __device__ Lane() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    thread %= kWarpgroup;
    lane = thread % 32;
    row = thread / 32 * 16 + lane / 4;
    pair = 2 * (lane % 4);
  }
  // Where this lane's row of the blocks lies that a warp loads or stores together, 16 rows of 16 columns of a panel.
  __device__ int block(int of_panel) const {
    return piece_offset(row - lane / 4 + lane % 16, of_panel * 2 + lane / 16);
  }
};

template <class Element>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class Element>
__device__ inline float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>)
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

// Whether either half is infinite or NaN.
template <class Element>
__device__ inline bool any_nonfinite(uint32_t packed) {
  constexpr uint32_t kExponent = std::is_same_v<Element, __nv_bfloat16> ? 0x7F80u : 0x7C00u;
  return (packed & kExponent) == kExponent || (packed >> 16 & kExponent) == kExponent;
}

// The same of all words that were added: what is not finite is NaN when multiplied with zero, and stays so in a sum.
template <class Element>
struct NonfiniteSearch {
  using Pair = std::conditional_t<std::is_same_v<Element, __nv_bfloat16>, __nv_bfloat162, __half2>;
  uint32_t sum = 0;

  __device__ void add(uint32_t packed) {
    const uint32_t zeros = 0;
    const Pair next = __hfma2(*reinterpret_cast<const Pair*>(&packed), *reinterpret_cast<const Pair*>(&zeros),
                              *reinterpret_cast<const Pair*>(&sum));
    sum = *reinterpret_cast<const uint32_t*>(&next);
  }
  __device__ bool found() const { return any_nonfinite<Element>(sum); }
};

// Four 8 × 8 blocks: lane l names the row l % 8 of block l / 8. With kTranspose rows in memory are columns in
// registers.
template <bool kTranspose>
__device__ inline void load_blocks(uint32_t (&blocks)[4], uint32_t address) {
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void store_blocks(uint32_t address, const uint32_t (&blocks)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(blocks[0]),
               "r"(blocks[1]), "r"(blocks[2]), "r"(blocks[3])
               : "memory");
}

__device__ inline uint32_t load_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline float2 load_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}
__device__ inline void store_piece(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
__device__ inline uint4 load_piece(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
