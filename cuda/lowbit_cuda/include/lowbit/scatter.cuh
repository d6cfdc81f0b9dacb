// A weight whose units hold its columns in another order (columns.py), written out as floats in its own: the same numbers as
// dequantize.cuh gives, each at the place that `source` names.
//
// One warp takes one unit at a time. A lane has four neighbouring columns of each fragment; where they are neighbours in the weight,
// too (groups of 16), they are stored together, else (act-order) one by one.
#pragma once
#include <lowbit/dequantize.cuh>

namespace lowbit {

template <class Decoder, class Unit, class T>
struct Scatter {
  static constexpr int WARPS = 8, GROUPS = Unit::GROUPS;
  struct alignas(4 * sizeof(T)) Four {
    T values[4];
  };
  static __device__ __forceinline__ float rounded(float, float value) { return value; }
  template <class U>
  static __device__ __forceinline__ U rounded(U, float value) {
    return Activation<U>::store(value);
  }

  // source: the weight's column of each column of the units, in_features or more where there is none; length: how many there are.
  static __device__ __forceinline__ void run(const char* weights, const float* codebook, const int* source, T* out, int rows,
                                             int in_features, int length, long long units, int across, float zero) {
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
      for (int m = 0; m < 16; ++m) {
        const int group = m / Unit::FRAGMENTS, column = first_column + 32 * (m / 2) + 4 * (m % 2);
        if (column >= length) continue;
        const int4 to = __ldg(reinterpret_cast<const int4*>(source + column));
        const float2 scale = as_floats(pairs[group]);
        const float2 offset = Unit::PLAIN ? make_float2(zero, zero) : as_floats(pairs[group + Unit::SCALE_BYTES / sizeof(typename Unit::Pair)]);
        float found[2][4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int2 codes = Decoder::codes(words + m / 4 * Unit::BITS, m % 4, r);
          const float by = r % 2 ? scale.y : scale.x, from = r % 2 ? offset.y : offset.x;
          found[r % 2][2 * (r / 2)] = Dequantize<Decoder, Unit, T>::value(codes.x, by, from, entries);
          found[r % 2][2 * (r / 2) + 1] = Dequantize<Decoder, Unit, T>::value(codes.y, by, from, entries);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const long long row = first_row + 8 * half;
          if (row < rows) store(out + row * in_features, in_features, to, found[half]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void store(T* row, int in_features, const int4& to, const float (&found)[4]) {
    Four four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.values[i] = rounded(T(), found[i]);
    if (to.y == to.x + 1 && to.z == to.x + 2 && to.w == to.x + 3 && to.w < in_features && to.x % 4 == 0 && in_features % 4 == 0) {
      *reinterpret_cast<Four*>(row + to.x) = four;
      return;
    }
    if (to.x < in_features) row[to.x] = four.values[0];
    if (to.y < in_features) row[to.y] = four.values[1];
    if (to.z < in_features) row[to.z] = four.values[2];
    if (to.w < in_features) row[to.w] = four.values[3];
  }
};

}  // namespace lowbit
