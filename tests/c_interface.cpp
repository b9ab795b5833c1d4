// Calls each function of harmodt.h on small odd shapes, with every instruction set of this machine,
// and compares the results with plain loops in double. The loops share no code with the kernels.
// Prints the instruction sets, and what differs. ctest and tests/test_c_interface.py run it.

#include "native/harmodt.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Words = std::vector<int32_t>;
using Ids = std::vector<int64_t>;

const int64_t kTasks = 3;
const std::vector<int> kThreads = {1, 3};

std::string isa, test_case;
int failures = 0;

void require(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 20)
    std::printf("%s, %s: %s\n", isa.c_str(), test_case.c_str(), what.c_str());
}

// The same numbers on every machine: multiples of 1/500 in [-1, 1].
uint32_t state;
uint32_t draw() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
Floats randoms(int64_t size) {
  Floats values(size);
  for (float& value : values) value = (static_cast<int>(draw() % 1001) - 500) / 500.0f;
  return values;
}
Words random_bits(int64_t words) {
  Words bits(words);
  for (int32_t& word : bits) word = static_cast<int32_t>(draw() << 16 ^ draw());
  return bits;
}
int64_t words_of(int64_t bits) { return (bits + 31) / 32; }
bool bit(const int32_t* words, int64_t i) {
  return static_cast<uint32_t>(words[i / 32]) >> i % 32 & 1;
}

// Memory that a kernel writes. It holds NaN before, and numbers behind its end that must stay.
struct Output {
  Floats values;
  int64_t size;
  explicit Output(int64_t n) : values(n + 32, std::nanf("")), size(n) {
    std::fill(values.begin() + n, values.end(), 777.0f);
  }
  float* data() { return values.data(); }
  bool untouched() const {
    return std::all_of(values.begin(), values.begin() + size, [](float v) { return v != v; });
  }
  void compare(const char* name, const Doubles& expected, double tolerance) const {
    for (int64_t i = 0; i < size; ++i) {
      double allowed = tolerance * std::max(1.0, std::fabs(expected[i]));
      bool close = std::fabs(values[i] - expected[i]) <= allowed;  // false for NaN
      require(close, std::string(name) + "[" + std::to_string(i) + "] is " +
                         std::to_string(values[i]) + ", not " + std::to_string(expected[i]));
      if (!close) break;
    }
    for (size_t i = size; i < values.size(); ++i)
      require(values[i] == 777.0f, std::string(name) + " is written beyond its end");
  }
};

double bf16(double value) {
  float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  uint32_t rest = bits & 0xffff, odd = bits >> 16 & 1;
  bits &= 0xffff0000u;
  if (rest > 0x8000 || (rest == 0x8000 && odd)) bits += 0x10000;
  std::memcpy(&narrow, &bits, 4);
  return narrow;
}

// Dropout as kernels/dropout.py defines it: the factor of the element at an index.
uint32_t hashed(uint32_t v, uint32_t key) {
  v = ((v ^ v >> 16) * 0x7FEB352Du) ^ key;
  v = (v ^ v >> 15) * 0x846CA68Bu;
  return v ^ v >> 16;
}
double dropout_factor(int64_t index, float drop, int64_t seed) {
  if (drop == 0) return 1;
  uint32_t key = hashed(static_cast<uint32_t>(seed) + 0x9E3779B1u, 0);
  uint32_t number = hashed(static_cast<uint32_t>(index) * 0x9E3779B1u + key, key) & 0x7fffffff;
  return number < static_cast<uint32_t>(drop * 2147483648.0) ? 0 : 1 / (1 - double(drop));
}

// A masked linear layer, with a LayerNorm before it if `normed`.
struct Layer {
  int64_t groups, rows, inputs, outputs;
  bool masks, with_bias, relu, normed, rounds;
  float drop;
  int64_t stride, seed = 1234567;
  Floats x, weight, bias, residual, dy, gain, shift;
  Words weight_bits, bias_bits, gain_bits, shift_bits;
  Ids ids;
  harmodt_linear_shape shape;
  harmodt_layer_norm_shape norm;

