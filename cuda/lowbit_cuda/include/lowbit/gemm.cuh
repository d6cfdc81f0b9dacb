// y = x W^T for 17 to 64 rows of x: weights become fp16 once and meet every row of x; the work is cut evenly over the device.
//
//   A block computes 8 * TILES row tiles of W (TILES for each of 8 warps) for all rows of x, over steps of 256 columns:
//
//        step 0      step 1              x of a step and the units of every warp arrive in shared memory by
//      [ units ]   [ units ] ... warp 0  cp.async, STAGES steps ahead; there x lies in fragment order:
//      [ units ]   [ units ] ... warp 1  [8 rows of x][pair of fragments][lane] 16 bytes
//        ...
//
//   A warp multiplies each 16 bytes of x that a lane loads with both of its TILES: at one tile a warp, shared memory was busy for
//   70 % of the time, tensor cores for 41 % (ncu on an H200, 2026-11-21). Four tiles a warp were slower, except at 8192x28672
//   with up to 32 rows of x.
//
//   All (row block, step) pairs in order are one line that is cut into gridDim.x pieces of equal length (stream-K: Osama et al.
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
  int tiles, steps, items;
  float zero, factor;
};

template <class Decoder, class Unit, class T, int TOKENS, int STAGES>
struct Gemm {
  static constexpr int WARPS = 8, TILES = 2, ROW_TILES = WARPS * TILES, ROWS = 16 * ROW_TILES;
  static constexpr int BLOCKS = TOKENS / 8, GROUPS = Unit::GROUPS;
  static constexpr int CHUNK_GROUPS = Unit::FRAGMENTS < 4 ? 4 / Unit::FRAGMENTS : 1;  // that a chunk of 64 columns touches
  using Pairs = typename Unit::Pair[CHUNK_GROUPS];
  static constexpr int X_STAGE = BLOCKS * 4096, STAGE = X_STAGE + ROW_TILES * Unit::BYTES;  // bytes
  using Sums = float[TILES][BLOCKS][4];

  // Where a thread copies from and to: eight lanes take a whole line, 128 bytes of one row of x: L2 is limited by requests, and
  // all blocks read the same x. The rows of a thread are 8 apart, and so are 4096 bytes apart in shared memory.
  struct Copies {
    const __half* x;
    int column, token, place;
    __device__ __forceinline__ Copies(const GemmArguments& a, int warp, int lane) {
      const int piece = warp % 4 * 8 + (lane & 7);
      token = warp / 4 * 4 + (lane >> 3);
      column = 8 * piece;
      x = a.x + static_cast<long long>(token) * a.x_stride + column;
      place = piece / 4 * 512 + (4 * token + piece % 4) * 16;
    }
  };

