// modulated_deform_conv2d forward on tensor cores: fp16 and bf16, channels last, 32 channels at a
// time, offset groups of whole 8 channels, one group of the convolution (forward.cu has the
// formula).
//
// An implicit matrix product, pixels x (tap, channel) times (tap, channel) x output channels, whose
// left operand exists in registers alone. A warp owns 16 output pixels and 64 output channels. In
// mma.m16n8k16 lane 4 r + t holds rows r and r + 8 of A; numbering the 16 columns of two k-steps so
// that its elements are channels 8 t .. 8 t + 7 of pixels r and r + 8 makes them what one 16-byte
// load per corner brings: the lane samples what it multiplies, nothing is exchanged. B is packed in
// the same order by a kernel of its own, 16 bytes per lane, and streams through a ring in shared
// memory. The columns of B are numbered so that a lane's sums are 8 neighbouring output channels.
//
// A step is one tap of 32 channels. Coordinates and weights are float, samples are rounded once to
// T, sums are float. Per (pixel, tap, offset group): offsets and mask read once where groups have 8
// channels; per sample four 16-byte reads, from L1 where offsets are smooth.
#include "modulated_deform_conv2d/forward_tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {
namespace {

constexpr int kWarpPixels = 16, kPixels = kThreads / 32 * kWarpPixels;
constexpr int kOutputs = 64, kColumnTiles = kOutputs / 8;
constexpr int kStepChannels = 32, kVectorChannels = 8;
constexpr int kSmallestRun = 4;                   // of channels in one offset group
constexpr int kStageVectors = kColumnTiles * 32;  // of 16 bytes: one for every thread
static_assert(kStageVectors == kThreads);
constexpr int kStages = 4;  // 16 KiB; the rest of the SM's memory is L1, which the samples need
constexpr int kAhead = kStages - 2;  // stages under way while one is used and one is being left

// Bounds under which coordinates are exact in float and in split_floor, pixels and element offsets
// of an image fit into int, and products with reciprocals find the offset group.
constexpr int64_t kMostPositions = int64_t{1} << 22;
constexpr int64_t kMostElements = (int64_t{1} << 31) - 1;
constexpr int kMostChannels = 2048;

// The output channel that column `column` of column tile `tile` stands for.
DEVICE int output_of(int tile, int column) {
  return 32 * (tile / 4) + 8 * (column / 2) + 2 * (tile % 4) + column % 2;
}

// Vector i: of a step, an output tile, a column tile and a lane, as the forward kernel reads them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_pack_weight_kernel(const ModulatedDeformConv2dParams p) {
  const int parts = p.channels / kStepChannels;
  const int output_tiles = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int64_t vector = int64_t{blockIdx.x} * kStageVectors + threadIdx.x;
  const int step = static_cast<int>(blockIdx.x) / output_tiles;
  const int output_tile = static_cast<int>(blockIdx.x) % output_tiles;
  const int tap = step / parts, part = step % parts;
  const int column_tile = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int output = output_tile * kOutputs + output_of(column_tile, lane / 4);
  const int channel = part * kStepChannels + lane % 4 * kVectorChannels;
  const bool known = output < p.out_channels;
  const T* weight =
      static_cast<const T*>(p.weight) + (int64_t{output} * p.channels + channel) * p.taps() + tap;
  T* packed = static_cast<T*>(p.packed_weight) + vector * kVectorChannels;
#pragma unroll
  for (int i = 0; i < kVectorChannels; ++i) {
    packed[i] = known ? weight[int64_t{i} * p.taps()] : from_accumulator<T>(0.0f);
  }
}

