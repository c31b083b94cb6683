// Vectors of floats and doubles from elements as tensors store them, and back: bfloat16 without a
// row of floats in between.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "common/vectors.h"

namespace mafnet {

template <typename V>
constexpr int kLanesOf = sizeof(V) / sizeof(decltype(V{}[0]));
template <>
inline constexpr int kLanesOf<float> = 1;
template <>
inline constexpr int kLanesOf<double> = 1;

template <typename V, typename A>
MAFNET_INLINE V load_stored(const A* p) {
  return load<V>(p);
}

template <typename V>
MAFNET_INLINE V load_stored(const torch::headeronly::BFloat16* p) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*p);
  } else {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = VectorOf<uint32_t, kLanes>;
    const Bits bits = __builtin_convertvector(load<VectorOf<uint16_t, kLanes>>(p), Bits) << 16;
    return load<V>(&bits);
  }
}

// Floats whose upper halves are their bits as bfloat16, rounded to the nearest, ties to even; what
// the lower halves hold does not matter.
template <typename Bits, typename V>
MAFNET_INLINE Bits rounded_bits(const V& v) {
  const Bits bits = load<Bits>(&v), nan = Bits{} + 0x7fc00000u;
  const Bits rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return (v != v) ? nan : rounded;
}

// A vector as elements of type T. Rounds to the nearest, ties to even, as the scalar conversion
// does.
template <typename T, typename V>
MAFNET_INLINE auto to_stored(const V& v) {
  if constexpr (!std::is_same_v<T, torch::headeronly::BFloat16>) {
    return v;
  } else if constexpr (std::is_same_v<V, float>) {
    return static_cast<T>(v);
  } else {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = VectorOf<uint32_t, kLanes>;
    return __builtin_convertvector(rounded_bits<Bits>(v) >> 16, VectorOf<uint16_t, kLanes>);
  }
}

template <typename V, typename T>
MAFNET_INLINE void store_stored(T* p, const V& v) {
  const auto elements = to_stored<T>(v);
  std::memcpy(static_cast<void*>(p), &elements, sizeof(elements));
}

// N vectors of neighbouring elements in an order that store_vectors undoes, for what is done to all
// elements alike: of bfloat16 those at even places and those at odd ones.
template <typename V, typename T, int N>
MAFNET_INLINE void load_vectors(const T* p, V (&vectors)[N]) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = VectorOf<uint32_t, kLanes>;
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 2) {
      const Bits both = load<Bits>(p + i * kLanes), even = both << 16, odd = both & 0xffff0000u;
      vectors[i] = load<V>(&even);
      vectors[i + 1] = load<V>(&odd);
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) vectors[i] = load_stored<V>(p + i * kLanesOf<V>);
  }
}

// The same around the caches, where that may be: p is aligned to the elements, and neighbours up to
// whole lines follow at once. Intrinsics cannot stand here, in what several levels inline.
template <typename V, typename T>
MAFNET_INLINE void store_around(T* p, const V& v) {
#if defined(__x86_64__)
  const auto elements = to_stored<T>(v);
  auto* to = reinterpret_cast<VectorOf<char, sizeof(elements)>*>(p);
  if constexpr (sizeof(elements) == 64) {
    asm volatile("vmovntps %1, %0" : "=m"(*to) : "v"(elements));
  } else if constexpr (sizeof(elements) == 32) {
    asm volatile("vmovntps %1, %0" : "=m"(*to) : "x"(elements));
  } else if constexpr (sizeof(elements) == 16) {
    asm volatile("movntps %1, %0" : "=m"(*to) : "x"(elements));
  } else {
    store_stored<V>(p, v);
  }
#else
  store_stored<V>(p, v);
#endif
}

// The two as arguments of loops.
struct Store {
  template <typename T, typename V>
  MAFNET_INLINE void operator()(T* p, const V& v) const {
    store_stored<V>(p, v);
  }
};
struct StoreAround {
  template <typename T, typename V>
  MAFNET_INLINE void operator()(T* p, const V& v) const {
    store_around<V>(p, v);
  }
};

template <typename Put = Store, typename V, typename T, int N>
MAFNET_INLINE void store_vectors(T* p, const V (&vectors)[N]) {
  const Put put;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = VectorOf<uint32_t, kLanes>;
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 2) {
      const Bits even = rounded_bits<Bits>(vectors[i]) >> 16;
      const Bits odd = rounded_bits<Bits>(vectors[i + 1]) & 0xffff0000u;
      put(reinterpret_cast<uint32_t*>(p + i * kLanes), Bits(even | odd));
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) put(p + i * kLanesOf<V>, vectors[i]);
  }
}

}  // namespace mafnet
