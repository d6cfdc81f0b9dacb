// A weight in units, written out as floats: the same numbers as the formats' definitions give, bit for bit.
//
//   w = (q - z) * s,  w = q * s + m  or  w = codebook[q] * s, in float32, each operation rounded, then once to the output's type.
//
// One warp writes one unit at a time: 8 rows in shared memory first, so that it writes whole lines, 512 bytes of one row together.
// Its next unit is on the way meanwhile: without that warps waited for memory for 84 % of the time (ncu on an H200, 2026-11-21).
#pragma once
#include <lowbit/unit.cuh>

namespace lowbit {

// Eight values as T, in 16-byte pieces.
__device__ __forceinline__ void pieces(uint4 (&piece)[2], const float (&v)[8], float) {
  piece[0] = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  piece[1] = make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7]));
}
template <class T>
__device__ __forceinline__ void pieces(uint4 (&piece)[1], const float (&v)[8], T) {
  T rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) rounded[i] = Activation<T>::store(v[i]);
  piece[0] = *reinterpret_cast<const uint4*>(rounded);
}

template <class Decoder, class Unit, class T>
struct Dequantize {
  static constexpr int WARPS = 8, GROUPS = Unit::GROUPS;
  static constexpr int PIECES = sizeof(T) / 2;      // of 16 bytes, for eight values
  static constexpr int PARTS = PIECES;              // of 8 rows of a unit: 4 KB each
  static constexpr int COLUMNS = 16 / sizeof(T);    // of one piece

  // What a lane reads of a unit, all at once.
  struct Loaded {
    uint32_t words[4 * Unit::BITS];
    typename Unit::Pair scales[GROUPS], offsets[Unit::PLAIN ? 1 : GROUPS];
    __device__ __forceinline__ void load(const char* data, int lane) {
#pragma unroll
      for (int slab = 0; slab < Unit::BITS; ++slab) {
        reinterpret_cast<uint4*>(words)[slab] = __ldcs(reinterpret_cast<const uint4*>(data + slab * 512 + lane * 16));
      }
      const auto* pairs = reinterpret_cast<const typename Unit::Pair*>(data + Unit::CODE_BYTES) + (lane >> 2) * GROUPS;
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        scales[i] = pairs[i];
        if (!Unit::PLAIN) offsets[i] = pairs[i + Unit::SCALE_BYTES / sizeof(typename Unit::Pair)];
      }
    }
  };

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
    __shared__ uint4 staged[WARPS][8][32];
    const int lane = lane_number(), g = lane >> 2, t = lane & 3;
    auto& rows_of_warp = staged[threadIdx.x >> 5];
    const long long stride = static_cast<long long>(gridDim.x) * WARPS;
    const long long first = static_cast<long long>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
    Loaded next;
    if (first < units) next.load(weights + first * Unit::BYTES, lane);
#pragma unroll 1
    for (long long unit = first; unit < units; unit += stride) {
      const Loaded now = next;
      if (unit + stride < units) next.load(weights + (unit + stride) * Unit::BYTES, lane);
      const long long tile = unit / across;
      const int first_column = static_cast<int>(unit - tile * across) * 256;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const long long first_row = tile * 16 + 8 * half;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
          for (int i = 0; i < 8 / PARTS; ++i) {
            const int pair = part * (8 / PARTS) + i;  // fragments 2 * pair and 2 * pair + 1
            uint4 eight[PIECES];
            float values[8];
            decode(values, now, pair, half, zero, entries);
            pieces(eight, values, T());
#pragma unroll
            for (int j = 0; j < PIECES; ++j) rows_of_warp[g][((4 * i + t) * PIECES + j) ^ swizzle(g)] = eight[j];
          }
          __syncwarp();
          write(out + first_row * in_features, rows_of_warp, rows - first_row, first_column + part * (256 / PARTS), in_features, lane);
          __syncwarp();
        }
      }
    }
  }

  // Two rows of eight lanes meet in the banks: every other row has its halves (or neighbours, in float32) exchanged.
  static __device__ __forceinline__ int swizzle(int row) { return row % 2 * (PIECES == 1 ? 4 : 1); }

  // The eight values of a lane in one pair of fragments and one half of the rows.
  static __device__ __forceinline__ void decode(float (&values)[8], const Loaded& unit, int pair, int half, float zero,
                                                const float* entries) {
    const int group = 2 * pair / Unit::FRAGMENTS;
    const float2 scale = as_floats(unit.scales[group]);
    const float2 offset = Unit::PLAIN ? make_float2(zero, zero) : as_floats(unit.offsets[group]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int2 codes = Decoder::codes(unit.words + pair / 2 * Unit::BITS, 2 * (pair % 2) + i / 2, 2 * (i % 2) + half);
      values[2 * i] = value(codes.x, half ? scale.y : scale.x, half ? offset.y : offset.x, entries);
      values[2 * i + 1] = value(codes.y, half ? scale.y : scale.x, half ? offset.y : offset.x, entries);
    }
  }

  // Eight rows from shared memory to `out`, as many as there are.
  static __device__ __forceinline__ void write(T* out, const uint4 (&staged)[8][32], long long rows, int column, int in_features,
                                               int lane) {
    if (in_features % COLUMNS == 0) {
      const bool inside = column + lane * COLUMNS < in_features;
#pragma unroll
      for (int row = 0; row < 8; ++row) {
        const uint4 piece = staged[row][lane ^ swizzle(row)];
        if (inside && row < rows) reinterpret_cast<uint4*>(out + row * static_cast<long long>(in_features) + column)[lane] = piece;
      }
    } else {  // rows begin anywhere: value by value
#pragma unroll 1
      for (int i = lane; i < 8 * 32 * COLUMNS; i += 32) {
        const int row = i / (32 * COLUMNS), place = i % (32 * COLUMNS), piece = place / COLUMNS ^ swizzle(row);
        if (row < rows && column + place < in_features) {
          out[row * static_cast<long long>(in_features) + column + place] = reinterpret_cast<const T*>(&staged[row][piece])[place % COLUMNS];
        }
      }
    }
  }
};

}  // namespace lowbit
