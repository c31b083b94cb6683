// spatial_gate backward. The feature is made again: the first launch writes grad_input, and into
// workspace the gradients of what the activation got, of which the transposed product makes
// grad_mask and weight_gradient.cuh the gradients of weight and bias.
#include "pyramid_spatial_attention/gate.cuh"
#include "pyramid_spatial_attention/weight_gradient.cuh"

namespace mafnet {
namespace {

WeightSums weight_sums(const SpatialGateParams& p) {
  return {p.grad_weight,
          p.grad_bias,
          p.channels,
          0,
          1,
          p.channels,
          p.channels,
          1,
          p.batch * p.height * p.width,
          p.height,
          p.width};
}

template <typename T, typename W>
int launch_typed(const SpatialGateParams& p, void* stream) {
  using A = Accumulator<T>;
  const WeightSums sums = weight_sums(p);
  A* workspace = static_cast<A*>(p.workspace);
  A* map = workspace + partial_elements(sums);
  const Gate<T, W> gate = gate_of<T, W, kOwn>(p);
  const Pixels<T> masks{gate.mask, p.height, p.width, 1};
  const auto grad_output = view_of<const W, kOwn>(p.grad_output, p.channels);
  const GateBackward<T, W> first{gate, grad_output, view_of<W, kOwn>(p.grad_input, p.channels),
                                 view_of_rows<A, kOwn>(map, p.height, p.width, p.channels)};
  int status = launch_product(gate_product<T>(p, false), masks, first, stream);
  if (status != 0) return status;

  const Pixels<A> gradients{view_of_rows<const A, kOwn>(map, p.height, p.width, p.channels),
                            p.height, p.width, 1};
  if (p.grad_mask.data != nullptr) {
    const GateBackwardMask<T, W> second{gate, grad_output,
                                        view_of<T, kOwn>(p.grad_mask, p.channels)};
    status = launch_product(gate_product<T>(p, true), gradients, second, stream);
    if (status != 0) return status;
  }
  return launch_weight_gradient<T>(sums, masks, gradients, workspace, stream);
}

}  // namespace

int64_t spatial_gate_workspace(const SpatialGateParams& p) {
  const int64_t map = p.batch * p.height * p.width * p.channels;
  const int64_t size = p.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  return (partial_elements(weight_sums(p)) + map) * size;
}

int launch_spatial_gate_backward(const SpatialGateParams& p, void* stream) {
  return dispatch_gate(p, [&](auto narrow, auto wide) {
    using T = typename decltype(narrow)::type;
    using W = typename decltype(wide)::type;
    return launch_typed<T, W>(p, stream);
  });
}

}  // namespace mafnet
