// Planes: the forward and the gradient of the flow, over blocks of the output. See
// cpu_bilinear_kernels.h.
//
// kTileChannels planes at a time become pixels: the tiles of the image that a block reads are
// transposed in registers into a scratch that the L2 cache holds, pixels are blended there as in
// channels_last, and results are transposed back. What a block reads is found once for all
// channels. Where it lies too far apart, and for the channels that fill no tile, cells are gathered
// from the planes themselves.
namespace mafnet {
namespace {

// The tiles of the image that a block reads, and where its cells begin in the scratch, in pixels.
struct Reach {
  bool fits;
  int row, column;          // of the image, where the scratch begins
  int tiles;                // of a row of the scratch
  int count;                // of tiles that are read
  int tile[kScratchTiles];  // their places in the scratch
  int offset[kSpanStride];
};

MAFNET_KERNEL void find_reach(const Plan& plan, Reach& reach) {
  const auto [top, bottom] = std::minmax_element(plan.y.cell, plan.y.cell + plan.count);
  const auto [left, right] = std::minmax_element(plan.x.cell, plan.x.cell + plan.count);
  reach.row = *top;
  reach.column = *left / kTilePixels * kTilePixels;
  reach.tiles = (*right + 1 - reach.column) / kTilePixels + 1;
  const int64_t tiles = static_cast<int64_t>(*bottom + 2 - *top) * reach.tiles;
  reach.fits = tiles <= kScratchTiles;
  if (!reach.fits) return;
  uint8_t read[kScratchTiles] = {};
  for (int i = 0; i < plan.count; ++i) {
    const int row = plan.y.cell[i] - reach.row, column = plan.x.cell[i] - reach.column;
    uint8_t* first = read + row * reach.tiles + column / kTilePixels;
    uint8_t* last = read + row * reach.tiles + (column + 1) / kTilePixels;
    *first = *last = first[reach.tiles] = last[reach.tiles] = 1;
    reach.offset[i] = row * reach.tiles * kTilePixels + column;
  }
  reach.count = 0;
  for (int t = 0; t < tiles; ++t) {
    reach.tile[reach.count] = t;
    reach.count += read[t];
  }
}

// Turns kTileChannels planes of what a block reads into pixels.
template <typename T>
MAFNET_KERNEL void read_reach(const FlowWarpParams& p, const Reach& reach, const T* image,
                              float* scratch) {
  const auto column_of = [&](int tile) { return reach.column + tile % reach.tiles * kTilePixels; };
  const auto source_of = [&](int tile) {
    return image + (reach.row + tile / reach.tiles) * p.input_stride[2] + column_of(tile);
  };
  for (int k = 0; k < reach.count; ++k) {
    const int tile = reach.tile[k], later = reach.tile[std::min(k + kReachAhead, reach.count - 1)];
    read_tile(source_of(tile), p.input_stride[1], kTileChannels,
              std::min(kTilePixels, p.width - column_of(tile)), source_of(later),
              scratch + static_cast<int64_t>(tile) * kTilePixels * kTileChannels);
  }
}

// Where the cells begin in a plane.
MAFNET_KERNEL void find_offsets(const FlowWarpParams& p, const Plan& plan,
                                int* __restrict__ offset) {
  const int row = static_cast<int>(p.input_stride[2]);
  for (int i = 0; i < plan.count; ++i) offset[i] = plan.y.cell[i] * row + plan.x.cell[i];
}

// ---- forward

// kTileChannels planes of `count` pixels, the first one that of the plan's element `begin`.
template <typename T>
MAFNET_KERNEL void blend_tiles(const FlowWarpParams& p, const BlockPlan& b, const Reach& reach,
                               int begin, int count, const float* scratch, T* output,
                               bool around_caches, Vec& check) {
  const int64_t below = static_cast<int64_t>(reach.tiles) * kTilePixels * kTileChannels;
  for (int i = 0; i < count; i += kLanes) {
    float w[4][kLanes];
    cell_weights(b.plan, begin + i, w);
    const int lanes = std::min(kLanes, count - i);
    for (int64_t c = 0; c < kTileChannels; c += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) {
        const float* upper = scratch + reach.offset[begin + i + k] * kTileChannels + c;
        const float* lower = upper + below;
        v[k] =
            broadcast(w[0][k]) * load(upper) + broadcast(w[1][k]) * load(upper + kTileChannels) +
            (broadcast(w[2][k]) * load(lower) + broadcast(w[3][k]) * load(lower + kTileChannels));
        check += broadcast(0) * v[k];
      }
      transpose(v);
      T* target = output + c * p.output_stride[1] + i;
      if (lanes == kLanes) {
#pragma GCC unroll 16
        for (int u = 0; u < kLanes; ++u) put(target + u * p.output_stride[1], v[u], around_caches);
      } else {
        for (int u = 0; u < kLanes; ++u) store_first(target + u * p.output_stride[1], v[u], lanes);
      }
    }
  }
}

// A few planes likewise, by gathers; they share the reading of the plan.
template <typename T>
MAFNET_KERNEL void blend_gathered(const FlowWarpParams& p, const Plan& plan, const int* offset,
                                  int begin, int count, int64_t planes, const T* image, T* output,
                                  bool around_caches, Vec& check) {
  for (int i = 0; i < count; i += kLanes) {
    const Vec x0 = load(plan.x.weight[0] + begin + i), x1 = load(plan.x.weight[1] + begin + i);
    const Vec y0 = load(plan.y.weight[0] + begin + i), y1 = load(plan.y.weight[1] + begin + i);
    const int* cells = offset + begin + i;
    const int lanes = std::min(kLanes, count - i);
    for (int64_t u = 0; u < planes; ++u) {
      const T* plane = image + u * p.input_stride[1];
      T* target = output + u * p.output_stride[1] + i;
      const T* ahead = plane + kPlanes * p.input_stride[1] + cells[0];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + p.input_stride[2]);
      Vec left, right, lower_left, lower_right;
      load_pairs(plane, cells, left, right);
      load_pairs(plane + p.input_stride[2], cells, lower_left, lower_right);
      const Vec value = y0 * (x0 * left + x1 * right) + y1 * (x0 * lower_left + x1 * lower_right);
      check += broadcast(0) * value;
      if (lanes == kLanes) {
        put(target, value, around_caches);
      } else {
        store_first(target, value, lanes);
      }
    }
  }
}

