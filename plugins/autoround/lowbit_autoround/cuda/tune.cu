// One step of tuning on a weight: w = scale * u + offset, u = clamp(round((w - offset) / divisor + V) + zero, 0, last) - zero.
//
//   LOWBIT_TYPE    of the decoded weight and of its gradient: float, __half or __nv_bfloat16
//   LOWBIT_LANES   threads that share a group in lowbit_learn: a power of two up to 32
//
// Weights and V are float32, groups one behind the other, group_size a multiple of 4; parameters are float32, one for each group,
// offset and zero may be null (0). Every operation rounds as torch's does, so that codes, which torch computes, are those that
// were decoded here; only the sums over a group run in another order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/cstdint>

using cuda::std::uint32_t;
using cuda::std::uint64_t;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void narrow(float& to, float value) { to = value; }
__device__ __forceinline__ void narrow(__half& to, float value) { to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

struct alignas(4 * sizeof(LOWBIT_TYPE)) Four {
  LOWBIT_TYPE value[4];
};

struct Group {
  float scale, divisor, offset, zero, last;

  __device__ __forceinline__ Group(uint32_t index, const float* scales, const float* offsets, const float* zeros,
                                   float constant_zero, float last)
      : scale(scales[index]),
        divisor(scale == 0.0f ? 1.0f : scale),
        offset(offsets ? offsets[index] : 0.0f),
        zero(zeros ? zeros[index] : constant_zero),
        last(last) {}

  __device__ __forceinline__ float quotient(float w) const { return __fdiv_rn(__fsub_rn(w, offset), divisor); }
  __device__ __forceinline__ float steps(float unclamped) const {
    return __fsub_rn(fminf(fmaxf(__fadd_rn(unclamped, zero), 0.0f), last), zero);
  }
};

// A thread decodes four weights at a time.
extern "C" __global__ void lowbit_decode(const float4* weights, const float4* values, const float* scales, const float* offsets,
                                         const float* zeros, float constant_zero, float last, LOWBIT_TYPE* out, uint32_t fours,
                                         uint32_t group_fours) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < fours; i += gridDim.x * blockDim.x) {
    const Group group(i / group_fours, scales, offsets, zeros, constant_zero, last);
    const float4 w = weights[i], v = values[i];
    const float ws[4] = {w.x, w.y, w.z, w.w}, vs[4] = {v.x, v.y, v.z, v.w};
    Four result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float u = group.steps(rintf(__fadd_rn(group.quotient(ws[j]), vs[j])));
      narrow(result.value[j], __fadd_rn(__fmul_rn(u, group.scale), group.offset));
    }
    reinterpret_cast<Four*>(out)[i] = result;
  }
}

// LOWBIT_LANES threads move V of a group by lr against the sign of its gradient, and sum what its parameters' gradients need:
// by_scale = sum g (u - in (w - o) / s), by_offset = sum g (1 - in).
extern "C" __global__ void lowbit_learn(const float4* weights, float4* values, const float* scales, const float* offsets,
                                        const float* zeros, float constant_zero, float last, const LOWBIT_TYPE* gradients,
                                        float lr, float largest, float* by_scale, float* by_offset, uint32_t groups,
                                        uint32_t group_fours) {
  const uint32_t lane = threadIdx.x % LOWBIT_LANES;
  const uint32_t team = (blockIdx.x * blockDim.x + threadIdx.x) / LOWBIT_LANES;
  const uint32_t teams = gridDim.x * blockDim.x / LOWBIT_LANES;
  const uint32_t rounds = (groups + teams - 1) / teams;  // all threads of a warp take as many, for the shuffles
  for (uint32_t round = 0; round < rounds; ++round) {
    const uint32_t index = round * teams + team;
    const bool there = index < groups;
    const Group group(there ? index : 0, scales, offsets, zeros, constant_zero, last);
    const float direction = group.scale > 0.0f ? lr : group.scale < 0.0f ? -lr : 0.0f;
    float along = 0.0f, outside = 0.0f;
    for (uint32_t four = lane; there && four < group_fours; four += LOWBIT_LANES) {
      const uint64_t i = uint64_t{index} * group_fours + four;
      const float4 w = weights[i], v = values[i];
      const Four g = reinterpret_cast<const Four*>(gradients)[i];
      const float ws[4] = {w.x, w.y, w.z, w.w};
      float vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float gradient = widen(g.value[j]), quotient = group.quotient(ws[j]);
        const float unclamped = rintf(__fadd_rn(quotient, vs[j])), u = group.steps(unclamped);
        const float inside = u == unclamped ? gradient : 0.0f;
        along += gradient * u - quotient * inside;
        outside += gradient - inside;
        const float move = inside > 0.0f ? direction : inside < 0.0f ? -direction : 0.0f;
        vs[j] = fminf(fmaxf(vs[j] - move, -largest), largest);
      }
      values[i] = make_float4(vs[0], vs[1], vs[2], vs[3]);
    }
#pragma unroll
    for (int step = LOWBIT_LANES / 2; step; step /= 2) {
      along += __shfl_xor_sync(0xffffffffu, along, step);
      outside += __shfl_xor_sync(0xffffffffu, outside, step);
    }
    if (there && lane == 0) {
      by_scale[index] = along;
      by_offset[index] = outside;
    }
  }
}
