// Where the k bits of a code are, for three layouts. Codes are numbered through the whole weight, row after row.
//
//   Codes   one byte a code
//   Words   V = floor(32 / k) codes in a 32-bit word, the first lowest; the top 32 - V * k bits are 0
//           k = 3:  [00 c9 c8 ... c1 c0] [00 c19 ... c10] ...
//   Dense   the same without the gap: code i occupies bits [k * i, k * i + k) of the stream of words
//           k = 3:  [c10 low | c9 ... c0] [c21 low 1 bit | c20 ... c11 | c10 high 1 bit] ...
//
// Everything works on chunks of eight codes, close together in 64 bits: code j of a chunk in bits [k * j, k * j + k). No code is
// looked up alone, so there is one small division (by a constant) for eight codes in Words, and none in the others.
#pragma once

#include <cuda/std/cstdint>

namespace lowbit_kbit {

using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uint8_t;

enum Layout { Codes, Words, Dense };

template <int Bits>
constexpr int codes_per_word = 32 / Bits;

// Units of a layout (bytes of Codes, words of the others) that hold `codes` codes.
template <Layout L, int Bits>
__host__ __device__ constexpr uint64_t units(uint64_t codes) {
  return L == Codes ? codes : L == Words ? (codes + codes_per_word<Bits> - 1) / codes_per_word<Bits> : (codes * Bits + 31) / 32;
}

// Close the gaps between eight bytes of `Bits` bits each: halves of 16, then 32, then 64 bits move together.
template <int Bits>
__device__ __forceinline__ uint64_t squeeze(uint64_t bytes) {
  constexpr uint64_t one = (1u << Bits) - 1, two = (1u << 2 * Bits) - 1, four = (1ull << 4 * Bits) - 1;
  constexpr uint64_t every16 = 0x0001000100010001ull, every32 = 0x0000000100000001ull;
  bytes = (bytes & one * every16) | (bytes >> (8 - Bits) & (one << Bits) * every16);
  bytes = (bytes & two * every32) | (bytes >> (16 - 2 * Bits) & (two << 2 * Bits) * every32);
  return (bytes & four) | (bytes >> (32 - 4 * Bits) & four << 4 * Bits);
}

// Undo squeeze.
template <int Bits>
__device__ __forceinline__ uint64_t spread(uint64_t chunk) {
  constexpr uint64_t one = (1u << Bits) - 1, two = (1u << 2 * Bits) - 1, four = (1ull << 4 * Bits) - 1;
  constexpr uint64_t every16 = 0x0001000100010001ull, every32 = 0x0000000100000001ull;
  chunk = (chunk & four) | (chunk & four << 4 * Bits) << (32 - 4 * Bits);
  chunk = (chunk & two * every32) | (chunk & (two << 2 * Bits) * every32) << (16 - 2 * Bits);
  return (chunk & one * every16) | (chunk & (one << Bits) * every16) << (8 - Bits);
}

// The eight codes of a chunk. Guarded: 0 for those past the end; else the chunk and the words after it must be there (`inside`).
// `bad` collects the bits of bytes that are no codes. Chunks are fewer than 2^29: their words have 32-bit numbers.
template <Layout L, int Bits>
struct Reader {
  const void* source;
  uint64_t codes;  // in the whole weight

  // Whether chunks up to `last` can be read without guards: two more words follow their first in every layout.
  __device__ __forceinline__ bool inside(uint32_t last) const { return 8 * (uint64_t{last} + 1) + 64 <= codes; }

  template <bool Guarded>
  __device__ __forceinline__ uint64_t chunk(uint32_t index, uint64_t& bad) const {
    if constexpr (L == Codes) return from_bytes<Guarded>(index, bad);
    if constexpr (L == Words) return from_words<Guarded>(index);
    return from_dense<Guarded>(index);
  }

 private:
  template <bool Guarded>
  __device__ __forceinline__ uint64_t word(uint32_t index) const {
    if (Guarded && index >= units<L, Bits>(codes)) return 0;
    return __ldg(static_cast<const uint32_t*>(source) + index);
  }

  template <bool Guarded>
  __device__ __forceinline__ uint64_t from_bytes(uint32_t index, uint64_t& bad) const {
    const uint64_t first = uint64_t{index} * 8;
    const auto* bytes = static_cast<const uint8_t*>(source) + first;
    uint64_t found = 0;
    if (!Guarded || first + 8 <= codes) {
      found = __ldg(reinterpret_cast<const unsigned long long*>(bytes));
    } else {
      for (int j = 0; first + j < codes; ++j) found |= static_cast<uint64_t>(bytes[j]) << 8 * j;
    }
    bad |= found & ~(0x0101010101010101ull * ((1u << Bits) - 1));
    return squeeze<Bits>(found);
  }

  // Eight codes lie in one word when 8 divides V, else in two; for V = 5 in three when they start at the fourth or fifth code.
  template <bool Guarded>
  __device__ __forceinline__ uint64_t from_words(uint32_t index) const {
    constexpr int V = codes_per_word<Bits>;
    constexpr uint64_t used = (1ull << V * Bits) - 1;
    const uint32_t first = V % 8 == 0 ? index / (V / 8) : V == 4 ? 2 * index : static_cast<uint32_t>(uint64_t{index} * 8 / V);
    const int skipped = Bits * static_cast<int>(8 * index - first * V);
    uint64_t found = word<Guarded>(first) & used;
    if constexpr (V % 8 != 0) found |= (word<Guarded>(first + 1) & used) << V * Bits;
    found >>= skipped;
    // Where the third word is not needed, it comes to lie above the eight codes
    if constexpr (V == 5) found |= word<Guarded>(first + 2) << (2 * V * Bits - skipped);
    return low(found);
  }

  // 8 k bits from bit 8 k i on: they start at a byte, and lie in one word (k = 1, 2, 4), in two, or (k = 7) in three.
  template <bool Guarded>
  __device__ __forceinline__ uint64_t from_dense(uint32_t index) const {
    const uint32_t eighths = index * Bits, first = eighths / 4;  // bytes, words
    const int shift = static_cast<int>(eighths % 4) * 8;
    uint64_t found = word<Guarded>(first);
    if constexpr (Bits > 2 && Bits != 4) found |= word<Guarded>(first + 1) << 32;
    found >>= shift;
    if constexpr (Bits == 7) found |= word<Guarded>(first + 2) << (63 - shift) << 1;
    return low(found);
  }

  static __device__ __forceinline__ uint64_t low(uint64_t chunk) {
    return Bits == 8 ? chunk : chunk & ((1ull << (8 * Bits & 63)) - 1);
  }
};

}  // namespace lowbit_kbit
