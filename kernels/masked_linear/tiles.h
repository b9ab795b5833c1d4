// Products of bf16 on AMX matrix units, if the including file is compiled for them.
#pragma once

#include "native/simd.h"

namespace {

// A tile register has 16 rows of 64 bytes. Four tiles, 2 x 2, hold the sums of a product.
constexpr int64_t kTileDepth = 16, kTileRows = 32;

#if defined(__AMX_BF16__)

// Whether matrix units compute the products.
template <bool Pairs>
constexpr bool kTiles = Pairs;

// Sets the shapes of the calling thread's tiles, which must happen before their first use. The
// destructor releases the tiles.
template <bool Pairs>
struct TileConfiguration {
  TileConfiguration() {
    if constexpr (!Pairs) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" : : "m"(shapes));  // GCC's intrinsic would read only 8 bytes of it
  }
  ~TileConfiguration() {
    if constexpr (Pairs) _tile_release();
  }
};

// total[i] = sum over d of left[i * left_stride + d] * panel[d][...]. Elements are pairs of bf16. There
// are 32 rows and a panel of 64 columns, and depth is a multiple of kTileDepth.
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

// Multiplies tiles of zeros, four products per repeat.
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
  TileConfiguration() {}  // without a constructor, GCC warns that its variables are unused
};

#endif

}  // namespace
