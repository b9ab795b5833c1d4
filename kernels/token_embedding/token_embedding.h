// The token embedding: three tokens for each step. A thread computes kTokenColumns columns of the
// tokens. It keeps the panel of the weight for these columns, [inputs][kTokenColumns], in its cache.
#pragma once

#include "native/kernels.h"
#include "native/simd.h"

namespace {

constexpr int kTokenVecs = 4, kKinds = 3;
constexpr int64_t kTokenColumns = kTokenVecs * kWidth;
// The steps that a thread embeds at a time. A gradient is summed over this many steps in registers and
// cache before the sum is added to memory.
constexpr int64_t kSteps = 256;

// kTokenColumns columns of a row; 0 beyond the row's end.
struct TokenColumns {
  Vec at[kTokenVecs];

  static TokenColumns load(const float* row, int64_t columns) {
    TokenColumns c;
    for (int j = 0; j < kTokenVecs; ++j) {
      uint32_t inside = lanes_left(columns - j * kWidth);
      c.at[j] = inside ? ::load(row + j * kWidth, inside) : Vec{};
    }
    return c;
  }
  void store(float* row, int64_t columns) const {
    for (int j = 0; j < kTokenVecs; ++j) {
      uint32_t inside = lanes_left(columns - j * kWidth);
      if (inside) ::store(row + j * kWidth, at[j], inside);
    }
  }
  void add(const TokenColumns& other) {
    for (int j = 0; j < kTokenVecs; ++j) at[j] += other.at[j];
  }
  void add(float factor, const TokenColumns& other) {
    for (int j = 0; j < kTokenVecs; ++j)
      at[j] = fused_multiply_add(splat(factor), other.at[j], at[j]);
  }
};

// Computes kTokenColumns columns, from `column` on, of the tokens of steps [from, to).
void embed_steps(const harmodt_embedding_shape& s, const float* const* parameters, int64_t column,
                 int64_t from, int64_t to, float* tokens) {
  int64_t columns = smaller(kTokenColumns, s.size - column);
  const float* table = parameters[2 * kKinds];
  for (int kind = 0; kind < kKinds; ++kind) {
    int64_t inputs = s.inputs[kind];
    const float* weight = parameters[2 * kind] + column * inputs;
    auto* panel = static_cast<TokenColumns*>(scratch(sizeof(TokenColumns) * (inputs + 1)));
    for (int64_t k = 0; k < inputs; ++k) {
      alignas(64) float row[kTokenColumns] = {};
      for (int64_t j = 0; j < columns; ++j) row[j] = weight[j * inputs + k];
      panel[k] = TokenColumns::load(row, kTokenColumns);
    }
    TokenColumns bias = TokenColumns::load(parameters[2 * kind + 1] + column, columns);
    for (int64_t step = from; step < to; ++step) {
      const float* x = s.x[kind] + step * inputs;
      TokenColumns token{};
      for (int64_t k = 0; k < inputs; ++k) token.add(x[k], panel[k]);
      token.add(bias);
      token.add(TokenColumns::load(table + s.timesteps[step] * s.size + column, columns));
      token.store(tokens + (step * kKinds + kind) * s.size + column, columns);
    }
  }
}

void token_embedding(const harmodt_embedding_shape& s, const float* const* parameters,
                     float* tokens, int threads) {
  int64_t blocks = (s.size + kTokenColumns - 1) / kTokenColumns;
  int64_t chunks = (s.steps + kSteps - 1) / kSteps;
  int64_t steps = chunks ? (s.steps + chunks - 1) / chunks : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < blocks * chunks; ++item) {
    int64_t from = item / blocks * steps;
    embed_steps(s, parameters, item % blocks * kTokenColumns, from, smaller(s.steps, from + steps),
                tokens);
  }
}

// Sums the gradients of one kind's weight (dy times x) and bias (dy) over steps [from, to), for the
// first `columns` columns at d_tokens. Adds the sums to d_weight, [size][inputs], and d_bias; if
// `first`, overwrites these instead.
void sum_of_kind(const harmodt_embedding_shape& s, const float* d_tokens, int kind, int64_t columns,
                 int64_t from, int64_t to, bool first, float* d_weight, float* d_bias) {
  int64_t inputs = s.inputs[kind];
  auto* sums = static_cast<TokenColumns*>(scratch(sizeof(TokenColumns) * (inputs + 1)));
  for (int64_t k = 0; k <= inputs; ++k) sums[k] = TokenColumns{};
  for (int64_t step = from; step < to; ++step) {
    const float* x = s.x[kind] + step * inputs;
    auto dy = TokenColumns::load(d_tokens + (step * kKinds + kind) * s.size, columns);
    for (int64_t k = 0; k < inputs; ++k) sums[k].add(x[k], dy);
    sums[inputs].add(dy);
  }
  for (int64_t k = 0; k <= inputs; ++k) {
    alignas(64) float row[kTokenColumns];
    sums[k].store(row, kTokenColumns);
    for (int64_t j = 0; j < columns; ++j) {
      float* to = k < inputs ? d_weight + j * inputs + k : d_bias + j;
      *to = (first ? 0 : *to) + row[j];
    }
  }
}

// Computes columns of the table's gradient: a row's gradient is the sum over the tokens of its steps.
void sum_of_table(const harmodt_embedding_shape& s, const float* d_tokens, int64_t columns,
                  float* d_table) {
  for (int64_t row = 0; row < s.rows; ++row) TokenColumns{}.store(d_table + row * s.size, columns);
  for (int64_t step = 0; step < s.steps; ++step) {
    float* row = d_table + s.timesteps[step] * s.size;
    auto total = TokenColumns::load(row, columns);
    for (int kind = 0; kind < kKinds; ++kind)
      total.add(TokenColumns::load(d_tokens + (step * kKinds + kind) * s.size, columns));
    total.store(row, columns);
  }
}

void token_embedding_gradient(const harmodt_embedding_shape& s, const float* d_tokens,
                              float* const* gradients, int threads) {
  int64_t blocks = (s.size + kTokenColumns - 1) / kTokenColumns;
  // An item is some columns of a kind or of the table. Some items take much longer, so each thread
  // takes the next item when it is free.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < blocks * (kKinds + 1); ++item) {
    int kind = static_cast<int>(item / blocks);
    int64_t column = item % blocks * kTokenColumns;
    int64_t columns = smaller(kTokenColumns, s.size - column);
    if (kind == kKinds) {
      sum_of_table(s, d_tokens + column, columns, gradients[2 * kKinds] + column);
      continue;
    }
    // Without steps, the loop still runs once and stores zeros.
    for (int64_t from = 0; from < s.steps || from == 0; from += kSteps)
      sum_of_kind(s, d_tokens + column, kind, columns, from, smaller(s.steps, from + kSteps),
                  from == 0, gradients[2 * kind] + column * s.inputs[kind],
                  gradients[2 * kind + 1] + column);
  }
}

}  // namespace
