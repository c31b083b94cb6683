// modulated_deform_conv2d backward on tensor cores: grad_input, grad_offset and grad_mask of fp16
// and bf16 in channels last, 32 channels at a time, offset groups of whole 8 channels, one group of
// the convolution (backward.cu has the formulas).
//
// grad_column is a matrix product, pixels x output channels times output channels x (tap, channel),
// whose result exists in registers alone. A warp owns 16 pixels. Columns of mma.m16n8k16 are
// numbered so that lane 4 r + t gets 8 neighbouring channels of pixels r and r + 8: what a 16-byte
// load brings of each corner. Their products are the lane's alone, nothing is exchanged but the
// sums of lanes that share an offset group, once per group. Rows of B are numbered so that a
// fragment of A is what two 16-byte loads of grad_output bring, up to 64 output channels of which
// stay in registers. B is packed in that order by a kernel of its own and streams through a ring in
// shared memory.
//
// A step is one tap of 32 channels; a round of offset groups walks over all taps. Coordinates,
// weights and sums are float. Read per (pixel, tap, offset group): offsets and mask once (by each
// lane that shares the group), per vector of 8 channels its four corners; per corner and channel
// one atomic add, four to an instruction from sm_90 on. A warp whose samples all lie in the image
// needs no bounds.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "modulated_deform_conv2d/backward.cuh"
#include "modulated_deform_conv2d/backward_tensor_core.cuh"
#include "modulated_deform_conv2d/backward_tensor_core_corners.cuh"
#include "modulated_deform_conv2d/tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core_coordinates.cuh"

namespace mafnet {
namespace {

constexpr int kWarpPixels = 16, kPixels = kThreads / 32 * kWarpPixels;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kColumnTiles = kStepChannels / 8;
constexpr int kChunkOutputs = 32, kChunks = kOutputs / kChunkOutputs;  // two k-steps of an mma
constexpr int kStageVectors = kChunks * kColumnTiles * 32;  // of 16 bytes: one for every thread
static_assert(kStageVectors == kThreads);
constexpr int kStages = 4;  // 16 KiB; the rest of the SM's memory is L1, which the corners need
constexpr int kAhead = kStages - 2;  // stages under way while one is used and one is being left

// How the vectors of a tap are dealt to the four lanes of a pixel. A round takes 4 / sharing offset
// groups, each to as many lanes as divide its vectors evenly; in its steps a lane takes `run`
// vectors of one group, of each part.
struct Deal {
  int vectors;        // of an offset group, in one part
  int sharing, bits;  // lanes that share one: 1, 2 or 4, and the logarithm
  int run, rounds;

  DEVICE int group_of(int round, int t) const { return (round << (2 - bits)) + (t >> bits); }
  DEVICE int channel_of(int group, int step, int t) const {
    return (group * vectors + (step << bits) + (t & (sharing - 1))) * kLaneChannels;
  }
};

DEVICE Deal make_deal(const ModulatedDeformConv2dParams& p) {
  Deal deal;
  deal.vectors = p.offset_group_channels() / kLaneChannels;
  deal.bits = (deal.vectors % 2 == 0) + (deal.vectors % 4 == 0);
  deal.sharing = 1 << deal.bits;
  deal.run = deal.vectors >> deal.bits;
  deal.rounds = p.offset_groups * deal.sharing / 4;
  return deal;
}

// Vector i of a stage: of a chunk of output channels, a column tile and a lane, as the kernel below
// reads them. Stages are those of a step; steps follow each other as there: round, tap, part, step.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_backward_pack_weight_kernel(const ModulatedDeformConv2dParams p) {
  const Deal deal = make_deal(p);
  const int passes = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int pass = static_cast<int>(blockIdx.x) % passes;
  const int step = static_cast<int>(blockIdx.x) / passes, run = step / deal.run;
  const int part = run % p.parts, tap = run / p.parts % p.taps();
  const int chunk = threadIdx.x / (kColumnTiles * 32), tile = threadIdx.x / 32 % kColumnTiles;
  const int lane = threadIdx.x % 32, column = lane / 4;
  const int output = pass * kOutputs + chunk * kChunkOutputs + lane % 4 * kLaneChannels;
  const int group = deal.group_of(run / (p.parts * p.taps()), column / 2);
  const int channel = part * p.part_channels() +
                      deal.channel_of(group, step % deal.run, column / 2) + 2 * tile + column % 2;
  const bool known = output < p.out_channels;
  const int64_t output_stride = int64_t{p.channels} * p.taps();
  const T* weight =
      static_cast<const T*>(p.weight) + output * output_stride + int64_t{channel} * p.taps() + tap;
  T* packed = static_cast<T*>(p.packed_weight) +
              (int64_t{blockIdx.x} * kStageVectors + threadIdx.x) * kLaneChannels;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    packed[i] = known ? weight[i * output_stride] : from_accumulator<T>(0.0f);
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    store_mask_of_ones(static_cast<uint4*>(p.packed_weight) + int64_t{gridDim.x} * kStageVectors);
  }
}

