// The masked linear layer: matrix products as in BLIS. The masks are applied while panels are packed.
//
// The depth is the dimension over which a product is summed. A panel is kPanel columns of the right
// operand, [depth][kPanel]. The thread that uses a panel packs it once. A block is kRows rows of the
// left operand. In bf16 (Pairs), panels and blocks hold pairs of neighbours along the depth, which
// halves the depth. If the processor has matrix units (AMX), they multiply blocks of kTileRows rows.
// One thread sums each output element, in a fixed order that does not depend on the number of threads.
#pragma once

#include <type_traits>

#include "dropout_add/dropout_add.h"
#include "masked_layer_norm/masked_layer_norm.h"
#include "masked_linear/tiles.h"
#include "native/kernels.h"
#include "native/simd.h"

namespace {

// The inner loop uses kRows * kPanelVecs registers for sums, kPanelVecs for the panel, and one for a
// broadcast element.
#if HARMODT_WIDTH == 16
constexpr int kRows = 6, kPanelVecs = 4;
#elif HARMODT_WIDTH == 8
constexpr int kRows = 6, kPanelVecs = 2;
#else
constexpr int kRows = 4, kPanelVecs = 2;
#endif
constexpr int64_t kPanel = kPanelVecs * kWidth;
// Rows of a block.
template <bool Pairs>
constexpr int64_t kBlock = kTiles<Pairs> ? kTileRows : kRows;
// A strip: rows of the weight gradient whose left operand is packed at a time.
template <bool Pairs>
constexpr int64_t kStrip = kTiles<Pairs> ? kTileRows : 8 * kRows;
// A chunk of rows is multiplied with all panels before the next chunk. A chunk, and panels of at most
// kPanelBytes, stay in a core's cache.
template <bool Pairs>
constexpr int64_t kChunk = kTiles<Pairs> ? 2 * kTileRows : 4 * kRows;
constexpr int64_t kPanelBytes = 1 << 20;
// In the weight gradient, rows are the depth. At most this many rows are summed at a time, again to
// stay in the cache. Pairs of bf16 need half the memory.
template <bool Pairs>
constexpr int64_t kMostDepth = Pairs ? 640 : 320;
// With fewer rows than this, packing the same panels in another thread costs more than it gains.
constexpr int64_t kFewestRows = 256;
// Rows that are packed as columns at a time. More rows would share too few sets of the cache.
constexpr int64_t kRowsTogether = 4;

// How many rows ahead a panel of x is prefetched, and how many columns ahead a weight. Rows may be far
// apart in memory.
constexpr int kAhead = 8, kColumnsAhead = 32;
constexpr int64_t kLine = 16;  // floats of a cache line

template <bool Pairs>
using Element = std::conditional_t<Pairs, int32_t, float>;

// The depth of a panel for a sum of `size` products. Matrix units take whole tiles: zeros fill them.
template <bool Pairs>
int64_t depth_of(int64_t size) {
  if (kTiles<Pairs>) return (size + 2 * kTileDepth - 1) / (2 * kTileDepth) * kTileDepth;
  return Pairs ? (size + 1) / 2 : size;
}

// A left operand: rows in memory, or a packed strip of columns.
template <class T>
struct InRows {
  const T* first;
  int64_t stride;
  T at(int64_t row, int64_t k) const { return first[row * stride + k]; }
};
template <class T>
struct InStrip {
  const T* first;
  T at(int64_t row, int64_t k) const { return first[k * kStrip<false> + row]; }
};

// Rows of one matrix, or of two with the same layout, that a product prefetches while it runs. A null
// pointer means no rows. Only a few rows are prefetched at a time: more requests would only queue.
struct LaterRows {
  const float* first = nullptr;
  const float* second = nullptr;
  int64_t stride = 0;

