// The harmony selection: one pass over the gradients, with a running threshold for the weights that
// leave and another for those that enter.
//
// The key of a candidate is one integer. Its high half is the score, as an integer with the same
// order; its low half is the index. No two keys are equal. So the smallest keys do not depend on how
// the vector is divided among threads, and ties go to the lowest index.
//
// Scores are computed with exactly the operations of reference.py, because the last bit decides ties.
// So this file is compiled without contraction to fused multiply-adds.
#pragma once

#include "harmony_selection/chunks.h"
#include "native/kernels.h"
#include "native/simd.h"

namespace {

// The bits of negative floats have the reverse order as integers, unless all bits but the sign are
// flipped.
inline int64_t key_of(float score, int64_t index) {
  int32_t bits;
  score += 0.0f;  // turns -0 into 0
  __builtin_memcpy(&bits, &score, 4);
  uint64_t ordered = static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff));
  return static_cast<int64_t>(ordered << 32) | index;
}

inline float score_of(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 32);
  bits ^= (bits >> 31) & 0x7fffffff;
  float score;
  __builtin_memcpy(&score, &bits, 4);
  return score;
}

// The smallest keys so far of the weights that leave, or that enter. A later candidate counts only if
// its score is below `threshold`.
struct Smallest {
  int64_t* keys;
  int64_t capacity, count, held = 0;
  float threshold = __builtin_inff();

  void offer(Vec scores, uint32_t candidates, int64_t first) {
    candidates &= to_bits(scores < threshold);
    while (candidates) {
      int lane = __builtin_ctz(candidates);
      candidates &= candidates - 1;
      keys[held++] = key_of(scores[lane], first + lane);
    }
    if (held + kWidth > capacity) shrink();
  }
  void shrink() {
    if (held <= count) return;
    keep_smallest(keys, held, count);
    held = count;
    // Later candidates have higher indices, so at an equal score their keys are larger.
    if (count) threshold = score_of(keys[count - 1]);
  }
};

template <bool Fisher, bool Paper>
inline Vec harmony(Vec masked, Vec mean, Vec weight, float reciprocal, float balance) {
  Vec agreement = masked * mean, score;
  if constexpr (Fisher) {
    Vec ratio = Paper ? masked * reciprocal : masked;
    score = ratio * ratio;
  } else {
    score = magnitude(weight);
  }
  return Paper ? agreement + balance * score : balance * agreement + score;
}

// Finds the candidates in words [first, last) of a task and counts the signs that agree and differ.
// Returns the reason if the task is refused.
template <bool Fisher, bool Paper>
Refusal select_words(const harmodt_selection_operands& s, int64_t task, int64_t first, int64_t last,
                     Smallest& leaving, Smallest& entering, int64_t* signs) {
  const int32_t* bits = s.mask_bits + task * s.mask_stride;
  const float* masked = s.masked_gradients + task * s.masked_stride;
  const float* dense = s.dense_gradients + task * s.dense_stride;
  float reciprocal = 1.0f / s.losses[task];
  Vec finite{};  // stays 0 while all values are finite: NaN and infinity times 0 are NaN
  IntVec agreeing{}, differing{};
  for (int64_t at = first * 32; at < last * 32; at += kWidth) {
    uint32_t active = bits_at(bits, at);
    uint32_t maskable = bits_at(s.maskable_bits, at);
    Vec m = load(masked + at), g = load(dense + at), mean = load(s.mean_gradient + at);
    Vec stays = harmony<Fisher, Paper>(m, mean, load(s.weights + at), reciprocal, s.balance);
    Vec comes = -(g * mean);
    constexpr uint32_t all = kWidth == 16 ? 0xffff : (1u << kWidth) - 1;
    active &= all;
    uint32_t inactive = maskable & ~active & all;
    finite += m * 0.0f + g * 0.0f + mean * 0.0f + keep(stays, active) * 0.0f +
              keep(comes, inactive) * 0.0f;
    leaving.offer(stays, active, at);
    entering.offer(comes, inactive, at);
    // Signs are compared, because a product could underflow. A true lane is -1, so it is subtracted.
    Vec mean_of_weights = keep(mean, maskable);
    IntVec counted = (m != 0.0f) & (mean_of_weights != 0.0f);
    IntVec same = (m > 0.0f) == (mean_of_weights > 0.0f);
    agreeing -= counted & same;
    differing -= counted & ~same;
  }
  signs[0] = signs[1] = 0;
  for (int i = 0; i < kWidth; ++i) {
    signs[0] += agreeing[i];
    signs[1] += differing[i];
  }
  bool fine = to_bits(finite == 0.0f) == to_bits(Vec{} == 0.0f);
  return fine ? kFine : refusal_in(masked, dense, s.mean_gradient, first * 32, last * 32);
}

typedef Refusal (*SelectWords)(const harmodt_selection_operands&, int64_t, int64_t, int64_t,
                               Smallest&, Smallest&, int64_t*);

// Finds the smallest keys of each chunk of each task: keys are [tasks][chunks][2][capacity].
// counts [tasks][chunks][4] are the numbers of leaving and entering keys, and of signs that agree and
// differ.
void select_harmony(const harmodt_selection_operands& s, int64_t chunks, int64_t capacity,
                    int64_t* keys, int64_t* counts, uint8_t* refused, int threads) {
  SelectWords select = s.fisher ? (s.paper ? select_words<true, true> : select_words<true, false>)
                                : (s.paper ? select_words<false, true> : select_words<false, false>);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < s.tasks * chunks; ++item) {
    int64_t task = item / chunks, chunk = item % chunks;
    Smallest leaving{keys + item * 2 * capacity, capacity, s.count};
    Smallest entering{leaving.keys + capacity, capacity, s.count};
    int64_t* chunk_counts = counts + 4 * item;
    refused[item] = select(s, task, s.words * chunk / chunks, s.words * (chunk + 1) / chunks, leaving,
                           entering, chunk_counts + 2);
    leaving.shrink();
    entering.shrink();
    chunk_counts[0] = leaving.held;
    chunk_counts[1] = entering.held;
  }
}

}  // namespace