// False, and nothing is done, where the block reads too much and may not gather.
template <typename T>
MAFNET_KERNEL bool blend_planes(const FlowWarpParams& p, const PixelBlock& block, bool gather,
                                float* scratch, bool around_caches) {
  BlockPlan b;
  plan_block(p, block, false, b);
  Reach reach;
  find_reach(b.plan, reach);
  if (!reach.fits && !gather) return false;
  const int64_t tiled = reach.fits ? p.channels / kTileChannels * kTileChannels : 0;
  const T* image = static_cast<const T*>(p.input) + block.n * p.input_stride[0];
  T* output = static_cast<T*>(p.output) + block.n * p.output_stride[0] +
              block.y * p.output_stride[2] + block.x;
  for (int64_t c = 0; c < tiled; c += kTileChannels) {
    const T* from = image + c * p.input_stride[1];
    read_reach(p, reach, from, scratch);
    for (int r = 0; r < block.rows; ++r) {
      T* to = output + c * p.output_stride[1] + r * p.output_stride[2];
      Vec check = broadcast(0);
      // So many planes at once have no room to wait for the rest of a line.
      blend_tiles(p, b, reach, r * b.stride, block.columns, scratch, to,
                  around_caches && kLanes * sizeof(T) == 64, check);
      if (!(sum_of(check) == 0)) {
        repair(p, b.plan, r * b.stride, block.columns, kTileChannels, from, to);
      }
    }
  }
  if (tiled < p.channels) find_offsets(p, b.plan, reach.offset);
  for (int64_t c = tiled; c < p.channels; c += kPlanes) {
    const T* from = image + c * p.input_stride[1];
    const int64_t planes = std::min(kPlanes, p.channels - c);
    for (int r = 0; r < block.rows; ++r) {
      T* to = output + c * p.output_stride[1] + r * p.output_stride[2];
      Vec check = broadcast(0);
      blend_gathered(p, b.plan, reach.offset, r * b.stride, block.columns, planes, from, to,
                     around_caches, check);
      if (!(sum_of(check) == 0)) {
        repair(p, b.plan, r * b.stride, block.columns, planes, from, to);
      }
    }
  }
  for (int r = 0; p.mask != nullptr && r < block.rows; ++r) {
    write_mask<T>(p, b.plan, r * b.stride, block.columns, first_pixel(p, block, r));
  }
  return true;
}

