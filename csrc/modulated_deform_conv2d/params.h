// What crosses the line between the bindings of modulated_deform_conv2d and deform_align and their
// kernels, which are the same.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/sampler.h"

namespace mafnet {

// deform_align: offset and mask are raw, as a network's head put them out. A kernel reads
//   max_residue * tanh(offset) + flow    and    sigmoid(mask)
// in their place, and their gradients are those of the raw values. Where max_residue is infinite
// there is no tanh: offset + flow.
struct RawOffsets {
  bool used = false;  // otherwise nothing of the below is set
  double max_residue = 0;
  // Base flows (N, out_height, out_width, 2), channel 0 = x, added to every tap. Null: zero. Where
  // there are two, the first is that of the first half of the offset groups.
  const void* flow[2] = {nullptr, nullptr};
  Dtype flow_dtype = Dtype::kFloat32;
  int64_t flow_stride[2][3] = {};  // N, pixel, channel
  // Backward: dense, of flow_dtype; sums over the taps and the flow's offset groups. Written.
  void* grad_flow[2] = {nullptr, nullptr};

  // Which flow an offset group adds.
  MAFNET_HOST_DEVICE int flow_of(int offset_group, int offset_groups) const {
    return flow[1] != nullptr && offset_group >= offset_groups / 2 ? 1 : 0;
  }
};

// Strides are in elements. The pixels of offset, mask, output and their gradients follow each other
// at one stride, row after row; input may have any strides. Weight and bias are dense.
struct ModulatedDeformConv2dParams {
  Dtype dtype;  // of input, weight, bias, output and their gradients
  Dtype offset_dtype, mask_dtype;

  int64_t batch;
  int channels, height, width;              // of input
  int out_channels, out_height, out_width;  // of output
  int kernel_h, kernel_w;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups, offset_groups;
  bool allow_tf32;  // CUDA: float samples and weights may be rounded to TF32 for their products
  // Equal parts of the channels of input, each of them cut into all offset groups: states that are
  // sampled at the same places.
  int parts = 1;

  const void* input;
  int64_t input_stride[4];   // N, C, H, W
  const void* offset;        // (dy, dx) pairs, (offset group, tap)
  int64_t offset_stride[3];  // N, C, pixel
  const void* mask;          // (offset group, tap); null: all ones
  int64_t mask_stride[3];
  RawOffsets raw;
  const void* weight;  // (out_channels, channels / groups, kernel_h, kernel_w)
  const void* bias;    // null: none

  void* output;
  int64_t output_stride[3];

  // Backward. A gradient that is not wanted is null; the others are written, not added to.
  // grad_offset and grad_mask are dense (N, C, pixel); of raw offsets they are parts of one tensor,
  // so that images lie grad_offset_planes() and grad_mask_planes() planes apart.
  const void* grad_output;
  int64_t grad_output_stride[3];
  void* grad_input;
  int64_t grad_input_stride[3];
  void* grad_offset;
  void* grad_mask;
  void* grad_weight;
  void* grad_bias;

  // CUDA only. grad_input holds accumulators (float; double for double), comes zeroed and is added
  // to. The workspaces are allocated by the caller, in the sizes that the functions below return.
  void* packed_weight;    // null where its size, of the forward or backward, is 0
  void* weight_partials;  // backward; null without grad_weight
  void* flow_partials;    // backward; null without raw.grad_flow
  // Deterministic grad_input; null: atomic sums of floating-point numbers in no fixed order.
  // Both come zeroed.
  int64_t* fixed_sums;
  int* exponents;

  MAFNET_HOST_DEVICE int taps() const { return kernel_h * kernel_w; }
  MAFNET_HOST_DEVICE int group_channels() const { return channels / groups; }
  MAFNET_HOST_DEVICE int group_outputs() const { return out_channels / groups; }
  MAFNET_HOST_DEVICE int part_channels() const { return channels / parts; }
  // Of one part.
  MAFNET_HOST_DEVICE int offset_group_channels() const {
    return channels / (parts * offset_groups);
  }
  MAFNET_HOST_DEVICE int offset_group_of(int channel) const {
    return channel / offset_group_channels() % offset_groups;
  }
  MAFNET_HOST_DEVICE int64_t grad_offset_planes() const {
    return int64_t{raw.used ? 3 : 2} * offset_groups * taps();
  }
  MAFNET_HOST_DEVICE int64_t grad_mask_planes() const {
    return int64_t{raw.used ? 3 : 1} * offset_groups * taps();
  }
  MAFNET_HOST_DEVICE int64_t pixels() const { return int64_t{out_height} * out_width; }
};

// Sizes of the workspaces on CUDA. packed_weight, in bytes, is 16-byte aligned; weight_partials and
// flow_partials are in accumulators; fixed_sums in integers per element of grad_input.
int64_t modulated_deform_conv2d_packed_weight_bytes(const ModulatedDeformConv2dParams& params);
int64_t modulated_deform_conv2d_backward_packed_weight_bytes(
    const ModulatedDeformConv2dParams& params);
int64_t modulated_deform_conv2d_weight_partials(const ModulatedDeformConv2dParams& params);
int64_t modulated_deform_conv2d_flow_partials(const ModulatedDeformConv2dParams& params);
int modulated_deform_conv2d_fixed_limbs(Dtype dtype);
constexpr int kExponents = 3;

// Return 0, or a CUDA error code. stream is a cudaStream_t; the CPU ignores it.
int launch_modulated_deform_conv2d_forward(const ModulatedDeformConv2dParams& params, void* stream);
int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& params,
                                            void* stream);

}  // namespace mafnet
