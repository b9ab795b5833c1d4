// Dropout. A draw depends only on the element's index and on a seed. So a backward pass draws the same
// numbers again, with any number of threads and any instruction set.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

// Hashes integers to random-looking integers. The key enters between two multiplications too: so the
// hashes of consecutive integers under one key are no shift of those under another.
inline UVec hash(UVec v, uint32_t key) {
  v ^= v >> 16;
  v *= 0x7feb352du;
  v ^= key;
  v ^= v >> 15;
  v *= 0x846ca68bu;
  v ^= v >> 16;
  return v;
}

// The input of the hash for the element at an index. It grows by kIndexFactor from index to index.
constexpr uint32_t kIndexFactor = 0x9E3779B1u;
inline UVec unhashed(UVec index, uint32_t key) { return index * kIndexFactor + key; }

// The dropout factors: 1 / (1 - drop) for a kept element, else 0.
inline Vec kept(UVec unhashed_draw, uint32_t key, float drop) {
  int32_t threshold = static_cast<int32_t>(drop * 2147483648.0);
  IntVec draw = (IntVec)(hash(unhashed_draw, key) & 0x7fffffffu);
  return draw < threshold ? Vec{} : splat(1 / (1 - drop));
}

// The key of a seed's draws: its hash, or 0 for null. The seed is read from memory, so that a replayed
// call draws with a new seed.
inline uint32_t key_at(const int64_t* seed) {
  return seed ? hash(UVec{} + static_cast<uint32_t>(*seed) + kIndexFactor, 0)[0] : 0;
}

// The dropout of a tensor.
struct Dropout {
  float drop;
  uint32_t key;
  explicit operator bool() const { return drop > 0; }

  // Drops or rescales the elements of v. `index` is the first element's index in the tensor.
  Vec of(Vec v, int64_t index) const {
    UVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return v * kept(unhashed(lane + static_cast<uint32_t>(index), key), key, drop);
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
