// C += A B with factors in bfloat16 and sums in float, where the CPU has tile registers for that
// (AMX).
#pragma once

#include <cstdint>

namespace mafnet {

// Whether this CPU, kernel and MAFNET_SIMD allow tiles.
bool has_bf16_tiles();

// Elements of `lines` rows of A, or columns of B, of some depth in tiles.
int64_t tile_elements(int lines, int depth);

// From rows of floats, rounded to bfloat16, to tiles of A; rows and depth are padded.
void tile_rows(const float* a, int64_t a_row, int rows, int depth, uint16_t* tiles);

// From depth x columns floats, rounded, to tiles of B; columns is a multiple of 16.
void tile_columns(const float* b, int64_t b_row, int depth, int columns, uint16_t* tiles);

// C += A B; C has room for rows up to a multiple of 16. An element sums up in an order that depth
// alone decides.
void multiply_bf16(const uint16_t* a, const uint16_t* b, int rows, int depth, int columns, float* c,
                   int64_t c_row);

}  // namespace mafnet
