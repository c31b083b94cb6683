// deform_align backward: grad_flow(n, p, c) = sum over the offset groups that add the flow, and
// over their taps, of the gradients of their offsets. backward.cu summed the taps, in their order,
// to flow_partials (n, offset group, (y, x), pixel); here the groups follow in theirs:
// deterministic.
//
// One thread per element, which reads its groups' sums once.
#include "modulated_deform_conv2d/backward.cuh"
#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_backward_flow_kernel(const ModulatedDeformConv2dParams p, int flow) {
  using A = Accumulator<T>;
  const int64_t pixels = p.pixels(), elements = p.batch * pixels * 2;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int64_t n = i / (pixels * 2), pixel = i / 2 - n * pixels;
  const int64_t axis = 1 - i % 2;  // a flow has x first
  const int half = p.offset_groups / 2;
  const int begin = flow == 0 ? 0 : half;
  const int end = flow == 0 && p.raw.flow[1] != nullptr ? half : p.offset_groups;
  A sum = 0;
  for (int group = begin; group < end; ++group) {
    sum += static_cast<const A*>(
        p.flow_partials)[((n * p.offset_groups + group) * 2 + axis) * pixels + pixel];
  }
  store_coordinate<T>(p.raw.grad_flow[flow], p.raw.flow_dtype == p.dtype, i, sum);
}

}  // namespace

int64_t modulated_deform_conv2d_flow_partials(const ModulatedDeformConv2dParams& p) {
  return p.batch * p.offset_groups * 2 * p.pixels();
}

int launch_backward_flow(const ModulatedDeformConv2dParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.batch * p.pixels() * 2, kThreads);
  if (blocks == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto sum = [&](int flow) {
      if (p.raw.grad_flow[flow] == nullptr) return 0;
      return launch(modulated_deform_conv2d_backward_flow_kernel<T>, grid_of(blocks),
                    dim3(kThreads), 0, stream, p, flow);
    };
    const int status = sum(0);
    return status != 0 ? status : sum(1);
  });
}

}  // namespace mafnet
