// One pass over images (N, C, H, W) of any strides, of which a kind of pass makes sums per channel,
// another image, or both: statistics.cu and scale.cu say which.
//
// A thread owns a group of 16 bytes: neighbouring channels where these lie side by side, else
// neighbouring pixels of one channel. A block owns `lanes` groups of channels of one image, and of
// its lines of pixels some steps of `rows` pixels (planes: groups of pixels) each. Per element each
// source is read once and the target written once, 16 bytes at a time where all images allow it.
//
// Sums: a thread's over its steps, the rows of a block in a tree in shared memory, the chunks of an
// image in a second kernel, in the order of their numbers. How all is cut depends on shape and
// strides alone, so that bits do not depend on the order of blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "channel_attention/params.h"
#include "common/prims.cuh"

namespace mafnet {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kLanes = 32;     // 512 bytes of a pixel
constexpr int kLoads = 4;      // of a thread under way together
// Steps of a block: two such batches, and as many as it takes to have no more sums than a second
// kernel adds quickly.
constexpr int64_t kLeastSteps = 2 * kLoads, kMostChunks = 1024;
// Of the second kernel: 32 bytes of neighbouring channels.
constexpr int kSumLanes = 8, kSumRows = kThreads / kSumLanes;

template <typename T>
constexpr int kGroup = 16 / sizeof(T);

// An image of elements T, which is const for a source; strides in elements.
template <typename T>
struct Image {
  T* data;
  int64_t stride[4];

  DEVICE T* at(int64_t n, int c, int64_t y, int64_t x) const {
    return data + n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
  }
};

template <typename T>
Image<T> image_of(T* data, const int64_t (&stride)[4]) {
  return {data, {stride[0], stride[1], stride[2], stride[3]}};
}

// What a pass reads and writes; a target of null is not written.
template <typename T, int kSources>
struct Maps {
  Image<const T> from[kSources];
  Image<T> to;
};

// How a pass is cut. Lines that follow each other without a gap in every image are one.
struct Cut {
  bool vectors;  // in all images
  int64_t batch, height, width;
  int channels;
  int groups, lanes, rows;  // of channels: of an image, of a block; of pixels: of a block
  int tiles, chunks;        // an image is tiles * chunks blocks
  int64_t parts;            // steps of a line
  int64_t steps, block_steps;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
bool is_joined(const Cut& cut, const Image<T>& image) {
  return cut.height == 1 || image.stride[2] == cut.width * image.stride[3];
}

template <bool kLast, typename T>
bool has_vectors(const Cut& cut, const Image<T>& image) {
  const auto is_aligned = [](int64_t elements) { return elements % kGroup<T> == 0; };
  return image.stride[kLast ? 1 : 3] == 1 && is_aligned(kLast ? cut.channels : 0) &&
         reinterpret_cast<uintptr_t>(image.data) % 16 == 0 && is_aligned(image.stride[0]) &&
         is_aligned(image.stride[kLast ? 3 : 1]) &&
         (cut.height == 1 || is_aligned(image.stride[2]));
}

template <bool kLast, typename T, int kSources>
Cut cut_of(const ChannelImages& images, const Maps<T, kSources>& maps) {
  Cut cut{};
  cut.batch = images.batch;
  cut.channels = images.channels;
  cut.height = images.height;
  cut.width = images.width;
  const bool writes = maps.to.data != nullptr;
  bool joined = !writes || is_joined(cut, maps.to);
  for (const auto& from : maps.from) joined = joined && is_joined(cut, from);
  if (joined) {
    cut.width *= cut.height;
    cut.height = 1;
  }
  cut.vectors = !writes || has_vectors<kLast>(cut, maps.to);
  for (const auto& from : maps.from) cut.vectors = cut.vectors && has_vectors<kLast>(cut, from);

  const int64_t pixels = divide_up(cut.width, kLast ? 1 : kGroup<T>);
  cut.groups = static_cast<int>(divide_up(cut.channels, kLast ? kGroup<T> : 1));
  const int least_lanes = std::max(1, std::min(cut.groups, kLast ? kLanes : 1));
  cut.rows = static_cast<int>(std::min<int64_t>(pixels, kThreads / least_lanes));
  cut.lanes = std::max(1, std::min(cut.groups, kThreads / cut.rows));
  cut.tiles = static_cast<int>(divide_up(cut.groups, cut.lanes));
  cut.parts = divide_up(pixels, cut.rows);
  cut.steps = cut.height * cut.parts;
  const int64_t chunks = std::min(divide_up(cut.steps, kLeastSteps), kMostChunks);
  cut.block_steps = divide_up(cut.steps, chunks);
  cut.chunks = static_cast<int>(divide_up(cut.steps, cut.block_steps));
  return cut;
}

// The elements of workspace that a pass with kSums sums needs.
inline int64_t partial_elements(const Cut& cut, int sums) {
  return cut.batch * cut.chunks * sums * cut.channels;
}

// The largest of what came before and v; a NaN wins, as in PyTorch.
template <typename A>
DEVICE A larger(A best, A v) {
  return v > best || v != v ? v : best;
}

// Sums that are all plain.
template <typename A, int kCount>
struct PlainSums {
  static constexpr int kSums = kCount;
  DEVICE static void start(A (&sums)[kCount]) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) sums[s] = 0;
  }
  DEVICE static void merge(A (&sums)[kCount], const A (&more)[kCount]) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) sums[s] += more[s];
  }
};

