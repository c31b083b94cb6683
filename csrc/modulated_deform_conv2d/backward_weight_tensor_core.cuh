// grad_weight and grad_bias of modulated_deform_conv2d by tensor cores; backward_weight.cu asks and
// falls back.
#pragma once

#include "modulated_deform_conv2d/params.h"

namespace mafnet {

bool weight_suits_tensor_cores(const ModulatedDeformConv2dParams& params);

// In accumulators; what weight_partials holds where weight_suits_tensor_cores.
int64_t tensor_core_weight_partials(const ModulatedDeformConv2dParams& params);
int launch_backward_weight_tensor_core(const ModulatedDeformConv2dParams& params, void* stream);
// Of what the call before it summed.
int launch_backward_bias_tensor_core(const ModulatedDeformConv2dParams& params, void* stream);

}  // namespace mafnet
