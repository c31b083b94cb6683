// modulated_deform_conv2d and deform_align forward on tensor cores: fp16, bf16 and fp32, channels
// last, 32 channels at a time, offset groups of whole 4 channels, one group of the convolution
// (forward.cu has the formula).
//
// An implicit matrix product, pixels x (tap, channel) times (tap, channel) x output channels, whose
// left operand exists in registers alone. A warp owns 16 output pixels and 64 output channels. Lane
// 4 r + t samples channels 8 t .. 8 t + 7 of pixels r and r + 8, which are its share of that
// operand (tensor_core_products.cuh): the lane samples what it multiplies, nothing is exchanged.
// The right operand is packed in the same order by a kernel of its own and streams through a ring
// in shared memory. Its columns are numbered so that a lane's sums are 8 neighbouring output
// channels.
//
// A step is one tap of 32 channels. Coordinates and weights are float. A lane's channels are one
// run of an offset group or two, each with a position of its own; kRaw: positions are worked out of
// the raw output of a head and of flows, again for each step. Per (pixel, tap, offset group):
// offsets and mask read once where groups have 8 channels; per sample the four corners, from L1
// where offsets are smooth.
#include "modulated_deform_conv2d/forward_tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core_products.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {
namespace {

constexpr int kWarpPixels = 16, kPixels = kThreads / 32 * kWarpPixels;
constexpr int kOutputs = 64, kColumnTiles = kOutputs / 8;
constexpr int kStepChannels = 32;
constexpr int kSmallestRun = 4;                // of channels in one offset group
constexpr int kLaneTiles = kColumnTiles * 32;  // of a stage: one for every thread
static_assert(kLaneTiles == kThreads);

// Bounds under which coordinates are exact in float and in split_floor, pixels fit into int and
// byte offsets from where an image begins into 32 bits, and products with reciprocals find the
// offset group.
constexpr int64_t kMostPositions = int64_t{1} << 22;
constexpr int64_t kMostPixels = int64_t{1} << 30;
constexpr int64_t kMostBytes = (int64_t{1} << 32) - 1;
constexpr int kMostChannels = 2048;
constexpr int64_t kMostImages = 65535;  // of the grid's second dimension

// The output channel that column `column` of column tile `tile` stands for.
DEVICE int output_of(int tile, int column) {
  return 32 * (tile / 4) + 8 * (column / 2) + 2 * (tile % 4) + column % 2;
}

// What a stage holds: for each column tile, vector and lane 16 bytes.
template <typename Products>
DEVICE int vector_of(int column_tile, int vector, int lane) {
  return (column_tile * Products::kVectors + vector) * 32 + lane;
}

// A block packs the stage of one step and output tile, a thread what a lane has of a column tile.
template <typename Products>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_pack_weight_kernel(const ModulatedDeformConv2dParams p) {
  using T = typename Products::Feature;
  const int tap_steps = p.channels / kStepChannels;
  const int output_tiles = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int step = static_cast<int>(blockIdx.x) / output_tiles;
  const int output_tile = static_cast<int>(blockIdx.x) % output_tiles;
  const int tap = step / tap_steps, tap_step = step % tap_steps;
  const int column_tile = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int output = output_tile * kOutputs + output_of(column_tile, lane / 4);
  const int channel = tap_step * kStepChannels + lane % 4 * kLaneChannels;
  const bool known = output < p.out_channels;
  const T* weight =
      static_cast<const T*>(p.weight) + (int64_t{output} * p.channels + channel) * p.taps() + tap;
  float weights[kLaneChannels];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    weights[i] = known ? to_accumulator(weight[int64_t{i} * p.taps()]) : 0.0f;
  }
  uint4 vectors[Products::kVectors];
  Products::pack_weights(weights, vectors);
  uint4* stage =
      static_cast<uint4*>(p.packed_weight) + int64_t{blockIdx.x} * kLaneTiles * Products::kVectors;
#pragma unroll
  for (int i = 0; i < Products::kVectors; ++i) {
    stage[vector_of<Products>(column_tile, i, lane)] = vectors[i];
  }
}

