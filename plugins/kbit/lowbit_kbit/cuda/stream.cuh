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

// A word, or 0 past the end.
__device__ __forceinline__ uint64_t word_at(const uint32_t* words, uint64_t index, uint64_t end) {
  return index < end ? __ldg(words + index) : 0;
}

// The eight codes of a chunk, 0 for those past the end. `bad` collects the bits of bytes that are no codes.
template <Layout L, int Bits>
struct Reader {
  const void* source;
  uint64_t codes;  // in the whole weight

  __device__ __forceinline__ uint64_t chunk(uint64_t index, uint64_t& bad) const {
    if constexpr (L == Codes) return from_bytes(index, bad);
    if constexpr (L == Words) return from_words(index);
    return from_dense(index);
  }

 private:
  __device__ __forceinline__ uint64_t from_bytes(uint64_t index, uint64_t& bad) const {
    const auto* bytes = static_cast<const uint8_t*>(source) + 8 * index;
    uint64_t found = 0;
    if (8 * index + 8 <= codes) {
      found = __ldg(reinterpret_cast<const unsigned long long*>(bytes));
    } else {
      for (int j = 0; 8 * index + j < codes; ++j) found |= static_cast<uint64_t>(bytes[j]) << 8 * j;
    }
    bad |= found & ~(0x0101010101010101ull * ((1u << Bits) - 1));
    return squeeze<Bits>(found);
  }

  // Eight codes lie in one word when 8 divides V, else in two; for V = 5 in three when they start at the fourth or fifth code.
  __device__ __forceinline__ uint64_t from_words(uint64_t index) const {
    constexpr int V = codes_per_word<Bits>;
    const auto* words = static_cast<const uint32_t*>(source);
    const uint64_t end = units<Words, Bits>(codes), first = 8 * index / V;
    const int skipped = Bits * static_cast<int>(8 * index - first * V);
    constexpr uint64_t used = (1ull << V * Bits) - 1;
    uint64_t found = word_at(words, first, end) & used;
    if constexpr (V % 8 != 0) found |= (word_at(words, first + 1, end) & used) << V * Bits;
    found >>= skipped;
    if constexpr (V == 5) {
      if (skipped > 2 * Bits) found |= word_at(words, first + 2, end) << (2 * V * Bits - skipped);
    }
    return Bits == 8 ? found : found & ((1ull << (8 * Bits & 63)) - 1);
  }

  // 8 k bits from bit 8 k i on: they start at a byte, and lie in one word (k = 1, 2, 4), in two, or (k = 7) in three.
  __device__ __forceinline__ uint64_t from_dense(uint64_t index) const {
    const auto* words = static_cast<const uint32_t*>(source);
    const uint64_t end = units<Dense, Bits>(codes), first = index * Bits / 4;
    const int shift = static_cast<int>(index * Bits % 4) * 8;
    uint64_t found = word_at(words, first, end);
    if constexpr (Bits > 2 && Bits != 4) found |= word_at(words, first + 1, end) << 32;
    found >>= shift;
    if constexpr (Bits == 7) {
      if (shift) found |= word_at(words, first + 2, end) << (64 - shift);
    }
    return Bits == 8 ? found : found & ((1ull << (8 * Bits & 63)) - 1);
  }
};

}  // namespace lowbit_kbit
