// AdamW on the active weights. All other values keep their bits. This file is compiled without
// contraction to fused multiply-adds, so that it rounds as PyTorch does.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

// torch.lerp, with the same roundings.
inline Vec lerp(Vec start, Vec end, float weight) {
  return weight < 0.5f ? fused_multiply_add(splat(weight), end - start, start)
                       : fused_multiply_add(splat(weight - 1.0f), end - start, end);
}

// The bits of a mask word whose weights are active in at least one task of the step.
inline uint32_t active_in_step(const harmodt_adamw_operands& s, int64_t word) {
  if (word >= s.mask_words) return ~0u;
  uint32_t active = 0;
  for (int64_t i = 0; i < s.groups; ++i) {
    active |= static_cast<uint32_t>(s.mask_bits[s.task_ids[i] * s.mask_stride + word]);
  }
  return active;
}

void masked_adamw(const harmodt_adamw_operands& s, int threads) {
  // The same as `torch.nn.utils.clip_grad_norm_`: NaN stays NaN.
  float scale = 1 / (*s.norm + 1e-6f) * s.max_norm;
  if (scale > 1) scale = 1;
  const float learning_rate = s.lr_and_corrections[0], first_correction = s.lr_and_corrections[1];
  const float second_correction = s.lr_and_corrections[2];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t word = 0; word < (s.size + 31) / 32; ++word) {
    const uint32_t active_bits = active_in_step(s, word);
    if (!active_bits) continue;
    for (int64_t at = word * 32; at < smaller(word * 32 + 32, s.size); at += kWidth) {
      // All lanes are stored, inactive weights with their old bits: storing a whole cache line is
      // faster than storing some of its elements.
      uint32_t inside = lanes_left(s.size - at);
      IntVec active = expand(active_bits >> (at & 31));
      const Vec old_w = load(s.weights + at, inside), old_m = load(s.first_moment + at, inside);
      const Vec old_v = load(s.second_moment + at, inside);
      Vec g = load(s.gradient + at, inside) * scale, w = old_w, m = old_m, v = old_v;
      m = lerp(m, g, s.first_rate);
      v = lerp(v, g * g, s.second_rate);
      Vec denominator = square_root(v) * second_correction + s.epsilon;
      Vec update = m / denominator * first_correction;
      update = fused_multiply_add(splat(s.weight_decay), w, update);
      w = fused_multiply_add(splat(-learning_rate), update, w);
      store(s.weights + at, active ? w : old_w, inside);
      store(s.first_moment + at, active ? m : old_m, inside);
      store(s.second_moment + at, active ? v : old_v, inside);
    }
  }
}

}  // namespace
