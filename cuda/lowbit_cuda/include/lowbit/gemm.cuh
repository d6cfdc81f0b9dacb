// y = x W^T for 17 to 64 rows of x: weights become fp16 once and meet every row of x; the work is cut evenly over the device.
//
//   A block computes 256 rows of W (a row tile for each of 16 warps) for all rows of x, over steps of 256 columns:
//
//        step 0    step 1              x of a step and the units of every warp arrive in shared memory by
//      [ unit ]   [ unit ] ... warp 0  cp.async, STAGES steps ahead; there x lies in fragment order:
//      [ unit ]   [ unit ] ... warp 1  [8 rows of x][pair of fragments][lane] 16 bytes
//        ...
//
//
//   All (256-row block, step) pairs in order are one line that is cut into gridDim.x pieces of equal length (stream-K: Osama et al.
//   2023). A block whose piece covers only a part of a row block leaves its sums in `partial`; the last one to arrive adds them, in the
//   order of the columns: two runs give the same bits. `arrived` counts steps for each row block, and is left at zero.
//
// Weights are rounded once, to fp16, after the scale: w = (q - z) * s in fp16 arithmetic that is exact up to that rounding when the
// scale is fp16, through float32 when it is not.
#pragma once
#include <lowbit/unit.cuh>

namespace lowbit {

struct GemmArguments {
  const char* weights;
  const float* codebook;
  const __half* x;
  float* partial;
  int* arrived;
  int tokens, in_features, out_features, x_stride, y_stride;
  int tiles, units, steps, items;
  float zero, factor;
};

template <class Decoder, class Unit, class T, int TOKENS, int STAGES>
struct Gemm {
  static constexpr int WARPS = 16, ROWS = 16 * WARPS;
  static constexpr int BLOCKS = TOKENS / 8, GROUPS = Unit::GROUPS;
  static constexpr int X_STAGE = BLOCKS * 4096, STAGE = X_STAGE + WARPS * Unit::BYTES;  // bytes
  using Sums = float[BLOCKS][4];

  static __device__ __forceinline__ void fetch(const GemmArguments& a, char* stage, int block, int step, int warp, int lane) {
    // x: a warp copies whole lines, 128 bytes of 4 rows at a time: L2 is limited by requests, all blocks read the same x
    const uint32_t x_place = shared_address(stage);
#pragma unroll
    for (int i = warp; i < BLOCKS * 8; i += WARPS) {
      const int piece = i % 4 * 8 + (lane & 7), token = i / 4 * 4 + (lane >> 3), column = step * 256 + 8 * piece;
      const int eight = token / 8, g = token % 8;
      const bool there = token < a.tokens && column < a.in_features;
      const __half* source = there ? a.x + static_cast<long long>(token) * a.x_stride + column : a.x;
      const int place = (8 * eight + piece / 4) * 512 + (4 * g + piece % 4) * 16;
      copy_async16_or_zeros(x_place + place, source, there);
    }
    const int tile = block * WARPS + warp;
    if (tile < a.tiles) {
      const char* source = a.weights + (static_cast<long long>(tile) * a.units + step) * Unit::BYTES + lane * 16;
      Unit::fetch(x_place + X_STAGE + warp * Unit::BYTES + lane * 16, source, Unit::in_last(lane));
    }
  }

  // Two fields in place -> two fp16 weights, rounded once.
  static __device__ __forceinline__ uint32_t weight(uint32_t field, int position, float scale, float offset) {
    __half2 value = *reinterpret_cast<const __half2*>(&field);
    if constexpr (Decoder::INTEGER) {
      // 0x6400 is 1024, whose last bit counts 1: the field adds q * 2^p. Then q - z exactly, as (1024 + q 2^p) 2^-p - (1024 2^-p + z).
      const uint32_t raised = field | 0x64006400u;
      const float shift = Unit::MINIMUMS ? 0.0f : offset;
      const float power = power_of_two(-position);
      value = __hfma2(*reinterpret_cast<const __half2*>(&raised), __float2half2_rn(power), __float2half2_rn(-1024.0f * power - shift));
    }
    if constexpr (Unit::MINIMUMS || sizeof(typename Unit::Pair) == 8) {
      const float2 wide = __half22float2(value);
      const float minimum = Unit::MINIMUMS ? offset : 0.0f;
      value = __floats2half2_rn(wide.x * scale + minimum, wide.y * scale + minimum);
    } else {
      value = __hmul2(value, __float2half2_rn(scale));
    }
    return *reinterpret_cast<const uint32_t*>(&value);
  }

  // The fragments of one chunk of a lane's unit.
  static __device__ __forceinline__ void decode(uint32_t (&a)[4][4], const uint32_t* words, int chunk, const typename Unit::Pair* scales,
                                                const typename Unit::Pair* offsets, float zero, const Table& table) {
    Decoder::decode(words + chunk * Unit::BITS, a, table);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int group = (4 * chunk + m) / Unit::FRAGMENTS;
      const float2 scale = as_floats(scales[group]);
      const float2 offset = Unit::PLAIN ? make_float2(zero, zero) : as_floats(offsets[group]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[m][r] = weight(a[m][r], Decoder::position(m, r / 2), r % 2 ? scale.y : scale.x, r % 2 ? offset.y : offset.x);
      }
    }
  }

