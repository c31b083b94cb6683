// How channel attention is cut up on the CPU.
//
// A task is a plane of one channel, or some pixels of all channels where those lie side by side. It
// goes through its pixels in blocks that fit the first cache; a block's sums are floats, and blocks
// add up in double. What tasks and blocks are depends on the shape alone, so that the sums have the
// same bits for any number of threads.
#pragma once

#include <algorithm>
#include <limits>

#include "channel_attention/params.h"
#include "common/parallel.h"
#include "common/pixels.h"
#include "common/stored.h"
#include "common/vectors.h"

namespace mafnet {

constexpr int kBlock = 2048;       // elements: 8 kB, of which backward holds three
constexpr int kBlockPixels = 64;   // at most, so that floats suffice for their sums
constexpr int kTaskPixels = 2048;  // of all channels; few enough for many threads

template <typename A>
constexpr Dtype kAccumulator = sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

// `count` elements from `first` on: where they lie if they are of type A, else in buffer.
template <typename A>
const A* read_run(const void* data, Dtype dtype, int64_t first, int count, A* buffer) {
  if (dtype == kAccumulator<A>) return static_cast<const A*>(data) + first;
  gather_pixels({data, dtype, first, 0, 1}, 1, count, buffer, 0);
  return buffer;
}

// Where elements may be written before finish_run stores them.
template <typename A>
A* begin_run(void* data, Dtype dtype, int64_t first, A* buffer) {
  return dtype == kAccumulator<A> ? static_cast<A*>(data) + first : buffer;
}

template <typename A>
void finish_run(const A* buffer, int count, void* data, Dtype dtype, int64_t first) {
  if (dtype != kAccumulator<A>) scatter_pixels(buffer, 0, 1, count, {data, dtype, first, 0, 1});
}

// Values per channel (batch, channels) in the accumulators' type; those of an image begin at
// first + n * stride.
template <typename A>
class PerChannel {
 public:
  PerChannel(const ChannelImages& images, const void* from, int64_t first, int64_t stride)
      : values_(static_cast<size_t>(images.batch * images.channels), false) {
    for (int64_t n = 0; n < images.batch; ++n) {
      gather_pixels({from, images.dtype, first + n * stride, 0, 1}, 1, images.channels,
                    values_.data() + n * images.channels, 0);
    }
  }
  const A* at(int64_t i) const { return values_.data() + i; }

 private:
  Buffer<A> values_;
};

// How images are cut into tasks and these into blocks.
template <bool kPlanes>
struct Cut {
  explicit Cut(const ChannelImages& images)
      : pixels(images.pixels),
        channels(images.channels),
        per_image(kPlanes ? images.channels : (pixels + kTaskPixels - 1) / kTaskPixels),
        tasks(images.channels == 0 ? 0 : images.batch * per_image),
        block(kPlanes ? kBlock : std::clamp(kBlock / std::max(channels, 1), 1, kBlockPixels)),
        width(kPlanes ? 1 : channels) {}

  // Calls body(first element, pixels) for the blocks of a task.
  template <typename Body>
  void for_blocks(int64_t task, const Body& body) const {
    const int64_t n = task / per_image, part = task % per_image;
    const int64_t begin = kPlanes ? 0 : part * kTaskPixels;
    const int64_t end = kPlanes ? pixels : std::min(pixels, begin + kTaskPixels);
    const int64_t image = n * channels * pixels + (kPlanes ? part * pixels : 0);
    for (int64_t pixel = begin; pixel < end; pixel += block) {
      body(image + pixel * width, static_cast<int>(std::min<int64_t>(block, end - pixel)));
    }
  }
  // Of the first value per channel of a task in (batch, channels).
  int64_t value_at(int64_t task) const { return kPlanes ? task : task / per_image * channels; }
  // Tasks that are worth a thread.
  int64_t grain() const {
    const int64_t elements = kPlanes ? pixels : int64_t{kTaskPixels} * channels;
    return std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(elements, 1));
  }

  int64_t pixels;
  int channels;
  int64_t per_image, tasks;
  int block, width;  // pixels of a block at most; values per channel of a task
};

// The values of the channels of a block: of a plane one, kept where no store can change it.
template <bool kPlanes, typename A>
class BlockValues {
 public:
  explicit BlockValues(const A* values) : values_(values), first_(values[0]) {}

