// The convolutions of pyramid spatial attention, of any dtype and strides: outputs(pixel, o) = sum
// over slots and channels of weight(o, slot, c) * features(pixel, slot, c), given to an epilogue. A
// slot is a tap of the kernel, or one of the parts of a feature.
//
// A block owns 64 pixels and 64 outputs. It walks over taps and channels, kDepth at a time:
// features are made and weights read into shared memory, a thread sums 4 x 4. Features are made
// once per 64 outputs; neighbours' pixels come from L1.
//
// Features that are made once have the kernel of convolution_patch.cuh, and where
// suits_tensor_cores those of tensor_core.cuh and tensor_core_patch.cuh do it.
#pragma once

#include "pyramid_spatial_attention/convolution_patch.cuh"
#include "pyramid_spatial_attention/tensor_core_patch.cuh"

namespace mafnet {

template <typename T, typename Features, typename Epilogue>
__global__ void __launch_bounds__(kThreads)
    pyramid_conv_kernel(const Product<T> p, const Features features, const Epilogue epilogue,
                        bool features_last, bool outputs_last) {
  using A = Accumulator<T>;
  // fp16 and bf16 as vectors are the tensor cores' affair.
  constexpr Access kAccess = std::is_same_v<T, float> ? Access::kEither : Access::kSingles;
  constexpr int kParts = Features::kParts;
  SHARED(A, samples, [kParts * kDepth][kTile + kPadding]);
  SHARED(A, weights, [kParts * kDepth][kTile + kPadding]);
  const int thread = threadIdx.x;
  const int64_t first_pixel = int64_t{blockIdx.x} * kTile;
  const int first_output = static_cast<int>(blockIdx.y) * kTile;

  // What this thread fetches. Neighbouring threads take what lies side by side in memory. Pixels
  // past the end repeat the last one and are not stored.
  const int row = features_last ? thread / (kDepth / kOwn) : thread % kTile;
  const int group = features_last ? thread % (kDepth / kOwn) : thread / kTile;
  const Place place = place_of(min(first_pixel + row, p.pixels - 1), p.height, p.width);
  const int weight_channel = thread % kDepth, weight_output = thread / kDepth;

  // What it sums: pixels pixel + 16 i, outputs output ... output + 3.
  const int pixel = outputs_last ? thread / (kTile / kOwn) : thread % (kTile / kOwn);
  const int output = (outputs_last ? thread % (kTile / kOwn) : thread / (kTile / kOwn)) * kOwn;
  A sums[kOwn][kOwn] = {};
  for (int tap = 0; tap < p.taps; ++tap) {
    for (int first = 0; first < p.channels; first += kDepth) {
      A values[kParts][kOwn];
      features.template load<kAccess>(place, tap, first + kOwn * group, values);
      __syncthreads();  // all have left what is overwritten
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int c = first + weight_channel;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          samples[part * kDepth + kOwn * group + i][row] = values[part][i];
          const int own = weight_output + i * (kThreads / kDepth), o = first_output + own;
          const T* weight = p.weight + o * p.output_stride + c * p.channel_stride +
                            tap * p.tap_stride + part * p.part_stride;
          const bool known = c < p.channels && o < p.outputs;
          weights[part * kDepth + weight_channel][own] = known ? to_accumulator(*weight) : A(0);
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kParts * kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const A sample = samples[k][pixel + i * (kTile / kOwn)];
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums[i][j] += sample * weights[k][output + j];
        }
      }
    }
  }
  Place own = place_of(first_pixel + pixel, p.height, p.width);
#pragma unroll 1
  for (int64_t at = first_pixel + pixel; at < min(first_pixel + kTile, p.pixels);
       at += kTile / kOwn) {
    epilogue.template store<kAccess>(own, first_output + output, sums[0]);
    shift(sums);
    advance(own, kTile / kOwn, p.height, p.width);
  }
}

template <typename T, typename Features, typename Epilogue>
int launch_product(const Product<T>& p, const Features& features, const Epilogue& epilogue,
                   void* stream) {
  if (p.pixels * p.outputs == 0) return 0;
  if constexpr (sizeof(T) == 2) {
    if (suits_tensor_cores(p, features, epilogue)) {
      if constexpr (kMadeOnce<Features>) {
        return launch_tensor_core_patch(p, features, epilogue, stream);
      } else {
        return launch_tensor_core(p, features, epilogue, stream);
      }
    }
  }
  if constexpr (kMadeOnce<Features>) {
    return launch_patch(p, features, epilogue, stream);
  } else {
    const dim3 grid(static_cast<unsigned>(divide_up(p.pixels, kTile)),
                    static_cast<unsigned>(divide_up(p.outputs, kTile)));
    return launch(pyramid_conv_kernel<T, Features, Epilogue>, grid, dim3(kThreads), 0, stream, p,
                  features, epilogue, features.channels_last(), epilogue.channels_last());
  }
}

}  // namespace mafnet
