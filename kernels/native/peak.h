// As many multiply-adds as a core can do: what products are measured against.
#pragma once

#include <type_traits>

#include "masked_linear/tiles.h"
#include "native/simd.h"

namespace {

// Independent multiply-adds on every thread, as products in float32 or bf16 use them, without
// loading anything. Returns how many floating-point operations they were.
template <bool Pairs>
int64_t multiply_adds(int64_t repeats, int threads) {
  constexpr int64_t sums = HARMODT_WIDTH == 16 ? 24 : HARMODT_WIDTH == 8 ? 12 : 8;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    if constexpr (kTiles<Pairs>) {
      multiply_empty_tiles(repeats);
      continue;
    }
    Vec total[sums];
    for (int i = 0; i < sums; ++i) {  // GCC would compute equal sums once
      total[i] = Vec{};
      asm volatile("" : "+x"(total[i]));
    }
    std::conditional_t<Pairs, IntVec, Vec> value{};
    asm volatile("" : "+x"(value));
    for (int64_t r = 0; r < repeats; ++r)
#pragma GCC unroll 24
      for (int i = 0; i < sums; ++i) total[i] = multiply_add(total[i], value, value);
    for (int i = 0; i < sums; ++i) asm volatile("" : : "x"(total[i]));
  }
  int64_t each = kTiles<Pairs> ? 4 * 2 * 16 * 16 * 32 : sums * kWidth * (Pairs ? 4 : 2);
  return each * repeats * threads;
}

}  // namespace
