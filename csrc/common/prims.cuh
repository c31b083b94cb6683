// The one header with CUDA-only syntax. Kernel files use what is here and plain C++, so that the
// same sources also compile for a CPU emulator, for which each primitive has its twin in the second
// half.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
// A statically shared array: SHARED(float, tile, [32][33]);
#define SHARED(type, name, ...) __shared__ __align__(128) type name __VA_ARGS__

namespace mafnet {

// Starts kernel and returns cudaError_t as an int, 0 for success.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      Parameters(arguments)...);
  return cudaGetLastError();
}

// Adds four neighbours; address is 16-byte aligned. One instruction on sm_90 and later.
DEVICE void atomic_add4(float* address, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(address), make_float4(a, b, c, d));
#else
  atomicAdd(address, a);
  atomicAdd(address + 1, b);
  atomicAdd(address + 2, c);
  atomicAdd(address + 3, d);
#endif
}

}  // namespace mafnet

#else

#include "cuda_on_cpu.h"

#define DEVICE inline
#define SHARED(type, name, ...)                     \
  static const char name##_key = 0;                 \
  using name##_array = type __VA_ARGS__;            \
  name##_array& name = *static_cast<name##_array*>( \
      ::cuemu::shared_array(&name##_key, sizeof(name##_array), #name, ::cuemu::Place::here()))

namespace mafnet {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           Arguments&&... arguments) {
  return ::cuemu::launch(kernel, grid, block, shared_bytes, Parameters(arguments)...);
}

DEVICE void atomic_add4(float* address, float a, float b, float c, float d) {
  atomicAdd(address, a);
  atomicAdd(address + 1, b);
  atomicAdd(address + 2, c);
  atomicAdd(address + 3, d);
}

}  // namespace mafnet

#endif

namespace mafnet {

DEVICE float to_accumulator(float v) { return v; }
DEVICE double to_accumulator(double v) { return v; }
DEVICE float to_accumulator(__half v) { return __half2float(v); }
DEVICE float to_accumulator(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, typename A>
DEVICE T from_accumulator(A v) {
  return static_cast<T>(v);
}
template <>
DEVICE __half from_accumulator<__half, float>(float v) {
  return __float2half_rn(v);
}
template <>
DEVICE __nv_bfloat16 from_accumulator<__nv_bfloat16, float>(float v) {
  return __float2bfloat16_rn(v);
}

// A naturally aligned group of V elements, moved by one load or store where it is at most 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

}  // namespace mafnet
