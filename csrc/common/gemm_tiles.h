// The matrix products of common/gemm.h: tiles of sums in registers, as large as the registers
// allow. Measured on one core of a Xeon with AVX-512: the time of oneDNN's convolution.
#pragma once

#include "common/gemm.h"
#include "common/vectors.h"

namespace mafnet {

// Rows of a tile of V vectors: as many sums as registers allow, and more rows where V is small, so
// that enough sums are under way to hide the latency of a multiply-add.
template <int V>
constexpr int kTileRows = V == 5   ? 4
                          : V == 4 ? 6
                          : V == 3 ? 8
                          : V == 2 ? 6
                                   : 12;

// What a product does beside: step() is called once per tile and row of B.
struct NothingBeside {
  MAFNET_INLINE void step() {}
};

template <int R, int V, typename L, typename A, typename Beside>
MAFNET_INLINE void multiply_tile(const Matrix<A> a, const A* b, int64_t b_row, int depth, A* c,
                                 int64_t c_row, bool add, Beside& beside) {
  constexpr int kLanes = L::kBytes / sizeof(A);
  using Vector = VectorOf<A, kLanes>;
  Vector sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 5
    for (int v = 0; v < V; ++v) {
      sum[r][v] = add ? load<Vector>(c + r * c_row + v * kLanes) : Vector{};
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vector right[V];
#pragma GCC unroll 5
    for (int v = 0; v < V; ++v) right[v] = load<Vector>(b + k * b_row + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      // x - 0 is x for every x, so that this is a broadcast; x + 0 would be an addition.
      const Vector left = a.data[r * a.row_stride + k * a.column_stride] - Vector{};
#pragma GCC unroll 5
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
    beside.step();
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 5
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
  }
}

template <int V, typename L, typename A, typename Beside>
MAFNET_INLINE void multiply_panel(const Matrix<A> a, const A* b, int64_t b_row, int rows, int depth,
                                  A* c, int64_t c_row, bool add, Beside& beside) {
  for (int m = 0; m < rows; m += kTileRows<V>) {
    const Matrix<A> left{a.data + m * a.row_stride, a.row_stride, a.column_stride};
    multiply_tile<kTileRows<V>, V, L>(left, b, b_row, depth, c + m * c_row, c_row, add, beside);
  }
}

template <typename L, typename A, typename Beside>
MAFNET_INLINE void multiply_panels(const Matrix<A> a, const A* b, int64_t b_row, int rows,
                                   int depth, int columns, A* c, int64_t c_row, bool add,
                                   Beside& beside) {
  constexpr int kLanes = L::kBytes / sizeof(A);
  constexpr int kWidest = L::kTileVectors;
  int n = 0;
  if constexpr (kWidest == 4) {
    // 72 columns, 8 channels of 9 taps, are five vectors: four and a lone one would be slower.
    if (columns == 5 * kLanes) {
      return multiply_panel<5, L>(a, b, b_row, rows, depth, c, c_row, add, beside);
    }
  }
  for (; n + kWidest * kLanes <= columns; n += kWidest * kLanes) {
    multiply_panel<kWidest, L>(a, b + n, b_row, rows, depth, c + n, c_row, add, beside);
  }
  if constexpr (kWidest == 4) {
    const int left = (columns - n) / kLanes;
    if (left == 3) multiply_panel<3, L>(a, b + n, b_row, rows, depth, c + n, c_row, add, beside);
    if (left == 2) multiply_panel<2, L>(a, b + n, b_row, rows, depth, c + n, c_row, add, beside);
    if (left == 1) multiply_panel<1, L>(a, b + n, b_row, rows, depth, c + n, c_row, add, beside);
  }
}

}  // namespace mafnet
