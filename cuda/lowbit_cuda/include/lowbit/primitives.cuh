// The instructions that the kernels are made of, each under a name that says what it does.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/cstdint>

namespace lowbit {

using cuda::std::uint32_t;
using cuda::std::uint64_t;

// Address of shared memory as the 32-bit number that asm operands take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past L1, without registers. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async16(uint32_t shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
  const uint4 value = *static_cast<const uint4*>(global);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

// The same when `wanted`; one predicated instruction, no branch.
__device__ __forceinline__ void copy_async16_if(uint32_t shared, const void* global, bool wanted) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(shared), "l"(global),
               "r"(static_cast<int>(wanted))
               : "memory");
#else
  if (wanted) copy_async16(shared, global);
#endif
}

// The same, or 16 bytes of zero when not `wanted`; the address must be valid all the same.
__device__ __forceinline__ void copy_async16_or_zeros(uint32_t shared, const void* global, bool wanted) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(wanted ? 16 : 0) : "memory");
#else
  const uint4 value = wanted ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

// The lane number, from a shuffle: what is worked out from it stays in registers, because the compiler will not repeat a shuffle,
// while it reads the thread's number again, twenty cycles late, in every round of a loop (seen in the disassembly, 13.0).
__device__ __forceinline__ int lane_number() {
  const int lane = threadIdx.x & 31;
  return __shfl_sync(0xffffffffu, lane, lane);
}

// Loads from shared memory by address.
__device__ __forceinline__ void load_shared(uint32_t (&value)[4], uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(shared));
}
__device__ __forceinline__ void load_shared(uint32_t (&value)[2], uint32_t shared) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value[0]), "=r"(value[1]) : "r"(shared));
}
__device__ __forceinline__ void load_shared(uint32_t (&value)[1], uint32_t shared) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value[0]) : "r"(shared));
}

// Close a batch of copies; wait until at most Pending batches are still under way.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int Pending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Programmatic dependent launch: let the next kernel start; wait until the previous one has written its results.
// Without the launch attribute both do nothing.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// d = c + a * b for a 16x16 tile of f16 a and a 16x8 tile of f16 b, f32 c and d. Lane = 4 * g + t holds
//   a[0] rows g,   columns 2t 2t+1     a[2] rows g,   columns 2t+8 2t+9      b0 rows 2t 2t+1, column g
//   a[1] rows g+8, columns 2t 2t+1     a[3] rows g+8, columns 2t+8 2t+9      b1 rows 2t+8 2t+9, column g
//   d[0] d[1] row g, columns 2t 2t+1   d[2] d[3] row g+8, columns 2t 2t+1
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float c0, float c1,
                                        float c2, float c3) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_f16(d, a, b0, b1, d[0], d[1], d[2], d[3]);
}

// Thread block clusters: this block's rank; an address in the same shared memory of another block; all blocks meet.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void store_in_cluster(uint32_t shared, uint32_t rank, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }" ::"r"(shared),
      "r"(rank), "f"(value)
      : "memory");
#endif
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The same in two halves, for blocks that only say that they run: releasing memory waits for every copy under way.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Activations and results: T in memory, fp16 in the tensor cores. bf16 reaches further than fp16, so its x is scaled by 2^BASE:
// |x| <= 2^20 stays finite. Fields at position p need x * 2^-p on top, which makes x a multiple of 2^(p - BASE - 24).
template <class T>
struct Activation;
template <>
struct Activation<__half> {
  static constexpr int BASE = 0;
  static __device__ __forceinline__ __half store(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ float load(__half value) { return __half2float(value); }
  static __device__ __forceinline__ uint32_t scaled(uint32_t pair, float factor) {
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(factor));
    return *reinterpret_cast<const uint32_t*>(&product);
  }
};
template <>
struct Activation<__nv_bfloat16> {
  static constexpr int BASE = -4;
  static __device__ __forceinline__ __nv_bfloat16 store(float value) { return __float2bfloat16_rn(value); }
  static __device__ __forceinline__ float load(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ uint32_t scaled(uint32_t pair, float factor) {
    const float2 value = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
    const __half2 product = __floats2half2_rn(value.x * factor, value.y * factor);
    return *reinterpret_cast<const uint32_t*>(&product);
  }
};

// Where a decoder finds its table: address in shared memory, and the lane's own part of every offset into it.
struct Table {
  uint32_t address, lane;
};

// 2^exponent by its bits; a loop that multiplies is not folded by NVRTC (seen in the disassembly, 13.0).
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

}  // namespace lowbit
