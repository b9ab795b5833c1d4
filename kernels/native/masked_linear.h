// The masked linear layer: products in the manner of BLIS, whose panels are masked while packed.
//
// A panel is kPanel columns of the right operand, [depth][kPanel], packed once by the thread that
// uses it. A block is kRows rows of the left operand. In bf16 both hold pairs of neighbours along the
// depth, so that it is half as deep. Every output element is summed up by one thread in a fixed
// order, whatever the number of threads.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

// Registers of the inner product: kRows * kPanelVecs sums, kPanelVecs of the panel, one broadcast.
#if HARMODT_WIDTH == 16
constexpr int kRows = 6, kPanelVecs = 4;
#elif HARMODT_WIDTH == 8
constexpr int kRows = 6, kPanelVecs = 2;
#else
constexpr int kRows = 4, kPanelVecs = 2;
#endif
constexpr int64_t kPanel = kPanelVecs * kWidth;
// Rows of the weight gradient whose left operand a thread packs at a time.
constexpr int64_t kStrip = 8 * kRows;

template <bool Pairs>
using Element = std::conditional_t<Pairs, int32_t, float>;

template <bool Pairs>
int64_t depth_of(int64_t size) {
  return Pairs ? (size + 1) / 2 : size;
}

// total[i][j] = sum over k of left[i * row_stride + k * depth_stride] * panel[k * panel_stride + j]
template <int Rows, class T>
inline void multiply(const T* left, int64_t row_stride, int64_t depth_stride, const T* panel,
                     int64_t panel_stride, int64_t depth, Vec (&total)[Rows][kPanelVecs]) {
  for (auto& row : total)
    for (auto& sum : row) sum = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(panel)) right[kPanelVecs];
    for (int j = 0; j < kPanelVecs; ++j) right[j] = load(panel + k * panel_stride + j * kWidth);
    for (int i = 0; i < Rows; ++i) {
      auto value = splat(left[i * row_stride + k * depth_stride]);
      asm volatile("" : "+x"(value));  // one broadcast, not one in each product
      for (int j = 0; j < kPanelVecs; ++j) total[i][j] = multiply_add(total[i][j], value, right[j]);
    }
  }
}

// Call body(std::integral_constant<int, rows>) for rows <= kRows known at run time.
template <int Rows = kRows, class Body>
inline void with_rows(int64_t rows, const Body& body) {
  if (rows == Rows) return body(std::integral_constant<int, Rows>{});
  if constexpr (Rows > 1) with_rows<Rows - 1>(rows, body);
}

// The weight of one group: rows `stride` apart, with the bits of each row.
struct MaskedWeight {
  const float* weight;
  int64_t stride;
  const int32_t* bits;
  int64_t bits_stride;

  // Elements [row][column...] within `columns`, 0 where the bit is not set.
  Vec at(int64_t row, int64_t column, int64_t columns) const {
    if (column >= columns) return Vec{};
    uint32_t kept = bits_at(bits + row * bits_stride, column) & lanes_left(columns - column);
    return load(weight + row * stride + column, kept);
  }
};

