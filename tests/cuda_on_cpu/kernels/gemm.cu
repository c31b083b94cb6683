// C (M, N) in float = A (M, K) B (K, N) in half, row-major, by tensor cores from a double buffer
// that cp.async fills; K and N are multiples of 8. Correct, and with a bug planted
// (test_planted_bugs.py).
#include "binding.h"
#include "common/prims.cuh"

using mafnet::launch;

namespace {

enum class Bug {
  kNone,
  kMissingBarrierAfterWait,
  kMissingBarrierBeforeRefill,
  kShortWait,
  kSwappedFragments,
  kSwappedAccumulators,
  kRowsNotChecked,
  kRowOfTheOtherBuffer,
  kGridTooSmall,
  kCopyToMisalignedAddress,
};

constexpr int kTileM = 64, kTileN = 32, kTileK = 16;
constexpr int kPad = 8;        // elements after each row: ldmatrix then has no bank conflicts
constexpr int kThreads = 128;  // a warp has 16 rows of the tile

template <Bug kBug>
__global__ void gemm(const __half* a, const __half* b, float* c, int m, int n, int k) {
  SHARED(__half, a_tile, [2][kTileM][kTileK + kPad]);
  SHARED(__half, b_tile, [2][kTileK][kTileN + kPad]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_row = static_cast<int>(blockIdx.y) * kTileM;
  const int first_column = static_cast<int>(blockIdx.x) * kTileN;

  const auto fill = [&](int buffer, int first_k) {
    const int row = thread / 2, chunk = thread % 2 * 8;
    const bool inside =
        (kBug == Bug::kRowsNotChecked || first_row + row < m) && first_k + chunk < k;
    const int shift = kBug == Bug::kCopyToMisalignedAddress && first_k > 0 ? 4 : 0;
    mafnet::cp_async16(&a_tile[buffer][row][chunk + shift],
                       inside ? a + (first_row + row) * k + first_k + chunk : a, inside);
    if (thread < 64) {
      const int b_row = thread / 4, column = thread % 4 * 8;
      const bool b_inside = first_k + b_row < k && first_column + column < n;
      const int wrong = kBug == Bug::kRowOfTheOtherBuffer && buffer == 0 ? 1 : 0;
      mafnet::cp_async16(
          &b_tile[0][0][0] + ((buffer * kTileK + b_row + wrong) * (kTileN + kPad)) + column,
          b_inside ? b + (first_k + b_row) * n + first_column + column : b, b_inside);
    }
    mafnet::cp_async_commit();
  };

  float sums[kTileN / 8][4] = {};
  const int steps = (k + kTileK - 1) / kTileK;
  fill(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int buffer = step % 2;
    if (step + 1 < steps) fill(1 - buffer, (step + 1) * kTileK);
    if (step + 1 < steps || kBug == Bug::kShortWait) {
      mafnet::cp_async_wait<1>();
    } else {
      mafnet::cp_async_wait<0>();
    }
    if constexpr (kBug != Bug::kMissingBarrierAfterWait) __syncthreads();
    uint32_t a_fragment[4];
    const int row = warp * 16;
    if constexpr (kBug == Bug::kSwappedFragments) {
      mafnet::ldmatrix(a_fragment,
                       &a_tile[buffer][row + lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    } else {
      mafnet::ldmatrix(a_fragment, &a_tile[buffer][row + lane % 16][lane / 16 * 8]);
    }
    for (int j = 0; j < kTileN / 8; ++j) {
      uint32_t b_fragment[2];
      mafnet::ldmatrix_trans(b_fragment, &b_tile[buffer][lane % 16][j * 8]);
      mafnet::mma_m16n8k16(sums[j], a_fragment, b_fragment, __half());
    }
    if constexpr (kBug != Bug::kMissingBarrierBeforeRefill) __syncthreads();
  }
  if constexpr (kBug == Bug::kShortWait) mafnet::cp_async_wait<0>();

  for (int j = 0; j < kTileN / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int half = kBug == Bug::kSwappedAccumulators ? 1 - i / 2 : i / 2;
      const int row = first_row + warp * 16 + half * 8 + lane / 4;
      const int column = first_column + j * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[row * n + column] = sums[j][i];
    }
  }
}

template <Bug kBug>
int run(cuemu::Arguments& arguments) {
  const cuemu::Array a = arguments.in("a"), b = arguments.in("b"), c = arguments.out("c");
  const int m = static_cast<int>(c.shape[0]), n = static_cast<int>(c.shape[1]);
  const auto blocks = [](int size, int tile) {
    return static_cast<unsigned>((kBug == Bug::kGridTooSmall ? size : size + tile - 1) / tile);
  };
  return launch(gemm<kBug>, dim3(blocks(n, kTileN), blocks(m, kTileM)), dim3(kThreads), 0, nullptr,
                static_cast<const __half*>(a.data), static_cast<const __half*>(b.data),
                static_cast<float*>(c.data), m, n, static_cast<int>(a.shape[1]));
}

const cuemu::Registration kEntries[] = {
    {"gemm", run<Bug::kNone>},
    {"gemm missing barrier after wait", run<Bug::kMissingBarrierAfterWait>},
    {"gemm missing barrier before refill", run<Bug::kMissingBarrierBeforeRefill>},
    {"gemm short wait", run<Bug::kShortWait>},
    {"gemm swapped fragments", run<Bug::kSwappedFragments>},
    {"gemm swapped accumulators", run<Bug::kSwappedAccumulators>},
    {"gemm rows not checked", run<Bug::kRowsNotChecked>},
    {"gemm row of the other buffer", run<Bug::kRowOfTheOtherBuffer>},
    {"gemm grid too small", run<Bug::kGridTooSmall>},
    {"gemm copy to misaligned address", run<Bug::kCopyToMisalignedAddress>},
};

}  // namespace
