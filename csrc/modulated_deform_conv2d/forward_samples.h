// The samples of one tap and segment in the forward pass on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/gemm_bf16.h"
#include "common/tiles.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {

// columns[pixel] = the masked samples.
template <typename L, typename A>
MAFNET_INLINE void sample_at_level(const ModulatedDeformConv2dParams& p, const Block b,
                                   const Source<A> source, const Plan<A>& plan, int channels_,
                                   const A* zeros, A* columns, int64_t row) {
  with_channels(channels_, [&](auto channels) MAFNET_INLINE_LAMBDA {
    for_samples(p, b, source, plan, zeros, [&](int i, const Corners<A>& at) MAFNET_INLINE_LAMBDA {
      const A w0 = plan.weight[0][i], w1 = plan.weight[1][i];
      const A w2 = plan.weight[2][i], w3 = plan.weight[3][i];
      A* out = columns + i * row;
      for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
        using V = typename decltype(type)::type;
        store<V>(out + c, w0 * load<V>(at.at[0] + c) + w1 * load<V>(at.at[1] + c) +
                              w2 * load<V>(at.at[2] + c) + w3 * load<V>(at.at[3] + c));
      });
    });
  });
}

template <typename A>
void sample(const ModulatedDeformConv2dParams& p, const Block& b, const Source<A>& source,
            const Plan<A>& plan, int channels, const A* zeros, A* columns, int64_t row) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    sample_at_level<decltype(level)>(p, b, source, plan, channels, zeros, columns, row);
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

template <int kLanes>
MAFNET_TARGET_BF16 MAFNET_INLINE void sample_lanes(const Corners<uint16_t>& at,
                                                   const Plan<float>& plan, int i, int c,
                                                   uint16_t* to, __mmask16 wanted) {
  const auto v0 = load_bf16<kLanes>(at.at[0] + c, wanted),
             v1 = load_bf16<kLanes>(at.at[1] + c, wanted);
  const auto v2 = load_bf16<kLanes>(at.at[2] + c, wanted),
             v3 = load_bf16<kLanes>(at.at[3] + c, wanted);
  const auto top = plan.weight[0][i] * v0 + plan.weight[1][i] * v1;
  store_bf16<kLanes>(top + plan.weight[2][i] * v2 + plan.weight[3][i] * v3, to, wanted);
}

// kLanes as above. kChannels: the number of channels, or 0 where it is `channels`.
template <int kLanes, int kChannels>
MAFNET_TARGET_BF16 void sample_block(const ModulatedDeformConv2dParams& p, const Block& b,
                                     const Source<uint16_t>& source_, const Plan<float>& plan,
                                     int channels, const uint16_t* zeros, uint16_t* packed,
                                     int64_t tile_row, int column) {
  const Source<uint16_t> source = source_;
  const PackedColumn first = packed_column(column);
  for (int begin = 0; begin < b.count; begin += kChunk, packed += tile_row) {
    const bool inside = plan.inside[begin / kChunk];
    const int end = std::min(b.count, begin + kChunk);
    uint16_t* row = packed;
    for (int i = begin; i < end; ++i, row += kPackedDepth) {
      const Corners<uint16_t> at =
          inside ? inner_corners(source, plan, i) : edge_corners(p, source, plan, i, zeros);
      if constexpr (kChannels > 0) {
        sample_lanes<kLanes>(at, plan, i, 0, row + first.at, 0);
        continue;
      }
      for (int c = 0; c < channels;) {
        const PackedColumn to = packed_column(column + c);
        const int count = kLanes > 0 ? kLanes : std::min({16, channels - c, to.room});
        sample_lanes<kLanes>(at, plan, i, c, row + to.at,
                             static_cast<__mmask16>((1u << count) - 1));
        c += count;
      }
    }
  }
}

// The same of bfloat16, rounded to it where a product wants them: in packed rows of `depth`, as
// those of pack_bf16_rows, the columns from `column` on.
inline void sample(const ModulatedDeformConv2dParams& p, const Block& b,
                   const Source<uint16_t>& source, const Plan<float>& plan, int channels,
                   const uint16_t* zeros, uint16_t* packed, int depth, int column) {
  static_assert(kChunk == kPackedRows);
  const auto fits = [&](int lanes) { return channels % lanes == 0 && column % lanes == 0; };
  const auto block = fits(16)  ? channels == 16 ? sample_block<16, 16> : sample_block<16, 0>
                     : fits(8) ? channels == 8 ? sample_block<8, 8> : sample_block<8, 0>
                     : fits(4) ? channels == 4 ? sample_block<4, 4> : sample_block<4, 0>
                               : sample_block<0, 0>;
  block(p, b, source, plan, channels, zeros, packed, bf16_elements(kPackedRows, depth), column);
}

#else

inline void sample(const ModulatedDeformConv2dParams&, const Block&, const Source<uint16_t>&,
                   const Plan<float>&, int, const uint16_t*, uint16_t*, int, int) {}

#endif

}  // namespace mafnet
