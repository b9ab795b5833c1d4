// Dropout. A draw depends only on the element's index and on a seed. So a backward pass draws the same
// numbers again, with any number of threads and any instruction set.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

// Hashes integers to random-looking integers.
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

// The input of the hash for the element at an index. It grows by kIndexFactor from index to index.
constexpr int32_t kIndexFactor = static_cast<int32_t>(0x9E3779B1u);
inline IntVec unhashed(IntVec index, uint32_t seed) {
  return index * kIndexFactor + static_cast<int32_t>(seed);
}

// The dropout factors: 1 / (1 - drop) for a kept element, else 0.
inline Vec kept(IntVec unhashed_draw, float drop) {
  int32_t threshold = static_cast<int32_t>(drop * 2147483648.0);
  return (hash(unhashed_draw) & 0x7fffffff) < threshold ? Vec{} : splat(1 / (1 - drop));
}

// The seed, or 0 for null. It is read from memory, so that a replayed call draws with a new seed.
inline uint32_t seed_at(const int64_t* seed) { return seed ? static_cast<uint32_t>(*seed) : 0; }

// The dropout of a tensor.
struct Dropout {
  float drop;
  uint32_t seed;
  explicit operator bool() const { return drop > 0; }

  // Drops or rescales the elements of v. `index` is the first element's index in the tensor.
  Vec of(Vec v, int64_t index) const {
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return v * kept(unhashed(lane + static_cast<int32_t>(index), seed), drop);
  }
};

// out = x + dropout(branch); x may be null, for 0.
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
