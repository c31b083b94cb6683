// Prints fragment_layouts.txt from the traits of NVIDIA's CuTe (CUTLASS 4.2, PyPI
// nvidia-cutlass 4.2.0):
//   g++ -std=c++17 -w -I<cutlass>/include -I<cuda>/include -I<cuda>/include/cccl
//   fragment_layouts.cpp
// Not part of any test run: the tests need the numbers alone.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

// One line: the name, then layout(lane, value) / unit for all lanes, every unit-th of the values.
template <typename Layout>
void print(const char* name, int values, int unit = 1) {
  std::printf("%s", name);
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < values; value += unit) {
      std::printf(" %d", static_cast<int>(Layout{}(lane, value)) / unit);
    }
  }
  std::printf("\n");
}

// A: row + 16 column. B: column + 8 row. C and D: row + 16 column.
#define PRINT_MMA(name, traits, a, b)               \
  print<MMA_Traits<traits>::ALayout>(name ".a", a); \
  print<MMA_Traits<traits>::BLayout>(name ".b", b); \
  print<MMA_Traits<traits>::CLayout>(name ".d", 4)

int main() {
  using namespace cute;
  PRINT_MMA("f16_k16", SM80_16x8x16_F32F16F16F32_TN, 8, 4);
  PRINT_MMA("bf16_k16", SM80_16x8x16_F32BF16BF16F32_TN, 8, 4);
  PRINT_MMA("f16_k8", SM80_16x8x8_F32F16F16F32_TN, 4, 2);
  PRINT_MMA("tf32_k8", SM80_16x8x8_F32TF32TF32F32_TN, 4, 2);
  // Bits of the rows one after the other; an element has 16.
  print<typename Copy_Traits<SM75_U32x4_LDSM_N>::DstLayout>("ldmatrix_x4", 128, 16);
  print<typename Copy_Traits<SM75_U16x8_LDSM_T>::DstLayout>("ldmatrix_x4_trans", 128, 16);
  print<typename Copy_Traits<SM75_U32x2_LDSM_N>::DstLayout>("ldmatrix_x2", 64, 16);
  print<typename Copy_Traits<SM75_U16x4_LDSM_T>::DstLayout>("ldmatrix_x2_trans", 64, 16);
}
