// The bilinear kernels of flow_warp for AVX-512: 16 lanes, cells of planes by gather instructions.
#if defined(__x86_64__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/simd.h"

// GCC 12 warns of its own headers, whose intrinsics begin from a register of any content.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define MAFNET_KERNEL MAFNET_TARGET_AVX512

namespace mafnet {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

using Vec = __m512;
constexpr int kLanes = 16;

#define MAFNET_LANES MAFNET_KERNEL MAFNET_INLINE

MAFNET_LANES Vec broadcast(float v) { return _mm512_set1_ps(v); }
MAFNET_LANES float sum_of(Vec v) { return _mm512_reduce_add_ps(v); }

MAFNET_LANES Vec widen_half(__m256i bits) { return _mm512_cvtph_ps(bits); }
MAFNET_LANES Vec widen_bfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MAFNET_LANES __m256i narrow_half(Vec v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// To the nearest, ties to even; NaN stays NaN.
MAFNET_LANES __m256i narrow_bfloat16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

MAFNET_LANES __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MAFNET_LANES void store_bits(void* p, __m256i bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
}
MAFNET_LANES void stream_bits(void* p, __m256i bits) {
  _mm256_stream_si256(static_cast<__m256i*>(p), bits);
}

MAFNET_LANES Vec load(const float* p) { return _mm512_loadu_ps(p); }
MAFNET_LANES Vec load(const Half* p) { return widen_half(load_bits(p)); }
MAFNET_LANES Vec load(const BFloat16* p) { return widen_bfloat16(load_bits(p)); }

MAFNET_LANES void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MAFNET_LANES void store(Half* p, Vec v) { store_bits(p, narrow_half(v)); }
MAFNET_LANES void store(BFloat16* p, Vec v) { store_bits(p, narrow_bfloat16(v)); }

MAFNET_LANES void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
MAFNET_LANES void stream(Half* p, Vec v) { stream_bits(p, narrow_half(v)); }
MAFNET_LANES void stream(BFloat16* p, Vec v) { stream_bits(p, narrow_bfloat16(v)); }

// {a[0], b[0], a[1], b[1], ...}, and what follows.
MAFNET_LANES Vec interleave_low(Vec a, Vec b) {
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_ps(a, order, b);
}
MAFNET_LANES Vec interleave_high(Vec a, Vec b) {
  const __m512i order =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return _mm512_permutex2var_ps(a, order, b);
}

// left = plane[offset], right = plane[offset + 1], by one 64-bit load per lane.
MAFNET_LANES void load_pairs(const float* plane, const int* offset, Vec& left, Vec& right) {
  const double* pairs = reinterpret_cast<const double*>(plane);
  const __m256i first = load_bits(offset), last = load_bits(offset + 8);
  const Vec low = _mm512_castpd_ps(_mm512_i32gather_pd(first, pairs, 4));
  const Vec high = _mm512_castpd_ps(_mm512_i32gather_pd(last, pairs, 4));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  left = _mm512_permutex2var_ps(low, even, high);
  right = _mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high);
}
MAFNET_LANES __m512i gather_pairs16(const void* plane, const int* offset) {
  return _mm512_i32gather_epi32(_mm512_loadu_si512(offset), plane, 2);
}
MAFNET_LANES void load_pairs(const Half* plane, const int* offset, Vec& left, Vec& right) {
  const __m512i pairs = gather_pairs16(plane, offset);
  left = widen_half(_mm512_cvtepi32_epi16(pairs));
  right = widen_half(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}
MAFNET_LANES void load_pairs(const BFloat16* plane, const int* offset, Vec& left, Vec& right) {
  const __m512i pairs = gather_pairs16(plane, offset);
  left = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  right = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

}  // namespace
}  // namespace mafnet

#include "flow_warp/cpu_bilinear_kernels.h"

namespace mafnet {

const BilinearKernels kBilinearAvx512 = kKernels;

}  // namespace mafnet

#endif