  // Prefetches Lines cache lines of each of Rows rows into the second-level cache, from the column
  // that belongs to k. It is inlined, because GCC drops calls of functions that only prefetch.
  template <int Rows, int Lines>
  HARMODT_ALWAYS_INLINE inline void fetch(int64_t k) const {
    for (const float* matrix : {first, second})
      for (int i = 0; matrix && i < Rows; ++i)
        for (int j = 0; j < Lines; ++j)
          __builtin_prefetch(matrix + i * stride + k * Lines + j * kLine, 0, 2);
  }
};

// Prefetches nothing.
struct NoRows {
  template <int Rows, int Lines>
  void fetch(int64_t) const {}
};

// Sums of products for Rows rows and the columns of a panel.
template <int Rows>
using Sums = Vec[Rows][kPanelVecs];

// sums[i][j] = sum over k of left.at(i, k) * panel[k * panel_stride + j]. Meanwhile it prefetches Rows
// rows of `later`.
template <int Rows, int Ahead = 0, class Left, class T, class Fetched>
HARMODT_ALWAYS_INLINE inline void multiply(Left left, const T* panel, int64_t panel_stride,
                                           int64_t depth, Sums<Rows>& sums, Fetched later) {
  unrolled<Rows>([&](auto i) HARMODT_ALWAYS_INLINE {
    unrolled<kPanelVecs>([&](auto j) HARMODT_ALWAYS_INLINE { sums[i][j] = Vec{}; });
  });
  for (int64_t k = 0; k < depth; ++k) {
    if (k % kLine == 0) later.template fetch<Rows, std::is_same_v<T, float> ? 1 : 2>(k);
    decltype(load(panel)) right[kPanelVecs];
    unrolled<kPanelVecs>([&](auto j) HARMODT_ALWAYS_INLINE {
      right[j] = load(panel + k * panel_stride + j * kWidth);
      if (Ahead) __builtin_prefetch(panel + (k + Ahead) * panel_stride + j * kWidth);
    });
    unrolled<Rows>([&](auto i) HARMODT_ALWAYS_INLINE {
      auto value = splat(left.at(i, k));
      // Makes GCC broadcast once, not once per product.
      asm volatile("" : "+" HARMODT_REGISTER(value));
      unrolled<kPanelVecs>([&](auto j) HARMODT_ALWAYS_INLINE {
        sums[i][j] = multiply_add(sums[i][j], value, right[j]);
      });
    });
  }
}

// The distance between rows of a packed left operand.
template <bool Pairs>
int64_t packed_stride(int64_t size) {
  return (depth_of<Pairs>(size) + kWidth - 1) / kWidth * kWidth;
}

// Calls body(std::integral_constant<int, rows>) for a number of rows <= kRows that is known at run
// time.
template <int Rows = kRows, class Body>
inline void with_rows(int64_t rows, const Body& body) {
  if (rows == Rows) return body(std::integral_constant<int, Rows>{});
  if constexpr (Rows > 1) with_rows<Rows - 1>(rows, body);
}

// The weight with the mask of one group. The strides are the distances between rows.
struct MaskedWeight {
  const float* weight;
  int64_t stride;
  const int32_t* bits;
  int64_t bits_stride;

  // A register of elements [row][column], [row][column + 1], …; 0 where the bit is not set and beyond
  // `columns`.
  Vec at(int64_t row, int64_t column, int64_t columns) const {
    if (column >= columns) return Vec{};
    __builtin_prefetch(weight + row * stride + column + kColumnsAhead);
    uint32_t kept = bits_at(bits + row * bits_stride, column) & lanes_left(columns - column);
    return load(weight + row * stride + column, kept);
  }
};

// panel[k][j] = (W ⊙ M)[first + j][k]. Registers along k are loaded with the mask, then transposed.
template <bool Pairs>
void pack_transposed(MaskedWeight w, int64_t first, int64_t rows, int64_t inputs,
                     Element<Pairs>* panel) {
  constexpr int64_t per_lane = Pairs ? 2 : 1;
  int64_t depth = depth_of<Pairs>(inputs);
  for (int64_t j = 0; j < kPanel; j += kWidth)
    for (int64_t d = 0; d < depth; d += kWidth) {
      IntVec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        int64_t row = first + j + i, k = d * per_lane;
        if (j + i >= rows) {
          block[i] = IntVec{};
        } else if constexpr (Pairs) {
          block[i] = pair_neighbours(w.at(row, k, inputs), w.at(row, k + kWidth, inputs));
        } else {
          block[i] = (IntVec)w.at(row, k, inputs);
        }
      }
      transpose(block);
      for (int64_t i = 0; i < smaller(kWidth, depth - d); ++i)
        store(reinterpret_cast<int32_t*>(panel) + (d + i) * kPanel + j, block[i]);
    }
}

