// Products of bf16 on matrix units: AMX, where the including file is compiled for it.
#pragma once

#include "native/simd.h"

namespace {

// A tile has 16 rows of 64 bytes; four of them are summed up at a time, 2 x 2.
constexpr int64_t kTileDepth = 16, kTileRows = 32;

#if defined(__AMX_BF16__)

// Whether products are computed on matrix units.
template <bool Pairs>
constexpr bool kTiles = Pairs;

// The calling thread's tiles for as long as this lives. Whoever uses tiles sets their shapes first.
template <bool Pairs>
struct TileConfiguration {
  TileConfiguration() {
    if constexpr (!Pairs) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" : : "m"(shapes));  // GCC's intrinsic reads its first 8 bytes alone
  }
  ~TileConfiguration() {
    if constexpr (Pairs) _tile_release();
  }
};

// total[i] = sum over d of left[i * left_stride + d] * panel[d][...], pairs of bf16: 32 rows, and a
// panel of 64 columns whose depth is a multiple of kTileDepth.
__attribute__((noinline)) void multiply_tiles(const int32_t* left, int64_t left_stride,
                                              const int32_t* panel, int64_t depth, Vec (*total)[4]) {
  constexpr int64_t panel_bytes = 4 * 64;
  const int32_t* lower = left + 16 * left_stride;
  asm volatile("" : : : "memory");  // GCC does not know that a tile's load reads memory
  for (int half = 0; half < 2; ++half) {
    const int32_t* right = panel + 32 * half;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += kTileDepth) {
      _tile_loadd(4, left + d, 4 * left_stride);
      _tile_loadd(6, right + d * 64, panel_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + d * 64 + 16, panel_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lower + d, 4 * left_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &total[0][2 * half], panel_bytes);
    _tile_stored(1, &total[0][2 * half + 1], panel_bytes);
    _tile_stored(2, &total[16][2 * half], panel_bytes);
    _tile_stored(3, &total[16][2 * half + 1], panel_bytes);
  }
}

// Four products of tiles at a time, of zeros.
inline void multiply_empty_tiles(int64_t repeats) {
  TileConfiguration<true> configuration;
  for (int64_t r = 0; r < repeats; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

#else

template <bool Pairs>
constexpr bool kTiles = false;

inline void multiply_empty_tiles(int64_t) {}

template <bool Pairs>
struct TileConfiguration {
  TileConfiguration() {}  // unlike an aggregate, no variable of it is unused
};

#endif

}  // namespace