// A lane's kVectorChannels channels lie in kParts offset groups (or runs of one).
template <typename T, int kParts, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)
    modulated_deform_conv2d_forward_tensor_core_kernel(const ModulatedDeformConv2dParams p) {
  SHARED(uint4, ring, [kStages][kStageVectors]);
  const int thread = threadIdx.x, lane = thread % 32;
  const int output_tiles = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int64_t tiles = ceil_div(p.pixels(), kPixels);
  int64_t block = blockIdx.x;
  const int output_tile = static_cast<int>(block % output_tiles);
  block /= output_tiles;
  const int64_t n = block / tiles;

  // This lane's two pixels; those past the end repeat the last one and are not stored.
  const int pixels = static_cast<int>(p.pixels());
  const int first =
      static_cast<int>(block % tiles) * kPixels + thread / 32 * kWarpPixels + lane / 4;
  const int pixel[2] = {min(first, pixels - 1), min(first + 8, pixels - 1)};
  const bool stored[2] = {first < pixels, first + 8 < pixels};
  float base_y[2], base_x[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = pixel[q] / p.out_width;
    base_y[q] = static_cast<float>(row * p.stride_h - p.padding_h);
    base_x[q] = static_cast<float>((pixel[q] - row * p.out_width) * p.stride_w - p.padding_w);
  }
  const CoordinateOrigin origin = make_origin(p, n);

  const int parts = p.channels / kStepChannels, steps = p.taps() * parts;
  const T* image =
      static_cast<const T*>(p.input) + n * p.input_stride[0] + lane % 4 * kVectorChannels;
  const int row_stride = static_cast<int>(p.input_stride[2]);
  const int column_stride = static_cast<int>(p.input_stride[3]);
  // Run v of kRun channels lies in offset group v / runs_per_group % offset_groups, by products and
  // shifts.
  constexpr int kRun = kVectorChannels / kParts, kRunWords = kRun * int{sizeof(T)} / 4;
  const int runs_per_group = p.offset_group_channels() / kRun;
  const int run_reciprocal = ((1 << 16) + runs_per_group - 1) / runs_per_group;
  const int group_reciprocal = ((1 << 20) + p.offset_groups - 1) / p.offset_groups;

  const uint4* packed = static_cast<const uint4*>(p.packed_weight);
  const auto fetch_stage = [&](int step) {
    if (step < steps) {
      cp_async16(&ring[step % kStages][thread],
                 packed + (int64_t{step} * output_tiles + output_tile) * kStageVectors + thread);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch_stage(step);

  float sums[kColumnTiles][4] = {};
  int part = 0, tap_row = 0, tap_column = 0;
  for (int step = 0; step < steps; ++step) {
    const int tap = tap_row * p.kernel_w + tap_column;
    const int run = (part * (kStepChannels / kVectorChannels) + lane % 4) * kParts;
    const float tap_y = static_cast<float>(tap_row * p.dilation_h);
    const float tap_x = static_cast<float>(tap_column * p.dilation_w);
    Position position[kParts][2];
    bool inner = true;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part_group = (run + i) * run_reciprocal >> 16;
      const int offset_group = part_group - (part_group * group_reciprocal >> 20) * p.offset_groups;
      const int plane = offset_group * p.taps() + tap;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        position[i][q] =
            make_position(base_y[q] + tap_y, base_x[q] + tap_x,
                          load_coordinates<T, kRaw>(p, origin, pixel[q], offset_group, plane));
        inner = is_inner(p, position[i][q]) && inner;
      }
    }
    const T* source = image + part * kStepChannels;
    Corners<kRunWords> corners[kParts][2];
    if (__all_sync(0xffffffffu, inner)) {
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        corners[i / 2][i % 2] = inner_corners<kRunWords>(
            position[i / 2][i % 2], source + i / 2 * kRun, row_stride, column_stride);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) {
        corners[i / 2][i % 2] = edge_corners<kRunWords>(
            p, position[i / 2][i % 2], source + i / 2 * kRun, row_stride, column_stride);
      }
    }
    uint32_t samples[2][4];
#pragma unroll
    for (int i = 0; i < 2 * kParts; ++i) {
      blend<T>(corners[i / 2][i % 2], samples[i % 2] + i / 2 * kRunWords);
    }
    const uint32_t a[2][4] = {{samples[0][0], samples[1][0], samples[0][1], samples[1][1]},
                              {samples[0][2], samples[1][2], samples[0][3], samples[1][3]}};

    cp_async_wait<kAhead>();
    __syncthreads();  // the stage is there for all, and all have left the one before it
    fetch_stage(step + kStages - 1);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const uint4 b = ring[step % kStages][tile * 32 + lane];
      mma_m16n8k16(sums[tile], a[0], {b.x, b.y}, T());
      mma_m16n8k16(sums[tile], a[1], {b.z, b.w}, T());
    }

    if (++part == parts) {
      part = 0;
      if (++tap_column == p.kernel_w) {
        tap_column = 0;
        ++tap_row;
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = output_tile * kOutputs + 32 * half + lane % 4 * kVectorChannels;
    if (output >= p.out_channels) break;
    float bias[kVectorChannels] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kVectorChannels; ++i) {
        bias[i] = to_accumulator(static_cast<const T*>(p.bias)[output + i]);
      }
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (!stored[q]) continue;
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&sum)[4] = sums[4 * half + i];
        pairs[i] = pack(sum[2 * q] + bias[2 * i], sum[2 * q + 1] + bias[2 * i + 1], T());
      }
      T* target = static_cast<T*>(p.output) + n * p.output_stride[0] +
                  pixel[q] * p.output_stride[2] + output;
      *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

