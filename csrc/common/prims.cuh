// The one header with PTX and CUDA-only syntax. Kernel files use what is here, CUDA's built-in
// functions and plain C++, so that the same sources also compile for a CPU emulator
// (tests/cuda_on_cpu), for which each primitive has its twin in the second half.
//
// Fragments of the tensor-core instructions are registers of packed 16-bit pairs, laid out over the
// lanes of a warp as the PTX ISA says; all 32 lanes must call them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
// A statically shared array: SHARED(float, tile, [32][33]);
#define SHARED(type, name, ...) __shared__ __align__(128) type name __VA_ARGS__
// A pointer to the bytes that launch() was asked for: DYN_SHARED(float, tile);
#define DYN_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)

namespace mafnet {

// Starts kernel and returns cudaError_t as an int, 0 for success.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      Parameters(arguments)...);
  return cudaGetLastError();
}

// The same pointer into global memory, or number, which the compiler keeps in registers instead of
// working it out again in a loop.
template <typename T>
DEVICE T* held(T* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

DEVICE uint32_t held(uint32_t v) {
  asm("" : "+r"(v));
  return v;
}

// base + count * size, in one instruction; base and the result lie in global memory.
DEVICE const unsigned char* address_of(const void* base, uint32_t count, uint32_t size) {
  const unsigned char* result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(size), "l"(base));
  __builtin_assume(__isGlobal(result));
  return result;
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

// floor(v), and v minus that in part, without a conversion, of which a GPU does few: adding 1.5 *
// 2^23 rounds to integers. Where |v| > 2^22 or v is NaN, some integer outside [0, 2^22), so that an
// index check refuses it.
DEVICE int split_floor(float v, float& part) {
  constexpr float kMagic = 12582912.0f;
  const float rounded = __fadd_rd(v, kMagic);
  part = v - (rounded - kMagic);
  return static_cast<int>(__float_as_uint(rounded) - __float_as_uint(kMagic));
}

// Whether a device of this capability, 10 * major + minor, runs code that was compiled with the
// tensor-core instructions of sm_80. Not where all that it can run is the PTX of an older
// architecture, which has traps in their place.
constexpr bool runs_bfloat16_code(int capability) {
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch >= 800 && arch <= 10 * capability) return true;
  }
  return false;
}

// The same of the current device.
inline bool has_bfloat16_tensor_cores() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         runs_bfloat16_code(10 * major + minor);
}

// ---- tensor cores

DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// N matrices of 8 x 8 16-bit elements from shared memory: lane l gives the 16-byte aligned address
// of row l % 8 of matrix l / 8. The transposed ones suit a row-major B.
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with A (16 x K) row-major and B (K x 8) column-major; the last argument only names the
// type.
DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // its halves along K are fragments of the smaller one
  mma_m16n8k8(d, {a[0], a[1]}, {b[0]}, __half());
  mma_m16n8k8(d, {a[2], a[3]}, {b[1]}, __half());
#endif
}
// From sm_80 on, as everything below; older architectures have no bfloat16 kernels that call it.
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
// The nearest TF32, of 11 bits; a tie goes to the even one, or away from zero below sm_90. NaN and
// infinity stay.
DEVICE float to_tf32(float v) {
#if __CUDA_ARCH__ >= 900  // one instruction, where the other is three
  uint32_t bits;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
#elif __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
#else
  __trap();
  return v;
#endif
}
// The registers are floats; the tensor core ignores their 13 low bits.
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// ---- asynchronous copies, plain ones below sm_80

// Copies 16 bytes to shared memory; where not `valid` it writes zeros and does not touch source.
// The data are there after cp_async_wait, and a barrier for other threads.
DEVICE void cp_async16(void* shared, const void* source, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      valid ? *static_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
#endif
}
// Closes a group of copies.
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Left` of this thread's groups are under way.
template <int Left>
DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
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
#define DYN_SHARED(type, name) type* const name = static_cast<type*>(::cuemu::dynamic_shared())

namespace mafnet {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           Arguments&&... arguments) {
  return ::cuemu::launch(kernel, grid, block, shared_bytes, Parameters(arguments)...);
}

DEVICE void atomic_add4(float* address, float a, float b, float c, float d, CUEMU_PLACE) {
  ::cuemu::require_alignment(address, 16, place);
  atomicAdd(address, a, place);
  atomicAdd(address + 1, b, place);
  atomicAdd(address + 2, c, place);
  atomicAdd(address + 3, d, place);
}

template <typename T>
DEVICE T* held(T* pointer) {
  return pointer;
}
DEVICE uint32_t held(uint32_t v) { return v; }
DEVICE const unsigned char* address_of(const void* base, uint32_t count, uint32_t size) {
  return static_cast<const unsigned char*>(base) + uint64_t{count} * size;
}

DEVICE int split_floor(float v, float& part) {
  const float whole = std::floor(v);
  part = v - whole;
  return whole >= -4194304 && whole <= 4194304 ? static_cast<int>(whole) : 1 << 30;
}

inline bool has_bfloat16_tensor_cores() { return true; }

DEVICE void ldmatrix(uint32_t (&r)[4], const void* row, CUEMU_PLACE) {
  ::cuemu::load_matrices(r, row, 4, false, place);
}
DEVICE void ldmatrix(uint32_t (&r)[2], const void* row, CUEMU_PLACE) {
  ::cuemu::load_matrices(r, row, 2, false, place);
}
DEVICE void ldmatrix_trans(uint32_t (&r)[4], const void* row, CUEMU_PLACE) {
  ::cuemu::load_matrices(r, row, 4, true, place);
}
DEVICE void ldmatrix_trans(uint32_t (&r)[2], const void* row, CUEMU_PLACE) {
  ::cuemu::load_matrices(r, row, 2, true, place);
}
DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], __half,
                        CUEMU_PLACE) {
  ::cuemu::mma(::cuemu::Mma::kM16N8K8F16, d, a, b, place);
}
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         CUEMU_PLACE) {
  ::cuemu::mma(::cuemu::Mma::kM16N8K16F16, d, a, b, place);
}
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         __nv_bfloat16, CUEMU_PLACE) {
  ::cuemu::mma(::cuemu::Mma::kM16N8K16BFloat16, d, a, b, place);
}
DEVICE float to_tf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  return v - v == 0 ? __uint_as_float((bits + 0x1000u) & 0xffffe000u) : v;
}
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             CUEMU_PLACE) {
  ::cuemu::mma(::cuemu::Mma::kM16N8K8Tf32, d, a, b, place);
}

DEVICE void cp_async16(void* shared, const void* source, bool valid = true, CUEMU_PLACE) {
  ::cuemu::async_copy(shared, source, valid ? 16 : 0, place);
}
DEVICE void cp_async_commit() { ::cuemu::async_commit(); }
template <int Left>
DEVICE void cp_async_wait() {
  ::cuemu::async_wait(Left);
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

template <typename T, int V>
DEVICE Vector<T, V> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, V>*>(address);
}

template <typename T, int V>
DEVICE void store_vector(T* address, const Vector<T, V>& value) {
#if defined(__CUDACC__)
  // Spelt out: nvcc splits the store of a struct of halves into four words.
  if constexpr (sizeof(value) == sizeof(uint4)) {
    *reinterpret_cast<uint4*>(address) = reinterpret_cast<const uint4&>(value);
    return;
  }
#endif
  *reinterpret_cast<Vector<T, V>*>(address) = value;
}

}  // namespace mafnet