template <typename T, bool kHeld, bool kFixed, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)
    modulated_deform_conv2d_backward_tensor_core_kernel(const ModulatedDeformConv2dParams p,
                                                        const Steps steps) {
  SHARED(uint4, ring, [kStages * kStageVectors]);
  const int thread = threadIdx.x, lane = thread % 32, t = lane % 4;
  const int64_t n = blockIdx.y;
  const int pixels = steps.pixels;
  const int first = static_cast<int>(blockIdx.x) * kPixels + thread / 32 * kWarpPixels + lane / 4;
  // This lane's two pixels; those past the end repeat the last one, at NaN: no corner is inside.
  const int pixel[2] = {min(first, pixels - 1), min(first + kPixelStep, pixels - 1)};
  const uint32_t first_pixel = held(static_cast<uint32_t>(pixel[0]));
  const bool active[2] = {first < pixels, first + kPixelStep < pixels};
  float base_y[2], base_x[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = pixel[q] / p.out_width;
    base_y[q] = active[q] ? static_cast<float>(row * p.stride_h - p.padding_h) : kNan;
    base_x[q] = static_cast<float>((pixel[q] - row * p.out_width) * p.stride_w - p.padding_w);
  }

  const Deal deal = make_deal(p);
  const int part_channels = p.part_channels(), step_channels = kLaneChannels << deal.bits;
  const bool leads = (t & (deal.sharing - 1)) == 0;
  bool stored[2];
  for (int q = 0; q < 2; ++q) stored[q] = active[q] && leads;
  const int passes = kHeld ? 1 : static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const unsigned packed_end = p.taps() * (p.channels / kStepChannels) * passes * kStageVectors;
  // The next vector of this thread; its last bits say where in the ring that comes, and its lane.
  unsigned packed = static_cast<unsigned>(thread);
  const auto fetch_stage = [&] {
    if (packed < packed_end) {
      cp_async16(&ring[packed % (kStages * kStageVectors)],
                 address_of(p.packed_weight, packed, sizeof(uint4)));
    }
    packed += kStageVectors;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch_stage();

  const T* grad_output =
      static_cast<const T*>(p.grad_output) + n * p.grad_output_stride[0] + t * kLaneChannels;
  if constexpr (!kHeld) grad_output = held(grad_output);
  // Where they are read again and again, offsets of 32 bits take fewer registers.
  using Offset = std::conditional_t<kHeld, int64_t, uint32_t>;
  Words<4> grads[kChunks][2];
  const auto load_grads = [&](int pass) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int output = pass * kOutputs + chunk * kChunkOutputs;
      const bool known = output + t * kLaneChannels < p.out_channels;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const Offset offset = pixel[q] * static_cast<Offset>(p.grad_output_stride[2]) + output;
        const auto* source = reinterpret_cast<const unsigned char*>(grad_output + offset);
        grads[chunk][q] = known ? Words<4>::load(source) : Words<4>{};
      }
    }
  };
  if constexpr (kHeld) load_grads(0);

  // From this lane's first channels on.
  const int lane_channel = deal.channel_of(deal.group_of(0, t), 0, t);
  const T* input = held(static_cast<const T*>(p.input) + n * p.input_stride[0] + lane_channel);
  const int64_t grad_image = n * p.height * p.width * p.channels + lane_channel;
  const PixelStrides input_strides = {static_cast<uint32_t>(p.input_stride[2]),
                                      static_cast<uint32_t>(p.input_stride[3])};
  const PixelStrides grad_strides = {static_cast<uint32_t>(p.width) * p.channels,
                                     static_cast<uint32_t>(p.channels)};
  float* grad_input = held(static_cast<float*>(p.grad_input) + grad_image);
  FixedPoint<float> fixed;
  if constexpr (kFixed) fixed = make_fixed_point<float>(p);
  const CoordinateOrigin origin = make_origin<T>(p, n);
  const CoordinatePlanes<T> planes(p, origin, steps.offset, steps.mask, pixel);
  const GradImage grad_offset = make_grad_image<T>(p.grad_offset, p.offset_dtype == p.dtype,
                                                   n * p.grad_offset_planes() * pixels);
  const GradImage grad_mask =
      make_grad_image<T>(p.grad_mask, p.mask_dtype == p.dtype, n * p.grad_mask_planes() * pixels);

  uint32_t round_channel = 0;
  for (int round = 0; round < deal.rounds; ++round) {
    const int group = deal.group_of(round, t);
    TapPointers tap[1] = {planes.first_tap(group * p.taps())};
    uint32_t at = static_cast<uint32_t>(group * p.taps()) * pixels + first_pixel;  // in grad_mask
    for (int row = 0; row < p.kernel_h; ++row) {
      for (int column = 0; column < p.kernel_w; ++column) {
        Coordinates<float> coordinates[1][2];
        planes.load_tap(tap, coordinates);
        Position position[2];
        bool inner = true;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          Coordinates<float>& c = coordinates[0][q];
          c.chain[0] = c.chain[1] = c.chain[2] = 1;
          if constexpr (kRaw) finish_raw<T>(p, origin, static_cast<uint32_t>(pixel[q]), group, c);
          position[q] = make_position(base_y[q], base_x[q], c);
          inner = is_inner(position[q], steps.last_row, steps.last_column) && inner;
        }
        inner = __all_sync(0xffffffffu, inner);  // of the whole warp
        int inside[2] = {15, 15};
        if (!inner) {
#pragma unroll
          for (int q = 0; q < 2; ++q) inside[q] = find_corners(p, position[q]);
        }

        float dots[2][4] = {};  // of grad_column and the corners
        const uint32_t first_corner[2] = {input_strides.first(position[0]),
                                          input_strides.first(position[1])};
        const uint32_t first_target[2] = {grad_strides.first(position[0]),
                                          grad_strides.first(position[1])};
        uint32_t channel = round_channel, part_end = channel + deal.run * step_channels;
        do {
          CornerWords corners;
          if (inner) {
            load_corners<true, T>(input, input_strides, channel, first_corner, inside, corners);
          } else {
            load_corners<false, T>(input, input_strides, channel, first_corner, inside, corners);
          }

          float sums[kColumnTiles][4] = {};
          for (int pass = 0; pass < passes; ++pass) {
            if constexpr (!kHeld) load_grads(pass);
            cp_async_wait<kAhead>();
            __syncthreads();  // the stage is there for all, and all have left the one before it
            fetch_stage();
            // This lane's weights of the stage that lies kStages before the next one.
            const uint4* weights = &ring[packed & ((kStages - 1) * kStageVectors + 31)];
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
              const Words<4>&g = grads[chunk][0], &h = grads[chunk][1];
#pragma unroll
              for (int tile = 0; tile < kColumnTiles; ++tile) {
                const uint4 b = weights[(chunk * kColumnTiles + tile) * 32];
                mma_m16n8k16(sums[tile], {g.at(0), h.at(0), g.at(1), h.at(1)}, {b.x, b.y}, T());
                mma_m16n8k16(sums[tile], {g.at(2), h.at(2), g.at(3), h.at(3)}, {b.z, b.w}, T());
              }
            }
          }

          float grad_columns[2][kLaneChannels];
#pragma unroll
          for (int i = 0; i < 2 * kLaneChannels; ++i) {
            grad_columns[i / kLaneChannels][i % kLaneChannels] =
                sums[i % kLaneChannels / 2][i / kLaneChannels * 2 + i % 2];
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            add_dot<T>(dots[i / 4][i % 4], grad_columns[i / 4], corners[i / 4][i % 4]);
          }
          if constexpr (kFixed) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              scatter_fixed(p, grad_image, grad_strides, position[q], first_target[q] + channel,
                            inside[q], grad_columns[q], fixed);
            }
          } else if (inner) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              scatter<true>(grad_input, grad_strides, position[q], held(first_target[q] + channel),
                            15, grad_columns[q]);
            }
          } else if (p.grad_input != nullptr) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              scatter<false>(grad_input, grad_strides, position[q], held(first_target[q] + channel),
                             inside[q], grad_columns[q]);
            }
          }
          channel += step_channels;
          if (channel == part_end) {
            part_end += part_channels;
            channel = part_end - deal.run * step_channels;
          }
        } while (channel < static_cast<uint32_t>(p.channels));

        if (!inner) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if ((inside[i / 4] >> i % 4 & 1) == 0) dots[i / 4][i % 4] = 0;
          }
        }
        for (int other = 1; other < deal.sharing; other *= 2) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            dots[i / 4][i % 4] += __shfl_xor_sync(0xffffffffu, dots[i / 4][i % 4], other);
          }
        }
        // Corners outside have dot 0, so that the slopes of all cells are alike; at an integer that
        // is the slope of the cell [n, n + 1).
        float grad_y[2], grad_x[2], of_offset[2][2], of_mask[1][2];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const float (&d)[4] = dots[q];
          const float y = position[q].part_y, x = position[q].part_x, mask = position[q].mask;
          const float upper = (1 - x) * d[0] + x * d[1], lower = (1 - x) * d[2] + x * d[3];
          grad_y[q] = mask * (lower - upper);
          grad_x[q] = mask * ((1 - y) * (d[1] - d[0]) + y * (d[3] - d[2]));
          const float (&chain)[3] = coordinates[0][q].chain;
          of_offset[0][q] = grad_y[q] * chain[0];
          of_offset[1][q] = grad_x[q] * chain[1];
          of_mask[0][q] = ((1 - y) * upper + y * lower) * chain[2];
        }
        store_pixels<T>(grad_offset, 2 * at - first_pixel, pixels, of_offset, stored);
        store_pixels<T>(grad_mask, at, pixels, of_mask, stored);
        at += pixels;
        if constexpr (kRaw) {
          if (p.flow_partials != nullptr) {
            const bool first_tap = row + column == 0;
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              if (!stored[q]) continue;
              float* flow = static_cast<float*>(p.flow_partials) +
                            (n * p.offset_groups + group) * 2 * pixels + pixel[q];
              flow[0] = grad_y[q] + (first_tap ? 0 : flow[0]);
              flow[pixels] = grad_x[q] + (first_tap ? 0 : flow[pixels]);
            }
          }
        }
        move(base_x, steps.to_column);
      }
      move(base_x, steps.back_to_column);
      move(base_y, steps.to_row);
    }
    move(base_y, steps.back_to_row);
    round_channel += kLaneChannels * deal.vectors << (2 - deal.bits);
  }
}

