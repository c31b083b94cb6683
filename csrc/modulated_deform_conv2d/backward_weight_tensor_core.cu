// modulated_deform_conv2d backward on tensor cores: grad_weight, and beside it grad_bias, of fp16
// and bf16 in channels last, offset groups of whole 8 channels, one group of the convolution
// (backward_weight.cu has the formulas). Deterministic.
//
// A matrix product of output channels x (tap, channel) over the pixels. A block owns 64 output
// channels and kSteps steps, each 32 channels of one tap, and walks a range of pixels by kPixels:
// grad_output is copied to shared memory as it lies, every thread samples 8 channels of a pixel per
// step and rounds them once to T, and a warp multiplies 32 output channels of one step. Both
// operands have pixels as rows there, which transposing loads turn into fragments.
//
// Sums are float and stay in registers over the range. Those of a range go to weight_partials as
// they lie in the threads, and a second kernel adds the ranges in their order. Read per pixel: per
// tap offsets and mask by each lane that shares an offset group and four 16-byte corners per 8
// channels, all once per 64 output channels; grad_output once per kSteps steps. Written: 32 KiB per
// block.
#include <algorithm>

#include "modulated_deform_conv2d/backward_weight_tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {
namespace {

constexpr int kPixels = 64;  // four threads for each, with a vector of every step
constexpr int kSteps = 4;    // two warps for each: 24 KiB of shared memory and 32 sums per thread
constexpr int kOutputVectors = kOutputs / kLaneChannels;
constexpr int kStepVectors = kStepChannels / kLaneChannels;
static_assert(kPixels * kStepVectors == kThreads);
constexpr int kWarpOutputs = 32, kRowTiles = kWarpOutputs / 16, kColumnTiles = kStepChannels / 8;
static_assert(kThreads / 32 == kSteps * kOutputs / kWarpOutputs);
constexpr int kOwnSums = kRowTiles * kColumnTiles * 4;
constexpr int kBlockSums = kThreads * kOwnSums;

// Ranges: two waves of 132 SMs with 2 blocks each, none shorter than 8 tiles of pixels, and partial
// sums of at most 64 MiB.
constexpr int64_t kWantedBlocks = 512, kLeastTiles = 8, kMostPartials = int64_t{16} << 20;

MAFNET_HOST_DEVICE int steps_of(const ModulatedDeformConv2dParams& p) {
  return p.taps() * (p.channels / kStepChannels);
}
MAFNET_HOST_DEVICE int64_t step_blocks(const ModulatedDeformConv2dParams& p) {
  return ceil_div(steps_of(p), kSteps);
}
MAFNET_HOST_DEVICE int64_t tiles_of(const ModulatedDeformConv2dParams& p) {
  return ceil_div(p.pixels(), kPixels);
}

MAFNET_HOST_DEVICE int64_t output_tiles_of(const ModulatedDeformConv2dParams& p) {
  return ceil_div(p.out_channels, kOutputs);
}
MAFNET_HOST_DEVICE int64_t blocks_per_range(const ModulatedDeformConv2dParams& p) {
  return step_blocks(p) * output_tiles_of(p);
}

int64_t range_count(const ModulatedDeformConv2dParams& p) {
  const int64_t wanted = ceil_div(kWantedBlocks, blocks_per_range(p));
  const int64_t useful = ceil_div(p.batch * tiles_of(p), kLeastTiles);
  const int64_t affordable = kMostPartials / (blocks_per_range(p) * kBlockSums);
  return std::max<int64_t>(1, std::min({wanted, useful, affordable}));
}

// Behind the sums of the weight: of every range, output tile and thread.
MAFNET_HOST_DEVICE float* bias_partials_of(const ModulatedDeformConv2dParams& p, int64_t ranges) {
  return static_cast<float*>(p.weight_partials) + ranges * blocks_per_range(p) * kBlockSums;
}

// Where vector v of row r lies in its row: then neither 8 rows of one vector, which ldmatrix reads,
// nor neighbouring vectors, which are written, meet in a bank.
template <int kVectors>
DEVICE int place_of(int r, int v) {
  return v ^ r / (8 / kVectors) % kVectors;
}

// What a vector of a step samples.
struct Source {
  int channel, offset_group;
  uint32_t plane;
  float tap_y, tap_x;
};

DEVICE Source make_source(const ModulatedDeformConv2dParams& p, int step, int vector) {
  const int parts = p.channels / kStepChannels, tap = step / parts;
  Source source;
  source.channel = step % parts * kStepChannels + vector * kLaneChannels;
  source.offset_group = p.offset_group_of(source.channel);
  source.plane = source.offset_group * p.taps() + tap;
  source.tap_y = static_cast<float>(tap / p.kernel_w * p.dilation_h);
  source.tap_x = static_cast<float>(tap % p.kernel_w * p.dilation_w);
  return source;
}

template <typename T, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)
    modulated_deform_conv2d_backward_weight_tensor_core_kernel(const ModulatedDeformConv2dParams p,
                                                               int64_t ranges) {
  SHARED(uint4, grads, [kPixels][kOutputVectors]);
  SHARED(uint4, samples, [kSteps][kPixels][kStepVectors]);
  SHARED(Source, sources, [kSteps][kStepVectors]);  // the divisions, once per block
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int output_tiles = static_cast<int>(output_tiles_of(p));
  int64_t block = blockIdx.x;
  const int first_step = static_cast<int>(block % step_blocks(p)) * kSteps;
  block /= step_blocks(p);
  const int first_output = static_cast<int>(block % output_tiles) * kOutputs;
  const int64_t range = block / output_tiles;
  const int64_t tiles = tiles_of(p), all_tiles = p.batch * tiles;
  const int64_t begin = all_tiles * range / ranges, end = all_tiles * (range + 1) / ranges;
  int64_t n = begin / tiles, first_pixel = (begin - n * tiles) * kPixels;

  const int pixels = static_cast<int>(p.pixels());
  const bool sums_bias = first_step == 0;
  const int block_steps = min(kSteps, steps_of(p) - first_step);
  const int sampled_row = thread / kStepVectors, vector = thread % kStepVectors;
  const int own_step = warp / 2, own_half = warp % 2;
  if (thread < block_steps * kStepVectors) {
    sources[sampled_row][vector] = make_source(p, first_step + sampled_row, vector);
  }
  __syncthreads();
  float sums[kRowTiles][kColumnTiles][4] = {}, bias_sum = 0;

  for (int64_t tile = begin; tile < end; ++tile) {
    const T* grad_output = static_cast<const T*>(p.grad_output) + n * p.grad_output_stride[0];
#pragma unroll
    for (int i = 0; i < kPixels * kOutputVectors / kThreads; ++i) {
      const int row = thread / kOutputVectors + i * (kThreads / kOutputVectors);
      const int column = thread % kOutputVectors, pixel = static_cast<int>(first_pixel) + row;
      const int output = first_output + column * kLaneChannels;
      const bool valid = pixel < pixels && output < p.out_channels;
      cp_async16(&grads[row][place_of<kOutputVectors>(row, column)],
                 grad_output + pixel * p.grad_output_stride[2] + output, valid);
    }
    cp_async_commit();

    const bool active = first_pixel + sampled_row < pixels;
    const int pixel = min(static_cast<int>(first_pixel) + sampled_row, pixels - 1);
    const int row = pixel / p.out_width;
    const float base_y = static_cast<float>(row * p.stride_h - p.padding_h);
    const float base_x = static_cast<float>((pixel - row * p.out_width) * p.stride_w - p.padding_w);
    const CoordinateOrigin origin = make_origin<T>(p, n);
    const T* input = static_cast<const T*>(p.input) + n * p.input_stride[0];
    for (int step = 0; step < block_steps; ++step) {
      const Source source = sources[step][vector];
      const Position position =
          make_position(base_y + source.tap_y, base_x + source.tap_x,
                        load_coordinates<T, kRaw>(p, origin, static_cast<uint32_t>(pixel),
                                                  source.offset_group, source.plane));
      const Image image = image_of(p, input, source.channel);
      const Corners<4> corners =
          __all_sync(0xffffffffu, is_inner(position, p.height - 1, p.width - 1))
              ? inner_corners<4>(position, image)
              : edge_corners<4>(p, position, image);
      float sample[kLaneChannels];
      blend<T>(corners, sample);
      // Past the end grad_output is 0, and so the sample must be: it could be NaN.
      samples[step][sampled_row][place_of<kStepVectors>(sampled_row, vector)] =
          active ? make_uint4(pack(sample[0], sample[1], T()), pack(sample[2], sample[3], T()),
                              pack(sample[4], sample[5], T()), pack(sample[6], sample[7], T()))
                 : make_uint4(0, 0, 0, 0);
    }
    cp_async_wait<0>();
    __syncthreads();

    // Of the blocks that read these grad_outputs one sums them up.
    if (sums_bias) {
      const int output = thread % kOutputs;
      for (int r = thread / kOutputs; r < kPixels; r += kThreads / kOutputs) {
        const uint4& eight = grads[r][place_of<kOutputVectors>(r, output / kLaneChannels)];
        bias_sum += to_accumulator(reinterpret_cast<const T*>(&eight)[output % kLaneChannels]);
      }
    }
    if (own_step < block_steps) {
#pragma unroll
      for (int first = 0; first < kPixels; first += 16) {
        uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const int r = first + lane % 8 + lane / 16 * 8;
          const int v = own_half * (kWarpOutputs / kLaneChannels) + 2 * i + lane / 8 % 2;
          ldmatrix_trans(a[i], &grads[r][place_of<kOutputVectors>(r, v)]);
        }
#pragma unroll
        for (int j = 0; j < kColumnTiles / 2; ++j) {
          const int r = first + lane % 16, v = 2 * j + lane / 16;
          ldmatrix_trans(b[j], &samples[own_step][r][place_of<kStepVectors>(r, v)]);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) {
            const uint32_t (&pair)[4] = b[j / 2];
            mma_m16n8k16(sums[i][j], a[i], {pair[j % 2 * 2], pair[j % 2 * 2 + 1]}, T());
          }
        }
      }
    }
    __syncthreads();  // the tiles are free again

    first_pixel += kPixels;
    if (first_pixel >= pixels) {
      first_pixel = 0;
      ++n;
    }
  }

  float* partials = static_cast<float*>(p.weight_partials) + blockIdx.x * int64_t{kBlockSums};
