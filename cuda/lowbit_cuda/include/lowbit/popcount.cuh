// y = sum_p s_p * (B_p x) for signs B_p and a scale for each row: products of bits on tensor cores, by AND and counting (sm_80 and later).
//
// Weights in file order [row tile][column unit][plane]; a sign unit is 16 rows x 256 columns, 512 bytes: four words of every lane.
//
//   lane 4 * r + t    word 0: row r, k = 0..127     word 2: row r, k = 128..255     (k = 32 * t + bit, + 128)
//                     word 1: row r + 8             word 3: row r + 8
//   k of a column     column [ g2 g1 g0 | t1 t0 | i2 i1 i0 ]  ->  k [ g0 | t1 t0 | i1 i0 i2 g2 g1 ]      1 means +
//
//   Columns change places so that activations need not: a lane reads eight neighbours of x, and three exchanges of half of what it
//   holds with lanes 16, 8 and 4 away turn 8 numbers x 16 bits in each lane into 2 bit planes x 64 numbers (`to_planes`).
//
// A warp keeps the units w * UNITS .. of every row, and rounds its slice of x to 16 bits: x ~ step * q with |q| <= 32767, step =
// absmax / 32767 (an error of half a step; a NaN or an infinity makes all results NaN). With b = 0 or 1 for a sign and q in two's
// complement,
//
//   sum of signs * q = 2 * sum of b * q - sum of q,      sum of b * q = sum_j 2^j popcount(b & q_j) - 2^15 popcount(b & q_15)
//
// in exact integers: eight planes are the eight columns of one mma. Columns past the end have q = 0, whatever the weight says there.
// Sums of warps are added in one order: two runs give the same bits.
#pragma once
#include <lowbit/bit_planes.cuh>

namespace lowbit {

struct PopcountArguments {
  const char* weights;
  const float *scales, *columns;  // (planes, out_features); (in_features,) where x is SCALED
  int tokens, in_features, out_features, x_stride, y_stride;
  int share, rest, units, batch;  // the first `rest` blocks have share + 1 row tiles, the others share
};

// X, Y: __half, __nv_bfloat16 or float. TOKENS: 1, 2, 4 or 8 rows of x at most. EXACT: every warp has all of its UNITS.
// SCALED: every column of x is multiplied first.
template <class X, class Y, int TOKENS, int PLANES, int WARPS, int UNITS, bool EXACT, int STAGES, bool SCALED, bool DEPENDENT>
struct Popcount {
  static constexpr int UNIT_BYTES = 512 * PLANES, STAGE_BYTES = UNITS * UNIT_BYTES;
  static constexpr int RESULTS = 16 * TOKENS, SUMS = RESULTS * PLANES;  // of a row tile; floats of one warp for it
  static constexpr int OWN = TOKENS == 1 ? 1 : TOKENS / 2;              // sums that a lane ends up with
  static constexpr int HELD = UNITS < 4 ? UNITS : 4;                    // units whose weights are in registers at once
  using Planes = uint32_t[UNITS][2][2];
  using Row = Eight<X>[UNITS];

  static __device__ __forceinline__ void values(float (&x)[8], const Eight<X>& eight, const float* columns, int column, int in_features) {
    eight.get(x);
    if (SCALED && column < in_features) {
      const float4* factors = reinterpret_cast<const float4*>(columns + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 four = __ldg(factors + half);
        x[4 * half] *= four.x;
        x[4 * half + 1] *= four.y;
        x[4 * half + 2] *= four.z;
        x[4 * half + 3] *= four.w;
      }
    }
  }