bool takes(const ModulatedDeformConv2dParams& p) {
  // Elements within an image of a gradient fit into 32 bits.
  const int64_t of_input = int64_t{p.height} * p.width * p.channels;
  const int64_t of_offset = p.grad_offset_planes() * p.pixels();
  const int64_t of_output = (p.pixels() - 1) * p.grad_output_stride[2] + p.out_channels;
  const bool is_grad_small = std::max({of_input, of_offset, of_output}) <= kMostBytes;
  const bool has_steps = p.part_channels() % kStepChannels == 0;  // whole ones in every part
  return has_steps && is_grad_small && backward_suits_tensor_cores(p);
}

int64_t stages(const ModulatedDeformConv2dParams& p) {
  return int64_t{p.taps()} * (p.channels / kStepChannels) * ceil_div(p.out_channels, kOutputs);
}

template <typename T, bool kRaw>
int launch_samples(const ModulatedDeformConv2dParams& p, void* stream) {
  const bool held = p.out_channels <= kOutputs;
  const auto kernel =
      p.fixed_sums != nullptr
          ? modulated_deform_conv2d_backward_tensor_core_kernel<T, false, true, kRaw>
      : held ? modulated_deform_conv2d_backward_tensor_core_kernel<T, true, false, kRaw>
             : modulated_deform_conv2d_backward_tensor_core_kernel<T, false, false, kRaw>;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.pixels(), kPixels)),
                  static_cast<unsigned>(p.batch));
  Steps steps(p);
  // Without grad_input no sample counts as inner: the other way asks whether there is one.
  if (p.grad_input == nullptr) steps.last_row = 0;
  return launch(kernel, grid, dim3(kThreads), 0, stream, p, steps);
}

