// A small kernel for each shared header, against which test_headers.py holds plain torch. One warp each, unless it says otherwise.
#include <lowbit/fragments.cuh>
#include <lowbit/hadamard.cuh>
#include <lowbit/reduce.cuh>

using namespace lowbit;

// c (16, 8) = a (16, K) b (8, K)^T for one tile: K columns of T, LANE values of them in a register.
template <int K, class Sum, class Multiply>
__device__ void product(const uint32_t* a, const uint32_t* b, Sum* c, Multiply multiply) {
  const int lane = lane_number(), g = lane >> 2, t = lane & 3;  // rows are K / 2 registers of 16-bit or K / 4 of 8-bit values: 8
  const uint32_t first[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + t + 4], a[8 * (g + 8) + t + 4]};
  Sum sums[4] = {};
  multiply(sums, first, b[8 * g + t], b[8 * g + t + 4]);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sums[i];
}

extern "C" __global__ void product_f16(const uint32_t* a, const uint32_t* b, float* c) {
  product<16>(a, b, c, [](float(&sums)[4], const uint32_t(&x)[4], uint32_t b0, uint32_t b1) { mma_f16(sums, x, b0, b1); });
}
#if TEST_WIDE
extern "C" __global__ void product_bf16(const uint32_t* a, const uint32_t* b, float* c) {
  product<16>(a, b, c, [](float(&sums)[4], const uint32_t(&x)[4], uint32_t b0, uint32_t b1) { mma_bf16(sums, x, b0, b1); });
}
extern "C" __global__ void product_int8(const uint32_t* a, const uint32_t* b, int* c) {
  product<32>(a, b, c, [](int(&sums)[4], const uint32_t(&x)[4], uint32_t b0, uint32_t b1) {
    mma_int8<TEST_SIGNED_A, TEST_SIGNED_B>(sums, x, b0, b1);
  });
}
#endif

// The registers of a 16x16 tile of 16-bit values, as they lie (32 lanes, 4), for ldmatrix plain and transposed.
extern "C" __global__ void matrices(const uint4* tile, uint32_t* plain, uint32_t* transposed) {
  __shared__ uint4 kept[32];
  const int lane = lane_number();
  kept[lane] = tile[lane];
  __syncwarp();
  uint32_t found[4];
  load_matrices(found, shared_address(kept + 2 * (lane % 16) + lane / 16));
  for (int i = 0; i < 4; ++i) plain[4 * lane + i] = found[i];
  load_matrices_transposed(found, shared_address(kept + 2 * (lane % 16) + lane / 16));
  for (int i = 0; i < 4; ++i) transposed[4 * lane + i] = found[i];
}

// Rows of TEST_VALUES * 32 * TEST_WARPS, one block each.
extern "C" __global__ void hadamard(const float* x, float* y) {
  __shared__ float shared[TEST_VALUES * 32 * TEST_WARPS];
  float values[TEST_VALUES];
  const long long first = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * TEST_VALUES;
  for (int i = 0; i < TEST_VALUES; ++i) values[i] = x[first + i];
  hadamard_block<TEST_VALUES, TEST_WARPS>(values, shared);
  for (int i = 0; i < TEST_VALUES; ++i) y[first + i] = values[i];
}

// Sum and largest of each row of 32 * TEST_WARPS, and of each TEST_LANES of them.
extern "C" __global__ void reductions(const float* x, float* sums, float* largest, float* parts) {
  __shared__ float scratch[TEST_WARPS];
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = x[thread];
  const float sum = block_reduce<TEST_WARPS>(value, scratch, Plus()), high = block_reduce<TEST_WARPS>(value, scratch, Larger());
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    largest[blockIdx.x] = high;
  }
  parts[thread] = warp_sum<TEST_LANES>(value);
}
