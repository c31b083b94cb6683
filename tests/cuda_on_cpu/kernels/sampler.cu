// The sampler of csrc/common on its own: the taps of each coordinate (sampler_cases.py).
#include "binding.h"
#include "common/prims.cuh"
#include "common/sampler.h"

namespace {

using mafnet::Interpolation;
using mafnet::Padding;

// index, weight and slope: (positions, taps).
template <Interpolation I, typename A>
__global__ void take_taps(const A* position, int size, Padding padding, int* index, A* weight,
                          A* slope) {
  constexpr int K = mafnet::kTapsPerAxis<I>;
  const int i = static_cast<int>(blockIdx.x);
  const auto taps = mafnet::sample_axis<I, A>(position[i], size, padding);
  for (int k = 0; k < K; ++k) {
    index[i * K + k] = taps.index[k];
    weight[i * K + k] = taps.weight[k];
    slope[i * K + k] = taps.slope[k];
  }
}

template <Interpolation I, typename A>
int run_typed(const cuemu::Array& position, cuemu::Arguments& arguments) {
  return mafnet::launch(
      take_taps<I, A>, dim3(static_cast<unsigned>(position.shape[0])), dim3(1), 0, nullptr,
      static_cast<const A*>(position.data), static_cast<int>(arguments.integer("size")),
      static_cast<Padding>(arguments.integer("padding")),
      static_cast<int*>(arguments.out("index").data), static_cast<A*>(arguments.out("weight").data),
      static_cast<A*>(arguments.out("slope").data));
}

template <Interpolation I>
int run(cuemu::Arguments& arguments) {
  const cuemu::Array position = arguments.in("position");
  return position.type == "f8" ? run_typed<I, double>(position, arguments)
                               : run_typed<I, float>(position, arguments);
}

}  // namespace

CUEMU_ENTRY(bilinear) { return run<Interpolation::kBilinear>(arguments); }
CUEMU_ENTRY(nearest) { return run<Interpolation::kNearest>(arguments); }
CUEMU_ENTRY(bicubic) { return run<Interpolation::kBicubic>(arguments); }
