// The kernels that launch_self_attention_* choose from.
#pragma once

#include "self_attention/params.h"

namespace mafnet {

// Sums and products in float, or in double for double: any dtype, any values, any CPU.
void self_attention_forward_float(const SelfAttentionParams& params);
void self_attention_backward_float(const SelfAttentionParams& params);

// Products in bfloat16 where this CPU has them and the dtype, sizes and values suit them.
bool tiles_serve(const SelfAttentionParams& params);
void self_attention_forward_tiles(const SelfAttentionParams& params);
void self_attention_backward_tiles(const SelfAttentionParams& params);

}  // namespace mafnet