  Layer(int64_t g, int64_t r, int64_t k, int64_t n, int variant)
      : groups(g), rows(r), inputs(k), outputs(n), masks(variant & 1), with_bias(variant & 2),
        relu(variant & 4), normed(variant & 8), rounds(variant & 16), drop(variant & 32 ? 0.3f : 0),
        stride(k + 3), x(randoms(g * r * k)), weight(randoms(n * stride)), bias(randoms(n)),
        residual(randoms(g * r * n)), dy(randoms(g * r * n)), gain(randoms(k)), shift(randoms(k)),
        weight_bits(random_bits(kTasks * n * words_of(k))),
        bias_bits(random_bits(kTasks * words_of(n))), gain_bits(random_bits(kTasks * words_of(k))),
        shift_bits(random_bits(kTasks * words_of(k))) {
    for (int64_t i = 0; i < g; ++i) ids.push_back((i + 2) % kTasks);
    shape = {g, r, k, n, stride, 0, nullptr, 0, 0, nullptr, 0, nullptr, rounds};
    norm = {g, r, k, 0, nullptr, 0, nullptr, 0, nullptr, 1e-5f};
    if (!masks) return;
    shape = {g, r, k, n, stride, kTasks, weight_bits.data(), n * words_of(k), words_of(k),
             bias_bits.data(), words_of(n), ids.data(), rounds};
    norm = {g, r, k, kTasks, gain_bits.data(), words_of(k), shift_bits.data(), words_of(k),
            ids.data(), 1e-5f};
  }

  double rounded(double value) const { return rounds ? bf16(value) : value; }
  bool active(int64_t group, int64_t n, int64_t k) const {
    return !masks || bit(&weight_bits[(ids[group] * outputs + n) * words_of(inputs)], k);
  }
  double w(int64_t group, int64_t n, int64_t k) const {
    return active(group, n, k) ? rounded(weight[n * stride + k]) : 0;
  }
  bool bias_active(int64_t group, int64_t n) const {
    return !masks || bit(&bias_bits[ids[group] * words_of(outputs)], n);
  }
  double affine(const Floats& values, const Words& bits, int64_t group, int64_t k) const {
    return !masks || bit(&bits[ids[group] * words_of(inputs)], k) ? values[k] : 0;
  }
  // Mean and inverse standard deviation of a row.
  void statistics(int64_t row, double& mean, double& scale) const {
    double total = 0, squares = 0;
    for (int64_t k = 0; k < inputs; ++k) total += x[row * inputs + k];
    mean = total / inputs;
    for (int64_t k = 0; k < inputs; ++k) squares += std::pow(x[row * inputs + k] - mean, 2);
    scale = 1 / std::sqrt(squares / inputs + 1e-5);
  }
  double normalised(int64_t row, int64_t k) const {
    double mean, scale;
    statistics(row, mean, scale);
    return (x[row * inputs + k] - mean) * scale;
  }
  // The inputs of the product.
  Doubles product_inputs() const {
    Doubles values(x.begin(), x.end());
    for (int64_t row = 0; normed && row < groups * rows; ++row)
      for (int64_t k = 0; k < inputs; ++k)
        values[row * inputs + k] =
            normalised(row, k) * affine(gain, gain_bits, row / rows, k) +
            affine(shift, shift_bits, row / rows, k);
    for (double& value : values) value = rounded(value);
    return values;
  }
  // The output before dropout and residual.
  Doubles layer_outputs() const {
    Doubles y, in = product_inputs();
    for (int64_t row = 0; row < groups * rows; ++row)
      for (int64_t n = 0; n < outputs; ++n) {
        double sum = with_bias && bias_active(row / rows, n) ? bias[n] : 0;
        for (int64_t k = 0; k < inputs; ++k) sum += in[row * inputs + k] * w(row / rows, n, k);
        y.push_back(relu ? std::max(sum, 0.0) : sum);
      }
    return y;
  }
  // The gradient of the product: dy where ReLU and dropout let it through. y decides for ReLU.
  Doubles product_gradient(const Floats& y) const {
    Doubles d(dy.begin(), dy.end());
    for (size_t i = 0; i < d.size(); ++i)
      d[i] *= relu && y[i] <= 0 ? 0 : dropout_factor(i, drop, seed);
    return d;
  }
};