// panel[n][j] = (W ⊙ M)[n][first + j]
template <bool Pairs>
void pack_straight(MaskedWeight w, int64_t first, int64_t inputs, int64_t outputs,
                   Element<Pairs>* panel) {
  for (int64_t d = 0; d < depth_of<Pairs>(outputs); ++d)
    for (int64_t j = 0; j < kPanel; j += kWidth) {
      if constexpr (Pairs) {
        auto row = [&](int64_t n) { return n < outputs ? w.at(n, first + j, inputs) : Vec{}; };
        store(panel + d * kPanel + j, pair_bf16(row(2 * d), row(2 * d + 1)));
      } else {
        store(panel + d * kPanel + j, w.at(d, first + j, inputs));
      }
    }
}

// Rows of `columns` elements, `stride` apart. Elements beyond `columns` are 0.
struct Rows {
  const float* values;
  int64_t stride, columns;

  void prefetch(int64_t row, int64_t column) const {
    __builtin_prefetch(values + row * stride + column);
  }
  LaterRows later(int64_t row) const { return {values + row * stride, nullptr, stride}; }
  Vec at(int64_t row, int64_t column) const {
    uint32_t inside = lanes_left(columns - column);
    return inside ? load(values + row * stride + column, inside) : Vec{};
  }
};

// Rows of the output's gradient before ReLU and dropout. If the layer had a ReLU (y is not null),
// elements where y <= 0 are 0. If it had dropout, dropped elements are 0 and the others rescaled.
// `offset` is the first element's index in dy, which dropout needs.
struct GradientRows {
  Rows dy;
  const float* y;
  Dropout dropout;
  int64_t offset;

  void prefetch(int64_t row, int64_t column) const {
    dy.prefetch(row, column);
    if (y) __builtin_prefetch(y + row * dy.stride + column);
  }
  LaterRows later(int64_t row) const {
    return {dy.values + row * dy.stride, y ? y + row * dy.stride : nullptr, dy.stride};
  }
  Vec at(int64_t row, int64_t column) const {
    Vec v = dy.at(row, column);
    if (y) v = Rows{y, dy.stride, dy.columns}.at(row, column) <= 0 ? Vec{} : v;
    return dropout ? dropout.of(v, offset + row * dy.stride + column) : v;
  }
};

// The gradient dy of a layer's output; y if the layer had a ReLU, else null; and the layer's dropout.
struct OutputGradient {
  const float* dy;
  const float* y;
  Dropout dropout;

  // The rows from an element's offset on.
  GradientRows from(int64_t offset, int64_t stride, int64_t columns) const {
    return {{dy + offset, stride, columns}, y ? y + offset : nullptr, dropout, offset};
  }
};

// Whole rows of x, normalised by the LayerNorm before the layer.
struct NormalisedRows {
  Rows x;
  const float* statistics;  // mean and inverse standard deviation of each row
  const float* affine;      // gain and shift with masks, [2][columns]

  void prefetch(int64_t row, int64_t column) const { x.prefetch(row, column); }
  LaterRows later(int64_t row) const { return x.later(row); }
  Vec at(int64_t row, int64_t column) const {
    uint32_t inside = lanes_left(x.columns - column);
    if (!inside) return Vec{};
    Vec v = (x.at(row, column) - statistics[2 * row]) * statistics[2 * row + 1];
    v = fused_multiply_add(v, load(affine + column, inside),
                           load(affine + x.columns + column, inside));
    return keep(v, inside);
  }
};

// Packs rows [first, first + rows) of a left operand: packed[i][d] is a float, or a pair of bf16.
template <bool Pairs, class Left>
void pack_rows(Left left, int64_t first, int64_t rows, int64_t columns,
               Element<Pairs>* packed) {
  int64_t stride = packed_stride<Pairs>(columns);
  for (int64_t i = first; i < first + rows; ++i, packed += stride)
    for (int64_t d = 0; d < stride; d += kWidth) {
      if constexpr (Pairs) {
        store(packed + d, pair_neighbours(left.at(i, 2 * d), left.at(i, 2 * d + kWidth)));
      } else {
        store(packed + d, left.at(i, d));
      }
    }
}

// The output of the product of some rows and a panel. The result is finished before it is stored: the
// bias (or null) is added, ReLU is applied if `relu`, then dropout, and the residual (or null) is
// added. bias[j] belongs to column j. The residual has the layout of the output.
struct Out {
  float* rows;
  int64_t stride, columns;
  const float* bias = nullptr;
  bool relu = false;
  const float* residual = nullptr;
  Dropout dropout = {};
  int64_t offset = 0;  // index of the first element, for dropout