// panel[k][j] = (W ⊙ M)[first + j][k]: registers along k are loaded masked and transposed.
template <bool Pairs>
void pack_transposed(const MaskedWeight& w, int64_t first, int64_t rows, int64_t inputs,
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
void pack_straight(const MaskedWeight& w, int64_t first, int64_t inputs, int64_t outputs,
                   Element<Pairs>* panel) {
  for (int64_t d = 0; d < depth_of<Pairs>(outputs); ++d)
    for (int64_t j = 0; j < kPanel; j += kWidth) {
      if constexpr (Pairs) {
        Vec second = 2 * d + 1 < outputs ? w.at(2 * d + 1, first + j, inputs) : Vec{};
        store(panel + d * kPanel + j, pair_bf16(w.at(2 * d, first + j, inputs), second));
      } else {
        store(panel + d * kPanel + j, w.at(d, first + j, inputs));
      }
    }
}

// Elements of dy within `columns`; where the layer had a ReLU (y is given), only where y > 0.
inline Vec of_gradient(const float* dy, const float* y, int64_t column, int64_t columns) {
  uint32_t inside = lanes_left(columns - column);
  if (!inside) return Vec{};
  Vec v = load(dy + column, inside);
  return y && inside ? (load(y + column, inside) <= 0 ? Vec{} : v) : v;
}

// block[i][d] = rows of a left operand [..][columns], as pairs or as they are.
template <bool Pairs>
void pack_block(const float* left, const float* y, int64_t rows, int64_t columns,
                Element<Pairs>* block) {
  int64_t stride = (depth_of<Pairs>(columns) + kWidth - 1) / kWidth * kWidth;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = left + i * columns;
    const float* y_row = y ? y + i * columns : nullptr;
    for (int64_t d = 0; d < stride; d += kWidth) {
      if constexpr (Pairs) {
        store(block + i * stride + d,
              pair_neighbours(of_gradient(row, y_row, 2 * d, columns),
                              of_gradient(row, y_row, 2 * d + kWidth, columns)));
      } else {
        store(block + i * stride + d, of_gradient(row, y_row, d, columns));
      }
    }
  }
}

// out[i][j] = left[i] · panel column j (+ bias[j]) for a block of rows, then ReLU
template <bool Pairs>
void block_times_panel(const Element<Pairs>* left, int64_t left_stride, int64_t rows,
                       int64_t depth, const Element<Pairs>* panel, const float* bias, bool relu,
                       float* out, int64_t out_stride, int64_t columns) {
  with_rows(rows, [&](auto count) {
    Vec total[count.value][kPanelVecs];
    multiply<count.value>(left, left_stride, 1, panel, kPanel, depth, total);
    for (int i = 0; i < count.value; ++i)
      for (int j = 0; j < kPanelVecs; ++j) {
        Vec v = total[i][j];
        if (bias) v += load(bias + j * kWidth);
        if (relu) v = v <= 0 ? Vec{} : v;  // NaN stays
        uint32_t inside = lanes_left(columns - j * kWidth);
        if (inside) store(out + i * out_stride + j * kWidth, v, inside);
      }
  });
}

// The rows of a group times a panel; `out` has the panel's columns.
template <bool Pairs>
void rows_times_panel(const float* left, const float* y, int64_t rows, int64_t size,
                      const Element<Pairs>* panel, Element<Pairs>* block, const float* bias,
                      bool relu, float* out, int64_t out_stride, int64_t columns) {
  int64_t depth = depth_of<Pairs>(size);
  int64_t block_stride = (depth + kWidth - 1) / kWidth * kWidth;
  for (int64_t r = 0; r < rows; r += kRows) {
    int64_t count = smaller(kRows, rows - r);
    const float* from = left + r * size;
    float* to = out + r * out_stride;
    if constexpr (!Pairs) {
      if (!y) {
        block_times_panel<false>(from, size, count, depth, panel, bias, relu, to, out_stride,
                                 columns);
        continue;
      }
    }
    pack_block<Pairs>(from, y ? y + r * size : nullptr, count, size, block);
    block_times_panel<Pairs>(block, block_stride, count, depth, panel, bias, relu, to, out_stride,
                             columns);
  }
}

// Parts of the rows of each (group, panel), so that every thread has as much to do.
int64_t row_parts(int64_t items, int64_t rows, int threads) {
  if (items % threads == 0 || items >= 8 * threads) return 1;
  return smaller(threads, (rows + 8 * kRows - 1) / (8 * kRows));
}

