// One step of tuning on some rows of a weight, on a CPU: w = scale * u + offset, u = clamp(rint((w - offset) / divisor + V) + zero, 0, last) - zero.
//
// Weights and V are float32 (rows, groups, size), parameters float32 (rows, groups); offsets and zeros may be null (0, and `zero`).
// Decoded weights (from row `start` on) and gradients (whole) are float32 (rows, columns); the last group may reach beyond. Every operation rounds as
// torch's does, and sums over a group run in the order of `summed` in loops.py, so that both give the same bits.
#include <math.h>
#include <stdint.h>

enum { LANES = 16, BLOCK = 256 };

struct Parameters {
  float scale, divisor, offset, zero, last;
};

static inline struct Parameters parameters(int64_t group, const float *scales, const float *offsets, const float *zeros,
                                           double zero, double last) {
  const float scale = scales[group];
  return (struct Parameters){scale, scale == 0.0f ? 1.0f : scale, offsets ? offsets[group] : 0.0f,
                             zeros ? zeros[group] : (float)zero, (float)last};
}

static inline float clamped(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

static inline float steps(float unclamped, struct Parameters p) { return clamped(unclamped + p.zero, 0.0f, p.last) - p.zero; }

int64_t decode(const float *weights, const float *values, const float *scales, const float *offsets, const float *zeros,
               double zero, double last, float *out, int64_t start, int64_t stop, int64_t groups, int64_t size, int64_t columns) {
  for (int64_t row = start; row < stop; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const struct Parameters p = parameters(row * groups + group, scales, offsets, zeros, zero, last);
      const int64_t from = (row * groups + group) * size, to = (row - start) * columns + group * size;
      const int64_t count = columns - group * size < size ? columns - group * size : size;
      const float *restrict w = weights + from, *restrict v = values + from;
      float *restrict result = out + to;
      if (offsets) {
        for (int64_t i = 0; i < count; ++i) {
          result[i] = steps(rintf((w[i] - p.offset) / p.divisor + v[i]), p) * p.scale + p.offset;
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          result[i] = steps(rintf(w[i] / p.divisor + v[i]), p) * p.scale;
        }
      }
    }
  }
  return 0;
}

// Writes the sum of `count` gradients, added one after the other, of the weights [from, from + width) to `sum`.
static inline void add_gradients(float *restrict sum, const float *const *gradients, int64_t count, int64_t from, int64_t width) {
  const float *restrict first = gradients[0] + from;
  if (count == 1) {
    for (int64_t i = 0; i < width; ++i) sum[i] = first[i];
    return;
  }
  const float *restrict second = gradients[1] + from;
  for (int64_t i = 0; i < width; ++i) sum[i] = first[i] + second[i];
  for (int64_t each = 2; each < count; ++each) {
    const float *restrict gradient = gradients[each] + from;
    for (int64_t i = 0; i < width; ++i) sum[i] += gradient[i];
  }
}

struct Sums {
  float along[LANES], outside[LANES];
};

// Moves V of one weight against the sign of its gradient g; returns nothing, adds g (u - in (w - o) / s) and g (1 - in).
static inline void move(float w, float *restrict v, float g, struct Parameters p, float lr, float largest, float *restrict along,
                        float *restrict outside) {
  const float quotient = (w - p.offset) / p.divisor;
  const float unclamped = rintf(quotient + *v);
  const float u = steps(unclamped, p);
  const float inside = u == unclamped ? g : 0.0f;
  *along += g * u - quotient * inside;
  *outside += g - inside;
  const float direction = (inside > 0.0f ? lr : 0.0f) - (inside < 0.0f ? lr : 0.0f);
  *v = clamped(*v - direction, -largest, largest);
}

static inline float total(float *lanes) {
  for (int half = LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[half + i];
  }
  return lanes[0];
}

int64_t learn(const float *weights, float *values, const float *scales, const float *offsets, const float *zeros, double zero,
              double last, const float *const *gradients, int64_t count, double lr, double largest, float *by_scale,
              float *by_offset, int64_t start, int64_t stop, int64_t groups, int64_t size, int64_t columns) {
  float gradient[BLOCK];
  for (int64_t group = start * groups; group < stop * groups; ++group) {
    const struct Parameters p = parameters(group, scales, offsets, zeros, zero, last);
    const float step = p.scale > 0.0f ? (float)lr : p.scale < 0.0f ? -(float)lr : 0.0f;
    struct Sums sums = {0};
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
      const int64_t width = size - begin < BLOCK ? size - begin : BLOCK;
      const int64_t column = group % groups * size + begin;
      const int64_t there = columns - column < width ? columns - column : width;
      const float *restrict w = weights + group * size + begin;
      float *restrict v = values + group * size + begin;
      if (there > 0) add_gradients(gradient, gradients, count, group / groups * columns + column, there);
      for (int64_t i = there > 0 ? there : 0; i < width; ++i) gradient[i] = 0.0f;
      int64_t i = 0;
      for (; i + LANES <= width; i += LANES) {
        for (int lane = 0; lane < LANES; ++lane) {
          move(w[i + lane], v + i + lane, gradient[i + lane], p, step, (float)largest, sums.along + lane, sums.outside + lane);
        }
      }
      for (int lane = 0; i + lane < width; ++lane) {
        move(w[i + lane], v + i + lane, gradient[i + lane], p, step, (float)largest, sums.along + lane, sums.outside + lane);
      }
    }
    by_scale[group] = total(sums.along);
    by_offset[group] = total(sums.outside);
  }
  return 0;
}
