// Channel attention on the CPU: statistics in one pass over the map, the scale, and their
// gradients.
//
// A task is a plane of one channel, or some pixels of all channels where those lie side by side. It
// goes through its pixels in blocks that fit the first cache; a block's sums are floats, and blocks
// add up in double. What tasks and blocks are depends on the shape alone, so that the sums have the
// same bits for any number of threads.
#include <algorithm>
#include <limits>

#include "channel_attention/params.h"
#include "common/fresh_memory.h"
#include "common/parallel.h"
#include "common/pixels.h"
#include "common/stored.h"
#include "common/vectors.h"

namespace mafnet {
namespace {

constexpr int kBlock = 2048;       // elements: 8 kB, of which backward holds three
constexpr int kBlockPixels = 64;   // at most, so that floats suffice for their sums
constexpr int kTaskPixels = 2048;  // of all channels; few enough for many threads

template <typename A>
constexpr Dtype kDense = sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

// `count` elements from `first` on: where they lie if they are of type A, else in buffer.
template <typename A>
const A* read_run(const void* data, Dtype dtype, int64_t first, int count, A* buffer) {
  if (dtype == kDense<A>) return static_cast<const A*>(data) + first;
  gather_pixels({data, dtype, first, 0, 1}, 1, count, buffer, 0);
  return buffer;
}

// Where elements may be written before finish_run stores them.
template <typename A>
A* begin_run(void* data, Dtype dtype, int64_t first, A* buffer) {
  return dtype == kDense<A> ? static_cast<A*>(data) + first : buffer;
}

template <typename A>
void finish_run(const A* buffer, int count, void* data, Dtype dtype, int64_t first) {
  if (dtype != kDense<A>) scatter_pixels(buffer, 0, 1, count, {data, dtype, first, 0, 1});
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
void for_elements(int pixels, int channels, const Body& body) {
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
void fold_block(int pixels, int channels, A first, A* results, const Value& value,
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

// Sums and maxima of kColumns vectors V over rows of a block; several are under way at a time.
template <typename V, int kColumns, typename A, typename T>
MAFNET_INLINE void sum_and_max(const T* x, int rows, int64_t stride, A* sums, A* maxima) {
  constexpr int kChains = 4, kRows = kChains / kColumns, kLanes = sizeof(V) / sizeof(A);
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  V sum[kChains], best[kChains];
#pragma GCC unroll 4
  for (int k = 0; k < kChains; ++k) {
    sum[k] = V{};
    best[k] = kLowest - V{};
  }
  const auto add = [&](int row, int column, int chain) MAFNET_INLINE_LAMBDA {
    const V v = load_stored<V>(x + row * stride + column * kLanes);
    sum[chain] += v;
    best[chain] = Larger{}(best[chain], v);
  };
  int i = 0;
  for (; i + kRows <= rows; i += kRows) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) add(i + k / kColumns, k % kColumns, k);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kChains - kColumns; ++k) {
    if (i + k / kColumns < rows) add(i + k / kColumns, k % kColumns, k);
  }
#pragma GCC unroll 2
  for (int half = kChains / 2; half >= kColumns; half /= 2) {
#pragma GCC unroll 2
    for (int k = 0; k < half; ++k) {
      sum[k] += sum[k + half];
      best[k] = Larger{}(best[k], best[k + half]);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kColumns; ++k) {
    store<V>(sums + k * kLanes, sum[k]);
    store<V>(maxima + k * kLanes, best[k]);
  }
}

template <typename T>
bool has_nan(const T* x, int stride, int count) {
  for (int i = 0; i < count; ++i) {
    if (x[int64_t{i} * stride] != x[int64_t{i} * stride]) return true;
  }
  return false;
}

// Adds the sums of a block to `totals` and puts its maxima into best, in one pass; block has room
// for two values per channel.
template <bool kPlanes, typename A, typename T>
void add_statistics(const T* x, int pixels, int channels, A* block, double* totals, A* best) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    constexpr int kLanes = L::kBytes / sizeof(A);
    using V = VectorOf<A, kLanes>;
    const int width = kPlanes ? 1 : channels;
    A *sums = block, *maxima = block + width;
    if constexpr (kPlanes) {
      constexpr int kMostRows = 4 * kBlockPixels;  // which make four sums of kBlockPixels each
      const int rows = pixels / kLanes;
      V sum{}, most = -std::numeric_limits<A>::infinity() - V{};
      for (int row = 0; row < rows; row += kMostRows) {
        A lanes[2][kLanes];
        sum_and_max<V, 1>(x + row * kLanes, std::min(rows - row, kMostRows), kLanes, lanes[0],
                          lanes[1]);
        sum += load<V>(lanes[0]);
        most = Larger{}(most, load<V>(lanes[1]));
      }
      sums[0] = fold<A>(sum, Plus{});
      maxima[0] = fold<A>(most, Larger{});
      for (int i = rows * kLanes; i < pixels; ++i) {
        sums[0] += static_cast<A>(x[i]);
        maxima[0] = Larger{}(maxima[0], static_cast<A>(x[i]));
      }
    } else {
      int c = 0;  // four vectors at a time read whole pixels of the usual 64 channels
      for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
        sum_and_max<V, 4>(x + c, pixels, channels, sums + c, maxima + c);
      }
      for_channels<L, A>(channels - c, [&](auto type, int more) MAFNET_INLINE_LAMBDA {
        using Some = typename decltype(type)::type;
        const int at = c + more;
        sum_and_max<Some, 1>(x + at, pixels, channels, sums + at, maxima + at);
      });
    }
    bool nan = false;
    for (int c = 0; c < width; ++c) {
      totals[c] += static_cast<double>(sums[c]);
      best[c] = Larger{}(best[c], maxima[c]);  // a NaN stays
      nan |= sums[c] != sums[c];
    }
    // Only where a sum is NaN there may be one to find: looking for it in every block would cost
    // more than the maximum itself.
    if (!nan) return;
    for (int c = 0; c < width; ++c) {
      if (sums[c] != sums[c] && has_nan(x + c, width, pixels)) {
        best[c] = std::numeric_limits<A>::quiet_NaN();
      }
    }
  });
}

