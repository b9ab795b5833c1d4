// Measures the peak rate of multiply-adds. Benchmarks compare the products with it.
#pragma once

#include <type_traits>

#include "masked_linear/tiles.h"
#include "native/simd.h"

namespace {

// Runs independent multiply-adds on every thread: the instructions that products use in float32 or
// bf16 (Pairs), but without loads. Returns the number of floating-point operations.
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
    for (int i = 0; i < sums; ++i) {  // asm hides that all sums are equal: GCC would compute one
      total[i] = Vec{};
      asm volatile("" : "+" HARMODT_REGISTER(total[i]));
    }
    std::conditional_t<Pairs, IntVec, Vec> value{};
    asm volatile("" : "+" HARMODT_REGISTER(value));
    for (int64_t r = 0; r < repeats; ++r)
#pragma GCC unroll 24
      for (int i = 0; i < sums; ++i) total[i] = multiply_add(total[i], value, value);
    for (int i = 0; i < sums; ++i) asm volatile("" : : HARMODT_REGISTER(total[i]));
  }
  int64_t each = kTiles<Pairs> ? 4 * 2 * 16 * 16 * 32 : sums * kWidth * (Pairs ? 4 : 2);
  return each * repeats * threads;
}

}  // namespace