  static __device__ __forceinline__ void fetch(const GemmArguments& a, const Copies& from, uint32_t stage, int row_block, int step,
                                               int warp, int lane) {
    const bool inside = from.column + step * 256 < a.in_features;
    const __half* source = from.x + step * 256;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const bool there = inside && from.token + 8 * block < a.tokens;
      copy_async16_or_zeros(stage + from.place + block * 4096, there ? source : a.x, there);
      source += 8 * static_cast<long long>(a.x_stride);
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int mine = warp * TILES + i, tile = row_block * ROW_TILES + mine;
      if (tile >= a.tiles) continue;
      const char* units = a.weights + (static_cast<long long>(tile) * a.steps + step) * Unit::BYTES + lane * 16;
      Unit::fetch(stage + X_STAGE + mine * Unit::BYTES + lane * 16, units, Unit::in_last(lane));
    }
  }

  // Two fields in place -> two fp16 weights, rounded once.
  static __device__ __forceinline__ uint32_t weight(uint32_t field, int position, float scale, float offset, uint32_t magic) {
    __half2 value = *reinterpret_cast<const __half2*>(&field);
    if constexpr (Decoder::INTEGER) {
      // 0x6400 is 1024, whose last bit counts 1: the field adds q * 2^p. Then q - z exactly, as (1024 + q 2^p) 2^-p - (1024 2^-p + z).
      const uint32_t raised = field | magic;
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

  // A chunk of one unit: a lane's words, and the scales and offsets of its rows.
  struct Chunk {
    uint32_t words[Unit::BITS];
    Pairs scales, offsets;
    __device__ __forceinline__ void load(uint32_t unit, uint32_t pairs, int number) {
      Unit::chunk(words, unit, number);
#pragma unroll
      for (int i = 0; i < CHUNK_GROUPS; ++i) {
        const int group = 4 * number / Unit::FRAGMENTS + i;
        scales[i] = Unit::pair(pairs, group);
        if (!Unit::PLAIN) offsets[i] = Unit::pair(pairs + Unit::SCALE_BYTES, group);
      }
    }
  };

  static __device__ __forceinline__ void decode(uint32_t (&a)[4][4], const Chunk& chunk, float zero, const Table& table,
                                                uint32_t magic) {
    Decoder::decode(chunk.words, a, table);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int group = m / Unit::FRAGMENTS;
      const float2 scale = as_floats(chunk.scales[group]);
      const float2 offset = Unit::PLAIN ? make_float2(zero, zero) : as_floats(chunk.offsets[group]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[m][r] = weight(a[m][r], Decoder::position(m, r / 2), r % 2 ? scale.y : scale.x, r % 2 ? offset.y : offset.x, magic);
      }
    }
  }

  // `x` and `units` are the lane's own addresses, `pairs` that of its scales in the first unit.
  static __device__ __forceinline__ void multiply(Sums& sums, uint32_t x, uint32_t units, uint32_t pairs, float zero,
                                                  const Table& table, uint32_t magic) {
#pragma unroll
    for (int number = 0; number < 4; ++number) {
      uint32_t a[TILES][4][4];
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        Chunk chunk;
        chunk.load(units + i * Unit::BYTES, pairs + i * Unit::BYTES, number);
        decode(a[i], chunk, zero, table, magic);
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          uint32_t b[4];
          load_shared(b, x + (block * 8 + 2 * number + pair) * 512);
#pragma unroll
          for (int i = 0; i < TILES; ++i) mma_f16(sums[i][block], a[i][2 * pair], b[0], b[1]);
#pragma unroll
          for (int i = 0; i < TILES; ++i) mma_f16(sums[i][block], a[i][2 * pair + 1], b[2], b[3]);
        }
      }
    }
  }

  // Where a warp's sums lie in float memory: 4 of one lane together, lanes in order.
  static __device__ __forceinline__ int place(int warp, int tile, int block, int lane) {
    return (((warp * TILES + tile) * BLOCKS + block) * 32 + lane) * 4;
  }
  static __device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < TILES * BLOCKS * 4; ++i) sums[i / (BLOCKS * 4)][i / 4 % BLOCKS][i % 4] = 0.0f;
  }

  static __device__ __forceinline__ void store(const GemmArguments& a, const Sums& sums, int row_block, int warp, int lane,
                                               const T* bias, T* y) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_block * ROWS + (warp * TILES + tile) * 16 + g + 8 * half;
        if (row >= a.out_features) continue;
        const float offset = bias != nullptr ? Activation<T>::load(bias[row]) : 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; ++i) {
          const int token = i / 2 * 8 + 2 * t + i % 2;
          if (token < a.tokens) {
            y[static_cast<long long>(token) * a.y_stride + row] =
                Activation<T>::store(sums[tile][i / 2][2 * half + i % 2] * a.factor + offset);
          }
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
#pragma unroll
    for (int i = 0; i < TILES * BLOCKS; ++i) {
      const float* s = sums[i / BLOCKS][i % BLOCKS];
      __stcg(reinterpret_cast<float4*>(mine + place(warp, i / BLOCKS, i % BLOCKS, lane)), make_float4(s[0], s[1], s[2], s[3]));
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
      for (int i = 0; i < TILES * BLOCKS; ++i) {
        float* s = sums[i / BLOCKS][i % BLOCKS];
        const float4 more = __ldcg(reinterpret_cast<const float4*>(part + place(warp, i / BLOCKS, i % BLOCKS, lane)));
        s[0] += more.x;
        s[1] += more.y;
        s[2] += more.z;
        s[3] += more.w;
      }
    }
    store(a, sums, row_block, warp, lane, bias, y);
  }

  static __device__ __forceinline__ void run(const GemmArguments& a, const T* bias, T* y) {
    extern __shared__ __align__(128) char shared[];
    const int lane = lane_number(), warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    const int begin = piece(a, blockIdx.x), end = piece(a, blockIdx.x + 1);
    char* table = shared + STAGES * STAGE;
    const Table where = {shared_address(table), static_cast<uint32_t>(lane * 4)};
    const uint32_t ring = shared_address(shared), units = X_STAGE + warp * TILES * Unit::BYTES;
    uint32_t magic;  // 0x6400 twice, unknown to the compiler: it would split (w & mask) | constant into two instructions
    asm volatile("mov.b32 %0, 0x64006400;" : "=r"(magic));
    launch_dependents();
    wait_for_previous();
    const Copies copies(a, warp, lane);
    int fetched = begin, block_of_fetch = begin / a.steps, step_of_fetch = begin - block_of_fetch * a.steps;
    uint32_t free = 0;  // the stage that is filled next
    auto start = [&]() {
      if (fetched < end) fetch(a, copies, ring + free, block_of_fetch, step_of_fetch, warp, lane);
      copy_commit();
      ++fetched;
      free = free == (STAGES - 1) * STAGE ? 0 : free + STAGE;
      if (++step_of_fetch == a.steps) {
        step_of_fetch = 0;
        ++block_of_fetch;
      }
    };
    int row_block = block_of_fetch, step = step_of_fetch, from = step;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) start();
    Decoder::prepare(table, a.codebook);
    Sums sums = {};
    uint32_t stage = ring;
#pragma unroll 1
    for (int item = begin; item < end; ++item) {
      copy_wait<STAGES - 2>();
      __syncthreads();
      start();
      multiply(sums, stage + lane * 16, stage + units + lane * 16, stage + units + Unit::pairs_offset(lane), a.zero, where, magic);
      stage = stage == ring + (STAGES - 1) * STAGE ? ring : stage + STAGE;
      ++step;
      if (step < a.steps && item + 1 < end) continue;
      if (from == 0 && step == a.steps) {
        store(a, sums, row_block, warp, lane, bias, y);
      } else {
        share(a, sums, row_block, from, step, warp, lane, bias, y);
      }
      from = step = 0;
      ++row_block;
      clear(sums);
    }
  }
};

}  // namespace lowbit
