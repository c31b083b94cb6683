// The gradients of the bilinear kernel, over the plan of cpu_bilinear_plan.h. See
// cpu_bilinear_kernels.h.
namespace mafnet {
namespace {

// ---- grad_flow: the derivative of the blend, times grad_output, summed over the channels

// One pixel again without the taps that have no part in it; its sums were not finite.
template <typename T>
void repair_grad_flow(const FlowWarpParams& p, const Plan& plan, int i, const T* image,
                      const T* grad, float& grad_x, float& grad_y) {
  grad_x = grad_y = 0;
  for (int j = 0; j < 2; ++j) {
    for (int k = 0; k < 2; ++k) {
      const float wx = plan.x.weight[k][i], wy = plan.y.weight[j][i];
      const float sx = plan.x.slope[k][i], sy = plan.y.slope[j][i];
      if ((wx == 0 && sx == 0) || (wy == 0 && sy == 0)) continue;
      const T* tap = image + (plan.y.cell[i] + j) * p.input_stride[2] +
                     (plan.x.cell[i] + k) * p.input_stride[3];
      float dot = 0;
      for (int64_t c = 0; c < p.channels; ++c) {
        dot += static_cast<float>(grad[i * p.grad_output_stride[3] + c * p.grad_output_stride[1]]) *
               static_cast<float>(tap[c * p.input_stride[1]]);
      }
      grad_x += wy * sx * dot;
      grad_y += sy * wx * dot;
    }
  }
}

template <typename T>
MAFNET_KERNEL void grad_flow_channels_last(const FlowWarpParams& p, const Plan& plan,
                                           const T* image, const T* grad,
                                           float* __restrict__ grad_x, float* __restrict__ grad_y) {
  const int64_t next = p.input_stride[3], whole = p.channels / kLanes * kLanes;
  for (int i = 0; i < plan.count; ++i) {
    const T* upper = image + plan.y.cell[i] * p.input_stride[2] + plan.x.cell[i] * next;
    const T* lower = upper + p.input_stride[2];
    const T* g = grad + i * p.grad_output_stride[3];
    prefetch_cell(p, plan, i, image);
    Vec dot0 = broadcast(0), dot1 = dot0, dot2 = dot0, dot3 = dot0;
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec gc = load(g + c);
      dot0 += gc * load(upper + c);
      dot1 += gc * load(upper + next + c);
      dot2 += gc * load(lower + c);
      dot3 += gc * load(lower + next + c);
    }
    float dot[4] = {sum_of(dot0), sum_of(dot1), sum_of(dot2), sum_of(dot3)};
    for (int64_t c = whole; c < p.channels; ++c) {
      const float gc = static_cast<float>(g[c]);
      dot[0] += gc * static_cast<float>(upper[c]);
      dot[1] += gc * static_cast<float>(upper[next + c]);
      dot[2] += gc * static_cast<float>(lower[c]);
      dot[3] += gc * static_cast<float>(lower[next + c]);
    }
    const Axis &x = plan.x, &y = plan.y;
    grad_x[i] = y.weight[0][i] * (x.slope[0][i] * dot[0] + x.slope[1][i] * dot[1]) +
                y.weight[1][i] * (x.slope[0][i] * dot[2] + x.slope[1][i] * dot[3]);
    grad_y[i] = y.slope[0][i] * (x.weight[0][i] * dot[0] + x.weight[1][i] * dot[1]) +
                y.slope[1][i] * (x.weight[0][i] * dot[2] + x.weight[1][i] * dot[3]);
  }
}

template <typename T>
MAFNET_KERNEL Vec load_first(const T* p, int lanes) {
  T all[kLanes] = {};
  std::memcpy(static_cast<void*>(all), p, static_cast<size_t>(lanes) * sizeof(T));
  return load(all);
}

// Adds what several channels contribute.
template <typename T>
MAFNET_KERNEL void add_grad_flow_planes(const FlowWarpParams& p, const Plan& plan,
                                        const int* offset, int64_t planes, const T* image,
                                        const T* grad, float* __restrict__ grad_x,
                                        float* __restrict__ grad_y) {
  for (int i = 0; i < plan.count; i += kLanes) {
    const Vec x0 = load(plan.x.weight[0] + i), x1 = load(plan.x.weight[1] + i);
    const Vec y0 = load(plan.y.weight[0] + i), y1 = load(plan.y.weight[1] + i);
    const Vec slope_x0 = load(plan.x.slope[0] + i), slope_x1 = load(plan.x.slope[1] + i);
    const Vec slope_y0 = load(plan.y.slope[0] + i), slope_y1 = load(plan.y.slope[1] + i);
    const int lanes = std::min(kLanes, plan.count - i);
    Vec by_x = load(grad_x + i), by_y = load(grad_y + i);
    for (int64_t u = 0; u < planes; ++u) {
      const T* plane = image + u * p.input_stride[1];
      const T* g = grad + u * p.grad_output_stride[1] + i;
      const T* ahead = plane + kPlanes * p.input_stride[1] + offset[i];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + p.input_stride[2]);
      Vec a, b, c, d;
      load_pairs(plane, offset + i, a, b);
      load_pairs(plane + p.input_stride[2], offset + i, c, d);
      const Vec gu = lanes == kLanes ? load(g) : load_first(g, lanes);
      by_x += gu * (y0 * (slope_x0 * a + slope_x1 * b) + y1 * (slope_x0 * c + slope_x1 * d));
      by_y += gu * (slope_y0 * (x0 * a + x1 * b) + slope_y1 * (x0 * c + x1 * d));
    }
    store(grad_x + i, by_x);
    store(grad_y + i, by_y);
  }
}

