// 3 x 3 convolutions by Winograd's F(2 x 2, 3 x 3): 16 products of channels for 2 x 2 pixels of
// output, not 36.
#pragma once

#include "pyramid_spatial_attention/rows.h"

namespace mafnet {

// Of 4 x 4 pixels d, a weight g and 2 x 2 sums s, each transformed along rows and along columns:
//   (d0 - d2, d1 + d2, d2 - d1, d1 - d3) times (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   = (m0, m1, m2, m3), s = (m0 + m1 + m2, m1 - m2 - m3).
// A sum is made of the pixels around it alone. With c channels, d at most D and g at most G, the
// absolute terms of a sum are at most 64 c D G, and c + 10 roundings follow each other; of a plain
// sum it is 9 c D G and 9 c. The bound of the error is 64 (c + 10) / 81 c times that of the plain
// sum: 1.3 for 16 channels, below 1 from 38 on.
class Winograd {
 public:
  // Where transforms cost less than they save, and the error is in bounds.
  static bool serves(int channels) { return channels >= 16; }

  // columns is a multiple of kColumnPad.
  Winograd(int channels, int columns)
      : channels_(channels), columns_(columns), weight_(size_t{16} * channels * columns, false) {}

  // taps[i] is a dense matrix (channels x columns).
  void load(const float* const (&taps)[9]);

  // Floats of scratch that sum() wants.
  size_t scratch(int tiles) const {
    return 16 * (plane(tiles, channels_) + plane(tiles, columns_));
  }

  // Two rows of 2 * tiles sums, of four rows of pixels that begin one pixel to their left. False if
  // a sum is infinite or NaN: differences of infinities are NaN where a plain sum is infinite.
  bool sum(const float* const (&rows)[4], int tiles, float* const (&sums)[2], float* scratch) const;

 private:
  // The distance of two planes is an odd number of cache lines, so that they share no cache set.
  static size_t plane(int tiles, int depth) {
    return round_up(round_up(tiles, kRowPad) * depth, 32) + size_t{16};
  }

  int channels_, columns_;
  Buffer<float> weight_;
};

}  // namespace mafnet
