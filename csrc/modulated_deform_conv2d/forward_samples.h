// Taking the samples of a block in the forward pass on the CPU: all at once, or one by one beside
// something else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/gemm_bf16.h"
#include "common/tiles.h"
#include "common/vectors.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {

// The samples of a chunk of a block: of each tap `channels` channels of `pixels` pixels, to
// columns[pixel][tap][channel], or to packed rows of bfloat16.
template <typename A, typename S>
struct Sampling {
  MAFNET_INLINE const S* corner(const Samples<A>& tap, int i) const {
    return window + tap.first + tap.row[i] * row_stride + tap.column[i] * column_stride;
  }

  const Samples<A>* taps;  // and one more, to look ahead into
  int count, pixels, channels;
  const S* window;
  int64_t row_stride, column_stride;
  S* columns;
  int64_t row;      // of columns, or the depth of packed rows
  PlaneLines next;  // of the sampling after this one
};

// One sample in A.
template <typename L, typename A, typename Channels>
MAFNET_INLINE void take_sample(const Sampling<A, A>& s, const Samples<A>& tap, int i,
                               Channels channels, A* to) {
  const A w0 = tap.weight[0][i], w1 = tap.weight[1][i];
  const A w2 = tap.weight[2][i], w3 = tap.weight[3][i];
  const A *top = s.corner(tap, i), *bottom = top + s.row_stride;
  const int64_t right = s.column_stride;
  for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    store<V>(to + c, w0 * load<V>(top + c) + w1 * load<V>(top + right + c) +
                         w2 * load<V>(bottom + c) + w3 * load<V>(bottom + right + c));
  });
}

#if defined(MAFNET_HAS_BF16)

// Some bfloat16 as floats: kLanes, or those of 16 that are wanted where it is 0.
template <int kLanes>
MAFNET_TARGET_BF16 MAFNET_INLINE auto load_bf16(const uint16_t* from,
                                                [[maybe_unused]] __mmask16 wanted) {
  if constexpr (kLanes == 4) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
    return _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
  } else if constexpr (kLanes == 8) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  } else {
    const __m256i bits = kLanes == 0 ? _mm256_maskz_loadu_epi16(wanted, from)
                                     : _mm256_loadu_si256((const __m256i*)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
}

template <int kLanes, typename V>
MAFNET_TARGET_BF16 MAFNET_INLINE void store_bf16(const V& value, uint16_t* to,
                                                 [[maybe_unused]] __mmask16 wanted) {
  if constexpr (kLanes == 4) {
    _mm_storel_epi64((__m128i*)to, (__m128i)_mm_cvtneps_pbh(value));
  } else if constexpr (kLanes == 8) {
    _mm_storeu_si128((__m128i*)to, (__m128i)_mm256_cvtneps_pbh(value));
  } else if constexpr (kLanes == 16) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value));
  } else {
    _mm256_mask_storeu_epi16(to, wanted, (__m256i)_mm512_cvtneps_pbh(value));
  }
}

// One sample in bfloat16, rounded to it where a product wants it: to columns from `column` on of a
// packed row. kLanes as above; kChannels: their number, or 0 where it is that of the sampling.
template <int kLanes, int kChannels>
MAFNET_TARGET_BF16 MAFNET_INLINE void take_bf16_sample(const Sampling<float, uint16_t>& s,
                                                       const Samples<float>& tap, int i, int column,
                                                       uint16_t* row) {
  const float w0 = tap.weight[0][i], w1 = tap.weight[1][i];
  const float w2 = tap.weight[2][i], w3 = tap.weight[3][i];
  const uint16_t *top = s.corner(tap, i), *bottom = top + s.row_stride;
  const int64_t right = s.column_stride;
  for (int c = 0; c < (kChannels > 0 ? kChannels : s.channels);) {
    const PackedColumn to = packed_column(column + c);
    const int count = kLanes > 0 ? kLanes : std::min({16, s.channels - c, to.room});
    const __mmask16 wanted = static_cast<__mmask16>((1u << count) - 1);
    const auto v0 = load_bf16<kLanes>(top + c, wanted);
    const auto v1 = load_bf16<kLanes>(top + right + c, wanted);
    const auto v2 = load_bf16<kLanes>(bottom + c, wanted);
    const auto v3 = load_bf16<kLanes>(bottom + right + c, wanted);
    store_bf16<kLanes>(w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3, row + to.at, wanted);
    c += count;
  }
}

#endif

// Goes through the samples of a chunk, tap by tap, and tells the caches ahead.
template <typename A, typename S>
class Walk {
 public:
  MAFNET_INLINE explicit Walk(const Sampling<A, S>& s)
      : s_(s), tap_(s.taps), taps_(s.count), i_(0) {}

  MAFNET_INLINE const Sampling<A, S>& sampling() const { return s_; }
  MAFNET_INLINE const Samples<A>& tap() const { return *tap_; }
  MAFNET_INLINE int pixel() const { return i_; }

  MAFNET_INLINE void next_pixel() { ++i_; }
  MAFNET_INLINE bool is_behind_tap() const { return i_ == s_.pixels; }
  // False where there is no next one.
  MAFNET_INLINE bool next_tap() {
    if (taps_ <= 1) return false;
    --taps_;
    ++tap_;
    i_ = 0;
    s_.next.next_tap();
    return true;
  }