  Out from_row(int64_t row) const {
    Out rest = *this;
    rest.rows += row * stride;
    if (residual) rest.residual += row * stride;
    rest.offset += row * stride;
    return rest;
  }
};

// Ends: the layer ends a residual branch, so there is dropout or a residual.
template <int Rows, bool Ends>
HARMODT_ALWAYS_INLINE inline void finish_as(const Sums<Rows>& sums, const Out& out) {
  unrolled<kPanelVecs>([&](auto j) HARMODT_ALWAYS_INLINE {
    uint32_t inside = lanes_left(out.columns - j * kWidth);
    if (!inside) return;
    Vec bias = out.bias ? load(out.bias + j * kWidth) : Vec{};
    unrolled<Rows>([&](auto i) HARMODT_ALWAYS_INLINE {
      int64_t at = i * out.stride + j * kWidth;
      Vec v = sums[i][j];
      if (out.bias) v += bias;
      if (out.relu) v = v <= 0 ? Vec{} : v;  // NaN stays
      if (Ends && out.dropout) v = out.dropout.of(v, out.offset + at);
      if (Ends && out.residual) v = load(out.residual + at, inside) + v;
      store(out.rows + at, v, inside);
    });
  });
}

// `out` is passed by value. With a reference, the compiler would read its members again after each
// store, because the store could have changed them.
template <int Rows>
HARMODT_ALWAYS_INLINE inline void finish(const Sums<Rows>& sums, Out out) {
  if (out.residual || out.dropout) return finish_as<Rows, true>(sums, out);
  finish_as<Rows, false>(sums, out);
}

// Prefetches the cache lines of the output and of the residual for some rows. It is inlined, because
// GCC drops calls of functions that only prefetch.
HARMODT_ALWAYS_INLINE inline void fetch(const Out& out, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < kPanelVecs; ++j)
      __builtin_prefetch(out.rows + i * out.stride + j * kWidth, 1);
  for (int64_t i = 0; out.residual && i < rows; ++i)
    for (int j = 0; j < kPanelVecs; ++j)
      __builtin_prefetch(out.residual + i * out.stride + j * kWidth);
}

// The rows of a block times a panel. It is not inlined, because surrounding code could occupy
// registers that the sums need.
template <int Rows, class T>
__attribute__((noinline)) void rows_of_block(InRows<T> left, const T* panel, int64_t depth,
                                             const Out& out, const LaterRows& later) {
  fetch(out, Rows);
  Sums<Rows> sums;
  multiply<Rows>(left, panel, kPanel, depth, sums, later);
  finish<Rows>(sums, out);
}

// left[i] · panel column j for a block of rows; `out` says how the results are finished.
template <bool Pairs>
void block_times_panel(const Element<Pairs>* left, int64_t left_stride, int64_t rows,
                       int64_t depth, const Element<Pairs>* panel, const Out& out,
                       const LaterRows& later) {
  if constexpr (kTiles<Pairs>) {
    Vec total[kTileRows][1][kPanelVecs];
    if (out.stride > 2 * kPanel) fetch(out, rows);  // a processor prefetches narrower rows itself
    multiply_tiles(left, left_stride, panel, depth, reinterpret_cast<Vec(*)[kPanelVecs]>(total));
    for (int64_t i = 0; i < rows; ++i) finish<1>(total[i], out.from_row(i));
    return;
  }
  with_rows(rows, [&](auto count) {
    rows_of_block<count.value>(InRows<Element<Pairs>>{left, left_stride}, panel, depth, out, later);
  });
}

// The number of ranges into which each group's rows are cut. All threads then have about the same
// work. If several threads share the few panels of a group, each reads its own rows.
int64_t row_ranges(int64_t groups, int64_t panels, int64_t rows, int threads) {
  int64_t ranges = 1;
  if (groups < threads && panels <= 2 * threads)
    ranges = larger(ranges, smaller(threads, rows / kFewestRows));
  int64_t items = groups * panels * ranges;
  if (items % threads == 0 || items >= 8 * threads) return ranges;
  return larger(ranges, smaller(threads, (rows + 8 * kRows - 1) / (8 * kRows)));
}

// Work of a thread: a range of a group's rows times consecutive panels.
struct Item {
  int64_t group;
  int64_t panel, panels;  // the first panel, and the number of panels
  int64_t first, last;    // rows [first, last)
};

