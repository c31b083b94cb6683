// The gradients of weights and biases: grad_weight(o, slot, c) = sum over pixels of gradient(pixel,
// o) * features(pixel, slot, c), grad_bias(o) = that of the gradients alone.
//
// Split over ranges of pixels. A block owns 64 outputs and 64 channels of one slot in one range and
// walks it 16 pixels at a time: features and gradients become tiles in shared memory, a thread sums
// 4 x 4. The sums of a range go to workspace, and a second kernel adds the ranges in their order,
// so that bits do not depend on the order of blocks.
#pragma once

#include <algorithm>

#include "common/sampler.h"
#include "pyramid_spatial_attention/convolution.cuh"

namespace mafnet {

// Ranges: enough blocks for two waves of 132 SMs with 4 blocks each, none shorter than 32 steps,
// and partial sums of at most 64 MiB of float.
constexpr int kStepPixels = 16;
constexpr int64_t kWantedBlocks = 1024, kLeastSteps = 32, kMostPartials = int64_t{16} << 20;

struct WeightSums {
  void *grad_weight, *grad_bias;  // either may be null
  int64_t output_stride, slot_stride, channel_stride;
  int outputs, channels, slots;
  int64_t pixels;
  int height, width;

  bool wanted() const { return grad_weight != nullptr || grad_bias != nullptr; }
  MAFNET_HOST_DEVICE int64_t weights() const { return int64_t{outputs} * slots * channels; }
  // Of one range, in workspace: its weights in the order (output, slot, channel), then its biases.
  MAFNET_HOST_DEVICE int64_t partials() const { return weights() + outputs; }
};

inline int64_t range_count(const WeightSums& p) {
  const int64_t blocks =
      p.slots * divide_up(p.outputs, kTile) * std::max<int64_t>(1, divide_up(p.channels, kTile));
  const int64_t wanted = divide_up(kWantedBlocks, std::max<int64_t>(1, blocks));
  const int64_t useful = divide_up(p.pixels, kStepPixels * kLeastSteps);
  const int64_t affordable = kMostPartials / std::max<int64_t>(1, p.partials());
  return p.pixels == 0 ? 0 : std::max<int64_t>(1, std::min({wanted, useful, affordable}));
}

// In elements, a multiple of 16 bytes; 0 where none is wanted.
inline int64_t partial_elements(const WeightSums& p) {
  return p.wanted() ? divide_up(range_count(p) * p.partials(), 4) * 4 : 0;
}

template <typename T, typename Features, typename Gradients>
__global__ void __launch_bounds__(kThreads, 8 / sizeof(Accumulator<T>))
    pyramid_conv_backward_weight_kernel(const WeightSums p, const Features features,
                                        const Gradients gradients, Accumulator<T>* partials,
                                        int64_t range_pixels, bool features_last,
                                        bool gradients_last) {
  using A = Accumulator<T>;
  constexpr int kParts = Features::kParts, kGroups = kTile / kOwn;
  SHARED(A, samples, [kStepPixels][kTile + kPadding]);
  SHARED(A, grads, [kStepPixels][kTile + kPadding]);
  const int thread = threadIdx.x;
  const int first_output = static_cast<int>(blockIdx.y) * kTile;
  const int slot = static_cast<int>(blockIdx.z) % p.slots;
  const int first_channel = static_cast<int>(blockIdx.z) / p.slots * kTile;
  const int64_t begin = blockIdx.x * range_pixels, end = min(begin + range_pixels, p.pixels);

  // What this thread fetches of either tile, as in pyramid_conv_kernel.
  const int sample_row = features_last ? thread / kGroups : thread % kStepPixels;
  const int sample = (features_last ? thread % kGroups : thread / kStepPixels) * kOwn;
  const int grad_row = gradients_last ? thread / kGroups : thread % kStepPixels;
  const int grad = (gradients_last ? thread % kGroups : thread / kStepPixels) * kOwn;
  Place sample_place = place_of(begin + sample_row, p.height, p.width);
  Place grad_place = place_of(begin + grad_row, p.height, p.width);
  // What it sums.
  const int own_output = thread / kGroups * kOwn, own_channel = thread % kGroups * kOwn;
  A sums[kOwn][kOwn] = {}, bias = 0;
  for (int64_t first = begin; first < end; first += kStepPixels) {
    A values[kParts][kOwn], gradient[1][kOwn];
    clear(gradient[0]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) clear(values[part]);
    if (first + sample_row < end) {
      features.load(sample_place, slot / kParts, first_channel + sample, values);
    }
    if (first + grad_row < end) gradients.load(grad_place, 0, first_output + grad, gradient);
    advance(sample_place, kStepPixels, p.height, p.width);
    advance(grad_place, kStepPixels, p.height, p.width);
    __syncthreads();  // all have left what is overwritten
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      samples[sample_row][sample + i] = slot % kParts == 0 ? values[0][i] : values[kParts - 1][i];
      grads[grad_row][grad + i] = gradient[0][i];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStepPixels; ++k) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          sums[i][j] += grads[k][own_output + i] * samples[k][own_channel + j];
        }
      }
      bias += grads[k][thread % kTile];
    }
  }

  A* range = partials + blockIdx.x * p.partials();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int o = first_output + own_output + i, c = first_channel + own_channel + j;
      if (o < p.outputs && c < p.channels) {
        range[(int64_t{o} * p.slots + slot) * p.channels + c] = sums[i][j];
      }
    }
  }
  const bool sums_bias = blockIdx.z == 0 && thread < kTile;
  if (sums_bias && first_output + thread < p.outputs) {
    range[p.weights() + first_output + thread] = bias;
  }
}

