// Causal self-attention over short sequences, one (sequence, head) at a time in a thread's cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int kQueries = 6;  // queries at a time
constexpr int kKeyVecs = HARMODT_WIDTH == 4 ? 1 : HARMODT_WIDTH == 8 ? 2 : 4;

inline Vec exponential(Vec x) {
  // exp(x) = 2^n exp(r), |r| <= ln 2 / 2; below the range of floats it is 0.
  x = x < -87.0f ? splat(-87.0f) : x;
  Vec n = x * 1.44269504f + 12582912.0f;  // the sum rounds to an integer in its low bits
  IntVec power = (IntVec)n << 23;
  n -= 12582912.0f;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec)((IntVec)p + power);
}

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

inline float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kWidth; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// Integers that look random: of the place and the seed alone, so that backward draws them again.
inline IntVec hash(IntVec x) {
  typedef uint32_t UVec __attribute__((vector_size(HARMODT_WIDTH * 4)));
  UVec v = (UVec)x;
  v ^= v >> 16;
  v *= 0x7feb352du;
  v ^= v >> 15;
  v *= 0x846ca68bu;
  v ^= v >> 16;
  return (IntVec)v;
}

void transpose_tokens(const float* from, int64_t stride, int64_t tokens, int64_t size, int64_t keys,
                      float* to) {
  for (int64_t j = 0; j < keys; j += kWidth)
    for (int64_t d = 0; d < size; d += kWidth) {
      IntVec block[kWidth];
      for (int i = 0; i < kWidth; ++i)
        block[i] = j + i < tokens
                       ? (IntVec)load(from + (j + i) * stride + d, lanes_left(size - d))
                       : IntVec{};
      transpose(block);
      for (int64_t i = 0; i < smaller(kWidth, size - d); ++i)
        store(to + (d + i) * keys + j, (Vec)block[i]);
    }
}

// out[i][j] = rows[i] · columns[.][j], kQueries rows and Vecs registers of columns
template <int Vecs>
inline void products(const float* const* rows, int64_t size, const float* columns, int64_t keys,
                     float* out) {
  Vec total[kQueries][Vecs] = {};
  for (int64_t d = 0; d < size; ++d) {
    Vec right[Vecs];
    for (int j = 0; j < Vecs; ++j) right[j] = load(columns + d * keys + j * kWidth);
    for (int i = 0; i < kQueries; ++i) {
      Vec value = splat(rows[i][d]);
      for (int j = 0; j < Vecs; ++j) total[i][j] = fused_multiply_add(value, right[j], total[i][j]);
    }
  }
  for (int i = 0; i < kQueries; ++i)
    for (int j = 0; j < Vecs; ++j) store(out + i * keys + j * kWidth, total[i][j]);
}

inline void products(const float* const* rows, int64_t size, const float* columns, int64_t keys,
                     int64_t count, float* out) {
  int64_t j = 0;
  for (; j + kKeyVecs * kWidth <= count; j += kKeyVecs * kWidth)
    products<kKeyVecs>(rows, size, columns + j, keys, out + j);
  for (; j < count; j += kWidth) products<1>(rows, size, columns + j, keys, out + j);
}

// out[i] (+)= sum over j < count of weights[i][j] * rows[j]
inline void weighted_sums(const float* weights, int64_t keys, int64_t count, const float* rows,
                          int64_t stride, int64_t size, int64_t queries, float* const* out) {
  for (int64_t d = 0; d < size; d += kWidth) {
    uint32_t inside = lanes_left(size - d);
    Vec total[kQueries] = {};
    for (int64_t j = 0; j < count; ++j) {
      Vec row = load(rows + j * stride + d, inside);
      for (int i = 0; i < kQueries; ++i) total[i] = fused_multiply_add(splat(weights[i * keys + j]), row, total[i]);
    }
    for (int64_t i = 0; i < queries; ++i) store(out[i] + d, total[i], inside);
  }
}