template <typename T>
int launch_typed(const ModulatedDeformConv2dParams& params, void* stream) {
  const ModulatedDeformConv2dParams p = with_mask(params, stages(params) * kStageVectors);
  int status = launch(modulated_deform_conv2d_backward_pack_weight_kernel<T>, grid_of(stages(p)),
                      dim3(kThreads), 0, stream, p);
  if (status == 0 && p.fixed_sums != nullptr) status = launch_backward_exponents(p, stream);
  if (status != 0) return status;
  status = p.raw.used ? launch_samples<T, true>(p, stream) : launch_samples<T, false>(p, stream);
  if (status == 0 && p.fixed_sums != nullptr) status = launch_backward_add_fixed_sums(p, stream);
  if (status != 0) return status;
  return launch_backward_flow(p, stream);  // of the flows that want one
}

}  // namespace

int64_t modulated_deform_conv2d_backward_packed_weight_bytes(const ModulatedDeformConv2dParams& p) {
  return takes(p) ? (stages(p) * kStageVectors + 1) * int64_t{sizeof(uint4)} : 0;
}

int launch_backward_samples_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.dtype == Dtype::kFloat16) return launch_typed<__half>(p, stream);
  return launch_typed<__nv_bfloat16>(p, stream);
}

}  // namespace mafnet
