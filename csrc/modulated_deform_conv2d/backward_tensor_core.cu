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
// A step is one tap of 32 channels. Coordinates, weights and sums are float. Read per (pixel, tap,
// offset group): offsets and mask once (by each lane that shares the group), per vector of 8
// channels its four corners; per corner and channel one atomic add, four to an instruction from
// sm_90 on.
#include "modulated_deform_conv2d/backward.cuh"
#include "modulated_deform_conv2d/backward_tensor_core.cuh"
#include "modulated_deform_conv2d/fixed_point.cuh"
#include "modulated_deform_conv2d/tensor_core.cuh"
#include "modulated_deform_conv2d/tensor_core_samples.cuh"

namespace mafnet {
namespace {

constexpr int kWarpPixels = 16, kPixels = kThreads / 32 * kWarpPixels;
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
// reads them. Stages are those of a step, steps those of a tap.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_backward_pack_weight_kernel(const ModulatedDeformConv2dParams p) {
  const Deal deal = make_deal(p);
  const int passes = static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int pass = static_cast<int>(blockIdx.x) % passes;
  const int step = static_cast<int>(blockIdx.x) / passes;
  const int tap_steps = p.channels / kStepChannels, tap = step / tap_steps;
  const int run = step % tap_steps / deal.run;  // of all rounds and parts
  const int chunk = threadIdx.x / (kColumnTiles * 32), tile = threadIdx.x / 32 % kColumnTiles;
  const int lane = threadIdx.x % 32, column = lane / 4;
  const int output = pass * kOutputs + chunk * kChunkOutputs + lane % 4 * kLaneChannels;
  const int group = deal.group_of(run / p.parts, column / 2);
  const int channel = run % p.parts * p.part_channels() +
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
}

// A sample: between pixels (row, column) and (row + 1, column + 1), the corners.
struct Cell {
  int row, column;
  float part_y, part_x, mask;
  int inside;  // bit k: corner (row + k / 2, column + k % 2) is in the image
};

DEVICE Cell make_cell(const ModulatedDeformConv2dParams& p, float y, float x, float mask) {
  Cell cell;
  cell.row = find_cell(y, p.height, cell.part_y);
  cell.column = find_cell(x, p.width, cell.part_x);
  cell.mask = mask;
  const int rows =
      (is_inside(cell.row, p.height) ? 3 : 0) | (is_inside(cell.row + 1, p.height) ? 12 : 0);
  const int columns =
      (is_inside(cell.column, p.width) ? 5 : 0) | (is_inside(cell.column + 1, p.width) ? 10 : 0);
  cell.inside = rows & columns;
  return cell;
}

template <typename T>
DEVICE float dot(const float (&a)[kLaneChannels], const Words<4>& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float channels[2];
    unpack(b.at(i), channels, T());
    sum += a[2 * i] * channels[0];
    sum += a[2 * i + 1] * channels[1];
  }
  return sum;
}

// Adds grad_column to the corners in grad_input; first is the element of the channel in the first
// pixel of the image.
template <bool kFixed>
DEVICE void scatter(const ModulatedDeformConv2dParams& p, const Cell& cell,
                    const float (&grad_column)[kLaneChannels], int64_t first,
                    const FixedPoint<float>& fixed) {
  const float low = (1 - cell.part_y) * cell.mask, high = cell.part_y * cell.mask;
  const uint32_t pixel = static_cast<uint32_t>(cell.row) * p.width + cell.column;
#pragma unroll kFixed ? 1 : 4  // the integers' code is long
  for (int k = 0; k < 4; ++k) {
    const float weight = (k / 2 == 0 ? low : high) * (k % 2 == 0 ? 1 - cell.part_x : cell.part_x);
    float parts[kLaneChannels];
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) parts[i] = grad_column[i] * weight;
    const uint32_t to = (pixel + k / 2 * p.width + k % 2) * p.channels;
    if ((cell.inside >> k & 1) == 0) continue;
    if constexpr (kFixed) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) add_fixed(p, fixed, first + to + i, parts[i]);
    } else {
      float* target = static_cast<float*>(p.grad_input) + first + to;
      atomic_add4(target, parts[0], parts[1], parts[2], parts[3]);
      atomic_add4(target + 4, parts[4], parts[5], parts[6], parts[7]);
    }
  }
}

