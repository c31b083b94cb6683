// Matrix products of self_attention with factors in bfloat16 and sums in float: by tile registers
// (AMX) at 16 times the products per clock of float vectors or more, else by vectors (AVX512-BF16)
// at twice as many.
//
// Factors of more digits are sums of pieces of bfloat16, 8 bits each: one is a bfloat16 itself, two
// are any half, three any float. A product then is the sum of the products of their pieces; those
// below 2^-24 of it are left out.
#pragma once

#include <cstdint>
#include <vector>

#include "common/simd.h"
#include "common/tiles.h"

namespace mafnet {

// A tile is 1 kB, side by side: 16 rows of 32 factors of A; 16 rows of 16 columns of pairs of
// factors of B, one above the other; 16 x 16 sums.
constexpr int kTile = 16, kTileDepth = 32;
constexpr int kTileFactors = kTile * kTileDepth, kTileSums = kTile * kTile;

// Tiles of A or B of which the product of two is added to the sums.
struct Step {
  int a, b;
};

// Which pieces are multiplied, ordered so that a product shares a factor with the one before.
std::vector<Step> piece_pairs(int pieces);

// `factors` along the depth are multiplied; what fills up the last tile is zero.
struct Steps {
  const Step* list;
  int count, factors;
};

// How a matrix is laid out along the depth that products sum over: its pieces follow each other, or
// where the depth is small and tiles would be empty, one piece for each pair.
struct DepthPlan {
  DepthPlan(int depth, int pieces);
  std::vector<int> a_pieces, b_pieces;  // slots, each `slot` deep
  int slot, tiles, factors;
  std::vector<Step> steps;
};

// The same for depths of tokens: tile t of piece i is number t * pieces + i, so that the first
// steps are those of the first tokens.
std::vector<Step> token_steps(int tiles, int pieces);

// From rows x depth numbers, row[i] at from + i * stride, to tiles of A: tile t of rows 16 m is
// number m * tiles + t. The number of rows is that of `from`; what tiles have more stays.
void pack_a(const float* from, int64_t stride, int rows, const DepthPlan& plan, int depth,
            uint16_t* to);
// From depth x columns numbers to tiles of B: tile t of columns 16 n is number t * columns / 16 +
// n.
void pack_b(const float* from, int64_t stride, int columns, const DepthPlan& plan, int depth,
            uint16_t* to);
// The same with a depth of tokens, for token_steps. tiles: of A in a row.
void pack_a_tokens(const float* from, int64_t stride, int rows, int tokens, int pieces, int tiles,
                   uint16_t* to);
void pack_b_tokens(const float* from, int64_t stride, int tokens, int columns, int pieces,
                   uint16_t* to);

// Tile (m, t) of A, or (t, n) of B, at data + m * along + t * step, in factors.
struct TileMatrix {
  const uint16_t* data;
  int64_t along, step;
};

// Sums (m, n) at data + m * row + n * column.
struct TileSums {
  float* data;
  int64_t row, column;
};

// Whether products are by tile registers.
inline bool has_tile_registers() { return simd_level() >= SimdLevel::kAmx; }

// The tile registers of this thread, if there are any, while it lives.
struct TileRegisters {
  TileRegisters();
  ~TileRegisters();
};

// C = A B, or += where add, for rows x columns tiles. Under TileRegisters only.
void multiply_tiles(const TileMatrix& a, const TileMatrix& b, const Steps& steps, int rows,
                    int columns, const TileSums& c, bool add);

}  // namespace mafnet
