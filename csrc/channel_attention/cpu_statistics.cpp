// Statistics of channels on the CPU, in one pass over the map, and their gradient.
#include "channel_attention/cut.h"
#include "common/fresh_memory.h"

namespace mafnet {
namespace {

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
      if (c + 2 * kLanes <= channels) {
        sum_and_max<V, 2>(x + c, pixels, channels, sums + c, maxima + c);
        c += 2 * kLanes;
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

}  // namespace mafnet
