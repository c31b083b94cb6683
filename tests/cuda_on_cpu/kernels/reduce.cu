// Block, warp and grid reductions, correct and with a bug planted (test_planted_bugs.py).
#include "binding.h"
#include "common/prims.cuh"

using mafnet::launch;

namespace {

enum class Bug {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kMissingAtomic,
  kMaskOfLanesThatDoNotCome,
  kShuffleFromOutsideTheMask,
  kSharedWritePastTheEnd,
  kSharedReadPastTheEnd,
};

constexpr int kThreads = 256, kWarps = kThreads / 32;

DEVICE float sum_over_lanes(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// One block sums one row of `columns`, and adds it to the total of all rows.
template <Bug kBug>
__global__ void row_sum(const float* rows, float* sums, float* total, int columns) {
  SHARED(float, parts, [kWarps]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) {
    sum += rows[static_cast<int>(blockIdx.x) * columns + i];
  }
  sum = sum_over_lanes(sum);
  if (lane == 0) parts[warp + (kBug == Bug::kSharedWritePastTheEnd ? 1 : 0)] = sum;
  if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();
  if (warp != 0) return;
  if constexpr (kBug == Bug::kMaskOfLanesThatDoNotCome) {
    if (lane >= kWarps) return;
  }
  sum = sum_over_lanes(lane < kWarps ? parts[lane] : 0.0f);
  if constexpr (kBug == Bug::kShuffleFromOutsideTheMask) {
    if (lane < 16) sum = __shfl_sync(0x0000ffffu, sum, 16);
  }
  if (lane != 0) return;
  sums[blockIdx.x] = sum;
  if constexpr (kBug == Bug::kMissingAtomic) {
    *total += sum;
  } else {
    atomicAdd(total, sum);
  }
}

// One warp transposes one tile.
template <Bug kBug>
__global__ void transpose(const float* source, float* target) {
  SHARED(float, tile, [32][32]);
  const int lane = static_cast<int>(threadIdx.x);
  const float* from = source + blockIdx.x * 1024;
  float* to = target + blockIdx.x * 1024;
  for (int i = 0; i < 32; ++i) tile[i][lane] = from[i * 32 + lane];
  if constexpr (kBug != Bug::kMissingWarpBarrier) __syncwarp();
  constexpr int kShift = kBug == Bug::kSharedReadPastTheEnd ? 1 : 0;
  for (int i = 0; i < 32; ++i) to[i * 32 + lane] = (&tile[0][0])[lane * 32 + i + kShift];
}

template <Bug kBug>
int run_row_sum(cuemu::Arguments& arguments) {
  const cuemu::Array rows = arguments.in("rows");
  auto* sums = static_cast<float*>(arguments.out("sums").data);
  auto* total = static_cast<float*>(arguments.in_out("total").data);
  return launch(row_sum<kBug>, dim3(static_cast<unsigned>(rows.shape[0])), dim3(kThreads), 0,
                nullptr, static_cast<const float*>(rows.data), sums, total,
                static_cast<int>(rows.shape[1]));
}

template <Bug kBug>
int run_transpose(cuemu::Arguments& arguments) {
  const cuemu::Array source = arguments.in("source");
  auto* target = static_cast<float*>(arguments.out("target").data);
  return launch(transpose<kBug>, dim3(static_cast<unsigned>(source.shape[0])), dim3(32), 0, nullptr,
                static_cast<const float*>(source.data), target);
}

const cuemu::Registration kEntries[] = {
    {"row_sum", run_row_sum<Bug::kNone>},
    {"row_sum missing barrier", run_row_sum<Bug::kMissingBarrier>},
    {"row_sum missing atomic", run_row_sum<Bug::kMissingAtomic>},
    {"row_sum mask of lanes that do not come", run_row_sum<Bug::kMaskOfLanesThatDoNotCome>},
    {"row_sum shuffle from outside the mask", run_row_sum<Bug::kShuffleFromOutsideTheMask>},
    {"row_sum shared write past the end", run_row_sum<Bug::kSharedWritePastTheEnd>},
    {"transpose", run_transpose<Bug::kNone>},
    {"transpose missing warp barrier", run_transpose<Bug::kMissingWarpBarrier>},
    {"transpose shared read past the end", run_transpose<Bug::kSharedReadPastTheEnd>},
};

}  // namespace