// Every (group, panel, part of the rows): body(group, first column, first row, last row).
template <class Body>
void for_panels(const harmodt_linear& s, int64_t width, int threads, const Body& body) {
  int64_t panels = (width + kPanel - 1) / kPanel;
  int64_t parts = row_parts(s.groups * panels, s.rows, threads);
  int64_t rows = (s.rows + parts - 1) / parts;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < s.groups * panels * parts; ++item) {
    int64_t part = item % parts, panel = item / parts % panels, group = item / parts / panels;
    int64_t first = part * rows, last = smaller(s.rows, first + rows);
    if (first < last) body(group, panel * kPanel, first, last);
  }
}

MaskedWeight weight_of(const harmodt_linear& s, const float* weight, int64_t group) {
  return {weight, s.weight_stride, s.weight_bits + s.task_ids[group] * s.weight_bits_task_stride,
          s.weight_bits_row_stride};
}

template <bool Pairs>
void masked_linear(const harmodt_linear& s, const float* x, const float* weight, const float* bias,
                   bool relu, float* y, int threads) {
  int64_t depth = depth_of<Pairs>(s.inputs);
  for_panels(s, s.outputs, threads, [&](int64_t group, int64_t n, int64_t first, int64_t last) {
    int64_t columns = smaller(kPanel, s.outputs - n);
    auto* panel = static_cast<Element<Pairs>*>(scratch(4 * (depth * (kPanel + kRows) + kRows * kWidth)));
    alignas(64) float masked_bias[kPanel] = {};
    if (bias) {
      const int32_t* bits = s.bias_bits + s.task_ids[group] * s.bias_bits_task_stride;
      for (int64_t j = 0; j < columns; ++j)
        if (bits[(n + j) >> 5] >> ((n + j) & 31) & 1) masked_bias[j] = bias[n + j];
    }
    pack_transposed<Pairs>(weight_of(s, weight, group), n, columns, s.inputs, panel);
    int64_t row = group * s.rows + first;
    rows_times_panel<Pairs>(x + row * s.inputs, nullptr, last - first, s.inputs, panel,
                            panel + depth * kPanel, bias ? masked_bias : nullptr, relu,
                            y + row * s.outputs + n, s.outputs, columns);
  });
}

template <bool Pairs>
void input_gradient(const harmodt_linear& s, const float* dy, const float* y, const float* weight,
                    float* dx, int threads) {
  int64_t depth = depth_of<Pairs>(s.outputs);
  for_panels(s, s.inputs, threads, [&](int64_t group, int64_t k, int64_t first, int64_t last) {
    auto* panel = static_cast<Element<Pairs>*>(scratch(4 * (depth * (kPanel + kRows) + kRows * kWidth)));
    pack_straight<Pairs>(weight_of(s, weight, group), k, s.inputs, s.outputs, panel);
    int64_t row = group * s.rows + first;
    rows_times_panel<Pairs>(dy + row * s.outputs, y ? y + row * s.outputs : nullptr, last - first,
                            s.outputs, panel, panel + depth * kPanel, nullptr, false,
                            dx + row * s.inputs + k, s.inputs, smaller(kPanel, s.inputs - k));
  });
}

// packed[d][j] = left[d][first + j]: some columns of a matrix, along its rows as depth.
template <bool Pairs>
void pack_columns(const float* left, const float* y, int64_t stride, int64_t rows, int64_t columns,
                  int64_t width, Element<Pairs>* packed) {
  for (int64_t d = 0; d < depth_of<Pairs>(rows); ++d)
    for (int64_t j = 0; j < width; j += kWidth) {
      auto row = [&](int64_t r) {
        return r < rows ? of_gradient(left + r * stride, y ? y + r * stride : nullptr, j, columns)
                        : Vec{};
      };
      if constexpr (Pairs) {
        store(packed + d * width + j, pair_bf16(row(2 * d), row(2 * d + 1)));
      } else {
        store(packed + d * width + j, row(d));
      }
    }
}

