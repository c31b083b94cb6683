// Small kernels that each do one thing wrong, and two that do all of it right
// (test_planted_bugs.py).
#include "binding.h"
#include "common/prims.cuh"

using mafnet::launch;

namespace {

constexpr int kThreads = 64;

using Kernel = void (*)(const float* input, float* output, int* counter);

// What each of the kernels below does not do.
__global__ void correct(const float* input, float* output, int* counter) {
  SHARED(float, tile, [kThreads]);
  DYN_SHARED(int, order);
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = input[t];
  order[t] = kThreads - 1 - t;
  __syncthreads();
  output[t] = tile[order[t]];
  atomicAdd(counter, 1);
}

__global__ void uninitialised_shared(const float*, float* output, int*) {
  SHARED(float, tile, [kThreads]);
  if (threadIdx.x > 0) tile[threadIdx.x] = 1;
  __syncthreads();
  output[threadIdx.x] = tile[threadIdx.x];
}
__global__ void write_to_an_input(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x];
  const_cast<float*>(input)[threadIdx.x] = 0;
}
__global__ void global_read_past_the_end(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x + 1];
}
__global__ void global_write_past_the_end(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x];
  output[threadIdx.x + 1] = 0;
}
__global__ void global_read_before_the_beginning(const float* input, float* output, int*) {
  output[threadIdx.x] = input[static_cast<int>(threadIdx.x) - 1];
}
__global__ void misaligned_vector(const float* input, float* output, int*) {
  const float2 pair = *reinterpret_cast<const float2*>(input + threadIdx.x / 2);
  output[threadIdx.x] = pair.x;
}
__global__ void misaligned_atomic(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x];
  if (threadIdx.x == 0) mafnet::atomic_add4(output + 1, 0, 0, 0, 0);
}
__global__ void unwritten_output(const float* input, float* output, int*) {
  if (threadIdx.x < kThreads - 1) output[threadIdx.x] = input[threadIdx.x];
}
__global__ void output_read_before_written(const float*, float* output, int*) {
  output[threadIdx.x] += 1;
}
__global__ void nan_to_int(const float* input, float* output, int*) {
  const float nothing = input[threadIdx.x] * 0.0f / 0.0f;
  output[threadIdx.x] = static_cast<float>(static_cast<int>(nothing));
}
__global__ void division_by_zero(const float* input, float* output, int* counter) {
  output[threadIdx.x] = input[threadIdx.x] + static_cast<float>(7 % *counter);
}
__global__ void barrier_some_have_left(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x];
  if (threadIdx.x >= 50) return;
  __syncthreads();
}
__global__ void barrier_in_both_branches(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x];
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void copy_never_waited_for(const float* input, float* output, int*) {
  SHARED(float4, tile, [kThreads]);
  output[threadIdx.x] = input[threadIdx.x];
  mafnet::cp_async16(&tile[threadIdx.x], input);
  mafnet::cp_async_commit();
}
__global__ void matrix_row_misaligned(const float* input, float* output, int*) {
  SHARED(__half, tile, [kThreads * 8]);
  output[threadIdx.x] = input[threadIdx.x];
  for (int i = 0; i < 8; ++i) tile[threadIdx.x * 8 + i] = __half();
  __syncthreads();
  uint32_t registers[2];
  mafnet::ldmatrix(registers, tile + threadIdx.x % 16 * 8 + 4);
}
__global__ void waits_for_nobody(const float* input, float* output, int* counter) {
  output[threadIdx.x] = input[threadIdx.x];
  while (*static_cast<volatile int*>(counter) != 1000) {
  }
}
__global__ void too_much_static_shared(const float* input, float* output, int*) {
  SHARED(float, tile, [12 * 1024 + 1]);
  tile[threadIdx.x] = input[threadIdx.x];
  output[threadIdx.x] = tile[threadIdx.x];
}
__global__ void warp_reads_another_warps_write(const float* input, float* output, int*) {
  SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = input[threadIdx.x];
  __syncwarp();  // orders the lanes of a warp, not the warps
  output[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}
// Of several blocks.
__global__ void blocks_write_the_same(const float* input, float* output, int*) {
  output[threadIdx.x] = input[threadIdx.x];
}
__global__ void block_reads_what_another_writes(const float* input, float* output, int* counter) {
  if (blockIdx.x == 0) output[threadIdx.x] = input[threadIdx.x];
  if (blockIdx.x == 0 && threadIdx.x == 0) counter[0] = 1;
  if (blockIdx.x == 1 && threadIdx.x == 0 && counter[0] == 1) atomicAdd(counter + 1, 1);
}
__global__ void plain_read_beside_atomics(const float* input, float* output, int* counter) {
  if (blockIdx.x == 0) output[threadIdx.x] = input[threadIdx.x];
  atomicAdd(counter, 1);
  if (threadIdx.x == 0 && counter[0] == 1) atomicAdd(counter + 1, 1);
}

template <Kernel kKernel, unsigned kBlocks = 1, unsigned kBlockThreads = kThreads>
int run(cuemu::Arguments& arguments) {
  auto* input = static_cast<const float*>(arguments.in("input").data);
  auto* output = static_cast<float*>(arguments.out("output").data);
  auto* counter = static_cast<int*>(arguments.in_out("counter").data);
  return launch(kKernel, dim3(kBlocks), dim3(kBlockThreads), kThreads * sizeof(int), nullptr, input,
                output, counter);
}

// Through scratch memory that a launcher asked for.
__global__ void copy_twice(const float* input, float* output, float* scratch, int written) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < written) scratch[t] = input[t];
  output[t] = scratch[t];
}

template <int kElements, int kWritten>
int run_copy_twice(cuemu::Arguments& arguments) {
  auto* input = static_cast<const float*>(arguments.in("input").data);
  auto* output = static_cast<float*>(arguments.out("output").data);
  arguments.in_out("counter");
  auto* scratch = static_cast<float*>(arguments.scratch("scratch", kElements * sizeof(float)));
  return launch(copy_twice, dim3(1), dim3(kThreads), 0, nullptr, input, output, scratch, kWritten);
}

#define ENTRY(kernel, ...) {#kernel, run<kernel, ##__VA_ARGS__>}

const cuemu::Registration kEntries[] = {
    ENTRY(correct),
    ENTRY(uninitialised_shared),
    ENTRY(write_to_an_input),
    ENTRY(global_read_past_the_end),
    ENTRY(global_write_past_the_end),
    ENTRY(global_read_before_the_beginning),
    ENTRY(misaligned_vector),
    ENTRY(misaligned_atomic),
    ENTRY(unwritten_output),
    ENTRY(output_read_before_written),
    ENTRY(nan_to_int),
    ENTRY(division_by_zero),
    ENTRY(barrier_some_have_left),
    ENTRY(barrier_in_both_branches),
    ENTRY(copy_never_waited_for),
    ENTRY(matrix_row_misaligned),
    ENTRY(waits_for_nobody),
    ENTRY(too_much_static_shared),
    ENTRY(warp_reads_another_warps_write),
    ENTRY(blocks_write_the_same, 2),
    ENTRY(block_reads_what_another_writes, 2),
    ENTRY(plain_read_beside_atomics, 2),
    {"too_many_threads", run<correct, 1, 1088>},
    {"through_scratch", run_copy_twice<kThreads, kThreads>},
    {"too_little_scratch", run_copy_twice<kThreads - 1, kThreads>},
    {"scratch_read_before_written", run_copy_twice<kThreads, kThreads - 1>},
};

}  // namespace
