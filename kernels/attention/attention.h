// Causal self-attention over short sequences. A thread works on one (sequence, head) at a time, which
// fits in its cache.
//
// A block is kWidth queries, one in each lane, so sums and maxima over keys need no shuffles. A head's
// elements are cut into chunks of kWidth, so a matrix of a head is [chunks][rows][kWidth]. A tile is
// kWidth rows or columns of a chunk, a constant distance apart. All products are products of tiles.
#pragma once

#include "dropout_add/dropout_add.h"
#include "native/kernels.h"
#include "native/simd.h"

namespace {

// While a thread works on a head, it prefetches the head that comes two later. The next head would
// arrive too late.
constexpr int64_t kHeadsAhead = 2;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// 2^x. Results below the normal numbers are 0. NaN stays NaN.
inline Vec power_of_two(Vec x) {
  // 1.5 * 2^23: a float of this size has no bits for a fraction. So the sum rounds x to an integer,
  // which is in the low bits of the sum.
  constexpr float round = 12582912.0f;
  Vec n = x + round;
  IntVec bits = (IntVec)n;
  n -= round;
  Vec r = x - n, p = splat(1.5353362e-4f);  // p is a polynomial fitted to 2^r for |r| <= 1/2
  const float coefficients[] = {1.3398875e-3f, 9.61843692e-3f, 5.55033237e-2f,
                                0.240226477f,  0.693147182f,   1.0f};
  for (float c : coefficients) p = fused_multiply_add(p, r, splat(c));
#if defined(__AVX512F__)
  (void)bits;
  auto normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  return x < -126.0f ? Vec{} : p * (Vec)(((UVec)bits << 23) + 0x3f800000);
#endif
}

// log2(x) for x >= 1. The first estimate is the exponent plus a linear function of the mantissa, with
// an error of at most 0.05. Then each Newton step leaves an error of a third of the error's square.
inline Vec binary_logarithm(Vec x) {
  IntVec exponent = ((IntVec)x >> 23) - 127;
  Vec rest = (Vec)((IntVec)x - (exponent << 23));  // in [1, 2)
  Vec y = __builtin_convertvector(exponent, Vec) + rest - 0.957f;
  for (int i = 0; i < 2; ++i)
    y += fused_multiply_add(x, power_of_two(-y), splat(-1.0f)) * kLog2E;
  return y;
}

// kWidth registers: one for each row of a tile.
using Tile = Vec[kWidth];

// The left operand of a product. Its row i is row i, or column i, of a chunk.
struct ChunkRows {
  const float* first;
  float at(int i, int64_t k) const { return first[i * kWidth + k]; }
};
struct ChunkColumns {
  const float* first;
  float at(int i, int64_t k) const { return first[k * kWidth + i]; }
};

inline void clear(Tile& total) {  // = {} would put the tile into memory
  unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { total[i] = Vec{}; });
}

// total[i] += sum over k < depth of left.at(i, k) * right[k]
template <class Left>
HARMODT_ALWAYS_INLINE inline void add_products(Left left, const float* right, int64_t depth,
                                               Tile& total) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec v = load(right + k * kWidth);
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE {
      total[i] = fused_multiply_add(splat(left.at(i, k)), v, total[i]);
    });
  }
}

// Stores a tile. The address is an argument, because the compiler would read a structure's member
// again after each store: the store could have changed it.
HARMODT_ALWAYS_INLINE inline void store(float* to, const Tile& tile) {
  unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { store(to + i * kWidth, tile[i]); });
}

inline void transpose(Tile& tile) {
  IntVec rows[kWidth];
  unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { rows[i] = (IntVec)tile[i]; });
  transpose(rows);
  unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { tile[i] = (Vec)rows[i]; });
}

// Offsets of a (sequence, head) in the tensors.
struct Offsets {
  int64_t inputs;   // the first token's query in qkv; its key is `part` later, its value 2 `part`
  int64_t outputs;  // the first query's output in out
};