void test_linear(const Layer& layer) {
  const int64_t groups = layer.groups, rows = layer.rows, all_rows = groups * rows;
  const int64_t inputs = layer.inputs, outputs = layer.outputs;
  // LayerNorm's results may round to another bf16 here than in the kernels.
  const double tolerance =
      layer.rounds && layer.normed ? 0.05 : 1e-5 * std::max<int64_t>(inputs, 8);
  Floats first_y, first_statistics, first_affine;  // of one thread
  for (int threads : kThreads) {
    Output y(all_rows * outputs), statistics(2 * all_rows), affine(groups * 2 * inputs);
    Doubles expected = layer.layer_outputs();
    int64_t beyond;
    if (layer.normed) {
      beyond = harmodt_norm_linear(&layer.shape, &layer.norm, layer.x.data(), layer.gain.data(),
                                   layer.shift.data(), layer.weight.data(),
                                   layer.with_bias ? layer.bias.data() : nullptr, layer.relu,
                                   y.data(), statistics.data(), affine.data(), threads);
      Doubles of_rows(2 * all_rows), of_groups(groups * 2 * inputs);
      for (int64_t row = 0; row < all_rows; ++row)
        layer.statistics(row, of_rows[2 * row], of_rows[2 * row + 1]);
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t k = 0; k < inputs; ++k) {
          of_groups[2 * group * inputs + k] = layer.affine(layer.gain, layer.gain_bits, group, k);
          of_groups[(2 * group + 1) * inputs + k] =
              layer.affine(layer.shift, layer.shift_bits, group, k);
        }
      statistics.compare("statistics", of_rows, 1e-4);
      affine.compare("affine", of_groups, 0);
    } else {
      const float* residual = layer.drop > 0 ? layer.residual.data() : nullptr;
      beyond = harmodt_masked_linear(&layer.shape, layer.x.data(), layer.weight.data(),
                                     layer.with_bias ? layer.bias.data() : nullptr, layer.relu,
                                     residual, layer.drop, &layer.seed, y.data(), threads);
      for (size_t i = 0; i < expected.size(); ++i)
        expected[i] = expected[i] * dropout_factor(i, layer.drop, layer.seed) +
                      (residual ? residual[i] : 0);
    }
    require(beyond == -1, "valid task ids are refused");
    y.compare("y", expected, tolerance);
    if (first_y.empty()) {
      first_y = y.values, first_statistics = statistics.values, first_affine = affine.values;
    }
    require(!std::memcmp(first_y.data(), y.data(), 4 * y.size), "y depends on the threads");
  }

  // ReLU's gradient needs the output before dropout and residual.
  Doubles before = layer.layer_outputs();
  Floats y(before.begin(), before.end());
  const float* of_relu = layer.relu ? y.data() : nullptr;
  Doubles d = layer.product_gradient(y), in = layer.product_inputs();
  Doubles d_inputs(all_rows * inputs);
  for (int64_t row = 0; row < all_rows; ++row)
    for (int64_t n = 0; n < outputs; ++n)
      for (int64_t k = 0; k < inputs; ++k)
        d_inputs[row * inputs + k] +=
            layer.rounded(d[row * outputs + n]) * layer.w(row / rows, n, k);
  Output dx(all_rows * inputs);
  harmodt_masked_linear_input_gradient(&layer.shape, layer.dy.data(), of_relu, layer.drop,
                                       &layer.seed, layer.weight.data(), dx.data(), 3);
  dx.compare("dx", d_inputs, 1e-5 * std::max<int64_t>(outputs, 8));

  for (int per_group : {0, 1}) {
    int64_t copies = per_group ? groups : 1, size = outputs * inputs;
    Doubles d_weight(copies * size), d_bias(copies * outputs);
    for (int64_t row = 0; row < all_rows; ++row) {
      int64_t group = row / rows, copy = per_group ? group : 0;
      for (int64_t n = 0; n < outputs; ++n) {
        if (layer.bias_active(group, n)) d_bias[copy * outputs + n] += d[row * outputs + n];
        for (int64_t k = 0; k < inputs; ++k)
          if (layer.active(group, n, k))
            d_weight[copy * size + n * inputs + k] +=
                layer.rounded(d[row * outputs + n]) * in[row * inputs + k];
      }
    }
    Floats of_one_thread;
    for (int threads : kThreads) {
      Output weight(copies * size), bias(copies * outputs);
      harmodt_weight_gradient out{per_group, weight.data(), size, inputs,
                                  layer.with_bias ? bias.data() : nullptr, outputs};
      harmodt_masked_linear_weight_gradient(
          &layer.shape, layer.dy.data(), of_relu, layer.drop, &layer.seed, layer.x.data(),
          layer.normed ? first_statistics.data() : nullptr,
          layer.normed ? first_affine.data() : nullptr, &out, threads);
      weight.compare("d_weight", d_weight, layer.normed ? std::max(tolerance, 1e-3) : 1e-4);
      if (layer.with_bias) bias.compare("d_bias", d_bias, 1e-4);
      if (of_one_thread.empty()) of_one_thread = weight.values;
      require(!std::memcmp(of_one_thread.data(), weight.data(), 4 * weight.size),
              "d_weight depends on the threads");
    }
  }
}

