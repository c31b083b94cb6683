// Pixels between the layouts and dtypes of tensors and dense rows of channels in the accumulators'
// type, float or double.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace mafnet {

constexpr int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Calls body(Type<T>{}) with the type of dtype, for accumulators A: double alone goes with double.
template <typename A, typename Body>
void with_dtype(Dtype dtype, const Body& body) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if constexpr (std::is_same_v<A, double>) {
    body(Type<double>{});
  } else if (dtype == Dtype::kFloat16) {
    body(Type<Half>{});
  } else if (dtype == Dtype::kBFloat16) {
    body(Type<BFloat16>{});
  } else {
    body(Type<float>{});
  }
}

// Whether elements of a dtype are accumulators of type A.
template <typename A>
constexpr bool is_of(Dtype dtype) {
  return dtype == (std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32);
}

// Elements of a tensor of some dtype, from element `first` on: pixel i and channel c lie at
// data[first + i * pixel_stride + c * channel_stride].
template <typename Pointer>
struct Elements {
  Pointer data;
  Dtype dtype;
  int64_t first, pixel_stride, channel_stride;
};

// to[i * to_row + c] = from(i, c) for count pixels and some channels.
template <typename A>
void gather_pixels(const Elements<const void*>& from, int count, int channels, A* to,
                   int64_t to_row);

// to(i, c) = from[i * from_row + c].
template <typename A>
void scatter_pixels(const A* from, int64_t from_row, int count, int channels,
                    const Elements<void*>& to);

}  // namespace mafnet
