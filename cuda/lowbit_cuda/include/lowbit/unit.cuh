// A unit: 16 rows x 256 columns of a weight, in the order in which tensor cores want it. Every kernel reads weights in units.
//
//   W in file order [row tile][column unit]; a unit is
//       BITS slabs of 512 bytes    slab i holds 16 bytes of every lane: words 4i .. 4i + 3 of its four chunks, in lane order
//       scales                     for each g = 0..7 and each group: the scales of rows g and g + 8, as Scale
//       offsets (unless CONSTANT)  the same arrangement: zeros (w = s * (q - z)) or minimums (w = s * q + m)
//
//   A chunk is what a lane holds of 16 rows x 64 columns: 32 weights, BITS words, the A fragments of four mma. With lane =
//   4 * g + t, fragment m (0..3) of the chunk covers rows g and g + 8 and columns
//
//       32 * (m / 2) + 8 * t + 4 * (m % 2) + {0, 1}     in a[0] (row g) and a[1] (row g + 8)
//                                            {2, 3}     in a[2] (row g) and a[3] (row g + 8)
//
//   so the 8 activations that a lane needs for fragments 2j and 2j + 1 are 16 consecutive bytes of x: x is never permuted.
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

enum class Offset { CONSTANT, ZEROS, MINIMUMS };

__device__ __forceinline__ float2 as_floats(const __half2& pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 as_floats(const float2& pair) { return pair; }
template <class Scale>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<float> {
  using Type = float2;
};

// GROUP: columns that share a scale, 32, 64, 128 or 256. Scale: __half or float.
template <class Decoder, int GROUP, class Scale, Offset OFFSET>
struct Unit {
  using Pair = typename PairOf<Scale>::Type;  // the scales of rows g and g + 8
  static constexpr int BITS = Decoder::BITS, GROUPS = 256 / GROUP, FRAGMENTS = GROUP / 16;
  static constexpr bool PLAIN = OFFSET == Offset::CONSTANT, ZEROS = OFFSET == Offset::ZEROS;
  static constexpr bool MINIMUMS = OFFSET == Offset::MINIMUMS;
  static constexpr int CODE_BYTES = 512 * BITS, SCALE_BYTES = 8 * GROUPS * sizeof(Pair);
  static constexpr int BYTES = CODE_BYTES + SCALE_BYTES * (PLAIN ? 1 : 2);

  // Start copying a unit to shared memory, all lanes of a warp together; both addresses are the lane's own (16 bytes each).
  static __device__ __forceinline__ void fetch(uint32_t shared, const char* source, bool last_lanes) {
    constexpr int whole = BYTES / 512, rest = BYTES % 512;
#pragma unroll
    for (int i = 0; i < whole; ++i) copy_async16(shared + i * 512, source + i * 512);
    if (rest) copy_async16_if(shared + whole * 512, source + whole * 512, last_lanes);
  }
  // Whether a lane takes part in the last, shorter copy.
  static __device__ __forceinline__ bool in_last(int lane) { return lane * 16 < BYTES % 512; }

  // The words of a lane's four chunks; `shared` is the lane's own address.
  static __device__ __forceinline__ void words(uint32_t (&w)[4 * BITS], uint32_t shared) {
#pragma unroll
    for (int slab = 0; slab < BITS; ++slab) {
      load_shared(*reinterpret_cast<uint32_t(*)[4]>(w + 4 * slab), shared + slab * 512);
    }
  }

  // The words of one of a lane's chunks; `shared` is the lane's own address.
  static __device__ __forceinline__ void chunk(uint32_t (&w)[BITS], uint32_t shared, int number) {
    if constexpr (BITS % 4 == 0) {
#pragma unroll
      for (int i = 0; i < BITS / 4; ++i) {
        load_shared(*reinterpret_cast<uint32_t(*)[4]>(w + 4 * i), shared + (number * BITS / 4 + i) * 512);
      }
    } else {
#pragma unroll
      for (int i = 0; i < BITS; ++i) {
        const int word = number * BITS + i;
        load_shared(*reinterpret_cast<uint32_t(*)[1]>(w + i), shared + word / 4 * 512 + word % 4 * 4);
      }
    }
  }

  // Offset of a lane's scales in a unit; its offsets are SCALE_BYTES further.
  static __device__ __forceinline__ uint32_t pairs_offset(int lane) { return CODE_BYTES + (lane >> 2) * GROUPS * sizeof(Pair); }

  // The pair of one group; `shared` is the address of the lane's pairs.
  static __device__ __forceinline__ Pair pair(uint32_t shared, int group) {
    Pair found;
    load_shared(*reinterpret_cast<uint32_t(*)[sizeof(Pair) / 4]>(&found), shared + group * sizeof(Pair));
    return found;
  }

  // The pairs of every group (rows g and g + 8), read 16 bytes at a time where they are that long.
  static __device__ __forceinline__ void pairs(Pair (&found)[GROUPS], uint32_t shared) {
    constexpr int bytes = GROUPS * sizeof(Pair), step = bytes < 16 ? bytes : 16;
#pragma unroll
    for (int i = 0; i < bytes; i += step) {
      load_shared(*reinterpret_cast<uint32_t(*)[step / 4]>(reinterpret_cast<char*>(found) + i), shared + i);
    }
  }
};

}  // namespace lowbit
