// Decoders of codebook indices. 2, 3 and 4 bits: a table of pairs in shared memory, one load for two weights.
//
// Two neighbouring columns are one index of 2 * BITS bits into a table of 2^(2 * BITS) pairs of fp16 entries. The table stands
// there 32 times, once in every bank, so that the 32 lanes of a load never meet (a random index into a single copy runs at a third
// of the rate, measured on an H200): entry i of lane l lies at 128 * i + 4 * l bytes. 4 bits: 32 KB, 3 bits: 8 KB.
//
// 2 bits: four codes are an index of 8 bits into a table of 256 quads, 8 bytes each, 16 times: half as many loads and indices to
// make. Two pairs of the drawing below that follow each other are a quad.
//
//   index:   [ odd column | even column ]        pair:   [ fp16 of the odd column | fp16 of the even column ]
//
//   4 bits, word m = fragment m:        bit 31 [ a3 | a2 | a1 | a0 ] 0                 8 bits each
//   2 bits, word i = fragments 2i, 2i+1:       [ a7 | ... | a1 | a0 ]                  4 bits each, a4..a7 of fragment 2i + 1
//   3 bits, word i (0..2):              [ two spare bits | f4 | f3 | f2 | f1 | f0 ]    6 bits each
//            registers 5i .. 5i + 4 of the 16 in order (4 * fragment + register), spare bits of word i = bits 2i, 2i + 1 of the last
//
// 5 to 8 bits: pairs would not fit, so the table has an entry for each code, again once in every bank (4, 8, 16 and 32 KB), and two
// weights are two loads and a PRMT: twice the loads of 4 bits, with 1.25 to 2 times the bytes to wait for.
//
//   code number 2 * (4 * fragment + register) + column of a chunk; 6, 5, 4 and 4 of them to a word, from the lowest bit on. The
//   last 2, 2, 4 and 0 codes of a chunk lie in what is left of the words (2, 2, 4 and 0 bits), their lowest bits in the first.
//
//   5 bits, word i (0..4):   [ two bits of c31 c30 | c(6i + 5) | ... | c(6i) ]
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

template <int Bits>
struct CodebookDecoder {
  static_assert(Bits == 2 || Bits == 3 || Bits == 4, "pairs of wider codes do not fit in shared memory");
  static constexpr int BITS = Bits, FIELD = 2 * BITS, ENTRIES = 1 << FIELD, MASK = ENTRIES - 1;
  static constexpr bool INTEGER = false;  // registers hold the weights themselves, not fields of integers
  static constexpr bool QUADS = BITS == 2;
  static constexpr int TABLE_BYTES = (QUADS ? 256 : ENTRIES) * 128;

  static __device__ constexpr int position(int, int) { return 0; }

  static __device__ __forceinline__ uint32_t pair(int index, const float* codebook) {
    const __half2 entries = __floats2half2_rn(codebook[index & ((1 << BITS) - 1)], codebook[index >> BITS & ((1 << BITS) - 1)]);
    return *reinterpret_cast<const uint32_t*>(&entries);
  }

  // Fill the table from the 2^BITS entries, all threads of the block together; the caller synchronizes.
  static __device__ __forceinline__ void prepare(char* table, const float* codebook) {
    for (int i = threadIdx.x; i < TABLE_BYTES / 16; i += blockDim.x) {
      const uint32_t low = pair(i >> 3, codebook), high = QUADS ? pair(i >> 7, codebook) : low;
      reinterpret_cast<uint4*>(table)[i] = make_uint4(low, high, low, high);
    }
  }

