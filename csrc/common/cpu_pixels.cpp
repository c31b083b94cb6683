// Pixels of modulated_deform_conv2d from tensors and into them.
#include <algorithm>

#include "common/pixels.h"
#include "common/vectors.h"

namespace mafnet {
namespace {

// Channels and pixels of a tile that is transposed in the first cache: 16 x 16 floats are 1 kB.
constexpr int kTile = 16;

// to[i * to_row + c] = from[i * from_row + c * from_channel] for count pixels i.
template <typename From, typename To>
MAFNET_INLINE void gather_typed(const From* from, int64_t from_row, int64_t from_channel, int count,
                                int channels, To* to, int64_t to_row) {
  if (from_channel == 1) {
    with_channels(channels, [&](auto constant) MAFNET_INLINE_LAMBDA {
      for (int i = 0; i < count; ++i) {
        for (int c = 0; c < constant; ++c) {
          to[i * to_row + c] = static_cast<To>(from[i * from_row + c]);
        }
      }
    });
    return;
  }
  for (int c0 = 0; c0 < channels; c0 += kTile) {
    const int c_count = std::min(kTile, channels - c0);
    for (int i0 = 0; i0 < count; i0 += kTile) {
      const int i_count = std::min(kTile, count - i0);
      const From* corner = from + i0 * from_row + c0 * from_channel;
      To tile[kTile][kTile];
      if (from_row == 1 && i_count == kTile) {
        for (int c = 0; c < c_count; ++c) {
          for (int i = 0; i < kTile; ++i) {
            tile[c][i] = static_cast<To>(corner[c * from_channel + i]);
          }
        }
      } else {
        for (int c = 0; c < c_count; ++c) {
          for (int i = 0; i < i_count; ++i) {
            tile[c][i] = static_cast<To>(corner[c * from_channel + i * from_row]);
          }
        }
      }
      To* out = to + i0 * to_row + c0;
      for (int i = 0; i < i_count; ++i) {
        for (int c = 0; c < c_count; ++c) out[i * to_row + c] = tile[c][i];
      }
    }
  }
}

// to[i * to_row + c * to_channel] = from[i * from_row + c] for count pixels i.
template <typename From, typename To>
MAFNET_INLINE void scatter_typed(const From* from, int64_t from_row, int count, int channels,
                                 To* to, int64_t to_row, int64_t to_channel) {
  if (to_channel == 1) {
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < channels; ++c) {
        to[i * to_row + c] = static_cast<To>(from[i * from_row + c]);
      }
    }
    return;
  }
  for (int i0 = 0; i0 < count; i0 += kTile) {
    const int i_count = std::min(kTile, count - i0);
    for (int c0 = 0; c0 < channels; c0 += kTile) {
      const int c_count = std::min(kTile, channels - c0);
      From tile[kTile][kTile];
      for (int i = 0; i < i_count; ++i) {
        for (int c = 0; c < c_count; ++c) tile[c][i] = from[(i0 + i) * from_row + c0 + c];
      }
      To* out = to + i0 * to_row + c0 * to_channel;
      if (to_row == 1 && i_count == kTile) {
        for (int c = 0; c < c_count; ++c) {
          for (int i = 0; i < kTile; ++i) out[c * to_channel + i] = static_cast<To>(tile[c][i]);
        }
      } else {
        for (int c = 0; c < c_count; ++c) {
          for (int i = 0; i < i_count; ++i) {
            out[c * to_channel + i * to_row] = static_cast<To>(tile[c][i]);
          }
        }
      }
    }
  }
}

}  // namespace

template <typename A>
void gather_pixels(const Elements<const void*>& from, int count, int channels, A* to,
                   int64_t to_row) {
  with_dtype<A>(from.dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(from.data) + from.first;
    with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
      gather_typed(data, from.pixel_stride, from.channel_stride, count, channels, to, to_row);
    });
  });
}

template <typename A>
void scatter_pixels(const A* from, int64_t from_row, int count, int channels,
                    const Elements<void*>& to) {
  with_dtype<A>(to.dtype, [&](auto type) {
    auto* data = static_cast<typename decltype(type)::type*>(to.data) + to.first;
    with_level<A>([&](auto) MAFNET_INLINE_LAMBDA {
      scatter_typed(from, from_row, count, channels, data, to.pixel_stride, to.channel_stride);
    });
  });
}

template void gather_pixels(const Elements<const void*>&, int, int, float*, int64_t);
template void gather_pixels(const Elements<const void*>&, int, int, double*, int64_t);
template void scatter_pixels(const float*, int64_t, int, int, const Elements<void*>&);
template void scatter_pixels(const double*, int64_t, int, int, const Elements<void*>&);

}  // namespace mafnet
