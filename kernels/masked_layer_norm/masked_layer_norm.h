// LayerNorm with the masks of each group's task. A row is read several times: first from memory, then
// from the cache.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

// The number of rows in a chunk. One thread sums the gradients of gain and bias over a chunk.
constexpr int64_t kChunkRows = 64;

// The sum of a register's lanes.
inline float sum(Vec v) {
  IntVec other;
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < kWidth; ++i) other[i] = i ^ half;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

// A row with a mask: elements whose bit is not set are 0.
struct MaskedRow {
  const float* values;
  const int32_t* bits;
  int64_t size;

  Vec at(int64_t j) const { return load(values + j, bits_at(bits, j) & lanes_left(size - j)); }
};

inline const int32_t* weight_bits_of(const harmodt_layer_norm_shape& s, int64_t group) {
  return s.weight_bits + task_of(s, group) * s.weight_bits_task_stride;
}
inline const int32_t* bias_bits_of(const harmodt_layer_norm_shape& s, int64_t group) {
  return s.bias_bits + task_of(s, group) * s.bias_bits_task_stride;
}

// Mean and inverse standard deviation of a row.
struct Statistics {
  float mean, scale;
};

inline Statistics statistics_of(const float* row, int64_t size, float epsilon) {
  Vec total{}, squares{};
  for (int64_t j = 0; j < size; j += kWidth) total += load(row + j, lanes_left(size - j));
  float mean = sum(total) / size;
  for (int64_t j = 0; j < size; j += kWidth) {
    uint32_t inside = lanes_left(size - j);
    Vec v = keep(load(row + j, inside) - mean, inside);
    squares = fused_multiply_add(v, v, squares);
  }
  return {mean, 1 / __builtin_sqrtf(sum(squares) / size + epsilon)};
}

// Writes the statistics of all rows, [groups][rows][2].
void layer_norm_statistics(const harmodt_layer_norm_shape& s, const float* x, float* statistics,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.groups * s.rows; ++row) {
    auto [mean, scale] = statistics_of(x + row * s.size, s.size, s.epsilon);
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = scale;
  }
}

// y = normalised x * gain + bias. Also writes each row's statistics.
void masked_layer_norm(const harmodt_layer_norm_shape& s, const float* x, const float* weight,
                       const float* bias, float* y, float* statistics, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.groups * s.rows; ++row) {
    int64_t group = row / s.rows;
    MaskedRow gain{weight, weight_bits_of(s, group), s.size};
    MaskedRow shift{bias, bias_bits_of(s, group), s.size};
    const float* in = x + row * s.size;
    float* out = y + row * s.size;
    auto [mean, scale] = statistics_of(in, s.size, s.epsilon);
    for (int64_t j = 0; j < s.size; j += kWidth) {
      uint32_t inside = lanes_left(s.size - j);
      Vec v = (load(in + j, inside) - mean) * scale;
      store(out + j, fused_multiply_add(v, gain.at(j), shift.at(j)), inside);
    }
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = scale;
  }
}

// Computes dx for rows [first, last) of a group, and in `sums`, [2][size], the sums over these rows of
// the gradients of gain and bias.
void layer_norm_gradient_of(const harmodt_layer_norm_shape& s, int64_t group, int64_t first,
                            int64_t last, const float* dy, const float* d_residual, const float* x,
                            const float* statistics, const float* weight, float* dx, float* sums) {
  MaskedRow gain{weight, weight_bits_of(s, group), s.size};
  float *d_gain = sums, *d_bias = sums + s.size;
  for (int64_t i = 0; i < 2 * s.size; ++i) sums[i] = 0;
  for (int64_t row = group * s.rows + first; row < group * s.rows + last; ++row) {
    const float *in = x + row * s.size, *d_out = dy + row * s.size;
    float mean = statistics[2 * row], scale = statistics[2 * row + 1];
    Vec total{}, weighted{};
    for (int64_t j = 0; j < s.size; j += kWidth) {
      uint32_t inside = lanes_left(s.size - j);
      Vec d = load(d_out + j, inside), v = (load(in + j, inside) - mean) * scale;
      store(d_gain + j, fused_multiply_add(d, v, load(d_gain + j, inside)), inside);
      store(d_bias + j, d + load(d_bias + j, inside), inside);
      d *= gain.at(j);
      total += d;
      weighted = fused_multiply_add(d, v, weighted);
    }
    float mean_d = sum(total) / s.size, mean_dv = sum(weighted) / s.size;
    for (int64_t j = 0; j < s.size; j += kWidth) {
      uint32_t inside = lanes_left(s.size - j);
      Vec d = load(d_out + j, inside) * gain.at(j), v = (load(in + j, inside) - mean) * scale;
      d = (d - mean_d - v * mean_dv) * scale;
      if (d_residual) d += load(d_residual + row * s.size + j, inside);
      store(dx + row * s.size + j, d, inside);
    }
  }
}

// Computes dx and the gradients of gain and bias. Each group's rows are cut into chunks.
void masked_layer_norm_gradient(const harmodt_layer_norm_shape& s, const float* dy,
                                const float* d_residual, const float* x, const float* statistics,
                                const float* weight, float* dx, const harmodt_weight_gradient& out,
                                int threads) {
  int64_t chunks = (s.rows + kChunkRows - 1) / kChunkRows;
  // [groups][chunks][2][size]
  auto* sums = static_cast<float*>(scratch(sizeof(float) * s.groups * chunks * 2 * s.size));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < s.groups * chunks; ++item) {
    int64_t group = item / chunks, first = item % chunks * kChunkRows;
    layer_norm_gradient_of(s, group, first, smaller(s.rows, first + kChunkRows), dy, d_residual,
                           x, statistics, weight, dx, sums + item * 2 * s.size);
  }
  for (int64_t j = 0; j < s.size; j += kWidth) {
    uint32_t inside = lanes_left(s.size - j);
    Vec all_gains{}, all_shifts{};
    for (int64_t group = 0; group < s.groups; ++group) {
      Vec gain{}, shift{};
      for (int64_t chunk = group * chunks; chunk < (group + 1) * chunks; ++chunk) {
        gain += load(sums + chunk * 2 * s.size + j, inside);
        shift += load(sums + chunk * 2 * s.size + s.size + j, inside);
      }
      gain = keep(gain, bits_at(weight_bits_of(s, group), j));
      shift = keep(shift, bits_at(bias_bits_of(s, group), j));
      if (out.per_group) {
        store(out.weight + group * out.weight_group_stride + j, gain, inside);
        store(out.bias + group * out.bias_group_stride + j, shift, inside);
      }
      all_gains += gain;
      all_shifts += shift;
    }
    if (out.per_group) continue;
    store(out.weight + j, all_gains, inside);
    store(out.bias + j, all_shifts, inside);
  }
}

}  // namespace