template <typename T, bool kHeld, bool kFixed, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)
    modulated_deform_conv2d_backward_tensor_core_kernel(const ModulatedDeformConv2dParams p) {
  SHARED(uint4, ring, [kStages][kStageVectors]);
  const int thread = threadIdx.x, lane = thread % 32, t = lane % 4;
  const int64_t tiles = ceil_div(p.pixels(), kPixels), n = blockIdx.x / tiles;
  const int pixels = static_cast<int>(p.pixels());
  const int first =
      static_cast<int>(blockIdx.x % tiles) * kPixels + thread / 32 * kWarpPixels + lane / 4;
  // This lane's two pixels; those past the end repeat the last one, with no corner inside.
  const int pixel[2] = {min(first, pixels - 1), min(first + 8, pixels - 1)};
  const bool active[2] = {first < pixels, first + 8 < pixels};
  float base_y[2], base_x[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = pixel[q] / p.out_width;
    base_y[q] = static_cast<float>(row * p.stride_h - p.padding_h);
    base_x[q] = static_cast<float>((pixel[q] - row * p.out_width) * p.stride_w - p.padding_w);
  }

  const Deal deal = make_deal(p);
  const int part_channels = p.part_channels();
  const int passes = kHeld ? 1 : static_cast<int>(ceil_div(p.out_channels, kOutputs));
  const int stages = p.taps() * (p.channels / kStepChannels) * passes;
  const uint4* packed = static_cast<const uint4*>(p.packed_weight) + thread;
  int fetched = 0, used = 0;
  const auto fetch_stage = [&] {
    if (fetched < stages) cp_async16(&ring[fetched % kStages][thread], packed);
    packed += kStageVectors;
    ++fetched;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch_stage();

  const T* grad_output =
      static_cast<const T*>(p.grad_output) + n * p.grad_output_stride[0] + t * kLaneChannels;
  Words<4> grads[kChunks][2];
  const auto load_grads = [&](int pass) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int output = pass * kOutputs + chunk * kChunkOutputs;
      const bool known = output + t * kLaneChannels < p.out_channels;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const T* source = grad_output + pixel[q] * p.grad_output_stride[2] + output;
        grads[chunk][q] =
            known ? Words<4>::load(reinterpret_cast<const unsigned char*>(source)) : Words<4>{};
      }
    }
  };
  if constexpr (kHeld) load_grads(0);

  const T* input = static_cast<const T*>(p.input) + n * p.input_stride[0];
  const int64_t grad_image = n * p.height * p.width * p.channels;
  FixedPoint<float> fixed;
  if constexpr (kFixed) fixed = make_fixed_point<float>(p);
  const bool offset_is_t = p.offset_dtype == p.dtype, mask_is_t = p.mask_dtype == p.dtype;
  const CoordinateOrigin origin = make_origin<T>(p, n);

  int tap_row = 0, tap_column = 0;
  for (int tap = 0; tap < p.taps(); ++tap) {
    const float tap_y = static_cast<float>(tap_row * p.dilation_h);
    const float tap_x = static_cast<float>(tap_column * p.dilation_w);
    if (++tap_column == p.kernel_w) {
      tap_column = 0;
      ++tap_row;
    }
    for (int round = 0; round < deal.rounds; ++round) {
      const int group = deal.group_of(round, t), plane = group * p.taps() + tap;
      Cell cell[2];
      Coordinates<float> coordinates[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const Coordinates<float>& c = coordinates[q] = load_coordinates<T, kRaw>(
            p, origin, static_cast<uint32_t>(pixel[q]), group, static_cast<uint32_t>(plane));
        cell[q] = make_cell(p, base_y[q] + tap_y + c.dy, base_x[q] + tap_x + c.dx, c.mask);
        if (!active[q]) cell[q].inside = 0;
      }

      float dots[2][4] = {};  // of grad_column and the corners
      for (int first_of_part = 0; first_of_part < p.channels; first_of_part += part_channels) {
        for (int step = 0; step < deal.run; ++step) {
          const int channel = first_of_part + deal.channel_of(group, step, t);
          Words<4> corners[2][4];
          // Where the channels begin: in the lane's own pointer, or in each sum, which is one more
          // instruction but two registers less where others are short.
          const Image image = image_of(p, input, kHeld ? channel : 0);
          const uint32_t first_channel = kHeld ? 0 : channel * uint32_t{sizeof(T)};
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const uint32_t first_corner = image.at(cell[q].row, cell[q].column) + first_channel;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              // Outside, the first pixel is read in place and its products are dropped below.
              const uint32_t corner =
                  first_corner + k / 2 * image.row_stride + k % 2 * image.column_stride;
              const bool inside = cell[q].inside >> k & 1;
              corners[q][k] = Words<4>::load(image.data + (inside ? corner : first_channel));
            }
          }

          float sums[kColumnTiles][4] = {};
          for (int pass = 0; pass < passes; ++pass) {
            if constexpr (!kHeld) load_grads(pass);
            cp_async_wait<kAhead>();
            __syncthreads();  // the stage is there for all, and all have left the one before it
            fetch_stage();
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
              const Words<4>&g = grads[chunk][0], &h = grads[chunk][1];
#pragma unroll
              for (int tile = 0; tile < kColumnTiles; ++tile) {
                const uint4 b = ring[used % kStages][(chunk * kColumnTiles + tile) * 32 + lane];
                mma_m16n8k16(sums[tile], {g.at(0), h.at(0), g.at(1), h.at(1)}, {b.x, b.y}, T());
                mma_m16n8k16(sums[tile], {g.at(2), h.at(2), g.at(3), h.at(3)}, {b.z, b.w}, T());
              }
            }
            ++used;
          }

#pragma unroll
          for (int q = 0; q < 2; ++q) {
            float grad_column[kLaneChannels];
#pragma unroll
            for (int i = 0; i < kLaneChannels; ++i) grad_column[i] = sums[i / 2][2 * q + i % 2];
#pragma unroll
            for (int k = 0; k < 4; ++k) dots[q][k] += dot<T>(grad_column, corners[q][k]);
            if (p.grad_input != nullptr) {
              scatter<kFixed>(p, cell[q], grad_column, grad_image + channel, fixed);
            }
          }
        }
      }