void test_linears() {
  const int64_t sizes[][4] = {{2, 7, 37, 19}, {1, 1, 1, 1}, {3, 13, 16, 67}};
  for (auto [groups, rows, inputs, outputs] : sizes)
    for (int variant = 0; variant < 64; ++variant) {
      if (variant & 8 && variant & 32) continue;  // norm_linear has no dropout
      test_case = "linear " + std::to_string(rows) + "x" + std::to_string(inputs) + ", variant " +
                  std::to_string(variant);
      test_linear(Layer(groups, rows, inputs, outputs, variant));
    }
}

// (1 + 2^-12)^2 - 1 is 2^-11 + 2^-24. If the product is rounded before the sum, 2^-24 is lost.
void test_fused_multiply_add() {
  test_case = "fused multiply-add";
#if defined(__aarch64__)
  bool fuses = true;
#else
  bool fuses = isa != "portable";
#endif
  float a = 1 + std::ldexp(1.0f, -12), x[] = {1, a}, weight[] = {-1, a}, y;
  harmodt_linear_shape shape = {1, 1, 2, 1, 2, 0, nullptr, 0, 0, nullptr, 0, nullptr, 0};
  harmodt_masked_linear(&shape, x, weight, nullptr, 0, nullptr, 0, nullptr, &y, 1);
  float expected = std::ldexp(1.0f, -11) + (fuses ? std::ldexp(1.0f, -24) : 0);
  require(y == expected, fuses ? "the product is rounded before the sum" : "it is fused");
}

void test_wrong_ids() {
  test_case = "wrong ids";
  Layer layer(3, 2, 5, 4, 3);
  for (int64_t wrong : {int64_t(-1), kTasks}) {
    layer.ids[1] = wrong;
    Output y(24), statistics(12), affine(30);
    require(harmodt_masked_linear(&layer.shape, layer.x.data(), layer.weight.data(), nullptr, 0,
                                  nullptr, 0, nullptr, y.data(), 2) == 1,
            "masked_linear accepts a wrong id");
    require(harmodt_norm_linear(&layer.shape, &layer.norm, layer.x.data(), layer.gain.data(),
                                layer.shift.data(), layer.weight.data(), nullptr, 0, y.data(),
                                statistics.data(), affine.data(), 2) == 1,
            "norm_linear accepts a wrong id");
    require(y.untouched() && statistics.untouched() && affine.untouched(),
            "results are written although an id is wrong");
  }
}

void test_layer_norm(int64_t groups, int64_t rows, int64_t size, bool masks) {
  test_case = "layer norm of " + std::to_string(size);
  Layer layer(groups, rows, size, 1, masks);
  Floats dy = randoms(layer.x.size()), d_residual = randoms(layer.x.size());
  int64_t all_rows = groups * rows;
  Doubles y_expected(all_rows * size), statistics_expected(2 * all_rows);
  Doubles dx_expected(all_rows * size);
  Doubles d_gain(groups * size), d_shift(groups * size);
  for (int64_t row = 0; row < all_rows; ++row) {
    int64_t group = row / rows;
    double mean, scale, sum = 0, weighted = 0;
    layer.statistics(row, mean, scale);
    statistics_expected[2 * row] = mean;
    statistics_expected[2 * row + 1] = scale;
    for (int64_t k = 0; k < size; ++k) {
      double v = layer.normalised(row, k), d = dy[row * size + k];
      double gain = layer.affine(layer.gain, layer.gain_bits, group, k);
      y_expected[row * size + k] = v * gain + layer.affine(layer.shift, layer.shift_bits, group, k);
      sum += d * gain;
      weighted += d * gain * v;
      if (!masks || bit(layer.gain_bits.data() + layer.ids[group] * words_of(size), k))
        d_gain[group * size + k] += d * v;
      if (!masks || bit(layer.shift_bits.data() + layer.ids[group] * words_of(size), k))
        d_shift[group * size + k] += d;
    }
    for (int64_t k = 0; k < size; ++k)
      dx_expected[row * size + k] =
          (dy[row * size + k] * layer.affine(layer.gain, layer.gain_bits, group, k) - sum / size -
           layer.normalised(row, k) * weighted / size) * scale + d_residual[row * size + k];
  }
  Output y(all_rows * size), statistics(2 * all_rows);
  require(harmodt_masked_layer_norm(&layer.norm, layer.x.data(), layer.gain.data(),
                                    layer.shift.data(), y.data(), statistics.data(), 3) == -1,
          "valid task ids are refused");
  y.compare("y", y_expected, 1e-4);
  statistics.compare("statistics", statistics_expected, 1e-4);
  for (int per_group : {1, 0}) {
    if (!per_group)
      for (int64_t k = 0; k < size; ++k)
        for (int64_t group = 1; group < groups; ++group) {
          d_gain[k] += d_gain[group * size + k];
          d_shift[k] += d_shift[group * size + k];
        }
    int64_t copies = per_group ? groups : 1;
    Output dx(all_rows * size), gain(copies * size), shift(copies * size);
    harmodt_weight_gradient out{per_group, gain.data(), size, size, shift.data(), size};
    harmodt_masked_layer_norm_gradient(&layer.norm, dy.data(), d_residual.data(), layer.x.data(),
                                       statistics.data(), layer.gain.data(), dx.data(), &out, 3);
    // With one element the deviation is 0, and the scale is the square root of 1e5.
    dx.compare("dx", dx_expected, size == 1 ? 1e-2 : 2e-4);
    gain.compare("d_gain", d_gain, 1e-3);
    shift.compare("d_shift", d_shift, 1e-4);
  }
}