// Calls body(item) until every (group, range of rows, panel) is done. An item takes several panels for
// the same rows.
template <class Body>
void for_panels(const harmodt_linear_shape& s, int64_t width, int64_t depth, int threads,
                const Body& body) {
  int64_t panels = (width + kPanel - 1) / kPanel;
  int64_t most = larger(1, kPanelBytes / (4 * depth * kPanel + 1));
  int64_t ranges = row_ranges(s.groups, panels, s.rows, threads);
  int64_t rows = (s.rows + ranges - 1) / ranges;
  int64_t products = s.groups * ranges * panels;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    int64_t from = products * thread / threads, to = products * (thread + 1) / threads;
    while (from < to) {
      int64_t panel = from % panels, range = from / panels % ranges, group = from / panels / ranges;
      int64_t together = smaller(most, smaller(panels - panel, to - from));
      int64_t first = range * rows, last = smaller(s.rows, first + rows);
      if (first < last) body(Item{group, panel, together, first, last});
      from += together;
    }
  }
}

MaskedWeight weight_of(const harmodt_linear_shape& s, const float* weight, int64_t group) {
  return {weight, s.weight_stride, s.weight_bits + task_of(s, group) * s.weight_bits_task_stride,
          s.weight_bits_row_stride};
}

// The rows of an item times its panels. pack(panel, memory) packs a panel, and after it the bias;
// out_of(panel, bias) is its output. The rows are packed too, unless `in_place` points to them: then
// they are multiplied where they are in memory.
template <bool Pairs, class Left, class Pack, class OutOf>
void rows_times_panels(const Item& item, const Left& left, const float* in_place, int64_t size,
                       const Pack& pack, const OutOf& out_of) {
  constexpr int64_t block = kBlock<Pairs>, chunk = kChunk<Pairs>;
  int64_t depth = depth_of<Pairs>(size), rows = item.last - item.first, stride = size;
  int64_t panel_size = (depth + 1) * kPanel;
  bool packs = Pairs || !in_place;
  if (packs) stride = packed_stride<Pairs>(size);
  // Blocks are multiplied as a whole: there is memory for one more block beyond the last row.
  auto* panels = static_cast<Element<Pairs>*>(
      scratch(4 * (item.panels * panel_size + (packs ? (chunk + block) * stride : 0))));
  auto* packed = panels + item.panels * panel_size;
  for (int64_t p = 0; p < item.panels; ++p) pack(item.panel + p, panels + p * panel_size);
  TileConfiguration<Pairs> configuration;
  for (int64_t r = 0; r < rows; r += chunk) {
    int64_t height = smaller(chunk, rows - r);
    if (packs) pack_rows<Pairs>(left, r, height, size, packed);
    auto* from = packs ? packed : reinterpret_cast<const Element<Pairs>*>(in_place + r * stride);
    for (int64_t p = 0; p < item.panels; ++p) {
      const Element<Pairs>* panel = panels + p * panel_size;
      auto* bias = reinterpret_cast<const float*>(panel + depth * kPanel);
      Out out = out_of(item.panel + p, bias).from_row(r);
      for (int64_t i = 0; i < height; i += block)
        block_times_panel<Pairs>(from + i * stride, stride, smaller(block, height - i), depth, panel,
                                 out.from_row(i), p == 0 ? left.later(r + chunk + i) : LaterRows{});
    }
  }
}

// The LayerNorm before a layer: statistics [groups][rows][2], affine [groups][2][inputs].
struct Norm {
  const float* statistics;
  const float* affine;
  explicit operator bool() const { return affine; }
};

// The normalised rows of x from `row` on, which belong to a group.
NormalisedRows normalised(const harmodt_linear_shape& s, const Norm& norm, const float* x,
                          int64_t group, int64_t row) {
  return {{x + row * s.inputs, s.inputs, s.inputs}, norm.statistics + 2 * row,
          norm.affine + group * 2 * s.inputs};
}

// The residual sum after a layer: the residual, with the layout of the layer's output, or null; and
// the dropout of the layer's output.
struct Residual {
  const float* rows;
  Dropout dropout;
};