  // Of the channels of a vector that begins with channel c.
  template <typename V>
  MAFNET_INLINE V at(int c) const {
    if constexpr (kPlanes) {
      return first_ - V{};  // x - 0 is x for every x
    } else {
      return load<V>(values_ + c);
    }
  }

 private:
  const A* values_;
  A first_;
};

// body(Type<V>{}, element, c) for all elements of a block. What body captures by value stays in
// registers: stores of vectors might change anything in memory.
template <bool kPlanes, typename A, typename Body>
MAFNET_INLINE void for_elements(int pixels, int channels, const Body& body) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    const Body own = body;
    const int count = pixels, width = channels;
    if constexpr (kPlanes) {
      for_channels<L, A>(count, [&](auto type, int i) MAFNET_INLINE_LAMBDA { own(type, i, 0); });
    } else {
      for (int i = 0; i < count; ++i) {
        for_channels<L, A>(
            width, [&](auto type, int c) MAFNET_INLINE_LAMBDA { own(type, i * width + c, c); });
      }
    }
  });
}

// results[c] = fold(... fold(first, value) ..., value) over the pixels of a block, of
// value(Type<V>{}, element, c); several folds are under way at a time.
template <bool kPlanes, typename A, typename Value, typename Fold>
MAFNET_INLINE void fold_block(int pixels, int channels, A first, A* results, const Value& value,
                              const Fold& fold) {
  constexpr int kChains = 4;
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    if constexpr (kPlanes) {
      constexpr int kLanes = L::kBytes / sizeof(A);
      using V = VectorOf<A, kLanes>;
      V chains[kChains];
      for (V& chain : chains) chain = first - V{};
      int i = 0;
      for (; i + kChains * kLanes <= pixels; i += kChains * kLanes) {
#pragma GCC unroll 4
        for (int k = 0; k < kChains; ++k) {
          chains[k] = fold(chains[k], value(Type<V>{}, i + k * kLanes, 0));
        }
      }
      const V all = fold(fold(chains[0], chains[1]), fold(chains[2], chains[3]));
      A result = first;
      for (int lane = 0; lane < kLanes; ++lane) result = fold(result, A{all[lane]});
      for (; i < pixels; ++i) result = fold(result, value(Type<A>{}, i, 0));
      results[0] = result;
    } else {
      for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
        using V = typename decltype(type)::type;
        V even = first - V{}, odd = even;
        int i = 0;
        for (; i + 2 <= pixels; i += 2) {
          even = fold(even, value(type, i * channels + c, c));
          odd = fold(odd, value(type, (i + 1) * channels + c, c));
        }
        if (i < pixels) even = fold(even, value(type, i * channels + c, c));
        store<V>(results + c, fold(even, odd));
      });
    }
  });
}

struct Plus {
  template <typename V>
  MAFNET_INLINE V operator()(const V& a, const V& b) const {
    return a + b;
  }
};

// The larger one; a NaN in b is passed over.
struct Larger {
  template <typename V>
  MAFNET_INLINE V operator()(const V& a, const V& b) const {
    return larger_of(a, b);
  }
};

// Sums per task and channel, added up over the tasks of an image.
template <bool kPlanes>
class Totals {
 public:
  explicit Totals(const Cut<kPlanes>& cut)
      : cut_(cut), sums_(static_cast<size_t>(cut.tasks * cut.width)) {}

  double* at(int64_t task) { return sums_.data() + task * cut_.width; }
  template <typename A>
  void add(int64_t task, const A* block) {
    for (int c = 0; c < cut_.width; ++c) at(task)[c] += static_cast<double>(block[c]);
  }
  double of(int64_t n, int c) const {
    if (kPlanes) return sums_.data()[n * cut_.channels + c];
    double sum = 0;
    for (int64_t part = 0; part < cut_.per_image; ++part) {
      sum += sums_.data()[(n * cut_.per_image + part) * cut_.channels + c];
    }
    return sum;
  }

 private:
  const Cut<kPlanes>& cut_;
  Buffer<double> sums_;
};

// Calls body(planes, A{}) with std::true_type or std::false_type and the accumulators' type.
template <typename Body>
int dispatch(const ChannelImages& images, const Body& body) {
  const auto with_layout = [&](auto accumulator) {
    if (images.channels_last) {
      body(std::false_type{}, accumulator);
    } else {
      body(std::true_type{}, accumulator);
    }
  };
  if (images.dtype == Dtype::kFloat64) {
    with_layout(double{});
  } else {
    with_layout(float{});
  }
  return 0;
}

}  // namespace mafnet
