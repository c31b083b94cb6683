// The bilinear forward kernel of channels_last, over the plan of cpu_bilinear_plan.h. See
// cpu_bilinear_kernels.h.
namespace mafnet {
namespace {

// Computes again what is not finite, without the taps of weight zero: of `count` pixels, the first
// one that of the plan's element `begin`.
template <typename T>
void repair(const FlowWarpParams& p, const Plan& plan, int begin, int count, int64_t channels,
            const T* image, T* output) {
  const int64_t *from = p.input_stride, *to = p.output_stride;
  for (int i = begin; i < begin + count; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      T& result = output[(i - begin) * to[3] + c * to[1]];
      if (std::isfinite(static_cast<float>(result))) continue;
      float value = 0;
      for (int j = 0; j < 2; ++j) {
        for (int k = 0; k < 2; ++k) {
          const float w = plan.y.weight[j][i] * plan.x.weight[k][i];
          const T* tap =
              image + c * from[1] + (plan.y.cell[i] + j) * from[2] + (plan.x.cell[i] + k) * from[3];
          if (w != 0) value += w * static_cast<float>(*tap);
        }
      }
      result = static_cast<T>(value);
    }
  }
}

// Fetches into the L2 cache the lower right pixel of the cell some pixels on: under most flows the
// left one is that of the cell before, and the upper ones were read with the row above.
template <typename T>
MAFNET_KERNEL MAFNET_INLINE void prefetch_cell(const FlowWarpParams& p, const Plan& plan, int i,
                                               const T* image) {
  const int later = std::min(i + kPixelsAhead, plan.count - 1);
  const T* pixel = image + (plan.y.cell[later] + 1) * p.input_stride[2] +
                   (plan.x.cell[later] + 1) * p.input_stride[3];
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < p.channels; c += kLine) __builtin_prefetch(pixel + c, 0, 2);
}

// Channels one by one of a pixel of which vectors have taken the first ones.
template <typename T>
MAFNET_KERNEL float blend_rest(const T* upper, const T* lower, int64_t next, const float (&w)[4],
                               int64_t c, int64_t channels, T* output) {
  float check = 0;
  for (; c < channels; ++c) {
    const float value =
        w[0] * static_cast<float>(upper[c]) + w[1] * static_cast<float>(upper[next + c]) +
        (w[2] * static_cast<float>(lower[c]) + w[3] * static_cast<float>(lower[next + c]));
    check += 0 * value;
    output[c] = static_cast<T>(value);
  }
  return check;
}

template <typename T>
MAFNET_KERNEL void forward_channels_last(const FlowWarpParams& p, const Plan& plan, const T* image,
                                         T* output, bool around_caches) {
  const int64_t next = p.input_stride[3], whole = p.channels / kLanes * kLanes;
  Vec check = broadcast(0);
  float check_rest = 0;
  for (int i = 0; i < plan.count; ++i) {
    const T* upper = image + plan.y.cell[i] * p.input_stride[2] + plan.x.cell[i] * next;
    const T* lower = upper + p.input_stride[2];
    T* target = output + i * p.output_stride[3];
    prefetch_cell(p, plan, i, image);
    const float w[4] = {
        plan.y.weight[0][i] * plan.x.weight[0][i], plan.y.weight[0][i] * plan.x.weight[1][i],
        plan.y.weight[1][i] * plan.x.weight[0][i], plan.y.weight[1][i] * plan.x.weight[1][i]};
    const Vec w0 = broadcast(w[0]), w1 = broadcast(w[1]);
    const Vec w2 = broadcast(w[2]), w3 = broadcast(w[3]);
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec value = w0 * load(upper + c) + w1 * load(upper + next + c) +
                        (w2 * load(lower + c) + w3 * load(lower + next + c));
      check += broadcast(0) * value;
      put(target + c, value, around_caches);
    }
    check_rest += blend_rest(upper, lower, next, w, whole, p.channels, target);
  }
  if (!(sum_of(check) + check_rest == 0)) {
    repair(p, plan, 0, plan.count, p.channels, image, output);
  };
}

// Of `count` pixels: from the plan's element `begin` to the mask's element `first` on.
template <typename T>
MAFNET_KERNEL void write_mask(const FlowWarpParams& p, const Plan& plan, int begin, int count,
                              int64_t first) {
  T* mask = static_cast<T*>(p.mask) + first;
  const float last_x = static_cast<float>(p.width - 1), last_y = static_cast<float>(p.height - 1);
  for (int i = 0; i < count; ++i) {
    const float x = plan.x.position[begin + i], y = plan.y.position[begin + i];
    mask[i] = static_cast<T>(x >= 0 && x <= last_x && y >= 0 && y <= last_y ? 1.0f : 0.0f);
  }
}

// In an image-sized array of all images.
int64_t first_pixel(const FlowWarpParams& p, const PixelSpan& span) {
  return span.n * p.out_height * static_cast<int64_t>(p.out_width) + span.first;
}

template <typename T>
MAFNET_KERNEL void forward_span(const FlowWarpParams& p, const PixelSpan& span,
                                bool around_caches) {
  Plan plan;
  plan_span(p, span, plan);
  if (p.mask != nullptr) write_mask<T>(p, plan, 0, span.count, first_pixel(p, span));
  const T* image = static_cast<const T*>(p.input) + span.n * p.input_stride[0];
  T* output =
      static_cast<T*>(p.output) + span.n * p.output_stride[0] + span.first * p.output_stride[3];
  forward_channels_last(p, plan, image, output, around_caches);
}

void forward(const FlowWarpParams& p, const PixelSpan& span, bool around_caches) {
  dispatch_type(p.dtype, [&](auto type) {
    forward_span<typename decltype(type)::type>(p, span, around_caches);
  });
}

}  // namespace
}  // namespace mafnet
