// What the CPU kernels of spatial_gate share: its sigmoid, its weight, blocks of pixels.
#pragma once

#include <cmath>

#include "common/parallel.h"
#include "pyramid_spatial_attention/products.h"

namespace mafnet {

template <typename V>
struct BitsOf {
  typedef uint32_t type __attribute__((vector_size(sizeof(V))));
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};

constexpr int kBlock = 96;  // pixels whose rows of 64 channels fit the second cache several times

// factor / (1 + exp(-x)), V is float or a vector of floats. exp to 2 units in the last place: 2^n
// by the bits of a float, e^r by a polynomial on |r| <= ln(2) / 2 whose relative error is the
// least. From -89 on down 0, as exp is infinite there; exp is never below e^-87.
template <typename V>
MAFNET_INLINE V sigmoid(const V& x, float factor) {
  using Bits = typename BitsOf<V>::type;
  const V lowest = V{} - 89.0f, highest = V{} + 87.0f, one = V{} + 1.0f;
  const V minus = -smaller_of(larger_of(x, lowest), highest);  // NaN stays
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = minus * 1.44269504f + kMagic;
  const V n = shifted - kMagic;
  const V r = (minus - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  V sum = r * 0.008312501f + 0.04189033f;
  sum = sum * r + 0.16667116f;
  sum = sum * r + 0.4999923f;
  sum = sum * r + one;
  sum = sum * r + one;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  V scale;
  std::memcpy(&scale, &bits, sizeof(bits));
  return factor / (sum * scale + one);
}

template <typename V>
MAFNET_INLINE V sigmoid(const V& x, double factor) {
  if constexpr (std::is_same_v<V, double>) {
    return factor / (1 + std::exp(-x));
  } else {
    V result = x;
    for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) {
      result[i] = factor / (1 + std::exp(-x[i]));
    }
    return result;
  }
}

// The same for results of type T: to 13 bits where that is bfloat16 and there are instructions for
// the fraction and the whole part of an exponent of two, of which the latter saturates.
template <typename T, typename V, typename A>
MAFNET_INLINE V sigmoid_for(const V& x, A factor) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<V, VectorOf<float, 16>>) {
    const V exponent = x * -1.44269504f;
    V fraction, power, inverse;
    asm("vreduceps $9, %1, %0" : "=v"(fraction) : "v"(exponent));  // exponent - floor(exponent)
    V sum = fraction * 0.07705910f + 0.22765365f;
    sum = sum * fraction + 0.69511485f;
    sum = sum * fraction + 1.0f;
    asm("vscalefps %2, %1, %0" : "=v"(power) : "v"(sum), "v"(exponent));
    power += 1.0f;
    asm("vrcp14ps %1, %0" : "=v"(inverse) : "v"(power));
    return inverse * factor;
  }
#endif
  return sigmoid(x, factor);
}

// Where load_vectors puts an element of bfloat16 among its 32.
inline int even_odd_place(int c) { return c / 32 * 32 + c % 2 * 16 + c % 32 / 2; }

template <typename A>
struct Gate {
  // In the order of load_vectors, if told so, are the columns of the product and the biases.
  explicit Gate(const SpatialGateParams& p, bool even_odd = false)
      : row(padded_columns(p.channels)),
        scale(static_cast<A>(p.scale)),
        slope(static_cast<A>(p.negative_slope)),
        per_row(divide_up(p.width, kBlock)),
        product(p.channels, p.channels, p.dtype),
        bias(row) {
    const int channels = p.channels, together = even_odd ? 1 : channels;
    for (int c = 0; c < channels; c += together) {
      const int place = even_odd ? even_odd_place(c) : c;
      const int64_t first = int64_t{c} * channels;
      product.load({p.weight, p.dtype, first, 1, channels}, channels, together, 0, place);
      if (p.bias != nullptr) {
        gather_pixels({p.bias, p.dtype, c, 0, 1}, 1, together, bias.data() + place, 0);
      }
    }
    product.pack();
  }

  int row;
  A scale, slope;
  int64_t per_row;
  Product<A> product;  // transposed: mask -> feature
  Buffer<A> bias;
};

// One block: its masks and features, in rows.
template <typename A>
struct Block {
  explicit Block(const Gate<A>& gate)
      : size(static_cast<size_t>(padded_rows(kBlock)) * gate.row),
        masks(size),
        features(size + kRowPad),
        values(size),
        scratch(gate.product.scratch(kBlock), false) {}

  void start(const SpatialGateParams& p, const Gate<A>& gate, int64_t index) {
    x = static_cast<int>(index % gate.per_row) * kBlock;
    y = static_cast<int>(index / gate.per_row % p.height);
    n = index / gate.per_row / p.height;
    count = std::min(kBlock, p.width - x);
  }
  // What products and for_rows read, `columns` elements of each pixel: masks where they lie if that
  // is as T, else as rows.
  template <typename T>
  Row<T> read_mask(const SpatialGateParams& p, const Gate<A>& gate, int columns) {
    if constexpr (std::is_same_v<T, A>) {
      return rows_of(p.mask, n, y, x, count, p.width, p.channels, columns, masks.data(), gate.row);
    } else {
      return read<T>(p.mask, p, gate, masks);
    }
  }
  template <typename T>
  Row<T> read(const Source& image, const SpatialGateParams& p, const Gate<A>& gate,
              Buffer<A>& buffer) {
    return row_as<T>(image, n, y, x, count, p.channels, buffer.data(), gate.row);
  }

  size_t size;
  int64_t n = 0;
  int y = 0, x = 0, count = 0;
  Row<A> mask{nullptr, 0};
  Buffer<A> masks, features, values;  // features before their bias and activation
  Buffer<uint16_t> scratch;
};

// The forward pass with the products of a block beside the rest of the one before. False where
// there is no such kernel.
bool gate_forward_beside(const SpatialGateParams& params);

}  // namespace mafnet