// rows[j] += sum over i of weights[i][j] * from[i]
inline void add_outer(const float* weights, int64_t keys, int64_t count, const float* const* from,
                      int64_t size, float* rows, int64_t stride) {
  for (int64_t d = 0; d < size; d += kWidth) {
    uint32_t inside = lanes_left(size - d);
    Vec value[kQueries];
    for (int i = 0; i < kQueries; ++i) value[i] = load(from[i] + d, inside);
    for (int64_t j = 0; j < count; ++j) {
      Vec row = load(rows + j * stride + d, inside);
      for (int i = 0; i < kQueries; ++i) row = fused_multiply_add(splat(weights[i * keys + j]), value[i], row);
      store(rows + j * stride + d, row, inside);
    }
  }
}

// One sequence and head; the vectors of a token lie `stride` after those of the one before.
struct Head {
  const harmodt_attention& s;
  int64_t sequence, head;
  int64_t keys;    // tokens, rounded up to registers
  int64_t stride;  // of qkv
  int64_t offset;  // of the first token's query
  float scale;
  IntVec* valid;   // all ones for valid keys
  float *k_t, *v_t, *scores, *gradients;

  Head(const harmodt_attention& shape, int64_t item, float* memory)
      : s(shape), sequence(item / shape.heads), head(item % shape.heads) {
    keys = (s.tokens + kWidth - 1) / kWidth * kWidth;
    stride = 3 * s.heads * s.head_size;
    offset = sequence * s.tokens * stride + head * s.head_size;
    scale = 1 / __builtin_sqrtf(static_cast<float>(s.head_size));
    valid = reinterpret_cast<IntVec*>(memory);
    k_t = memory + keys;
    v_t = k_t + s.head_size * keys;
    scores = v_t + s.head_size * keys;
    gradients = scores + kQueries * keys;
    for (int64_t j = 0; j < keys; ++j)
      reinterpret_cast<int32_t*>(valid)[j] = j < s.tokens && s.valid[sequence * s.tokens + j] ? -1 : 0;
  }
  static uint64_t memory(const harmodt_attention& s) {
    int64_t keys = (s.tokens + kWidth - 1) / kWidth * kWidth;
    return sizeof(float) * keys * (1 + 2 * s.head_size + 2 * kQueries);
  }

  int64_t position(int64_t query) const { return s.first_query + query * s.query_step; }
  int64_t row(int64_t query) const { return (sequence * s.queries + query) * s.heads + head; }
  // Registers up to the last key that queries up to this one may see.
  int64_t seen(int64_t query) const {
    return (position(smaller(query, s.queries - 1)) + kWidth) / kWidth * kWidth;
  }
  IntVec allowed(int64_t query, int64_t j) const {
    IntVec key;
    for (int i = 0; i < kWidth; ++i) key[i] = i;
    key += static_cast<int32_t>(j);
    int32_t at = static_cast<int32_t>(position(query));
    return ((key < at) & valid[j / kWidth]) | (key == at);
  }
  // 1 / (1 - dropout) where the weight of a key is kept, else 0.
  Vec kept(int64_t query, int64_t j) const {
    IntVec place;
    for (int i = 0; i < kWidth; ++i) place[i] = i;
    place += static_cast<int32_t>((row(query) * keys + j) * 0x9E3779B1u + s.seed);
    IntVec draw = hash(place) & 0x7fffffff;
    return draw < static_cast<int32_t>(s.dropout * 2147483648.0) ? Vec{} : splat(1 / (1 - s.dropout));
  }
};

