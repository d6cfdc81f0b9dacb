// Floats from codes in Words or Dense (stream.cuh): codebook[code] * scale in float32, rounded once. No division for an element.
//
//   LOWBIT_FROM, LOWBIT_BITS   the layout and k
//   LOWBIT_TYPE                what is written: float, __half or __nv_bfloat16
//   LOWBIT_SCALE               how a scale is stored: float, __half, __nv_bfloat16, or with two levels unsigned char or signed char
//   LOWBIT_SUPER               the second level's float type, or void
//   LOWBIT_WHOLE               1: groups divide the rows and 8 divides them, so that eight codes share a scale; 0: any shape
//
// A thread turns a chunk of eight codes into 16 bytes of half floats (or half a chunk into 16 bytes of float32), twice, and reads
// the next tile meanwhile.
// Neighbours' loads share their sectors and neighbours' stores are adjacent; 16-byte loads would give each thread 32 codes and put
// the stores of neighbours 64 bytes apart.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "stream.cuh"

using namespace lowbit_kbit;

constexpr int kBits = LOWBIT_BITS;
constexpr int kTurns = 2;  // of a thread in a tile; the next tile's loads are under way as well
constexpr int kThreads = 256;
constexpr int kEach = 16 / sizeof(LOWBIT_TYPE);  // codes of a turn
constexpr int kSharing = 8 / kEach;              // threads that read the same chunk

// Division of n < 2^31 by a number that the host knows: n * multiplier >> (32 + shift), multiplier = ceil(2^(32 + shift) / divisor)
// (Granlund and Montgomery, 1994); 0 stands for division by 1.
struct Divider {
  uint32_t multiplier, shift;
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const {
    return multiplier ? __umulhi(n, multiplier) >> shift : n;
  }
};

struct Shape {
  uint64_t codes;
  uint32_t columns, group, groups;  // of a row; flat groups are those of one long row
  uint32_t supers;                  // second-level scales of a row
  Divider by_eighths, by_groups, by_super;  // by group / 8, by groups, by the groups that share a second-level scale
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
      const uint32_t row = shape.by_groups(static_cast<uint32_t>(index));
      const uint32_t within = static_cast<uint32_t>(index) - row * shape.groups;
      return __fmul_rn(value, widen(supers[uint64_t{row} * shape.supers + shape.by_super(within)]));
    } else {
      return value;
    }
  }
};

__device__ __forceinline__ uint4 pack(const float (&v)[4], float) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
__device__ __forceinline__ uint4 pack(const float (&v)[8], __half) {
  __half2 pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __floats2half2_rn(v[2 * j], v[2 * j + 1]);
  return *reinterpret_cast<const uint4*>(pairs);
}
__device__ __forceinline__ uint4 pack(const float (&v)[8], __nv_bfloat16) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
  return *reinterpret_cast<const uint4*>(pairs);
}
__device__ __forceinline__ void store_one(float* out, float v) { *out = v; }
__device__ __forceinline__ void store_one(__half* out, float v) { *out = __float2half_rn(v); }
__device__ __forceinline__ void store_one(__nv_bfloat16* out, float v) { *out = __float2bfloat16_rn(v); }

