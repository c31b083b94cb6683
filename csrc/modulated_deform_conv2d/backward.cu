// modulated_deform_conv2d backward: grad_input, grad_offset and grad_mask for any shape, dtype and
// strides. With grad_column(c, k, p) = sum over output channels o of weight(o, c, k) *
// grad_output(o, p), the gradient of the sample of channel c: times mask and the bilinear weights
// it adds to the four corners in grad_input; times mask and the slopes of the weights it sums over
// the channels of the offset group to grad_offset, times the sample to grad_mask.
//
// A block owns one tap of one offset group for kPixels output pixels of one image, so it alone
// writes their grad_offset and grad_mask. kSlots threads share a pixel; each works the sample out
// once, then for every chunk of kChunk channels the block multiplies tiles of weight and
// grad_output, and a thread keeps the grad_columns of its kOwn channels in registers: no column is
// stored anywhere. Read per (pixel, tap, offset group): the output channels once, the corners once;
// per corner and channel one atomic add. Those into float come in no fixed order; into fixed_sums
// they are integers, whose sum has none (see fixed_point.cuh).
//
// Of raw offsets a block walks all taps of its offset group, so that it alone knows what they send
// to the flow; backward_flow.cu adds the groups. grad_weight and grad_bias are in
// backward_weight.cu.
#include "modulated_deform_conv2d/backward.cuh"
#include "modulated_deform_conv2d/fixed_point.cuh"
#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {
namespace {

// Offset groups of 8 channels are the usual case: a chunk is one of those.
constexpr int kPixels = 64, kChunk = 8;
constexpr int kSlots = kThreads / kPixels, kOwn = kChunk / kSlots;
constexpr int kDepth = 32;  // output channels of a tile: 9 KiB of shared memory, 18 for double
static_assert(kDepth * kChunk == kThreads, "one weight per thread");

template <typename T, bool kFixed, bool kRaw>
__global__ void __launch_bounds__(kThreads, 2)  // left alone, the compiler spills to fit 4
    modulated_deform_conv2d_backward_samples_kernel(const ModulatedDeformConv2dParams p) {
  using A = Accumulator<T>;
  SHARED(A, grads, [kDepth][kPixels]);
  SHARED(A, weights, [kDepth][kChunk]);
  SHARED(A, parts, [3][kSlots][kPixels]);

  const int taps = p.taps(), group_channels = p.group_channels();
  const int group_outputs = p.group_outputs(), offset_group_channels = p.offset_group_channels();
  const int64_t pixels = p.pixels(), tiles = ceil_div(pixels, kPixels);
  // The blocks of a tile follow each other: they share its grad_output in L2.
  const int64_t shares = int64_t{p.offset_groups} * (kRaw ? 1 : taps);
  int64_t block = blockIdx.x;
  const int64_t share = block % shares;
  block /= shares;
  const int64_t n = block / tiles, first_pixel = block % tiles * kPixels;
  const int offset_group = static_cast<int>(kRaw ? share : share / taps);
  const int first_tap = kRaw ? 0 : static_cast<int>(share % taps);
  const int last_tap = kRaw ? taps - 1 : first_tap;

  const int thread = threadIdx.x, lane = thread % kPixels, slot = thread / kPixels;
  const int64_t pixel = first_pixel + lane;
  const bool active = pixel < pixels;  // the others stay for the barriers
  const OutputPixel sampled_pixel = make_pixel(p, n, active ? pixel : first_pixel);
  FixedPoint<A> fixed;
  if constexpr (kFixed) fixed = make_fixed_point<A>(p);

  const T* grad_output = static_cast<const T*>(p.grad_output) + n * p.grad_output_stride[0];
  const T* weight = static_cast<const T*>(p.weight);
  A grad_flow = 0;  // of this thread's slot, over the taps
  for (int tap = first_tap; tap <= last_tap; ++tap) {
    const Sample<A> sample = make_sample<T, kRaw>(p, sampled_pixel, offset_group, tap);
    A grad_y = 0, grad_x = 0, grad_mask = 0;
    // The offset group's channels of each part, in chunks that lie in one group of the convolution.
    int first = offset_group * offset_group_channels, end = first + offset_group_channels;
    while (end <= p.channels) {
      const int group = first / group_channels;
      const int last = min(min(first + kChunk, end), (group + 1) * group_channels);
      A grad_column[kOwn] = {};
      for (int o = 0; o < group_outputs; o += kDepth) {
#pragma unroll
        for (int i = slot; i < kDepth; i += kSlots) {
          A value = 0;
          if (active && o + i < group_outputs) {
            const int64_t output = int64_t{group} * group_outputs + o + i;
            value = to_accumulator(
                grad_output[output * p.grad_output_stride[1] + pixel * p.grad_output_stride[2]]);
          }
          grads[i][lane] = value;
        }
        const int i = thread / kChunk, channel = first + thread % kChunk;
        A value = 0;
        if (channel < last && o + i < group_outputs) {
          const int64_t output = int64_t{group} * group_outputs + o + i;
          value = to_accumulator(
              weight[(output * group_channels + channel - group * group_channels) * taps + tap]);
        }
        weights[i][thread % kChunk] = value;
        __syncthreads();
#pragma unroll 8
        for (int d = 0; d < kDepth; ++d) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            grad_column[j] += grads[d][lane] * weights[d][slot * kOwn + j];
          }
        }
        __syncthreads();
      }

#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int channel = first + slot * kOwn + j;
        if (!active || channel >= last) continue;
        const T* source =
            static_cast<const T*>(p.input) + n * p.input_stride[0] + channel * p.input_stride[1];
        const A masked = grad_column[j] * sample.mask;
        for_corners(sample, p.input_stride[2], p.input_stride[3],
                    [&](int row, int column, bool inside, int64_t at) {
                      const A dot = grad_column[j] * (inside ? to_accumulator(source[at]) : A(0));
                      grad_mask += sample.rows.weight[row] * sample.columns.weight[column] * dot;
                      grad_y += sample.rows.slope[row] * sample.columns.weight[column] * dot;
                      grad_x += sample.rows.weight[row] * sample.columns.slope[column] * dot;
                    });
        if (p.grad_input == nullptr) continue;
        const int64_t target = n * p.grad_input_stride[0] + channel * p.grad_input_stride[1];
        for_corners(sample, p.width * p.grad_input_stride[2], p.grad_input_stride[2],
                    [&](int row, int column, bool inside, int64_t at) {
                      if (!inside) return;
                      const A part =
                          sample.rows.weight[row] * sample.columns.weight[column] * masked;
                      if constexpr (kFixed) {
                        add_fixed(p, fixed, target + at, part);
                      } else {
                        atomicAdd(static_cast<A*>(p.grad_input) + target + at, part);
                      }
                    });
      }
      first = last;
      if (first == end) {  // on to the next part
        first += (p.offset_groups - 1) * offset_group_channels;
        end = first + offset_group_channels;
      }
    }

    parts[0][slot][lane] = grad_y * sample.mask;
    parts[1][slot][lane] = grad_x * sample.mask;
    parts[2][slot][lane] = grad_mask;
    __syncthreads();
    // Slot 0 writes dy, 1 dx, 2 the mask.
    if (active && slot < 3) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) sum += parts[slot][i][lane];
      if constexpr (kRaw) {
        grad_flow += sum;
        sum *= slot == 0 ? sample.chain[0] : slot == 1 ? sample.chain[1] : sample.chain[2];
      }
      const int64_t plane = int64_t{offset_group} * taps + tap;
      if (slot < 2 && p.grad_offset != nullptr) {
        store_coordinate<T>(p.grad_offset, p.offset_dtype == p.dtype,
                            (n * p.grad_offset_planes() + 2 * plane + slot) * pixels + pixel, sum);
      }
      if (slot == 2 && p.grad_mask != nullptr) {
        store_coordinate<T>(p.grad_mask, p.mask_dtype == p.dtype,
                            (n * p.grad_mask_planes() + plane) * pixels + pixel, sum);
      }
    }
    if constexpr (kRaw) __syncthreads();  // parts are free again
  }
  if constexpr (kRaw) {
    if (active && slot < 2 && p.flow_partials != nullptr) {
      static_cast<A*>(
          p.flow_partials)[((n * p.offset_groups + offset_group) * 2 + slot) * pixels + pixel] =
          grad_flow;
    }
  }
}

