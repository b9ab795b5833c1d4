// SIMD registers of floats and their operations, as wide as the instruction set that the including
// file is compiled for.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#define HARMODT_WIDTH 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define HARMODT_WIDTH 8
#else
#define HARMODT_WIDTH 4
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

// The constraint of asm operands that are registers of floats.
#if defined(__aarch64__)
#define HARMODT_REGISTER "w"
#else
#define HARMODT_REGISTER "x"
#endif

// Everything is compiled once for each instruction set, so nothing may have external linkage.
namespace {

constexpr int kWidth = HARMODT_WIDTH;
typedef float Vec __attribute__((vector_size(HARMODT_WIDTH * 4)));
typedef int32_t IntVec __attribute__((vector_size(HARMODT_WIDTH * 4)));
// Sums and products that may overflow are computed in unsigned integers.
typedef uint32_t UVec __attribute__((vector_size(HARMODT_WIDTH * 4)));
typedef float UnalignedVec __attribute__((vector_size(HARMODT_WIDTH * 4), aligned(4), may_alias));
typedef int32_t UnalignedIntVec
    __attribute__((vector_size(HARMODT_WIDTH * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline void store(int32_t* p, IntVec v) { *reinterpret_cast<UnalignedIntVec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }  // GCC could not drop x + 0, because -0 + 0 is 0
inline IntVec splat(int32_t x) { return IntVec{} + x; }

// A mask of the lanes that hold the `left` last elements: one low bit per lane, and all bits if the
// elements fill the register.
inline uint32_t lanes_left(int64_t left) {
  return left >= kWidth ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
}

// The bits of a packed mask from element `at` on, which is a multiple of the width. Bits above the
// lowest kWidth may be set too.
// Null stands for a mask in which every bit is 1.
inline uint32_t bits_at(const int32_t* words, int64_t at) {
  return words ? static_cast<uint32_t>(words[at >> 5]) >> (at & 31) : ~0u;
}

// Every bit of a lane is 1 if the lane's bit is set, else 0.
inline IntVec expand(uint32_t bits) {
  IntVec lane_bit;
  for (int i = 0; i < kWidth; ++i) lane_bit[i] = 1 << i;
  return (splat(static_cast<int32_t>(bits)) & lane_bit) != 0;
}

// keep, load and store with bits: only lanes whose bit is set count. keep and load give 0 in the other
// lanes; store leaves their memory unchanged.
#if defined(__AVX512F__)
inline Vec keep(Vec v, uint32_t bits) { return (Vec)_mm512_maskz_mov_ps(bits, (__m512)v); }
inline Vec load(const float* p, uint32_t bits) { return (Vec)_mm512_maskz_loadu_ps(bits, p); }
inline void store(float* p, Vec v, uint32_t bits) {
  if ((bits & 0xffff) == 0xffff) return store(p, v);  // masked stores are slow on some processors
  _mm512_mask_storeu_ps(p, bits, (__m512)v);
}
#else
inline Vec keep(Vec v, uint32_t bits) { return (Vec)((IntVec)v & expand(bits)); }
#if defined(__AVX2__)
inline Vec load(const float* p, uint32_t bits) {
  return (Vec)_mm256_maskload_ps(p, (__m256i)expand(bits));
}
inline void store(float* p, Vec v, uint32_t bits) {
  if ((bits & 0xff) == 0xff) return store(p, v);  // masked stores are slow on some processors
  _mm256_maskstore_ps(p, (__m256i)expand(bits), (__m256)v);
}
#else
inline Vec load(const float* p, uint32_t bits) {
  Vec v{};
  for (int i = 0; i < kWidth; ++i)
    if (bits >> i & 1) v[i] = p[i];
  return v;
}
inline void store(float* p, Vec v, uint32_t bits) {
  for (int i = 0; i < kWidth; ++i)
    if (bits >> i & 1) p[i] = v[i];
}
#endif
#endif

// One bit per lane: 1 if all bits of the lane are 1. Lanes are all ones or all zeros.
inline uint32_t to_bits(IntVec lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)lanes);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (lanes[i] & 1u) << i;
  return bits;
#endif
}

// a * b + c, with one rounding if the instruction set has fused multiply-adds.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#elif defined(__aarch64__)
  return (Vec)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline Vec magnitude(Vec v) { return (Vec)((IntVec)v & 0x7fffffff); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Forces inlining: for functions `inline` is only a hint, and lambdas have no such keyword.
#define HARMODT_ALWAYS_INLINE __attribute__((always_inline))

// Calls body(i) for each i < Count, where i is a compile-time constant. The compiler keeps an array in
// registers only if every index is such a constant.
template <class Body, int... I>
HARMODT_ALWAYS_INLINE inline void call_each(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int Count, class Body>
HARMODT_ALWAYS_INLINE inline void unrolled(const Body& body) {
  call_each(body, std::make_integer_sequence<int, Count>{});
}

// Transposes kWidth registers in place. Pairs of rows that are Half apart exchange half of each group
// of 2 * Half lanes; then the same is done with Half / 2.
template <int Half = kWidth / 2>
inline void transpose(IntVec* rows) {
  IntVec low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i & Half ? i - Half + kWidth : i;
    high[i] = i & Half ? i + kWidth : i + Half;
  }
  for (int i = 0; i < kWidth; ++i) {
    if (i & Half) continue;
    IntVec a = rows[i], b = rows[i + Half];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Half] = __builtin_shuffle(a, b, high);
  }
  if constexpr (Half > 1) transpose<Half / 2>(rows);
}

#if defined(__AVX512BF16__)
// Two bf16 in each lane, `first` in the low half, rounded to nearest even.
inline IntVec pair_bf16(Vec first, Vec second) {
  typedef int16_t Halves __attribute__((vector_size(64)));
  constexpr Halves interleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  auto both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (IntVec)_mm512_permutexvar_epi16((__m512i)interleaved, (__m512i)both);
}

// The elements of a, then of b, as bf16 pairs: lane i holds elements 2 i and 2 i + 1.
inline IntVec pair_neighbours(Vec a, Vec b) {
  return (IntVec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
#else
// Rounds to bf16 (nearest even) in the high half of each lane. The low half is undefined.
inline IntVec round_bf16(Vec v) {
  UVec bits = (UVec)v;
  UVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (IntVec)(v == v ? rounded : bits | 0x400000);  // NaN stays NaN
}

// Two bf16 in each lane, `first` in the low half.
inline IntVec pair_bf16(Vec first, Vec second) {
  IntVec low = round_bf16(first) >> 16 & 0xffff;
  return low | (round_bf16(second) & static_cast<int32_t>(0xffff0000));
}

// The elements of a, then of b, as bf16 pairs: lane i holds elements 2 i and 2 i + 1.
inline IntVec pair_neighbours(Vec a, Vec b) {
  IntVec even, odd;
  for (int i = 0; i < kWidth; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return pair_bf16(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd));
}
#endif

// total + a * b. For pairs of bf16: total + a.low * b.low + a.high * b.high.
inline Vec multiply_add(Vec total, Vec a, Vec b) { return fused_multiply_add(a, b, total); }
inline Vec multiply_add(Vec total, IntVec a, IntVec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
  constexpr int32_t high = static_cast<int32_t>(0xffff0000);
  total = fused_multiply_add((Vec)(a << 16), (Vec)(b << 16), total);
  return fused_multiply_add((Vec)(a & high), (Vec)(b & high), total);
#endif
}

}  // namespace
