// The harmony selection: one pass over the gradients with a running threshold on either side.
//
// The key of a candidate is one integer: its score in the high half, as an integer of the same
// order, and its index in the low half. No two are equal, so that the smallest ones do not depend on
// how the vector is divided among threads, and ties go to the lowest index.
//
// Scores are computed operation by operation as in the definition, because the last bit decides
// ties: this file is compiled without contraction to fused multiply-adds.
#pragma once

#include "harmony_selection/parts.h"
#include "native/kernels.h"
#include "native/simd.h"

namespace {

inline int64_t key_of(float score, int64_t index) {
  int32_t bits;
  score += 0.0f;  // -0 is 0
  __builtin_memcpy(&bits, &score, 4);
  return (static_cast<int64_t>(bits ^ ((bits >> 31) & 0x7fffffff)) << 32) | index;
}

inline float score_of(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 32);
  bits ^= (bits >> 31) & 0x7fffffff;
  float score;
  __builtin_memcpy(&score, &bits, 4);
  return score;
}

// The smallest keys so far of one side; `threshold` is the score that a later one must be below.
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
    // Those that come later have higher indices: at the same score they are larger.
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

// Words [first, last) of a task: their candidates, and how many signs agree and differ. Returns
// what is refused.
template <bool Fisher, bool Paper>
Refusal select_words(const harmodt_selection_operands& s, int64_t task, int64_t first, int64_t last,
                     Smallest& leaving, Smallest& entering, int64_t* signs) {
  const int32_t* bits = s.mask_bits + task * s.mask_stride;
  const float* masked = s.masked_gradients + task * s.masked_stride;
  const float* dense = s.dense_gradients + task * s.dense_stride;
  float reciprocal = 1.0f / s.losses[task];
  Vec finite{};  // stays 0 unless something times 0 is NaN
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
    // Compared, not multiplied: no underflow. A lane that is true is -1.
    Vec of_weights = keep(mean, maskable);
    IntVec counted = (m != 0.0f) & (of_weights != 0.0f), same = (m > 0.0f) == (of_weights > 0.0f);
    agreeing -= counted & same;
    differing -= counted & ~same;
  }
  signs[0] = signs[1] = 0;
  for (int i = 0; i < kWidth; ++i) {
    signs[0] += agreeing[i];
    signs[1] += differing[i];
  }
  bool fine = to_bits(finite == 0.0f) == to_bits(Vec{} == 0.0f);
  return fine ? kFine : what_is_wrong(masked, dense, s.mean_gradient, first * 32, last * 32);
}

typedef Refusal (*SelectWords)(const harmodt_selection_operands&, int64_t, int64_t, int64_t,
                               Smallest&, Smallest&, int64_t*);

// Every task is cut into parts; keys are [tasks][parts][2][capacity]. `counts` has their numbers, and
// those of the signs that agree and differ.
void select_harmony(const harmodt_selection_operands& s, int64_t parts, int64_t capacity,
                    int64_t* keys, int64_t* counts, uint8_t* refused, int threads) {
  SelectWords select = s.fisher ? (s.paper ? select_words<true, true> : select_words<true, false>)
                                : (s.paper ? select_words<false, true> : select_words<false, false>);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < s.tasks * parts; ++item) {
    int64_t task = item / parts, part = item % parts;
    Smallest leaving{keys + item * 2 * capacity, capacity, s.count};
    Smallest entering{leaving.keys + capacity, capacity, s.count};
    int64_t* of_part = counts + 4 * item;
    refused[item] = select(s, task, s.words * part / parts, s.words * (part + 1) / parts, leaving,
                           entering, of_part + 2);
    leaving.shrink();
    entering.shrink();
    of_part[0] = leaving.held;
    of_part[1] = entering.held;
  }
}

}  // namespace
