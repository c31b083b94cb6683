// The products of common/gemm_bf16.h by vectors: tiles of sums in registers.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/gemm_bf16.h"
#include "common/gemm_tiles.h"
#include "common/tiles.h"

namespace mafnet {

// A tile is 16 rows of 64 bytes: 16 sums, or 32 factors.
constexpr int kPackedTile = kPackedRows * kPackedDepth;

inline int depth_tiles(int depth) { return (depth + kPackedDepth - 1) / kPackedDepth; }

#if defined(MAFNET_HAS_BF16)

// kRows rows, which divide those of a tile, and kVectors tiles of columns.
template <int kRows, int kVectors, typename Beside>
MAFNET_TARGET_BF16 MAFNET_INLINE void multiply_vectors(const uint16_t* a, const uint16_t* b,
                                                       int64_t b_step, int depth, float* c,
                                                       int64_t c_row, bool add, Beside& beside) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = add ? _mm512_loadu_ps(c + r * c_row + v * 16) : _mm512_setzero_ps();
    }
  }
  for (; depth > 0; depth -= kPackedDepth, a += kPackedTile, b += b_step) {
    for (int k = 0; k < std::min(depth, kPackedDepth); k += 2) {
      __m512bh right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = (__m512bh)_mm512_loadu_si512(b + v * kPackedTile + k / 2 * kPackedDepth);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int pair;
        std::memcpy(&pair, a + r * kPackedDepth + k, sizeof(pair));
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
      }
      beside.step();
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * c_row + v * 16, sums[r][v]);
  }
}

template <int kRows, int kVectors, typename Beside>
MAFNET_TARGET_BF16 MAFNET_INLINE void multiply_bf16_panel(const uint16_t* a, int64_t a_next,
                                                          const uint16_t* b, int64_t b_step,
                                                          int rows, int depth, float* c,
                                                          int64_t c_row, bool add, Beside& beside) {
  for (int m = 0; m < rows; m += kRows) {
    const uint16_t* from = a + m / kPackedRows * a_next + m % kPackedRows * kPackedDepth;
    multiply_vectors<kRows, kVectors>(from, b, b_step, depth, c + m * c_row, c_row, add, beside);
  }
}

// multiply_bf16 by vectors, with a step beside for every tile of sums and two factors of depth.
template <typename Beside>
MAFNET_TARGET_BF16 MAFNET_INLINE void multiply_bf16_by_vectors(const uint16_t* a, const uint16_t* b,
                                                               int rows, int depth, int columns,
                                                               float* c, int64_t c_row, bool add,
                                                               Beside& beside) {
  const int64_t a_next = int64_t{depth_tiles(depth)} * kPackedTile;
  const int64_t b_step = int64_t{columns} * kPackedDepth;
  int n = 0;
  for (; n + 64 <= columns; n += 64) {
    multiply_bf16_panel<4, 4>(a, a_next, b + n * kPackedDepth, b_step, rows, depth, c + n, c_row,
                              add, beside);
  }
  const int left = (columns - n) / 16;
  const uint16_t* b_left = b + n * kPackedDepth;
  if (left == 3)
    multiply_bf16_panel<8, 3>(a, a_next, b_left, b_step, rows, depth, c + n, c_row, add, beside);
  if (left == 2)
    multiply_bf16_panel<8, 2>(a, a_next, b_left, b_step, rows, depth, c + n, c_row, add, beside);
  if (left == 1)
    multiply_bf16_panel<16, 1>(a, a_next, b_left, b_step, rows, depth, c + n, c_row, add, beside);
}

#endif

}  // namespace mafnet