template <typename T>
MAFNET_KERNEL void grad_flow_span(const FlowWarpParams& p, const PixelSpan& span) {
  Plan plan;
  plan_span(p, span, plan);
  const T* image = static_cast<const T*>(p.input) + span.n * p.input_stride[0];
  const T* grad = static_cast<const T*>(p.grad_output) + span.n * p.grad_output_stride[0] +
                  span.first * p.grad_output_stride[3];
  float grad_x[kSpanStride], grad_y[kSpanStride];
  if (p.channels_last) {
    grad_flow_channels_last(p, plan, image, grad, grad_x, grad_y);
  } else {
    int offset[kSpanStride];
    find_offsets(p, plan, offset);
    std::fill_n(grad_x, plan.count + kLanes, 0.0f);
    std::fill_n(grad_y, plan.count + kLanes, 0.0f);
    for (int64_t c = 0; c < p.channels; c += kPlanes) {
      add_grad_flow_planes(p, plan, offset, std::min(kPlanes, p.channels - c),
                           image + c * p.input_stride[1], grad + c * p.grad_output_stride[1],
                           grad_x, grad_y);
    }
  }
  const int64_t pixel = span.n * p.out_height * static_cast<int64_t>(p.out_width) + span.first;
  dispatch_type(p.flow_dtype, [&](auto type) {
    using F = typename decltype(type)::type;
    F* target = static_cast<F*>(p.grad_flow) + 2 * pixel;
    for (int i = 0; i < plan.count; ++i) {
      if (!std::isfinite(grad_x[i]) || !std::isfinite(grad_y[i])) {
        repair_grad_flow(p, plan, i, image, grad, grad_x[i], grad_y[i]);
      }
      target[2 * i] = static_cast<F>(grad_x[i]);
      target[2 * i + 1] = static_cast<F>(grad_y[i]);
    }
  });
}

void grad_flow(const FlowWarpParams& p, const PixelSpan& span) {
  dispatch_type(p.dtype,
                [&](auto type) { grad_flow_span<typename decltype(type)::type>(p, span); });
}

// ---- grad_input

MAFNET_KERNEL RowRange row_range(const FlowWarpParams& p, int64_t n, int y) {
  Axis axis;
  RowRange range{p.height, -1};
  for (int x = 0; x < p.out_width; x += kSpan) {
    const PixelSpan span{n, static_cast<int64_t>(y) * p.out_width + x,
                         std::min(kSpan, p.out_width - x)};
    plan_axis_of_span(p, span, 1, axis);
    for (int i = 0; i < span.count; ++i) {
      range.first = std::min(range.first, axis.cell[i]);
      range.last = std::max(range.last, axis.cell[i] + 1);
    }
  }
  return range;
}

// Where a band is summed: sum[row][column][channel], `channels` floats per pixel.
struct Sums {
  float* sum;
  int first_row, last_row;
  int64_t width, channels;
};

// Adds pixels begin .. begin + count of the plan; pixel i has its channels at grad + i * stride.
template <typename T>
MAFNET_KERNEL void scatter(const Plan& plan, int begin, int count, const T* grad, int64_t stride,
                           const Sums& band) {
  const int64_t whole = band.channels / kLanes * kLanes;
  for (int i = 0; i < count; ++i) {
    const T* g = grad + i * stride;
    for (int j = 0; j < 2; ++j) {
      const int row = plan.y.cell[begin + i] + j;
      if (row < band.first_row || row > band.last_row) continue;
      for (int k = 0; k < 2; ++k) {
        const float w = plan.y.weight[j][begin + i] * plan.x.weight[k][begin + i];
        if (!(std::fabs(w) > 0)) continue;  // zero, or NaN
        float* sum = band.sum + ((row - band.first_row) * band.width + plan.x.cell[begin + i] + k) *
                                    band.channels;
        const Vec weight = broadcast(w);
        for (int64_t c = 0; c < whole; c += kLanes) {
          store(sum + c, load(sum + c) + weight * load(g + c));
        }
        for (int64_t c = whole; c < band.channels; ++c) sum[c] += w * static_cast<float>(g[c]);
      }
    }
  }
}

