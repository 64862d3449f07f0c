// Matrix products of Hopper's tensor cores: one warpgroup multiplies a 64 × 16 by a 16 × N tile into float32 registers.
//
// Thread `lane` of warp w of the warpgroup holds, of the 64 × N result, rows 16 w + lane / 4 (d[4 n], d[4 n + 1]) and 8
// more (d[4 n + 2], d[4 n + 3]), columns 8 n + 2 (lane % 4) and the next. So two neighbours n, packed, are the left
// operand of a later product with 16 more columns. Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Products between fence() and commit() run in the background, in order; wait<n>() returns when at most n groups run.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// kWhere tells waits at the end of two branches apart: made one, behind where they meet, they would leave results of
// running products to be copied before.
template <int kPending, int kWhere = 0>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;  // %1" ::"n"(kPending), "n"(kWhere) : "memory");
}

// Keeps the compiler from moving or copying registers that a running product still writes or reads.
template <int kCount>
__device__ inline void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ inline void wgmma_hold(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Where a tile of 64-element (128-byte) rows with the 128-byte swizzle lies. Rows along the result (K contiguous):
// groups of 8 rows are 1,024 bytes apart. Rows along K (the result's side contiguous): the same, and the next 64
// columns of the result follow after `panel_bytes`.
__device__ inline uint64_t descriptor(uint32_t shared_address, uint32_t panel_bytes = 16) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | (uint64_t(1024 >> 4) << 32) | (uint64_t(panel_bytes >> 4) << 16) |
         ((shared_address & 0x3FFFF) >> 4);
}

// Inline PTX names every register: %0 to %(N/2 - 1) are the result.
// clang-format off
#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define NAMES_64 TEN() TEN(1) TEN(2) "%30,%31"
#define SIXTY TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#define NAMES_128 SIXTY "%60,%61,%62,%63"
#define NAMES_192 SIXTY TEN(6) TEN(7) TEN(8) "%90,%91,%92,%93,%94,%95"
#define NAMES_256 SIXTY TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
                  "%120,%121,%122,%123,%124,%125,%126,%127"
#define EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                 "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RESULT_64(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24)
#define RESULT_128(i) RESULT_64(i), RESULT_64(i + 32)
#define RESULT_192(i) RESULT_128(i), RESULT_64(i + 64)
#define RESULT_256(i) RESULT_128(i), RESULT_128(i + 64)

// A and b in shared memory: their descriptors, whether to add, and their transposition follow the result as %A to %E.
#define WGMMA_SHARED(N, TYPE, A, B, C, D, E)                                                                \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #C ", 0; "                                                \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES_##N "}, "         \
               "%" #A ", %" #B ", p, 1, 1, %" #D ", %" #E "; }"                                             \
               : RESULT_##N(0) : "l"(a), "l"(b), "r"(add), "n"(kTransposeA), "n"(kTransposeB))
// The same with a in four registers, %A1 to %A4.
#define WGMMA_REGISTERS(N, TYPE, A1, A2, A3, A4, B, C, D)                                                   \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #C ", 0; "                                                \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES_##N "}, "         \
               "{%" #A1 ", %" #A2 ", %" #A3 ", %" #A4 "}, %" #B ", p, 1, 1, %" #D "; }"                     \
               : RESULT_##N(0)                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposeB))
#define BY_TYPE(MACRO, N, ...)                          \
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) \
    MACRO(N, "bf16", __VA_ARGS__);                      \
  else                                                  \
    MACRO(N, "f16", __VA_ARGS__)
// clang-format on

// d (64 × N) = a b, or d + a b if `add`. Rows of a lie along K, or with kTransposeA across it; columns of b likewise.
template <class Element, int N, int kTransposeB, int kTransposeA = 0>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  if constexpr (N == 64) {
    BY_TYPE(WGMMA_SHARED, 64, 32, 33, 34, 35, 36);
  } else if constexpr (N == 128) {
    BY_TYPE(WGMMA_SHARED, 128, 64, 65, 66, 67, 68);
  } else if constexpr (N == 192) {
    BY_TYPE(WGMMA_SHARED, 192, 96, 97, 98, 99, 100);
  } else {
    BY_TYPE(WGMMA_SHARED, 256, 128, 129, 130, 131, 132);
  }
}

// The same with a in registers.
template <class Element, int N, int kTransposeB>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  if constexpr (N == 64) {
    BY_TYPE(WGMMA_REGISTERS, 64, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (N == 128) {
    BY_TYPE(WGMMA_REGISTERS, 128, 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (N == 192) {
    BY_TYPE(WGMMA_REGISTERS, 192, 96, 97, 98, 99, 100, 101, 102);
  } else {
    BY_TYPE(WGMMA_REGISTERS, 256, 128, 129, 130, 131, 132, 133, 134);
  }
}

// The same of float32 numbers as tf32, 64 × 8 by 8 × 64, a in registers: rows of b lie along K. Of each a a thread
// holds column lane % 4 of its rows, and then column lane % 4 + 4.
__device__ inline void wgmma_tf32(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {" NAMES_64
               "}, {%32, %33, %34, %35}, %36, p, 1, 1; }"
               : RESULT_64(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
