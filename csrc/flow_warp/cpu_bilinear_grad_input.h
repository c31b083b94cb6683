// The gradient of the input, over the plan of cpu_bilinear_plan.h. See cpu_bilinear_kernels.h.
//
// channels_last: every pixel of grad_output adds its channels to the four pixels of its cell, where
// they lie. Planes: the same, kTileChannels at a time, in a buffer of pixels that the L2 cache
// holds, into which tiles of grad_output are transposed and out of which the planes are. The tiles
// that reach a band, and their weights, are found once for all its channels.
namespace mafnet {
namespace {

MAFNET_KERNEL RowRange row_range(const FlowWarpParams& p, int64_t n, int y) {
  Axis axis;
  RowRange range{p.height, -1};
  for (int x = 0; x < p.out_width; x += kSpan) {
    const PixelSpan span{n, static_cast<int64_t>(y) * p.out_width + x,
                         std::min(kSpan, p.out_width - x)};
    plan_axis_of_span(p, span, 1, false, axis);
    for (int i = 0; i < span.count; ++i) {
      range.first = std::min(range.first, axis.cell[i]);
      range.last = std::max(range.last, axis.cell[i] + 1);
    }
  }
  return range;
}

// Calls body(span, y, x) for the rows of the output that reach the band, in raster order.
template <typename Body>
MAFNET_INLINE void for_each_span_of_band(const FlowWarpParams& p, const RowRange* ranges,
                                         const Band& band, const Body& body) {
  for (int y = 0; y < p.out_height; ++y) {
    if (ranges[y].last < band.first_row || ranges[y].first > band.last_row) continue;
    for (int x = 0; x < p.out_width; x += kSpan) {
      body(PixelSpan{band.n, static_cast<int64_t>(y) * p.out_width + x,
                     std::min(kSpan, p.out_width - x)},
           y, x);
    }
  }
}

// ---- channels_last

// Where a band is summed: sum[row][column][channel], `channels` floats per pixel.
struct Sums {
  float* sum;
  int first_row, last_row;
  int64_t width, channels;
};

// Adds the pixels of the plan; pixel i has its channels at grad + i * stride.
template <typename T>
MAFNET_KERNEL void scatter(const Plan& plan, const T* grad, int64_t stride, const Sums& band) {
  const int64_t whole = band.channels / kLanes * kLanes;
  for (int i = 0; i < plan.count; ++i) {
    const T* g = grad + i * stride;
    for (int j = 0; j < 2; ++j) {
      const int row = plan.y.cell[i] + j;
      if (row < band.first_row || row > band.last_row) continue;
      for (int k = 0; k < 2; ++k) {
        const float w = plan.y.weight[j][i] * plan.x.weight[k][i];
        if (!(std::fabs(w) > 0)) continue;  // zero, or NaN
        float* sum =
            band.sum + ((row - band.first_row) * band.width + plan.x.cell[i] + k) * band.channels;
        const Vec weight = broadcast(w);
        for (int64_t c = 0; c < whole; c += kLanes) {
          store(sum + c, load(sum + c) + weight * load(g + c));
        }
        for (int64_t c = whole; c < band.channels; ++c) sum[c] += w * static_cast<float>(g[c]);
      }
    }
  }
}

template <typename T>
MAFNET_KERNEL void grad_input_channels_last(const FlowWarpParams& p, const RowRange* ranges,
                                            const Band& band, float* buffer) {
  T* target = static_cast<T*>(p.grad_input) + band.n * p.grad_input_stride[0] +
              band.first_row * p.grad_input_stride[2];
  const T* grad = static_cast<const T*>(p.grad_output) + band.n * p.grad_output_stride[0];
  const bool in_place = std::is_same_v<T, float>;
  const int64_t elements = band.pixels(p) * p.channels;
  const Sums sums{in_place ? reinterpret_cast<float*>(target) : buffer, band.first_row,
                  band.last_row, p.width, p.channels};
  std::fill_n(sums.sum, elements, 0.0f);
  Plan plan;
  for_each_span_of_band(p, ranges, band, [&](const PixelSpan& span, int y, int x) {
    plan_span(p, span, false, plan);
    scatter(plan, grad + y * p.grad_output_stride[2] + x * p.grad_output_stride[3],
            p.grad_output_stride[3], sums);
  });
  if (in_place) return;
  const int64_t whole = elements / kLanes * kLanes;
  for (int64_t e = 0; e < whole; e += kLanes) store(target + e, load(buffer + e));
  for (int64_t e = whole; e < elements; ++e) target[e] = static_cast<T>(buffer[e]);
}

// ---- planes

// Pixel i of the tile belongs to a pixel of the plan; false if none of them reaches the band.
MAFNET_KERNEL bool fill_tile(const Plan& plan, int begin, int width, const Band& band, Tile& tile) {
  float any = 0, all = 1;
  for (int i = 0; i < kTilePixels; ++i) {
    const int row = plan.y.cell[begin + i] - band.first_row;
    const int rows = i < tile.count ? band.last_row - band.first_row + 1 : 0;
    tile.cell[i] = row * width + plan.x.cell[begin + i];
    const float upper = row >= 0 && row < rows ? plan.y.weight[0][begin + i] : 0;
    const float lower = row >= -1 && row + 1 < rows ? plan.y.weight[1][begin + i] : 0;
    for (int t = 0; t < 4; ++t) {
      const float w = (t < 2 ? upper : lower) * plan.x.weight[t % 2][begin + i];
      const bool used = std::fabs(w) > 0;  // neither zero nor NaN
      tile.weight[t][i] = used ? w : 0;
      any = used ? 1 : any;
      all = used ? all : 0;
    }
  }
  tile.full = all != 0;
  return any != 0;
}

MAFNET_KERNEL void find_tiles(const FlowWarpParams& p, const RowRange* ranges, const Band& band,
                              std::vector<Tile>& tiles) {
  tiles.clear();
  Plan plan;
  Tile tile;
  for_each_span_of_band(p, ranges, band, [&](const PixelSpan& span, int y, int x) {
    plan_span(p, span, false, plan);
    for (int i = 0; i < span.count; i += kTilePixels) {
      tile.y = y;
      tile.x = x + i;
      tile.count = std::min(kTilePixels, span.count - i);
      if (fill_tile(plan, i, p.width, band, tile)) tiles.push_back(tile);
    }
  });
}

MAFNET_KERNEL MAFNET_INLINE void add_pixel(float* sum, float weight, const float* pixel) {
  for (int64_t c = 0; c < kTileChannels; c += kLanes) {
    store(sum + c, load(sum + c) + broadcast(weight) * load(pixel + c));
  }
}

MAFNET_KERNEL void scatter_tile(const Tile& tile, int64_t width, const float* pixels, float* sums) {
  const int64_t next = kTileChannels, below = width * kTileChannels;
  for (int i = 0; i < tile.count; ++i, pixels += kTileChannels) {
    float* sum = sums + tile.cell[i] * next;
    const float w[4] = {tile.weight[0][i], tile.weight[1][i], tile.weight[2][i], tile.weight[3][i]};
    if (tile.full) {
      add_pixel(sum, w[0], pixels);
      add_pixel(sum + next, w[1], pixels);
      add_pixel(sum + below, w[2], pixels);
      add_pixel(sum + below + next, w[3], pixels);
    } else {
      if (w[0] != 0) add_pixel(sum, w[0], pixels);
      if (w[1] != 0) add_pixel(sum + next, w[1], pixels);
      if (w[2] != 0) add_pixel(sum + below, w[2], pixels);
      if (w[3] != 0) add_pixel(sum + below + next, w[3], pixels);
    }
  }
}

template <typename T>
MAFNET_KERNEL void write_planes(const float* sums, int64_t pixels, int64_t channels, int64_t plane,
                                bool around_caches, T* target) {
  // So many planes at once have no room to wait for the rest of a line.
  constexpr bool whole_lines = kLanes * sizeof(T) == 64;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int planes = static_cast<int>(std::min<int64_t>(kLanes, channels - c));
    for (int64_t i = 0; i < pixels; i += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) v[k] = load(sums + (i + k) * kTileChannels + c);
      transpose(v);
      T* to = target + c * plane + i;
      if (planes == kLanes && i + kLanes <= pixels) {
#pragma GCC unroll 16
        for (int u = 0; u < kLanes; ++u) put(to + u * plane, v[u], around_caches && whole_lines);
      } else {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, pixels - i));
        for (int u = 0; u < planes; ++u) store_first(to + u * plane, v[u], lanes);
      }
    }
  }
}

