// Matrix products in bfloat16, by tile registers (16 times the products per clock of float vectors)
// or by vectors (twice).
//
// A lies in tiles [rows / 16][depth / 32], B in tiles [depth / 32][columns / 16], of which a row is
// two rows of the matrix side by side. Of registers, four tiles of sums share two of A and two of
// B; a vector is a row of a tile of B, and 16 of sums share broadcast pairs of A.
#include <algorithm>
#include <cstring>

#include "common/gemm_bf16.h"
#include "common/simd.h"
#include "common/tiles.h"

#if defined(MAFNET_HAS_TILES)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own headers
#endif

namespace mafnet {
namespace {

// A tile is 16 rows of 64 bytes: 16 sums, or 32 factors.
constexpr int kTileRows = kPackedRows, kTileDepth = kPackedDepth;

int depth_tiles(int depth) { return (depth + kTileDepth - 1) / kTileDepth; }

}  // namespace

int64_t bf16_elements(int lines, int depth) {
  const int64_t tiles = (lines + kTileRows - 1) / kTileRows;
  return tiles * kTileRows * kTileDepth * depth_tiles(depth);
}

void pad_bf16_rows(int rows, int depth, uint16_t* packed) {
  const PackedColumn end = packed_column(depth);
  if (end.room == kTileDepth) return;
  const int64_t next = bf16_elements(kTileRows, depth);
  for (int r = 0; r < rows; ++r) {
    uint16_t* row = packed + r / kTileRows * next + r % kTileRows * kTileDepth;
    std::fill_n(row + end.at, end.room, uint16_t{0});
  }
}

#if defined(MAFNET_HAS_BF16)

namespace {

constexpr int kTile = kTileRows * kTileDepth;

MAFNET_TARGET_BF16 MAFNET_INLINE __m512 load_some(const float* from, int count) {
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1, from);
}

// 16 elements, or zeros, each in the lower half of a lane.
MAFNET_TARGET_BF16 MAFNET_INLINE __m512i load_halves(const torch::headeronly::BFloat16* from,
                                                     bool there) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there ? 0xffff : 0, from));
}

// kRows rows, which divide those of a tile, and kVectors tiles of columns.
template <int kRows, int kVectors>
MAFNET_TARGET_BF16 void multiply_vectors(const uint16_t* a, const uint16_t* b, int64_t b_step,
                                         int depth, float* c, int64_t c_row, bool add) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = add ? _mm512_loadu_ps(c + r * c_row + v * 16) : _mm512_setzero_ps();
    }
  }
  for (; depth > 0; depth -= kTileDepth, a += kTile, b += b_step) {
    for (int k = 0; k < std::min(depth, kTileDepth); k += 2) {
      __m512bh right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = (__m512bh)_mm512_loadu_si512(b + v * kTile + k / 2 * kTileDepth);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int pair;
        std::memcpy(&pair, a + r * kTileDepth + k, sizeof(pair));
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * c_row + v * 16, sums[r][v]);
  }
}

template <int kRows, int kVectors>
void multiply_panel(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_step, int rows,
                    int depth, float* c, int64_t c_row, bool add) {
  for (int m = 0; m < rows; m += kRows) {
    const uint16_t* from = a + m / kTileRows * a_next + m % kTileRows * kTileDepth;
    multiply_vectors<kRows, kVectors>(from, b, b_step, depth, c + m * c_row, c_row, add);
  }
}

void multiply_by_vectors(const uint16_t* a, const uint16_t* b, int rows, int depth, int columns,
                         float* c, int64_t c_row, bool add) {
  const int64_t a_next = int64_t{depth_tiles(depth)} * kTile;
  const int64_t b_step = int64_t{columns} * kTileDepth;
  for (int n = 0, vectors = 0; n < columns; n += vectors * 16) {
    const int left = (columns - n) / 16;
    vectors = left >= 4 ? 4 : left;
    const auto multiply = vectors == 4   ? multiply_panel<4, 4>
                          : vectors == 3 ? multiply_panel<8, 3>
                          : vectors == 2 ? multiply_panel<8, 2>
                                         : multiply_panel<16, 1>;
    multiply(a, a_next, b + n * kTileDepth, b_step, rows, depth, c + n, c_row, add);
  }
}

#if defined(MAFNET_HAS_TILES)

// Two or one tiles of rows and of columns: sums are tiles 0 .. 3, A is 4 and 5, B is 6 and 7.
template <int kRows, int kColumns>
MAFNET_TARGET_TILES void multiply_block(const uint16_t* a, int64_t a_next, const uint16_t* b,
                                        int64_t b_step, int depth, float* c, int64_t c_row,
                                        bool add) {
  const int64_t c_bytes = c_row * 4;
  float* lower = c + kTileRows * c_row;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kRows == 2) _tile_loadd(2, lower, c_bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int t = 0; t < depth; ++t) {
    _tile_loadd(4, a + t * kTile, 64);
    _tile_loadd(6, b + t * b_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + t * b_step + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + t * kTile + a_next, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kRows == 2) _tile_stored(2, lower, c_bytes);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, lower + 16, c_bytes);
}

