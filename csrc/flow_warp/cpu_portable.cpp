// The bilinear kernels of flow_warp for any CPU: 4 lanes, which are SSE2 on x86-64, NEON on
// aarch64.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "common/simd.h"

#define MAFNET_KERNEL

namespace mafnet {
namespace {

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

MAFNET_INLINE Vec broadcast(float v) { return Vec{v, v, v, v}; }
MAFNET_INLINE float sum_of(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

MAFNET_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MAFNET_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Half and BFloat16, which convert one by one.
template <typename T>
MAFNET_INLINE Vec load(const T* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}
template <typename T>
MAFNET_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<T>(v[i]);
}

// There is no portable way around the caches.
template <typename T>
MAFNET_INLINE void stream(T* p, Vec v) {
  store(p, v);
}

// {a[0], b[0], a[1], b[1]}, and what follows.
MAFNET_INLINE Vec interleave_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
MAFNET_INLINE Vec interleave_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }

// left = plane[offset], right = plane[offset + 1].
template <typename T>
MAFNET_INLINE void load_pairs(const T* plane, const int* offset, Vec& left, Vec& right) {
  for (int i = 0; i < kLanes; ++i) {
    left[i] = static_cast<float>(plane[offset[i]]);
    right[i] = static_cast<float>(plane[offset[i] + 1]);
  }
}

}  // namespace
}  // namespace mafnet

#include "flow_warp/cpu_bilinear_kernels.h"

namespace mafnet {

const BilinearKernels kBilinearPortable = kKernels;

}  // namespace mafnet
