// A masked LayerNorm and the masked linear layer after it. The layer's kernels normalise x while they
// read it.
#pragma once

#include "masked_layer_norm/masked_layer_norm.h"
#include "masked_linear/masked_linear.h"

namespace {

// Copies a whole row with its mask applied.
void copy(const MaskedRow& row, float* out) {
  for (int64_t j = 0; j < row.size; j += kWidth) store(out + j, row.at(j), lanes_left(row.size - j));
}

template <bool Pairs>
void norm_linear(const harmodt_linear_shape& s, const harmodt_layer_norm_shape& norm,
                 const float* x, const float* gain, const float* shift, const float* weight,
                 const float* bias, bool relu, float* y, float* statistics, float* affine,
                 int threads) {
  layer_norm_statistics(norm, x, statistics, threads);
  for (int64_t group = 0; group < s.groups; ++group) {
    float* group_affine = affine + group * 2 * s.inputs;
    copy({gain, weight_bits_of(norm, group), s.inputs}, group_affine);
    copy({shift, bias_bits_of(norm, group), s.inputs}, group_affine + s.inputs);
  }
  masked_linear<Pairs>(s, {statistics, affine}, x, weight, bias, relu, {}, y, threads);
}

}  // namespace