template <bool kPlanes, typename A>
void statistics_forward(const ChannelStatisticsParams& p) {
  const ChannelImages& images = p.images;
  const Cut<kPlanes> cut(images);
  Totals<kPlanes> totals(cut);
  Buffer<A> maxima(static_cast<size_t>(cut.tasks * cut.width), false);
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  std::fill_n(maxima.data(), maxima.size(), kLowest);
  parallel_for(0, cut.tasks, cut.grain(), [&](int64_t begin, int64_t end) {
    const size_t width = static_cast<size_t>(cut.width);
    Buffer<A> buffer(cut.block * width, false), sums(2 * width, false);
    for (int64_t task = begin; task < end; ++task) {
      A* best = maxima.data() + task * cut.width;
      cut.for_blocks(task, [&](int64_t first, int pixels) {
        const auto add = [&](const auto* x) {
          add_statistics<kPlanes>(x, pixels, cut.channels, sums.data(), totals.at(task), best);
        };
        if constexpr (sizeof(A) == 4) {
          if (images.dtype == Dtype::kBFloat16) {
            return add(static_cast<const torch::headeronly::BFloat16*>(p.input) + first);
          }
        }
        add(read_run(p.input, images.dtype, first, pixels * cut.width, buffer.data()));
      });
    }
  });
  Buffer<A> results(static_cast<size_t>(2) * cut.channels, false);
  for (int64_t n = 0; n < images.batch; ++n) {
    for (int c = 0; c < cut.channels; ++c) {
      results.data()[c] = static_cast<A>(totals.of(n, c) / static_cast<double>(cut.pixels));
      const int64_t parts = kPlanes ? 1 : cut.per_image;
      const A* of_tasks = maxima.data() + n * parts * cut.channels + c;
      A best = of_tasks[0];
      for (int64_t i = 1; i < parts && best == best; ++i) {  // a NaN is final
        const A next = of_tasks[i * cut.channels];
        best = next != next ? next : Larger{}(best, next);
      }
      results.data()[cut.channels + c] = best;
    }
    scatter_pixels(results.data(), 0, 1, 2 * cut.channels,
                   {p.statistics, images.dtype, n * 2 * cut.channels, 0, 1});
  }
}