void test_attention(harmodt_attention_shape s) {
  test_case = "attention of " + std::to_string(s.tokens) + " tokens, head size " +
              std::to_string(s.head_size) + (s.dropout > 0 ? ", dropout" : "");
  const int64_t size = s.head_size, part = s.heads * size, keys = s.past + s.tokens;
  const int64_t seed = 987654321;
  s.seed = &seed;
  Floats qkv = randoms(s.sequences * s.tokens * 3 * part);
  Floats d_out = randoms(s.sequences * s.queries * part);
  Floats past_keys = randoms(s.sequences * s.heads * s.past * size);
  Floats past_values = randoms(past_keys.size());
  s.past_keys = past_keys.data(), s.past_values = past_values.data();
  Doubles out_expected(d_out.size()), log_sums_expected(s.sequences * s.queries * s.heads);
  Doubles d_expected(qkv.size());
  const double scale = 1 / std::sqrt(static_cast<double>(size));
  for (int64_t b = 0; b < s.sequences; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.queries; ++i) {
        int64_t token = s.first_query + i * s.query_step, seen = s.past + token + 1;
        // The offset of a present token's query (0), key (1) or value (2).
        auto at = [&](int64_t t, int which) {
          return ((b * s.tokens + t) * 3 + which) * part + h * size;
        };
        auto key_or_value = [&](int64_t j, int which) {
          const Floats& past = which == 1 ? past_keys : past_values;
          return j < s.past ? &past[((b * s.heads + h) * s.past + j) * size]
                            : &qkv[at(j - s.past, which)];
        };
        int64_t row = (b * s.queries + i) * s.heads + h;
        Doubles p(seen), factor(seen), dp(seen);
        double total = 0, mean = 0;
        for (int64_t j = 0; j < seen; ++j) {
          for (int64_t e = 0; e < size; ++e) p[j] += qkv[at(token, 0) + e] * key_or_value(j, 1)[e];
          total += p[j] = std::exp(p[j] * scale);
          factor[j] = dropout_factor(row * keys + j, s.dropout, seed);
        }
        log_sums_expected[row] = std::log(total);
        for (int64_t j = 0; j < seen; ++j) {
          p[j] /= total;
          for (int64_t e = 0; e < size; ++e) {
            out_expected[row * size + e] += p[j] * factor[j] * key_or_value(j, 2)[e];
            dp[j] += factor[j] * d_out[row * size + e] * key_or_value(j, 2)[e];
          }
          mean += p[j] * dp[j];
        }
        for (int64_t j = 0; j < seen; ++j)
          for (int64_t e = 0; e < size; ++e) {
            double ds = p[j] * (dp[j] - mean) * scale;
            d_expected[at(token, 0) + e] += ds * key_or_value(j, 1)[e];
            if (j < s.past) continue;
            d_expected[at(j - s.past, 1) + e] += ds * qkv[at(token, 0) + e];
            d_expected[at(j - s.past, 2) + e] += p[j] * factor[j] * d_out[row * size + e];
          }
      }
  for (int threads : kThreads) {
    Output out(d_out.size()), log_sums(log_sums_expected.size()), d_qkv(qkv.size());
    harmodt_attention(&s, qkv.data(), out.data(), log_sums.data(), threads);
    out.compare("out", out_expected, 1e-5);
    log_sums.compare("log_sums", log_sums_expected, 1e-5);
    if (s.past) continue;  // there is no gradient then
    harmodt_attention_gradient(&s, d_out.data(), qkv.data(), out.data(), log_sums.data(),
                               d_qkv.data(), threads);
    d_qkv.compare("d_qkv", d_expected, 1e-5);
  }
}

