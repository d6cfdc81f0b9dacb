// Floats from codes in Words or Dense (stream.cuh): codebook[code] * scale in float32, rounded once. No division for an element.
//
//   LOWBIT_FROM, LOWBIT_BITS   the layout and k
//   LOWBIT_TYPE                what is written: float, __half or __nv_bfloat16
//   LOWBIT_SCALE               how a scale is stored: float, __half, __nv_bfloat16, or with two levels unsigned char or signed char
//   LOWBIT_SUPER               the second level's float type, or void
//   LOWBIT_WHOLE               1: groups divide the rows and 8 divides them, so that eight codes share a scale; 0: any shape
//
// A thread turns chunks of eight codes into 16 bytes of half floats. Neighbours' loads share their sectors and neighbours' stores
// are adjacent; 16-byte loads would give each thread 32 codes and put the stores of neighbours 64 bytes apart.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "stream.cuh"

using namespace lowbit_kbit;

constexpr int kBits = LOWBIT_BITS;
constexpr int kChunks = 4;  // a thread's chunks: so many loads are under way at once
constexpr int kThreads = 256;

struct Shape {
  uint64_t codes;
  uint32_t columns, group, groups;  // of a row; flat groups are those of one long row
  uint32_t super_group, supers;     // groups that share a second-level scale, and how many of these a row has
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(unsigned char value) { return value; }
__device__ __forceinline__ float widen(signed char value) { return value; }

// The scale of group `index` of the whole weight; with two levels u * d, rounded as the reference rounds it.
template <typename Scale, typename Super>
struct Scales {
  const Scale* scales;
  const Super* supers;
  Shape shape;

  __device__ __forceinline__ float operator()(uint64_t index) const {
    const float value = widen(scales[index]);
    if constexpr (sizeof(Scale) == 1) {
      const uint32_t row = static_cast<uint32_t>(index) / shape.groups;
      const uint32_t within = static_cast<uint32_t>(index) - row * shape.groups;
      return __fmul_rn(value, widen(supers[uint64_t{row} * shape.supers + within / shape.super_group]));
    } else {
      return value;
    }
  }
};

__device__ __forceinline__ void store(float* out, const float (&v)[8]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
__device__ __forceinline__ void store(__half* out, const float (&v)[8]) {
  __half2 pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __floats2half2_rn(v[2 * j], v[2 * j + 1]);
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pairs);
}
__device__ __forceinline__ void store(__nv_bfloat16* out, const float (&v)[8]) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pairs);
}
__device__ __forceinline__ void store_one(float* out, float v) { *out = v; }
__device__ __forceinline__ void store_one(__half* out, float v) { *out = __float2half_rn(v); }
__device__ __forceinline__ void store_one(__nv_bfloat16* out, float v) { *out = __float2bfloat16_rn(v); }

// The scales of eight codes that may lie in several groups: positions are counted, not divided.
template <typename S>
__device__ __forceinline__ void scales_of(const S& scales, const Shape& shape, uint64_t first, float (&factors)[8]) {
  const uint64_t row = first / shape.columns;
  uint32_t column = static_cast<uint32_t>(first - row * shape.columns);
  uint32_t group = column / shape.group, inside = column - group * shape.group;
  uint64_t index = row * shape.groups + group;
  float factor = scales(index);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    factors[j] = factor;
    ++column, ++inside;
    if (column == shape.columns || inside == shape.group) {
      if (column == shape.columns) column = 0;
      inside = 0;
      ++index;
      if (first + j + 1 < shape.codes) factor = scales(index);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    lowbit_kbit_dequantize(const void* source, const float* codebook, const LOWBIT_SCALE* stored, const void* supers,
                           LOWBIT_TYPE* out, uint64_t codes, uint32_t columns, uint32_t group, uint32_t groups,
                           uint32_t super_group, uint32_t second_levels) {
  const Shape shape{codes, columns, group, groups, super_group, second_levels};
  const Scales<LOWBIT_SCALE, LOWBIT_SUPER> scales{stored, static_cast<const LOWBIT_SUPER*>(supers), shape};
  const Reader<LOWBIT_FROM, kBits> reader{source, codes};
  __shared__ float book[1 << kBits];
  for (int i = threadIdx.x; i < 1 << kBits; i += kThreads) book[i] = codebook[i];
  __syncthreads();

  const uint64_t base = uint64_t{blockIdx.x} * (kThreads * kChunks) + threadIdx.x;
  uint64_t chunks[kChunks], unused = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) chunks[c] = reader.chunk(base + c * kThreads, unused);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint64_t first = 8 * (base + c * kThreads);
    if (first >= codes) return;
    float values[8], factors[8];
    if constexpr (LOWBIT_WHOLE) {
      const float factor = scales(static_cast<uint32_t>(first / 8) / (group / 8));
#pragma unroll
      for (int j = 0; j < 8; ++j) factors[j] = factor;
    } else {
      scales_of(scales, shape, first, factors);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t code = static_cast<uint32_t>(chunks[c] >> kBits * j) & ((1u << kBits) - 1);
      values[j] = __fmul_rn(book[code], factors[j]);
    }
    if (first + 8 <= codes) {
      store(out + first, values);
    } else {
      for (int j = 0; first + j < codes; ++j) store_one(out + first + j, values[j]);
    }
  }
}