  // A row of the warp's slice of x in 16 bits: its planes, the sum of its integers and its step.
  static __device__ __forceinline__ void round_x(Planes& planes, int& sum, float& step, const Row& row, const float* columns, int first,
                                                 int in_features, int lane) {
    float x[8], most = 0.0f;
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      values(x, row[unit], columns, (first + unit) * 256 + lane * 8, in_features);
#pragma unroll
      for (int i = 0; i < 8; ++i) most = larger_or_nan(most, fabsf(x[i]));
    }
    // floats of one sign are ordered like their bits; a NaN is above infinity
    most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most)));
    step = most < __int_as_float(0x7f800000) ? most * (1.0f / 32767.0f) : __int_as_float(0x7fffffff);
    const float inverse = 32767.0f / fmaxf(most, 1e-30f);  // finite; smaller slices lose what is below 1e-30 / 32767
    if (most < 1e-30f) step = 1e-30f / 32767.0f;
    uint32_t total = 0;
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      values(x, row[unit], columns, (first + unit) * 256 + lane * 8, in_features);
      uint32_t v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = __float_as_uint(fmaf(x[i], inverse, 12582912.0f));  // 1.5 * 2^23: the integer is in the low bits
        total += v[i] - 0x4b400000u;
      }
      to_planes(planes[unit], v, lane);
    }
    sum = __reduce_add_sync(0xffffffffu, static_cast<int>(total));
  }

  // Add the sums of signs * q of rows r and r + 8 over HELD units, for one token; the four lanes of a row are added later.
  static __device__ __forceinline__ void multiply(int (&found)[2], const uint32_t (&words)[HELD][4], const Planes& planes, int start,
                                                  int lane) {
    int low[4] = {}, high[4] = {};
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      if (start + i >= UNITS) break;
      mma_popcount(low, words[i], planes[start + i][0][0], planes[start + i][0][1]);
      mma_popcount(high, words[i], planes[start + i][1][0], planes[start + i][1][1]);
    }
    const int t = lane & 3, top = t == 3 ? -512 : 512;  // the lane's planes are 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      found[row] += (low[2 * row] + 2 * low[2 * row + 1] + 256 * high[2 * row] + top * high[2 * row + 1]) << (2 * t);
    }
  }

  // Add over the four lanes of a row, and leave each with OWN sums: of row r (even t) or r + 8, of token 2i + t / 2.
  static __device__ __forceinline__ void share(int (&own)[OWN], const int (&found)[TOKENS][2], int lane) {
    int half[TOKENS];
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const int other = __shfl_xor_sync(0xffffffffu, odd ? found[token][0] : found[token][1], 1);
      half[token] = (odd ? found[token][1] : found[token][0]) + other;
    }
    if (TOKENS == 1) {
      own[0] = half[0] + __shfl_xor_sync(0xffffffffu, half[0], 2);
    } else {
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const int other = __shfl_xor_sync(0xffffffffu, upper ? half[2 * i] : half[2 * i + 1], 2);
        own[i] = (upper ? half[2 * i + 1] : half[2 * i]) + other;
      }
    }
  }

  // Add the warps' sums of `count` row tiles, and the planes by their scales, and store them to y. `early`: the scales of the thread's
  // first result, where `known`.
  static __device__ __forceinline__ void flush(const float* sums, int count, int first_row, const float (&early)[PLANES], bool known,
                                               const Y* bias, Y* y, const PopcountArguments& a) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * RESULTS; i += WARPS * 32) {
      const int tile = i / RESULTS, token = i / 16 % TOKENS, row = first_row + 16 * tile + i % 16;
      if (token >= a.tokens || row >= a.out_features) continue;
      float value = 0.0f;
#pragma unroll
      for (int plane = 0; plane < PLANES; ++plane) {
        const float* source = sums + (tile * WARPS * PLANES + plane) * RESULTS + i % RESULTS;
        float part = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) part += source[warp * SUMS];
        const float* scale = a.scales + static_cast<long long>(plane) * a.out_features + row;
        value += part * (known && i == threadIdx.x ? early[plane] : *scale);
      }
      if (bias != nullptr) value += widened(bias[row]);
      narrow(value, y[static_cast<long long>(token) * a.y_stride + row]);
    }
    __syncthreads();
  }

  static __device__ __forceinline__ void run(const PopcountArguments& a, const X* x, const Y* bias, Y* y) {
    extern __shared__ __align__(128) char shared[];
    const int lane = lane_number(), warp = threadIdx.x >> 5, first = warp * UNITS;
    const int live = a.units - first;  // units of this warp that exist
    float* sums = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES);
    const uint32_t ring = shared_address(shared) + warp * STAGES * STAGE_BYTES + lane * 16;
    const int block = blockIdx.x, begin = block * a.share + min(block, a.rest), end = begin + a.share + (block < a.rest);
    const long long stride = static_cast<long long>(a.units) * UNIT_BYTES;
    const char* source = a.weights + begin * stride + static_cast<long long>(first) * UNIT_BYTES + lane * 16;

    launch_dependents();
    Row rows[TOKENS];
    auto load = [&]() {
      wait_for_previous();
#pragma unroll
      for (int token = 0; token < TOKENS; ++token) {
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
          const int column = (first + unit) * 256 + lane * 8;
          rows[token][unit].clear();
          if (token < a.tokens && column < a.in_features) {
            rows[token][unit].load(x + static_cast<long long>(token) * a.x_stride + column);
          }
        }
      }
    };
    auto fetch = [&](uint32_t place) {
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
          const int offset = (unit * PLANES + plane) * 512;
          if (EXACT || unit < live) copy_async16(place + offset, source + offset);
        }
      }
      source += stride;
    };
    if (!DEPENDENT) load();
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      if (begin + stage < end) fetch(ring + stage * STAGE_BYTES);
      copy_commit();
    }
    float early[PLANES];  // asked for now, because at the end everybody would wait for them
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
      const int row = 16 * (begin + threadIdx.x / RESULTS) + threadIdx.x % 16;
      early[plane] = row < a.out_features ? __ldg(a.scales + static_cast<long long>(plane) * a.out_features + row) : 0.0f;
    }
    if (DEPENDENT) load();
    Planes planes[TOKENS];
    int x_sums[TOKENS], own_sums[OWN];
    float steps[TOKENS], own_steps[OWN];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      round_x(planes[token], x_sums[token], steps[token], rows[token], a.columns, first, a.in_features, lane);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int upper = TOKENS == 1 ? 0 : 2 * i + 1;
      own_sums[i] = lane & 2 ? x_sums[upper] : x_sums[TOKENS == 1 ? 0 : 2 * i];
      own_steps[i] = lane & 2 ? steps[upper] : steps[TOKENS == 1 ? 0 : 2 * i];
    }

    // a lane's first place: row r or r + 8 of token t / 2; for one token, half of the lanes have none
    const bool stores = TOKENS > 1 || !(lane & 2);
    float* const first_place = sums + warp * SUMS + (lane >> 2) + 8 * (lane & 1) + (TOKENS > 1 ? 16 * (lane >> 1 & 1) : 0);
    float* place = first_place;
    int now = 0, next = (STAGES - 1) * STAGE_BYTES, ahead = end - begin - (STAGES - 1), waiting = 0;
    bool again = false;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      copy_wait<STAGES - 2>();
      __syncwarp();
      if (--ahead >= 0) fetch(ring + next);
      copy_commit();
#pragma unroll
      for (int plane = 0; plane < PLANES; ++plane) {
        int found[TOKENS][2] = {}, own[OWN];
#pragma unroll
        for (int start = 0; start < UNITS; start += HELD) {
          uint32_t words[HELD][4];
#pragma unroll
          for (int i = 0; i < HELD; ++i) {
            if (start + i < UNITS) load_shared(words[i], ring + now + ((start + i) * PLANES + plane) * 512);
          }
#pragma unroll
          for (int token = 0; token < TOKENS; ++token) multiply(found[token], words, planes[token], start, lane);
        }
        share(own, found, lane);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          if (stores) place[plane * RESULTS + 32 * i] = static_cast<float>(2 * own[i] - own_sums[i]) * own_steps[i];
        }
      }
      place += WARPS * SUMS;
      next = now;
      now = now + STAGE_BYTES == STAGES * STAGE_BYTES ? 0 : now + STAGE_BYTES;
      if (++waiting == a.batch || tile + 1 == end) {
        flush(sums, waiting, (tile + 1 - waiting) * 16, early, !again, bias, y, a);
        again = true;
        place = first_place;
        waiting = 0;
      }
    }
  }
};

}  // namespace lowbit
