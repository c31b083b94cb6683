// resize_conv: a 3 x 3 convolution of a bilinearly resized map, which is never made.
//
// Resizing and multiplying by a tap's weight commute: the nine products are taken of the small map,
//   P[tap] = input W[tap],                                  (h w 9 C C_out products, not H W 9 C
//   C_out)
// and their resized, shifted planes are added up, first along x, then along y:
//   Z[ky](i, X) = sum over kx and the columns x that make X + kx - 1 of weight * P[ky, kx](i, x)
//   output(Y, X) = bias + sum over ky and the rows i that make Y + ky - 1 of weight * Z[ky](i, X)
// A tap outside the large map has no terms. At the size of the input, see cpu_conv_3x3.cpp.
// Backward is the transpose: Z and P become the gradients of what they are here.
#pragma once

#include "common/parallel.h"
#include "pyramid_spatial_attention/resize.h"

namespace mafnet {

// Rows of Z, or of gradients, that are kept: a row is made of at most 6, of which some serve the
// next one.
constexpr int kSlots = 8;

struct Range {
  int begin, end;
  int size() const { return end - begin; }
};

template <typename A>
struct Plan {
  Plan(const PyramidConvParams& p)
      : rows(resize_terms<A>(p.height, p.out_height)),
        columns(resize_terms<A>(p.width, p.out_width)),
        depth(padded_columns(p.channels)),
        out(padded_columns(p.out_channels)) {}

  TermLists<A> rows, columns;
  int depth, out;
};

}  // namespace mafnet