// tile[i][c] = plane c of grad at pixel i; the channels that are missing are zeros.
template <typename T>
MAFNET_KERNEL void transpose_tile(const T* grad, int64_t plane, int64_t channels, int count,
                                  float* __restrict__ tile) {
  if (channels < kTileChannels) std::fill_n(tile, count * kTileChannels, 0.0f);
  for (int64_t c = 0; c < channels; ++c) {
    const T* source = grad + c * plane;
    for (int i = 0; i < count; i += 16) {
      __builtin_prefetch(source + i +
                         kTilePixels);  // the next tile: so many streams, each so short
      const int end = std::min(i + 16, count);
      for (int k = i; k < end; ++k) tile[k * kTileChannels + c] = static_cast<float>(source[k]);
    }
  }
}

template <typename T>
MAFNET_KERNEL void scatter_rows(const FlowWarpParams& p, const RowRange* ranges, const Band& band,
                                const Sums& sums) {
  Plan plan;
  float tile[kTilePixels * kTileChannels];
  const T* grad = static_cast<const T*>(p.grad_output) + band.n * p.grad_output_stride[0] +
                  band.first_channel * p.grad_output_stride[1];
  for (int y = 0; y < p.out_height; ++y) {
    if (ranges[y].last < band.first_row || ranges[y].first > band.last_row) continue;
    for (int x = 0; x < p.out_width; x += kSpan) {
      const PixelSpan span{band.n, static_cast<int64_t>(y) * p.out_width + x,
                           std::min(kSpan, p.out_width - x)};
      plan_span(p, span, plan);
      const T* g = grad + y * p.grad_output_stride[2] + x * p.grad_output_stride[3];
      if (p.channels_last) {
        scatter(plan, 0, span.count, g, p.grad_output_stride[3], sums);
        continue;
      }
      for (int i = 0; i < span.count; i += kTilePixels) {
        const int count = std::min(kTilePixels, span.count - i);
        transpose_tile(g + i, p.grad_output_stride[1], band.channels, count, tile);
        scatter(plan, i, count, tile, kTileChannels, sums);
      }
    }
  }
}

template <typename T>
MAFNET_KERNEL void grad_input_band(const FlowWarpParams& p, const RowRange* ranges,
                                   const Band& band, float* buffer) {
  T* target = static_cast<T*>(p.grad_input) + band.n * p.grad_input_stride[0] +
              band.first_channel * p.grad_input_stride[1] + band.first_row * p.grad_input_stride[2];
  const bool in_place = p.channels_last && std::is_same_v<T, float>;
  const int64_t per_pixel = p.channels_last ? band.channels : kTileChannels;
  const int64_t pixels = static_cast<int64_t>(band.last_row - band.first_row + 1) * p.width;
  const Sums sums{in_place ? reinterpret_cast<float*>(target) : buffer, band.first_row,
                  band.last_row, p.width, per_pixel};
  std::fill_n(sums.sum, pixels * per_pixel, 0.0f);
  scatter_rows<T>(p, ranges, band, sums);
  if (in_place) return;
  if (p.channels_last) {
    const int64_t elements = pixels * per_pixel, whole = elements / kLanes * kLanes;
    for (int64_t e = 0; e < whole; e += kLanes) store(target + e, load(buffer + e));
    for (int64_t e = whole; e < elements; ++e) target[e] = static_cast<T>(buffer[e]);
    return;
  }
  for (int64_t c = 0; c < band.channels; ++c) {
    T* __restrict__ plane = target + c * p.grad_input_stride[1];
    for (int64_t i = 0; i < pixels; ++i) {
      plane[i] = static_cast<T>(buffer[i * kTileChannels + c]);
    }
  }
}

void grad_input(const FlowWarpParams& p, const RowRange* ranges, const Band& band, float* buffer) {
  dispatch_type(p.dtype, [&](auto type) {
    grad_input_band<typename decltype(type)::type>(p, ranges, band, buffer);
  });
}

}  // namespace
}  // namespace mafnet