  // A line now and then: of many at once a CPU drops some.
  MAFNET_INLINE void prefetch() const {
    constexpr int kAhead = 48;
    if (i_ % kChunk == 0) s_.next.prefetch(i_);
    const bool in_next = i_ + kAhead >= s_.pixels;
    const S* ahead = s_.corner(tap_[in_next], i_ + kAhead - (in_next ? s_.pixels : 0));
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + s_.row_stride);
  }

 private:
  Sampling<A, S> s_;
  const Samples<A>* tap_;
  int taps_, i_;  // taps: that are left, with this one
};

// What a product does beside: some samples at each step, as many as keep pace with a product of 64
// columns. Tap by tap.
template <typename L, int kChannels>
class SamplerByTaps {
 public:
  MAFNET_INLINE explicit SamplerByTaps(const Sampling<float, float>& s)
      : walk_(s), to_(s.columns) {}

  // False where none is left.
  MAFNET_INLINE bool take() {
    if (walk_.is_behind_tap()) {
      if (!walk_.next_tap()) return false;
      to_ += kChannels - walk_.sampling().pixels * walk_.sampling().row;
    }
    walk_.prefetch();
    take_sample<L>(walk_.sampling(), walk_.tap(), walk_.pixel(),
                   std::integral_constant<int, kChannels>{}, to_);
    walk_.next_pixel();
    to_ += walk_.sampling().row;
    return true;
  }

  MAFNET_INLINE void step() {
    take();
    take();
  }

 private:
  Walk<float, float> walk_;
  float* to_;
};

// The same pixel by pixel: the taps of a pixel and of its neighbours read the same few lines, where
// tap by tap those of a whole block pass through the first cache once for each tap. Measured:
// faster where a pixel has half a line or more of floats, slower with 4 channels and in bfloat16.
template <typename L, int kChannels>
class SamplerByPixels {
 public:
  MAFNET_INLINE explicit SamplerByPixels(const Sampling<float, float>& s)
      : s_(s), tap_(0), i_(0), until_line_(0), line_(0), to_(s.columns) {}

  // False where none is left.
  MAFNET_INLINE bool take() {
    if (i_ == s_.pixels) return false;
    prefetch();
    take_sample<L>(s_, s_.taps[tap_], i_, std::integral_constant<int, kChannels>{}, to_);
    to_ += kChannels;
    if (++tap_ < s_.count) return true;
    tap_ = 0;
    ++i_;
    to_ += s_.row - s_.count * kChannels;
    return true;
  }

  MAFNET_INLINE void step() { take(); }

 private:
  MAFNET_INLINE void prefetch() {
    constexpr int kAhead = 3;
    if (until_line_-- == 0) prefetch_line();
    const float* ahead = s_.corner(s_.taps[tap_], std::min(i_ + kAhead, s_.pixels - 1));
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + s_.column_stride);
    __builtin_prefetch(ahead + s_.row_stride);
    __builtin_prefetch(ahead + s_.row_stride + s_.column_stride);
  }

  // A line now and then: of many at once a CPU drops some.
  MAFNET_INLINE void prefetch_line() {
    until_line_ = kChunk - 1;
    s_.next.prefetch(line_);
    line_ += kChunk;
    if (line_ < s_.pixels) return;
    line_ = 0;
    s_.next.next_tap();
  }

  Sampling<float, float> s_;
  int tap_, i_;
  int until_line_, line_;  // of the planes of the next sampling: samples until, and its pixel
  float* to_;
};

template <typename L, int kChannels>
using SamplerBeside =
    std::conditional_t<kChannels >= 8, SamplerByPixels<L, kChannels>, SamplerByTaps<L, kChannels>>;

#if defined(MAFNET_HAS_BF16)

template <int kChannels>
class Bf16SamplerBeside {
 public:
  MAFNET_TARGET_BF16 MAFNET_INLINE explicit Bf16SamplerBeside(const Sampling<float, uint16_t>& s)
      : walk_(s),
        column_(0),
        to_(s.columns),
        tile_row_(bf16_elements(kPackedRows, static_cast<int>(s.row))) {}

  MAFNET_TARGET_BF16 MAFNET_INLINE bool take() {
    if (walk_.is_behind_tap()) {
      if (!walk_.next_tap()) return false;
      column_ += kChannels;
      to_ = walk_.sampling().columns;
    }
    walk_.prefetch();
    take_bf16_sample<kChannels, kChannels>(walk_.sampling(), walk_.tap(), walk_.pixel(), column_,
                                           to_);
    walk_.next_pixel();
    to_ += walk_.pixel() % kPackedRows == 0 ? tile_row_ - (kPackedRows - 1) * kPackedDepth
                                            : kPackedDepth;
    return true;
  }

  MAFNET_TARGET_BF16 MAFNET_INLINE void step() {
    take();
    if (kChannels < 8) take();
  }

 private:
  Walk<float, uint16_t> walk_;
  int column_;
  uint16_t* to_;
  int64_t tile_row_;
};

#endif

}  // namespace mafnet
