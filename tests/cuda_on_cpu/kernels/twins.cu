// Each tensor-core primitive on raw registers, and the others that have a twin of their own: held
// to the layout tables and to what they say on the CPU, and to their inline PTX by following
// registers through nvcc's output (test_twins.py).
#include "common/prims.cuh"

using mafnet::launch;

namespace {

template <int A, int B, typename Multiply>
DEVICE void multiply(const uint32_t* a, const uint32_t* b, float* d, const Multiply& mma) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a_registers[A], b_registers[B];
  float d_registers[4];
#pragma unroll
  for (int i = 0; i < A; ++i) a_registers[i] = a[lane * A + i];
#pragma unroll
  for (int i = 0; i < B; ++i) b_registers[i] = b[lane * B + i];
#pragma unroll
  for (int i = 0; i < 4; ++i) d_registers[i] = d[lane * 4 + i];
  mma(d_registers, a_registers, b_registers);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = d_registers[i];
}

}  // namespace

// Kernels outside the namespace: their names are read in nvcc's output.
__global__ void mma_f16_k16(const uint32_t* a, const uint32_t* b, float* d) {
  multiply<4, 2>(a, b, d,
                 [](auto& d, auto& a, auto& b) { mafnet::mma_m16n8k16(d, a, b, __half()); });
}
__global__ void mma_bf16_k16(const uint32_t* a, const uint32_t* b, float* d) {
  multiply<4, 2>(a, b, d,
                 [](auto& d, auto& a, auto& b) { mafnet::mma_m16n8k16(d, a, b, __nv_bfloat16()); });
}
__global__ void mma_f16_k8(const uint32_t* a, const uint32_t* b, float* d) {
  multiply<2, 1>(a, b, d,
                 [](auto& d, auto& a, auto& b) { mafnet::mma_m16n8k8(d, a, b, __half()); });
}
__global__ void mma_tf32_k8(const uint32_t* a, const uint32_t* b, float* d) {
  multiply<4, 2>(a, b, d, [](auto& d, auto& a, auto& b) { mafnet::mma_m16n8k8_tf32(d, a, b); });
}

__global__ void round_to_tf32(const float* values, float* rounded) {
  rounded[threadIdx.x] = mafnet::to_tf32(values[threadIdx.x]);
}

__global__ void split_floors(const float* values, int* wholes, float* parts) {
  wholes[threadIdx.x] = mafnet::split_floor(values[threadIdx.x], parts[threadIdx.x]);
}

// rows: 8 N rows of 8 elements; loaded: N registers of each lane.
template <int N, bool kTransposed>
__global__ void load_matrix(const uint16_t* rows, uint32_t* loaded) {
  SHARED(uint16_t, shared, [32][8]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 8 * N * 8; i += 32) shared[i / 8][i % 8] = rows[i];
  __syncwarp();
  uint32_t registers[N];
  if constexpr (kTransposed) {
    mafnet::ldmatrix_trans(registers, shared[lane % (8 * N)]);
  } else {
    mafnet::ldmatrix(registers, shared[lane % (8 * N)]);
  }
  for (int i = 0; i < N; ++i) loaded[lane * N + i] = registers[i];
}
template __global__ void load_matrix<4, false>(const uint16_t*, uint32_t*);
template __global__ void load_matrix<4, true>(const uint16_t*, uint32_t*);
template __global__ void load_matrix<2, false>(const uint16_t*, uint32_t*);
template __global__ void load_matrix<2, true>(const uint16_t*, uint32_t*);

// Two groups of copies of 16 bytes a lane; the second is zeros where `valid` is false.
__global__ void copy_async(const uint4* source, uint4* target, bool valid) {
  SHARED(uint4, shared, [2][32]);
  const int lane = static_cast<int>(threadIdx.x);
  mafnet::cp_async16(&shared[0][lane], source + lane);
  mafnet::cp_async_commit();
  mafnet::cp_async16(&shared[1][lane], source + 32 + lane, valid);
  mafnet::cp_async_commit();
  mafnet::cp_async_wait<1>();
  target[lane] = shared[0][lane];
  mafnet::cp_async_wait<0>();
  target[32 + lane] = shared[1][lane];
}

#if !defined(__CUDACC__)

#include "binding.h"

