// A weight in units, written out as floats: the same numbers as the formats' definitions give, bit for bit.
//
//   w = (q - z) * s,  w = q * s + m  or  w = codebook[q] * s, in float32, each operation rounded, then once to the output's type.
//
// One warp writes one unit at a time: a lane has 8 consecutive columns of row g and of row g + 8, 16 bytes of fp16 each.
#pragma once
#include <lowbit/unit.cuh>

namespace lowbit {

__device__ __forceinline__ void store_eight(float* out, const float (&v)[8]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <class T>
__device__ __forceinline__ void store_eight(T* out, const float (&v)[8]) {
  T rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) rounded[i] = Activation<T>::store(v[i]);
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(rounded);
}
__device__ __forceinline__ void store_one(float* out, float value) { *out = value; }
template <class T>
__device__ __forceinline__ void store_one(T* out, float value) {
  *out = Activation<T>::store(value);
}

template <class Decoder, class Unit, class T>
struct Dequantize {
  static constexpr int WARPS = 8, GROUPS = Unit::GROUPS;

  static __device__ __forceinline__ float value(int code, float scale, float offset, const float* codebook) {
    if (!Decoder::INTEGER) return codebook[code] * scale;
    if (Unit::MINIMUMS) return __fadd_rn(__fmul_rn(static_cast<float>(code), scale), offset);
    return (static_cast<float>(code) - offset) * scale;
  }

  // units: how many there are in all; across: in a row. Rows of out are in_features long.
  static __device__ __forceinline__ void run(const char* weights, const float* codebook, T* out, int rows, int in_features,
                                             long long units, int across, float zero) {
    __shared__ float entries[Decoder::INTEGER ? 1 : 1 << Decoder::BITS];
    if (!Decoder::INTEGER) {
      for (int i = threadIdx.x; i < (1 << Decoder::BITS); i += WARPS * 32) entries[i] = codebook[i];
      __syncthreads();
    }
    const int lane = lane_number(), g = lane >> 2, t = lane & 3;
    const long long stride = static_cast<long long>(gridDim.x) * WARPS;
#pragma unroll 1
    for (long long unit = static_cast<long long>(blockIdx.x) * WARPS + (threadIdx.x >> 5); unit < units; unit += stride) {
      const char* data = weights + unit * Unit::BYTES;
      uint32_t words[4 * Unit::BITS];
#pragma unroll
      for (int slab = 0; slab < Unit::BITS; ++slab) {
        reinterpret_cast<uint4*>(words)[slab] = __ldcs(reinterpret_cast<const uint4*>(data + slab * 512 + lane * 16));
      }
      const auto* pairs = reinterpret_cast<const typename Unit::Pair*>(data + Unit::CODE_BYTES) + g * GROUPS;
      const long long tile = unit / across, first_row = tile * 16 + g;
      const int first_column = static_cast<int>(unit - tile * across) * 256 + 8 * t;
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {  // fragments 2 * pair and 2 * pair + 1
        const int group = 2 * pair / Unit::FRAGMENTS, column = first_column + 32 * pair;
        const float2 scale = as_floats(pairs[group]);
        const float2 offset = Unit::PLAIN ? make_float2(zero, zero) : as_floats(pairs[group + Unit::SCALE_BYTES / sizeof(Unit::Pair)]);
        float values[2][8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int m = 2 * (pair % 2) + i / 4, r = i % 4;
          const int2 codes = Decoder::codes(words + pair / 2 * Unit::BITS, m, r);
          const int place = 4 * (i / 4) + 2 * (r / 2), half = r % 2;
          values[half][place] = value(codes.x, half ? scale.y : scale.x, half ? offset.y : offset.x, entries);
          values[half][place + 1] = value(codes.y, half ? scale.y : scale.x, half ? offset.y : offset.x, entries);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const long long row = first_row + 8 * half;
          if (row >= rows || column >= in_features) continue;
          T* place = out + row * in_features + column;
          if (in_features % 8 == 0) {
            store_eight(place, values[half]);
          } else {
            for (int i = 0; i < 8 && column + i < in_features; ++i) store_one(place + i, values[half][i]);
          }
        }
      }
    }
  }
};

}  // namespace lowbit