void test_dropout_add(int64_t size, bool with_x) {
  test_case = "dropout_add of " + std::to_string(size);
  const int64_t seed = 77;
  const float drop = 0.25f;
  Floats x = randoms(size), branch = randoms(size);
  Doubles expected(size);
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i) {
    double factor = dropout_factor(i, drop, seed);
    expected[i] = (with_x ? x[i] : 0) + factor * branch[i];
    kept += factor > 0;
  }
  if (size > 2000) require(std::fabs(kept / double(size) - 0.75) < 0.03, "a fourth is dropped");
  Output out(size);
  harmodt_dropout_add(size, with_x ? x.data() : nullptr, branch.data(), out.data(), drop, &seed, 3);
  out.compare("out", expected, 1e-6);
}

void test_token_embedding(int64_t steps, int64_t size, int64_t rows) {
  test_case = "token embedding of " + std::to_string(size);
  const int64_t inputs[] = {1, 7, 4};
  harmodt_embedding_shape s{steps, size, rows, nullptr, {}, {1, 7, 4}};
  Ids timesteps(steps);
  for (int64_t& timestep : timesteps) timestep = draw() % rows;
  s.timesteps = timesteps.data();
  std::vector<Floats> x, parameters;
  for (int64_t width : inputs) {
    x.push_back(randoms(steps * width));
    parameters.push_back(randoms(size * width));
    parameters.push_back(randoms(size));
  }
  parameters.push_back(randoms(rows * size));
  Floats d_tokens = randoms(steps * 3 * size);
  Doubles expected(steps * 3 * size);
  std::vector<Doubles> d_expected;
  std::vector<Output> d_parameters;
  for (const Floats& values : parameters) {
    d_expected.emplace_back(values.size());
    d_parameters.emplace_back(values.size());
  }
  for (int kind = 0; kind < 3; ++kind) {
    s.x[kind] = x[kind].data();
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t j = 0; j < size; ++j) {
        int64_t token = (step * 3 + kind) * size + j, row = timesteps[step] * size + j;
        double d = d_tokens[token];
        expected[token] = parameters[2 * kind + 1][j] + parameters[6][row];
        d_expected[2 * kind + 1][j] += d;
        d_expected[6][row] += d;
        for (int64_t k = 0; k < inputs[kind]; ++k) {
          double input = x[kind][step * inputs[kind] + k];
          expected[token] += parameters[2 * kind][j * inputs[kind] + k] * input;
          d_expected[2 * kind][j * inputs[kind] + k] += d * input;
        }
      }
  }
  std::vector<const float*> from;
  std::vector<float*> to;
  for (int i = 0; i < 7; ++i) {
    from.push_back(parameters[i].data());
    to.push_back(d_parameters[i].data());
  }
  Output tokens(steps * 3 * size);
  require(harmodt_token_embedding(&s, from.data(), tokens.data(), 3) == -1,
          "timesteps are refused");
  require(harmodt_token_embedding_gradient(&s, d_tokens.data(), to.data(), 3) == -1,
          "timesteps are refused");
  tokens.compare("tokens", expected, 1e-5);
  for (int i = 0; i < 7; ++i) d_parameters[i].compare("gradient", d_expected[i], 1e-4);
  timesteps[steps - 1] = rows;
  Output unwritten(steps * 3 * size);
  require(harmodt_token_embedding(&s, from.data(), unwritten.data(), 3) == steps - 1 &&
              unwritten.untouched(),
          "a wrong timestep is accepted");
}