MAFNET_TARGET_TILES void multiply_by_tiles(const uint16_t* a, const uint16_t* b, int rows,
                                           int depth, int columns, float* c, int64_t c_row,
                                           bool add) {
  open_tiles();
  const int deep = depth_tiles(depth);
  const int64_t a_next = int64_t{deep} * kTile, b_step = int64_t{columns} * kTileDepth;
  for (int m = 0; m < rows; m += 2 * kTileRows) {
    for (int n = 0; n < columns; n += 2 * kTileRows) {
      const bool tall = m + kTileRows < rows, wide = n + kTileRows < columns;
      const auto multiply = tall ? (wide ? multiply_block<2, 2> : multiply_block<2, 1>)
                                 : (wide ? multiply_block<1, 2> : multiply_block<1, 1>);
      multiply(a + m / kTileRows * a_next, a_next, b + n * kTileDepth, b_step, deep,
               c + m * c_row + n, c_row, add);
    }
  }
  close_tiles();
}

#endif

}  // namespace

MAFNET_TARGET_BF16 void pack_bf16_rows(const float* a, int64_t a_row, int rows, int depth,
                                       uint16_t* packed) {
  const int64_t next = int64_t{depth_tiles(depth)} * kTile;
  for (int r = 0; r < rows; ++r) {
    const float* from = a + r * a_row;
    uint16_t* to = packed + r / kTileRows * next + r % kTileRows * kTileDepth;
    for (int k = 0; k < depth; k += kTileDepth, to += kTile) {
      const __m512 low = load_some(from + k, depth - k);
      const __m512 high = load_some(from + k + 16, depth - k - 16);
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(to, &rounded, sizeof(rounded));
    }
  }
}

MAFNET_TARGET_BF16 void pack_bf16_rows(const torch::headeronly::BFloat16* a, int64_t a_row,
                                       int rows, int depth, uint16_t* packed) {
  const int64_t next = int64_t{depth_tiles(depth)} * kTile;
  for (int r = 0; r < rows; ++r) {
    const auto* from = a + r * a_row;
    uint16_t* to = packed + r / kTileRows * next + r % kTileRows * kTileDepth;
    for (int k = 0; k < depth; k += kTileDepth, to += kTile) {
      const int left = depth - k;
      const uint32_t there = left >= kTileDepth ? ~0u : (1u << left) - 1;
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, from + k));
    }
  }
}

MAFNET_TARGET_BF16 void pack_bf16_columns(const float* b, int64_t b_row, int depth, int columns,
                                          uint16_t* packed) {
  const int64_t step = int64_t{columns} * kTileDepth;
  for (int k = 0; k < depth_tiles(depth) * kTileDepth; k += 2) {
    uint16_t* to = packed + k / kTileDepth * step + k % kTileDepth / 2 * kTileDepth;
    for (int n = 0; n < columns; n += kTileRows, to += kTile) {
      const float* from = b + k * b_row + n;
      const __m512 upper = load_some(from, k < depth ? 16 : 0);
      const __m512 lower = load_some(from + b_row, k + 1 < depth ? 16 : 0);
      const __m512bh rounded = _mm512_cvtne2ps_pbh(lower, upper);
      __m512i rows;  // one after the other, to be interleaved
      std::memcpy(&rows, &rounded, sizeof(rows));
      const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rows));
      const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rows, 1));
      _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

MAFNET_TARGET_BF16 void pack_bf16_columns(const torch::headeronly::BFloat16* b, int64_t b_row,
                                          int depth, int columns, uint16_t* packed) {
  const int64_t step = int64_t{columns} * kTileDepth;
  for (int k = 0; k < depth_tiles(depth) * kTileDepth; k += 2) {
    uint16_t* to = packed + k / kTileDepth * step + k % kTileDepth / 2 * kTileDepth;
    for (int n = 0; n < columns; n += kTileRows, to += kTile) {
      const auto* from = b + k * b_row + n;
      const __m512i first = load_halves(from, k < depth);
      const __m512i second = load_halves(from + b_row, k + 1 < depth);
      _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

void multiply_bf16(const uint16_t* a, const uint16_t* b, int rows, int depth, int columns, float* c,
                   int64_t c_row, bool add) {
#if defined(MAFNET_HAS_TILES)
  if (simd_level() >= SimdLevel::kAmx)
    return multiply_by_tiles(a, b, rows, depth, columns, c, c_row, add);
#endif
  multiply_by_vectors(a, b, rows, depth, columns, c, c_row, add);
}

#else

void pack_bf16_rows(const float*, int64_t, int, int, uint16_t*) {}
void pack_bf16_rows(const torch::headeronly::BFloat16*, int64_t, int, int, uint16_t*) {}
void pack_bf16_columns(const float*, int64_t, int, int, uint16_t*) {}
void pack_bf16_columns(const torch::headeronly::BFloat16*, int64_t, int, int, uint16_t*) {}
void multiply_bf16(const uint16_t*, const uint16_t*, int, int, int, float*, int64_t, bool) {}

#endif

}  // namespace mafnet
