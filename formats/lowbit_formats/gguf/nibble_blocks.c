/* Codes of Q4_0 and Q4_1 from bit streams, and back, a block at a time: see nibble_blocks.py for the order of the bits.
   And from codes of a byte each, theirs and Q8_0's. */
#include <stdint.h>
#include <string.h>

typedef uint8_t b16 __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE16(a, b, ...) __builtin_shuffle(a, b, (b16){__VA_ARGS__})
#endif

/* to: the codes of the first block; step: the bytes from block to block. */
int64_t nibbles_put(const uint8_t *streams, uint8_t *to, int64_t blocks, int64_t step) {
    for (int64_t block = 0; block < blocks; block++) {
        b16 words, low, high;
        memcpy(&words, streams + 16 * block, 16);
        low = words & 15, high = words >> 4;
        /* bytes of A in turn: low, high, low, high ...; those of B above them */
        b16 first = SHUFFLE16(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        b16 second = SHUFFLE16(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        b16 found = first | (second << 4);
        memcpy(to + step * block, &found, 16);
    }
    return 0;
}

static inline b16 ordered(const uint8_t *codes) {
    b16 both, first, second;
    memcpy(&both, codes, 16);
    first = both & 15, second = both >> 4;
    b16 even = SHUFFLE16(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    b16 odd = SHUFFLE16(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return even | (odd << 4);
}

int64_t nibbles_get(const uint8_t *from, uint8_t *streams, int64_t blocks, int64_t step) {
    for (int64_t block = 0; block < blocks; block++) {
        b16 found = ordered(from + step * block);
        memcpy(streams + 16 * block, &found, 16);
    }
    return 0;
}

/* Whether nibbles_get would write what streams holds: 1 or 0. */
int64_t nibbles_same(const uint8_t *from, const uint8_t *streams, int64_t blocks, int64_t step) {
    b16 differs = {0};
    for (int64_t block = 0; block < blocks; block++) {
        b16 wanted;
        memcpy(&wanted, streams + 16 * block, 16);
        differs |= wanted ^ ordered(from + step * block);
    }
    int any = 0;
    for (int i = 0; i < 16; i++) any |= differs[i];
    return any == 0;
}

/* Returns a number that is above 15 when a code is. */
int64_t nibbles_pack(const uint8_t *codes, uint8_t *to, int64_t blocks, int64_t step) {
    b16 seen = {0};
    for (int64_t block = 0; block < blocks; block++) {
        b16 low, high;
        memcpy(&low, codes + 32 * block, 16);
        memcpy(&high, codes + 32 * block + 16, 16);
        seen |= low | high;
        b16 found = low | (high << 4);
        memcpy(to + step * block, &found, 16);
    }
    int any = 0;
    for (int i = 0; i < 16; i++) any |= seen[i];
    return any;
}

/* A code less 128, as a signed byte, differs in its highest bit. */
int64_t bytes_pack(const uint8_t *codes, uint8_t *to, int64_t blocks, int64_t step) {
    for (int64_t block = 0; block < blocks; block++)
        for (int i = 0; i < 32; i++) to[step * block + i] = codes[32 * block + i] ^ 0x80;
    return 0;
}
