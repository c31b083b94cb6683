// What crosses the line between binding.cpp and the CPU kernels of self_attention.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mafnet {

// (N, heads, tokens, depth) with any strides, in elements. Gradients and out are written through
// it.
struct Tokens {
  void* data;
  int64_t stride[4];
};

struct SelfAttentionParams {
  Dtype dtype;  // of all tensors but lse
  int64_t batch, heads;
  int64_t queries, keys;   // tokens
  int depth, value_depth;  // of query and key; of value and out
  double scale;
  // Attention within squares of an image of height x width tokens, cut where they cross its right
  // or bottom edge; window 0: no image, every query sees every key.
  int64_t window, height, width;

  Tokens query, key, value;
  Tokens out;
  void* lse;  // (N, heads, queries), dense, in accumulators: log(sum(exp(score * scale)))

  // Backward; out and lse are those of the forward.
  Tokens grad_out, grad_query, grad_key, grad_value;
};

// Return 0. stream is ignored.
int launch_self_attention_forward(const SelfAttentionParams& params, void* stream);
int launch_self_attention_backward(const SelfAttentionParams& params, void* stream);

}  // namespace mafnet