// Adds the sums of the rows of a block to those of row 0; the next row's thread is `next` on.
template <typename Pass, int M, int kSums, typename A>
DEVICE void merge_rows(int row, int rows, int next, A (&sums)[M][kSums]) {
  SHARED(A, shared, [M][kSums][kThreads]);
  const int thread = threadIdx.x;
  for (int half = kThreads; half > 0; half /= 2) {
    if (row + half < rows) {  // of which the first `half` count
#pragma unroll
      for (int i = 0; i < M; ++i) {
        A more[kSums];
#pragma unroll
        for (int s = 0; s < kSums; ++s) more[s] = shared[i][s][thread + half * next];
        Pass::merge(sums[i], more);
      }
    }
    if (row < half) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) shared[i][s][thread] = sums[i][s];
      }
    }
    __syncthreads();
  }
}

// Where a thread reads and writes, and how far it is from one step to the next.
template <typename T, int kSources>
struct Pointers {
  const T* from[kSources];
  T* to;
  int64_t jump[kSources], to_jump;

  DEVICE Pointers(const Maps<T, kSources>& maps, int64_t n, int c, int64_t y, int64_t x,
                  int64_t span)
      : to(maps.to.at(n, c, y, x)), to_jump(span * maps.to.stride[3]) {
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      from[s] = maps.from[s].at(n, c, y, x);
      jump[s] = span * maps.from[s].stride[3];
    }
  }
  DEVICE void advance(int steps) {
#pragma unroll
    for (int s = 0; s < kSources; ++s) from[s] += steps * jump[s];
    to += steps * to_jump;
  }
};

template <typename T, bool kLast, typename Pass>
struct PassThread {
  using A = Accumulator<T>;
  static constexpr int N = kGroup<T>, kSources = Pass::kSources;
  static constexpr int kChannels = kLast ? N : 1, kPixels = kLast ? 1 : N;

  A sums[N][Pass::kSums], values[kChannels][Pass::kValues];

  DEVICE A element(const Pass& pass, int i, const A (&some)[kSources]) {
    return pass.element(sums[i], values[kLast ? i : 0], some);
  }

  template <int kSteps>
  DEVICE void take_vectors(const Pass& pass, Pointers<T, kSources>& at, bool writes) {
    Vector<T, N> read[kSteps][kSources];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        read[k][s] = load_vector<T, N>(at.from[s] + k * at.jump[s]);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Vector<T, N> made;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A some[kSources];
#pragma unroll
        for (int s = 0; s < kSources; ++s) some[s] = to_accumulator(read[k][s].at[i]);
        made.at[i] = from_accumulator<T>(element(pass, i, some));
      }
      if (writes) store_vector(at.to + k * at.to_jump, made);
    }
    at.advance(kSteps);
  }

  // Of the elements of a group the first `known`.
  DEVICE void take_singles(const Pass& pass, const Maps<T, kSources>& maps,
                           Pointers<T, kSources>& at, int64_t known, bool writes) {
    constexpr int kAxis = kLast ? 1 : 3;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= known) break;
      A some[kSources];
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        some[s] = to_accumulator(at.from[s][i * maps.from[s].stride[kAxis]]);
      }
      const A made = element(pass, i, some);
      if (writes) at.to[i * maps.to.stride[kAxis]] = from_accumulator<T>(made);
    }
    at.advance(1);
  }
};

// On an SM at least, in whose registers all must fit.
template <typename Pass>
constexpr int kBlocks = Pass::kSources == 1 ? 3 : 2;

