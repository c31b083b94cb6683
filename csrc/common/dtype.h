// The element types of the project, free of torch, so that kernel files can use them.
#pragma once

namespace mafnet {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// Coordinates, weights and sums are in float, in double for double.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the C++ type of dtype; Half and BFloat16 differ between CPU and CUDA.
template <typename Half, typename BFloat16, typename Body>
auto dispatch_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(Type<double>{});
    case Dtype::kFloat16:
      return body(Type<Half>{});
    case Dtype::kBFloat16:
      return body(Type<BFloat16>{});
    default:
      return body(Type<float>{});
  }
}

}  // namespace mafnet
