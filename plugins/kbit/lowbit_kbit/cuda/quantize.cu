// Codes and scales of groups of weights, with the arithmetic of lowbit_kbit/arithmetic.py to the bit.
//
//   LOWBIT_TYPE     the weights: float, __half or __nv_bfloat16
//   LOWBIT_SCALE    how scales are stored: float, __half or __nv_bfloat16
//   LOWBIT_RULE     0: absmax; 1: signed absmax; 2: scales are given, in `scales`
//   LOWBIT_VECTOR   weights that one lane loads at once, 1 to 16; it divides every group and every row, and so the addresses
//   LOWBIT_LANES    lanes that share a group: a power of two up to 256
//   LOWBIT_LOOPS    vectors that a lane keeps of a group; 0: too many, they are read twice
//   LOWBIT_COMPARES midpoints that may lie between a slot's count and x, or 0: binary search
//   LOWBIT_RANDOM   1: stochastic rounding
//
// status[0] becomes 1 when a weight is NaN or infinite, status[1] the largest extreme that the scale's type cannot hold.
// A team of lanes takes one group. Nearest entry: `below[slot(x)]` counts midpoints that lie surely below x, and a few comparisons
// with the next ones finish the count, so the slot may be rounded in any way that never decreases (lowbit_kbit/tables.py).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/cstdint>

using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uint8_t;

constexpr int kVector = LOWBIT_VECTOR, kLanes = LOWBIT_LANES, kLoops = LOWBIT_LOOPS;
constexpr int kThreads = 256, kMostSlots = 4096;
constexpr float kSmallest = 1.17549435e-38f;  // 2^-126
#define kInfinity __int_as_float(0x7f800000)
enum Rule { Absmax, Signed, Given };

struct Grid {
  uint32_t rows, columns, group, groups;  // groups of a row
  uint64_t stride;                        // elements from row to row of the weight
  uint64_t first;                         // number of the first element in the whole weight, for random numbers
  uint32_t entries, slots, seed;
  float step, start;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void round_to(float value, float& out) { out = value; }
__device__ __forceinline__ void round_to(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void round_to(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// The larger of two, NaN when one is.
__device__ __forceinline__ float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || b != b ? __int_as_float(0x7fffffff) : fmaxf(a, b);
#endif
}

// A 32-bit mixer: xor-shifts and two odd multipliers ("lowbias32", Chris Wellons, public domain).
__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

struct alignas(sizeof(LOWBIT_TYPE) * kVector >= 16 ? 16 : sizeof(LOWBIT_TYPE)) Vector {
  LOWBIT_TYPE values[kVector];
};

__device__ __forceinline__ Vector load(const LOWBIT_TYPE* from) {
  constexpr int bytes = sizeof(LOWBIT_TYPE) * kVector;
  Vector found;
  if constexpr (bytes >= 16) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) reinterpret_cast<uint4*>(found.values)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) found.values[i] = from[i];
  }
  return found;
}

__device__ __forceinline__ void store(uint8_t* to, const uint8_t (&codes)[kVector]) {
  if constexpr (kVector == 16) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(codes);
  } else if constexpr (kVector == 8) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(codes);
  } else if constexpr (kVector == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = codes[i];
  }
}

struct Tables {
  float edges[256];    // midpoints, then infinity; with LOWBIT_RANDOM the entries, then infinity
  alignas(16) uint8_t below[kMostSlots];

  // How many edges lie strictly below x (with LOWBIT_RANDOM: at or below). `entries` is a power of two.
  __device__ __forceinline__ uint32_t count(float x, const Grid& grid) const {
#if LOWBIT_COMPARES
    // In [0, slots): the sum with 2^23 leaves the rounded slot in the low bits of the float
    const float share = __saturatef(fmaf(x, grid.step, grid.start));
    const uint32_t slot = __float_as_uint(fmaf(share, static_cast<float>(grid.slots - 1), 8388608.0f)) - 0x4b000000u;
    uint32_t found = below[slot];
#pragma unroll
    for (int i = 0; i < LOWBIT_COMPARES; ++i) found += LOWBIT_RANDOM ? edges[found] <= x : edges[found] < x;
    return found;
#else
    uint32_t found = 0;
    for (uint32_t half = grid.entries / 2; half; half /= 2) {
      const float edge = edges[found + half - 1];
      found += (LOWBIT_RANDOM ? edge <= x : edge < x) ? half : 0;
    }
    return found;
#endif
  }
};

// The entry below x or the one above, with the chances that make x the mean.
__device__ __forceinline__ uint32_t rounded(float x, uint32_t bits, const float* entries, uint32_t inner, const Grid& grid) {
  const uint32_t low = inner < grid.entries - 1 ? inner : grid.entries - 2;
  const float gap = __fsub_rn(entries[low + 1], entries[low]);
  const float limit = __fadd_rn(entries[low], __fmul_rn(static_cast<float>(bits >> 8) * 0x1p-24f, gap));
  return inner == grid.entries - 1 ? inner : low + (limit < x);
}

// Random bits of an element: of the low half of its number and of the mixed high half, which seldom changes.
struct Random {
  uint32_t low, here, beyond;  // `beyond` when the low half has wrapped
  __device__ __forceinline__ Random(uint64_t element, uint32_t seed)
      : low(static_cast<uint32_t>(element)),
        here(mix(static_cast<uint32_t>(element >> 32) ^ mix(seed))),
        beyond(mix(static_cast<uint32_t>((element >> 32) + 1) ^ mix(seed))) {}
  __device__ __forceinline__ uint32_t operator()(int j) const { return mix(low + j ^ (low + j < low ? beyond : here)); }
};