template <typename T, bool kLast, typename Pass>
__global__ void __launch_bounds__(kThreads, kBlocks<Pass>)
    channel_pass_kernel(const Cut cut, const Maps<T, Pass::kSources> maps, const Pass pass,
                        Accumulator<T>* partials) {
  using A = Accumulator<T>;
  using Thread = PassThread<T, kLast, Pass>;
  constexpr int N = Thread::N, kChannels = Thread::kChannels, kBatch = kLoads / Pass::kSources;
  const int chunk = static_cast<int>(blockIdx.x % cut.chunks);
  const int tile = static_cast<int>(blockIdx.x / cut.chunks % cut.tiles);
  const int64_t n = blockIdx.x / cut.chunks / cut.tiles;
  const int thread = threadIdx.x;
  const int lane = kLast ? thread % cut.lanes : thread / cut.rows;
  const int row = kLast ? thread / cut.lanes : thread % cut.rows;
  const int c = (tile * cut.lanes + lane) * kChannels;
  bool writes = false;
  if constexpr (Pass::kWrites) writes = maps.to.data != nullptr;

  Thread own;
#pragma unroll
  for (int i = 0; i < N; ++i) Pass::start(own.sums[i]);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (c + i < cut.channels) pass.load(n, c + i, own.values[i]);
  }
  const int64_t last = min((chunk + 1) * cut.block_steps, cut.steps);
  const int64_t span = int64_t{cut.rows} * Thread::kPixels;
  for (int64_t step = chunk * cut.block_steps; step < last && c < cut.channels;) {
    const int64_t line = step / cut.parts, part = step - line * cut.parts;
    const int64_t count = min(last - step, cut.parts - part);
    int64_t x = (part * cut.rows + row) * Thread::kPixels;
    Pointers<T, Pass::kSources> at(maps, n, c, line, x, span);
    int64_t i = 0;
    if (cut.vectors) {
      // All but the last one of a line are whole.
      const int64_t end = x + (count - 1) * span + Thread::kPixels;
      const int64_t whole = count - static_cast<int64_t>(end > cut.width);
#pragma unroll 1
      for (; i + kBatch <= whole; i += kBatch) {
        own.template take_vectors<kBatch>(pass, at, writes);
      }
#pragma unroll 1
      for (; i < whole; ++i) own.template take_vectors<1>(pass, at, writes);
    }
#pragma unroll 1
    for (x += i * span; i < count; ++i, x += span) {
      const int64_t known = kLast && x < cut.width ? cut.channels - c : cut.width - x;
      own.take_singles(pass, maps, at, known, writes);
    }
    step += count;
  }
  if constexpr (Pass::kReduces) {
    if constexpr (!kLast) {
#pragma unroll
      for (int i = 1; i < N; ++i) Pass::merge(own.sums[0], own.sums[i]);
    }
    A of_channels[kChannels][Pass::kSums];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
#pragma unroll
      for (int s = 0; s < Pass::kSums; ++s) of_channels[i][s] = own.sums[i][s];
    }
    merge_rows<Pass>(row, cut.rows, kLast ? cut.lanes : 1, of_channels);
    A* to = partials + (n * cut.chunks + chunk) * Pass::kSums * cut.channels + c;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (row > 0 || c + i >= cut.channels) break;
#pragma unroll
      for (int s = 0; s < Pass::kSums; ++s) to[int64_t{s} * cut.channels + i] = of_channels[i][s];
    }
  }
}

// Adds the chunks of 8 channels of an image.
template <typename T, typename Pass>
__global__ void __launch_bounds__(kThreads)
    channel_sum_kernel(const Pass pass, const Accumulator<T>* partials, int tiles, int chunks,
                       int channels) {
  using A = Accumulator<T>;
  const int64_t n = blockIdx.x / tiles;
  const int c = static_cast<int>(blockIdx.x % tiles) * kSumLanes + threadIdx.x % kSumLanes;
  const int row = threadIdx.x / kSumLanes;
  A sums[1][Pass::kSums];
  Pass::start(sums[0]);
  for (int chunk = row; chunk < chunks && c < channels; chunk += kSumRows) {
    A more[Pass::kSums];
#pragma unroll
    for (int s = 0; s < Pass::kSums; ++s) {
      more[s] = partials[((n * chunks + chunk) * Pass::kSums + s) * channels + c];
    }
    Pass::merge(sums[0], more);
  }
  merge_rows<Pass>(row, kSumRows, kSumLanes, sums);
  if (row == 0 && c < channels) pass.finish(n, c, sums[0]);
}

template <bool kLast, typename T, typename Pass>
int launch_pass(const Cut& cut, const Maps<T, Pass::kSources>& maps, const Pass& pass,
                void* workspace, void* stream) {
  if (cut.batch * cut.channels == 0) return 0;
  auto* partials = static_cast<Accumulator<T>*>(workspace);
  const dim3 grid(static_cast<unsigned>(cut.batch * cut.tiles * cut.chunks));
  const dim3 block(static_cast<unsigned>(cut.lanes * cut.rows));
  const int status = launch(channel_pass_kernel<T, kLast, Pass>, grid, block, 0, stream, cut, maps,
                            pass, partials);
  if constexpr (Pass::kReduces) {
    if (status != 0) return status;
    const int tiles = static_cast<int>(divide_up(cut.channels, kSumLanes));
    return launch(channel_sum_kernel<T, Pass>, dim3(static_cast<unsigned>(cut.batch * tiles)),
                  dim3(kThreads), 0, stream, pass, partials, tiles, cut.chunks, cut.channels);
  }
  return status;
}

// Calls body(Type<T>{}, std::true_type{} where channels lie side by side, else std::false_type{}).
template <typename Body>
auto dispatch_images(const ChannelImages& images, const Body& body) {
  return dispatch_dtype<__half, __nv_bfloat16>(images.dtype, [&](auto type) {
    if (images.channels_last) return body(type, std::true_type{});
    return body(type, std::false_type{});
  });
}

}  // namespace mafnet