// The gradient of the mean goes to all pixels alike, that of the maximum to the largest ones in
// equal shares, as in PyTorch's amax. Nothing equals a NaN: its gradient is NaN for all, as there.
template <bool kPlanes, typename A>
void statistics_backward(const ChannelStatisticsParams& p) {
  const ChannelImages& images = p.images;
  const Cut<kPlanes> cut(images);
  const size_t values = static_cast<size_t>(images.batch * cut.channels);
  const int64_t row = cut.channels;
  const PerChannel<A> maxima(images, p.statistics, row, 2 * row);
  const PerChannel<A> grad_mean(images, p.grad_statistics, 0, 2 * row);
  const PerChannel<A> grad_max(images, p.grad_statistics, row, 2 * row);
  Totals<kPlanes> winners(cut);
  parallel_for(0, cut.tasks, cut.grain(), [&](int64_t begin, int64_t end) {
    Buffer<A> buffer(static_cast<size_t>(cut.block) * cut.width, false);
    Buffer<A> block(static_cast<size_t>(cut.width), false);
    for (int64_t task = begin; task < end; ++task) {
      const BlockValues<kPlanes, A> best(maxima.at(cut.value_at(task)));
      cut.for_blocks(task, [&](int64_t first, int pixels) {
        const A* x = read_run(p.input, images.dtype, first, pixels * cut.width, buffer.data());
        const auto wins = [x, best](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          const V one = V{} + A{1}, none = V{};
          return (load<V>(x + i) == best.template at<V>(c)) ? one : none;
        };
        fold_block<kPlanes>(pixels, cut.channels, A{0}, block.data(), wins, Plus{});
        winners.add(task, block.data());
      });
    }
  });
  Buffer<A> shares(values, false), rests(values, false);  // of the largest pixels, of the others
  for (int64_t n = 0; n < images.batch; ++n) {
    for (int c = 0; c < cut.channels; ++c) {
      const int64_t i = n * cut.channels + c;
      const double count = winners.of(n, c);
      const A mean = *grad_mean.at(i) / static_cast<A>(cut.pixels);
      const A nothing = count == 0 ? std::numeric_limits<A>::quiet_NaN() : A{0};
      rests.data()[i] = mean + nothing;
      shares.data()[i] = mean + *grad_max.at(i) / static_cast<A>(count);
    }
  }
  prepare_output(p.grad_input,
                 images.batch * cut.channels * cut.pixels * element_bytes(images.dtype));
  parallel_for(0, cut.tasks, cut.grain(), [&](int64_t begin, int64_t end) {
    const size_t size = static_cast<size_t>(cut.block) * cut.width;
    Buffer<A> buffer(size, false), results(size, false);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = cut.value_at(task);
      const BlockValues<kPlanes, A> best(maxima.at(at)), share(shares.data() + at);
      const BlockValues<kPlanes, A> rest(rests.data() + at);
      cut.for_blocks(task, [&](int64_t first, int pixels) {
        const int count = pixels * cut.width;
        const A* x = read_run(p.input, images.dtype, first, count, buffer.data());
        A* grad = begin_run(p.grad_input, images.dtype, first, results.data());
        for_elements<kPlanes, A>(
            pixels, cut.channels, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
              using V = typename decltype(type)::type;
              const V won = share.template at<V>(c), lost = rest.template at<V>(c);
              store<V>(grad + i, (load<V>(x + i) == best.template at<V>(c)) ? won : lost);
            });
        finish_run(grad, count, p.grad_input, images.dtype, first);
      });
    }
  });
}

// T is how elements are stored, A or BFloat16.
template <bool kPlanes, typename A, typename T>
void scale_run(const T* x, const BlockValues<kPlanes, A>& gate, int pixels, int channels, T* out,
               bool around) {
  const auto run = [&](const auto& put) {
    for_elements<kPlanes, A>(pixels, channels, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      put(out + i, V(load_stored<V>(x + i) * gate.template at<V>(c)));
    });
  };
  if (around) {
    run(StoreAround{});
  } else {
    run(Store{});
  }
}

