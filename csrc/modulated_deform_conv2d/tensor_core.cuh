// What the tensor-core kernels of modulated_deform_conv2d share: fp16 and bf16 in channels last,
// one group of the convolution, offset groups of whole vectors of 8 channels.
#pragma once

#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {

constexpr int kVectorChannels = 8;  // 16 bytes
constexpr int kStepChannels = 32;   // four lanes share a pixel, with a vector each
constexpr int kOutputs = 64;        // output channels of a tile

// Bounds under which coordinates are exact in float and in split_floor, pixels and element offsets
// of an image fit into int, and vector * reciprocal finds the offset group.
constexpr int64_t kMostPositions = int64_t{1} << 22;
constexpr int64_t kMostElements = (int64_t{1} << 31) - 1;
constexpr int kMostChannels = 2048;

inline bool is_aligned(const void* pointer, int64_t first_stride, int64_t second_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && first_stride % kVectorChannels == 0 &&
         second_stride % kVectorChannels == 0;
}

}  // namespace mafnet