// The scales of a turn's codes, which may lie in several groups: positions are counted, not divided.
template <typename S>
__device__ __forceinline__ void scales_of(const S& scales, const Shape& shape, uint64_t first, float (&factors)[kEach]) {
  const uint64_t row = first / shape.columns;
  uint32_t column = static_cast<uint32_t>(first - row * shape.columns);
  uint32_t group = column / shape.group, inside = column - group * shape.group;
  uint64_t index = row * shape.groups + group;
  float factor = scales(index);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
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

// What a thread reads for a tile of kThreads * kTurns turns, before it decodes the tile before.
struct Tile {
  uint64_t chunks[kTurns];
  float factors[LOWBIT_WHOLE ? kTurns : 1];

  template <bool Guarded, typename R, typename S>
  __device__ __forceinline__ void read(const R& reader, const S& scales, uint32_t base) {
    uint64_t unused = 0;
#pragma unroll
    for (int c = 0; c < kTurns; ++c) {
      const uint32_t chunk = (base + c * kThreads) / kSharing;
      chunks[c] = reader.template chunk<Guarded>(chunk, unused);
      if constexpr (LOWBIT_WHOLE) {
        const bool there = !Guarded || uint64_t{chunk} * 8 < reader.codes;
        factors[c] = there ? scales(scales.shape.by_eighths(chunk)) : 0;
      }
    }
  }

  template <bool Guarded, typename S>
  __device__ __forceinline__ void write(LOWBIT_TYPE* out, const float* book, const S& scales, uint32_t base) const {
#pragma unroll
    for (int c = 0; c < kTurns; ++c) {
      const uint32_t turn = base + c * kThreads;
      const uint64_t first = uint64_t{turn} * kEach, codes = scales.shape.codes;
      if (Guarded && first >= codes) return;
      float values[kEach], own[kEach];
      if constexpr (!LOWBIT_WHOLE) scales_of(scales, scales.shape, first, own);
      const uint64_t chunk = chunks[c] >> kBits * kEach * (turn % kSharing);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t code = static_cast<uint32_t>(chunk >> kBits * j) & ((1u << kBits) - 1);
        values[j] = __fmul_rn(book[code], LOWBIT_WHOLE ? factors[LOWBIT_WHOLE ? c : 0] : own[j]);
      }
      if (!Guarded || first + kEach <= codes) {
        __stcs(reinterpret_cast<uint4*>(out + first), pack(values, LOWBIT_TYPE{}));
      } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (first + j < codes) store_one(out + first + j, values[j]);
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    lowbit_kbit_dequantize(const void* source, const float* codebook, const LOWBIT_SCALE* stored, const void* supers,
                           LOWBIT_TYPE* out, uint64_t codes, uint32_t columns, uint32_t group, uint32_t groups,
                           uint32_t second_levels, uint32_t eighths, uint32_t eighths_shift, uint32_t rows, uint32_t rows_shift,
                           uint32_t supergroups, uint32_t supergroups_shift) {
  const Shape shape{codes, columns, group, groups, second_levels, {eighths, eighths_shift}, {rows, rows_shift},
                    {supergroups, supergroups_shift}};
  const Scales<LOWBIT_SCALE, LOWBIT_SUPER> scales{stored, static_cast<const LOWBIT_SUPER*>(supers), shape};
  const Reader<LOWBIT_FROM, kBits> reader{source, codes};
  __shared__ float book[1 << kBits];
  const float entry = threadIdx.x < 1 << kBits ? codebook[threadIdx.x] : 0;
  constexpr uint32_t turns = kThreads * kTurns;  // of a tile
  const uint32_t tiles = static_cast<uint32_t>((codes + turns * kEach - 1) / (turns * kEach));
  // Tiles whose words are all there, with two more words: they are read without guards, one ahead of what is written
  const uint32_t safe = codes < 64 ? 0 : static_cast<uint32_t>((codes - 64) / (turns * kEach));
  uint32_t tile = blockIdx.x;
  Tile here;
  if (tile < safe) here.read<false>(reader, scales, tile * turns + threadIdx.x);
  if (threadIdx.x < 1 << kBits) book[threadIdx.x] = entry;
  __syncthreads();
  for (; tile < safe; tile += gridDim.x) {
    Tile next;
    const bool more = tile + gridDim.x < safe;
    if (more) next.read<false>(reader, scales, (tile + gridDim.x) * turns + threadIdx.x);
    here.write<false>(out, book, scales, tile * turns + threadIdx.x);
    if (more) here = next;
  }
  for (; tile < tiles; tile += gridDim.x) {
    here.read<true>(reader, scales, tile * turns + threadIdx.x);
    here.write<true>(out, book, scales, tile * turns + threadIdx.x);
  }
}
