// From scores to weights, and to the gradient of the scores, in registers of 16 queries; what comes
// out are factors for the next product, see tiles.h.
#pragma once

#include "self_attention/tiles.h"

#if defined(MAFNET_HAS_BF16)

#include <immintrin.h>

#include <limits>

#include "common/simd.h"

// GCC 12 takes the undefined operands in its own headers for ours.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace mafnet {

// 2^x for x <= 127. For one piece within 3e-6, a part in 600 of its rounding, and 0 from -127 down.
// For more within 1 ulp, and 0 below -100, so that no piece of a weight is denormal.
template <int kPieces>
MAFNET_TARGET_BF16 inline __attribute__((always_inline)) __m512 power(__m512 x) {
  const __m512 unit = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: its last digit is the unit
  const __m512 least = _mm512_set1_ps(-127.0f);
  const __m512 clamped = _mm512_max_ps(least, x);  // the second where that is NaN
  const __m512 rounded = _mm512_add_ps(clamped, unit);
  const __m512 f = _mm512_sub_ps(clamped, _mm512_sub_ps(rounded, unit));
  __m512 y;
  if constexpr (kPieces == 1) {
    y = _mm512_set1_ps(9.582576341927052e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.590682849287987e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4024106562137604e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.931241154670715e-1f));
  } else {
    // Of the relative error on [-1/2, 1/2] the largest is 2e-9.
    y = _mm512_set1_ps(1.5403530393381609e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558146428443e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291076284772e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504108664821580e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022650695910072e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718055994531e-1f));
  }
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  // The digits above the exponent's are lost; -127 and 1 give 0. NaN stays: its last digits, which
  // alone are shifted there, are 0 in what comes of bfloat16, and it does not come here otherwise.
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
  y = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), exponent));
  if constexpr (kPieces == 1) return y;
  // NaN is not less.
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ), y);
}

// Takes the first 8 digits off x and returns them.
MAFNET_TARGET_BF16 inline __attribute__((always_inline)) __m512i next_piece(__m512& x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i piece = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(piece));
  return piece;
}

// A row of a tile of B from two tokens: pairs, the first in the lower halves.
template <int kPieces>
MAFNET_TARGET_BF16 inline __attribute__((always_inline)) void store_pairs(__m512 first,
                                                                          __m512 second,
                                                                          uint16_t* to,
                                                                          int64_t stride) {
  if constexpr (kPieces == 1) {
    const __m512i low = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(low, rounded));
  } else {
    for (int i = 0; i < kPieces; ++i) {
      const __m512i a = next_piece(first), b = next_piece(second);
      _mm512_storeu_si512(to + i * stride, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
    }
  }
}

// A row of a tile of A from two vectors of 16 tokens.
template <int kPieces>
MAFNET_TARGET_BF16 inline __attribute__((always_inline)) void store_row(__m512 first, __m512 second,
                                                                        uint16_t* to) {
  if constexpr (kPieces == 1) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  } else {
    const __m512i odd =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    for (int i = 0; i < kPieces; ++i) {
      const __m512i a = next_piece(first), b = next_piece(second);
      _mm512_storeu_si512(to + i * kTileFactors, _mm512_permutex2var_epi16(a, odd, b));
    }
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// Scores of 16 queries, a line for each of `keys` keys, and what was summed up for these queries
// before. The weights go to tiles of B over keys, from `to` on at `stride`.
struct WeightsOf {
  const float* score;
  int keys;
  float* out;
  int lines;
  float *largest, *sum;
  uint16_t* to;
  int64_t stride;
};

// The largest scores, two keys a step. A NaN is passed over: it comes through the weights.
class Largest {
 public:
  MAFNET_TARGET_BF16 MAFNET_INLINE void begin(const WeightsOf& of) {
    score_ = of.score;
    end_ = of.score + of.keys * kTile;
    most_[0] = most_[1] = _mm512_load_ps(of.largest);
  }
  MAFNET_INLINE bool more() const { return score_ != end_; }
  MAFNET_TARGET_BF16 MAFNET_INLINE void step() {
    most_[0] = _mm512_max_ps(_mm512_load_ps(score_), most_[0]);
    most_[1] = _mm512_max_ps(_mm512_load_ps(score_ + kTile), most_[1]);
    score_ += 2 * kTile;
  }
  MAFNET_TARGET_BF16 MAFNET_INLINE __m512 get() const { return _mm512_max_ps(most_[0], most_[1]); }

 private:
  const float *score_, *end_;
  __m512 most_[2];
};

// A score may exceed what counts as the largest by so many powers of two: weights of 2^8 are as
// good as those of 1, and the sums before need no other scale.
constexpr float kSlack = 8;

// Weights exp((score - largest) * scale), of two keys a step. `sum` grows by them; sum and out
// shrink where `largest` grows.
template <int kPieces>
class Weights {
 public:
  MAFNET_TARGET_BF16 MAFNET_INLINE void begin(const WeightsOf& of, __m512 now, float scale) {
    of_ = of;
    k_ = 0;
    factor_ = _mm512_set1_ps(scale * kLog2E);
    const __m512 before = _mm512_load_ps(of.largest);
    const __m512 rise = _mm512_mul_ps(_mm512_sub_ps(now, before), factor_);
    const bool grows = _mm512_cmp_ps_mask(rise, _mm512_set1_ps(kSlack), _CMP_GT_OQ) != 0;
    // Scores of -inf have the weight 0, also while there is no other.
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __m512 largest = grows ? now : before;
    base_ = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(largest, none, _CMP_NEQ_UQ), largest);
    sums_[0] = _mm512_load_ps(of.sum);
    sums_[1] = _mm512_setzero_ps();
    if (!grows) return;
    const __m512 shrink = power<kPieces>(_mm512_mul_ps(_mm512_sub_ps(before, base_), factor_));
    for (int d = 0; d < of.lines; ++d) {
      float* line = of.out + d * kTile;
      _mm512_store_ps(line, _mm512_mul_ps(_mm512_load_ps(line), shrink));
    }
    sums_[0] = _mm512_mul_ps(sums_[0], shrink);
    _mm512_store_ps(of.largest, now);
  }
  MAFNET_INLINE bool more() const { return k_ < of_.keys; }
  MAFNET_TARGET_BF16 MAFNET_INLINE void step() {
    __m512 weight[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512 score = _mm512_load_ps(of_.score + (k_ + i) * kTile);
      weight[i] = power<kPieces>(_mm512_mul_ps(_mm512_sub_ps(score, base_), factor_));
      sums_[i] = _mm512_add_ps(sums_[i], weight[i]);
    }
    uint16_t* row =
        of_.to + k_ / kTileDepth * kPieces * of_.stride + k_ % kTileDepth / 2 * kTileDepth;
    store_pairs<kPieces>(weight[0], weight[1], row, of_.stride);
    k_ += 2;
  }
  MAFNET_TARGET_BF16 MAFNET_INLINE void end() {
    _mm512_store_ps(of_.sum, _mm512_add_ps(sums_[0], sums_[1]));
  }

 private:
  WeightsOf of_;
  int k_;
  __m512 base_, factor_, sums_[2];
};

