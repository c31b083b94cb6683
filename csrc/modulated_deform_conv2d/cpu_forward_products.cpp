// Products and sampling in one loop: a product is bound by multiplications, sampling by the wait
// for what it reads, and a core does both at once where their instructions lie side by side.
#include "common/gemm_bf16_tiles.h"
#include "common/gemm_tiles.h"
#include "modulated_deform_conv2d/forward_products.h"

namespace mafnet {
namespace {

// ---- one after the other

template <typename A>
void sample(const Sampling<A, A>& s) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    with_channels(s.channels, [&](auto channels) MAFNET_INLINE_LAMBDA {
      PlaneLines next = s.next;
      for (int k = 0; k < s.count; ++k, next.next_tap()) {
        A* to = s.columns + k * s.channels;
        for (int i = 0; i < s.pixels; ++i, to += s.row) {
          if (i % kChunk == 0) next.prefetch(i);
          take_sample<decltype(level)>(s, s.taps[k], i, channels, to);
        }
      }
    });
  });
}

template <typename A>
void sample_then_multiply(const Product<A, A>& p, const Sampling<A, A>& s) {
  if (s.count > 0) sample(s);
  if (p.pixels > 0) {
    multiply(Matrix<A>{p.columns, p.row, 1}, p.weight, p.outputs, p.pixels, p.depth, p.outputs,
             p.sums, p.sums_row, true);
  }
}

#if defined(MAFNET_HAS_BF16)

template <int kLanes, int kChannels>
MAFNET_TARGET_BF16 void sample_bf16(const Sampling<float, uint16_t>& s) {
  const int64_t tile_row = bf16_elements(kPackedRows, static_cast<int>(s.row));
  PlaneLines next = s.next;
  for (int k = 0; k < s.count; ++k, next.next_tap()) {
    uint16_t* tile = s.columns;
    for (int begin = 0; begin < s.pixels; begin += kPackedRows, tile += tile_row) {
      next.prefetch(begin);
      uint16_t* row = tile;
      for (int i = begin; i < std::min(s.pixels, begin + kPackedRows); ++i, row += kPackedDepth) {
        take_bf16_sample<kLanes, kChannels>(s, s.taps[k], i, k * s.channels, row);
      }
    }
  }
}

void sample_then_multiply(const Product<float, uint16_t>& p, const Sampling<float, uint16_t>& s) {
  const auto fits = [&](int lanes) { return s.channels % lanes == 0; };
  const auto sample = fits(16)  ? s.channels == 16 ? sample_bf16<16, 16> : sample_bf16<16, 0>
                      : fits(8) ? s.channels == 8 ? sample_bf16<8, 8> : sample_bf16<8, 0>
                      : fits(4) ? s.channels == 4 ? sample_bf16<4, 4> : sample_bf16<4, 0>
                                : sample_bf16<0, 0>;
  if (s.count > 0) sample(s);
  if (p.pixels > 0) {
    multiply_bf16(p.columns, p.weight, p.pixels, p.depth, p.outputs, p.sums, p.sums_row, true);
  }
}

#endif

// ---- at once, with vectors of 64 bytes: there are registers enough

#if defined(__x86_64__)

template <int kChannels>
MAFNET_TARGET_AVX512 void multiply_beside(const Product<float, float>& p,
                                          const Sampling<float, float>& s) {
  using L = Level<SimdLevel::kAvx512>;
  SamplerBeside<L, kChannels> sampler(s);
  multiply_panels<L>(Matrix<float>{p.columns, p.row, 1}, p.weight, p.outputs, p.pixels, p.depth,
                     p.outputs, p.sums, p.sums_row, true, sampler);
  while (sampler.take()) {
  }
}

#endif

#if defined(MAFNET_HAS_BF16)

template <int kChannels>
MAFNET_TARGET_BF16 void multiply_beside(const Product<float, uint16_t>& p,
                                        const Sampling<float, uint16_t>& s) {
  Bf16SamplerBeside<kChannels> sampler(s);
  multiply_bf16_by_vectors(p.columns, p.weight, p.pixels, p.depth, p.outputs, p.sums, p.sums_row,
                           true, sampler);
  while (sampler.take()) {
  }
}

#endif

}  // namespace

void multiply_and_sample(const Product<float, float>& p, const Sampling<float, float>& s) {
#if defined(__x86_64__)
  if (simd_level() >= SimdLevel::kAvx512 && p.pixels > 0) {
    if (s.channels == 4) return multiply_beside<4>(p, s);
    if (s.channels == 8) return multiply_beside<8>(p, s);
    if (s.channels == 16) return multiply_beside<16>(p, s);
  }
#endif
  sample_then_multiply(p, s);
}

void multiply_and_sample(const Product<double, double>& p, const Sampling<double, double>& s) {
  sample_then_multiply(p, s);
}

#if defined(MAFNET_HAS_BF16)

void multiply_and_sample(const Product<float, uint16_t>& p, const Sampling<float, uint16_t>& s) {
  // Tile registers are for products alone.
  if (simd_level() == SimdLevel::kAvx512Bf16 && p.pixels > 0) {
    if (s.channels == 4) return multiply_beside<4>(p, s);
    if (s.channels == 8) return multiply_beside<8>(p, s);
    if (s.channels == 16) return multiply_beside<16>(p, s);
  }
  sample_then_multiply(p, s);
}

#else

void multiply_and_sample(const Product<float, uint16_t>&, const Sampling<float, uint16_t>&) {}

#endif

}  // namespace mafnet