template <typename Products, int kRuns, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)
    modulated_deform_conv2d_forward_tensor_core_kernel(const ModulatedDeformConv2dParams p) {
  using T = typename Products::Feature;
  constexpr int kVectors = Products::kVectors, kStages = Products::kStages;
  SHARED(uint4, ring, [kStages][kLaneTiles * kVectors]);
  const int thread = threadIdx.x, lane = thread % 32;
  const int output_tiles = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int output_tile = static_cast<int>(blockIdx.x) % output_tiles;
  const int tile = static_cast<int>(blockIdx.x) / output_tiles;
  // A coordinate of the grid: the compiler knows it to be one for all lanes, and keeps what begins
  // at an image in uniform registers.
  const int64_t n = blockIdx.y;

  // This lane's two pixels; those past the end repeat the last one and are not stored.
  const int pixels = static_cast<int>(p.pixels());
  const int first = tile * kPixels + thread / 32 * kWarpPixels + lane / 4;
  const int pixel[2] = {min(first, pixels - 1), min(first + 8, pixels - 1)};
  const bool stored[2] = {first < pixels, first + 8 < pixels};
  float base_y[2], base_x[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = pixel[q] / p.out_width;
    base_y[q] = static_cast<float>(row * p.stride_h - p.padding_h);
    base_x[q] = static_cast<float>((pixel[q] - row * p.out_width) * p.stride_w - p.padding_w);
  }
  const CoordinateOrigin origin = make_origin<T>(p, n);

  const int tap_steps = p.channels / kStepChannels, steps = p.taps() * tap_steps;
  Image image;
  image.data = reinterpret_cast<const unsigned char*>(static_cast<const T*>(p.input) +
                                                      n * p.input_stride[0]);
  image.row_stride = static_cast<uint32_t>(p.input_stride[2] * int64_t{sizeof(T)});
  image.column_stride = static_cast<uint32_t>(p.input_stride[3] * int64_t{sizeof(T)});
  // Run v of kRun channels lies in offset group v / runs_per_group % offset_groups, by products and
  // shifts.
  constexpr int kRun = kLaneChannels / kRuns, kRunWords = kRun / kOfWord<T>;
  const int runs_per_group = p.offset_group_channels() / kRun;
  const int run_reciprocal = ((1 << 16) + runs_per_group - 1) / runs_per_group;
  const int group_reciprocal = ((1 << 20) + p.offset_groups - 1) / p.offset_groups;

  const uint4* packed = static_cast<const uint4*>(p.packed_weight);
  const auto fetch_stage = [&](int step) {
    if (step < steps) {
      const uint4* stage =
          packed + (int64_t{step} * output_tiles + output_tile) * kLaneTiles * kVectors;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = i * kThreads + thread;
        cp_async16(&ring[step % kStages][at], stage + at);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch_stage(step);

  float sums[kColumnTiles][4] = {};
  int tap_step = 0, tap_row = 0, tap_column = 0;
  for (int step = 0; step < steps; ++step) {
    const int tap = tap_row * p.kernel_w + tap_column;
    const int run = (tap_step * (kStepChannels / kLaneChannels) + lane % 4) * kRuns;
    const float tap_y = static_cast<float>(tap_row * p.dilation_h);
    const float tap_x = static_cast<float>(tap_column * p.dilation_w);
    Position position[kRuns][2];
    bool inner = true;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int part_group = (run + i) * run_reciprocal >> 16;
      const int offset_group = part_group - (part_group * group_reciprocal >> 20) * p.offset_groups;
      const int plane = offset_group * p.taps() + tap;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        position[i][q] =
            make_position(base_y[q] + tap_y, base_x[q] + tap_x,
                          load_coordinates<T, kRaw>(p, origin, static_cast<uint32_t>(pixel[q]),
                                                    offset_group, static_cast<uint32_t>(plane)));
        inner = is_inner(p, position[i][q]) && inner;
      }
    }
    Corners<kRunWords> corners[kRuns][2];
    const bool all_inner = __all_sync(0xffffffffu, inner);
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      image.channels = static_cast<uint32_t>((run + i) * kRun) * uint32_t{sizeof(T)};
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        corners[i][q] = all_inner ? inner_corners<kRunWords>(position[i][q], image)
                                  : edge_corners<kRunWords>(p, position[i][q], image);
      }
    }
    float samples[2][kLaneChannels];
#pragma unroll
    for (int i = 0; i < 2 * kRuns; ++i) {
      blend<T>(corners[i / 2][i % 2], samples[i % 2] + i / 2 * kRun);
    }
    const Products products(samples);

    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all have left the one before it
    fetch_stage(step + kStages - 1);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      uint4 weights[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        weights[i] = ring[step % kStages][vector_of<Products>(tile, i, lane)];
      }
      products.add(sums[tile], weights);
    }

    if (++tap_step == tap_steps) {
      tap_step = 0;
      if (++tap_column == p.kernel_w) {
        tap_column = 0;
        ++tap_row;
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = output_tile * kOutputs + 32 * half + lane % 4 * kLaneChannels;
    if (output >= p.out_channels) break;
    float bias[kLaneChannels] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        bias[i] = to_accumulator(static_cast<const T*>(p.bias)[output + i]);
      }
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (!stored[q]) continue;
      T* target = static_cast<T*>(p.output) + n * p.output_stride[0] +
                  pixel[q] * p.output_stride[2] + output;
      constexpr int kOfStore = 16 / sizeof(T);
#pragma unroll
      for (int first_of_store = 0; first_of_store < kLaneChannels; first_of_store += kOfStore) {
        Vector<T, kOfStore> stored_together;
#pragma unroll
        for (int j = 0; j < kOfStore; ++j) {
          const int i = first_of_store + j;
          stored_together.at[j] =
              from_accumulator<T>(sums[4 * half + i / 2][2 * q + i % 2] + bias[i]);
        }
        store_vector(target + first_of_store, stored_together);
      }
    }
  }
}

bool is_aligned(const void* pointer, int64_t first_stride, int64_t second_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && first_stride % kLaneChannels == 0 &&
         second_stride % kLaneChannels == 0;
}