template <bool Pairs>
void masked_linear(const harmodt_linear_shape& s, const Norm& norm, const float* x,
                   const float* weight, const float* bias, bool relu, const Residual& residual,
                   float* y, int threads) {
  int64_t depth = depth_of<Pairs>(s.inputs);
  for_panels(s, s.outputs, depth, threads, [&](const Item& item) {
    int64_t row = item.group * s.rows + item.first, task = task_of(s, item.group);
    auto pack = [&](int64_t index, Element<Pairs>* panel) {
      int64_t n = index * kPanel, columns = smaller(kPanel, s.outputs - n);
      pack_transposed<Pairs>(weight_of(s, weight, item.group), n, columns, s.inputs, panel);
      auto* masked = reinterpret_cast<float*>(panel + depth * kPanel);
      const int32_t* bits = s.bias_bits + task * s.bias_bits_task_stride;
      for (int64_t j = 0; bias && j < columns; j += kWidth)
        store(masked + j, load(bias + n + j, bits_at(bits, n + j) & lanes_left(columns - j)));
    };
    auto out_of = [&](int64_t index, const float* masked_bias) {
      int64_t n = index * kPanel, offset = row * s.outputs + n;
      return Out{y + offset, s.outputs, smaller(kPanel, s.outputs - n), bias ? masked_bias : nullptr,
                 relu, residual.rows ? residual.rows + offset : nullptr, residual.dropout, offset};
    };
    Rows rows{x + row * s.inputs, s.inputs, s.inputs};
    if (norm)
      rows_times_panels<Pairs>(item, normalised(s, norm, x, item.group, row), nullptr, s.inputs,
                               pack, out_of);
    else
      rows_times_panels<Pairs>(item, rows, rows.values, s.inputs, pack, out_of);
  });
}

template <bool Pairs>
void masked_linear_input_gradient(const harmodt_linear_shape& s, const OutputGradient& dy,
                                  const float* weight, float* dx, int threads) {
  for_panels(s, s.inputs, depth_of<Pairs>(s.outputs), threads, [&](const Item& item) {
    int64_t row = item.group * s.rows + item.first;
    GradientRows left = dy.from(row * s.outputs, s.outputs, s.outputs);
    auto pack = [&](int64_t index, Element<Pairs>* panel) {
      pack_straight<Pairs>(weight_of(s, weight, item.group), index * kPanel, s.inputs, s.outputs,
                           panel);
    };
    auto out_of = [&](int64_t index, const float*) {
      int64_t k = index * kPanel;
      return Out{dx + row * s.inputs + k, s.inputs, smaller(kPanel, s.inputs - k)};
    };
    const float* in_place = dy.y || dy.dropout ? nullptr : left.dy.values;
    rows_times_panels<Pairs>(item, left, in_place, s.outputs, pack, out_of);
  });
}

// Packs the columns of a matrix in strips of Width columns. The rows are the depth:
// packed[strip][d][j], or packed[j][d] if Transposed. Each row is read once, in the order of memory.
// If sums is not null, it gets the sum of each column.
template <bool Pairs, int64_t Width, bool Transposed, class Source>
void pack_columns(Source source, int64_t rows, int64_t columns, Element<Pairs>* packed,
                  float* sums) {
  constexpr int64_t together = Transposed ? kWidth : kRowsTogether;
  constexpr int64_t per_lane = Pairs ? 2 : 1, ahead = per_lane * together;
  int64_t depth = depth_of<Pairs>(rows), width = (columns + Width - 1) / Width * Width;
  for (int64_t j = 0; sums && j < width; j += kWidth) store(sums + j, Vec{});
  for (int64_t d = 0; d < depth; d += together)
    for (int64_t j = 0; j < width; j += kWidth) {
      auto row = [&](int64_t r) {
        source.prefetch(r + ahead, j);
        return r < rows ? source.at(r, j) : Vec{};
      };
      IntVec block[together];
      Vec sum{};
      for (int64_t i = 0; i < together; ++i) {
        Vec first = row(per_lane * (d + i));
        if constexpr (Pairs) {
          Vec second = row(2 * (d + i) + 1);
          block[i] = pair_bf16(first, second);
          sum += first + second;
        } else {
          block[i] = (IntVec)first;
          sum += first;
        }
      }
      if (sums) store(sums + j, load(sums + j) + sum);
      auto* to = reinterpret_cast<int32_t*>(packed);
      if constexpr (Transposed) {
        transpose(block);
        for (int64_t i = 0; i < kWidth; ++i) store(to + (j + i) * depth + d, block[i]);
      } else {
        to += (j / Width * depth + d) * Width + j % Width;
        for (int64_t i = 0; i < smaller(together, depth - d); ++i) store(to + i * Width, block[i]);
      }
    }
}

