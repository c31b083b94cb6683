// The products of tiles.h by vectors, with other work beside: what multiplications leave of the
// processor, its additions, loads and integers, serves the weights and largest scores of others.
#pragma once

#include "self_attention/tiles.h"

#if defined(MAFNET_HAS_BF16)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "common/gemm_tiles.h"

namespace mafnet {

// Factors along the depth for which there is one step beside.
constexpr int kFactorsPerStep = 8;

// Half the rows of a tile, 8, and kColumns tiles: 16 sums of 2 tiles take 10 loads, those of a
// whole tile would take 17 and leave none to what is beside. A row of a tile of B is a vector, a
// pair of factors of A is broadcast. `next` are the factors of A that are fetched from the second
// cache.
template <int kColumns, typename Beside>
MAFNET_TARGET_BF16 MAFNET_INLINE void multiply_half_tiles(const TileMatrix& a, const uint16_t* next,
                                                          const TileMatrix& b, const Steps& steps,
                                                          float* c, int64_t c_column, bool add,
                                                          Beside& beside) {
  constexpr int kRows = kTile / 2;
  __m512 sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kColumns; ++n) {
      sums[r][n] = add ? _mm512_load_ps(c + r * kTile + n * c_column) : _mm512_setzero_ps();
    }
  }
  for (int s = 0; s < steps.count; ++s) {
    const uint16_t* left = a.data + steps.list[s].a * a.step;
    const uint16_t* right = b.data + steps.list[s].b * b.step;
    const int factors = std::min(steps.factors - s * kTileDepth, kTileDepth);
    for (int k = 0; k < factors; k += kFactorsPerStep) {
#pragma GCC unroll 4
      for (int i = 0; i < kFactorsPerStep; i += 2) {
        __m512bh line[kColumns];
#pragma GCC unroll 2
        for (int n = 0; n < kColumns; ++n) {
          line[n] = (__m512bh)_mm512_load_si512(right + n * b.along + i / 2 * kTileDepth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int pair;
          std::memcpy(&pair, left + r * kTileDepth + i, sizeof(pair));
#pragma GCC unroll 2
          for (int n = 0; n < kColumns; ++n) {
            sums[r][n] = _mm512_dpbf16_ps(sums[r][n], (__m512bh)_mm512_set1_epi32(pair), line[n]);
          }
        }
      }
      for (int i = 0; i < kRows * kTileDepth; i += kTileDepth * kTileDepth / kFactorsPerStep) {
        const uint16_t* line =
            next + steps.list[s].a * a.step + i + k / kFactorsPerStep * kTileDepth;
        _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
      }
      left += kFactorsPerStep;
      right += kFactorsPerStep / 2 * kTileDepth;
      beside.step();
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kColumns; ++n) {
      _mm512_store_ps(c + r * kTile + n * c_column, sums[r][n]);
    }
  }
}

// multiply_tiles with a step of `beside` for every half tile, or two of them, and kFactorsPerStep.
template <typename Beside>
MAFNET_TARGET_BF16 void multiply_tiles_beside(const TileMatrix& a, const TileMatrix& b,
                                              const Steps& steps, int rows, int columns,
                                              const TileSums& c, bool add, Beside& beside) {
  for (int n = 0; n < columns; n += 2) {
    const TileMatrix right{b.data + n * b.along, b.along, b.step};
    for (int m = 0; m < rows; ++m) {
      for (int half = 0; half < 2; ++half) {
        const TileMatrix left{a.data + m * a.along + half * kTileFactors / 2, a.along, a.step};
        const uint16_t* next =
            half == 0 ? left.data + kTileFactors / 2 : a.data + (m + 1) * a.along;
        float* sums = c.data + m * c.row + n * c.column + half * kTileSums / 2;
        if (n + 1 < columns) {
          multiply_half_tiles<2>(left, next, right, steps, sums, c.column, add, beside);
        } else {
          multiply_half_tiles<1>(left, next, right, steps, sums, c.column, add, beside);
        }
      }
    }
  }
}

}  // namespace mafnet

#endif
