// Matrix products in bfloat16, by tile registers (16 times the products per clock of float vectors)
// or by vectors (twice).
//
// A lies in tiles [rows / 16][depth / 32], B in tiles [depth / 32][columns / 16], of which a row is
// two rows of the matrix side by side. Of registers, four tiles of sums share two of A and two of
// B; a vector is a row of a tile of B, and 16 of sums share broadcast pairs of A.
#include <algorithm>
#include <cstring>

#include "common/gemm_bf16_tiles.h"
#include "common/simd.h"
#include "common/tiles.h"

#if defined(MAFNET_HAS_TILES)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own headers
#endif

namespace mafnet {
int64_t bf16_elements(int lines, int depth) {
  const int64_t tiles = (lines + kPackedRows - 1) / kPackedRows;
  return tiles * kPackedRows * kPackedDepth * depth_tiles(depth);
}

void pad_bf16_rows(int rows, int depth, uint16_t* packed) {
  const PackedColumn end = packed_column(depth);
  if (end.room == kPackedDepth) return;
  const int64_t next = bf16_elements(kPackedRows, depth);
  for (int r = 0; r < rows; ++r) {
    uint16_t* row = packed + r / kPackedRows * next + r % kPackedRows * kPackedDepth;
    std::fill_n(row + end.at, end.room, uint16_t{0});
  }
}

#if defined(MAFNET_HAS_BF16)

namespace {

MAFNET_TARGET_BF16 MAFNET_INLINE __m512 load_some(const float* from, int count) {
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1, from);
}

// 16 elements, or zeros, each in the lower half of a lane.
MAFNET_TARGET_BF16 MAFNET_INLINE __m512i load_halves(const torch::headeronly::BFloat16* from,
                                                     bool there) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there ? 0xffff : 0, from));
}

MAFNET_TARGET_BF16 void multiply_by_vectors(const uint16_t* a, const uint16_t* b, int rows,
                                            int depth, int columns, float* c, int64_t c_row,
                                            bool add) {
  NothingBeside beside;
  multiply_bf16_by_vectors(a, b, rows, depth, columns, c, c_row, add, beside);
}

#if defined(MAFNET_HAS_TILES)

// Two or one tiles of rows and of columns: sums are tiles 0 .. 3, A is 4 and 5, B is 6 and 7.
template <int kRows, int kColumns>
MAFNET_TARGET_TILES void multiply_block(const uint16_t* a, int64_t a_next, const uint16_t* b,
                                        int64_t b_step, int depth, float* c, int64_t c_row,
                                        bool add) {
  const int64_t c_bytes = c_row * 4;
  float* lower = c + kPackedRows * c_row;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kRows == 2) _tile_loadd(2, lower, c_bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  for (int t = 0; t < depth; ++t) {
    _tile_loadd(4, a + t * kPackedTile, 64);
    _tile_loadd(6, b + t * b_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + t * b_step + kPackedTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + t * kPackedTile + a_next, 64);
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
  const int64_t a_next = int64_t{deep} * kPackedTile, b_step = int64_t{columns} * kPackedDepth;
  for (int m = 0; m < rows; m += 2 * kPackedRows) {
    for (int n = 0; n < columns; n += 2 * kPackedRows) {
      const bool tall = m + kPackedRows < rows, wide = n + kPackedRows < columns;
      const auto multiply = tall ? (wide ? multiply_block<2, 2> : multiply_block<2, 1>)
                                 : (wide ? multiply_block<1, 2> : multiply_block<1, 1>);
      multiply(a + m / kPackedRows * a_next, a_next, b + n * kPackedDepth, b_step, deep,
               c + m * c_row + n, c_row, add);
    }
  }
  close_tiles();
}

#endif

}  // namespace

MAFNET_TARGET_BF16 void pack_bf16_rows(const float* a, int64_t a_row, int rows, int depth,
                                       uint16_t* packed) {
  const int64_t next = int64_t{depth_tiles(depth)} * kPackedTile;
  for (int r = 0; r < rows; ++r) {
    const float* from = a + r * a_row;
    uint16_t* to = packed + r / kPackedRows * next + r % kPackedRows * kPackedDepth;
    for (int k = 0; k < depth; k += kPackedDepth, to += kPackedTile) {
      const __m512 low = load_some(from + k, depth - k);
      const __m512 high = load_some(from + k + 16, depth - k - 16);
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(to, &rounded, sizeof(rounded));
    }
  }
}

MAFNET_TARGET_BF16 void pack_bf16_rows(const torch::headeronly::BFloat16* a, int64_t a_row,
                                       int rows, int depth, uint16_t* packed) {
  const int64_t next = int64_t{depth_tiles(depth)} * kPackedTile;
  for (int r = 0; r < rows; ++r) {
    const auto* from = a + r * a_row;
    uint16_t* to = packed + r / kPackedRows * next + r % kPackedRows * kPackedDepth;
    for (int k = 0; k < depth; k += kPackedDepth, to += kPackedTile) {
      const int left = depth - k;
      const uint32_t there = left >= kPackedDepth ? ~0u : (1u << left) - 1;
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, from + k));
    }
  }
}

MAFNET_TARGET_BF16 void pack_bf16_columns(const float* b, int64_t b_row, int depth, int columns,
                                          uint16_t* packed) {
  const int64_t step = int64_t{columns} * kPackedDepth;
  for (int k = 0; k < depth_tiles(depth) * kPackedDepth; k += 2) {
    uint16_t* to = packed + k / kPackedDepth * step + k % kPackedDepth / 2 * kPackedDepth;
    for (int n = 0; n < columns; n += kPackedRows, to += kPackedTile) {
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
  const int64_t step = int64_t{columns} * kPackedDepth;
  for (int k = 0; k < depth_tiles(depth) * kPackedDepth; k += 2) {
    uint16_t* to = packed + k / kPackedDepth * step + k % kPackedDepth / 2 * kPackedDepth;
    for (int n = 0; n < columns; n += kPackedRows, to += kPackedTile) {
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
