// channel_statistics: means and maxima per channel.
//
// Forward is a pass that reads the map once, and a small kernel. Backward needs how many pixels
// attain a maximum, which forward does not keep: a pass that reads the map and counts, a small
// kernel that makes two gradients of each channel, and a pass that gives every pixel one of them.
#include "channel_attention/pass.cuh"

namespace mafnet {
namespace {

// Sums and maxima; then row n of statistics (batch, 2, channels).
template <typename T>
struct Moments {
  using A = Accumulator<T>;
  static constexpr int kSources = 1, kSums = 2, kValues = 1;
  static constexpr bool kReduces = true, kWrites = false;
  T* statistics;
  int channels;
  int64_t pixels;

  DEVICE static void start(A (&sums)[2]) {
    sums[0] = 0;
    sums[1] = static_cast<A>(-INFINITY);
  }
  DEVICE static void merge(A (&sums)[2], const A (&more)[2]) {
    sums[0] += more[0];
    sums[1] = larger(sums[1], more[1]);
  }
  DEVICE void load(int64_t, int, A (&values)[1]) const { values[0] = 0; }
  DEVICE A element(A (&sums)[2], const A (&)[1], const A (&some)[1]) const {
    const A more[2] = {some[0], some[0]};
    merge(sums, more);
    return 0;
  }
  DEVICE void finish(int64_t n, int c, const A (&sums)[2]) const {
    T* to = statistics + 2 * n * channels + c;
    to[0] = from_accumulator<T>(sums[0] / static_cast<A>(pixels));
    to[channels] = from_accumulator<T>(sums[1]);
  }
};

// How many pixels attain the maximum; then the gradients of those and of the others, (batch, 2,
// channels). Nothing equals a NaN: its gradient is NaN for all, as of PyTorch's amax.
template <typename T>
struct Winners : PlainSums<Accumulator<T>, 1> {
  using A = Accumulator<T>;
  static constexpr int kSources = 1, kValues = 1;
  static constexpr bool kReduces = true, kWrites = false;
  const T *statistics, *grad_statistics;
  A* shares;
  int channels;
  int64_t pixels;

  DEVICE void load(int64_t n, int c, A (&values)[1]) const {
    values[0] = to_accumulator(statistics[(2 * n + 1) * channels + c]);
  }
  DEVICE A element(A (&sums)[1], const A (&values)[1], const A (&some)[1]) const {
    sums[0] += static_cast<A>(some[0] == values[0]);
    return 0;
  }
  DEVICE void finish(int64_t n, int c, const A (&sums)[1]) const {
    const int64_t at = 2 * n * channels + c;
    const A of_mean = to_accumulator(grad_statistics[at]) / static_cast<A>(pixels);
    const A nothing = sums[0] == 0 ? static_cast<A>(NAN) : A(0);
    shares[at] = of_mean + to_accumulator(grad_statistics[at + channels]) / sums[0];
    shares[at + channels] = of_mean + nothing;
  }
};

template <typename T>
struct Share : PlainSums<Accumulator<T>, 1> {
  using A = Accumulator<T>;
  static constexpr int kSources = 1, kValues = 3;
  static constexpr bool kReduces = false, kWrites = true;
  const T* statistics;
  const A* shares;
  int channels;

  DEVICE void load(int64_t n, int c, A (&values)[3]) const {
    const int64_t at = 2 * n * channels + c;
    values[0] = to_accumulator(statistics[at + channels]);
    values[1] = shares[at];
    values[2] = shares[at + channels];
  }
  DEVICE A element(A (&)[1], const A (&values)[3], const A (&some)[1]) const {
    return some[0] == values[0] ? values[1] : values[2];
  }
};

template <typename T>
Maps<T, 1> maps_of(const ChannelStatisticsParams& p, void* to) {
  return {{image_of(static_cast<const T*>(p.input), p.input_stride)},
          image_of(static_cast<T*>(to), p.grad_input_stride)};
}

template <bool kLast, typename T>
int launch_forward(const ChannelStatisticsParams& p, void* stream) {
  const auto maps = maps_of<T>(p, nullptr);
  const Moments<T> pass{static_cast<T*>(p.statistics), p.images.channels, p.images.pixels};
  return launch_pass<kLast>(cut_of<kLast>(p.images, maps), maps, pass, p.workspace, stream);
}

template <bool kLast, typename T>
int launch_backward(const ChannelStatisticsParams& p, void* stream) {
  using A = Accumulator<T>;
  const auto maps = maps_of<T>(p, nullptr);
  const Cut cut = cut_of<kLast>(p.images, maps);
  auto* partials = static_cast<A*>(p.workspace);
  A* shares = partials + partial_elements(cut, 1);
  const auto* statistics = static_cast<const T*>(p.statistics);
  const Winners<T> count{{},     statistics,        static_cast<const T*>(p.grad_statistics),
                         shares, p.images.channels, p.images.pixels};
  const int status = launch_pass<kLast>(cut, maps, count, partials, stream);
  if (status != 0) return status;
  const auto both = maps_of<T>(p, p.grad_input);
  const Share<T> share{{}, statistics, shares, p.images.channels};
  return launch_pass<kLast>(cut_of<kLast>(p.images, both), both, share, nullptr, stream);
}

}  // namespace

int64_t channel_statistics_workspace(const ChannelStatisticsParams& p, bool backward) {
  return dispatch_images(p.images, [&](auto type, auto last) {
    using T = typename decltype(type)::type;
    const Cut cut = cut_of<decltype(last)::value>(p.images, maps_of<T>(p, nullptr));
    const int64_t shares = 2 * p.images.batch * p.images.channels;
    const int64_t elements =
        backward ? partial_elements(cut, 1) + shares : partial_elements(cut, 2);
    return elements * static_cast<int64_t>(sizeof(Accumulator<T>));
  });
}

int launch_channel_statistics_forward(const ChannelStatisticsParams& p, void* stream) {
  return dispatch_images(p.images, [&](auto type, auto last) {
    return launch_forward<decltype(last)::value, typename decltype(type)::type>(p, stream);
  });
}

int launch_channel_statistics_backward(const ChannelStatisticsParams& p, void* stream) {
  return dispatch_images(p.images, [&](auto type, auto last) {
    return launch_backward<decltype(last)::value, typename decltype(type)::type>(p, stream);
  });
}

}  // namespace mafnet
