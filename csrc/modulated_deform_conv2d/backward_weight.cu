// modulated_deform_conv2d backward: grad_weight(o, c, k) = sum over images and pixels of
// grad_output(n, o, p) times the masked sample of channel c at tap k, and grad_bias(o) = sum of
// grad_output(n, o, p), for any shape, dtype and strides. Both are deterministic.
//
// A matrix product of output channels x channels over the pixels, one per tap, split over ranges of
// pixels. A block owns kOutputs x kChannels sums of one tap and one range and walks it by kDepth
// pixels: samples and grad_output become tiles in shared memory, a thread sums 4 x 2. The sums of a
// range are written to weight_partials, and a second kernel adds the ranges in their order.
// Read per pixel and tap: the corners once per kOutputs output channels, grad_output once per
// kChannels channels.
//
// grad_bias: one block per output channel, whose threads stride over the pixels.
#include <algorithm>

#include "modulated_deform_conv2d/backward.cuh"
#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {
namespace {

// 16 x 16 threads with 4 x 2 sums each; 16 pixels give a thread 2 samples, which share their
// position where offset groups are whole pairs, and 4 values of grad_output to fetch.
constexpr int kOutputs = 64, kChannels = 32, kDepth = 16;
constexpr int kOwnOutputs = 4, kOwnChannels = 2;
static_assert((kOutputs / kOwnOutputs) * (kChannels / kOwnChannels) == kThreads);
static_assert(kThreads / kDepth * kOwnChannels == kChannels);
constexpr int kPadding = 4;  // of rows whose writers stride over them

// Ranges: enough blocks for two waves of 132 SMs with 4 blocks each, none shorter than 32 steps,
// and partial sums of at most 64 MiB of float.
constexpr int64_t kWantedBlocks = 1024, kLeastSteps = 32, kMostPartials = int64_t{16} << 20;

int64_t weight_elements(const ModulatedDeformConv2dParams& p) {
  return int64_t{p.out_channels} * p.group_channels() * p.taps();
}

int64_t blocks_per_range(const ModulatedDeformConv2dParams& p) {
  return int64_t{p.groups} * p.taps() * ceil_div(p.group_outputs(), kOutputs) *
         ceil_div(p.group_channels(), kChannels);
}

MAFNET_HOST_DEVICE int64_t pixel_steps(const ModulatedDeformConv2dParams& p) {
  return p.batch * ceil_div(p.pixels(), kDepth);
}

int64_t range_count(const ModulatedDeformConv2dParams& p) {
  const int64_t wanted = ceil_div(kWantedBlocks, blocks_per_range(p));
  const int64_t useful = ceil_div(pixel_steps(p), kLeastSteps);
  const int64_t affordable = kMostPartials / weight_elements(p);
  return std::max<int64_t>(1, std::min({wanted, useful, affordable}));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_backward_weight_kernel(const ModulatedDeformConv2dParams p,
                                                   int64_t ranges) {
  using A = Accumulator<T>;
  SHARED(A, samples, [kDepth][kChannels + kPadding]);
  SHARED(A, grads, [kDepth][kOutputs + kPadding]);

  const int group_channels = p.group_channels(), group_outputs = p.group_outputs();
  const int taps = p.taps();
  int64_t block = blockIdx.x;
  const int tap = static_cast<int>(block % taps);  // the taps of a tile share its grad_output in L2
  block /= taps;
  const int64_t channel_tiles = ceil_div(group_channels, kChannels);
  const int first_channel = static_cast<int>(block % channel_tiles) * kChannels;
  block /= channel_tiles;
  const int64_t output_tiles = ceil_div(group_outputs, kOutputs);
  const int first_output = static_cast<int>(block % output_tiles) * kOutputs;
  block /= output_tiles;
  const int group = static_cast<int>(block % p.groups);
  const int64_t range = block / p.groups;

  const int thread = threadIdx.x, lane = thread % kDepth, row = thread / kDepth;
  const int64_t steps_per_image = ceil_div(p.pixels(), kDepth), steps = pixel_steps(p);
  const int64_t begin = steps * range / ranges, end = steps * (range + 1) / ranges;
  const int own_channel = thread % (kChannels / kOwnChannels) * kOwnChannels;
  const int own_output = thread / (kChannels / kOwnChannels) * kOwnOutputs;
  A sums[kOwnOutputs][kOwnChannels] = {};

  for (int64_t step = begin; step < end; ++step) {
    const int64_t n = step / steps_per_image;
    const OutputPixel pixel = make_pixel(p, n, (step - n * steps_per_image) * kDepth + lane);
    const bool active = pixel.index < p.pixels();
    Sample<A> sample = {};
    int sampled_group = -1;
#pragma unroll
    for (int i = 0; i < kOwnChannels; ++i) {
      const int channel = first_channel + row * kOwnChannels + i;
      A value = 0;
      if (active && channel < group_channels) {
        const int of_input = group * group_channels + channel;
        const int offset_group = p.offset_group_of(of_input);
        if (offset_group != sampled_group) {
          sample = make_sample<T>(p, pixel, offset_group, tap);
          sampled_group = offset_group;
        }
        value = value_of<T>(
            p, sample,
            static_cast<const T*>(p.input) + n * p.input_stride[0] + of_input * p.input_stride[1]);
      }
      samples[lane][row * kOwnChannels + i] = value;
    }
#pragma unroll
    for (int i = 0; i < kOutputs; i += kThreads / kDepth) {
      const int output = first_output + row + i;
      A value = 0;
      if (active && output < group_outputs) {
        value = to_accumulator(static_cast<const T*>(
            p.grad_output)[n * p.grad_output_stride[0] +
                           (int64_t{group} * group_outputs + output) * p.grad_output_stride[1] +
                           pixel.index * p.grad_output_stride[2]]);
      }
      grads[lane][row + i] = value;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const auto a = *reinterpret_cast<const Vector<A, kOwnOutputs>*>(&grads[d][own_output]);
      const auto b = *reinterpret_cast<const Vector<A, kOwnChannels>*>(&samples[d][own_channel]);
#pragma unroll
      for (int i = 0; i < kOwnOutputs; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnChannels; ++j) sums[i][j] += a.at[i] * b.at[j];
      }
    }
    __syncthreads();
  }

  A* partials = static_cast<A*>(p.weight_partials) + range * p.out_channels * group_channels * taps;
#pragma unroll
  for (int i = 0; i < kOwnOutputs; ++i) {
    const int output = first_output + own_output + i;
    if (output >= group_outputs) break;
#pragma unroll
    for (int j = 0; j < kOwnChannels; ++j) {
      const int channel = first_channel + own_channel + j;
      if (channel >= group_channels) break;
      partials[((int64_t{group} * group_outputs + output) * group_channels + channel) * taps +
               tap] = sums[i][j];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_sum_partials_kernel(const Accumulator<T>* partials, T* sums,
                                                int64_t elements, int64_t ranges) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  Accumulator<T> sum = 0;
  for (int64_t range = 0; range < ranges; ++range) sum += partials[range * elements + i];
  sums[i] = from_accumulator<T>(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_backward_bias_kernel(const ModulatedDeformConv2dParams p) {
  using A = Accumulator<T>;
  SHARED(A, parts, [kThreads]);
  const int64_t output = blockIdx.x, pixels = p.pixels();
  const int thread = threadIdx.x;
  const T* grad = static_cast<const T*>(p.grad_output) + output * p.grad_output_stride[1];
  A sum = 0;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t pixel = thread; pixel < pixels; pixel += kThreads) {
      sum += to_accumulator(grad[n * p.grad_output_stride[0] + pixel * p.grad_output_stride[2]]);
    }
  }
  parts[thread] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) parts[thread] += parts[thread + half];
    __syncthreads();
  }
  if (thread == 0) static_cast<T*>(p.grad_bias)[output] = from_accumulator<T>(parts[0]);
}

}  // namespace

int64_t modulated_deform_conv2d_weight_partials(const ModulatedDeformConv2dParams& p) {
  if (weight_elements(p) == 0) return 0;
  return range_count(p) * weight_elements(p);
}

int launch_backward_weight(const ModulatedDeformConv2dParams& p, void* stream) {
  const int64_t elements = weight_elements(p);
  if (elements == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t ranges = range_count(p);
    const int status =
        launch(modulated_deform_conv2d_backward_weight_kernel<T>,
               grid_of(ranges * blocks_per_range(p)), dim3(kThreads), 0, stream, p, ranges);
    if (status != 0) return status;
    return launch(modulated_deform_conv2d_sum_partials_kernel<T>,
                  grid_of(ceil_div(elements, kThreads)), dim3(kThreads), 0, stream,
                  static_cast<const Accumulator<T>*>(p.weight_partials),
                  static_cast<T*>(p.grad_weight), elements, ranges);
  });
}

int launch_backward_bias(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.out_channels == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(modulated_deform_conv2d_backward_bias_kernel<T>, grid_of(p.out_channels),
                  dim3(kThreads), 0, stream, p);
  });
}

}  // namespace mafnet
