// The kernels behind BilinearKernels, written once for vectors of kLanes floats. Included by one
// file per vector level, which first defines
//   MAFNET_KERNEL  the attribute that lets a function use the level's instructions
//   Vec, kLanes    the vector; it has + and *
//   load, store, stream, broadcast, sum_of, load_pairs, interleave_low, interleave_high
//
// Every pixel is interpolated in one cell of 2 x 2 pixels inside the image, whatever the padding:
// taps in the padding become weights of the cell, or nothing. A row of a cell is then one pair of
// neighbours, which planes can be gathered by: half as many loads as taps.
//
// Loops are optimistic. A tap of weight zero must not contribute, or an infinite neighbour would
// spoil an exact sample, but testing for it costs more than the sum. 0 * r is NaN where r is not
// finite, so a loop adds up 0 * r of all its results; only where that is NaN are the results that
// are not finite computed again, tap by tap.
// clang-format off: each of these builds on the one before
#include "flow_warp/cpu_bilinear_plan.h"
#include "flow_warp/cpu_bilinear_tiles.h"
#include "flow_warp/cpu_bilinear_forward.h"
#include "flow_warp/cpu_bilinear_grad_flow.h"
#include "flow_warp/cpu_bilinear_planes.h"
#include "flow_warp/cpu_bilinear_grad_input.h"
// clang-format on

namespace mafnet {
namespace {

void forward(const FlowWarpParams& p, const PixelBlock& block, float* scratch, bool around_caches) {
  dispatch_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.channels_last) return forward_pixels_of<T>(p, block, around_caches);
    forward_planes_of<T>(p, block, scratch, around_caches);
  });
}

void grad_flow(const FlowWarpParams& p, const PixelBlock& block, float* scratch) {
  dispatch_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.channels_last) return grad_flow_pixels_of<T>(p, block);
    grad_flow_planes_of<T>(p, block, scratch);
  });
}

constexpr BilinearKernels kKernels{&forward,    &grad_flow,         &row_range,
                                   &find_tiles, &grad_input_pixels, &grad_input_tiles};

}  // namespace
}  // namespace mafnet
