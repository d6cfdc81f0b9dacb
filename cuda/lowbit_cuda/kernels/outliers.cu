// Outliers, a sparse matrix S (CSR) that is added to a weight. LOWBIT_TYPE: of x and y, or of the weight; LOWBIT_VALUE: of the values;
// LOWBIT_COLUMN: of the columns (int16 columns are below 2^15).
#include <lowbit/primitives.cuh>
#include <lowbit/reduce.cuh>

namespace {

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ float wide(__half value) { return __half2float(value); }
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

}  // namespace

// y += x S^T. A warp takes a row of S and up to eight rows of x (grid: rows of S by eights of rows of x); its lanes take the entries in
// turn and meet in a tree, so that two runs give the same bits.
extern "C" __global__ void __launch_bounds__(256)
    lowbit_outlier_product(const int* ends, const LOWBIT_COLUMN* columns, const LOWBIT_VALUE* values, const LOWBIT_TYPE* x, LOWBIT_TYPE* y,
                           int tokens, int out_features, long long x_stride, long long y_stride) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * 8 + (threadIdx.x >> 5), first = blockIdx.y * 8;
  if (row >= out_features) return;
  const int begin = ends[row], end = ends[row + 1];
  if (begin == end) return;
  float sums[8] = {};
  for (int i = begin + lane; i < end; i += 32) {
    const float value = wide(values[i]);
    const LOWBIT_TYPE* source = x + first * x_stride + columns[i];
#pragma unroll
    for (int token = 0; token < 8; ++token) {
      if (first + token < tokens) sums[token] += value * wide(source[token * x_stride]);
    }
  }
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    const float sum = lowbit::warp_sum(sums[token]);
    if (lane != token || first + token >= tokens) continue;
    LOWBIT_TYPE* place = y + (first + token) * y_stride + row;
    narrow(wide(*place) + sum, *place);
  }
}

// W += S. A thread takes a row, entry after entry, so that a place that is named twice gets both.
extern "C" __global__ void __launch_bounds__(256)
    lowbit_outlier_add(const int* ends, const LOWBIT_COLUMN* columns, const LOWBIT_VALUE* values, LOWBIT_TYPE* weight, int out_features,
                       long long in_features) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= out_features) return;
  for (int i = ends[row]; i < ends[row + 1]; ++i) {
    LOWBIT_TYPE* place = weight + row * in_features + columns[i];
    narrow(wide(*place) + wide(values[i]), *place);
  }
}