  static __device__ __forceinline__ void multiply(Sums& sums, uint32_t x, uint32_t unit, int lane, float zero, const Table& table) {
    typename Unit::Pair scales[GROUPS], offsets[GROUPS];
    uint32_t words[4 * Unit::BITS];
    Unit::words(words, unit + lane * 16);
    Unit::pairs(scales, unit + Unit::pairs_offset(lane));
    if (!Unit::PLAIN) Unit::pairs(offsets, unit + Unit::pairs_offset(lane) + Unit::SCALE_BYTES);
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      uint32_t a[4][4];
      decode(a, words, chunk, scales, offsets, zero, table);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          uint32_t b[4];
          load_shared(b, x + (block * 8 + 2 * chunk + pair) * 512 + lane * 16);
          mma_f16(sums[block], a[2 * pair], b[0], b[1]);
          mma_f16(sums[block], a[2 * pair + 1], b[2], b[3]);
        }
      }
    }
  }

  // Where a warp's sums lie in float memory: 4 of one lane together, lanes in order.
  static __device__ __forceinline__ int place(int warp, int block, int lane) { return ((warp * BLOCKS + block) * 32 + lane) * 4; }
  static __device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4 * BLOCKS; ++i) sums[i / 4][i % 4] = 0.0f;
  }
  static __device__ __forceinline__ void add(Sums& sums, const float4& s, int block) {
    sums[block][0] += s.x;
    sums[block][1] += s.y;
    sums[block][2] += s.z;
    sums[block][3] += s.w;
  }

  static __device__ __forceinline__ void store(const GemmArguments& a, const Sums& sums, int row_block, int warp, int lane,
                                               const T* bias, T* y) {
    const int g = lane >> 2, t = lane & 3, first = row_block * ROWS + warp * 16 + g;
    float offsets[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (bias != nullptr && first + 8 * half < a.out_features) offsets[half] = Activation<T>::load(bias[first + 8 * half]);
    }
#pragma unroll
    for (int i = 0; i < 4 * BLOCKS; ++i) {
      const int half = i % 4 / 2, row = first + 8 * half, token = i / 4 * 8 + 2 * t + i % 2;
      if (row < a.out_features && token < a.tokens) {
        y[static_cast<long long>(token) * a.y_stride + row] = Activation<T>::store(sums[i / 4][i % 4] * a.factor + offsets[half]);
      }
    }
  }

  // The piece of the line that block `index` works on begins here.
  static __device__ __forceinline__ int piece(const GemmArguments& a, int index) {
    return static_cast<int>(static_cast<long long>(index) * a.items / gridDim.x);
  }

  // A part of a row block is done: leave it, and let the last part add all of them up.
  static __device__ __forceinline__ void share(const GemmArguments& a, Sums& sums, int row_block, int from, int to, int warp,
                                               int lane, const T* bias, T* y) {
    constexpr int size = ROWS * TOKENS;
    __shared__ bool last;
    const int begin = piece(a, blockIdx.x), first_item = row_block * a.steps;
    float* mine = a.partial + (2 * static_cast<long long>(blockIdx.x) + (first_item > begin ? 1 : 0)) * size;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const float* s = sums[block];
      __stcg(reinterpret_cast<float4*>(mine + place(warp, block, lane)), make_float4(s[0], s[1], s[2], s[3]));
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(a.arrived + row_block, to - from) + to - from == a.steps;
      if (last) a.arrived[row_block] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    clear(sums);
    int index = static_cast<int>((static_cast<long long>(first_item) * gridDim.x + gridDim.x - 1) / a.items);
    while (index > 0 && piece(a, index) > first_item) --index;  // the block that has the first step
    while (piece(a, index + 1) <= first_item) ++index;
    for (; piece(a, index) < first_item + a.steps; ++index) {
      const float* part = a.partial + (2 * static_cast<long long>(index) + (first_item > piece(a, index) ? 1 : 0)) * size;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        add(sums, __ldcg(reinterpret_cast<const float4*>(part + place(warp, block, lane))), block);
      }
    }
    store(a, sums, row_block, warp, lane, bias, y);
  }

  static __device__ __forceinline__ void run(const GemmArguments& a, const T* bias, T* y) {
    extern __shared__ __align__(128) char shared[];
    const int lane = lane_number(), warp = threadIdx.x >> 5;
    const int begin = piece(a, blockIdx.x), end = piece(a, blockIdx.x + 1);
    char* table = shared + STAGES * STAGE;
    const Table where = {shared_address(table), static_cast<uint32_t>(lane * 4)};
    launch_dependents();
    wait_for_previous();
    auto start = [&](int item) {
      if (item < end) fetch(a, shared + (item - begin) % STAGES * STAGE, item / a.steps, item % a.steps, warp, lane);
      copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) start(begin + i);
    Decoder::prepare(table, a.codebook);
    Sums sums = {};
    int from = begin % a.steps;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
      copy_wait<STAGES - 2>();
      __syncthreads();
      start(item + STAGES - 1);
      const int row_block = item / a.steps, step = item - row_block * a.steps;
      const uint32_t stage = shared_address(shared) + (item - begin) % STAGES * STAGE;
      multiply(sums, stage, stage + X_STAGE + warp * Unit::BYTES, lane, a.zero, where);
      if (step + 1 < a.steps && item + 1 < end) continue;
      if (from == 0 && step + 1 == a.steps) {
        store(a, sums, row_block, warp, lane, bias, y);
      } else {
        share(a, sums, row_block, from, step + 1, warp, lane, bias, y);
      }
      from = 0;
      clear(sums);
    }
  }
};

}  // namespace lowbit