// The buffers and masks for the gradients of weight and bias of a group. If `add`, the gradients are
// added to the buffers, otherwise stored there.
struct GroupGradient {
  float* weight;
  float* bias;
  const int32_t* weight_bits;
  const int32_t* bias_bits;
  bool add;
};

// Masks sums of the weight gradient and stores them, or adds them, at columns [k, k + columns) of
// `out`.
template <int Rows>
HARMODT_ALWAYS_INLINE inline void finish_gradient(const Sums<Rows>& sums, const int32_t* bits,
                                                  int64_t bits_stride, int64_t k, int64_t columns,
                                                  bool add, float* out, int64_t out_stride) {
  unrolled<kPanelVecs>([&](auto j) HARMODT_ALWAYS_INLINE {
    uint32_t inside = lanes_left(columns - j * kWidth);
    if (!inside) return;
    unrolled<Rows>([&](auto i) HARMODT_ALWAYS_INLINE {
      float* to = out + i * out_stride + k + j * kWidth;
      Vec v = keep(sums[i][j], bits_at(bits + i * bits_stride, k + j * kWidth));
      if (add) v += load(to, inside);
      store(to, v, inside);
    });
  });
}

// The rows of a strip times a panel, whose rows may be far apart in memory. It is not inlined, for the
// same reason as rows_of_block.
template <int Rows, class T>
__attribute__((noinline)) void rows_of_strip(InStrip<T> strip, const T* panel, int64_t panel_stride,
                                             int64_t depth, const int32_t* bits,
                                             int64_t bits_stride, int64_t k, int64_t columns,
                                             bool add, float* out, int64_t out_stride,
                                             const LaterRows& later) {
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kPanelVecs; ++j)
      __builtin_prefetch(out + i * out_stride + k + j * kWidth, 1);
  Sums<Rows> sums;
  if (later.first)
    multiply<Rows, kAhead>(strip, panel, panel_stride, depth, sums, later);
  else
    multiply<Rows, kAhead>(strip, panel, panel_stride, depth, sums, NoRows{});
  finish_gradient<Rows>(sums, bits, bits_stride, k, columns, add, out, out_stride);
}

// A packed strip of dy times a panel of x: rows [n, n + height) and columns [k, k + columns) of the
// weight gradient.
template <bool Pairs>
void strip_times_panel(const harmodt_linear_shape& s, const Element<Pairs>* strip, int64_t n,
                       int64_t height, const Element<Pairs>* panel, int64_t panel_stride,
                       int64_t k, int64_t columns, int64_t depth, const GroupGradient& out,
                       int64_t row_stride, LaterRows later) {
  int64_t bits_stride = s.weight_bits_row_stride;
  const int32_t* bits = out.weight_bits + n * bits_stride;
  float* to = out.weight + n * row_stride;
  if constexpr (kTiles<Pairs>) {
    Vec total[kTileRows][1][kPanelVecs];
    multiply_tiles(strip, depth, panel, depth, reinterpret_cast<Vec(*)[kPanelVecs]>(total));
    for (int64_t i = 0; i < height; ++i)
      finish_gradient<1>(total[i], bits + i * bits_stride, bits_stride, k, columns, out.add,
                      to + i * row_stride, row_stride);
    return;
  }
  for (int64_t i = 0; i < height; i += kRows) {
    with_rows(smaller(kRows, height - i), [&](auto count) {
      rows_of_strip<count.value>(InStrip<Element<Pairs>>{strip + i}, panel, panel_stride, depth,
                                 bits + i * bits_stride, bits_stride, k, columns, out.add,
                                 to + i * row_stride, row_stride, later);
    });
    if (later.first) later.first += kRows * later.stride;
  }
}

// Whether panels of x are multiplied without packing. This needs whole panels. Also, rows of x must
// not be too long, and a panel's rows must be wider than a cache line (kWidth is 16). Otherwise the
// rows would share few sets of the cache.
template <bool Pairs>
bool multiplies_in_place(int64_t inputs) {
  return !Pairs && kWidth == 16 && inputs % kPanel == 0 && inputs <= 512;
}

