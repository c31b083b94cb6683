// Passes of the CUDA backward that take gradients in workspace: accumulators, channels last.
#pragma once

#include "pyramid_spatial_attention/params.h"

namespace mafnet {

// grad_input = the transpose of pool_concat, or of a resize, on `gradients`; p.grad_output is not
// used.
int launch_unpool_accumulators(const PyramidConvParams& p, const Source& gradients, void* stream);
int launch_resize_accumulators(const ResizeAddParams& p, void* stream);

}  // namespace mafnet
