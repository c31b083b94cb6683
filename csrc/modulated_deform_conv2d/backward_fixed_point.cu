// The deterministic route of modulated_deform_conv2d's grad_input, around the kernel of
// backward.cu: before it the exponents from which the scale of the integers follows, after it their
// sums back to numbers. fixed_point.cuh has the arithmetic.
//
// Exponents: a block takes kThreads elements (columns of weight) at a time, a thread one, and the
// block's largest goes by one atomic maximum, which commutes, to exponents[]. grad_output and mask
// are read once. Sums: one thread per element, which reads its integers and adds to grad_input.
#include <algorithm>

#include "modulated_deform_conv2d/backward.cuh"
#include "modulated_deform_conv2d/fixed_point.cuh"
#include "modulated_deform_conv2d/sample.cuh"

namespace mafnet {
namespace {

constexpr int64_t kLargestGrid = 4096;  // blocks of the exponents' kernels: many waves of any GPU

// The least e with |v| < 2^e, biased; 0 for zero and for what is not finite.
template <typename A>
DEVICE int biased_exponent(A v) {
  if (v == 0 || !(v - v == 0)) return 0;
  int exponent;
  frexp(v, &exponent);
  return exponent + kExponentBias;
}

// To target the largest over the grid. Every thread of the block calls it.
DEVICE void store_largest(int* target, int exponent) {
  SHARED(int, largest, [kThreads]);
  largest[threadIdx.x] = exponent;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < half) largest[i] = max(largest[i], largest[i + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicMax(target, largest[0]);
}

// Of a tensor (batch, channels, pixels) of T, or of float where is_feature_type is false.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_exponent_kernel(const void* data, bool is_feature_type, int64_t batch,
                                            int64_t channels, int64_t pixels, int64_t stride_n,
                                            int64_t stride_c, int64_t stride_pixel, int* target) {
  int largest = 0;
  const int64_t count = batch * channels * pixels;
  const bool channels_last = stride_c < stride_pixel;  // neighbouring lanes take neighbours
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t n = i / (channels * pixels), rest = i - n * channels * pixels;
    const int64_t c = channels_last ? rest % channels : rest / pixels;
    const int64_t pixel = channels_last ? rest / channels : rest % pixels;
    largest = max(largest,
                  biased_exponent(load_coordinate<T>(
                      data, is_feature_type, n * stride_n + c * stride_c + pixel * stride_pixel)));
  }
  store_largest(target, largest);
}

// Of the sums over the output channels of |weight|; one column (group, channel, tap) per thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_weight_exponent_kernel(const ModulatedDeformConv2dParams p) {
  using A = Accumulator<T>;
  const int64_t columns = int64_t{p.group_channels()} * p.taps();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  A sum = 0;
  if (i < p.groups * columns) {
    const int64_t group = i / columns;
    const T* weight = static_cast<const T*>(p.weight) + group * p.group_outputs() * columns +
                      (i - group * columns);
    for (int o = 0; o < p.group_outputs(); ++o) {
      const A v = to_accumulator(weight[o * columns]);
      if (v - v == 0) sum += fabs(v);
    }
    if (!(sum - sum == 0)) sum = static_cast<A>(ldexp(1.0, kLargestShift<A>));
  }
  store_largest(p.exponents + kOfWeight, biased_exponent(sum));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    modulated_deform_conv2d_add_fixed_sums_kernel(const ModulatedDeformConv2dParams p) {
  using A = Accumulator<T>;
  const int64_t elements = input_elements(p);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int shift = fixed_shift<A>(p);
  double sum = static_cast<double>(p.fixed_sums[i]);
  if constexpr (sizeof(A) == 8) {
    sum += ldexp(static_cast<double>(p.fixed_sums[elements + i]), -kLimbBits);
  }
  static_cast<A*>(p.grad_input)[i] += static_cast<A>(ldexp(sum, -shift));
}

template <typename T>
int launch_exponent(const ModulatedDeformConv2dParams& p, const void* data, Dtype dtype,
                    int64_t channels, const int64_t (&stride)[3], int* target, void* stream) {
  const int64_t blocks = ceil_div(p.batch * channels * p.pixels(), kThreads);
  if (blocks == 0) return 0;
  return launch(modulated_deform_conv2d_exponent_kernel<T>, grid_of(std::min(blocks, kLargestGrid)),
                dim3(kThreads), 0, stream, data, dtype == p.dtype, p.batch, channels, p.pixels(),
                stride[0], stride[1], stride[2], target);
}

}  // namespace

int modulated_deform_conv2d_fixed_limbs(Dtype dtype) { return 1 + (dtype == Dtype::kFloat64); }

int launch_backward_exponents(const ModulatedDeformConv2dParams& p, void* stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    int status = launch_exponent<T>(p, p.grad_output, p.dtype, p.out_channels, p.grad_output_stride,
                                    p.exponents + kOfGradOutput, stream);
    if (status != 0) return status;
    const int64_t columns = int64_t{p.channels} * p.taps();
    status = launch(modulated_deform_conv2d_weight_exponent_kernel<T>,
                    grid_of(ceil_div(columns, kThreads)), dim3(kThreads), 0, stream, p);
    if (status != 0) return status;
    if (p.mask == nullptr || p.raw.used) return 0;
    return launch_exponent<T>(p, p.mask, p.mask_dtype, int64_t{p.offset_groups} * p.taps(),
                              p.mask_stride, p.exponents + kOfMask, stream);
  });
}

int launch_backward_add_fixed_sums(const ModulatedDeformConv2dParams& p, void* stream) {
  if (input_elements(p) == 0) return 0;
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(modulated_deform_conv2d_add_fixed_sums_kernel<T>,
                  grid_of(ceil_div(input_elements(p), kThreads)), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace mafnet
