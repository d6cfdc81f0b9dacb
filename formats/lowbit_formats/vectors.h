/* Vectors of eight 32-bit words as C compilers extend the language: one register, or several where a processor's are shorter. */
#pragma once
#include <stdint.h>
#include <string.h>

typedef uint32_t v8 __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, (v8){__VA_ARGS__})
#endif

static inline v8 load8(const uint32_t *from) {
    v8 value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store8(uint32_t *to, v8 value) { memcpy(to, &value, sizeof value); }

/* Transpose a tile of eight rows of eight words. */
static inline void turn8(v8 *x) {
    v8 y[8], z[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = SHUFFLE8(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        y[i + 1] = SHUFFLE8(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            z[i + 2 * j] = SHUFFLE8(y[i + j], y[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            z[i + 2 * j + 1] = SHUFFLE8(y[i + j], y[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = SHUFFLE8(z[i], z[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        x[i + 4] = SHUFFLE8(z[i], z[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
