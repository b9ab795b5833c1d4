// Dropout whose draws depend on an element's place and a seed alone, so that a backward pass, however
// many threads and whatever the instruction set, draws them again.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

// Integers that look random.
inline IntVec hash(IntVec x) {
  typedef uint32_t UVec __attribute__((vector_size(HARMODT_WIDTH * 4)));
  UVec v = (UVec)x;
  v ^= v >> 16;
  v *= 0x7feb352du;
  v ^= v >> 15;
  v *= 0x846ca68bu;
  v ^= v >> 16;
  return (IntVec)v;
}

// 1 / (1 - drop) where the element at a place is kept, else 0.
inline Vec kept(IntVec place, float drop, uint32_t seed) {
  IntVec draw = hash(place * static_cast<int32_t>(0x9E3779B1u) + static_cast<int32_t>(seed));
  int32_t threshold = static_cast<int32_t>(drop * 2147483648.0);
  return (draw & 0x7fffffff) < threshold ? Vec{} : splat(1 / (1 - drop));
}

// out = x + branch, elements of the branch dropped or rescaled; x may be null.
void dropout_add(int64_t size, const float* x, const float* branch, float* out, float drop,
                 uint32_t seed, int threads) {
  IntVec lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (size + 1023) / 1024; ++block)
    for (int64_t i = block * 1024; i < smaller(size, (block + 1) * 1024); i += kWidth) {
      uint32_t inside = lanes_left(size - i);
      Vec v = load(branch + i, inside) * kept(lane + static_cast<int32_t>(i), drop, seed);
      store(out + i, x ? load(x + i, inside) + v : v, inside);
    }
}

}  // namespace