#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((cell[i / 4].inside >> i % 4 & 1) == 0) dots[i / 4][i % 4] = 0;
      }
      for (int other = 1; other < deal.sharing; other *= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          dots[i / 4][i % 4] += __shfl_xor_sync(0xffffffffu, dots[i / 4][i % 4], other);
        }
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (!active[q] || (t & (deal.sharing - 1)) != 0) continue;
        // Corners outside have dot 0, so that the slopes of all cells are alike; at an integer that
        // is the slope of the cell [n, n + 1).
        const float (&d)[4] = dots[q];
        const float y = cell[q].part_y, x = cell[q].part_x, mask = cell[q].mask;
        const float grad_y = mask * ((1 - x) * (d[2] - d[0]) + x * (d[3] - d[1]));
        const float grad_x = mask * ((1 - y) * (d[1] - d[0]) + y * (d[3] - d[2]));
        const Coordinates<float>& c = coordinates[q];
        if (p.grad_offset != nullptr) {
          const int64_t at = (n * p.grad_offset_planes() + 2 * plane) * pixels + pixel[q];
          store_coordinate<T>(p.grad_offset, offset_is_t, at, grad_y * c.chain[0]);
          store_coordinate<T>(p.grad_offset, offset_is_t, at + pixels, grad_x * c.chain[1]);
        }
        if (p.grad_mask != nullptr) {
          const float grad_mask =
              (1 - y) * ((1 - x) * d[0] + x * d[1]) + y * ((1 - x) * d[2] + x * d[3]);
          store_coordinate<T>(p.grad_mask, mask_is_t,
                              (n * p.grad_mask_planes() + plane) * pixels + pixel[q],
                              grad_mask * c.chain[2]);
        }
        if constexpr (kRaw) {
          if (p.flow_partials != nullptr) {
            float* sums = static_cast<float*>(p.flow_partials) +
                          (n * p.offset_groups + group) * 2 * pixels + pixel[q];
            sums[0] = grad_y + (tap > 0 ? sums[0] : 0);
            sums[pixels] = grad_x + (tap > 0 ? sums[pixels] : 0);
          }
        }
      }
    }
  }
}

bool takes(const ModulatedDeformConv2dParams& p) {
  // Offsets within an image of grad_input fit into 32 bits.
  const bool is_grad_small = int64_t{p.height} * p.width * p.channels <= kMostBytes;
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
  return launch(kernel, grid_of(p.batch * ceil_div(p.pixels(), kPixels)), dim3(kThreads), 0, stream,
                p);
}

template <typename T>
int launch_typed(const ModulatedDeformConv2dParams& p, void* stream) {
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
  return takes(p) ? stages(p) * kStageVectors * int64_t{sizeof(uint4)} : 0;
}

int launch_backward_samples_tensor_core(const ModulatedDeformConv2dParams& p, void* stream) {
  if (p.dtype == Dtype::kFloat16) return launch_typed<__half>(p, stream);
  return launch_typed<__nv_bfloat16>(p, stream);
}

}  // namespace mafnet
