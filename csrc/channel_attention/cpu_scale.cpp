// The scale of channels on the CPU, and its gradients.
#include "channel_attention/cut.h"
#include "common/fresh_memory.h"

namespace mafnet {
namespace {

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

}  // namespace

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
