// The bilinear forward kernel of channels_last, over the plan of cpu_bilinear_plan.h. See
// cpu_bilinear_kernels.h.
//
// A pixel is a few lines of the caches, anywhere: all four pixels of a cell are fetched some cells
// ahead, those that the last cell had too, since under noise it had none of them.
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

// Where the cells of a channels_last image begin.
MAFNET_KERNEL void find_cells(const FlowWarpParams& p, const Plan& plan,
                              int64_t* __restrict__ first) {
  const int64_t below = p.input_stride[2], next = p.input_stride[3];
  for (int i = 0; i < plan.count; ++i) {
    first[i] = plan.y.cell[i] * below + plan.x.cell[i] * next;
  }
}

// Of the four pixels of a cell, for kLanes cells from element i of the plan on.
MAFNET_KERNEL MAFNET_INLINE void cell_weights(const Plan& plan, int i, float (&w)[4][kLanes]) {
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {
    store(w[t], load(plan.y.weight[t / 2] + i) * load(plan.x.weight[t % 2] + i));
  }
}

// Fetches kBytes of channels of the four pixels of a cell into the L2 cache.
template <int kBytes, typename T>
MAFNET_KERNEL MAFNET_INLINE void prefetch_cell(const T* cell, int64_t next, int64_t below) {
#pragma GCC unroll 4
  for (int64_t c = 0; c < kBytes / static_cast<int64_t>(sizeof(T)); c += 64 / sizeof(T)) {
    __builtin_prefetch(cell + c, 0, 2);
    __builtin_prefetch(cell + next + c, 0, 2);
    __builtin_prefetch(cell + below + c, 0, 2);
    __builtin_prefetch(cell + below + next + c, 0, 2);
  }
}

// Blends kVectors vectors of channels and fetches those of a later cell.
template <int kVectors, bool kStream, typename T>
MAFNET_KERNEL MAFNET_INLINE void blend_vectors(const T* cell, int64_t next, int64_t below,
                                               const Vec (&w)[4], const T* later, T* output,
                                               Vec& check) {
  const T* lower = cell + below;
  Vec sum;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = v * kLanes;
    const Vec value = w[0] * load(cell + c) + w[1] * load(cell + next + c) +
                      (w[2] * load(lower + c) + w[3] * load(lower + next + c));
    sum = v == 0 ? value : sum + value;
    put(output + c, value, kStream);
  }
  prefetch_cell<kVectors * kLanes* static_cast<int>(sizeof(T))>(later, next, below);
  check += broadcast(0) * sum;
}

// A row of a block, whose first pixel is that of the plan's element `begin`.
template <bool kStream, typename T>
MAFNET_KERNEL void blend_pixels(const FlowWarpParams& p, const Plan& plan, const int64_t* first,
                                int begin, int count, const T* image, T* output) {
  const int64_t next = p.input_stride[3], below = p.input_stride[2];
  const int64_t whole = p.channels / kLanes * kLanes;
  Vec check = broadcast(0);
  float check_rest = 0;
  for (int i = 0; i < count; i += kLanes) {
    float weights[4][kLanes];
    cell_weights(plan, begin + i, weights);
    const int lanes = std::min(kLanes, count - i);
    for (int k = 0; k < lanes; ++k) {
      const T* cell = image + first[begin + i + k];
      const T* later = image + first[std::min(begin + i + k + kPixelsAhead, plan.count - 1)];
      T* target = output + (i + k) * p.output_stride[3];
      const float w[4] = {weights[0][k], weights[1][k], weights[2][k], weights[3][k]};
      const Vec all[4] = {broadcast(w[0]), broadcast(w[1]), broadcast(w[2]), broadcast(w[3])};
      int64_t c = 0;
      for (; c + 4 * kLanes <= whole; c += 4 * kLanes) {
        blend_vectors<4, kStream>(cell + c, next, below, all, later + c, target + c, check);
      }
      for (; c < whole; c += kLanes) {
        blend_vectors<1, kStream>(cell + c, next, below, all, later + c, target + c, check);
      }
      if (whole < p.channels) {
        check_rest += blend_rest(cell, cell + below, next, w, whole, p.channels, target);
      }
    }
  }
  if (!(sum_of(check) + check_rest == 0)) {
    repair(p, plan, begin, count, p.channels, image, output);
  }
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

// Of a row of a block: in an image-sized array of all images.
int64_t first_pixel(const FlowWarpParams& p, const PixelBlock& block, int row) {
  return (block.n * p.out_height + block.y + row) * static_cast<int64_t>(p.out_width) + block.x;
}

template <typename T>
MAFNET_KERNEL void forward_pixels_of(const FlowWarpParams& p, const PixelBlock& block,
                                     bool around_caches) {
  BlockPlan b;
  plan_block(p, block, false, b);
  int64_t first[kSpanStride];
  find_cells(p, b.plan, first);
  const T* image = static_cast<const T*>(p.input) + block.n * p.input_stride[0];
  T* output = static_cast<T*>(p.output) + block.n * p.output_stride[0] +
              block.y * p.output_stride[2] + block.x * p.output_stride[3];
  for (int r = 0; r < block.rows; ++r, output += p.output_stride[2]) {
    const int begin = r * b.stride;
    if (p.mask != nullptr) {
      write_mask<T>(p, b.plan, begin, block.columns, first_pixel(p, block, r));
    }
    if (around_caches) {
      blend_pixels<true>(p, b.plan, first, begin, block.columns, image, output);
    } else {
      blend_pixels<false>(p, b.plan, first, begin, block.columns, image, output);
    }
  }
}

}  // namespace
}  // namespace mafnet