// The largest value of a team, NaN when one is. A team of several warps meets in shared memory, and every thread of the block with it.
__device__ __forceinline__ float reduce(float value) {
  constexpr int lanes = kLanes < 32 ? kLanes : 32;
#pragma unroll
  for (int step = lanes / 2; step; step /= 2) value = max_nan(value, __shfl_xor_sync(0xffffffffu, value, step));
  if constexpr (kLanes > 32) {
    __shared__ float warps[kThreads / 32];
    __syncthreads();  // the last reduction has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    const int first = threadIdx.x / kLanes * (kLanes / 32);
#pragma unroll
    for (int i = 0; i < kLanes / 32; ++i) value = max_nan(value, warps[first + i]);
  }
  return value;
}

__device__ __forceinline__ float extreme(float high, float low) { return LOWBIT_RULE == Absmax ? max_nan(high, low) : high >= low ? high : -low; }

extern "C" __global__ void __launch_bounds__(kThreads)
    lowbit_kbit_quantize(const LOWBIT_TYPE* weight, uint8_t* codes, LOWBIT_SCALE* scales, const float* edges, const float* entries,
                         const uint8_t* below, int* status, uint32_t rows, uint32_t columns, uint32_t group, uint32_t groups,
                         uint64_t stride, uint64_t first, uint32_t count, uint32_t slots, uint32_t seed, float step, float start) {
  const Grid grid{rows, columns, group, groups, stride, first, count, slots, seed, step, start};
  __shared__ Tables tables;
  __shared__ float book[LOWBIT_RANDOM ? 256 : 1];
  if (threadIdx.x < count) {
    tables.edges[threadIdx.x] = edges[threadIdx.x];
    if constexpr (LOWBIT_RANDOM) book[threadIdx.x] = entries[threadIdx.x];
  }
  if constexpr (LOWBIT_COMPARES > 0) {
    for (uint32_t i = threadIdx.x; i < slots / 16; i += kThreads) {  // 256 slots or more
      reinterpret_cast<uint4*>(tables.below)[i] = reinterpret_cast<const uint4*>(below)[i];
    }
  }
  __syncthreads();

  constexpr int teams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const uint64_t total = uint64_t{rows} * groups;
  for (uint64_t block = blockIdx.x; block * teams < total; block += gridDim.x) {
    const uint64_t team = block * teams + threadIdx.x / kLanes;
    const bool real = team < total;
    const uint32_t row = real && rows > 1 ? static_cast<uint32_t>(team) / groups : 0;
    const uint64_t place = uint64_t{static_cast<uint32_t>(team - uint64_t{row} * groups)} * group;  // first column
    const uint32_t length = real ? (columns - place < group ? static_cast<uint32_t>(columns - place) : group) : 0;
    const LOWBIT_TYPE* from = weight + row * stride + place;

    Vector kept[kLoops ? kLoops : 1];
    float high = LOWBIT_RULE == Signed ? -kInfinity : 0, low = LOWBIT_RULE == Signed ? -kInfinity : 0;
#pragma unroll (kLoops ? kLoops : 2)
    for (int i = 0; kLoops ? i < kLoops : i * kLanes * kVector < length; ++i) {
      const uint32_t at = (i * kLanes + lane) * kVector;
      if (at >= length) break;
      const Vector vector = load(from + at);
      if constexpr (kLoops > 0) kept[i] = vector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float w = widen(vector.values[j]);
        high = max_nan(high, LOWBIT_RULE == Absmax ? fabsf(w) : w);
        if constexpr (LOWBIT_RULE == Signed) low = max_nan(low, -w);
      }
    }
    LOWBIT_SCALE stored;
    if constexpr (LOWBIT_RULE == Given) {
      stored = real ? scales[team] : LOWBIT_SCALE(0.0f);
    } else {
      high = reduce(high);
      if constexpr (LOWBIT_RULE == Signed) low = reduce(low);
      const float found = extreme(high, low);
      round_to(found, stored);
      if (real && !(fabsf(found) < kInfinity)) *status = 1;
      else if (real && !(fabsf(widen(stored)) < kInfinity)) atomicMax(status + 1, __float_as_int(fabsf(found)));
      if (fabsf(widen(stored)) < kSmallest) round_to(0.0f, stored);
      if (real && lane == 0) scales[team] = stored;
    }
    const float scale = widen(stored);
    const float inverse = fabsf(scale) < kSmallest ? 0.0f : __frcp_rn(scale);
    const uint64_t element = uint64_t{row} * columns + place;
#pragma unroll (kLoops ? kLoops : 2)
    for (int i = 0; kLoops ? i < kLoops : i * kLanes * kVector < length; ++i) {
      const uint32_t at = (i * kLanes + lane) * kVector;
      if (at >= length) break;
      const Vector vector = kLoops ? kept[kLoops ? i : 0] : load(from + at);
      const Random random(first + element + at, seed);
      __align__(16) uint8_t found[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float x = __fmul_rn(widen(vector.values[j]), inverse);
        const uint32_t code = tables.count(x, grid);
        found[j] = static_cast<uint8_t>(LOWBIT_RANDOM ? rounded(x, random(j), book, code, grid) : code);
      }
      store(codes + element + at, found);
    }
  }
}
