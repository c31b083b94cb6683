// Vectors of floats and doubles from elements as tensors store them, and back: bfloat16 without a
// row of floats in between.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "common/vectors.h"

namespace mafnet {

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

template <typename V, typename A>
MAFNET_INLINE void store_stored(A* p, const V& v) {
  store<V>(p, v);
}

// Rounds to the nearest, ties to even, as the scalar conversion does.
template <typename V>
MAFNET_INLINE void store_stored(torch::headeronly::BFloat16* p, const V& v) {
  if constexpr (std::is_same_v<V, float>) {
    *p = static_cast<torch::headeronly::BFloat16>(v);
  } else {
    constexpr int kLanes = sizeof(V) / sizeof(float);
    using Bits = VectorOf<uint32_t, kLanes>;
    const Bits bits = load<Bits>(&v), nan = Bits{} + 0x7fc0u;
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Bits kept = (v != v) ? nan : rounded;
    store(p, __builtin_convertvector(kept, VectorOf<uint16_t, kLanes>));
  }
}

}  // namespace mafnet
