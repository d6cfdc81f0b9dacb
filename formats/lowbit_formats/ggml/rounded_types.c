/* Q4_0, Q5_0 and Q8_0 in one pass over each group: see rounded_types.py, whose operations these are, in the same order.

   Magnitudes are compared as whole numbers: the bits of positive floats are ordered as the floats are, NaN above infinity.
   Both functions return 1, and results that mean nothing, where a weight is no number that float16 holds; else 0. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static const float LEAST = 0x1p-126f; /* below, a reciprocal may be infinite */
static const int32_t LARGEST = 0x477FE000; /* the bits of 65504.0f */
static const int32_t SIGN = INT32_MIN;

static inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float inverse(float scale) { return fabsf(scale) < LEAST ? 0 : 1 / scale; }

static inline __attribute__((always_inline)) int64_t
signed_groups(const float *x, uint8_t *codes, float *scales, int64_t groups, int64_t size, int64_t half) {
    int32_t largest = 0;
    for (int64_t group = 0; group < groups; group++, x += size, codes += size) {
        int32_t high = SIGN, depth = SIGN;
        for (int64_t i = 0; i < size; i++) {
            int32_t bits = bits_of(x[i]), negated = bits ^ SIGN;
            high = bits > high ? bits : high;
            depth = negated > depth ? negated : depth;
        }
        int32_t most = high > depth ? high : depth;
        float extreme = float_of(high > depth ? most : most ^ SIGN);
        if (high == depth) {
            int64_t first = 0;
            while ((bits_of(x[first]) & ~SIGN) != most) first++;
            extreme = most ? x[first] : 0;
        }
        largest = most > largest ? most : largest;
        float scale = extreme / half, factor = inverse(scale), middle = half + 0.5f;
        int32_t highest = 2 * half - 1;
        scales[group] = -scale;
        for (int64_t i = 0; i < size; i++) {
            int32_t code = (int32_t)(-x[i] * factor + middle);
            codes[i] = code < highest ? code : highest;
        }
    }
    return largest > LARGEST;
}

static inline __attribute__((always_inline)) int64_t
absmax_groups(const float *x, uint8_t *codes, float *scales, int64_t groups, int64_t size) {
    int32_t largest = 0;
    for (int64_t group = 0; group < groups; group++, x += size, codes += size) {
        int32_t most = 0;
        for (int64_t i = 0; i < size; i++) {
            int32_t bits = bits_of(x[i]) & ~SIGN;
            most = bits > most ? bits : most;
        }
        largest = most > largest ? most : largest;
        float scale = float_of(most) / 127, doubled = 2 * inverse(scale);
        scales[group] = scale;
        for (int64_t i = 0; i < size; i++) {
            int32_t whole = (int32_t)(x[i] * doubled);
            codes[i] = (whole + (whole >> 31) + 257) >> 1;
        }
    }
    return largest > LARGEST;
}

/* Codes 0 to 2 * half - 1, scales (groups,) as float32 with the sign of ggml's. Loops of a length that is known are twice as fast. */
int64_t round_signed(const float *x, uint8_t *codes, float *scales, int64_t groups, int64_t size, int64_t half) {
    return size == 32 ? signed_groups(x, codes, scales, groups, 32, half)
                      : signed_groups(x, codes, scales, groups, size, half);
}

/* Codes -127 to 127 with 128 added, halves rounded away from zero. */
int64_t round_absmax(const float *x, uint8_t *codes, float *scales, int64_t groups, int64_t size) {
    return size == 32 ? absmax_groups(x, codes, scales, groups, 32) : absmax_groups(x, codes, scales, groups, size);
}
