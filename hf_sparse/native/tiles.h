// Tile registers of the matrix extensions (AMX), or the same operations in plain C++ so that the kernels can be tested elsewhere.
//
// The compiler's intrinsics do not say which memory they read (gcc 12), so it may drop or move the stores before them; every
// operation here is therefore preceded by a barrier.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(HF_SPARSE_EMULATE_TILES)
#include <immintrin.h>
#endif

#include "layout.h"

namespace hf_sparse {
namespace {

struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64, "the processor reads 64 bytes");

#if defined(HF_SPARSE_EMULATE_TILES)

struct Tile {
  uint8_t bytes[16][64];
};
static thread_local Tile tiles[8];
static thread_local TileConfiguration tile_configuration;

static inline void tile_configure(const TileConfiguration& configuration) { tile_configuration = configuration; }
static inline void tile_release() { tile_configuration = TileConfiguration{}; }
static inline void tile_load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < tile_configuration.rows[tile]; ++row) {
    std::memcpy(tiles[tile].bytes[row], static_cast<const uint8_t*>(from) + row * stride, tile_configuration.row_bytes[tile]);
  }
}
static inline void tile_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tile_configuration.rows[tile]; ++row) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile].bytes[row], tile_configuration.row_bytes[tile]);
  }
}
static inline void tile_zero(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }
static inline void tile_products(int sum, int left, int right) {
  float sums[16];
  uint16_t inputs[32], weights[32];
  for (int row = 0; row < tile_configuration.rows[sum]; ++row) {
    std::memcpy(sums, tiles[sum].bytes[row], sizeof sums);
    std::memcpy(inputs, tiles[left].bytes[row], sizeof inputs);
    for (int pair = 0; pair < 16; ++pair) {
      std::memcpy(weights, tiles[right].bytes[pair], sizeof weights);
      for (int i = 0; i < 16; ++i) {
        sums[i] += widen(inputs[2 * pair]) * widen(weights[2 * i]) + widen(inputs[2 * pair + 1]) * widen(weights[2 * i + 1]);
      }
    }
    std::memcpy(tiles[sum].bytes[row], sums, sizeof sums);
  }
}
#define TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define TILE_ZERO(tile) tile_zero(tile)
#define TILE_PRODUCTS(sum, left, right) tile_products(sum, left, right)

#else

#define TILE_BARRIER() __asm__ volatile("" ::: "memory")
static inline void tile_configure(const TileConfiguration& configuration) {
  TILE_BARRIER();
  _tile_loadconfig(&configuration);
}
static inline void tile_release() { _tile_release(); }
#define TILE_LOAD(tile, from, stride)   \
  do {                                  \
    TILE_BARRIER();                     \
    _tile_loadd(tile, from, stride);    \
  } while (false)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_PRODUCTS(sum, left, right) _tile_dpbf16ps(sum, left, right)

#endif

}  // namespace
}  // namespace hf_sparse