template <typename T>
MAFNET_KERNEL void grad_input_planes(const FlowWarpParams& p, const std::vector<Tile>& tiles,
                                     const Band& band, float* sums, bool around_caches) {
  const T* grad = static_cast<const T*>(p.grad_output) + band.n * p.grad_output_stride[0] +
                  band.first_channel * p.grad_output_stride[1];
  std::fill_n(sums, band.pixels(p) * kTileChannels, 0.0f);
  float pixels[kTilePixels * kTileChannels];
  const auto source_of = [&](const Tile& tile) {
    return grad + tile.y * p.grad_output_stride[2] + tile.x * p.grad_output_stride[3];
  };
  const size_t count = tiles.size();
  for (size_t k = 0; k < count; ++k) {
    read_tile(source_of(tiles[k]), p.grad_output_stride[1], band.channels, tiles[k].count,
              source_of(tiles[std::min(k + kTilesAhead, count - 1)]), pixels);
    scatter_tile(tiles[k], p.width, pixels, sums);
  }
  T* target = static_cast<T*>(p.grad_input) + band.n * p.grad_input_stride[0] +
              band.first_channel * p.grad_input_stride[1] + band.first_row * p.grad_input_stride[2];
  write_planes(sums, band.pixels(p), band.channels, p.grad_input_stride[1], around_caches, target);
}

// ---- entries

void grad_input_pixels(const FlowWarpParams& p, const RowRange* ranges, const Band& band,
                       float* buffer) {
  dispatch_type(p.dtype, [&](auto type) {
    grad_input_channels_last<typename decltype(type)::type>(p, ranges, band, buffer);
  });
}

void grad_input_tiles(const FlowWarpParams& p, const std::vector<Tile>& tiles, const Band& band,
                      float* buffer, bool around_caches) {
  dispatch_type(p.dtype, [&](auto type) {
    grad_input_planes<typename decltype(type)::type>(p, tiles, band, buffer, around_caches);
  });
}

}  // namespace
}  // namespace mafnet