// All values are multiples of 1/4, so scores are exact and many are equal.
void test_selection(int64_t words, int64_t count, bool fisher, bool paper) {
  test_case = "selection of " + std::to_string(count);
  const int64_t size = words * 32;
  const float balance = 2;
  auto quarters = [](int64_t n) {
    Floats values(n);
    for (float& value : values) value = (static_cast<int>(draw() % 9) - 4) / 4.0f;
    return values;
  };
  Words bits = random_bits(kTasks * words), maskable = random_bits(words);
  for (int64_t i = 0; i < kTasks * words; ++i) bits[i] &= maskable[i % words];
  Floats weights = quarters(size), mean = quarters(size), losses = {0.5f, 1, 2};
  Floats masked = quarters(kTasks * size), dense = quarters(kTasks * size);
  for (int64_t i = 0; i < kTasks * size; ++i)
    if (!bit(&bits[i / size * words], i % size)) masked[i] = 0;
  harmodt_selection_operands s{kTasks, words, bits.data(), words, maskable.data(), weights.data(),
                               masked.data(), size, dense.data(), size, mean.data(), losses.data(),
                               count, balance, fisher, paper};
  Ids leaving(kTasks * count), entering(kTasks * count), counts(kTasks * 3);
  std::vector<uint8_t> refused(kTasks, 9);
  require(harmodt_select_harmony(&s, leaving.data(), entering.data(), counts.data(),
                                 refused.data(), 3),
          "there is not enough memory");
  Words moved = bits;
  for (int64_t task = 0; task < kTasks; ++task) {
    std::vector<std::pair<double, int64_t>> leave, enter;
    int64_t agreeing = 0, differing = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (!bit(maskable.data(), i)) continue;
      double m = masked[task * size + i], agreement = m * mean[i];
      double importance =
          !fisher ? std::fabs(weights[i]) : std::pow(paper ? m / losses[task] : m, 2);
      double score = paper ? agreement + balance * importance : balance * agreement + importance;
      if (bit(&bits[task * words], i))
        leave.push_back({score, i});
      else
        enter.push_back({-double(dense[task * size + i]) * mean[i], i});
      agreeing += agreement > 0;
      differing += agreement < 0;
    }
    std::sort(leave.begin(), leave.end());
    std::sort(enter.begin(), enter.end());
    int64_t number = std::min<int64_t>({count, int64_t(leave.size()), int64_t(enter.size())});
    require(refused[task] == 0, "a task is refused");
    require(counts[3 * task] == number && counts[3 * task + 1] == agreeing &&
                counts[3 * task + 2] == differing,
            "counts differ");
    for (int64_t i = 0; i < count; ++i) {
      require(leaving[task * count + i] == (i < number ? leave[i].second : -1), "leaving differs");
      require(entering[task * count + i] == (i < number ? enter[i].second : -1),
              "entering differs");
      if (i >= number) continue;
      for (int64_t index : {leave[i].second, enter[i].second})
        moved[task * words + index / 32] ^= static_cast<int32_t>(1u << index % 32);
    }
  }
  harmodt_move_weights(bits.data(), words, leaving.data(), kTasks, count);
  harmodt_move_weights(bits.data(), words, entering.data(), kTasks, count);
  require(bits == moved, "move_weights flips other bits");
  masked[size + 5] = std::nanf("");
  harmodt_select_harmony(&s, leaving.data(), entering.data(), counts.data(), refused.data(), 3);
  require(refused == std::vector<uint8_t>({0, 1, 0}), "NaN is not refused");
}

