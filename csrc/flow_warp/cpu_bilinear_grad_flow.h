// The gradient of the flow, over the plan of cpu_bilinear_plan.h. See cpu_bilinear_kernels.h.
namespace mafnet {
namespace {

// The derivative of the blend, times grad_output, summed over the channels.

// One pixel, whose channels are at grad, again without the taps that have no part in it; its sums
// were not finite.
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
        dot += static_cast<float>(grad[c * p.grad_output_stride[1]]) *
               static_cast<float>(tap[c * p.input_stride[1]]);
      }
      grad_x += wy * sx * dot;
      grad_y += sy * wx * dot;
    }
  }
}

// A row of a block, whose first pixel is that of the plan's element `begin`.
template <typename T>
MAFNET_KERNEL void grad_flow_pixels(const FlowWarpParams& p, const Plan& plan, const int64_t* first,
                                    int begin, int count, const T* image, const T* grad,
                                    float* __restrict__ grad_x, float* __restrict__ grad_y) {
  const int64_t next = p.input_stride[3], below = p.input_stride[2];
  const int64_t whole = p.channels / kLanes * kLanes;
  for (int i = begin; i < begin + count; ++i, grad += p.grad_output_stride[3]) {
    const T *upper = image + first[i], *lower = upper + below;
    const T* later = image + first[std::min(i + kPixelsAhead, plan.count - 1)];
    Vec dot0 = broadcast(0), dot1 = dot0, dot2 = dot0, dot3 = dot0;
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec g = load(grad + c);
      dot0 += g * load(upper + c);
      dot1 += g * load(upper + next + c);
      dot2 += g * load(lower + c);
      dot3 += g * load(lower + next + c);
      prefetch_cell<kLanes* static_cast<int>(sizeof(T))>(later + c, next, below);
    }
    float dot[4] = {sum_of(dot0), sum_of(dot1), sum_of(dot2), sum_of(dot3)};
    for (int64_t c = whole; c < p.channels; ++c) {
      const float g = static_cast<float>(grad[c]);
      dot[0] += g * static_cast<float>(upper[c]);
      dot[1] += g * static_cast<float>(upper[next + c]);
      dot[2] += g * static_cast<float>(lower[c]);
      dot[3] += g * static_cast<float>(lower[next + c]);
    }
    const Axis &x = plan.x, &y = plan.y;
    grad_x[i] = y.weight[0][i] * (x.slope[0][i] * dot[0] + x.slope[1][i] * dot[1]) +
                y.weight[1][i] * (x.slope[0][i] * dot[2] + x.slope[1][i] * dot[3]);
    grad_y[i] = y.slope[0][i] * (x.weight[0][i] * dot[0] + x.weight[1][i] * dot[1]) +
                y.slope[1][i] * (x.weight[0][i] * dot[2] + x.weight[1][i] * dot[3]);
  }
}

// Of `count` pixels: from the plan's element `begin`, which grad belongs to, to the gradient's
// pixel `first` on.
template <typename T>
MAFNET_KERNEL void write_grad_flow(const FlowWarpParams& p, const Plan& plan, int begin, int count,
                                   const T* image, const T* grad, int64_t first, float* grad_x,
                                   float* grad_y) {
  dispatch_type(p.flow_dtype, [&](auto type) {
    using F = typename decltype(type)::type;
    F* target = static_cast<F*>(p.grad_flow) + 2 * first;
    for (int i = begin; i < begin + count; ++i, target += 2) {
      if (!std::isfinite(grad_x[i]) || !std::isfinite(grad_y[i])) {
        repair_grad_flow(p, plan, i, image, grad + (i - begin) * p.grad_output_stride[3], grad_x[i],
                         grad_y[i]);
      }
      target[0] = static_cast<F>(grad_x[i]);
      target[1] = static_cast<F>(grad_y[i]);
    }
  });
}

template <typename T>
MAFNET_KERNEL void grad_flow_pixels_of(const FlowWarpParams& p, const PixelBlock& block) {
  BlockPlan b;
  plan_block(p, block, true, b);
  int64_t first[kSpanStride];
  find_cells(p, b.plan, first);
  const T* image = static_cast<const T*>(p.input) + block.n * p.input_stride[0];
  const T* grad = static_cast<const T*>(p.grad_output) + block.n * p.grad_output_stride[0] +
                  block.y * p.grad_output_stride[2] + block.x * p.grad_output_stride[3];
  float grad_x[kSpanStride], grad_y[kSpanStride];
  for (int r = 0; r < block.rows; ++r, grad += p.grad_output_stride[2]) {
    const int begin = r * b.stride;
    grad_flow_pixels(p, b.plan, first, begin, block.columns, image, grad, grad_x, grad_y);
    write_grad_flow(p, b.plan, begin, block.columns, image, grad, first_pixel(p, block, r), grad_x,
                    grad_y);
  }
}

}  // namespace
}  // namespace mafnet
