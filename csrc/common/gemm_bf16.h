// C (+)= A B with factors in bfloat16 and sums in float, where the CPU has instructions for that:
// tile registers (AMX), else vectors (AVX512-BF16). Factors are rounded to bfloat16 when they are
// packed; numbers below the normal range, of factors and of sums, count as zero.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "common/simd.h"

namespace mafnet {

// Whether this CPU, kernel and MAFNET_SIMD allow them.
inline bool has_bf16_products() { return simd_level() >= SimdLevel::kAvx512Bf16; }

// Packed rows of A lie in tiles [rows / kPackedRows][depth / kPackedDepth][row][depth], so that
// column k of a row is `at` elements behind its begin; `room` columns from there on lie side by
// side.
constexpr int kPackedRows = 16, kPackedDepth = 32;
struct PackedColumn {
  int at, room;
};
inline PackedColumn packed_column(int k) {
  const int in_tile = k % kPackedDepth;
  return {k / kPackedDepth * kPackedRows * kPackedDepth + in_tile, kPackedDepth - in_tile};
}

// Elements of `lines` rows of A, or columns of B, of some depth when packed.
int64_t bf16_elements(int lines, int depth);

// From rows of floats, or of bfloat16, to packed rows of A; depth is padded with zeros, rows with
// what there was.
void pack_bf16_rows(const float* a, int64_t a_row, int rows, int depth, uint16_t* packed);
void pack_bf16_rows(const torch::headeronly::BFloat16* a, int64_t a_row, int rows, int depth,
                    uint16_t* packed);

// Zeros in the padding of packed rows of some depth, for those who write the rest themselves.
void pad_bf16_rows(int rows, int depth, uint16_t* packed);

// From depth x columns likewise to packed columns of B; columns is a multiple of 16.
void pack_bf16_columns(const float* b, int64_t b_row, int depth, int columns, uint16_t* packed);
void pack_bf16_columns(const torch::headeronly::BFloat16* b, int64_t b_row, int depth, int columns,
                       uint16_t* packed);

// C = A B, or += where add; C has room for rows up to a multiple of 16. An element sums up in an
// order that depth alone decides.
void multiply_bf16(const uint16_t* a, const uint16_t* b, int rows, int depth, int columns, float* c,
                   int64_t c_row, bool add);

}  // namespace mafnet