#pragma unroll
  for (int i = 0; i < kOwnSums; ++i) {
    partials[i * kThreads + thread] = sums[i / (4 * kColumnTiles)][i / 4 % kColumnTiles][i % 4];
  }
  if (first_step == 0) {
    bias_partials_of(p, ranges)[block * kThreads + thread] = bias_sum;
  }
}

// One thread per sum of the blocks of a range, which finds out what the kernel above summed there.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_sum_tensor_core_partials_kernel(const ModulatedDeformConv2dParams p,
                                                            int64_t ranges) {
  const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int i = static_cast<int>(blockIdx.x) % kOwnSums;
  const int block = static_cast<int>(blockIdx.x) / kOwnSums;
  const int blocks = static_cast<int>(step_blocks(p)), parts = p.channels / kStepChannels;
  const int step = block % blocks * kSteps + warp / 2;
  const int output = block / blocks * kOutputs + warp % 2 * kWarpOutputs +
                     i / (4 * kColumnTiles) * 16 + i % 4 / 2 * 8 + lane / 4;
  const int channel =
      step % parts * kStepChannels + i / 4 % kColumnTiles * 8 + lane % 4 * 2 + i % 2;
  if (step >= steps_of(p) || output >= p.out_channels) return;
  const float* partials = static_cast<const float*>(p.weight_partials) + place;
  const int64_t range_stride = int64_t{gridDim.x} * kThreads;
  float sum = 0;
  for (int64_t range = 0; range < ranges; ++range) sum += partials[range * range_stride];
  static_cast<T*>(
      p.grad_weight)[(int64_t{output} * p.channels + channel) * p.taps() + step / parts] =
      from_accumulator<T>(sum);
}

