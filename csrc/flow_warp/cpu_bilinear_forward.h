// The bilinear forward kernel, over the plan of cpu_bilinear_plan.h. See cpu_bilinear_kernels.h.
namespace mafnet {
namespace {

template <typename T>
MAFNET_KERNEL MAFNET_INLINE void put(T* output, Vec value, bool around_caches) {
  if (around_caches) {
    stream(output, value);
  } else {
    store(output, value);
  }
}

// Computes again what is not finite, without the taps of weight zero.
template <typename T>
void repair(const FlowWarpParams& p, const Plan& plan, int64_t channels, const T* image,
            T* output) {
  const int64_t *from = p.input_stride, *to = p.output_stride;
  for (int i = 0; i < plan.count; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      T& result = output[i * to[3] + c * to[1]];
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

// Fetches the right pixels of the cell a few pixels on; the left ones are those of the cell before.
template <typename T>
MAFNET_KERNEL MAFNET_INLINE void prefetch_cell(const FlowWarpParams& p, const Plan& plan, int i,
                                               const T* image) {
  const int later = std::min(i + kPixelsAhead, plan.count - 1);
  const T* upper =
      image + plan.y.cell[later] * p.input_stride[2] + (plan.x.cell[later] + 1) * p.input_stride[3];
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < p.channels; c += kLine) {
    __builtin_prefetch(upper + c);
    __builtin_prefetch(upper + p.input_stride[2] + c);
  }
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
  if (!(sum_of(check) + check_rest == 0)) repair(p, plan, p.channels, image, output);
}

// Stores the first lanes of a vector.
template <typename T>
MAFNET_KERNEL void store_first(T* output, Vec value, int lanes) {
  T all[kLanes];
  store(all, value);
  std::memcpy(output, all, static_cast<size_t>(lanes) * sizeof(T));
}

// Several planes at once share the reading of the plan.
template <typename T>
MAFNET_KERNEL void forward_planes(const FlowWarpParams& p, const Plan& plan, const int* offset,
                                  int64_t planes, const T* image, T* output, bool around_caches) {
  Vec check = broadcast(0);
  for (int i = 0; i < plan.count; i += kLanes) {
    const Vec x0 = load(plan.x.weight[0] + i), x1 = load(plan.x.weight[1] + i);
    const Vec y0 = load(plan.y.weight[0] + i), y1 = load(plan.y.weight[1] + i);
    const int lanes = std::min(kLanes, plan.count - i);
    for (int64_t u = 0; u < planes; ++u) {
      const T* plane = image + u * p.input_stride[1];
      T* target = output + u * p.output_stride[1] + i;
      const T* ahead = plane + kPlanes * p.input_stride[1] + offset[i];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + p.input_stride[2]);
      Vec a, b, c, d;
      load_pairs(plane, offset + i, a, b);
      load_pairs(plane + p.input_stride[2], offset + i, c, d);
      const Vec value = y0 * (x0 * a + x1 * b) + y1 * (x0 * c + x1 * d);
      check += broadcast(0) * value;
      if (lanes == kLanes) {
        put(target, value, around_caches);
      } else {
        store_first(target, value, lanes);
      }
    }
  }
  if (!(sum_of(check) == 0)) repair(p, plan, planes, image, output);
}

// Where the cells begin in a plane; whole vectors.
MAFNET_KERNEL void find_offsets(const FlowWarpParams& p, const Plan& plan,
                                int* __restrict__ offset) {
  const int row = static_cast<int>(p.input_stride[2]);
  const int whole = (plan.count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < whole; ++i) offset[i] = plan.y.cell[i] * row + plan.x.cell[i];
}

template <typename T>
MAFNET_KERNEL void write_mask(const FlowWarpParams& p, const PixelSpan& span, const Plan& plan) {
  T* mask = static_cast<T*>(p.mask) + span.n * p.out_height * static_cast<int64_t>(p.out_width) +
            span.first;
  const float last_x = static_cast<float>(p.width - 1), last_y = static_cast<float>(p.height - 1);
  for (int i = 0; i < span.count; ++i) {
    const float x = plan.x.position[i], y = plan.y.position[i];
    mask[i] = static_cast<T>(x >= 0 && x <= last_x && y >= 0 && y <= last_y ? 1.0f : 0.0f);
  }
}

template <typename T>
MAFNET_KERNEL void forward_span(const FlowWarpParams& p, const PixelSpan& span,
                                bool around_caches) {
  Plan plan;
  plan_span(p, span, plan);
  if (p.mask != nullptr) write_mask<T>(p, span, plan);
  const T* image = static_cast<const T*>(p.input) + span.n * p.input_stride[0];
  T* output =
      static_cast<T*>(p.output) + span.n * p.output_stride[0] + span.first * p.output_stride[3];
  if (p.channels_last) return forward_channels_last(p, plan, image, output, around_caches);
  int offset[kSpanStride];
  find_offsets(p, plan, offset);
  for (int64_t c = 0; c < p.channels; c += kPlanes) {
    forward_planes(p, plan, offset, std::min(kPlanes, p.channels - c),
                   image + c * p.input_stride[1], output + c * p.output_stride[1], around_caches);
  }
}

void forward(const FlowWarpParams& p, const PixelSpan& span, bool around_caches) {
  dispatch_type(p.dtype, [&](auto type) {
    forward_span<typename decltype(type)::type>(p, span, around_caches);
  });
}

}  // namespace
}  // namespace mafnet