void attention(const harmodt_attention& s, const float* qkv, float* out, float* log_sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < s.sequences * s.heads; ++item) {
    Head h(s, item, static_cast<float*>(scratch(Head::memory(s))));
    const float* q = qkv + h.offset;
    const float* k = q + s.heads * s.head_size;
    const float* v = k + s.heads * s.head_size;
    transpose_tokens(k, h.stride, s.tokens, s.head_size, h.keys, h.k_t);
    for (int64_t first = 0; first < s.queries; first += kQueries) {
      int64_t count = smaller(kQueries, s.queries - first), seen = h.seen(first + count - 1);
      const float* rows[kQueries];
      float* outs[kQueries];
      for (int64_t i = 0; i < kQueries; ++i) {
        int64_t query = smaller(first + i, s.queries - 1);
        rows[i] = q + h.position(query) * h.stride;
        outs[i] = out + h.row(query) * s.head_size;
      }
      products(rows, s.head_size, h.k_t, h.keys, seen, h.scores);
      for (int64_t i = 0; i < count; ++i) {
        float* score = h.scores + i * h.keys;
        Vec most = splat(-__builtin_inff());
        for (int64_t j = 0; j < seen; j += kWidth) {
          Vec x = load(score + j) * h.scale;
          x = h.allowed(first + i, j) ? x : splat(-__builtin_inff());
          store(score + j, x);
          most = x > most ? x : most;
        }
        float top = largest(most);
        Vec total{};
        for (int64_t j = 0; j < seen; j += kWidth) {
          Vec e = exponential(load(score + j) - top);
          e = h.allowed(first + i, j) ? e : Vec{};
          store(score + j, e);
          total += e;
        }
        float all = sum(total);
        log_sums[h.row(first + i)] = top + __builtin_logf(all);
        for (int64_t j = 0; j < seen; j += kWidth) {
          Vec p = load(score + j) * (1 / all);
          if (s.dropout > 0) p *= h.kept(first + i, j);
          store(score + j, p);
        }
      }
      weighted_sums(h.scores, h.keys, smaller(seen, s.tokens), v, h.stride, s.head_size, count, outs);
    }
  }
}

void attention_gradient(const harmodt_attention& s, const float* d_out, const float* qkv, const float* out,
                        const float* log_sums, float* d_qkv, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < s.sequences * s.heads; ++item) {
    Head h(s, item, static_cast<float*>(scratch(Head::memory(s))));
    int64_t part = s.heads * s.head_size;
    const float* q = qkv + h.offset;
    const float *k = q + part, *v = k + part;
    float* dq = d_qkv + h.offset;
    float *dk = dq + part, *dv = dk + part;
    transpose_tokens(k, h.stride, s.tokens, s.head_size, h.keys, h.k_t);
    transpose_tokens(v, h.stride, s.tokens, s.head_size, h.keys, h.v_t);
    for (int64_t j = 0; j < s.tokens; ++j)
      for (int64_t d = 0; d < s.head_size; ++d)
        dq[j * h.stride + d] = dk[j * h.stride + d] = dv[j * h.stride + d] = 0;
    for (int64_t first = 0; first < s.queries; first += kQueries) {
      int64_t count = smaller(kQueries, s.queries - first), seen = h.seen(first + count - 1);
      const float *rows[kQueries], *d_rows[kQueries];
      float* outs[kQueries];
      for (int64_t i = 0; i < kQueries; ++i) {
        int64_t query = smaller(first + i, s.queries - 1);
        rows[i] = q + h.position(query) * h.stride;
        outs[i] = dq + h.position(query) * h.stride;
        d_rows[i] = d_out + h.row(query) * s.head_size;
      }
      products(rows, s.head_size, h.k_t, h.keys, seen, h.scores);
      products(d_rows, s.head_size, h.v_t, h.keys, seen, h.gradients);
      for (int64_t i = 0; i < kQueries; ++i) {
        float *score = h.scores + i * h.keys, *gradient = h.gradients + i * h.keys;
        if (i >= count) {  // repeats the last query, which counts once
          for (int64_t j = 0; j < seen; ++j) score[j] = gradient[j] = 0;
          continue;
        }
        const float* o = out + h.row(first + i) * s.head_size;
        float dot = 0;
        for (int64_t d = 0; d < s.head_size; ++d) dot += o[d] * d_rows[i][d];
        float log_sum = log_sums[h.row(first + i)];
        for (int64_t j = 0; j < seen; j += kWidth) {
          Vec p = exponential(load(score + j) * h.scale - log_sum);
          p = h.allowed(first + i, j) ? p : Vec{};
          Vec dp = load(gradient + j), dropped = p;
          if (s.dropout > 0) {
            Vec kept = h.kept(first + i, j);
            dp *= kept;
            dropped *= kept;
          }
          store(score + j, dropped);
          store(gradient + j, p * (dp - dot) * h.scale);
        }
      }
      int64_t tokens = smaller(seen, s.tokens);
      weighted_sums(h.gradients, h.keys, tokens, k, h.stride, s.head_size, count, outs);
      add_outer(h.gradients, h.keys, tokens, rows, s.head_size, dk, h.stride);
      add_outer(h.scores, h.keys, tokens, d_rows, s.head_size, dv, h.stride);
    }
  }
}

}  // namespace
