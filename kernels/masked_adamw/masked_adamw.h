// AdamW where a weight is active; everything else stays bit for bit. Compiled without contraction:
// the roundings are PyTorch's.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

// As torch.lerp, with its roundings.
inline Vec lerp(Vec start, Vec end, float weight) {
  return weight < 0.5f ? fused_multiply_add(splat(weight), end - start, start)
                       : fused_multiply_add(splat(weight - 1.0f), end - start, end);
}

// The weights of a word that are active in one of the step's tasks.
inline uint32_t active_in_step(const harmodt_adamw_operands& s, int64_t word) {
  if (word >= s.mask_words) return ~0u;
  uint32_t active = 0;
  for (int64_t i = 0; i < s.tasks; ++i) {
    active |= static_cast<uint32_t>(s.mask_bits[s.task_ids[i] * s.mask_stride + word]);
  }
  return active;
}

void masked_adamw(const harmodt_adamw_operands& s, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t word = 0; word < (s.size + 31) / 32; ++word) {
    const uint32_t of_word = active_in_step(s, word);
    if (!of_word) continue;
    for (int64_t at = word * 32; at < smaller(word * 32 + 32, s.size); at += kWidth) {
      uint32_t active = of_word >> (at & 31) & lanes_left(s.size - at);
      Vec w = load(s.weights + at, active), g = load(s.gradient + at, active);
      Vec m = load(s.first_moment + at, active), v = load(s.second_moment + at, active);
      g *= s.scale;
      m = lerp(m, g, s.first_rate);
      v = lerp(v, g * g, s.second_rate);
      Vec denominator = square_root(v) * s.second_correction + s.epsilon;
      Vec update = m / denominator * s.first_correction;
      update = fused_multiply_add(splat(s.weight_decay), w, update);
      store(s.weights + at, fused_multiply_add(splat(-s.learning_rate), update, w), active);
      store(s.first_moment + at, m, active);
      store(s.second_moment + at, v, active);
    }
  }
}

}  // namespace
