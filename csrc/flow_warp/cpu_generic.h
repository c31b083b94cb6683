// flow_warp on the CPU for every interpolation, dtype and layout. Moderately fast; no torch here.
#pragma once

#include "flow_warp/cpu_bilinear.h"

namespace mafnet {

void generic_forward(const FlowWarpParams& p, const PixelSpan& span);
void generic_grad_flow(const FlowWarpParams& p, const PixelSpan& span);
RowRange generic_row_range(const FlowWarpParams& p, int64_t n, int y);
// ranges: of every output row of image band.n.
void generic_grad_input(const FlowWarpParams& p, const RowRange* ranges, const Band& band);

}  // namespace mafnet
