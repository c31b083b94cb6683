// C += A B with factors in bfloat16 and sums in float, where the CPU has tile registers for that
// (AMX).
#pragma once

#include <cstdint>

namespace mafnet {

// A tile is 16 rows of 64 bytes: 16 sums, or 32 factors.
constexpr int kBf16Rows = 16;
constexpr int kBf16Depth = 32;

// Whether this CPU, kernel and MAFNET_SIMD allow tiles.
bool has_bf16_tiles();

// Rows of floats rounded to bfloat16, depth padded with zeros to a multiple of kBf16Depth.
void round_to_bf16(const float* from, int64_t from_row, int rows, int depth, uint16_t* to);

// B (depth x columns) as pairs of rows side by side, what tiles multiply by; rows padded with
// zeros.
void pack_bf16(const float* b, int64_t b_row, int depth, int columns, uint16_t* packed);

// C += A B: A from round_to_bf16, B from pack_bf16; columns is a multiple of 16, and A and C have
// room for rows up to a multiple of kBf16Rows.
void multiply_bf16(const uint16_t* a, const uint16_t* b, int rows, int depth, int columns, float* c,
                   int64_t c_row);

}  // namespace mafnet
