// spatial_gate forward in one launch: mask is the features of a product, whose epilogue reads mask
// and input and writes output. Per pixel mask and input are read once from DRAM, output is written
// once, the feature is nowhere.
#include "pyramid_spatial_attention/gate.cuh"

namespace mafnet {

int launch_spatial_gate_forward(const SpatialGateParams& p, void* stream) {
  return dispatch_gate(p, [&](auto narrow, auto wide) {
    using T = typename decltype(narrow)::type;
    using W = typename decltype(wide)::type;
    const GateForward<T, W> epilogue{gate_of<T, W, kOwn>(p),
                                     view_of<W, kOwn>(p.output, p.channels)};
    const Pixels<T> features{view_of<const T, kOwn>(p.mask, p.channels), p.height, p.width, 1};
    return launch_product(gate_product<T>(p, false), features, epilogue, stream);
  });
}

}  // namespace mafnet
