// The bilinear kernels of flow_warp for AVX2 with FMA and F16C: 8 lanes.
#if defined(__x86_64__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/simd.h"

#define MAFNET_KERNEL MAFNET_TARGET_AVX2

namespace mafnet {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

using Vec = __m256;
constexpr int kLanes = 8;

#define MAFNET_LANES MAFNET_KERNEL MAFNET_INLINE

MAFNET_LANES Vec broadcast(float v) { return _mm256_set1_ps(v); }
MAFNET_LANES float sum_of(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

MAFNET_LANES Vec widen_half(__m128i bits) { return _mm256_cvtph_ps(bits); }
MAFNET_LANES Vec widen_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
MAFNET_LANES __m128i narrow_half(Vec v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// The low 16 bits of 32.
MAFNET_LANES __m128i narrow_bits(__m256i bits) {
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
// To the nearest, ties to even; NaN stays NaN.
MAFNET_LANES __m128i narrow_bfloat16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  return narrow_bits(_mm256_srli_epi32(kept, 16));
}

MAFNET_LANES __m128i load_bits(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
MAFNET_LANES void store_bits(void* p, __m128i bits) {
  _mm_storeu_si128(static_cast<__m128i*>(p), bits);
}
MAFNET_LANES void stream_bits(void* p, __m128i bits) {
  _mm_stream_si128(static_cast<__m128i*>(p), bits);
}

MAFNET_LANES Vec load(const float* p) { return _mm256_loadu_ps(p); }
MAFNET_LANES Vec load(const Half* p) { return widen_half(load_bits(p)); }
MAFNET_LANES Vec load(const BFloat16* p) { return widen_bfloat16(load_bits(p)); }

MAFNET_LANES void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
MAFNET_LANES void store(Half* p, Vec v) { store_bits(p, narrow_half(v)); }
MAFNET_LANES void store(BFloat16* p, Vec v) { store_bits(p, narrow_bfloat16(v)); }

MAFNET_LANES void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
MAFNET_LANES void stream(Half* p, Vec v) { stream_bits(p, narrow_half(v)); }
MAFNET_LANES void stream(BFloat16* p, Vec v) { stream_bits(p, narrow_bfloat16(v)); }

// {a[0], b[0], a[1], b[1], ...}, and what follows.
MAFNET_LANES Vec interleave_low(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
MAFNET_LANES Vec interleave_high(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

// Four pairs of neighbours; loads of 64 bits, as fast as a gather on Intel and faster on AMD.
MAFNET_LANES __m128 load_two(const float* plane, int first, int second) {
  const __m128d low = _mm_load_sd(reinterpret_cast<const double*>(plane + first));
  return _mm_castpd_ps(_mm_loadh_pd(low, reinterpret_cast<const double*>(plane + second)));
}
MAFNET_LANES Vec load_four(const float* plane, int a, int b, int c, int d) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(load_two(plane, a, b)), load_two(plane, c, d),
                              1);
}
// left = plane[offset], right = plane[offset + 1].
MAFNET_LANES void load_pairs(const float* plane, const int* offset, Vec& left, Vec& right) {
  // The shuffles work on halves of 128 bits: the order here makes them come out in sequence.
  const Vec even = load_four(plane, offset[0], offset[1], offset[4], offset[5]);
  const Vec odd = load_four(plane, offset[2], offset[3], offset[6], offset[7]);
  left = _mm256_shuffle_ps(even, odd, _MM_SHUFFLE(2, 0, 2, 0));
  right = _mm256_shuffle_ps(even, odd, _MM_SHUFFLE(3, 1, 3, 1));
}
MAFNET_LANES __m256i gather_pairs16(const void* plane, const int* offset) {
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset));
  return _mm256_i32gather_epi32(static_cast<const int*>(plane), index, 2);
}
MAFNET_LANES void load_pairs(const Half* plane, const int* offset, Vec& left, Vec& right) {
  const __m256i pairs = gather_pairs16(plane, offset);
  left = widen_half(narrow_bits(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff))));
  right = widen_half(narrow_bits(_mm256_srli_epi32(pairs, 16)));
}
MAFNET_LANES void load_pairs(const BFloat16* plane, const int* offset, Vec& left, Vec& right) {
  const __m256i pairs = gather_pairs16(plane, offset);
  left = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  right = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}

}  // namespace
}  // namespace mafnet

#include "flow_warp/cpu_bilinear_kernels.h"

namespace mafnet {

const BilinearKernels kBilinearAvx2 = kKernels;

}  // namespace mafnet

#endif
