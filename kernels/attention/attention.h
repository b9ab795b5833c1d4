// Causal self-attention over short sequences, one (sequence, head) at a time in a thread's cache.
//
// A block is kWidth queries, one in each lane. Matrices of a block are "transposed": [..][kWidth], a
// register for each key or element. So sums over keys and maxima need no shuffles.
#pragma once

#include "dropout_add/dropout_add.h"
#include "native/kernels.h"
#include "native/simd.h"

namespace {

constexpr int kKeys = 8;  // keys at a time in a product
// While a thread works on a head, it fetches this one after it: of the next one memory would still
// be awaited.
constexpr int64_t kHeadsAhead = 2;

inline Vec exponential(Vec x) {
  // exp(x) = 2^n exp(r), |r| <= ln 2 / 2; below the normal numbers it is 0, and NaN stays.
  IntVec vanishes = x < -87.0f;
  x = vanishes ? splat(-87.0f) : x;
  Vec n = fused_multiply_add(x, splat(1.44269504f), splat(12582912.0f));  // integer in the low bits
  Vec power = (Vec)(((IntVec)n << 23) + 0x3f800000);
  n -= 12582912.0f;
  Vec r = fused_multiply_add(n, splat(-0.693359375f), x);
  r = fused_multiply_add(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  const float more[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                        1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
  for (float c : more) p = fused_multiply_add(p, r, splat(c));
  return vanishes ? Vec{} : p * power;
}

// log(x) of x >= 1: the exponent and a line for the rest, which is 0.03 off at most, then Newton's
// steps, each of which leaves half of the error's square.
inline Vec logarithm(Vec x) {
  IntVec exponent = ((IntVec)x >> 23) - 127;
  Vec rest = (Vec)((IntVec)x - (exponent << 23));  // in [1, 2)
  Vec y = (__builtin_convertvector(exponent, Vec) + rest - 0.957f) * 0.69314718f;
  for (int i = 0; i < 2; ++i) y += fused_multiply_add(x, exponential(-y), splat(-1.0f));
  return y;
}

// Sums are set to 0 one by one, because = {} would do so in memory.

// scores[j] = sum over d of queries[d] * keys[j][d], for whole tiles of keys
void dots(const float* queries, const float* keys, int64_t count, int64_t size, float* scores) {
  for (int64_t j = 0; j < count; j += kKeys) {
    Vec total[kKeys];
    for (int i = 0; i < kKeys; ++i) total[i] = Vec{};
    for (int64_t d = 0; d < size; ++d) {
      Vec query = load(queries + d * kWidth);
      for (int i = 0; i < kKeys; ++i)
        total[i] = fused_multiply_add(splat(keys[(j + i) * size + d]), query, total[i]);
    }
    for (int i = 0; i < kKeys; ++i) store(scores + (j + i) * kWidth, total[i]);
  }
}

// out[d] = sum over j of weights[j] * rows[j][d]
void weighted_sums(const float* weights, const float* rows, int64_t count, int64_t size, float* out) {
  for (int64_t d = 0; d < size; d += kWidth) {
    Vec total[kWidth];
    for (int i = 0; i < kWidth; ++i) total[i] = Vec{};
    for (int64_t j = 0; j < count; ++j) {
      Vec weight = load(weights + j * kWidth);
      for (int i = 0; i < kWidth; ++i)
        total[i] = fused_multiply_add(splat(rows[j * size + d + i]), weight, total[i]);
    }
    for (int i = 0; i < kWidth; ++i) store(out + (d + i) * kWidth, total[i]);
  }
}

// out[j][d] += sum over i of weights[j][i] * rows[i][d]
void add_outer(const float* weights, const float* rows, int64_t count, int64_t size, float* out) {
  for (int64_t d = 0; d < size; d += kWidth) {
    Vec row[kWidth];
    for (int i = 0; i < kWidth; ++i) row[i] = load(rows + i * size + d);
    for (int64_t j = 0; j < count; ++j) {
      Vec total = load(out + j * size + d);
      for (int i = 0; i < kWidth; ++i)
        total = fused_multiply_add(splat(weights[j * kWidth + i]), row[i], total);
      store(out + j * size + d, total);
    }
  }
}

// A block's rows [kWidth][size] into [size][kWidth], and back.
void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  IntVec tile[kWidth];
  for (int i = 0; i < kWidth; ++i) tile[i] = (IntVec)load(from + i * from_stride);
  transpose(tile);
  for (int i = 0; i < kWidth; ++i) store(to + i * to_stride, (Vec)tile[i]);
}
void transpose_rows(const float* rows, int64_t size, float* transposed) {
  for (int64_t d = 0; d < size; d += kWidth)
    transpose_tile(rows + d, size, transposed + d * kWidth, kWidth);
}
void transpose_back(const float* transposed, int64_t size, float* rows) {
  for (int64_t d = 0; d < size; d += kWidth)
    transpose_tile(transposed + d * kWidth, kWidth, rows + d, size);
}

// One sequence and head. What is read many times is copied to `memory`, padded with zeros to whole
// registers and tiles of keys.
struct Head {
  harmodt_attention_shape s;
  int64_t sequence, head;
  int64_t total;   // keys: past and present tokens
  int64_t padded_keys;  // in whole tiles
  int64_t size;    // of a padded row
  int64_t stride;  // from token to token of qkv
  int64_t offset;  // of the first token's query; key and value lie `part` and 2 `part` further
  int64_t part;
  float scale;
  uint32_t seed;
  float *keys, *values, *d_keys, *d_values;    // [padded_keys][size]
  float *queries, *d_out, *rows;               // of a block, [kWidth][size]
  float *queries_t, *d_out_t, *transposed;     // of a block, [size][kWidth]
  float *scores, *gradients;                   // of a block, [padded_keys][kWidth]

  static int64_t padded(const harmodt_attention_shape& s) {
    return (s.head_size + kWidth - 1) / kWidth * kWidth;
  }
  static int64_t tiles(int64_t keys) { return (keys + kKeys - 1) / kKeys * kKeys; }
  static uint64_t memory(const harmodt_attention_shape& s) {
    int64_t keys = tiles(s.past + s.tokens);
    return sizeof(float) * (keys * (4 * padded(s) + 2 * kWidth) + 6 * kWidth * padded(s));
  }

  Head(const harmodt_attention_shape& shape, int64_t item, float* memory)
      : s(shape), sequence(item / shape.heads), head(item % shape.heads), size(padded(shape)) {
    total = s.past + s.tokens;
    padded_keys = tiles(total);
    part = s.heads * s.head_size;
    stride = 3 * part;
    offset = sequence * s.tokens * stride + head * s.head_size;
    scale = 1 / __builtin_sqrtf(static_cast<float>(s.head_size));
    seed = seed_at(s.seed);
    float** of_tokens[] = {&keys, &values, &d_keys, &d_values};
    for (float** matrix : of_tokens) {
      *matrix = memory;
      memory += padded_keys * size;
    }
    float** of_block[] = {&queries, &d_out, &rows, &queries_t, &d_out_t, &transposed};
    for (float** matrix : of_block) {
      *matrix = memory;
      memory += kWidth * size;
    }
    scores = memory;
    gradients = scores + padded_keys * kWidth;
  }

  // A row of the head between tensors, where it has head_size elements, and here.
  void get(const float* from, float* to) const {
    for (int64_t d = 0; d < size; d += kWidth)
      store(to + d, load(from + d, lanes_left(s.head_size - d)));
  }
  void put(const float* from, float* to) const {
    for (int64_t d = 0; d < s.head_size; d += kWidth)
      store(to + d, load(from + d), lanes_left(s.head_size - d));
  }
  void get_keys_and_values(const float* qkv) {
    for (int64_t j = 0; j < s.past; ++j) {
      int64_t at = ((sequence * s.heads + head) * s.past + j) * s.head_size;
      get(s.past_keys + at, keys + j * size);
      get(s.past_values + at, values + j * size);
    }
    for (int64_t j = 0; j < s.tokens; ++j) {
      get(qkv + offset + j * stride + part, keys + (s.past + j) * size);
      get(qkv + offset + j * stride + 2 * part, values + (s.past + j) * size);
    }
    for (int64_t i = total * size; i < padded_keys * size; i += kWidth) {
      store(keys + i, Vec{});
      store(values + i, Vec{});
    }
  }

  // Begin to read rows [from, to) of this head in a matrix. Into the second-level cache: the rows are
  // so far apart that they share few sets of the first. Inlined, because GCC drops calls of what only
  // prefetches, for lack of an effect.
  __attribute__((always_inline)) inline void fetch(const float* matrix, int64_t row_stride,
                                                   int64_t from, int64_t to) const {
    for (int64_t i = from; i < to; ++i)
      for (int64_t d = 0; d < s.head_size; d += 16)
        __builtin_prefetch(matrix + i * row_stride + d, 0, 2);
  }

  int64_t token(int64_t query) const { return s.first_query + query * s.query_step; }
  int64_t row(int64_t query) const { return (sequence * s.queries + query) * s.heads + head; }
};

// The queries `first` and later, kWidth of them; after the last one, it is repeated. In the course
// of its work it fetches its share of a later head, some rows at a time: more at once would queue.
struct Block {
  Head h, later;
  int64_t first, queries;
  int64_t keys;  // that some query may see
  IntVec positions, places;  // among the keys; for dropout

  Block(const Head& head, const Head& later_head, int64_t first_query)
      : h(head), later(later_head), first(first_query) {
    queries = smaller(kWidth, h.s.queries - first);
    for (int i = 0; i < kWidth; ++i) {
      positions[i] = static_cast<int32_t>(h.s.past + h.token(query(i)));
      places[i] = static_cast<int32_t>(h.row(query(i)) * h.total);
    }
    keys = h.s.past + h.token(query(kWidth - 1)) + 1;
  }
  int64_t query(int64_t lane) const { return first + smaller(lane, queries - 1); }

  void get_queries(const float* qkv) const {
    for (int i = 0; i < kWidth; ++i)
      h.get(qkv + h.offset + h.token(query(i)) * h.stride, h.queries + i * h.size);
    transpose_rows(h.queries, h.size, h.queries_t);
  }
  // Of queries (0), keys (1) or values (2); and of the output.
  __attribute__((always_inline)) inline void fetch(const float* qkv, int part) const {
    later.fetch(qkv + later.offset + part * later.part, later.stride,
                h.s.tokens * first / h.s.queries, h.s.tokens * (first + queries) / h.s.queries);
  }
  __attribute__((always_inline)) inline void fetch_outputs(const float* out) const {
    later.fetch(out + later.row(0) * h.s.head_size, later.part, first, first + queries);
  }

  // All ones where a query may see key j.
  IntVec allowed(int64_t j) const { return splat(static_cast<int32_t>(j)) <= positions; }
  // The factor of key j's weight.
  Vec dropout(int64_t j) const {
    return kept(places + static_cast<int32_t>(j), h.s.dropout, h.seed);
  }
};

template <bool Dropout>
void attention_of(Block block, const float* qkv, float* out, float* log_sums) {
  Head h = block.h;
  block.fetch(qkv, 0);
  dots(h.queries_t, h.keys, block.keys, h.size, h.scores);
  block.fetch(qkv, 1);
  Vec most = splat(-__builtin_inff()), total{};
  for (int64_t j = 0; j < block.keys; ++j) {
    Vec x = load(h.scores + j * kWidth) * h.scale;
    x = block.allowed(j) ? x : splat(-__builtin_inff());
    store(h.scores + j * kWidth, x);
    most = x > most ? x : most;
  }
  for (int64_t j = 0; j < block.keys; ++j) {
    Vec e = exponential(load(h.scores + j * kWidth) - most);
    total += e;
    store(h.scores + j * kWidth, Dropout ? e * block.dropout(j) : e);
  }
  block.fetch(qkv, 2);
  weighted_sums(h.scores, h.values, block.keys, h.size, h.transposed);
  block.fetch_outputs(out);
  Vec share = 1 / total, log_sum = most + logarithm(total);
  for (int64_t d = 0; d < h.size; ++d)
    store(h.transposed + d * kWidth, load(h.transposed + d * kWidth) * share);
  transpose_back(h.transposed, h.size, h.rows);
  for (int64_t i = 0; i < block.queries; ++i) {
    int64_t row = h.row(block.query(i));
    h.put(h.rows + i * h.size, out + row * h.s.head_size);
    log_sums[row] = log_sum[i];
  }
}

void attention(const harmodt_attention_shape& s, const float* qkv, float* out, float* log_sums,
               int threads) {
  int64_t items = s.sequences * s.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    auto* memory = static_cast<float*>(scratch(Head::memory(s)));
    Head h(s, item, memory), later(s, smaller(item + kHeadsAhead, items - 1), memory);
    h.get_keys_and_values(qkv);
    for (int64_t first = 0; first < s.queries; first += kWidth) {
      Block block(h, later, first);
      block.get_queries(qkv);
      (s.dropout > 0 ? attention_of<true> : attention_of<false>)(block, qkv, out, log_sums);
    }
  }
}

// Adds to d_keys and d_values, and puts the queries' gradients into d_qkv.
template <bool Dropout>
void attention_gradient_of(Block block, const float* d_out, const float* qkv, const float* out,
                           const float* log_sums, float* d_qkv) {
  Head h = block.h;
  block.fetch(qkv, 0);
  Vec log_sum{}, dot{};
  for (int64_t i = 0; i < kWidth; ++i) {
    int64_t row = h.row(block.query(i));
    log_sum[i] = log_sums[row];
    if (i < block.queries) {
      h.get(d_out + row * h.s.head_size, h.d_out + i * h.size);
    } else {  // a repeated query counts once
      for (int64_t d = 0; d < h.size; d += kWidth) store(h.d_out + i * h.size + d, Vec{});
    }
    h.get(out + row * h.s.head_size, h.rows + i * h.size);
  }
  transpose_rows(h.d_out, h.size, h.d_out_t);
  transpose_rows(h.rows, h.size, h.transposed);
  for (int64_t d = 0; d < h.size; ++d)
    dot += load(h.transposed + d * kWidth) * load(h.d_out_t + d * kWidth);
  block.fetch(qkv, 1);
  dots(h.queries_t, h.keys, block.keys, h.size, h.scores);
  block.fetch(qkv, 2);
  dots(h.d_out_t, h.values, block.keys, h.size, h.gradients);
  block.fetch_outputs(out);
  for (int64_t j = 0; j < block.keys; ++j) {
    float *score = h.scores + j * kWidth, *gradient = h.gradients + j * kWidth;
    Vec p = exponential(load(score) * h.scale - log_sum), dp = load(gradient);
    p = block.allowed(j) ? p : Vec{};
    Vec factor = Dropout ? block.dropout(j) : splat(1.0f);
    store(score, p * factor);
    store(gradient, p * (dp * factor - dot) * h.scale);
  }
  block.fetch_outputs(d_out);
  add_outer(h.scores, h.d_out, block.keys, h.size, h.d_values);
  block.fetch(d_qkv, 0);
  add_outer(h.gradients, h.queries, block.keys, h.size, h.d_keys);
  block.fetch(d_qkv, 1);
  weighted_sums(h.gradients, h.keys, block.keys, h.size, h.transposed);
  block.fetch(d_qkv, 2);
  transpose_back(h.transposed, h.size, h.rows);
  for (int64_t i = 0; i < block.queries; ++i)
    h.put(h.rows + i * h.size, d_qkv + h.offset + h.token(block.query(i)) * h.stride);
}

void attention_gradient(const harmodt_attention_shape& s, const float* d_out, const float* qkv,
                        const float* out, const float* log_sums, float* d_qkv, int threads) {
  int64_t items = s.sequences * s.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    auto* memory = static_cast<float*>(scratch(Head::memory(s)));
    Head h(s, item, memory), later(s, smaller(item + kHeadsAhead, items - 1), memory);
    h.get_keys_and_values(qkv);
    for (int64_t i = 0; i < s.tokens * h.size; i += kWidth) {
      store(h.d_keys + i, Vec{});
      store(h.d_values + i, Vec{});
    }
    float* d_query = d_qkv + h.offset;
    if (s.queries < s.tokens)
      for (int64_t j = 0; j < s.tokens; ++j)
        for (int64_t d = 0; d < s.head_size; ++d) d_query[j * h.stride + d] = 0;
    for (int64_t first = 0; first < s.queries; first += kWidth) {
      Block block(h, later, first);
      block.get_queries(qkv);
      auto gradient = s.dropout > 0 ? attention_gradient_of<true> : attention_gradient_of<false>;
      gradient(block, d_out, qkv, out, log_sums, d_qkv);
    }
    for (int64_t j = 0; j < s.tokens; ++j) {
      h.put(h.d_keys + j * h.size, d_query + j * h.stride + h.part);
      h.put(h.d_values + j * h.size, d_query + j * h.stride + 2 * h.part);
    }
  }
}

}  // namespace