template <typename T, bool kRaw>
int launch_samples_typed(const ModulatedDeformConv2dParams& p, void* stream) {
  const int64_t blocks = p.batch * ceil_div(p.pixels(), kPixels) * p.offset_groups *
                         (kRaw ? int64_t{1} : int64_t{p.taps()});
  if (blocks == 0) return 0;
  if (p.fixed_sums == nullptr) {
    return launch(modulated_deform_conv2d_backward_samples_kernel<T, false, kRaw>, grid_of(blocks),
                  dim3(kThreads), 0, stream, p);
  }
  int status = launch_backward_exponents(p, stream);
  if (status != 0) return status;
  status = launch(modulated_deform_conv2d_backward_samples_kernel<T, true, kRaw>, grid_of(blocks),
                  dim3(kThreads), 0, stream, p);
  if (status != 0) return status;
  return launch_backward_add_fixed_sums(p, stream);
}

int launch_samples(const ModulatedDeformConv2dParams& p, void* stream) {
  const int status = dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return p.raw.used ? launch_samples_typed<T, true>(p, stream)
                      : launch_samples_typed<T, false>(p, stream);
  });
  return status != 0 ? status : launch_backward_flow(p, stream);
}

}  // namespace

int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& p, void* stream) {
  int status = 0;
  if (p.grad_input != nullptr || p.grad_offset != nullptr || p.grad_mask != nullptr ||
      p.flow_partials != nullptr) {
    status = launch_samples(p, stream);
  }
  if (status != 0) return status;
  if (p.grad_weight != nullptr) status = launch_backward_weight(p, stream);
  if (status != 0) return status;
  if (p.grad_bias != nullptr) status = launch_backward_bias(p, stream);
  return status;
}

}  // namespace mafnet
