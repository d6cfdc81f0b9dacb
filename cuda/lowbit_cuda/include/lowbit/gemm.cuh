// y = x W^T for 17 to 64 rows of x: weights become fp16 once and meet every row of x; the work is cut evenly over the device.
//
//   A block computes 128 rows of W (ROW_WARPS warps of two row tiles each) for all rows of x, over steps of K_WARPS * 256 columns:
//
//        step 0             step 1                      warp = (row warp, column warp)
//      [ unit | unit ]    [ unit | unit ] ...  tile 0   x of a step and the units of every warp arrive in shared memory by
//      [ unit | unit ]    [ unit | unit ] ...  tile 1   cp.async, STAGES steps ahead; x lies there in fragment order:
//        warp   warp                                    [unit][8 rows of x][pair of fragments][lane] 16 bytes
//
//   All (128-row block, step) pairs in order are one line that is cut into gridDim.x pieces of equal length (stream-K: Osama et al.
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
  static constexpr int ROW_WARPS = 4, K_WARPS = 2, WARPS = ROW_WARPS * K_WARPS, ROWS = 32 * ROW_WARPS;
  static constexpr int BLOCKS = TOKENS / 8, GROUPS = Unit::GROUPS;
  static constexpr int X_UNIT = BLOCKS * 4096, X_STAGE = K_WARPS * X_UNIT;  // bytes
  static constexpr int W_WARP = 2 * Unit::BYTES, STAGE = X_STAGE + WARPS * W_WARP;
  static_assert(X_STAGE >= 4 * ROWS * TOKENS, "sums are exchanged where x was");
  using Sums = float[2][BLOCKS][4];

  static __device__ __forceinline__ void fetch(const GemmArguments& a, char* stage, int block, int step, int warp, int lane) {
    // x: thread i of the block copies pieces of 16 bytes, 4 neighbours (t) of 8 rows (g) to 512 bytes in order
    const uint32_t x_place = shared_address(stage);
#pragma unroll
    for (int i = warp; i < K_WARPS * BLOCKS * 8; i += WARPS) {
      const int pair = i % 8, token = i / 8 % BLOCKS * 8 + (lane >> 2);
      const int column = (step * K_WARPS + i / (8 * BLOCKS)) * 256 + 32 * pair + 8 * (lane & 3);
      const bool there = token < a.tokens && column < a.in_features;
      const __half* source = there ? a.x + static_cast<long long>(token) * a.x_stride + column : a.x;
      copy_async16_or_zeros(x_place + i * 512 + lane * 16, source, there);
    }
    const int unit = step * K_WARPS + warp / ROW_WARPS;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = block * (2 * ROW_WARPS) + warp % ROW_WARPS * 2 + half;
      if (tile < a.tiles && unit < a.units) {
        const char* source = a.weights + (static_cast<long long>(tile) * a.units + unit) * Unit::BYTES + lane * 16;
        Unit::fetch(x_place + X_STAGE + warp * W_WARP + half * Unit::BYTES + lane * 16, source, Unit::in_last(lane));
      }
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

  static __device__ __forceinline__ void multiply(Sums& sums, const char* x, uint32_t units, int lane, float zero,
                                                  const Table& table) {
    typename Unit::Pair scales[2][GROUPS], offsets[2][GROUPS];
    uint32_t words[2][4 * Unit::BITS];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t unit = units + half * Unit::BYTES;
      Unit::words(words[half], unit + lane * 16);
      Unit::pairs(scales[half], unit + Unit::pairs_offset(lane));
      if (!Unit::PLAIN) Unit::pairs(offsets[half], unit + Unit::pairs_offset(lane) + Unit::SCALE_BYTES);
    }
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      uint32_t a[2][4][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Decoder::decode(words[half] + chunk * Unit::BITS, a[half], table);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int group = (4 * chunk + m) / Unit::FRAGMENTS;
          const float2 scale = as_floats(scales[half][group]);
          const float2 offset = Unit::PLAIN ? make_float2(zero, zero) : as_floats(offsets[half][group]);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float s = r % 2 ? scale.y : scale.x, o = r % 2 ? offset.y : offset.x;
            a[half][m][r] = weight(a[half][m][r], Decoder::position(m, r / 2), s, o);
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          const uint4 b = *reinterpret_cast<const uint4*>(x + (block * 8 + 2 * chunk + pair) * 512 + lane * 16);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma_f16(sums[half][block], a[half][2 * pair], b.x, b.y);
            mma_f16(sums[half][block], a[half][2 * pair + 1], b.z, b.w);
          }
        }
      }
    }
  }

  // Places of a block's sums in float memory: 4 of one lane together, lanes in order.
  static __device__ __forceinline__ int place(int row_warp, int half, int block, int lane) {
    return (((row_warp * 2 + half) * BLOCKS + block) * 32 + lane) * 4;
  }

  static __device__ __forceinline__ void store(const GemmArguments& a, const Sums& sums, int row_block, int row_warp, int lane,
                                               const T* bias, T* y) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = row_block * ROWS + row_warp * 32 + half * 16 + g + 8 * (i / 2), token = 8 * block + 2 * t + i % 2;
          if (row >= a.out_features || token >= a.tokens) continue;
          const float value = sums[half][block][i] * a.factor + (bias != nullptr ? Activation<T>::load(bias[row]) : 0.0f);
          y[static_cast<long long>(token) * a.y_stride + row] = Activation<T>::store(value);
        }
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
    if (warp < ROW_WARPS) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          const float* s = sums[half][block];
          __stcg(reinterpret_cast<float4*>(mine + place(warp, half, block, lane)), make_float4(s[0], s[1], s[2], s[3]));
        }
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(a.arrived + row_block, to - from) + to - from == a.steps;
      if (last) a.arrived[row_block] = 0;
    }
    __syncthreads();
    if (!last || warp >= ROW_WARPS) return;
    __threadfence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        for (int i = 0; i < 4; ++i) sums[half][block][i] = 0.0f;
      }
    }
    int index = static_cast<int>((static_cast<long long>(first_item) * gridDim.x + gridDim.x - 1) / a.items);
    while (index > 0 && piece(a, index) > first_item) --index;  // the block that has the first step
    while (piece(a, index + 1) <= first_item) ++index;
    for (; piece(a, index) < first_item + a.steps; ++index) {
      const float* part = a.partial + (2 * static_cast<long long>(index) + (first_item > piece(a, index) ? 1 : 0)) * size;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          const float4 s = __ldcg(reinterpret_cast<const float4*>(part + place(warp, half, block, lane)));
          sums[half][block][0] += s.x;
          sums[half][block][1] += s.y;
          sums[half][block][2] += s.z;
          sums[half][block][3] += s.w;
        }
      }
    }
    store(a, sums, row_block, warp, lane, bias, y);
  }

  static __device__ __forceinline__ void run(const GemmArguments& a, const T* bias, T* y) {
    extern __shared__ __align__(128) char shared[];
    const int lane = lane_number(), warp = threadIdx.x >> 5, row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
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
      const char* stage = shared + (item - begin) % STAGES * STAGE;
      if (step * K_WARPS + k_warp < a.units && row_block * (2 * ROW_WARPS) + row_warp * 2 < a.tiles) {
        multiply(sums, stage + k_warp * X_UNIT, shared_address(stage) + X_STAGE + warp * W_WARP, lane, a.zero, where);
      }
      if (step + 1 < a.steps && item + 1 < end) continue;
      // the row block, or this block's part of it, is complete: add what the second column warps have, through the stage that
      // everyone has read
      float* exchange = reinterpret_cast<float*>(shared + (item - begin) % STAGES * STAGE);
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          float4* there = reinterpret_cast<float4*>(exchange + place(row_warp, half, block, lane));
          if (k_warp == 1) *there = *reinterpret_cast<const float4*>(sums[half][block]);
        }
      }
      __syncthreads();
      if (k_warp == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            const float4 other = *reinterpret_cast<const float4*>(exchange + place(row_warp, half, block, lane));
            sums[half][block][0] += other.x;
            sums[half][block][1] += other.y;
            sums[half][block][2] += other.z;
            sums[half][block][3] += other.w;
          }
        }
      }
      if (from == 0 && step + 1 == a.steps) {
        if (k_warp == 0) store(a, sums, row_block, row_warp, lane, bias, y);
      } else {
        share(a, sums, row_block, from, step + 1, warp, lane, bias, y);
      }
      from = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[half][block][i] = 0.0f;
        }
      }
    }
  }
};

}  // namespace lowbit
