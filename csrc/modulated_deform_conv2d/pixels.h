// Pixels between the layouts and dtypes of tensors and dense rows of channels in the accumulators'
// type.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "modulated_deform_conv2d/vectors.h"

namespace mafnet {

// Channels and pixels of a tile that is transposed in the first cache: 16 x 16 floats are 1 kB.
constexpr int kTile = 16;

// to[i * to_row + c] = from[i * from_row + c * from_channel] for count pixels i.
template <typename From, typename To>
MAFNET_INLINE void gather_pixels(const From* from, int64_t from_row, int64_t from_channel,
                                 int count, int channels, To* to, int64_t to_row) {
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
MAFNET_INLINE void scatter_pixels(const From* from, int64_t from_row, int count, int channels,
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

// Calls body(Type<T>{}) with the type of dtype, for accumulators A: double alone goes with double.
template <typename A, typename Body>
MAFNET_INLINE void with_dtype(Dtype dtype, const Body& body) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if constexpr (std::is_same_v<A, double>) {
    body(Type<double>{});
  } else if (dtype == Dtype::kFloat16) {
    body(Type<Half>{});
  } else if (dtype == Dtype::kBFloat16) {
    body(Type<BFloat16>{});
  } else {
    body(Type<float>{});
  }
}

}  // namespace mafnet