template <typename T>
MAFNET_KERNEL void forward_planes_of(const FlowWarpParams& p, const PixelBlock& block,
                                     float* scratch, bool around_caches) {
  if (blend_planes<T>(p, block, block.rows == 1, scratch, around_caches)) return;
  PixelBlock upper = block, lower = block;
  upper.rows /= 2;
  lower.y += upper.rows;
  lower.rows -= upper.rows;
  blend_planes<T>(p, upper, true, scratch, around_caches);
  blend_planes<T>(p, lower, true, scratch, around_caches);
}

// ---- grad_flow

// Element i becomes the sum of v[i].
MAFNET_KERNEL MAFNET_INLINE Vec sums_of(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      v[i] = interleave_low(v[i], v[i + half]) + interleave_high(v[i], v[i + half]);
    }
  }
  return v[0];
}

// Adds what kTileChannels planes contribute to `count` pixels of a row.
template <typename T>
MAFNET_KERNEL void add_grad_flow_tiles(const FlowWarpParams& p, const BlockPlan& b,
                                       const Reach& reach, int begin, int count,
                                       const float* scratch, const T* grad, float* grad_x,
                                       float* grad_y) {
  const Axis &x = b.plan.x, &y = b.plan.y;
  const int64_t below = static_cast<int64_t>(reach.tiles) * kTilePixels * kTileChannels;
  float pixels[kTilePixels * kTileChannels] = {};
  for (int first = 0; first < count; first += kTilePixels) {
    read_tile(grad + first, p.grad_output_stride[1], kTileChannels,
              std::min(kTilePixels, count - first), grad + first + kTilesAhead * kTilePixels,
              pixels);
    for (int j = 0; j < kTilePixels; j += kLanes) {
      const int i = begin + first + j;
      float by_x[4][kLanes], by_y[4][kLanes];
      for (int t = 0; t < 4; ++t) {
        store(by_x[t], load(y.weight[t / 2] + i) * load(x.slope[t % 2] + i));
        store(by_y[t], load(y.slope[t / 2] + i) * load(x.weight[t % 2] + i));
      }
      Vec sum_x = load(grad_x + i), sum_y = load(grad_y + i);
      for (int64_t c = 0; c < kTileChannels; c += kLanes) {
        Vec to_x[kLanes], to_y[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) {
          const float* upper = scratch + reach.offset[i + k] * kTileChannels + c;
          const Vec v0 = load(upper), v1 = load(upper + kTileChannels);
          const Vec v2 = load(upper + below), v3 = load(upper + below + kTileChannels);
          const Vec g = load(pixels + (j + k) * kTileChannels + c);
          to_x[k] = g * (broadcast(by_x[0][k]) * v0 + broadcast(by_x[1][k]) * v1 +
                         (broadcast(by_x[2][k]) * v2 + broadcast(by_x[3][k]) * v3));
          to_y[k] = g * (broadcast(by_y[0][k]) * v0 + broadcast(by_y[1][k]) * v1 +
                         (broadcast(by_y[2][k]) * v2 + broadcast(by_y[3][k]) * v3));
        }
        sum_x += sums_of(to_x);
        sum_y += sums_of(to_y);
      }
      store(grad_x + i, sum_x);
      store(grad_y + i, sum_y);
    }
  }
}

