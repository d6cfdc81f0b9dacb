// y = x W^T for 1 to 16 rows of x: weights on tensor cores as the 16-row operand, activations in registers for the whole kernel.
//
//   A block has WARPS warps; CLUSTER blocks share a row. Warp w of the cluster owns the units w * UNITS .. of every row, keeps their
//   activations in registers, and walks over the cluster's row tiles (16 rows each).
//
//        x  [ unit 0 | unit 1 | ... ]          each warp: cp.async ring of STAGES tiles, decode, mma, scale, sum
//   tile 0  [ warp 0 | warp 1 | ... ] -> 16 sums a warp and token -> shared memory -> one sum over warps and blocks -> y
//   tile 1  [ warp 0 | warp 1 | ... ]
//
// Sums are always taken in the same order: two runs give the same bits.
// Measured on an H200 (2026-11-21): issuing the loads of x before the weight stream matters more than deeper
// prefetch; under programmatic dependent launch the opposite order wins, because weights may be fetched before the wait.
#pragma once
#include <lowbit/unit.cuh>

namespace lowbit {

struct GemvArguments {
  const char* weights;
  const float* codebook;
  int tokens, in_features, out_features, x_stride, y_stride;
  int tiles, units, batch;
  float zero;
};

// TOKENS: 1, 8 (for 2 to 8 rows of x) or 16 (for 9 to 16).
// EXACT: every warp has all of its UNITS.
template <class Decoder, class Unit, class T, int TOKENS, int WARPS, int UNITS, int CLUSTER, bool EXACT, int STAGES, bool DEPENDENT>
struct Gemv {
  static constexpr int GROUPS = Unit::GROUPS, BLOCKS = TOKENS == 16 ? 2 : 1, COLUMNS = TOKENS == 1 ? 1 : 2;
  static constexpr bool SUMS = Decoder::INTEGER || !Unit::PLAIN;  // a codebook has no zero
  static constexpr int ROWS = 16 * TOKENS;                         // sums of one warp for one row tile
  static constexpr int STAGE_BYTES = UNITS * Unit::BYTES;
  static constexpr int BASE = Activation<T>::BASE, FACTOR = (Decoder::INTEGER ? 24 : 0) - BASE;
  using Fragments = uint32_t[BLOCKS][16][2];
  using Sums = float[GROUPS][BLOCKS][4];

