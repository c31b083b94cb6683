// The backward of modulated_deform_conv2d by tensor cores; backward.cu asks and falls back.
#pragma once

#include "modulated_deform_conv2d/params.h"

namespace mafnet {

// grad_input, grad_offset and grad_mask. Needs packed_weight, of as many bytes as
// modulated_deform_conv2d_backward_packed_weight_bytes says.
int launch_backward_samples_tensor_core(const ModulatedDeformConv2dParams& params, void* stream);

}  // namespace mafnet
