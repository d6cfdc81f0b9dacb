// Tensor-core products by data type, and the fragments that they take. The f16 one that the unit kernels use is in primitives.cuh.
//
// Lane = 4 * g + t. Registers of 16-bit types hold two neighbours of a row (A) or of a column (B), those of 8-bit types four:
//
//   m16n8k16, 16 bits    a[0] row g    columns 2t 2t+1       a[2] row g    columns 2t+8 2t+9       b0 rows 2t 2t+1      column g
//                        a[1] row g+8  columns 2t 2t+1       a[3] row g+8  columns 2t+8 2t+9       b1 rows 2t+8 2t+9    column g
//   m16n8k32, 8 bits     a[0] row g    columns 4t .. 4t+3    a[2] row g    columns 4t+16 .. 4t+19  b0 rows 4t .. 4t+3   column g
//                        a[1] row g+8  columns 4t .. 4t+3    a[3] row g+8  columns 4t+16 .. 4t+19  b1 rows 4t+16 .. +19 column g
//   sums                 c[0] c[1] row g, columns 2t 2t+1    c[2] c[3] row g+8, columns 2t 2t+1
//
// bf16 and 8-bit products need sm_80; HAS_WIDE_MMA says whether this architecture has them, and a kernel that uses them without is
// refused when it is compiled.
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool HAS_WIDE_MMA = true;
#else
constexpr bool HAS_WIDE_MMA = false;
#endif

// c += a b, bf16 with f32 sums.
template <bool Available = HAS_WIDE_MMA>
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(Available, "bf16 tensor cores need sm_80");
  if constexpr (Available) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c += a b in integers: Signed a and b are s8, else u8; sums wrap at 32 bits.
template <bool SignedA, bool SignedB, bool Available = HAS_WIDE_MMA>
__device__ __forceinline__ void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(Available, "m16n8k32 needs sm_80");
#define LOWBIT_MMA_INT8(A, B)                                                                                                      \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." A "." B ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (Available && SignedA && SignedB) LOWBIT_MMA_INT8("s8", "s8");
  if constexpr (Available && SignedA && !SignedB) LOWBIT_MMA_INT8("s8", "u8");
  if constexpr (Available && !SignedA && SignedB) LOWBIT_MMA_INT8("u8", "s8");
  if constexpr (Available && !SignedA && !SignedB) LOWBIT_MMA_INT8("u8", "u8");
#undef LOWBIT_MMA_INT8
}

// Four 8x8 tiles of 16-bit values from shared memory to fragment order: lane l names row l % 8 of tile l / 8 (16 bytes, aligned).
// With the rows of a row-major 16x16 tile at (l % 16, 8 * (l / 16)) this gives a[0..3].
__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared)
               : "memory");
}
// The same, each tile transposed: a column-major tile of B gives b0 and b1 of two neighbouring n8 tiles.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&b)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared)
               : "memory");
}

}  // namespace lowbit
