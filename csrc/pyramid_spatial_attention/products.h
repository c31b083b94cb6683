// Products of rows of pixels with a weight, and of gradients with pixels.
#pragma once

#include "common/gemm.h"
#include "common/gemm_bf16.h"
#include "pyramid_spatial_attention/rows.h"

namespace mafnet {

// A matrix (depth x columns) that rows are multiplied by.
template <typename A>
class Product {
 public:
  Product(int depth, int columns, Dtype dtype)
      : depth_(depth),
        columns_(padded_columns(columns)),
        weight_(static_cast<size_t>(depth) * columns_),
        packed_(0),
        in_bf16_(dtype == Dtype::kBFloat16 && has_bf16_products()) {}

  int columns() const { return columns_; }
  // Whether factors are rounded to bfloat16; then rows may be BFloat16 below.
  bool in_bf16() const { return in_bf16_; }

  // Elements rows x count of the matrix from a weight of some dtype.
  void load(const Elements<const void*>& from, int rows, int count, int row, int column) {
    gather_pixels(from, rows, count, weight_.data() + int64_t{row} * columns_ + column, columns_);
  }
  const A* row(int i) const { return weight_.data() + int64_t{i} * columns_; }
  const uint16_t* packed() const { return packed_.data(); }
  // Call once after the last load.
  void pack() {
    if constexpr (sizeof(A) == 4) {
      if (!in_bf16_) return;
      packed_.resize(bf16_elements(columns_, depth_), false);
      pack_bf16_columns(weight_.data(), columns_, depth_, columns_, packed_.data());
    }
  }

  // Elements of scratch that add() wants for count rows.
  size_t scratch(int count) const {
    return in_bf16_ ? bf16_elements(padded_rows(count), depth_) : 0;
  }

  // sums += rows * matrix. Sums, and rows of type A, have room for padded_rows(count).
  template <typename T>
  void add(const T* rows, int64_t stride, int count, A* sums, int64_t sums_stride,
           uint16_t* scratch) const {
    run(rows, stride, count, sums, sums_stride, scratch, true);
  }

  // sums = rows * matrix
  template <typename T>
  void set(const T* rows, int64_t stride, int count, A* sums, int64_t sums_stride,
           uint16_t* scratch) const {
    run(rows, stride, count, sums, sums_stride, scratch, false);
  }

 private:
  template <typename T>
  void run(const T* rows, int64_t stride, int count, A* sums, int64_t sums_stride,
           uint16_t* scratch, bool add) const {
    if constexpr (sizeof(A) == 4) {
      if (in_bf16_) {
        pack_bf16_rows(rows, stride, count, depth_, scratch);
        multiply_bf16(scratch, packed_.data(), count, depth_, columns_, sums, sums_stride, add);
        return;
      }
    }
    if constexpr (std::is_same_v<T, A>) {
      multiply(Matrix<A>{rows, stride, 1}, weight_.data(), columns_, count, depth_, columns_, sums,
               sums_stride, add);
    }
  }

  int depth_, columns_;
  Buffer<A> weight_;
  Buffer<uint16_t> packed_;
  bool in_bf16_;
};

// sums (lines x columns) += the sum over pixels of left[pixel][line] * right[pixel][column]: the
// gradient of a weight.
template <typename A>
class PixelProduct {
 public:
  // For at most so many pixels and columns.
  PixelProduct(int pixels, int lines, int columns, Dtype dtype)
      : lines_(lines),
        turned_row_(round_up(pixels, 16)),
        in_bf16_(dtype == Dtype::kBFloat16 && has_bf16_products()),
        turned_(in_bf16_ ? static_cast<size_t>(lines) * turned_row_ : 0, false),
        packed_left_(in_bf16_ ? bf16_elements(lines, pixels) : 0),
        packed_right_(in_bf16_ ? bf16_elements(columns, pixels) : 0, false) {}

  // Keeps the pointer; kRowPad elements beyond the last line are read.
  void set_left(const A* rows, int64_t stride, int count) {
    left_ = {rows, 1, stride};
    count_ = count;
    if constexpr (sizeof(A) == 4) {
      if (!in_bf16_) return;
      gather_pixels({rows, kDense<A>, 0, 1, stride}, lines_, count, turned_.data(), turned_row_);
      pack_bf16_rows(turned_.data(), turned_row_, lines_, count, packed_left_.data());
    }
  }

  // columns is a multiple of kColumnPad; sums has room for padded_rows(lines). T is A, or BFloat16
  // where products are.
  template <typename T>
  void add(const T* right, int64_t stride, int columns, A* sums, int64_t sums_stride) {
    if constexpr (sizeof(A) == 4) {
      if (in_bf16_) {
        pack_bf16_columns(right, stride, count_, columns, packed_right_.data());
        multiply_bf16(packed_left_.data(), packed_right_.data(), lines_, count_, columns, sums,
                      sums_stride, true);
        return;
      }
    }
    if constexpr (std::is_same_v<T, A>) {
      multiply(left_, right, stride, lines_, count_, columns, sums, sums_stride, true);
    }
  }

 private:
  int lines_, turned_row_;
  bool in_bf16_;
  Buffer<A> turned_;
  Buffer<uint16_t> packed_left_, packed_right_;
  Matrix<A> left_{nullptr, 0, 0};
  int count_ = 0;
};

constexpr int kMostChunks = 16;

// Gradients of weight and bias: every chunk of pixels has sums of its own, which are added in the
// order of the chunks. How the pixels are cut does not depend on the number of threads.
template <typename A>
class Partials {
 public:
  // Of `rows` x `columns` sums, of which the kernels may touch padded_rows(rows).
  Partials(int chunks, int rows, int columns, int bias, bool wanted)
      : chunks_(wanted ? chunks : 0),
        size_(static_cast<int64_t>(padded_rows(rows)) * columns + bias),
        bias_at_(size_ - bias),
        sums_(static_cast<size_t>(chunks_ * size_)) {}

  A* weight(int64_t chunk) { return sums_.data() + chunk * size_; }
  A* bias(int64_t chunk) { return weight(chunk) + bias_at_; }

  // The sums of all chunks in those of the first.
  void reduce() {
    if (chunks_ < 2) return;
    parallel_for(0, size_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
        const A* from = weight(chunk);
        for (int64_t i = begin; i < end; ++i) sums_.data()[i] += from[i];
      }
    });
  }

 private:
  int64_t chunks_, size_, bias_at_;
  Buffer<A> sums_;
};

}  // namespace mafnet