  // The 16-byte loads of a lane's activations in one unit; nothing waits for them here.
  static __device__ __forceinline__ void load_x(uint4 (&raw)[8], const T* row, int column, int in_features, bool live) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      raw[pair] = make_uint4(0, 0, 0, 0);
      if (live && column + 32 * pair < in_features) {
        const T* source = row + column + 32 * pair;
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(raw[pair].x), "=r"(raw[pair].y), "=r"(raw[pair].z), "=r"(raw[pair].w)
                     : "l"(source));
      }
    }
  }

  // The B fragments of the unit's 16 mma: fp16, times 2^(BASE - p).
  static __device__ __forceinline__ void scale_x(uint32_t (&x)[16][2], const uint4 (&raw)[8]) {
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      const float low = power_of_two(BASE - Decoder::position(m % 4, 0));
      const float high = power_of_two(BASE - Decoder::position(m % 4, 1));
      x[m][0] = Activation<T>::scaled(m % 2 ? raw[m / 2].z : raw[m / 2].x, low);
      x[m][1] = Activation<T>::scaled(m % 2 ? raw[m / 2].w : raw[m / 2].y, high);
    }
  }

  // Minus the sum of x over each group, by multiplying with minus one (in the fields' own scale), and times the zero when there
  // is one for all: it arrives as the four accumulators that an mma starts from, and stays there.
  static __device__ __forceinline__ void sum_x(Sums& sums, const Fragments& x, float zero) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int m = group * Unit::FRAGMENTS; m < (group + 1) * Unit::FRAGMENTS; ++m) {
          const uint32_t one = Decoder::INTEGER ? 0x00010001u : 0x3c003c00u, sign = 0x80008000u;
          const uint32_t low = one << Decoder::position(m % 4, 0) | sign, high = one << Decoder::position(m % 4, 1) | sign;
          const uint32_t ones[4] = {low, low, high, high};
          mma_f16(total, ones, x[block][m][0], x[block][m][1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[group][block][i] = Unit::PLAIN ? zero * total[i] : total[i];
      }
    }
  }

  // `unit` and `pairs` are the lane's own addresses of its codes and scales.
  static __device__ __forceinline__ void multiply(float (&total)[BLOCKS][4], uint32_t unit, uint32_t pairs, const Fragments& x,
                                                  const Sums& sums, const Table& table) {
    uint32_t words[4 * Unit::BITS];
    Unit::words(words, unit);
    typename Unit::Pair scales[GROUPS], offsets[GROUPS];
    Unit::pairs(scales, pairs);
    if (!Unit::PLAIN) Unit::pairs(offsets, pairs + Unit::SCALE_BYTES);
    float part[BLOCKS][4];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      uint32_t a[4][4];
      Decoder::decode(words + chunk * Unit::BITS, a, table);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = 4 * chunk + i, group = m / Unit::FRAGMENTS;
        const bool first = m % Unit::FRAGMENTS == 0, last = m % Unit::FRAGMENTS == Unit::FRAGMENTS - 1;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          if (first) {
            start(part[block], a[i], x[block][m], sums[group][block], offsets[group]);
          } else {
            mma_f16(part[block], a[i], x[block][m][0], x[block][m][1]);
          }
          if (last) finish(total[block], part[block], sums[group][block], as_floats(scales[group]), offsets[group]);
        }
      }
    }
  }

  // The first mma of a group starts from -zero times the sum of x.
  static __device__ __forceinline__ void start(float (&part)[4], const uint32_t (&a)[4], const uint32_t (&x)[2],
                                               const float (&sums)[4], const typename Unit::Pair& offset) {
    if (Unit::PLAIN && SUMS) {
      mma_f16(part, a, x[0], x[1], sums[0], sums[1], sums[2], sums[3]);
    } else if (Unit::ZEROS) {
      const float2 zero = as_floats(offset);
      mma_f16(part, a, x[0], x[1], zero.x * sums[0], zero.x * sums[1], zero.y * sums[2], zero.y * sums[3]);
    } else {
      mma_f16(part, a, x[0], x[1], 0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  static __device__ __forceinline__ void finish(float (&total)[4], const float (&part)[4], const float (&sums)[4],
                                                float2 scale, const typename Unit::Pair& offset) {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      total[column] += scale.x * part[column];
      total[2 + column] += scale.y * part[2 + column];
      if (Unit::MINIMUMS) {
        const float2 minimum = as_floats(offset);
        total[column] -= minimum.x * sums[column];
        total[2 + column] -= minimum.y * sums[2 + column];
      }
    }
  }

  // One row's sums of a lane: for one token only the first of four lanes has any.
  static __device__ __forceinline__ void store_sums(uint32_t shared, float first, float second, bool has_token) {
    if (TOKENS > 1) {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(first), "f"(second) : "memory");
    } else if (has_token) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared), "f"(first) : "memory");
    }
  }

  // Sum over the warps, and over the cluster, of `count` row tiles in shared memory, and store them to y.
  static __device__ __forceinline__ void flush(float* sums, float* shares, int count, int first_row, const T* bias, T* y,
                                               const GemvArguments& a, bool more) {
    auto store = [&](int i, float value) {
      const int token = i % TOKENS, row = first_row + i / TOKENS;
      if (token >= a.tokens || row >= a.out_features) return;
      value *= power_of_two(FACTOR);
      if (bias != nullptr) value += Activation<T>::load(bias[row]);
      y[static_cast<long long>(token) * a.y_stride + row] = Activation<T>::store(value);
    };
    const uint32_t rank = CLUSTER == 1 ? 0 : cluster_rank();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * ROWS; i += WARPS * 32) {
      const float* source = sums + (i / ROWS) * (WARPS * ROWS) + i % ROWS;
      float value = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) value += source[warp * ROWS];
      if (CLUSTER == 1) {
        store(i, value);
      } else {  // sum i belongs to block i % CLUSTER, which gets one share from every block
        store_in_cluster(shared_address(shares + (i / CLUSTER) * CLUSTER + rank), i % CLUSTER, value);
      }
    }
    if (CLUSTER > 1) {
      cluster_barrier();
#pragma unroll 1
      for (int i = threadIdx.x * CLUSTER + rank; i < count * ROWS; i += WARPS * 32 * CLUSTER) {
        float value = 0.0f;
#pragma unroll
        for (int other = 0; other < CLUSTER; ++other) value += shares[(i / CLUSTER) * CLUSTER + other];
        store(i, value);
      }
      if (more) cluster_barrier();
    } else {
      __syncthreads();
    }
  }

  static __device__ __forceinline__ void run(const GemvArguments& a, const T* x, const T* bias, T* y) {
    extern __shared__ __align__(128) char shared[];
    const int lane = lane_number(), warp = threadIdx.x >> 5;
    const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int first = ((CLUSTER == 1 ? 0 : cluster_rank()) * WARPS + warp) * UNITS;
    const int live = EXACT ? UNITS : a.units - first;  // units of this warp that exist
    float* sums = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES);
    float* shares = sums + a.batch * WARPS * ROWS;
    char* table = reinterpret_cast<char*>(CLUSTER == 1 ? shares : shares + a.batch * ROWS);
    const uint32_t ring = shared_address(shared) + warp * STAGES * STAGE_BYTES + lane * 16;  // the lane's own, like source
    const uint32_t to_pairs = Unit::pairs_offset(lane) - lane * 16;
    const bool last_lanes = Unit::in_last(lane);
    const int begin = static_cast<int>(static_cast<long long>(cluster) * a.tiles / clusters);
    const int end = static_cast<int>(static_cast<long long>(cluster + 1) * a.tiles / clusters);
    const long long stride = static_cast<long long>(a.units) * Unit::BYTES;
    const char* source = a.weights + begin * stride + static_cast<long long>(first) * Unit::BYTES + lane * 16;

    launch_dependents();
    if (CLUSTER > 1) cluster_arrive();
    uint4 raw[BLOCKS][UNITS][8];
    auto load = [&]() {
      wait_for_previous();
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        const int token = 8 * block + (lane >> 2);
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
          const int column = (first + unit) * 256 + (lane & 3) * 8;
          load_x(raw[block][unit], x + static_cast<long long>(token) * a.x_stride, column, a.in_features, token < a.tokens);
        }
      }
    };
    auto fetch = [&](uint32_t place) {
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        if (unit < live) Unit::fetch(place + unit * Unit::BYTES, source + unit * Unit::BYTES, last_lanes);
      }
      source += stride;
    };
    if (!DEPENDENT) load();
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      if (begin + stage < end) fetch(ring + stage * STAGE_BYTES);
      copy_commit();
    }
    if (Decoder::TABLE_BYTES) {
      Decoder::prepare(table, a.codebook);
      __syncthreads();
    }
    if (DEPENDENT) load();
    Fragments fragments[UNITS];
    Sums x_sums[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) scale_x(fragments[unit][block], raw[block][unit]);
      if (SUMS) sum_x(x_sums[unit], fragments[unit], a.zero);
    }
    if (CLUSTER > 1) cluster_wait();  // every block runs before anyone writes into it

    const Table where = {shared_address(table), static_cast<uint32_t>(lane * 4)};
    const int g = lane >> 2, t = lane & 3;
    const uint32_t first_place = shared_address(sums + warp * ROWS + (TOKENS == 1 ? g : g * TOKENS + 2 * t));
    uint32_t place = first_place;
    int now = 0, next = (STAGES - 1) * STAGE_BYTES, ahead = end - begin - (STAGES - 1), waiting = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      copy_wait<STAGES - 2>();
      __syncwarp();
      if (--ahead >= 0) fetch(ring + next);
      copy_commit();
      float total[BLOCKS][4] = {};
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        const uint32_t data = ring + now + unit * Unit::BYTES;
        if (unit < live) multiply(total, data, data + to_pairs, fragments[unit], x_sums[unit], where);
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        store_sums(place + 32 * block, total[block][0], total[block][1], t == 0);
        store_sums(place + 32 * block + 32 * TOKENS, total[block][2], total[block][3], t == 0);
      }
      place += 4 * WARPS * ROWS;
      next = now;
      now = now + STAGE_BYTES == STAGES * STAGE_BYTES ? 0 : now + STAGE_BYTES;
      if (++waiting == a.batch || tile + 1 == end) {
        flush(sums, shares, waiting, (tile + 1 - waiting) * 16, bias, y, a, tile + 1 < end);
        place = first_place;
        waiting = 0;
      }
    }
  }
};

}  // namespace lowbit