// The state of a thread for one (sequence, head) at a time. The thread copies everything that it reads
// many times to its own memory. There, zeros pad the elements of a head to whole chunks. Keys are
// padded to whole tiles. The values of these extra keys do not matter, because no query sees them.
struct Head {
  const harmodt_attention_shape& s;
  int64_t total;                             // keys: past and present tokens
  int64_t padded_keys;                       // keys in whole tiles
  int64_t chunks, chunk_stride;              // chunks of a matrix of keys, and their distance
  int64_t part, stride;                      // distances in qkv: query to key, token to token
  float scale;
  uint32_t key;                              // of the dropout
  float *keys, *values, *d_keys, *d_values;  // [chunks][padded_keys][kWidth]
  float *queries, *d_out;                    // of a block, [chunks][kWidth][kWidth]
  float *queries_t, *d_out_t;                // the same, transposed: a query in each lane
  float *scores, *d_scores;                  // of a block, [padded_keys][kWidth]
  int64_t item;                              // sequence * heads + head
  Offsets current, ahead;                    // of this head, and of the head that is prefetched

  static int64_t chunks_of(const harmodt_attention_shape& s) {
    return (s.head_size + kWidth - 1) / kWidth;
  }
  static int64_t tiles(int64_t keys) { return (keys + kWidth - 1) / kWidth * kWidth; }
  static uint64_t memory(const harmodt_attention_shape& s) {
    int64_t keys = tiles(s.past + s.tokens), chunks = chunks_of(s);
    return sizeof(float) * kWidth * (keys * (4 * chunks + 2) + 4 * chunks * kWidth);
  }

  Head(const harmodt_attention_shape& shape, float* memory) : s(shape), chunks(chunks_of(shape)) {
    total = s.past + s.tokens;
    padded_keys = tiles(total);
    chunk_stride = padded_keys * kWidth;
    part = s.heads * s.head_size;
    stride = 3 * part;
    scale = 1 / __builtin_sqrtf(static_cast<float>(s.head_size));
    key = key_at(s.seed);
    for (float** matrix : {&keys, &values, &d_keys, &d_values}) {
      *matrix = memory;
      memory += chunks * chunk_stride;
    }
    for (float** matrix : {&queries, &d_out, &queries_t, &d_out_t}) {
      *matrix = memory;
      memory += chunks * kWidth * kWidth;
    }
    scores = memory;
    d_scores = scores + chunk_stride;
  }

  void move_to(int64_t to) {
    item = to;
    current = offsets_of(item);
    ahead = offsets_of(smaller(item + kHeadsAhead, s.sequences * s.heads - 1));
  }
  Offsets offsets_of(int64_t head) const {
    int64_t sequence = head / s.heads, column = head % s.heads * s.head_size;
    return {sequence * s.tokens * stride + column, sequence * s.queries * part + column};
  }
  int64_t token(int64_t query) const { return s.first_query + query * s.query_step; }
  // The index of a query in log_sums.
  int64_t row(int64_t query) const {
    return (item / s.heads * s.queries + query) * s.heads + item % s.heads;
  }

  // Copy a row of head_size elements from a tensor to a matrix of chunks, and back.
  void get(const float* from, float* to) const {
    for (int64_t c = 0; c < chunks; ++c, from += kWidth, to += chunk_stride)
      store(to, load(from, lanes_left(s.head_size - c * kWidth)));
  }
  void put(const float* from, Vec factor, float* to) const {
    for (int64_t c = 0; c < chunks; ++c, from += chunk_stride, to += kWidth)
      store(to, load(from) * factor, lanes_left(s.head_size - c * kWidth));
  }
  void get_keys_and_values(const float* qkv) const {
    for (int64_t j = 0; j < s.past; ++j) {
      int64_t at = (item * s.past + j) * s.head_size;
      get(s.past_keys + at, keys + j * kWidth);
      get(s.past_values + at, values + j * kWidth);
    }
    const float* from = qkv + current.inputs + part;
    for (int64_t j = s.past; j < total; ++j, from += stride) {
      get(from, keys + j * kWidth);
      get(from + part, values + j * kWidth);
    }
  }
  void clear_gradients() const {
    for (int64_t i = 0; i < chunks * chunk_stride; i += kWidth) {
      store(d_keys + i, Vec{});
      store(d_values + i, Vec{});
    }
  }
  void put_gradients(float* d_qkv) const {
    float* to = d_qkv + current.inputs + part;
    for (int64_t j = 0; j < s.tokens; ++j, to += stride) {
      put(d_keys + j * kWidth, splat(scale), to);
      put(d_values + j * kWidth, splat(1.0f), to + part);
    }
  }

