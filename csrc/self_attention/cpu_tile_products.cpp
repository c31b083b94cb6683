// Tiles of bfloat16: packing and products, by tile registers or by vectors.
#include "self_attention/tiles.h"

#if defined(MAFNET_HAS_BF16)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "common/simd.h"

namespace mafnet {
namespace {

// Upper half of the bits of the piece-th part of x: each part takes the next 8 digits.
MAFNET_INLINE uint16_t piece_of(float x, int piece) {
  uint32_t bits;
  for (int i = 0;; ++i) {
    std::memcpy(&bits, &x, sizeof(bits));
    if (i == piece) return static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000;
    float part;
    std::memcpy(&part, &bits, sizeof(part));
    x -= part;
  }
}

// Calls body(i, piece) for `count` numbers, vectorized over them; one copy per piece.
template <typename Body>
MAFNET_INLINE void for_pieces(int piece, int count, const Body& body) {
  if (piece == 0) {
    for (int i = 0; i < count; ++i) body(i, 0);
  } else if (piece == 1) {
    for (int i = 0; i < count; ++i) body(i, 1);
  } else {
    for (int i = 0; i < count; ++i) body(i, 2);
  }
}

// Depths at .. at + depth of a row of A are `piece` of from.
MAFNET_INLINE void put_row(const float* from, int depth, int piece, int at, uint16_t* row) {
  for (int d = 0; d < depth;) {
    const int run = std::min(depth - d, kTileDepth - (at + d) % kTileDepth);
    uint16_t* to = row + (at + d) / kTileDepth * kTileFactors + (at + d) % kTileDepth;
    const float* source = from + d;
    for_pieces(piece, run,
               [&](int i, int p) MAFNET_INLINE_LAMBDA { to[i] = piece_of(source[i], p); });
    d += run;
  }
}

// Depth `at` of all columns of B is `piece` of from. Two depths of a column lie side by side: words
// of 32 bits, of which one half is replaced, are vectors, while every other number would be stored
// one by one.
MAFNET_INLINE void put_line(const float* from, int columns, int piece, int at, uint16_t* to) {
  const int across = columns / kTile;
  uint16_t* line =
      to + int64_t{at / kTileDepth} * across * kTileFactors + at % kTileDepth / 2 * kTileDepth;
  const int shift = at % 2 * 16;
  const uint32_t kept = 0xffff0000u >> shift;
  for (int n = 0; n < across; ++n) {
    uint32_t pairs[kTile];
    std::memcpy(pairs, line + n * kTileFactors, sizeof(pairs));
    for_pieces(piece, kTile, [&](int i, int p) MAFNET_INLINE_LAMBDA {
      const uint32_t bits = piece_of(from[n * kTile + i], p);
      pairs[i] = (pairs[i] & kept) | bits << shift;
    });
    std::memcpy(line + n * kTileFactors, pairs, sizeof(pairs));
  }
}

// One tile of sums: a row of a tile of B is a vector, a pair of factors of A is broadcast.
MAFNET_TARGET_BF16 void multiply_by_vectors(const TileMatrix& a, const TileMatrix& b,
                                            const Steps& steps, float* c, bool add) {
  __m512 sums[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    sums[r] = add ? _mm512_load_ps(c + r * kTile) : _mm512_setzero_ps();
  }
  for (int s = 0; s < steps.count; ++s) {
    const uint16_t* left = a.data + steps.list[s].a * a.step;
    const uint16_t* right = b.data + steps.list[s].b * b.step;
    const int factors = std::min(steps.factors - s * kTileDepth, kTileDepth);
    for (int k = 0; k < factors; k += 2, left += 2, right += kTileDepth) {
      const auto line = (__m512bh)_mm512_load_si512(right);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        int pair;
        std::memcpy(&pair, left + r * kTileDepth, sizeof(pair));
        sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(pair), line);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) _mm512_store_ps(c + r * kTile, sums[r]);
}

#if defined(MAFNET_HAS_TILES)

template <int kRows, int kColumns>  // 1 or 2 tiles
MAFNET_TARGET_TILES void multiply_block(const TileMatrix& a, const TileMatrix& b, const Step* steps,
                                        int count, const TileSums& c, bool add) {
  // Sums are tiles 0 .. 3, A is 4 and 5, B is 6 and 7.
  if (add) {
    _tile_loadd(0, c.data, 64);
    if constexpr (kColumns == 2) _tile_loadd(1, c.data + c.column, 64);
    if constexpr (kRows == 2) _tile_loadd(2, c.data + c.row, 64);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, c.data + c.row + c.column, 64);
  } else {
    _tile_zero(0);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  }
  int left = -1, right = -1;
  for (int s = 0; s < count; ++s) {
    // A load takes half as long as a product or more.
    if (steps[s].a != left) {
      left = steps[s].a;
      _tile_loadd(4, a.data + left * a.step, 64);
      if constexpr (kRows == 2) _tile_loadd(5, a.data + left * a.step + a.along, 64);
    }
    if (steps[s].b != right) {
      right = steps[s].b;
      _tile_loadd(6, b.data + right * b.step, 64);
      if constexpr (kColumns == 2) _tile_loadd(7, b.data + right * b.step + b.along, 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRows == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.data, 64);
  if constexpr (kColumns == 2) _tile_stored(1, c.data + c.column, 64);
  if constexpr (kRows == 2) _tile_stored(2, c.data + c.row, 64);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, c.data + c.row + c.column, 64);
}

void multiply_by_registers(const TileMatrix& a, const TileMatrix& b, const Steps& steps, int rows,
                           int columns, const TileSums& c, bool add) {
  for (int n = 0; n < columns; n += 2) {
    const TileMatrix right{b.data + n * b.along, b.along, b.step};
    for (int m = 0; m < rows; m += 2) {
      const TileMatrix left{a.data + m * a.along, a.along, a.step};
      const TileSums sums{c.data + m * c.row + n * c.column, c.row, c.column};
      if (m + 1 < rows) {
        if (n + 1 < columns) {
          multiply_block<2, 2>(left, right, steps.list, steps.count, sums, add);
        } else {
          multiply_block<2, 1>(left, right, steps.list, steps.count, sums, add);
        }
      } else if (n + 1 < columns) {
        multiply_block<1, 2>(left, right, steps.list, steps.count, sums, add);
      } else {
        multiply_block<1, 1>(left, right, steps.list, steps.count, sums, add);
      }
    }
  }
}

#endif

}  // namespace

std::vector<Step> piece_pairs(int pieces) {
  if (pieces == 1) return {{0, 0}};
  if (pieces == 2) return {{1, 1}, {0, 1}, {0, 0}, {1, 0}};
  return {{1, 1}, {0, 1}, {0, 2}, {0, 0}, {1, 0}, {2, 0}};
}

DepthPlan::DepthPlan(int depth, int pieces) {
  const std::vector<Step> pairs = piece_pairs(pieces);
  const auto tiles_of = [](int n) { return (n + kTileDepth - 1) / kTileDepth; };
  if (depth < kTileDepth) {
    for (const Step& pair : pairs) {
      a_pieces.push_back(pair.a);
      b_pieces.push_back(pair.b);
    }
    slot = depth;
    factors = depth * static_cast<int>(pairs.size());
    tiles = tiles_of(factors);
    for (int t = 0; t < tiles; ++t) steps.push_back({t, t});
  } else {
    for (int i = 0; i < pieces; ++i) {
      a_pieces.push_back(i);
      b_pieces.push_back(i);
    }
    const int each = tiles_of(depth);
    slot = each * kTileDepth;
    tiles = each * pieces;
    factors = pieces == 1 ? depth : kTileDepth * each * static_cast<int>(pairs.size());
    for (int t = 0; t < each; ++t) {
      for (const Step& pair : pairs) steps.push_back({pair.a * each + t, pair.b * each + t});
    }
  }
}

std::vector<Step> token_steps(int tiles, int pieces) {
  std::vector<Step> steps;
  for (int t = 0; t < tiles; ++t) {
    for (const Step& pair : piece_pairs(pieces)) {
      steps.push_back({t * pieces + pair.a, t * pieces + pair.b});
    }
  }
  return steps;
}

void pack_a(const float* from, int64_t stride, int rows, const DepthPlan& plan, int depth,
            uint16_t* to) {
  run_avx512([&]() MAFNET_INLINE_LAMBDA {
    for (int r = 0; r < rows; ++r) {
      uint16_t* row = to + int64_t{r / kTile} * plan.tiles * kTileFactors + r % kTile * kTileDepth;
      for (size_t s = 0; s < plan.a_pieces.size(); ++s) {
        put_row(from + r * stride, depth, plan.a_pieces[s], static_cast<int>(s) * plan.slot, row);
      }
    }
  });
}

void pack_b(const float* from, int64_t stride, int columns, const DepthPlan& plan, int depth,
            uint16_t* to) {
  run_avx512([&]() MAFNET_INLINE_LAMBDA {
    for (size_t s = 0; s < plan.b_pieces.size(); ++s) {
      for (int d = 0; d < depth; ++d) {
        const int at = static_cast<int>(s) * plan.slot + d;
        put_line(from + d * stride, columns, plan.b_pieces[s], at, to);
      }
    }
  });
}

void pack_a_tokens(const float* from, int64_t stride, int rows, int tokens, int pieces, int tiles,
                   uint16_t* to) {
  run_avx512([&]() MAFNET_INLINE_LAMBDA {
    for (int r = 0; r < rows; ++r) {
      uint16_t* row = to + int64_t{r / kTile} * tiles * kTileFactors + r % kTile * kTileDepth;
      for (int k = 0; k < tokens; k += kTileDepth) {
        for (int i = 0; i < pieces; ++i) {
          const int at = (k / kTileDepth * pieces + i) * kTileDepth;
          put_row(from + r * stride + k, std::min(kTileDepth, tokens - k), i, at, row);
        }
      }
    }
  });
}

void pack_b_tokens(const float* from, int64_t stride, int tokens, int columns, int pieces,
                   uint16_t* to) {
  run_avx512([&]() MAFNET_INLINE_LAMBDA {
    for (int k = 0; k < tokens; ++k) {
      for (int i = 0; i < pieces; ++i) {
        const int at = (k / kTileDepth * pieces + i) * kTileDepth + k % kTileDepth;
        put_line(from + k * stride, columns, i, at, to);
      }
    }
  });
}

TileRegisters::TileRegisters() {
#if defined(MAFNET_HAS_TILES)
  if (has_tile_registers()) open_tiles();
#endif
}

TileRegisters::~TileRegisters() {
#if defined(MAFNET_HAS_TILES)
  if (has_tile_registers()) close_tiles();
#endif
}

void multiply_tiles(const TileMatrix& a, const TileMatrix& b, const Steps& steps, int rows,
                    int columns, const TileSums& c, bool add) {
#if defined(MAFNET_HAS_TILES)
  if (has_tile_registers()) return multiply_by_registers(a, b, steps, rows, columns, c, add);
#endif
  for (int n = 0; n < columns; ++n) {
    const TileMatrix right{b.data + n * b.along, b.along, b.step};
    for (int m = 0; m < rows; ++m) {
      const TileMatrix left{a.data + m * a.along, a.along, a.step};
      multiply_by_vectors(left, right, steps, c.data + m * c.row + n * c.column, add);
    }
  }
}

}  // namespace mafnet

#endif
