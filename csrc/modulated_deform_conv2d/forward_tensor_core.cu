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
// A step is one tap of 32 channels; all taps of them follow each other, so that a lane's offset
// group stays. Coordinates and weights are float. A lane's channels are one run of an offset group
// or two, each with a position of its own; kRaw: positions are worked out of the raw output of a
// head and of flows, again for each step. Per (pixel, tap, offset group): offsets and mask read
// once where groups have 8 channels; per sample the four corners, from L1 where offsets are smooth.
#include "modulated_deform_conv2d/forward_tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core_coordinates.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {
namespace {

constexpr int kWarpPixels = 16, kPixels = kThreads / 32 * kWarpPixels;
constexpr int kColumnTiles = kOutputs / 8;
constexpr int kSmallestRun = 4;                // of channels in one offset group
constexpr int kLaneTiles = kColumnTiles * 32;  // of a stage: one for every thread
static_assert(kLaneTiles == kThreads);

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
  const int output_tiles = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int step = static_cast<int>(blockIdx.x) / output_tiles;
  const int output_tile = static_cast<int>(blockIdx.x) % output_tiles;
  const int tap = step % p.taps(), channel_step = step / p.taps();
  const int column_tile = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int output = output_tile * kOutputs + output_of(column_tile, lane / 4);
  const int channel = channel_step * kStepChannels + lane % 4 * kLaneChannels;
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
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    store_mask_of_ones(stage + kLaneTiles * Products::kVectors);
  }
}

template <typename Products, int kRuns, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)
    modulated_deform_conv2d_forward_tensor_core_kernel(const ModulatedDeformConv2dParams p,
                                                       const Steps steps) {
  using T = typename Products::Feature;
  constexpr int kVectors = Products::kVectors, kStages = Products::kStages;
  constexpr unsigned kStage = kLaneTiles * kVectors;
  SHARED(uint4, ring, [kStages * kStage]);
  const int thread = threadIdx.x, lane = thread % 32;
  const int output_tiles = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int output_tile = static_cast<int>(blockIdx.x) % output_tiles;
  const int tile = static_cast<int>(blockIdx.x) / output_tiles;
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
  const CoordinatePlanes<T> planes(p, origin, steps, pixel);
  const T* input = static_cast<const T*>(p.input) + n * p.input_stride[0];

  // Run v of kRun channels lies in offset group v / runs_per_group % offset_groups, by products and
  // shifts.
  constexpr int kRun = kLaneChannels / kRuns, kRunWords = kRun / kOfWord<T>;
  const int runs_per_group = p.offset_group_channels() / kRun;
  const int run_reciprocal = ((1 << 16) + runs_per_group - 1) / runs_per_group;
  const int group_reciprocal = ((1 << 20) + p.offset_groups - 1) / p.offset_groups;

  // Vectors of packed_weight: of all stages, from one of this output tile to the next, and the next
  // one of this thread.
  const auto stage_stride = static_cast<unsigned>(output_tiles * kLaneTiles * kVectors);
  const unsigned packed_end = p.channels / kStepChannels * p.taps() * stage_stride;
  unsigned packed = static_cast<unsigned>(output_tile * kLaneTiles * kVectors + thread);
  const auto fetch_stage = [&](unsigned place) {
    if (packed < packed_end) {
      const uint4* source = static_cast<const uint4*>(p.packed_weight) + packed;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        cp_async16(&ring[place + (thread - lane) + i * kThreads], source + i * kThreads);
      }
    }
    packed += stage_stride;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch_stage(lane + i * kStage);

  float sums[kColumnTiles][4] = {};
  // Where in the ring this lane's weights are, of the step and of the one before it.
  unsigned place = lane, left_place = lane + (kStages - 1) * kStage;
  for (int channel_step = 0; channel_step < p.channels / kStepChannels; ++channel_step) {
    const int run = (channel_step * (kStepChannels / kLaneChannels) + lane % 4) * kRuns;
    int offset_group[kRuns];
    TapPointers tap[kRuns];
    Image image[kRuns];
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int part_group = (run + i) * run_reciprocal >> 16;
      offset_group[i] = part_group - (part_group * group_reciprocal >> 20) * p.offset_groups;
      tap[i] = planes.first_tap(offset_group[i] * p.taps());
      image[i] = image_of(p, input, (run + i) * kRun);
      image[i].data = held(image[i].data);
    }
    for (int row = 0; row < p.kernel_h; ++row) {
      for (int column = 0; column < p.kernel_w; ++column) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the stage is there for all, and all have left the one before it
        fetch_stage(left_place);

        Coordinates<float> coordinates[kRuns][2];
        planes.load_tap(tap, coordinates);
        Position position[kRuns][2];
        bool inner = true;
#pragma unroll
        for (int i = 0; i < 2 * kRuns; ++i) {
          Coordinates<float>& c = coordinates[i / 2][i % 2];
          if constexpr (kRaw) {
            finish_raw<T>(p, origin, static_cast<uint32_t>(pixel[i % 2]), offset_group[i / 2], c);
          }
          Position& s = position[i / 2][i % 2] = make_position(base_y[i % 2], base_x[i % 2], c);
          inner = is_inner(s, steps.last_row, steps.last_column) && inner;
        }
        // Blended before both ways meet: the corners would fill half of the registers there.
        float samples[2][kLaneChannels];
        const auto sample = [&](const auto& corners_of) {
#pragma unroll
          for (int i = 0; i < 2 * kRuns; ++i) {
            blend<T>(corners_of(position[i / 2][i % 2], image[i / 2]),
                     samples[i % 2] + i / 2 * kRun);
          }
        };
        if (__all_sync(0xffffffffu, inner)) {
          sample(inner_corners<kRunWords>);
        } else {
          sample([&](const Position& s, const Image& image) {
            return edge_corners<kRunWords>(p, s, image);
          });
        }

        const Products products(samples);
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          uint4 weights[kVectors];
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            weights[i] = ring[place + vector_of<Products>(tile, i, 0)];
          }
          products.add(sums[tile], weights);
        }
        left_place = place;
        place = (place + kStage) % (kStages * kStage);
        move(base_x, steps.to_column);
      }
      move(base_x, steps.back_to_column);
      move(base_y, steps.to_row);
    }
    move(base_y, steps.back_to_row);
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

bool takes(const ModulatedDeformConv2dParams& p) {
  const bool has_type =
      p.dtype == Dtype::kFloat16 || (p.dtype != Dtype::kFloat64 && has_bfloat16_tensor_cores());
  return has_type && suits_tensor_cores(p, kSmallestRun) && p.output_stride[1] == 1 &&
         is_aligned(p.output, p.output_stride[0], p.output_stride[2]);
}

int64_t stages(const ModulatedDeformConv2dParams& p) {
  return int64_t{p.taps()} * (p.channels / kStepChannels) * ceil_div(p.out_channels, kOutputs);
}

template <typename Products>
int launch_products(const ModulatedDeformConv2dParams& params, void* stream) {
  const ModulatedDeformConv2dParams p =
      with_mask(params, stages(params) * kLaneTiles * Products::kVectors);
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
  return launch(kernel, grid, dim3(kThreads), 0, stream, p, Steps(p));
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
  return (stages(p) * kLaneTiles * vectors + 1) * int64_t{sizeof(uint4)};
}

int launch_forward_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  return dispatch_products(
      p, [&](auto type) { return launch_products<typename decltype(type)::type>(p, stream); });
}

}  // namespace mafnet
