// The parts of modulated_deform_conv2d's backward, each in its own file.
#pragma once

#include "modulated_deform_conv2d/params.h"

namespace mafnet {

// backward_weight.cu
int launch_backward_weight(const ModulatedDeformConv2dParams& params, void* stream);
int launch_backward_bias(const ModulatedDeformConv2dParams& params, void* stream);

// backward_fixed_point.cu
int launch_backward_exponents(const ModulatedDeformConv2dParams& params, void* stream);
int launch_backward_add_fixed_sums(const ModulatedDeformConv2dParams& params, void* stream);

// backward_flow.cu
int launch_backward_flow(const ModulatedDeformConv2dParams& params, void* stream);

}  // namespace mafnet
