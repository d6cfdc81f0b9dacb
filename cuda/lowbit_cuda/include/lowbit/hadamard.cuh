// The fast Walsh-Hadamard transform: x H with H[i][j] = (-1)^popcount(i & j), the Sylvester matrix of `grids.hadamard` times sqrt(n).
// log2(n) passes of sums and differences (Fino & Algazi 1976); multiply the result by 1 / sqrt(n) for the orthonormal transform.
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

// Within a thread: N values, a power of two.
template <int N>
__device__ __forceinline__ void hadamard_thread(float (&x)[N]) {
#pragma unroll
  for (int half = 1; half < N; half *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i & half) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
}

// Over LANES neighbouring lanes with N values each: value i of lane l is element l * N + i of LANES * N (at most 32 * N).
template <int N, int LANES = 32>
__device__ __forceinline__ void hadamard_warp(float (&x)[N], int lane) {
  hadamard_thread(x);
#pragma unroll
  for (int half = 1; half < LANES; half *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], half);
      x[i] = lane & half ? other - x[i] : x[i] + other;
    }
  }
}

// Over a block of WARPS warps (a power of two, at most 32): value i of thread k is element k * N + i of 32 * WARPS * N. `shared` holds as
// many floats; all threads of the block take part. Threads swap places so that the passes over warps are passes over lanes.
template <int N, int WARPS>
__device__ __forceinline__ void hadamard_block(float (&x)[N], float* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  hadamard_warp<N>(x, lane);
  if (WARPS == 1) return;
  constexpr int THREADS = 32 * WARPS;
  const int member = threadIdx.x % WARPS;  // in the other order neighbours are the warps of one lane
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) shared[i * THREADS + lane * WARPS + warp] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float value = shared[i * THREADS + threadIdx.x];
#pragma unroll
    for (int half = 1; half < WARPS; half *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, half);
      value = member & half ? other - value : value + other;
    }
    shared[i * THREADS + threadIdx.x] = value;  // its own place: nobody else reads it before the barrier
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = shared[i * THREADS + lane * WARPS + warp];
}

}  // namespace lowbit
