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
#include <cstring>

#include "modulated_deform_conv2d/forward_tensor_core.cuh"
#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {
namespace {

constexpr int kWarpPixels = 16, kPixels = kThreads / 32 * kWarpPixels;
constexpr int kOutputs = 64, kColumnTiles = kOutputs / 8;
constexpr int kStepChannels = 32, kVectorChannels = 8;
constexpr int kStageVectors = kColumnTiles * 32;  // of 16 bytes: one for every thread
static_assert(kStageVectors == kThreads);
constexpr int kStages = 4;  // 16 KiB; the rest of the SM's memory is L1, which the samples need
constexpr int kAhead = kStages - 2;  // stages under way while one is used and one is being left

// Bounds under which coordinates are exact in float and in split_floor, pixels and element offsets
// of an image fit into int, and vector * reciprocal finds the offset group.
constexpr int64_t kMostPositions = int64_t{1} << 22;
constexpr int64_t kMostElements = (int64_t{1} << 31) - 1;
constexpr int kMostChannels = 2048;

DEVICE float2 unpack(uint32_t pair, __half) {
  __half2 v;
  std::memcpy(&v, &pair, sizeof v);
  return __half22float2(v);
}
DEVICE float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <typename Pair>
DEVICE uint32_t bits_of_pair(Pair pair) {
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  return bits;
}
DEVICE uint32_t pack(float low, float high, __half) {
  return bits_of_pair(__floats2half2_rn(low, high));
}
DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  return bits_of_pair(__floats2bfloat162_rn(low, high));
}

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

struct Coordinates {
  float dy, dx, mask;
};

// offset and mask begin at the image; pixel is in it.
template <typename T>
DEVICE Coordinates load_coordinates(const ModulatedDeformConv2dParams& p, int64_t offset_image,
                                    int64_t mask_image, int pixel, int plane) {
  const int64_t at = offset_image + 2 * plane * p.offset_stride[1] + pixel * p.offset_stride[2];
  const bool is_t = p.offset_dtype == p.dtype;
  Coordinates c;
  c.dy = load_coordinate<T>(p.offset, is_t, at);
  c.dx = load_coordinate<T>(p.offset, is_t, at + p.offset_stride[1]);
  c.mask = 1;
  if (p.mask != nullptr) {
    c.mask = load_coordinate<T>(p.mask, p.mask_dtype == p.dtype,
                                mask_image + plane * p.mask_stride[1] + pixel * p.mask_stride[2]);
  }
  return c;
}

// The four corners of a sample, 8 channels each, and their weights.
struct Corners {
  uint4 value[4];
  float weight[4];
};

template <typename T>
DEVICE uint4 load_vector(const T* address) {
  return *reinterpret_cast<const uint4*>(address);
}

// What a sample is made of before its corners are read.
struct Position {
  float y, x, part_y, part_x, mask;
  int row, column;
};

DEVICE Position make_position(float base_y, float base_x, const Coordinates& c) {
  Position s;
  s.y = base_y + c.dy;
  s.x = base_x + c.dx;
  s.row = split_floor(s.y, s.part_y);
  s.column = split_floor(s.x, s.part_x);
  s.mask = c.mask;
  return s;
}

// All four corners in the image. Not so for NaN and for far coordinates.
DEVICE bool is_inner(const ModulatedDeformConv2dParams& p, const Position& s) {
  return static_cast<unsigned>(s.row) < static_cast<unsigned>(p.height - 1) &&
         static_cast<unsigned>(s.column) < static_cast<unsigned>(p.width - 1);
}

template <typename T>
DEVICE Corners inner_corners(const Position& s, const T* image, int row_stride, int column_stride) {
  const T* top = image + (s.row * row_stride + s.column * column_stride);
  const T* bottom = top + row_stride;
  Corners c;
  c.value[0] = load_vector(top);
  c.value[1] = load_vector(top + column_stride);
  c.value[2] = load_vector(bottom);
  c.value[3] = load_vector(bottom + column_stride);
  const float low = (1 - s.part_y) * s.mask, high = s.part_y * s.mask;
  c.weight[0] = low * (1 - s.part_x);
  c.weight[1] = low * s.part_x;
  c.weight[2] = high * (1 - s.part_x);
  c.weight[3] = high * s.part_x;
  return c;
}

template <typename T>
DEVICE Corners edge_corners(const ModulatedDeformConv2dParams& p, const Position& s, const T* image,
                            int row_stride, int column_stride) {
  Sample<float> sample;
  sample.rows = sample_axis<Interpolation::kBilinear, float>(s.y, p.height, Padding::kZeros);
  sample.columns = sample_axis<Interpolation::kBilinear, float>(s.x, p.width, Padding::kZeros);
  Corners c;
  for_corners(sample, row_stride, column_stride, [&](int j, int k, bool inside, int64_t at) {
    c.value[2 * j + k] = inside ? load_vector(image + at) : make_uint4(0, 0, 0, 0);
    c.weight[2 * j + k] = sample.rows.weight[j] * s.mask * sample.columns.weight[k];
  });
  return c;
}

// The sample of 8 channels as four pairs.
template <typename T>
DEVICE void blend(const Corners& c, uint32_t (&sample)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low = 0, high = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t pairs[4] = {c.value[k].x, c.value[k].y, c.value[k].z, c.value[k].w};
      const float2 v = unpack(pairs[i], T());
      low += c.weight[k] * v.x;
      high += c.weight[k] * v.y;
    }
    sample[i] = pack(low, high, T());
  }
}

template <typename T>
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
  const int64_t offset_image = n * p.offset_stride[0], mask_image = n * p.mask_stride[0];

  const int parts = p.channels / kStepChannels, steps = p.taps() * parts;
  const T* image =
      static_cast<const T*>(p.input) + n * p.input_stride[0] + lane % 4 * kVectorChannels;
  const int row_stride = static_cast<int>(p.input_stride[2]);
  const int column_stride = static_cast<int>(p.input_stride[3]);
  // Vector v of a pixel lies in offset group v / vectors_per_group, by a product and a shift.
  const int vectors_per_group = p.offset_group_channels() / kVectorChannels;
  const int reciprocal = ((1 << 16) + vectors_per_group - 1) / vectors_per_group;

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
    const int vector = part * (kStepChannels / kVectorChannels) + lane % 4;
    const int plane = (vector * reciprocal >> 16) * p.taps() + tap;
    const float tap_y = static_cast<float>(tap_row * p.dilation_h);
    const float tap_x = static_cast<float>(tap_column * p.dilation_w);
    Position position[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      position[q] =
          make_position(base_y[q] + tap_y, base_x[q] + tap_x,
                        load_coordinates<T>(p, offset_image, mask_image, pixel[q], plane));
    }
    const T* source = image + part * kStepChannels;
    const bool inner = is_inner(p, position[0]) && is_inner(p, position[1]);
    Corners corners[2];
    if (__all_sync(0xffffffffu, inner)) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        corners[q] = inner_corners(position[q], source, row_stride, column_stride);
      }
    } else {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        corners[q] = edge_corners(p, position[q], source, row_stride, column_stride);
      }
    }
    uint32_t samples[2][4];
    blend<T>(corners[0], samples[0]);
    blend<T>(corners[1], samples[1]);
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
      p.offset_group_channels() % kVectorChannels == 0 && p.out_channels % kVectorChannels == 0;
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
  return launch(modulated_deform_conv2d_forward_tensor_core_kernel<T>, grid_of(blocks),
                dim3(kThreads), 0, stream, p);
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
