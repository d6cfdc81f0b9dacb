// Sums and extremes over a warp or a block. The order of additions is fixed by the shape alone: two runs give the same bits.
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

struct Plus {
  static __device__ __forceinline__ float neutral() { return 0.0f; }
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
// The larger of two; a NaN wins, so that it is never lost.
struct Larger {
  static __device__ __forceinline__ float neutral() { return -__int_as_float(0x7f800000); }
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Over LANES neighbouring lanes (a power of two); every one of them gets the result.
template <int LANES = 32, class Operation>
__device__ __forceinline__ float warp_reduce(float value, Operation operation) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) value = operation(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}
template <int LANES = 32>
__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce<LANES>(value, Plus());
}
template <int LANES = 32>
__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce<LANES>(value, Larger());
}

// Over a block of WARPS whole warps; every thread gets the result. `scratch` is WARPS floats of shared memory, which may be used again
// at once; all threads of the block take part.
template <int WARPS, class Operation>
__device__ __forceinline__ float block_reduce(float value, float* scratch, Operation operation) {
  value = warp_reduce(value, operation);
  __syncthreads();  // what was there has been read
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
  __syncthreads();
  float total = Operation::neutral();
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) total = operation(total, scratch[warp]);
  return total;
}

}  // namespace lowbit
