// y = x W^T for 1 to 8 rows of x: weights on tensor cores as the 16-row operand, activations in registers for the whole kernel.
//
//   W in units of 16 rows x 256 columns, file order [row tile][column unit]; a unit is
//       BITS slabs of 512 bytes    slab i holds 16 bytes of every lane: words 4i .. 4i + 3 of its chunks, in lane order
//       scales                     for each g = 0..7 and each group: the scales of rows g and g + 8
//       zeros (ZEROS)              the same arrangement
//
//   A block has WARPS warps; warp w owns the units w * UNITS .. of every row, keeps their activations in registers, and walks
//   over the block's row tiles.
//
//        x  [ unit 0 | unit 1 | ... ]          each warp: cp.async ring of STAGES units, decode, mma, scale, sum
//   tile 0  [ warp 0 | warp 1 | ... ] -> 16 sums a warp and token -> shared memory -> one sum over warps -> y
//   tile 1  [ warp 0 | warp 1 | ... ]
//
// Measured on an H200 (2026-11-21): issuing the loads of x before the weight stream matters more than deeper
// prefetch; under programmatic dependent launch the opposite order wins, because weights may be fetched before the wait.
#pragma once
#include <lowbit/affine.cuh>
#include <lowbit/primitives.cuh>

namespace lowbit {

// 2^exponent as the bits of a float; a loop that multiplies is not folded by NVRTC (seen in the disassembly, 13.0).
__device__ __forceinline__ constexpr uint32_t power_bits(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(power_bits(exponent)); }

// One value of x as fp16, times a power of two.
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, float factor, __half) {
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(factor));
  return *reinterpret_cast<const uint32_t*>(&scaled);
}
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, float factor, __nv_bfloat16) {
  const float2 value = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  const __half2 scaled = __floats2half2_rn(value.x * factor, value.y * factor);
  return *reinterpret_cast<const uint32_t*>(&scaled);
}

template <class T>
struct Activation;
template <>
struct Activation<__half> {
  static constexpr int EXPONENT = 0;  // |x| <= 16376 for SHIFT 2
  static __device__ __forceinline__ __half store(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ float load(__half value) { return __half2float(value); }
};
template <>
struct Activation<__nv_bfloat16> {
  static constexpr int EXPONENT = -6;  // bf16 reaches further than fp16: |x| <= 2^20, steps of 2^-18 at the bottom
  static __device__ __forceinline__ __nv_bfloat16 store(float value) { return __float2bfloat16_rn(value); }
  static __device__ __forceinline__ float load(__nv_bfloat16 value) { return __bfloat162float(value); }
};

// TOKENS: 1, or 8 for 2 to 8 rows of x. GROUP: columns that share a scale, 32, 64, 128 or 256.
template <class Decoder, class T, int GROUP, bool ZEROS, int TOKENS, int WARPS, int UNITS, int STAGES, bool DEPENDENT>
struct Gemv {
  static constexpr int BITS = Decoder::BITS, GROUPS = 256 / GROUP, COLUMNS = TOKENS == 1 ? 1 : 2;
  static constexpr int CODE_BYTES = 512 * BITS, SCALE_BYTES = 32 * GROUPS;
  static constexpr int UNIT_BYTES = CODE_BYTES + SCALE_BYTES * (ZEROS ? 2 : 1);
  static constexpr int ROWS = 16 * TOKENS;  // sums of one warp for one row tile
  static constexpr int RING_BYTES = STAGES * UNITS * UNIT_BYTES;

  static __device__ __forceinline__ void fetch(uint32_t ring, const char* source, int lane) {
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
#pragma unroll
      for (int slab = 0; slab < BITS; ++slab) {
        const int offset = unit * UNIT_BYTES + slab * 512 + lane * 16;
        copy_async16(ring + offset, source + offset);
      }
      constexpr int pieces = (UNIT_BYTES - CODE_BYTES) / 16;
#pragma unroll
      for (int first = 0; first < pieces; first += 32) {
        if (first + lane < pieces) {
          const int offset = unit * UNIT_BYTES + CODE_BYTES + (first + lane) * 16;
          copy_async16(ring + offset, source + offset);
        }
      }
    }
  }

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

