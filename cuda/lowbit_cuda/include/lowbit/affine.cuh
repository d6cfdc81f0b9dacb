// Decoders of integer codes: from the packed words of a lane to fp16 fragments of mma.m16n8k16, one LOP3 for two weights.
//
// The trick: the fp16 bit pattern (q << p), with q * 2^p < 1024, is the subnormal number q * 2^(p - 24), and tensor cores
// multiply subnormals exactly and at full speed. So masking a field in place *is* dequantizing it, up to a power of two that
// depends on the field's position p only; the activations that meet the field are multiplied by 2^-p once, before the loop,
// and the sums by 2^24 at the end.
//
// Chunks, fragments and registers are drawn in unit.cuh; a[0] and a[1] of a fragment (and a[2] and a[3]) must have the same p,
// and position(m, half) says which.
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

// What all integer decoders share: no table, and codes that are read back from the fields.
template <class Decoder, int Bits>
struct IntegerFields {
  static constexpr int BITS = Bits, TABLE_BYTES = 0;
  static constexpr bool INTEGER = true;
  static __device__ __forceinline__ void prepare(char*, const float*) {}

  // The two codes of a register: even column, odd column.
  static __device__ __forceinline__ int2 codes(const uint32_t* words, int m, int r) {
    uint32_t a[4][4];
    Decoder::decode(words, a, Table());
    const uint32_t field = a[m][r] >> Decoder::position(m, r / 2);
    return make_int2(field & 0xffffu, field >> 16);
  }
};

template <int Bits>
struct AffineDecoder;

// Four bits: word m is fragment m.
//   bit 31                              0
//   [ a3 | a1 | a2 | a0 ] [ a3 | a1 | a2 | a0 ]      left half: odd column, right half: even column
//                       p of a0, a1 = 0; of a2, a3 = 4
template <>
struct AffineDecoder<4> : IntegerFields<AffineDecoder<4>, 4> {
  static __device__ constexpr int position(int, int half) { return half ? 4 : 0; }
  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table&) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const uint32_t low = words[m], high = words[m] >> 8;
      a[m][0] = low & 0x000f000fu;
      a[m][1] = high & 0x000f000fu;
      a[m][2] = low & 0x00f000f0u;
      a[m][3] = high & 0x00f000f0u;
    }
  }
};

// Three bits: three words, sixteen registers. Fields at p = 0, 3, 6 of every half word directly; two more of each word after a
// shift (by 9: p = 0, 3; by 8: p = 1, 4); the top bits of the three words together are the last field, at p = 6.
//   half word:  [ t | f4 f4 f4 | f3 f3 f3 | f2 f2 f2 | f1 f1 f1 | f0 f0 f0 ]   t: one bit of the joint field
template <>
struct AffineDecoder<3> : IntegerFields<AffineDecoder<3>, 3> {
  static __device__ constexpr int position(int m, int half) {
    return m < 3 ? 3 * m : half ? 4 : 1;
  }
  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table&) {
    const uint32_t w0 = words[0], w1 = words[1], w2 = words[2];
    const uint32_t s0 = w0 >> 9, s1 = w1 >> 8, s2 = w2 >> 8, s3 = w2 >> 7;
    a[0][0] = w0 & 0x00070007u;
    a[0][1] = w1 & 0x00070007u;
    a[0][2] = w2 & 0x00070007u;
    a[0][3] = s0 & 0x00070007u;
    a[1][0] = w0 & 0x00380038u;
    a[1][1] = w1 & 0x00380038u;
    a[1][2] = w2 & 0x00380038u;
    a[1][3] = s0 & 0x00380038u;
    a[2][0] = w0 & 0x01c001c0u;
    a[2][1] = w1 & 0x01c001c0u;
    a[2][2] = w2 & 0x01c001c0u;
    a[2][3] = (s3 & 0x01000100u) | ((s1 & 0x00800080u) | (s0 & 0x00400040u));
    a[3][0] = s1 & 0x000e000eu;
    a[3][1] = s2 & 0x000e000eu;
    a[3][2] = s1 & 0x00700070u;
    a[3][3] = s2 & 0x00700070u;
  }
};

// Two bits: word i is fragments 2i and 2i + 1; p = 0, 2, 4, 6 of the word and of the word shifted by 8.
template <>
struct AffineDecoder<2> : IntegerFields<AffineDecoder<2>, 2> {
  static __device__ constexpr int position(int m, int half) { return 4 * (m % 2) + 2 * half; }
  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table&) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = words[i], high = words[i] >> 8;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        a[2 * i + p / 2][2 * (p % 2)] = low & (0x00030003u << 2 * p);
        a[2 * i + p / 2][2 * (p % 2) + 1] = high & (0x00030003u << 2 * p);
      }
    }
  }
};

// One bit: one word is the chunk; p = 0..7 of the word and of the word shifted by 8.
template <>
struct AffineDecoder<1> : IntegerFields<AffineDecoder<1>, 1> {
  static __device__ constexpr int position(int m, int half) { return 2 * m + half; }
  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table&) {
    const uint32_t low = words[0], high = words[0] >> 8;
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      a[p / 2][2 * (p % 2)] = low & (0x00010001u << p);
      a[p / 2][2 * (p % 2) + 1] = high & (0x00010001u << p);
    }
  }
};

// Five and six bits: words 0..3 hold the four low bits as above; every further word holds the fifth (or fifth and sixth) bits of
// 16 (or 8) registers, HIGH bits each: register k of the word at bit HIGH * k of both half words.
//   a0, a1 (p = 0) need theirs at bit 4, a2, a3 (p = 4) at bit 8: one shift and one LOP3 for each register.
template <int Bits>
struct SplitDecoder {
  static constexpr int HIGH = Bits - 4, EACH = 16 / HIGH;
  static __device__ constexpr int position(int, int half) { return half ? 4 : 0; }
  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table& table) {
    AffineDecoder<4>::decode(words, a, table);
    constexpr uint32_t mask = ((1u << HIGH) - 1) * 0x00010001u;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int m = k / 4, r = k % 4, from = HIGH * (k % EACH), to = r / 2 ? 8 : 4;
      const uint32_t word = words[4 + k / EACH], moved = from >= to ? word >> (from - to) : word << (to - from);
      a[m][r] |= moved & (mask << to);
    }
  }
};
template <>
struct AffineDecoder<5> : SplitDecoder<5>, IntegerFields<AffineDecoder<5>, 5> {};
template <>
struct AffineDecoder<6> : SplitDecoder<6>, IntegerFields<AffineDecoder<6>, 6> {};

// Eight bits: words 2m and 2m + 1 are fragment m; p = 0 everywhere.
template <>
struct AffineDecoder<8> : IntegerFields<AffineDecoder<8>, 8> {
  static __device__ constexpr int position(int, int) { return 0; }
  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table&) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[m][2 * half] = words[2 * m + half] & 0x00ff00ffu;
        a[m][2 * half + 1] = (words[2 * m + half] >> 8) & 0x00ff00ffu;
      }
    }
  }
};

}  // namespace lowbit
