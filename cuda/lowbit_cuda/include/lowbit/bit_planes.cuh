// Activations as bit planes, the other half of a product of signs: eight neighbours in every lane become planes of 256 numbers.
#pragma once
#include <lowbit/primitives.cuh>

namespace lowbit {

// d += popcount of a & b for 16 x 256 bits of a and 256 x 8 of b; lanes hold d as in `mma_f16`, a and b as drawn above.
__device__ __forceinline__ void mma_popcount(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Eight neighbouring activations as they lie in memory; `get` gives them as floats.
template <class T>
struct Eight {
  uint4 raw;
  __device__ __forceinline__ void load(const T* source) { raw = load_once(source); }
  __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void get(float (&x)[8]) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = floats(words[i], T());
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
  // A plain load that stays where it is written: x is asked for before the weights, or after the wait.
  static __device__ __forceinline__ uint4 load_once(const void* source) {
    uint4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
    return value;
  }
  static __device__ __forceinline__ float2 floats(uint32_t pair, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
  static __device__ __forceinline__ float2 floats(uint32_t pair, __nv_bfloat16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};
template <>
struct Eight<float> {
  uint4 raw[2];
  __device__ __forceinline__ void load(const float* source) {
    raw[0] = Eight<__half>::load_once(source);
    raw[1] = Eight<__half>::load_once(source + 4);
  }
  __device__ __forceinline__ void clear() { raw[0] = raw[1] = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void get(float (&x)[8]) const {
    const uint32_t words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w, raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(words[i]);
  }
};

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// One of three exchanges: of the bits `shift` apart in every pair of the words, a lane keeps those at its own place and gets the
// same from the lane `distance` away; word 0 is then the lower lane's.
template <uint32_t LOW, int SHIFT, int DISTANCE>
__device__ __forceinline__ void exchange(uint32_t (&words)[2], bool upper) {
  const uint32_t low = (words[0] & LOW) | (words[1] << SHIFT & ~LOW), high = (words[0] >> SHIFT & LOW) | (words[1] & ~LOW);
  const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? low : high, DISTANCE);
  words[0] = upper ? other : low;
  words[1] = upper ? high : other;
}

// Bit planes r and r + 8 of a unit's 16-bit numbers, where the lane 4 * r + t gives eight of them (in the low half of v).
__device__ __forceinline__ void to_planes(uint32_t (&planes)[2][2], const uint32_t (&v)[8], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // bytes: i1 i0 choose the byte, i2 the word
    const uint32_t first = __byte_perm(v[4 * half], v[4 * half + 1], 0x5140);
    const uint32_t second = __byte_perm(v[4 * half + 2], v[4 * half + 3], 0x5140);
    planes[0][half] = __byte_perm(first, second, 0x5410);
    planes[1][half] = __byte_perm(first, second, 0x7632);
  }
#pragma unroll
  for (int part = 0; part < 2; ++part) {  // bit b of a byte changes places with bit b of r
    exchange<0x0f0f0f0fu, 4, 16>(planes[part], lane & 16);
    exchange<0x33333333u, 2, 8>(planes[part], lane & 8);
    exchange<0x55555555u, 1, 4>(planes[part], lane & 4);
  }
}

}  // namespace lowbit
