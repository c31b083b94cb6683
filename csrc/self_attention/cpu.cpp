// The entries of self_attention on the CPU.
#include "self_attention/engines.h"

namespace mafnet {

int launch_self_attention_forward(const SelfAttentionParams& p, void*) {
  (tiles_serve(p) ? self_attention_forward_tiles : self_attention_forward_float)(p);
  return 0;
}

int launch_self_attention_backward(const SelfAttentionParams& p, void*) {
  (tiles_serve(p) ? self_attention_backward_tiles : self_attention_backward_float)(p);
  return 0;
}

}  // namespace mafnet
