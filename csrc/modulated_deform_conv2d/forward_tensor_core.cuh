// The forward of modulated_deform_conv2d by tensor cores; forward.cu asks and falls back.
#pragma once

#include "modulated_deform_conv2d/params.h"

namespace mafnet {

// Needs packed_weight, of as many bytes as modulated_deform_conv2d_packed_weight_bytes says.
int launch_forward_tensor_core(const ModulatedDeformConv2dParams& params, void* stream);

}  // namespace mafnet
