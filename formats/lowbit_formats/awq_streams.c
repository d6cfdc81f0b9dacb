/* AWQ's words from bit streams along rows, and back: see awq_streams.py for the order of the bits.

   Eight octets of rows at a time, one to a lane. For eight words of their streams:

       turn8 for each row r of an octet:   X[r][k], lanes are octets            (8 rows x 8 words, in vectors)
       nibbles for each k:                 X[0..7][k] -> Y[0..7], lanes are octets: AWQ's words of column 8k + j
       stores:                             Y[j] to row 8k + j, eight words side by side
*/
#include "vectors.h"

enum { OCTETS = 8, WORDS = 8 };
static const int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

static inline void exchange(v8 *low, v8 *high, int shift, uint32_t stays) {
    v8 t = ((*low >> shift) ^ *high) & (v8){stays, stays, stays, stays, stays, stays, stays, stays};
    *high ^= t;
    *low ^= t << shift;
}

/* Nibble j of word n becomes nibble n of word j. */
static inline void turn_nibbles(v8 *x) {
    for (int i = 0; i < 8; i += 2) exchange(x + i, x + i + 1, 4, 0x0F0F0F0F);
    for (int i = 0; i < 8; i++)
        if (!(i & 2)) exchange(x + i, x + i + 2, 8, 0x00FF00FF);
    for (int i = 0; i < 4; i++) exchange(x + i, x + i + 4, 16, 0x0000FFFF);
}

/* streams: (8 * octets, count) words; words: (8 * count, octets), with strides in words. Octets and count are multiples of 8. */
int64_t awq_put(
    const uint32_t *streams, int64_t stride, uint32_t *words, int64_t words_stride, int64_t octets, int64_t count
) {
    for (int64_t k = 0; k < count; k += WORDS)
        for (int64_t o = 0; o < octets; o += OCTETS) {
            v8 x[8][WORDS];
            for (int n = 0; n < 8; n++) {
                for (int i = 0; i < OCTETS; i++) x[n][i] = load8(streams + (8 * (o + i) + ORDER[n]) * stride + k);
                turn8(x[n]);
            }
            for (int i = 0; i < WORDS; i++) {
                v8 y[8];
                for (int n = 0; n < 8; n++) y[n] = x[n][i];
                turn_nibbles(y);
                for (int j = 0; j < 8; j++) store8(words + (8 * (k + i) + j) * words_stride + o, y[j]);
            }
        }
    return 0;
}

/* Eight words of the streams of eight octets: x[n][i], for row ORDER[n] of octet i. */
static inline void take(const uint32_t *words, int64_t stride, int64_t k, int64_t o, v8 x[8][WORDS]) {
    for (int i = 0; i < WORDS; i++) {
        v8 y[8];
        for (int j = 0; j < 8; j++) y[j] = load8(words + (8 * (k + i) + j) * stride + o);
        turn_nibbles(y);
        for (int n = 0; n < 8; n++) x[n][i] = y[n];
    }
    for (int n = 0; n < 8; n++) turn8(x[n]);
}

int64_t awq_streams(
    const uint32_t *words, int64_t words_stride, uint32_t *streams, int64_t stride, int64_t octets, int64_t count
) {
    for (int64_t k = 0; k < count; k += WORDS)
        for (int64_t o = 0; o < octets; o += OCTETS) {
            v8 x[8][WORDS];
            take(words, words_stride, k, o, x);
            for (int n = 0; n < 8; n++)
                for (int i = 0; i < OCTETS; i++) store8(streams + (8 * (o + i) + ORDER[n]) * stride + k, x[n][i]);
        }
    return 0;
}

/* Whether awq_streams would write what streams holds: 1 or 0. */
int64_t awq_same(
    const uint32_t *words, int64_t words_stride, const uint32_t *streams, int64_t stride, int64_t octets, int64_t count
) {
    v8 differs = {0};
    for (int64_t k = 0; k < count; k += WORDS)
        for (int64_t o = 0; o < octets; o += OCTETS) {
            v8 x[8][WORDS];
            take(words, words_stride, k, o, x);
            for (int n = 0; n < 8; n++)
                for (int i = 0; i < OCTETS; i++) differs |= x[n][i] ^ load8(streams + (8 * (o + i) + ORDER[n]) * stride + k);
        }
    uint32_t any = 0;
    for (int i = 0; i < 8; i++) any |= differs[i];
    return any == 0;
}