  // The index of register `number` (0..15) times 128: the byte offset of its entry. One shift, one LOP3 with the lane.
  static __device__ __forceinline__ uint32_t offset(const uint32_t* words, int number, uint32_t lane4) {
    constexpr uint32_t mask = static_cast<uint32_t>(MASK) << 7;
    if (BITS == 3 && number == 15) {
      const uint32_t joint = (words[0] >> 30) | (words[1] >> 28 & 12u) | (words[2] >> 26 & 48u);
      return joint << 7 | lane4;
    }
    constexpr int each = 32 / FIELD;  // 4, 5 or 8 fields a word
    const int place = FIELD * (number % each);
    const uint32_t word = words[number / each];
    return ((place <= 7 ? word << (7 - place) : word >> (place - 7)) & mask) | lane4;
  }

  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table& table) {
    if constexpr (QUADS) {
      const uint32_t lane8 = table.lane << 1 & 0x78u;  // which of 16 copies
#pragma unroll
      for (int quad = 0; quad < 8; ++quad) {
        const uint32_t word = words[quad / 4], index = quad % 4 ? word >> (8 * (quad % 4) - 7) : word << 7;
        asm("ld.shared.v2.u32 {%0, %1}, [%2];"
            : "=r"(a[quad / 2][quad % 2 * 2]), "=r"(a[quad / 2][quad % 2 * 2 + 1])
            : "r"(table.address + (index & 0x7f80u | lane8)));
      }
    } else {
#pragma unroll
      for (int number = 0; number < 16; ++number) {
        asm("ld.shared.u32 %0, [%1];" : "=r"(a[number / 4][number % 4]) : "r"(table.address + offset(words, number, table.lane)));
      }
    }
  }

  // The two codes of a register, for kernels that look the entries up themselves.
  static __device__ __forceinline__ int2 codes(const uint32_t* words, int m, int r) {
    const uint32_t index = offset(words, 4 * m + r, 0u) >> 7;
    return make_int2(index & ((1 << BITS) - 1), index >> BITS);
  }
};

template <int Bits>
struct WideCodebookDecoder {
  static_assert(Bits >= 5 && Bits <= 8, "narrower codes are looked up in pairs");
  static constexpr int BITS = Bits, ENTRIES = 1 << BITS, EACH = 32 / BITS, SPARE = 32 - EACH * BITS, WHOLE = EACH * BITS;
  static constexpr bool INTEGER = false;
  static constexpr int TABLE_BYTES = ENTRIES * 128;

  static __device__ constexpr int position(int, int) { return 0; }

  // Fill the table, all threads of the block together; the caller synchronizes.
  static __device__ __forceinline__ void prepare(char* table, const float* codebook) {
    for (int i = threadIdx.x; i < ENTRIES * 8; i += blockDim.x) {
      const __half2 twice = __float2half2_rn(codebook[i >> 3]);
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(&twice);
      reinterpret_cast<uint4*>(table)[i] = make_uint4(bits, bits, bits, bits);
    }
  }

  // Code `number` (0..31) of a chunk times 128, with the lane's part: where its entry lies. `number` is a constant of unrolled loops.
  static __device__ __forceinline__ uint32_t offset(const uint32_t* words, int number, uint32_t lane4) {
    constexpr uint32_t mask = static_cast<uint32_t>(ENTRIES - 1) << 7;
    if (number >= WHOLE) {
      uint32_t rest = 0;  // the spare bits of all words together
#pragma unroll
      for (int i = 0; i < BITS; ++i) rest |= words[i] >> WHOLE << SPARE * i;
      return moved(rest, BITS * (number - WHOLE)) & mask | lane4;
    }
    return moved(words[number / EACH], BITS * (number % EACH)) & mask | lane4;
  }
  // The bits from `place` on, at bit 7.
  static __device__ __forceinline__ uint32_t moved(uint32_t word, int place) {
    return place <= 7 ? word << (7 - place) : word >> (place - 7);
  }

  static __device__ __forceinline__ void decode(const uint32_t* words, uint32_t (&a)[4][4], const Table& table) {
#pragma unroll
    for (int number = 0; number < 16; ++number) {
      uint32_t even, odd;
      asm("ld.shared.u32 %0, [%1];" : "=r"(even) : "r"(table.address + offset(words, 2 * number, table.lane)));
      asm("ld.shared.u32 %0, [%1];" : "=r"(odd) : "r"(table.address + offset(words, 2 * number + 1, table.lane)));
      a[number / 4][number % 4] = __byte_perm(even, odd, 0x5410);
    }
  }

  static __device__ __forceinline__ int2 codes(const uint32_t* words, int m, int r) {
    const int number = 2 * (4 * m + r);
    return make_int2(offset(words, number, 0u) >> 7, offset(words, number + 1, 0u) >> 7);
  }
};

}  // namespace lowbit
