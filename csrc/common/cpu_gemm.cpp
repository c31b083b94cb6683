// The matrix products of common/gemm.h.
#include "common/gemm_tiles.h"

namespace mafnet {

void multiply(const Matrix<float>& a, const float* b, int64_t b_row, int rows, int depth,
              int columns, float* c, int64_t c_row, bool add) {
  with_level<float>([&](auto level) MAFNET_INLINE_LAMBDA {
    NothingBeside beside;
    multiply_panels<decltype(level)>(a, b, b_row, rows, depth, columns, c, c_row, add, beside);
  });
}

void multiply(const Matrix<double>& a, const double* b, int64_t b_row, int rows, int depth,
              int columns, double* c, int64_t c_row, bool add) {
  with_level<double>([&](auto level) MAFNET_INLINE_LAMBDA {
    NothingBeside beside;
    multiply_panels<decltype(level)>(a, b, b_row, rows, depth, columns, c, c_row, add, beside);
  });
}

}  // namespace mafnet
