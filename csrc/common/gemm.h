// C (+)= A B for blocks that lie in the cache: the matrix products of modulated_deform_conv2d.
#pragma once

#include <cstdint>

namespace mafnet {

// Columns of B and C are padded to this; rows of A and C to a multiple of every tile height.
constexpr int kColumnPad = 16;
constexpr int kRowPad = 24;

// Element (row, column) lies at data[row * row_stride + column * column_stride].
template <typename A>
struct Matrix {
  const A* data;
  int64_t row_stride, column_stride;
};

// C (rows x columns) = A (rows x depth) B (depth x columns), or += where add. columns is a multiple
// of kColumnPad; A and C have room for rows up to a multiple of kRowPad. An element sums up in the
// order of depth, whatever the sizes.
void multiply(const Matrix<float>& a, const float* b, int64_t b_row, int rows, int depth,
              int columns, float* c, int64_t c_row, bool add);
void multiply(const Matrix<double>& a, const double* b, int64_t b_row, int rows, int depth,
              int columns, double* c, int64_t c_row, bool add);

}  // namespace mafnet
