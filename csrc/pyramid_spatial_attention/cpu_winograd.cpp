#include "pyramid_spatial_attention/winograd.h"

namespace mafnet {
namespace {

template <typename L, typename Body>
MAFNET_INLINE void for_vectors(int count, const Body& body) {
  using V = VectorOf<float, L::kBytes / sizeof(float)>;
  for (int c = 0; c < count; c += L::kBytes / sizeof(float)) body(Type<V>{}, c);
}

template <typename V>
MAFNET_INLINE void transform_weight(const V (&g)[3], V (&u)[4]) {
  const V outer = g[0] + g[2];
  u[0] = g[0];
  u[1] = 0.5f * (outer + g[1]);
  u[2] = 0.5f * (outer - g[1]);
  u[3] = g[2];
}

template <typename V>
MAFNET_INLINE void transform_pixels(const V (&d)[4], V (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

template <typename V>
MAFNET_INLINE void transform_sums(const V (&m)[4], V (&s)[2]) {
  s[0] = m[0] + (m[1] + m[2]);
  s[1] = (m[1] - m[2]) - m[3];
}

// planes[4 * i + j] at tile t = the transform of pixels 2 t ... 2 t + 3 of the rows.
template <typename L>
MAFNET_INLINE void read_tiles(const float* const (&rows)[4], int tiles, int channels, float* planes,
                              size_t plane) {
  for (int t = 0; t < tiles; ++t) {
    for_channels<L, float>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      V along[4][4];  // [column][i]
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const int64_t at = (int64_t{2} * t + x) * channels + c;
        const V d[4] = {load<V>(rows[0] + at), load<V>(rows[1] + at), load<V>(rows[2] + at),
                        load<V>(rows[3] + at)};
        transform_pixels(d, along[x]);
      }
      float* to = planes + int64_t{t} * channels + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V d[4] = {along[0][i], along[1][i], along[2][i], along[3][i]};
        V v[4];
        transform_pixels(d, v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(to + (4 * i + j) * plane, v[j]);
      }
    });
  }
}

// The transposed transform of the products; whether all sums are finite.
template <typename L>
MAFNET_INLINE bool write_tiles(const float* planes, size_t plane, int tiles, int columns,
                               float* const (&sums)[2]) {
  VectorOf<float, L::kBytes / sizeof(float)> zero{};  // NaN after what is not finite
  for (int t = 0; t < tiles; ++t) {
    for_vectors<L>(columns, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      const float* from = planes + int64_t{t} * columns + c;
      V along[4][2];  // [j][row]
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V m[4] = {load<V>(from + j * plane), load<V>(from + (4 + j) * plane),
                        load<V>(from + (8 + j) * plane), load<V>(from + (12 + j) * plane)};
        transform_sums(m, along[j]);
      }
#pragma GCC unroll 2
      for (int row = 0; row < 2; ++row) {
        const V m[4] = {along[0][row], along[1][row], along[2][row], along[3][row]};
        V s[2];
        transform_sums(m, s);
        float* to = sums[row] + int64_t{2} * t * columns + c;
        store(to, s[0]);
        store(to + columns, s[1]);
        zero += 0.0f * s[0] + 0.0f * s[1];
      }
    });
  }
  return fold<float>(
             zero, [](const auto& a, const auto& b) MAFNET_INLINE_LAMBDA { return a + b; }) == 0.0f;
}

}  // namespace

void Winograd::load(const float* const (&taps)[9]) {
  const int size = channels_ * columns_;
  with_level<float>([&](auto level) MAFNET_INLINE_LAMBDA {
    for_vectors<decltype(level)>(size, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
      using V = typename decltype(type)::type;
      V along[3][4];  // [column][i]
      for (int x = 0; x < 3; ++x) {
        const V g[3] = {mafnet::load<V>(taps[x] + c), mafnet::load<V>(taps[3 + x] + c),
                        mafnet::load<V>(taps[6 + x] + c)};
        transform_weight(g, along[x]);
      }
      for (int i = 0; i < 4; ++i) {
        const V g[3] = {along[0][i], along[1][i], along[2][i]};
        V u[4];
        transform_weight(g, u);
        for (int j = 0; j < 4; ++j) store(weight_.data() + (4 * i + j) * int64_t{size} + c, u[j]);
      }
    });
  });
}

bool Winograd::sum(const float* const (&rows)[4], int tiles, float* const (&sums)[2],
                   float* scratch) const {
  const size_t in = plane(tiles, channels_), out = plane(tiles, columns_);
  float* products = scratch + 16 * in;
  with_level<float>([&](auto level) MAFNET_INLINE_LAMBDA {
    read_tiles<decltype(level)>(rows, tiles, channels_, scratch, in);
  });
  for (int i = 0; i < 16; ++i) {
    const float* weight = weight_.data() + int64_t{i} * channels_ * columns_;
    multiply(Matrix<float>{scratch + i * in, channels_, 1}, weight, columns_, tiles, channels_,
             columns_, products + i * out, columns_, false);
  }
  bool finite = true;
  with_level<float>([&](auto level) MAFNET_INLINE_LAMBDA {
    finite = write_tiles<decltype(level)>(products, out, tiles, columns_, sums);
  });
  return finite;
}

}  // namespace mafnet