bool is_aligned(const void* pointer, int64_t first_stride, int64_t second_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && first_stride % kVectorChannels == 0 &&
         second_stride % kVectorChannels == 0;
}

bool is_small(const ModulatedDeformConv2dParams& p) {
  const auto reach = [](int64_t out, int64_t stride, int64_t padding, int64_t kernel,
                        int64_t dilation) { return out * stride + padding + kernel * dilation; };
  const int64_t elements =
      (p.height - 1) * p.input_stride[2] + (p.width - 1) * p.input_stride[3] + p.channels;
  return p.pixels() <= kMostElements - kPixels && p.height <= kMostPositions &&
         p.width <= kMostPositions && elements <= kMostElements &&
         reach(p.out_height, p.stride_h, p.padding_h, p.kernel_h, p.dilation_h) <= kMostPositions &&
         reach(p.out_width, p.stride_w, p.padding_w, p.kernel_w, p.dilation_w) <= kMostPositions;
}

bool takes(const ModulatedDeformConv2dParams& p) {
  const bool has_type =
      p.dtype == Dtype::kFloat16 || (p.dtype == Dtype::kBFloat16 && has_bfloat16_tensor_cores());
  const bool has_channels =
      p.groups == 1 && p.channels % kStepChannels == 0 && p.channels <= kMostChannels &&
      p.offset_group_channels() % kSmallestRun == 0 && p.out_channels % kVectorChannels == 0;
  const bool has_layout = p.input_stride[1] == 1 && p.output_stride[1] == 1 &&
                          p.input_stride[0] % kVectorChannels == 0 &&
                          is_aligned(p.input, p.input_stride[2], p.input_stride[3]) &&
                          is_aligned(p.output, p.output_stride[0], p.output_stride[2]);
  return has_type && has_channels && has_layout && is_small(p);
}

int64_t stages(const ModulatedDeformConv2dParams& p) {
  return int64_t{p.taps()} * (p.channels / kStepChannels) * ceil_div(p.out_channels, kOutputs);
}

template <typename T>
int launch_typed(const ModulatedDeformConv2dParams& p, void* stream) {
  const int status = launch(modulated_deform_conv2d_pack_weight_kernel<T>, grid_of(stages(p)),
                            dim3(kThreads), 0, stream, p);
  if (status != 0) return status;
  const int64_t blocks =
      p.batch * ceil_div(p.pixels(), kPixels) * ceil_div(p.out_channels, kOutputs);
  const bool whole = p.offset_group_channels() % kVectorChannels == 0;
  const auto kernel = p.raw.used
                          ? whole ? modulated_deform_conv2d_forward_tensor_core_kernel<T, 1, true>
                                  : modulated_deform_conv2d_forward_tensor_core_kernel<T, 2, true>
                      : whole ? modulated_deform_conv2d_forward_tensor_core_kernel<T, 1, false>
                              : modulated_deform_conv2d_forward_tensor_core_kernel<T, 2, false>;
  return launch(kernel, grid_of(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace

int64_t modulated_deform_conv2d_packed_weight_bytes(const ModulatedDeformConv2dParams& p) {
  return takes(p) ? stages(p) * kStageVectors * int64_t{sizeof(uint4)} : 0;
}

int launch_forward_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.dtype == Dtype::kFloat16) return launch_typed<__half>(p, stream);
  return launch_typed<__nv_bfloat16>(p, stream);
}

}  // namespace mafnet