template <int kPieces>
MAFNET_TARGET_BF16 void take_weights(const WeightsOf& of, float scale) {
  Largest largest;
  for (largest.begin(of); largest.more();) largest.step();
  Weights<kPieces> weights;
  for (weights.begin(of, largest.get(), scale); weights.more();) weights.step();
  weights.end();
}

// Several of Largest or Weights, one after the other, beside a product.
template <typename Work, int kCount>
struct InTurn {
  Work work[kCount];
  int at = 0;
  MAFNET_TARGET_BF16 MAFNET_INLINE void step() {
    if (at == kCount) return;
    work[at].step();
    if (!work[at].more()) ++at;
  }
  MAFNET_TARGET_BF16 void rest() {
    while (at < kCount) step();
  }
};

// Scores and gradients of the weights of 32 queries, as lines of 16 for each key; the other half is
// `half` numbers further on.
struct GradientsOf {
  const float *score, *grad_weight;
  int64_t half;
  int keys;
  float scale;
  const float *lse, *delta;
};

// Weights exp(score * scale - lse) and gradients of the scores as rows of A over queries, at
// `stride` from 16 keys to the next; the latter also as tiles of B over keys, at `pair_stride`.
template <int kPieces>
MAFNET_TARGET_BF16 void take_gradients(const GradientsOf& of, uint16_t* weights, uint16_t* grads,
                                       int64_t stride, uint16_t* pairs, int64_t pair_stride) {
  const __m512 scale = _mm512_set1_ps(of.scale), log2e = _mm512_set1_ps(kLog2E);
  __m512 lse[2], delta[2];
  for (int n = 0; n < 2; ++n) {
    lse[n] = _mm512_loadu_ps(of.lse + n * kTile);
    delta[n] = _mm512_loadu_ps(of.delta + n * kTile);
  }
  for (int k = 0; k < of.keys; k += 2) {
    __m512 grad[2][2];
    for (int i = 0; i < 2; ++i) {
      __m512 weight[2];
      for (int n = 0; n < 2; ++n) {
        const int64_t at = n * of.half + (k + i) * kTile;
        const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(of.score + at), scale, lse[n]);
        weight[n] = power<kPieces>(_mm512_mul_ps(x, log2e));
        const __m512 slope = _mm512_sub_ps(_mm512_load_ps(of.grad_weight + at), delta[n]);
        grad[n][i] = _mm512_mul_ps(weight[n], slope);
      }
      const int64_t row = (k + i) / kTile * stride + (k + i) % kTile * kTileDepth;
      store_row<kPieces>(weight[0], weight[1], weights + row);
      store_row<kPieces>(grad[0][i], grad[1][i], grads + row);
    }
    uint16_t* line =
        pairs + k / kTileDepth * kPieces * pair_stride + k % kTileDepth / 2 * kTileDepth;
    for (int n = 0; n < 2; ++n) {
      store_pairs<kPieces>(grad[n][0], grad[n][1], line + n * kTileFactors, pair_stride);
    }
  }
}

}  // namespace mafnet

#endif