namespace {

int run_mma(void (*kernel)(const uint32_t*, const uint32_t*, float*), cuemu::Arguments& arguments) {
  auto* a = static_cast<const uint32_t*>(arguments.in("a").data);
  auto* b = static_cast<const uint32_t*>(arguments.in("b").data);
  auto* d = static_cast<float*>(arguments.in_out("d").data);
  return launch(kernel, dim3(1), dim3(32), 0, nullptr, a, b, d);
}

int run_load(void (*kernel)(const uint16_t*, uint32_t*), cuemu::Arguments& arguments) {
  auto* rows = static_cast<const uint16_t*>(arguments.in("rows").data);
  auto* loaded = static_cast<uint32_t*>(arguments.out("loaded").data);
  return launch(kernel, dim3(1), dim3(32), 0, nullptr, rows, loaded);
}

}  // namespace

CUEMU_ENTRY(f16_k16) { return run_mma(mma_f16_k16, arguments); }
CUEMU_ENTRY(bf16_k16) { return run_mma(mma_bf16_k16, arguments); }
CUEMU_ENTRY(f16_k8) { return run_mma(mma_f16_k8, arguments); }
CUEMU_ENTRY(tf32_k8) { return run_mma(mma_tf32_k8, arguments); }
CUEMU_ENTRY(to_tf32) {
  auto* values = static_cast<const float*>(arguments.in("values").data);
  auto* rounded = static_cast<float*>(arguments.out("rounded").data);
  return launch(round_to_tf32, dim3(1), dim3(32), 0, nullptr, values, rounded);
}
CUEMU_ENTRY(split_floor) {
  auto* values = static_cast<const float*>(arguments.in("values").data);
  auto* wholes = static_cast<int*>(arguments.out("wholes").data);
  auto* parts = static_cast<float*>(arguments.out("parts").data);
  return launch(split_floors, dim3(1), dim3(32), 0, nullptr, values, wholes, parts);
}
CUEMU_ENTRY(ldmatrix_x4) { return run_load(load_matrix<4, false>, arguments); }
CUEMU_ENTRY(ldmatrix_x4_trans) { return run_load(load_matrix<4, true>, arguments); }
CUEMU_ENTRY(ldmatrix_x2) { return run_load(load_matrix<2, false>, arguments); }
CUEMU_ENTRY(ldmatrix_x2_trans) { return run_load(load_matrix<2, true>, arguments); }
CUEMU_ENTRY(cp_async) {
  auto* source = static_cast<const uint4*>(arguments.in("source").data);
  auto* target = static_cast<uint4*>(arguments.out("target").data);
  const bool valid = arguments.integer("valid") != 0;
  return launch(copy_async, dim3(1), dim3(32), 0, nullptr, source, target, valid);
}

#else  // for twins_on_device.py: device pointers, the default stream, a CUDA error code

#define RUN_MMA(name)                                                         \
  extern "C" int run_##name(const uint32_t* a, const uint32_t* b, float* d) { \
    return launch(mma_##name, dim3(1), dim3(32), 0, nullptr, a, b, d);        \
  }
#define RUN_LOAD(name, count, transposed)                                                       \
  extern "C" int run_##name(const uint16_t* rows, uint32_t* loaded) {                           \
    return launch(load_matrix<count, transposed>, dim3(1), dim3(32), 0, nullptr, rows, loaded); \
  }
RUN_MMA(f16_k16)
RUN_MMA(bf16_k16)
RUN_MMA(f16_k8)
RUN_MMA(tf32_k8)
extern "C" int run_to_tf32(const float* values, float* rounded) {
  return launch(round_to_tf32, dim3(1), dim3(32), 0, nullptr, values, rounded);
}
extern "C" int run_split_floor(const float* values, int* wholes, float* parts) {
  return launch(split_floors, dim3(1), dim3(32), 0, nullptr, values, wholes, parts);
}
RUN_LOAD(ldmatrix_x4, 4, false)
RUN_LOAD(ldmatrix_x4_trans, 4, true)
RUN_LOAD(ldmatrix_x2, 2, false)
RUN_LOAD(ldmatrix_x2_trans, 2, true)
extern "C" int run_cp_async(const uint4* source, uint4* target, int valid) {
  return launch(copy_async, dim3(1), dim3(32), 0, nullptr, source, target, valid != 0);
}

#endif
