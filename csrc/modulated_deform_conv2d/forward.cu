// modulated_deform_conv2d forward for any shape, dtype and strides: output(n, o, p) = bias(o) +
// sum over taps k and channels c of weight(o, c, k) * mask_k(p) * input(n, c, p * stride - padding
// + k * dilation + offset_k(p)), sampled bilinearly, zero outside.
//
// A matrix product of output channels x (tap, channel) with samples that exist only as tiles in
// shared memory. A block owns kPixels output pixels of one image and kOutputs output channels of
// one group, and walks taps and channels by kDepth. Each sample of the tile is made once, by the
// thread that then stores it; a thread sums a patch of 4 x 4. Per output element: one write; the
// input is read 4 * taps times from L1 and L2, once per kOutputs output channels, the weight once
// per pixel tile from L2.
//
// Where there is a packed_weight, forward_tensor_core.cu does it.
#include "modulated_deform_conv2d/forward_tensor_core.cuh"
#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {
namespace {

// 16 x 16 threads with 16 sums each are 64 x 64; a depth of 16 gives every thread 4 samples and 4
// weights to fetch for 256 multiply-adds, and takes 8 KiB (16 for double) of shared memory.
constexpr int kPixels = 64, kOutputs = 64, kDepth = 16, kPatch = 4;
constexpr int kPadding = 4;  // of a row of weights, whose writers stride over rows
static_assert((kPixels / kPatch) * (kOutputs / kPatch) == kThreads);
static_assert(kThreads / kPixels * kPatch == kDepth);

template <typename T, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)  // left alone, the compiler spills to fit 3
    modulated_deform_conv2d_forward_kernel(const ModulatedDeformConv2dParams p) {
  using A = Accumulator<T>;
  using Patch = Vector<A, kPatch>;
  SHARED(A, samples, [kDepth][kPixels]);
  SHARED(A, weights, [kDepth][kOutputs + kPadding]);

  const int group_channels = p.group_channels(), group_outputs = p.group_outputs();
  const int taps = p.taps();
  const int64_t pixels = p.pixels(), tiles = ceil_div(pixels, kPixels);
  const int64_t output_tiles = ceil_div(group_outputs, kOutputs);
  int64_t block = blockIdx.x;
  const int first_output = static_cast<int>(block % output_tiles) * kOutputs;
  block /= output_tiles;
  const int group = static_cast<int>(block % p.groups);
  block /= p.groups;
  const int64_t n = block / tiles, first_pixel = block % tiles * kPixels;

  // Filling: a pixel and kPatch channels of samples, a channel and 4 output channels of weights.
  const int thread = threadIdx.x;
  const OutputPixel sampled_pixel = make_pixel(p, n, first_pixel + thread % kPixels);
  const bool is_pixel = sampled_pixel.index < pixels;
  const int sampled_depth = thread / kPixels * kPatch;
  const int weight_depth = thread % kDepth, weight_output = thread / kDepth;
  const T* image = static_cast<const T*>(p.input) + n * p.input_stride[0] +
                   int64_t{group} * group_channels * p.input_stride[1];
  const T* weight = static_cast<const T*>(p.weight) +
                    (int64_t{group} * group_outputs + first_output) * group_channels * taps;
  // Multiplying: kPatch pixels and kPatch output channels.
  const int patch_pixel = thread % (kPixels / kPatch) * kPatch;
  const int patch_output = thread / (kPixels / kPatch) * kPatch;
  A sums[kPatch][kPatch] = {};

  for (int tap = 0; tap < taps; ++tap) {
    Sample<A> sample = {};
    int sampled_group = -1;
    for (int first = 0; first < group_channels; first += kDepth) {
#pragma unroll
      for (int i = 0; i < kPatch; ++i) {
        const int channel = first + sampled_depth + i;
        A value = 0;
        if (channel < group_channels && is_pixel) {
          const int offset_group = p.offset_group_of(group * group_channels + channel);
          if (offset_group != sampled_group) {
            sample = make_sample<T, kRaw>(p, sampled_pixel, offset_group, tap);
            sampled_group = offset_group;
          }
          value = value_of<T>(p, sample, image + channel * p.input_stride[1]);
        }
        samples[sampled_depth + i][thread % kPixels] = value;
      }
#pragma unroll
      for (int i = 0; i < kOutputs; i += kThreads / kDepth) {
        const int channel = first + weight_depth, output = weight_output + i;
        A value = 0;
        if (channel < group_channels && first_output + output < group_outputs) {
          value = to_accumulator(weight[(int64_t{output} * group_channels + channel) * taps + tap]);
        }
        weights[weight_depth][output] = value;
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const Patch a = *reinterpret_cast<const Patch*>(&weights[d][patch_output]);
        const Patch b = *reinterpret_cast<const Patch*>(&samples[d][patch_pixel]);
#pragma unroll
        for (int i = 0; i < kPatch; ++i) {
#pragma unroll
          for (int j = 0; j < kPatch; ++j) sums[i][j] += a.at[i] * b.at[j];
        }
      }
      __syncthreads();
    }
  }

  T* out = static_cast<T*>(p.output) + n * p.output_stride[0];
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    if (first_output + patch_output + i >= group_outputs) break;
    const int64_t output = int64_t{group} * group_outputs + first_output + patch_output + i;
    A bias = 0;
    if (p.bias != nullptr) bias = to_accumulator(static_cast<const T*>(p.bias)[output]);
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const int64_t pixel = first_pixel + patch_pixel + j;
      if (pixel >= pixels) break;
      out[output * p.output_stride[1] + pixel * p.output_stride[2]] =
          from_accumulator<T>(sums[i][j] + bias);
    }
  }
}

}  // namespace

int launch_modulated_deform_conv2d_forward(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.batch * p.pixels() * p.out_channels == 0) return 0;
  if (p.packed_weight != nullptr) return launch_forward_tensor_core(p, stream);
  const int64_t blocks =
      p.batch * ceil_div(p.pixels(), kPixels) * p.groups * ceil_div(p.group_outputs(), kOutputs);
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = p.raw.used ? modulated_deform_conv2d_forward_kernel<T, true>
                                   : modulated_deform_conv2d_forward_kernel<T, false>;
    return launch(kernel, grid_of(blocks), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace mafnet