  // total[i] = rows[j + i] · columns, for the kWidth keys from j on; a column is a query.
  HARMODT_ALWAYS_INLINE inline void dots(const float* rows, const float* columns, int64_t j,
                                         Tile& total) const {
    clear(total);
    for (int64_t c = 0; c < chunks; ++c)
      add_products(ChunkRows{rows + c * chunk_stride + j * kWidth}, columns + c * kWidth * kWidth,
                   kWidth, total);
  }
  // out[j] += sum over the block's queries of weights[j][query] * rows[query], for `count` keys in
  // whole tiles
  void add_outer(const float* weights, const float* rows, int64_t count, float* out) const {
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t j = 0; j < count; j += kWidth) {
        float* to = out + c * chunk_stride + j * kWidth;
        Tile total;
        unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { total[i] = load(to + i * kWidth); });
        add_products(ChunkRows{weights + j * kWidth}, rows + c * kWidth * kWidth, kWidth, total);
        store(to, total);
      }
  }
};

// A block of kWidth queries from `first` on. If fewer are left, copies of the last query fill the
// block. While a block is computed, it prefetches its share of the head ahead, a few rows at a time:
// more requests at once would only queue.
struct Block {
  const Head& h;
  int64_t first, queries;
  int64_t keys;           // keys that at least one query may see
  int64_t seen_by_all;    // keys that every query may see
  int64_t from, to;       // tokens of the head ahead that this block prefetches
  IntVec positions;       // the last key that each query sees
  UVec unhashed_draws;   // the unhashed dropout draw of each query at the first key

  Block(const Head& head, int64_t first_query) : h(head), first(first_query) {
    const harmodt_attention_shape& s = h.s;
    queries = smaller(kWidth, s.queries - first);
    seen_by_all = s.past + h.token(first) + 1;
    keys = s.past + h.token(first + queries - 1) + 1;
    from = s.tokens * first / s.queries;
    to = s.tokens * (first + queries) / s.queries;
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    int32_t last = static_cast<int32_t>(queries - 1);
    lane = lane < last ? lane : splat(last);
    positions = lane * static_cast<int32_t>(s.query_step) + static_cast<int32_t>(seen_by_all - 1);
    unhashed_draws = unhashed((UVec)lane * static_cast<uint32_t>(s.heads * h.total) +
                                  static_cast<uint32_t>(h.row(first) * h.total),
                              h.key);
  }