// The gradient of weight rows [from, to) of one group, summed over some rows of its dy and x. Panels
// of x are packed, unless `in_place` points to them.
template <bool Pairs, class Right>
void weight_gradient_of(const harmodt_linear_shape& s, const GradientRows& dy, const Right& x,
                        const float* in_place, int64_t rows, int64_t from, int64_t to,
                        const GroupGradient& out, int64_t row_stride) {
  constexpr int64_t strip = kStrip<Pairs>;
  int64_t depth = depth_of<Pairs>(rows), strips = (to - from + strip - 1) / strip;
  int64_t panels = (s.inputs + kPanel - 1) / kPanel, panel_stride = kPanel, panel_step = depth;
  auto* packed = static_cast<Element<Pairs>*>(
      scratch(4 * (depth * (strips * strip + panels * kPanel) + strips * strip)));
  auto* sums = reinterpret_cast<float*>(packed + depth * strips * strip);
  auto* packed_x = reinterpret_cast<Element<Pairs>*>(sums + strips * strip);
  const Element<Pairs>* panel = packed_x;
  if (in_place) {
    panel = reinterpret_cast<const Element<Pairs>*>(in_place);
    panel_stride = s.inputs;
    panel_step = 1;
  } else {
    pack_columns<Pairs, kPanel, false>(x, rows, s.inputs, packed_x, nullptr);
  }
  pack_columns<Pairs, strip, kTiles<Pairs>>(dy, rows, to - from, packed,
                                            out.bias ? sums : nullptr);
  for (int64_t n = from; out.bias && n < to; ++n) {
    bool kept = bits_at(out.bias_bits, n) & 1;
    out.bias[n] = (out.add ? out.bias[n] : 0) + (kept ? sums[n - from] : 0);
  }
  TileConfiguration<Pairs> configuration;
  // If x is multiplied in place, the rows of x that come next are prefetched.
  LaterRows later{in_place ? in_place + rows * s.inputs : nullptr, nullptr, depth};
  for (int64_t n = from; n < to; n += strip)
    for (int64_t k = 0; k < s.inputs; k += kPanel) {
      strip_times_panel<Pairs>(s, packed + (n - from) * depth, n, smaller(strip, to - n),
                               panel + k * panel_step, panel_stride, k,
                               smaller(kPanel, s.inputs - k), depth, out, row_stride, later);
      if (in_place) later.first += strip * depth;
    }
}

template <bool Pairs>
void masked_linear_weight_gradient(const harmodt_linear_shape& s, const Norm& norm,
                                   const OutputGradient& dy, const float* x,
                                   const harmodt_weight_gradient& out, int threads) {
  constexpr int64_t block = kBlock<Pairs>;
  int64_t blocks = (s.outputs + block - 1) / block;
  int64_t chunks = (s.rows + kMostDepth<Pairs> - 1) / kMostDepth<Pairs>;
  int64_t chunk = s.rows ? (s.rows + chunks - 1) / chunks : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    int64_t from = blocks * thread / threads * block;
    int64_t to = smaller(s.outputs, blocks * (thread + 1) / threads * block);
    for (int64_t group = 0; group < s.groups; ++group) {
      int64_t out_group = out.per_group ? group : 0, task = task_of(s, group);
      // Without rows, the loop still runs once and stores zeros.
      for (int64_t first = 0; first < s.rows || first == 0; first += chunk) {
        int64_t row = group * s.rows + first;
        GradientRows left = dy.from(row * s.outputs + from, s.outputs, to - from);
        GroupGradient gradient{
            out.weight + out_group * out.weight_group_stride,
            out.bias ? out.bias + out_group * out.bias_group_stride : nullptr,
            s.weight_bits + task * s.weight_bits_task_stride,
            s.bias_bits + task * s.bias_bits_task_stride,
            first > 0 || (group > 0 && !out.per_group)};
        auto add_rows = [&](const auto& right, const float* in_place) {
          weight_gradient_of<Pairs>(s, left, right, in_place, smaller(chunk, s.rows - first), from,
                                    to, gradient, out.weight_row_stride);
        };
        Rows rows{x + row * s.inputs, s.inputs, s.inputs};
        if (norm)
          add_rows(normalised(s, norm, x, group, row), nullptr);
        else
          add_rows(rows, multiplies_in_place<Pairs>(s.inputs) ? rows.values : nullptr);
      }
    }
  }
}

}  // namespace