// One thread per output channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_sum_tensor_core_bias_kernel(const ModulatedDeformConv2dParams p,
                                                        int64_t ranges) {
  const int64_t output = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (output >= p.out_channels) return;
  const float* partials =
      bias_partials_of(p, ranges) + output / kOutputs * kThreads + output % kOutputs;
  float sum = 0;
  for (int64_t range = 0; range < ranges; ++range) {
    for (int i = 0; i < kThreads; i += kOutputs) {
      sum += partials[range * output_tiles_of(p) * kThreads + i];
    }
  }
  static_cast<T*>(p.grad_bias)[output] = from_accumulator<T>(sum);
}

template <typename T>
int launch_bias_typed(const ModulatedDeformConv2dParams& p, void* stream) {
  return launch(modulated_deform_conv2d_sum_tensor_core_bias_kernel<T>,
                grid_of(ceil_div(p.out_channels, kThreads)), dim3(kThreads), 0, stream, p,
                range_count(p));
}

template <typename T>
int launch_typed(const ModulatedDeformConv2dParams& p, void* stream) {
  const int64_t ranges = range_count(p), blocks = blocks_per_range(p);
  const auto kernel = p.raw.used
                          ? modulated_deform_conv2d_backward_weight_tensor_core_kernel<T, true>
                          : modulated_deform_conv2d_backward_weight_tensor_core_kernel<T, false>;
  const int status = launch(kernel, grid_of(ranges * blocks), dim3(kThreads), 0, stream, p, ranges);
  if (status != 0) return status;
  return launch(modulated_deform_conv2d_sum_tensor_core_partials_kernel<T>,
                grid_of(blocks * kOwnSums), dim3(kThreads), 0, stream, p, ranges);
}

}  // namespace

bool weight_suits_tensor_cores(const ModulatedDeformConv2dParams& p) {
  return backward_suits_tensor_cores(p);
}

int64_t tensor_core_weight_partials(const ModulatedDeformConv2dParams& p) {
  return range_count(p) * (blocks_per_range(p) * kBlockSums + output_tiles_of(p) * kThreads);
}

int launch_backward_weight_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.dtype == Dtype::kFloat16) return launch_typed<__half>(p, stream);
  return launch_typed<__nv_bfloat16>(p, stream);
}

int launch_backward_bias_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.dtype == Dtype::kFloat16) return launch_bias_typed<__half>(p, stream);
  return launch_bias_typed<__nv_bfloat16>(p, stream);
}

}  // namespace mafnet