  // Prefetches rows into the second-level cache. In the first-level cache they would share few sets,
  // because they are far apart. It is inlined: GCC drops calls of functions that only prefetch.
  HARMODT_ALWAYS_INLINE inline void fetch(const float* matrix, int64_t stride, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < h.s.head_size; d += 16)
        __builtin_prefetch(matrix + i * stride + d, 0, 2);
  }
  // Prefetch queries (part 0), keys (1) or values (2) of the head ahead.
  HARMODT_ALWAYS_INLINE inline void fetch_inputs(const float* qkv, int part) const {
    fetch(qkv + h.ahead.inputs + part * h.part + from * h.stride, h.stride, to - from);
  }
  HARMODT_ALWAYS_INLINE inline void fetch_outputs(const float* out) const {
    fetch(out + h.ahead.outputs + first * h.part, h.part, queries);
  }

  // Load a chunk of the block's rows, which are `stride` apart. The last row fills the tile.
  HARMODT_ALWAYS_INLINE inline void get(const float* rows, int64_t stride, int64_t chunk,
                                        Tile& tile) const {
    uint32_t inside = lanes_left(h.s.head_size - chunk * kWidth);
    const float* from_row = rows + chunk * kWidth;
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE {
      tile[i] = load(from_row, inside);
      if (i + 1 < queries) from_row += stride;
    });
  }
  // Store a chunk with a query in each lane to the block's rows, which are `stride` apart.
  HARMODT_ALWAYS_INLINE inline void put(Tile& tile, int64_t chunk, float* rows,
                                        int64_t stride) const {
    transpose(tile);
    uint32_t inside = lanes_left(h.s.head_size - chunk * kWidth);
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE {
      if (i < queries) store(rows + i * stride + chunk * kWidth, tile[i], inside);
    });
  }
  // Copy the block's queries. In queries_t they are multiplied by the factor of the scores and by
  // log2(e), so that scores are exponents of 2.
  void get_queries(const float* qkv) const {
    const float* rows = qkv + h.current.inputs + h.token(first) * h.stride;
    for (int64_t c = 0; c < h.chunks; ++c) {
      int64_t at = c * kWidth * kWidth;
      Tile tile;
      get(rows, h.s.query_step * h.stride, c, tile);
      store(h.queries + at, tile);
      transpose(tile);
      unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { tile[i] *= h.scale * kLog2E; });
      store(h.queries_t + at, tile);
    }
  }

  // Compute the scores of all keys times log2(e), in whole tiles: -inf where a query may not see a
  // key. Returns each query's largest score.
  Vec score() const {
    Vec lowest = splat(-__builtin_inff()), largest = lowest;
    for (int64_t j = 0; j < keys; j += kWidth) {
      Tile total;
      h.dots(h.keys, h.queries_t, j, total);
      if (j + kWidth > seen_by_all) {
        IntVec left = positions - static_cast<int32_t>(j);
        unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE {
          total[i] = left < 0 ? lowest : total[i];
          left -= 1;
        });
      }
      store(h.scores + j * kWidth, total);
      unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE {
        largest = total[i] > largest ? total[i] : largest;
      });
    }
    return largest;
  }
};

template <bool Dropout>
void attention_of(const Block& block, const float* qkv, float* out, float* log_sums) {
  const Head& h = block.h;
  block.fetch_inputs(qkv, 0);
  block.get_queries(qkv);
  Vec largest = block.score(), total{};
  block.fetch_inputs(qkv, 1);
  UVec draws = block.unhashed_draws;
  float *scores = h.scores, drop = h.s.dropout;
  for (int64_t j = 0, keys = block.keys; j < keys; ++j, draws += kIndexFactor) {
    Vec e = power_of_two(load(scores + j * kWidth) - largest);
    total += e;
    store(scores + j * kWidth, Dropout ? e * kept(draws, h.key, drop) : e);
  }
  block.fetch_inputs(qkv, 2);
  Vec share = 1 / total, log_sum = (largest + binary_logarithm(total)) * kLn2;
  for (int64_t c = 0; c < h.chunks; ++c) {
    Tile sums;
    clear(sums);
    add_products(ChunkColumns{h.values + c * h.chunk_stride}, h.scores, block.keys, sums);
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { sums[i] *= share; });
    block.put(sums, c, out + h.current.outputs + block.first * h.part, h.part);
  }
  block.fetch_outputs(out);
  for (int64_t i = 0; i < block.queries; ++i) log_sums[h.row(block.first + i)] = log_sum[i];
}

