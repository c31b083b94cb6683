// A 3 x 3 convolution of features that are made once, of any dtype and strides: poolings, whose
// arithmetic would be nine times as much if each tap made its own.
//
// A block owns 8 x 8 pixels and 64 outputs. kDepth channels at a time, it makes the features of its
// pixels and of those around them in shared memory, 100 for 64, and walks over the taps: weights
// go to shared memory too, a thread sums 4 x 4.
#pragma once

#include "pyramid_spatial_attention/product.cuh"

namespace mafnet {

// The weights of a tap, kDepth channels and a tile of outputs, zeros past the last ones.
// Neighbouring threads read what lies side by side in memory.
template <int kParts, typename T, typename A>
DEVICE void stage_weights(const Product<T>& p, int tap, int first_channel, int first_output,
                          A (&weights)[kParts * kDepth][kTile + kPadding]) {
  const int row = threadIdx.x % kDepth, c = first_channel + row;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int own = threadIdx.x / kDepth + i * (kThreads / kDepth), o = first_output + own;
      const T* weight = p.weight + o * p.output_stride + c * p.channel_stride + tap * p.tap_stride +
                        part * p.part_stride;
      const bool known = c < p.channels && o < p.outputs;
      weights[part * kDepth + row][own] = known ? to_accumulator(*weight) : A(0);
    }
  }
}

constexpr int kSide = 8, kAround = kSide + 2;
static_assert(kSide * kSide == kTile && kTile / kOwn == 2 * kSide);

// Blocks that the compiler must fit on an SM: left alone it spills for one more.
template <typename T>
constexpr int kPatchBlocks = sizeof(T) == 8 ? 2 : 3;

template <typename T, typename Features, typename Epilogue>
__global__ void __launch_bounds__(kThreads, kPatchBlocks<T>)
    pyramid_conv_patch_kernel(const Product<T> p, const Features features, const Epilogue epilogue,
                              int patches_down, int patches_across, bool features_last,
                              bool outputs_last) {
  using A = Accumulator<T>;
  constexpr Access kAccess = std::is_same_v<T, float> ? Access::kEither : Access::kSingles;
  constexpr int kParts = Features::kParts, kCentre = 4;
  constexpr int kPixels = kAround * kAround, kGroups = kDepth / kOwn;
  SHARED(A, patch, [kParts * kDepth][kPixels]);
  SHARED(A, weights, [kParts * kDepth][kTile + kPadding]);
  const int thread = threadIdx.x;
  const int first_output = static_cast<int>(blockIdx.y) * kTile;
  const Place number = place_of(blockIdx.x, patches_down, patches_across);
  const int first_y = number.y * kSide, first_x = number.x * kSide;

  // What this thread sums: pixels pixel + 16 i, outputs output ... output + 3.
  const int pixel = outputs_last ? thread / (kTile / kOwn) : thread % (kTile / kOwn);
  const int output = (outputs_last ? thread % (kTile / kOwn) : thread / (kTile / kOwn)) * kOwn;
  A sums[kOwn][kOwn] = {};
  for (int first = 0; first < p.channels; first += kDepth) {
    __syncthreads();  // all have left the patch that is overwritten
#pragma unroll 1
    for (int i = thread; i < kPixels * kGroups; i += kThreads) {
      const int at = features_last ? i / kGroups : i % kPixels;
      const int group = features_last ? i % kGroups : i / kPixels;
      const Place place{number.n, first_y + at / kAround - 1, first_x + at % kAround - 1};
      A values[kParts][kOwn];
      features.template load<kAccess>(place, kCentre, first + kOwn * group, values);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          patch[part * kDepth + kOwn * group + j][at] = values[part][j];
        }
      }
    }
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
      __syncthreads();  // all have left the weights
      stage_weights<kParts>(p, tap, first, first_output, weights);
      __syncthreads();
      const int from = (pixel / kSide + tap / 3) * kAround + pixel % kSide + tap % 3;
#pragma unroll
      for (int k = 0; k < kParts * kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const A sample = patch[k][from + i * 2 * kAround];
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums[i][j] += sample * weights[k][output + j];
        }
      }
    }
  }
#pragma unroll 1
  for (int row = pixel / kSide; row < kSide; row += 2) {
    const Place own{number.n, first_y + row, first_x + pixel % kSide};
    if (is_inside(own, p.height, p.width)) {
      epilogue.template store<kAccess>(own, first_output + output, sums[0]);
    }
    shift(sums);
  }
}

template <typename T, typename Features, typename Epilogue>
int launch_patch(const Product<T>& p, const Features& features, const Epilogue& epilogue,
                 void* stream) {
  const int64_t down = divide_up(p.height, kSide), across = divide_up(p.width, kSide);
  const int64_t images = p.pixels / p.height / p.width;
  const dim3 grid(static_cast<unsigned>(images * down * across),
                  static_cast<unsigned>(divide_up(p.outputs, kTile)));
  return launch(pyramid_conv_patch_kernel<T, Features, Epilogue>, grid, dim3(kThreads), 0, stream,
                p, features, epilogue, static_cast<int>(down), static_cast<int>(across),
                features.channels_last(), epilogue.channels_last());
}

}  // namespace mafnet
