// Reads a buffer and throws it away: the time that no kernel which needs these bytes can beat.
extern "C" __global__ void __launch_bounds__(512) read_only(const uint4* data, long long count, unsigned* never) {
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  unsigned sum = 0;
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += stride) sum ^= __ldcs(data + i).x;
  if (sum == 0x9e3779b9u) *never = sum;  // so that the loads stay
}
