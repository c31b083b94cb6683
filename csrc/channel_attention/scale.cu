// channel_scale: output = input * gate per channel. Forward is one pass. Backward is one pass that
// reads input and grad_output, writes grad_input and sums up the gradient of the gate, and a small
// kernel.
#include "channel_attention/pass.cuh"

namespace mafnet {
namespace {

template <typename T>
struct Scale : PlainSums<Accumulator<T>, 1> {
  using A = Accumulator<T>;
  static constexpr int kSources = 1, kValues = 1;
  static constexpr bool kReduces = false, kWrites = true;
  const T* gate;
  int channels;

  DEVICE void load(int64_t n, int c, A (&values)[1]) const {
    values[0] = to_accumulator(gate[n * channels + c]);
  }
  DEVICE A element(A (&)[1], const A (&values)[1], const A (&some)[1]) const {
    return some[0] * values[0];
  }
};

// Sources are grad_output and input; the target is grad_input, or null.
template <typename T>
struct ScaleBackward : PlainSums<Accumulator<T>, 1> {
  using A = Accumulator<T>;
  static constexpr int kSources = 2, kValues = 1;
  static constexpr bool kReduces = true, kWrites = true;
  Scale<T> scale;
  T* grad_gate;

  DEVICE void load(int64_t n, int c, A (&values)[1]) const { scale.load(n, c, values); }
  DEVICE A element(A (&sums)[1], const A (&values)[1], const A (&some)[2]) const {
    sums[0] += some[0] * some[1];
    return some[0] * values[0];
  }
  DEVICE void finish(int64_t n, int c, const A (&sums)[1]) const {
    grad_gate[n * scale.channels + c] = from_accumulator<T>(sums[0]);
  }
};

template <typename T>
Maps<T, 2> backward_maps(const ChannelScaleParams& p) {
  return {{image_of(static_cast<const T*>(p.grad_output), p.grad_output_stride),
           image_of(static_cast<const T*>(p.input), p.input_stride)},
          image_of(static_cast<T*>(p.grad_input), p.grad_input_stride)};
}

template <bool kLast, typename T>
int launch_scale(const ChannelScaleParams& p, const Image<const T>& from, const Image<T>& to,
                 void* stream) {
  const Maps<T, 1> maps{{from}, to};
  const Scale<T> pass{{}, static_cast<const T*>(p.gate), p.images.channels};
  return launch_pass<kLast>(cut_of<kLast>(p.images, maps), maps, pass, nullptr, stream);
}

template <bool kLast, typename T>
int launch_backward(const ChannelScaleParams& p, void* stream) {
  const auto maps = backward_maps<T>(p);
  if (p.grad_gate == nullptr) {
    if (p.grad_input == nullptr) return 0;
    return launch_scale<kLast>(p, maps.from[0], maps.to, stream);
  }
  const Scale<T> scale{{}, static_cast<const T*>(p.gate), p.images.channels};
  const ScaleBackward<T> pass{{}, scale, static_cast<T*>(p.grad_gate)};
  return launch_pass<kLast>(cut_of<kLast>(p.images, maps), maps, pass, p.workspace, stream);
}

}  // namespace

int64_t channel_scale_workspace(const ChannelScaleParams& p) {
  return dispatch_images(p.images, [&](auto type, auto last) {
    using T = typename decltype(type)::type;
    const Cut cut = cut_of<decltype(last)::value>(p.images, backward_maps<T>(p));
    return partial_elements(cut, 1) * static_cast<int64_t>(sizeof(Accumulator<T>));
  });
}

int launch_channel_scale_forward(const ChannelScaleParams& p, void* stream) {
  return dispatch_images(p.images, [&](auto type, auto last) {
    using T = typename decltype(type)::type;
    return launch_scale<decltype(last)::value>(
        p, image_of(static_cast<const T*>(p.input), p.input_stride),
        image_of(static_cast<T*>(p.output), p.output_stride), stream);
  });
}

int launch_channel_scale_backward(const ChannelScaleParams& p, void* stream) {
  return dispatch_images(p.images, [&](auto type, auto last) {
    return launch_backward<decltype(last)::value, typename decltype(type)::type>(p, stream);
  });
}

}  // namespace mafnet
