// From one layout of codes to another, exactly. LOWBIT_FROM and LOWBIT_TO are Codes, Words or Dense (stream.cuh), LOWBIT_BITS is k.
// LOWBIT_WORD_CHUNKS: chunks of eight codes that a thread packs into Words.
//
// A thread takes as many codes as fill whole units of the target: 16 bytes, k words (Dense, 32 codes), or lcm(8, V) codes in
// words. Both pointers are multiples of 16; nothing past the last unit is read or written. `status` gets 1 when a byte is no code.
#include "stream.cuh"

using namespace lowbit_kbit;

constexpr int kBits = LOWBIT_BITS;
constexpr int kPerWord = codes_per_word<kBits>;
constexpr int kWordChunks = LOWBIT_WORD_CHUNKS;  // as many as make four whole words, or eight, where that is possible
constexpr int kChunks = LOWBIT_TO == Codes ? 2 : LOWBIT_TO == Dense ? 4 : kWordChunks;
constexpr int kWords = LOWBIT_TO == Codes ? 4 : LOWBIT_TO == Dense ? kBits : 8 * kChunks / kPerWord;

// Word `w` of the target, from chunks that hold the codes of the thread.
template <int W>
__device__ __forceinline__ uint32_t target_word(const uint64_t (&chunks)[kChunks]) {
  if constexpr (LOWBIT_TO == Codes) {
    return static_cast<uint32_t>(spread<kBits>(chunks[W / 2]) >> 32 * (W % 2));
  } else if constexpr (LOWBIT_TO == Dense) {
    uint32_t word = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      constexpr int width = 8 * kBits;
      const int at = width * c - 32 * W;  // where bit 0 of the chunk lies
      if (at > -64 && at < 32) word |= static_cast<uint32_t>(at < 0 ? chunks[c] >> (-at & 63) : chunks[c] << (at & 63));
    }
    return word;
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      const int code = W * kPerWord + j;
      word |= static_cast<uint32_t>(chunks[code / 8] >> kBits * (code % 8) & ((1u << kBits) - 1)) << kBits * j;
    }
    return word;
  }
}

template <int W>
__device__ __forceinline__ void fill(uint32_t (&words)[kWords], const uint64_t (&chunks)[kChunks]) {
  if constexpr (W < kWords) {
    words[W] = target_word<W>(chunks);
    fill<W + 1>(words, chunks);
  }
}

extern "C" __global__ void __launch_bounds__(256) lowbit_kbit_repack(const void* source, void* target, uint64_t codes, int* status) {
  const Reader<LOWBIT_FROM, kBits> reader{source, codes};
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (uint64_t{thread} * kChunks * 8 >= codes) return;
  uint64_t chunks[kChunks], bad = 0;
  if (reader.inside((thread + 1) * kChunks)) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) chunks[c] = reader.chunk<false>(thread * kChunks + c, bad);
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) chunks[c] = reader.chunk<true>(thread * kChunks + c, bad);
  }
  if (bad) *status = 1;

  uint32_t words[kWords];
  fill<0>(words, chunks);
  const uint64_t first = uint64_t{thread} * kWords, end = LOWBIT_TO == Codes ? codes / 4 : units<LOWBIT_TO, kBits>(codes);
  if (LOWBIT_TO == Codes && first + 4 > end) {
    auto* bytes = static_cast<uint8_t*>(target) + 4 * first;
    for (int j = 0; 4 * first + j < codes; ++j) bytes[j] = static_cast<uint8_t>(words[j / 4] >> 8 * (j % 4));
    return;
  }
  auto* out = static_cast<uint32_t*>(target) + first;
  if (kWords % 4 == 0 && first + kWords <= end) {
#pragma unroll
    for (int w = 0; w + 4 <= kWords; w += 4) {
      *reinterpret_cast<uint4*>(out + w) = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (first + w < end) out[w] = words[w];
    }
  }
}
