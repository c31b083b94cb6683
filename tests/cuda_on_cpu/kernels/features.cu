// Each built-in that kernels may use, with results that Python can work out (test_runtime.py).
#include "binding.h"
#include "common/prims.cuh"

using mafnet::launch;

namespace {

constexpr unsigned kEveryLane = 0xffffffffu;

// A block of 16 x 4 threads. results (13, 64), one row an operation.
__global__ void warp_operations(int* results) {
  const int t = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x), lane = t % 32;
  int row = 0;
  const auto put = [&](int value) { results[64 * row++ + t] = value; };
  put(__shfl_sync(kEveryLane, t, 5));
  put(__shfl_sync(kEveryLane, t, 20, 8));
  put(__shfl_up_sync(kEveryLane, t, 3));
  put(__shfl_down_sync(kEveryLane, t, 5, 16));
  put(__shfl_xor_sync(kEveryLane, t, 9));
  put(__shfl_xor_sync(kEveryLane, t, 9, 8));
  put(static_cast<int>(__ballot_sync(kEveryLane, t % 3 == 0)));
  put(__any_sync(kEveryLane, t == 40));
  put(__all_sync(kEveryLane, t >= 32));
  // Two halves of a warp at two places of the program.
  if (lane < 16) {
    put(__shfl_xor_sync(0x0000ffffu, t, 1));
  } else {
    put(__shfl_xor_sync(0xffff0000u, t, 2));
  }
  put(static_cast<int>(__shfl_sync(kEveryLane, t + 0.5, 1) * 2));
  put(__popc(static_cast<unsigned>(t)) + 100 * __clz(t) + 10000 * __ffs(t));
  put(static_cast<int>(gridDim.x * 1000 + blockDim.x * 100 + blockDim.y));
}

__global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d, __half* h,
                        __nv_bfloat16* b) {
  const int t = static_cast<int>(threadIdx.x);
  atomicAdd(i, 2);
  atomicMax(i + 1, t);
  atomicMin(i + 2, -t);
  atomicCAS(i + 3, 0, 7);
  atomicAdd(u, 3u);
  atomicAdd(l, 1ull << 33);
  atomicAdd(f, 0.5f);
  mafnet::atomic_add4(f + 4, 1, 2, 3, 4);
  atomicAdd(d, 0.25);
  atomicAdd(h, __float2half_rn(1));
  atomicAdd(b, __float2bfloat16_rn(1));
}

// One grid after the other in one call: what the first wrote the second may read.
__global__ void first_grid(int* values) { values[blockIdx.x] = static_cast<int>(blockIdx.x); }
__global__ void second_grid(int* values) {
  if (blockIdx.x == 0) {
    for (int i = 1; i < 8; ++i) values[8] += values[i];
  }
}

// The place of each block, warp and lane in the order of running.
__global__ void run_order(int* places, int* counter) {
  places[blockIdx.x * 64 + threadIdx.x] = atomicAdd(counter, 1);
}

__global__ void to_float(const uint16_t* bits, float* as_half, float* as_bfloat16, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    __half h;
    __nv_bfloat16 b;
    std::memcpy(&h, bits + i, 2);
    std::memcpy(&b, bits + i, 2);
    as_half[i] = __half2float(h);
    as_bfloat16[i] = __bfloat162float(b);
  }
}

// rounded (6, n): x, x + y and x y of half, then of bfloat16.
__global__ void round_and_combine(const float* x, const float* y, uint16_t* rounded, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    const __half hx = __float2half_rn(x[i]), hy = __float2half_rn(y[i]);
    const __nv_bfloat16 bx = __float2bfloat16_rn(x[i]), by = __float2bfloat16_rn(y[i]);
    const __half halves[] = {hx, __hadd(hx, hy), __hmul(hx, hy)};
    const __nv_bfloat16 bfloats[] = {bx, __hadd(bx, by), __hmul(bx, by)};
    for (int k = 0; k < 3; ++k) {
      std::memcpy(rounded + k * n + i, halves + k, 2);
      std::memcpy(rounded + (3 + k) * n + i, bfloats + k, 2);
    }
  }
}

template <typename T>
T* data(const cuemu::Array& array) {
  return static_cast<T*>(array.data);
}

}  // namespace

CUEMU_ENTRY(run_warp_operations) {
  return launch(warp_operations, dim3(1), dim3(16, 4), 0, nullptr,
                data<int>(arguments.out("results")));
}
CUEMU_ENTRY(run_atomics) {
  return launch(atomics, dim3(1), dim3(64), 0, nullptr, data<int>(arguments.in_out("i")),
                data<unsigned>(arguments.in_out("u")),
                data<unsigned long long>(arguments.in_out("l")), data<float>(arguments.in_out("f")),
                data<double>(arguments.in_out("d")), data<__half>(arguments.in_out("h")),
                data<__nv_bfloat16>(arguments.in_out("b")));
}
CUEMU_ENTRY(run_grids) {
  auto* values = data<int>(arguments.in_out("values"));
  const int status = launch(first_grid, dim3(8), dim3(1), 0, nullptr, values);
  return status != 0 ? status : launch(second_grid, dim3(8), dim3(1), 0, nullptr, values);
}
CUEMU_ENTRY(run_in_order) {
  return launch(run_order, dim3(4), dim3(64), 0, nullptr, data<int>(arguments.out("places")),
                data<int>(arguments.in_out("counter")));
}
CUEMU_ENTRY(run_to_float) {
  const cuemu::Array bits = arguments.in("bits");
  return launch(to_float, dim3(1), dim3(256), 0, nullptr, data<const uint16_t>(bits),
                data<float>(arguments.out("as_half")), data<float>(arguments.out("as_bfloat16")),
                static_cast<int>(bits.shape[0]));
}
CUEMU_ENTRY(run_round_and_combine) {
  const cuemu::Array x = arguments.in("x");
  return launch(round_and_combine, dim3(1), dim3(256), 0, nullptr, data<const float>(x),
                data<const float>(arguments.in("y")), data<uint16_t>(arguments.out("rounded")),
                static_cast<int>(x.shape[0]));
}