// Sums over the rows of dy, masked, added to or put into out.
void bias_gradient(const float* dy, const float* y, int64_t rows, int64_t stride, int64_t first,
                   int64_t columns, const int32_t* bits, bool add, float* out) {
  constexpr int kSums = 8;  // independent, for speed and smaller errors
  for (int64_t j = 0; j < columns; j += kWidth) {
    Vec sums[kSums] = {};
    for (int64_t r = 0; r < rows; ++r)
      sums[r % kSums] += of_gradient(dy + r * stride, y ? y + r * stride : nullptr, j, columns);
    for (int half = kSums / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    Vec total = sums[0];
    for (int64_t i = j; i < smaller(columns, j + kWidth); ++i) {
      bool kept = bits[(first + i) >> 5] >> ((first + i) & 31) & 1;
      out[i] = (add ? out[i] : 0) + (kept ? total[i - j] : 0);
    }
  }
}

template <bool Pairs>
void weight_gradient(const harmodt_linear& s, const float* dy, const float* y, const float* x,
                     const harmodt_weight_gradient& out, int threads) {
  int64_t depth = depth_of<Pairs>(s.rows);
  int64_t blocks = (s.outputs + kRows - 1) / kRows;
  constexpr int64_t strip_stride = (kStrip + kWidth - 1) / kWidth * kWidth;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    int64_t from = blocks * part / threads * kRows;
    int64_t to = smaller(s.outputs, blocks * (part + 1) / threads * kRows);
    auto* panel = static_cast<Element<Pairs>*>(scratch(4 * depth * (kPanel + strip_stride)));
    auto* strip = panel + depth * kPanel;
    for (int64_t group = 0; group < s.groups; ++group) {
      const int32_t* bits = s.weight_bits + s.task_ids[group] * s.weight_bits_task_stride;
      bool add = group > 0 && !out.per_group;
      float* d_weight = out.weight + (out.per_group ? group * out.weight_group_stride : 0);
      for (int64_t n0 = from; n0 < to; n0 += kStrip) {
        int64_t height = smaller(kStrip, to - n0);
        const float* left = dy + group * s.rows * s.outputs + n0;
        const float* left_y = y ? y + group * s.rows * s.outputs + n0 : nullptr;
        pack_columns<Pairs>(left, left_y, s.outputs, s.rows, height, strip_stride, strip);
        if (out.bias)
          bias_gradient(left, left_y, s.rows, s.outputs, n0, height,
                        s.bias_bits + s.task_ids[group] * s.bias_bits_task_stride, add,
                        out.bias + (out.per_group ? group * out.bias_group_stride : 0) + n0);
        for (int64_t k = 0; k < s.inputs; k += kPanel) {
          int64_t columns = smaller(kPanel, s.inputs - k);
          const float* right = x + group * s.rows * s.inputs + k;
          const Element<Pairs>* packed = panel;
          int64_t packed_stride = kPanel;
          if constexpr (Pairs) {
            pack_columns<true>(right, nullptr, s.inputs, s.rows, columns, kPanel, panel);
          } else if (columns < kPanel) {
            pack_columns<false>(right, nullptr, s.inputs, s.rows, columns, kPanel, panel);
          } else {
            packed = right;
            packed_stride = s.inputs;
          }
          for (int64_t n = 0; n < height; n += kRows)
            with_rows(smaller(kRows, height - n), [&](auto count) {
              Vec total[count.value][kPanelVecs];
              multiply<count.value>(strip + n, 1, strip_stride, packed, packed_stride, depth,
                                    total);
              for (int i = 0; i < count.value; ++i) {
                const int32_t* row_bits = bits + (n0 + n + i) * s.weight_bits_row_stride;
                float* row = d_weight + (n0 + n + i) * out.weight_row_stride + k;
                for (int j = 0; j < kPanelVecs; ++j) {
                  uint32_t inside = lanes_left(columns - j * kWidth);
                  if (!inside) continue;
                  Vec v = keep(total[i][j], bits_at(row_bits, k + j * kWidth));
                  if (add) v += load(row + j * kWidth, inside);
                  store(row + j * kWidth, v, inside);
                }
              }
            });
        }
      }
    }
  }
}

}  // namespace
