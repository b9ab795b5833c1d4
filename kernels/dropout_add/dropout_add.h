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

// What the draw at a place is hashed from; from a place to its neighbour it grows by kNextPlace.
constexpr int32_t kNextPlace = static_cast<int32_t>(0x9E3779B1u);
inline IntVec unhashed(IntVec place, uint32_t seed) {
  return place * kNextPlace + static_cast<int32_t>(seed);
}

// 1 / (1 - drop) where the element of a draw is kept, else 0.
inline Vec kept(IntVec unhashed_draw, float drop) {
  int32_t threshold = static_cast<int32_t>(drop * 2147483648.0);
  return (hash(unhashed_draw) & 0x7fffffff) < threshold ? Vec{} : splat(1 / (1 - drop));
}

// The seed of a draw, which lies in memory so that a recorded call draws anew; 0 without one.
inline uint32_t seed_at(const int64_t* seed) { return seed ? static_cast<uint32_t>(*seed) : 0; }

// What is dropped of a tensor.
struct Dropout {
  float drop;
  uint32_t seed;
  explicit operator bool() const { return drop > 0; }

  // Neighbours of which the first is at a place, dropped or rescaled.
  Vec of(Vec v, int64_t place) const {
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return v * kept(unhashed(lane + static_cast<int32_t>(place), seed), drop);
  }
};

// out = x + branch, elements of the branch dropped or rescaled; x may be null.
void dropout_add(int64_t size, const float* x, const float* branch, float* out,
                 const Dropout& dropout, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (size + 1023) / 1024; ++block)
    for (int64_t i = block * 1024; i < smaller(size, (block + 1) * 1024); i += kWidth) {
      uint32_t inside = lanes_left(size - i);
      Vec v = dropout.of(load(branch + i, inside), i);
      store(out + i, x ? load(x + i, inside) + v : v, inside);
    }
}

}  // namespace