void test_adamw(int64_t size, int64_t mask_words) {
  test_case = "AdamW of " + std::to_string(size);
  Words bits = random_bits(kTasks * (mask_words + 1));  // a row is one word longer than the mask
  const Ids tasks = {2, 0};
  Floats weights = randoms(size), gradient = randoms(size), m = randoms(size), v = randoms(size);
  for (float& value : v) value = std::fabs(value) + 0.01f;
  const float norm = 3, rates[] = {0.01f, 1.7f, 2.3f};
  harmodt_adamw_operands s{size, nullptr, gradient.data(), nullptr, nullptr, mask_words,
                           bits.data(), mask_words + 1, kTasks, 2, tasks.data(), &norm, 1, 0.1f,
                           0.001f, 1e-8f, 0.1f, rates};
  Output new_weights(size), new_m(size), new_v(size);
  std::copy(weights.begin(), weights.end(), new_weights.data());
  std::copy(m.begin(), m.end(), new_m.data());
  std::copy(v.begin(), v.end(), new_v.data());
  s.weights = new_weights.data(), s.first_moment = new_m.data(), s.second_moment = new_v.data();
  require(harmodt_masked_adamw(&s, 3) == -1, "valid task ids are refused");
  Doubles w_expected(weights.begin(), weights.end()), m_expected(m.begin(), m.end());
  Doubles v_expected(v.begin(), v.end());
  for (int64_t i = 0; i < size; ++i) {
    const int32_t* rows[] = {&bits[2 * (mask_words + 1)], &bits[0]};
    if (i < mask_words * 32 && !bit(rows[0], i) && !bit(rows[1], i)) {
      require(new_weights.values[i] == weights[i] && new_m.values[i] == m[i] &&
                  new_v.values[i] == v[i],
              "an inactive weight changes");
      continue;
    }
    double g = gradient[i] / (3 + 1e-6);
    m_expected[i] += 0.1 * (g - m_expected[i]);
    v_expected[i] += 0.001 * (g * g - v_expected[i]);
    double update = m_expected[i] / (std::sqrt(v_expected[i]) * 2.3 + 1e-8) * 1.7;
    w_expected[i] -= 0.01 * (update + 0.1 * w_expected[i]);
  }
  new_weights.compare("weights", w_expected, 1e-6);
  new_m.compare("first moment", m_expected, 1e-6);
  new_v.compare("second moment", v_expected, 1e-6);
}

void test_multiply_adds() {
  test_case = "multiply_adds";
  for (int rounds : {0, 1}) {
    int64_t one = harmodt_multiply_adds(1, rounds, 1);
    require(one > 0 && harmodt_multiply_adds(5, rounds, 3) == 15 * one, "the count is wrong");
  }
}

void test_sizes() {
  test_case = "sizes of structures";
#define SIZE_IS(name) \
  require(harmodt_size_of(#name) == sizeof(name), "the size of " #name " differs")
  SIZE_IS(harmodt_linear_shape);
  SIZE_IS(harmodt_weight_gradient);
  SIZE_IS(harmodt_selection_operands);
  SIZE_IS(harmodt_adamw_operands);
  SIZE_IS(harmodt_attention_shape);
  SIZE_IS(harmodt_layer_norm_shape);
  SIZE_IS(harmodt_embedding_shape);
#undef SIZE_IS
  require(harmodt_size_of("harmodt_shape") == 0, "an unknown structure has a size");
}

void test_all() {
  state = 20231;
  test_sizes();
  test_linears();
  test_fused_multiply_add();
  test_wrong_ids();
  for (bool masks : {false, true}) {
    test_layer_norm(2, 5, 37, masks);
    test_layer_norm(1, 67, 64, masks);
    test_layer_norm(3, 1, 1, masks);
  }
  for (float drop : {0.0f, 0.4f}) {
    // sequences, tokens, heads, head size; queries, first query, step; past
    test_attention({2, 21, 3, 5, 7, 2, 3, 0, nullptr, nullptr, drop, nullptr});
    test_attention({1, 1, 1, 1, 1, 0, 1, 0, nullptr, nullptr, drop, nullptr});
    test_attention({3, 9, 2, 17, 9, 0, 1, 4, nullptr, nullptr, drop, nullptr});
  }
  for (int64_t size : {1, 33, 2501}) {
    test_dropout_add(size, false);
    test_dropout_add(size, true);
  }
  test_token_embedding(5, 67, 3);
  test_token_embedding(300, 9, 11);
  for (int rule = 0; rule < 4; ++rule)
    for (int64_t count : {0, 5, 37, 200}) test_selection(7, count, rule & 1, rule & 2);
  test_selection(2200, 900, true, true);
  test_adamw(37, 1);
  test_adamw(1, 0);
  test_adamw(165, 4);
  test_multiply_adds();
}

}  // namespace

int main() {
  for (const char* name : {"amx", "avx512bf16", "avx512", "avx2", "portable"}) {
    if (!harmodt_use_isa(name)) continue;
    isa = harmodt_isa();
    require(isa == name, "harmodt_use_isa(\"" + std::string(name) + "\") selects another set");
    test_all();
    std::printf("%s: tested\n", name);
  }
  isa = harmodt_isa(), test_case = "instruction sets";
  require(isa == "portable", "the portable kernels are missing");
  require(!harmodt_use_isa("sse5"), "an unknown instruction set is accepted");
  std::printf("%d differences\n", failures);
  return failures ? 1 : 0;
}
