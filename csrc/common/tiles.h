// Instructions for bfloat16: by vectors (AVX512-BF16), and by tile registers (AMX), which are eight
// of 16 rows of 64 bytes, and products of two.
#pragma once

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define MAFNET_HAS_BF16 1

#include <immintrin.h>

#define MAFNET_TARGET_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#endif

#if defined(MAFNET_HAS_BF16) && defined(__linux__)
#define MAFNET_HAS_TILES 1

#include <cstdint>

#define MAFNET_TARGET_TILES \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma")))

namespace mafnet {

// The layout that the processor wants.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Takes the tile registers, all of full size, until close_tiles.
MAFNET_TARGET_TILES inline void open_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  // GCC 12 takes the instruction to read 8 bytes, and would leave the others unwritten.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

MAFNET_TARGET_TILES inline void close_tiles() { _tile_release(); }

}  // namespace mafnet

#endif