// A thread adds one weight or bias over the ranges.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pyramid_conv_weight_sum_kernel(const WeightSums p, const Accumulator<T>* partials,
                                   int64_t ranges) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.partials()) return;
  Accumulator<T> sum = 0;
  for (int64_t range = 0; range < ranges; ++range) sum += partials[range * p.partials() + index];
  const int64_t bias = index - p.weights();
  if (bias >= 0) {
    if (p.grad_bias != nullptr) static_cast<T*>(p.grad_bias)[bias] = from_accumulator<T>(sum);
  } else if (p.grad_weight != nullptr) {
    const int64_t c = index % p.channels, slot = index / p.channels % p.slots;
    const int64_t o = index / p.channels / p.slots;
    const int64_t at = o * p.output_stride + slot * p.slot_stride + c * p.channel_stride;
    static_cast<T*>(p.grad_weight)[at] = from_accumulator<T>(sum);
  }
}

template <typename T, typename Features, typename Gradients>
int launch_weight_gradient(const WeightSums& p, const Features& features,
                           const Gradients& gradients, void* workspace, void* stream) {
  if (!p.wanted() || p.outputs == 0) return 0;
  auto* partials = static_cast<Accumulator<T>*>(workspace);
  const int64_t ranges = range_count(p);
  if (ranges > 0) {
    const int64_t steps = divide_up(divide_up(p.pixels, kStepPixels), ranges);
    const int64_t channel_tiles = std::max<int64_t>(1, divide_up(p.channels, kTile));
    const dim3 grid(static_cast<unsigned>(ranges),
                    static_cast<unsigned>(divide_up(p.outputs, kTile)),
                    static_cast<unsigned>(p.slots * channel_tiles));
    const int status =
        launch(pyramid_conv_backward_weight_kernel<T, Features, Gradients>, grid, dim3(kThreads), 0,
               stream, p, features, gradients, partials, steps * kStepPixels,
               features.channels_last(), gradients.channels_last());
    if (status != 0) return status;
  }
  return launch_items(pyramid_conv_weight_sum_kernel<T>, p.partials(), stream, p, partials, ranges);
}

}  // namespace mafnet