// Whether an image of `planes` planes, at these strides of planes and pixels, is within kMostBytes.
bool fits(int64_t planes, int64_t pixels, int64_t plane_stride, int64_t pixel_stride, Dtype dtype) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  return ((planes - 1) * plane_stride + (pixels - 1) * pixel_stride + 1) * size <= kMostBytes;
}

bool is_small(const ModulatedDeformConv2dParams& p) {
  const auto reach = [](int64_t out, int64_t stride, int64_t padding, int64_t kernel,
                        int64_t dilation) { return out * stride + padding + kernel * dilation; };
  const int64_t planes = int64_t{p.offset_groups} * p.taps(), pixels = p.pixels();
  const int64_t (&offset)[3] = p.offset_stride, (&mask)[3] = p.mask_stride;
  // Strides of what is not there are 0.
  const bool coordinates_fit =
      fits(2 * planes, pixels, offset[1], offset[2], p.offset_dtype) &&
      fits(planes, pixels, mask[1], mask[2], p.mask_dtype) &&
      fits(2, pixels, p.raw.flow_stride[0][2], p.raw.flow_stride[0][1], p.raw.flow_dtype) &&
      fits(2, pixels, p.raw.flow_stride[1][2], p.raw.flow_stride[1][1], p.raw.flow_dtype);
  const int64_t columns = (p.width - 1) * p.input_stride[3] + p.channels;
  return coordinates_fit && fits(p.height, columns, p.input_stride[2], 1, p.dtype) &&
         p.batch <= kMostImages && pixels <= kMostPixels && p.height <= kMostPositions &&
         p.width <= kMostPositions &&
         reach(p.out_height, p.stride_h, p.padding_h, p.kernel_h, p.dilation_h) <= kMostPositions &&
         reach(p.out_width, p.stride_w, p.padding_w, p.kernel_w, p.dilation_w) <= kMostPositions;
}

bool takes(const ModulatedDeformConv2dParams& p) {
  const bool has_type =
      p.dtype == Dtype::kFloat16 || (p.dtype != Dtype::kFloat64 && has_bfloat16_tensor_cores());
  const bool has_channels =
      p.groups == 1 && p.channels % kStepChannels == 0 && p.channels <= kMostChannels &&
      p.offset_group_channels() % kSmallestRun == 0 && p.out_channels % kLaneChannels == 0;
  const bool has_layout = p.input_stride[1] == 1 && p.output_stride[1] == 1 &&
                          p.input_stride[0] % kLaneChannels == 0 &&
                          is_aligned(p.input, p.input_stride[2], p.input_stride[3]) &&
                          is_aligned(p.output, p.output_stride[0], p.output_stride[2]);
  return has_type && has_channels && has_layout && is_small(p);
}

int64_t stages(const ModulatedDeformConv2dParams& p) {
  return int64_t{p.taps()} * (p.channels / kStepChannels) * ceil_div(p.out_channels, kOutputs);
}

template <typename Products>
int launch_products(const ModulatedDeformConv2dParams& p, void* stream) {
  const int status = launch(modulated_deform_conv2d_pack_weight_kernel<Products>,
                            grid_of(stages(p)), dim3(kThreads), 0, stream, p);
  if (status != 0) return status;
  const int64_t blocks = ceil_div(p.pixels(), kPixels) * ceil_div(p.out_channels, kOutputs);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.batch));
  const bool whole = p.offset_group_channels() % kLaneChannels == 0;
  const auto kernel =
      p.raw.used ? whole ? modulated_deform_conv2d_forward_tensor_core_kernel<Products, 1, true>
                         : modulated_deform_conv2d_forward_tensor_core_kernel<Products, 2, true>
      : whole    ? modulated_deform_conv2d_forward_tensor_core_kernel<Products, 1, false>
                 : modulated_deform_conv2d_forward_tensor_core_kernel<Products, 2, false>;
  return launch(kernel, grid, dim3(kThreads), 0, stream, p);
}

// Calls body(Type<Products>{}).
template <typename Body>
auto dispatch_products(const ModulatedDeformConv2dParams& p, const Body& body) {
  if (p.dtype == Dtype::kFloat16) return body(Type<HalfProducts<__half>>{});
  if (p.dtype == Dtype::kBFloat16) return body(Type<HalfProducts<__nv_bfloat16>>{});
  if (p.allow_tf32) return body(Type<Tf32Products>{});
  return body(Type<SplitTf32Products>{});
}

}  // namespace

int64_t modulated_deform_conv2d_packed_weight_bytes(const ModulatedDeformConv2dParams& p) {
  if (!takes(p)) return 0;
  const int vectors = dispatch_products(p, [](auto type) {
    using Products = typename decltype(type)::type;
    return Products::kVectors;
  });
  return stages(p) * kLaneTiles * vectors * int64_t{sizeof(uint4)};
}

int launch_forward_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  return dispatch_products(
      p, [&](auto type) { return launch_products<typename decltype(type)::type>(p, stream); });
}

}  // namespace mafnet