// Adds a block's gradients to d_keys and d_values, and stores its queries' gradients in d_qkv.
template <bool Dropout>
void attention_gradient_of(const Block& block, const float* d_out, const float* qkv,
                           const float* out, const float* log_sums, float* d_qkv) {
  const Head& h = block.h;
  block.fetch_inputs(qkv, 0);
  block.get_queries(qkv);
  Vec log_sum{}, dot{};
  for (int64_t i = 0; i < kWidth; ++i)
    log_sum[i] = log_sums[h.row(block.first + smaller(i, block.queries - 1))] * kLog2E;
  int64_t outputs = h.current.outputs + block.first * h.part;
  for (int64_t c = 0; c < h.chunks; ++c) {
    int64_t at = c * kWidth * kWidth;
    Tile d_rows, products;
    block.get(d_out + outputs, h.part, c, d_rows);
    block.get(out + outputs, h.part, c, products);
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE {
      if (i >= block.queries) d_rows[i] = Vec{};  // copies of the last query do not count
      products[i] *= d_rows[i];
    });
    store(h.d_out + at, d_rows);
    transpose(d_rows);
    store(h.d_out_t + at, d_rows);
    transpose(products);
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { dot += products[i]; });
  }
  block.fetch_inputs(qkv, 1);
  block.score();
  block.fetch_inputs(qkv, 2);
  int64_t keys = Head::tiles(block.keys);
  for (int64_t j = 0; j < keys; j += kWidth) {
    Tile total;
    h.dots(h.values, h.d_out_t, j, total);
    store(h.d_scores + j * kWidth, total);
  }
  block.fetch_outputs(out);
  UVec draws = block.unhashed_draws;
  float *score = h.scores, *d_score = h.d_scores, drop = h.s.dropout;
  for (int64_t j = 0; j < keys; ++j, draws += kIndexFactor, score += kWidth, d_score += kWidth) {
    // Until here, d_scores holds the gradients dp of the weights p.
    Vec p = power_of_two(load(score) - log_sum), dp = load(d_score);
    Vec factor = Dropout ? kept(draws, h.key, drop) : splat(1.0f);
    store(score, Dropout ? p * factor : p);
    store(d_score, p * ((Dropout ? dp * factor : dp) - dot));
  }
  block.fetch_outputs(d_out);
  h.add_outer(h.scores, h.d_out, keys, h.d_values);
  block.fetch_inputs(d_qkv, 0);
  h.add_outer(h.d_scores, h.queries, keys, h.d_keys);
  block.fetch_inputs(d_qkv, 1);
  for (int64_t c = 0; c < h.chunks; ++c) {
    Tile sums;
    clear(sums);
    add_products(ChunkColumns{h.keys + c * h.chunk_stride}, h.d_scores, block.keys, sums);
    unrolled<kWidth>([&](auto i) HARMODT_ALWAYS_INLINE { sums[i] *= h.scale; });
    block.put(sums, c, d_qkv + h.current.inputs + h.token(block.first) * h.stride,
              h.s.query_step * h.stride);
  }
  block.fetch_inputs(d_qkv, 2);
}

// Calls body(head) for every (sequence, head). A thread uses one Head for all of its items.
template <class Body>
void for_heads(const harmodt_attention_shape& s, int threads, const Body& body) {
  int64_t items = s.sequences * s.heads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    Head h(s, static_cast<float*>(scratch(Head::memory(s))));
    for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; ++item) {
      h.move_to(item);
      body(h);
    }
  }
}

void attention(const harmodt_attention_shape& s, const float* qkv, float* out, float* log_sums,
               int threads) {
  auto compute = s.dropout > 0 ? attention_of<true> : attention_of<false>;
  for_heads(s, threads, [&](const Head& h) {
    h.get_keys_and_values(qkv);
    for (int64_t first = 0; first < s.queries; first += kWidth)
      compute(Block(h, first), qkv, out, log_sums);
  });
}

void attention_gradient(const harmodt_attention_shape& s, const float* d_out, const float* qkv,
                        const float* out, const float* log_sums, float* d_qkv, int threads) {
  auto compute = s.dropout > 0 ? attention_gradient_of<true> : attention_gradient_of<false>;
  for_heads(s, threads, [&](const Head& h) {
    h.get_keys_and_values(qkv);
    h.clear_gradients();
    float* d_query = d_qkv + h.current.inputs;
    if (s.queries < s.tokens)
      for (int64_t j = 0; j < s.tokens; ++j)
        for (int64_t d = 0; d < s.head_size; ++d) d_query[j * h.stride + d] = 0;
    for (int64_t first = 0; first < s.queries; first += kWidth)
      compute(Block(h, first), d_out, qkv, out, log_sums, d_qkv);
    h.put_gradients(d_qkv);
  });
}

}  // namespace
