// What the kernels of spatial_gate share: epilogues of the product that makes the feature, or the
// gradient of mask. T is the type of mask, W that of input and output.
#pragma once

#include "pyramid_spatial_attention/convolution.cuh"

namespace mafnet {

DEVICE float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }
DEVICE double sigmoid(double v) { return 1 / (1 + exp(-v)); }

// output = input * sigmoid(mask or feature) * scale + feature, feature = leaky_relu(sums + bias).
template <typename T, typename W>
struct Gate {
  View<const W> input;
  View<const T> mask;
  const T* bias;
  double scale, slope;
  bool from_feature;

  bool vectors() const { return input.vectors && mask.vectors; }
};

template <typename T, typename W>
struct GateForward {
  Gate<T, W> gate;
  View<W> output;

  bool vectors() const { return gate.vectors() && output.vectors; }
  bool channels_last() const { return output.stride[1] == 1; }

  template <Access kAccess, int N, typename A>
  DEVICE void store(const Place& place, int o, A (&sums)[N]) const {
    A input[N], mask[N];
    read_group<kAccess>(gate.input, place, o, input);
    read_group<kAccess>(gate.mask, place, o, mask);
    add_bias(gate.bias, output.channels, o, sums);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A feature = leaky_relu(sums[i], static_cast<A>(gate.slope));
      const A open = sigmoid(gate.from_feature ? feature : mask[i]) * static_cast<A>(gate.scale);
      sums[i] = input[i] * open + feature;
    }
    write_group<kAccess>(output, place, o, sums);
  }
};

// Makes grad_input, and the gradients of what the activation got, in workspace.
template <typename T, typename W>
struct GateBackward {
  Gate<T, W> gate;
  View<const W> grad_output;
  View<W> grad_input;                 // null data where not wanted
  View<Accumulator<T>> grad_feature;  // in workspace, which is aligned

  bool vectors() const {
    return gate.vectors() && grad_output.vectors &&
           (grad_input.data == nullptr || grad_input.vectors);
  }
  bool channels_last() const { return gate.mask.stride[1] == 1; }

  template <Access kAccess, int N, typename A>
  DEVICE void store(const Place& place, int o, A (&sums)[N]) const {
    A input[N], mask[N], grad[N];
    read_group<kAccess>(gate.input, place, o, input);
    read_group<kAccess>(gate.mask, place, o, mask);
    read_group<kAccess>(grad_output, place, o, grad);
    add_bias(gate.bias, grad_feature.channels, o, sums);
    const A scale = static_cast<A>(gate.scale), slope = static_cast<A>(gate.slope);
    A of_input[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A open = sigmoid(gate.from_feature ? leaky_relu(sums[i], slope) : mask[i]);
      of_input[i] = grad[i] * open * scale;
      const A through = gate.from_feature ? of_input[i] * input[i] * (1 - open) : A(0);
      sums[i] = (grad[i] + through) * (sums[i] > 0 ? A(1) : slope);
    }
    if (grad_input.data != nullptr) write_group<kAccess>(grad_input, place, o, of_input);
    write_group<kAccess>(grad_feature, place, o, sums);
  }
};

// grad_mask = the transposed product + what comes through the sigmoid of mask.
template <typename T, typename W>
struct GateBackwardMask {
  Gate<T, W> gate;
  View<const W> grad_output;
  View<T> grad_mask;

  bool vectors() const { return gate.vectors() && grad_output.vectors && grad_mask.vectors; }
  bool channels_last() const { return grad_mask.stride[1] == 1; }

  template <Access kAccess, int N, typename A>
  DEVICE void store(const Place& place, int o, A (&sums)[N]) const {
    if (!gate.from_feature) {
      A input[N], mask[N], grad[N];
      read_group<kAccess>(gate.input, place, o, input);
      read_group<kAccess>(gate.mask, place, o, mask);
      read_group<kAccess>(grad_output, place, o, grad);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A open = sigmoid(mask[i]);
        sums[i] += grad[i] * input[i] * static_cast<A>(gate.scale) * open * (1 - open);
      }
    }
    write_group<kAccess>(grad_mask, place, o, sums);
  }
};

template <typename T, typename W, int N>
Gate<T, W> gate_of(const SpatialGateParams& p) {
  return {view_of<const W, N>(p.input, p.channels),
          view_of<const T, N>(p.mask, p.channels),
          static_cast<const T*>(p.bias),
          p.scale,
          p.negative_slope,
          p.from_feature};
}

// Of mask by the weight (outputs, channels), or transposed.
template <typename T>
Product<T> gate_product(const SpatialGateParams& p, bool transposed) {
  const int64_t row = p.channels;
  return {static_cast<const T*>(p.weight),
          transposed ? 1 : row,
          0,
          0,
          transposed ? row : 1,
          p.channels,
          p.channels,
          1,
          p.batch * p.height * p.width,
          p.height,
          p.width};
}

// Calls body(Type<T>{}, Type<W>{}).
template <typename Body>
int dispatch_gate(const SpatialGateParams& p, const Body& body) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto narrow) {
    using T = typename decltype(narrow)::type;
    if constexpr (sizeof(T) == 2) {
      if (p.wide_dtype == Dtype::kFloat32) return body(narrow, Type<float>{});
    }
    return body(narrow, narrow);
  });
}

}  // namespace mafnet