template <bool kPlanes, typename A>
void scale_forward(const ChannelScaleParams& p) {
  using torch::headeronly::BFloat16;
  const ChannelImages& images = p.images;
  const Cut<kPlanes> cut(images);
  const PerChannel<A> gates(images, p.gate, 0, cut.channels);
  const int64_t bytes = element_bytes(images.dtype);
  const int64_t size = images.batch * cut.channels * cut.pixels * bytes;
  prepare_output(p.output, size);
  const int64_t run = (kPlanes ? cut.pixels : cut.channels) * bytes;
  const bool around =
      size >= kLargeOutput && (reinterpret_cast<uintptr_t>(p.output) | run) % 64 == 0;
  parallel_for(0, cut.tasks, cut.grain(), [&](int64_t begin, int64_t end) {
    Buffer<A> buffer(static_cast<size_t>(cut.block) * cut.width, false);
    for (int64_t task = begin; task < end; ++task) {
      const BlockValues<kPlanes, A> gate(gates.at(cut.value_at(task)));
      cut.for_blocks(task, [&](int64_t first, int pixels) {
        const auto scale = [&](const auto* x, auto* out, bool past) {
          scale_run<kPlanes>(x, gate, pixels, cut.channels, out, past);
        };
        if constexpr (sizeof(A) == 4) {
          if (images.dtype == Dtype::kBFloat16) {
            return scale(static_cast<const BFloat16*>(p.input) + first,
                         static_cast<BFloat16*>(p.output) + first, around);
          }
        }
        const int count = pixels * cut.width;
        const A* x = read_run(p.input, images.dtype, first, count, buffer.data());
        A* out = begin_run(p.output, images.dtype, first, buffer.data());
        scale(x, out, around && out != buffer.data());
        finish_run(out, count, p.output, images.dtype, first);
      });
    }
  });
}

template <bool kPlanes, typename A>
void scale_backward(const ChannelScaleParams& p) {
  const ChannelImages& images = p.images;
  const Cut<kPlanes> cut(images);
  const PerChannel<A> gates(images, p.gate, 0, cut.channels);
  Totals<kPlanes> totals(cut);
  if (p.grad_input != nullptr) {
    prepare_output(p.grad_input,
                   images.batch * cut.channels * cut.pixels * element_bytes(images.dtype));
  }
  parallel_for(0, cut.tasks, cut.grain(), [&](int64_t begin, int64_t end) {
    const size_t size = static_cast<size_t>(cut.block) * cut.width;
    Buffer<A> buffer(size, false), grads(size, false), results(size, false);
    Buffer<A> block(static_cast<size_t>(cut.width), false);
    for (int64_t task = begin; task < end; ++task) {
      const BlockValues<kPlanes, A> gate(gates.at(cut.value_at(task)));
      cut.for_blocks(task, [&](int64_t first, int pixels) {
        const int count = pixels * cut.width;
        const A* grad = read_run(p.grad_output, images.dtype, first, count, grads.data());
        if (p.grad_gate != nullptr) {
          const A* x = read_run(p.input, images.dtype, first, count, buffer.data());
          const auto product = [x, grad](auto type, int i, int) MAFNET_INLINE_LAMBDA {
            using V = typename decltype(type)::type;
            return load<V>(x + i) * load<V>(grad + i);
          };
          fold_block<kPlanes>(pixels, cut.channels, A{0}, block.data(), product, Plus{});
          totals.add(task, block.data());
        }
        if (p.grad_input == nullptr) return;
        A* out = begin_run(p.grad_input, images.dtype, first, results.data());
        for_elements<kPlanes, A>(pixels, cut.channels,
                                 [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
                                   using V = typename decltype(type)::type;
                                   store<V>(out + i, load<V>(grad + i) * gate.template at<V>(c));
                                 });
        finish_run(out, count, p.grad_input, images.dtype, first);
      });
    }
  });
  if (p.grad_gate == nullptr) return;
  Buffer<A> results(static_cast<size_t>(cut.channels), false);
  for (int64_t n = 0; n < images.batch; ++n) {
    for (int c = 0; c < cut.channels; ++c) results.data()[c] = static_cast<A>(totals.of(n, c));
    scatter_pixels(results.data(), 0, 1, cut.channels,
                   {p.grad_gate, images.dtype, n * cut.channels, 0, 1});
  }
}

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

}  // namespace

int launch_channel_statistics_forward(const ChannelStatisticsParams& p, void*) {
  return dispatch(p.images, [&](auto planes, auto a) {
    statistics_forward<decltype(planes)::value, decltype(a)>(p);
  });
}

int launch_channel_statistics_backward(const ChannelStatisticsParams& p, void*) {
  return dispatch(p.images, [&](auto planes, auto a) {
    statistics_backward<decltype(planes)::value, decltype(a)>(p);
  });
}

int launch_channel_scale_forward(const ChannelScaleParams& p, void*) {
  return dispatch(p.images, [&](auto planes, auto a) {
    scale_forward<decltype(planes)::value, decltype(a)>(p);
  });
}

int launch_channel_scale_backward(const ChannelScaleParams& p, void*) {
  return dispatch(p.images, [&](auto planes, auto a) {
    scale_backward<decltype(planes)::value, decltype(a)>(p);
  });
}

}  // namespace mafnet