  // The B fragments of the unit's 16 mma: fp16, times 2^(SHIFT - p).
  static __device__ __forceinline__ void scale_x(uint32_t (&x)[16][2], const uint4 (&raw)[8]) {
    constexpr int base = Decoder::SHIFT + Activation<T>::EXPONENT;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      const float low = power_of_two(base - Decoder::position(m % 4, 0));
      const float high = power_of_two(base - Decoder::position(m % 4, 1));
      x[m][0] = scaled_pair(m % 2 ? raw[m / 2].z : raw[m / 2].x, low, T());
      x[m][1] = scaled_pair(m % 2 ? raw[m / 2].w : raw[m / 2].y, high, T());
    }
  }

  // Minus the sum of x over each group (times the zero, when there is one for all), by multiplying with ones: it arrives in
  // the layout of the accumulators, which start from it.
  static __device__ __forceinline__ void sum_x(float (&sums)[GROUPS][COLUMNS], const uint32_t (&x)[16][2], float zero) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int m = group * (GROUP / 16); m < (group + 1) * (GROUP / 16); ++m) {
        const uint32_t low = 0x00010001u << Decoder::position(m % 4, 0), high = 0x00010001u << Decoder::position(m % 4, 1);
        const uint32_t ones[4] = {low, low, high, high};
        mma_f16(total, ones, x[m][0], x[m][1]);
      }
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) sums[group][column] = ZEROS ? -total[column] : -zero * total[column];
    }
  }

  static __device__ __forceinline__ void multiply(float (&total)[4], const char* data, const uint32_t (&x)[16][2],
                                              const float (&sums)[GROUPS][COLUMNS], int lane) {
    uint32_t words[4 * BITS];
#pragma unroll
    for (int slab = 0; slab < BITS; ++slab) {
      *reinterpret_cast<uint4*>(words + 4 * slab) = *reinterpret_cast<const uint4*>(data + slab * 512 + lane * 16);
    }
    const __half2* scales = reinterpret_cast<const __half2*>(data + CODE_BYTES) + (lane >> 2) * GROUPS;
    const __half2* zeros = scales + SCALE_BYTES / 4;
    float part[4];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      uint32_t a[4][4];
      Decoder::decode(words + chunk * BITS, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = 4 * chunk + i, group = m / (GROUP / 16);
        if (m % (GROUP / 16) == 0) {
          const float2 offset = ZEROS ? __half22float2(zeros[group]) : make_float2(1.0f, 1.0f);
#pragma unroll
          for (int column = 0; column < COLUMNS; ++column) {
            part[column] = offset.x * sums[group][column];
            part[2 + column] = offset.y * sums[group][column];
          }
          if (COLUMNS == 1) part[1] = part[3] = 0.0f;
        }
        mma_f16(part, a[i], x[m][0], x[m][1]);
        if (m % (GROUP / 16) == GROUP / 16 - 1) {
          const float2 scale = __half22float2(scales[group]);
#pragma unroll
          for (int column = 0; column < COLUMNS; ++column) {
            total[column] += scale.x * part[column];
            total[2 + column] += scale.y * part[2 + column];
          }
        }
      }
    }
  }

  // Sum over the warps, and over the cluster, of `tiles` row tiles in shared memory, and store them to y.
  static __device__ __forceinline__ void flush(float* sums, int tiles, int first_row, const T* bias, T* y, int tokens,
                                               int out_features, int y_stride) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * ROWS; i += WARPS * 32) {
      const int tile = i / ROWS, place = i % ROWS;
      float value = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) value += sums[(tile * WARPS + warp) * ROWS + place];
      const int token = place % TOKENS, row = first_row + tile * 16 + place / TOKENS;
      if (token < tokens && row < out_features) {
        value *= power_of_two(24 - Decoder::SHIFT - Activation<T>::EXPONENT);
        if (bias != nullptr) value += Activation<T>::load(bias[row]);
        y[static_cast<long long>(token) * y_stride + row] = Activation<T>::store(value);
      }
    }
    __syncthreads();
  }

  static __device__ __forceinline__ void run(const char* weights, const T* x, const T* bias, T* y, int tokens,
                                             int in_features, int out_features, int x_stride, int y_stride, int tiles,
                                             int units, int batch, float zero) {
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = warp * UNITS;
    char* ring = shared + warp * RING_BYTES;
    float* sums = reinterpret_cast<float*>(shared + WARPS * RING_BYTES);
    const int begin = static_cast<int>(static_cast<long long>(blockIdx.x) * tiles / gridDim.x);
    const int end = static_cast<int>(static_cast<long long>(blockIdx.x + 1) * tiles / gridDim.x);
    const char* source = weights + (static_cast<long long>(begin) * units + first) * UNIT_BYTES;
    const long long stride = static_cast<long long>(units) * UNIT_BYTES;
    const bool busy = first < units;  // units is a multiple of UNITS

    launch_dependents();
    uint4 raw[UNITS][8];
    auto load = [&]() {
      wait_for_previous();
      const int token = lane >> 2;
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        const int column = (first + unit) * 256 + (lane & 3) * 8;
        load_x(raw[unit], x + static_cast<long long>(token) * x_stride, column, in_features, token < tokens);
      }
    };
    if (!DEPENDENT) load();
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; ++stage) {
      if (busy && begin + stage < end) fetch(shared_address(ring) + stage * UNITS * UNIT_BYTES, source + stage * stride, lane);
      copy_commit();
    }
    if (DEPENDENT) load();
    uint32_t fragments[UNITS][16][2];
    float x_sums[UNITS][GROUPS][COLUMNS];
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      scale_x(fragments[unit], raw[unit]);
      sum_x(x_sums[unit], fragments[unit], zero);
    }

    int stage = 0, waiting = 0;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      copy_wait<STAGES - 2>();
      __syncwarp();
      const int next = stage == 0 ? STAGES - 1 : stage - 1, ahead = tile + STAGES - 1;
      if (busy && ahead < end) {
        fetch(shared_address(ring) + next * UNITS * UNIT_BYTES, source + (ahead - begin) * stride, lane);
      }
      copy_commit();
      float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (busy) {
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
          multiply(total, ring + (stage * UNITS + u) * UNIT_BYTES, fragments[u], x_sums[u], lane);
        }
      }
      float* place = sums + (waiting * WARPS + warp) * ROWS;
      const int g = lane >> 2, t = lane & 3;
      if (TOKENS == 1) {
        if (t == 0) {
          place[g] = total[0];
          place[g + 8] = total[2];
        }
      } else {
        *reinterpret_cast<float2*>(place + g * TOKENS + 2 * t) = make_float2(total[0], total[1]);
        *reinterpret_cast<float2*>(place + (g + 8) * TOKENS + 2 * t) = make_float2(total[2], total[3]);
      }
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if (++waiting == batch) {
        flush(sums, waiting, (tile - waiting + 1) * 16, bias, y, tokens, out_features, y_stride);
        waiting = 0;
      }
    }
    if (waiting) flush(sums, waiting, (end - waiting) * 16, bias, y, tokens, out_features, y_stride);
  }
};

}  // namespace lowbit