// The same of a few planes, by gathers.
template <typename T>
MAFNET_KERNEL void add_grad_flow_gathered(const FlowWarpParams& p, const Plan& plan,
                                          const int* offset, int begin, int count, int64_t planes,
                                          const T* image, const T* grad, float* grad_x,
                                          float* grad_y) {
  for (int i = begin; i < begin + count; i += kLanes) {
    const Vec x0 = load(plan.x.weight[0] + i), x1 = load(plan.x.weight[1] + i);
    const Vec y0 = load(plan.y.weight[0] + i), y1 = load(plan.y.weight[1] + i);
    const Vec slope_x0 = load(plan.x.slope[0] + i), slope_x1 = load(plan.x.slope[1] + i);
    const Vec slope_y0 = load(plan.y.slope[0] + i), slope_y1 = load(plan.y.slope[1] + i);
    const int lanes = std::min(kLanes, begin + count - i);
    Vec by_x = load(grad_x + i), by_y = load(grad_y + i);
    for (int64_t u = 0; u < planes; ++u) {
      const T* plane = image + u * p.input_stride[1];
      const T* g = grad + u * p.grad_output_stride[1] + i - begin;
      const T* ahead = plane + kPlanes * p.input_stride[1] + offset[i];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + p.input_stride[2]);
      Vec v0, v1, v2, v3;
      load_pairs(plane, offset + i, v0, v1);
      load_pairs(plane + p.input_stride[2], offset + i, v2, v3);
      const Vec gu = lanes == kLanes ? load(g) : load_first(g, lanes);
      by_x += gu * (y0 * (slope_x0 * v0 + slope_x1 * v1) + y1 * (slope_x0 * v2 + slope_x1 * v3));
      by_y += gu * (slope_y0 * (x0 * v0 + x1 * v1) + slope_y1 * (x0 * v2 + x1 * v3));
    }
    store(grad_x + i, by_x);
    store(grad_y + i, by_y);
  }
}

template <typename T>
MAFNET_KERNEL void grad_flow_planes_of(const FlowWarpParams& p, const PixelBlock& block,
                                       float* scratch) {
  BlockPlan b;
  plan_block(p, block, true, b);
  Reach reach;
  find_reach(b.plan, reach);
  const int64_t tiled = reach.fits ? p.channels / kTileChannels * kTileChannels : 0;
  const T* image = static_cast<const T*>(p.input) + block.n * p.input_stride[0];
  const T* grad = static_cast<const T*>(p.grad_output) + block.n * p.grad_output_stride[0] +
                  block.y * p.grad_output_stride[2] + block.x;
  float grad_x[kSpanStride], grad_y[kSpanStride];
  std::fill_n(grad_x, b.plan.count, 0.0f);
  std::fill_n(grad_y, b.plan.count, 0.0f);
  for (int64_t c = 0; c < tiled; c += kTileChannels) {
    read_reach(p, reach, image + c * p.input_stride[1], scratch);
    for (int r = 0; r < block.rows; ++r) {
      add_grad_flow_tiles(p, b, reach, r * b.stride, block.columns, scratch,
                          grad + c * p.grad_output_stride[1] + r * p.grad_output_stride[2], grad_x,
                          grad_y);
    }
  }
  if (tiled < p.channels) find_offsets(p, b.plan, reach.offset);
  for (int64_t c = tiled; c < p.channels; c += kPlanes) {
    for (int r = 0; r < block.rows; ++r) {
      add_grad_flow_gathered(p, b.plan, reach.offset, r * b.stride, block.columns,
                             std::min(kPlanes, p.channels - c), image + c * p.input_stride[1],
                             grad + c * p.grad_output_stride[1] + r * p.grad_output_stride[2],
                             grad_x, grad_y);
    }
  }
  for (int r = 0; r < block.rows; ++r) {
    write_grad_flow(p, b.plan, r * b.stride, block.columns, image,
                    grad + r * p.grad_output_stride[2], first_pixel(p, block, r), grad_x, grad_y);
  }
}

}  // namespace
}  // namespace mafnet
