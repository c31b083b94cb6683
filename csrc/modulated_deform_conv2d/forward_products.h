// The matrix products of the forward pass on the CPU, each beside the sampling for the next one.
#pragma once

#include <cstdint>

#include "modulated_deform_conv2d/forward_samples.h"

namespace mafnet {

// sums += columns * weight, of `pixels` rows; in bfloat16 both factors are packed for
// multiply_bf16.
template <typename A, typename S>
struct Product {
  const S* columns;
  int64_t row;  // of columns
  const S* weight;
  int pixels, depth, outputs;
  A* sums;
  int64_t sums_row;
};

// Multiplies, and takes the samples of another block meanwhile.
void multiply_and_sample(const Product<float, float>& product,
                         const Sampling<float, float>& sampling);
void multiply_and_sample(const Product<double, double>& product,
                         const Sampling<double, double>& sampling);
void multiply_and_sample(const Product<float, uint16_t>& product,
                         const Sampling<float, uint16_t>& sampling);

}  // namespace mafnet
