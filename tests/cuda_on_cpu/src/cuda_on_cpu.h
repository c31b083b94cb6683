// What a kernel file sees in place of nvcc's built-ins when it is compiled for the CPU. Strict on
// purpose: what CUDA leaves undefined is reported, not papered over. README.md has the whole
// picture.
#pragma once

#if defined(__CUDACC__)
#error "cuda_on_cpu.h is for a host compiler; nvcc has the real thing"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cuda_types.h"
//
#include "cuda_half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __ldg(pointer) (*(pointer))

// The emulator's own state is no memory of the kernel: functions that touch it are not
// instrumented.
#define CUEMU_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

namespace cuemu {

// A line of kernel source. As a default argument, here() is the place of the call.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

uint3 thread_index();
uint3 block_index();
dim3 block_dimensions();
dim3 grid_dimensions();
int lane_index();

void block_barrier(Place place);
void warp_barrier(uint32_t mask, Place place);
uint32_t ballot(uint32_t mask, bool predicate, Place place);
// Replaces value by that of lane `source`.
void shuffle(uint32_t mask, void* value, size_t size, int source, Place place);

// The array of this block that tag stands for; guarded, and poisoned when the block starts.
void* shared_array(const void* tag, size_t size, const char* name, Place place);
void* dynamic_shared();

// An atomic access: reported, then done; the emulator runs one thread at a time.
void atomic_access(const void* address, size_t size, Place place);
void require_alignment(const void* address, size_t alignment, Place place);

// d += a b on fragments as PTX lays them out.
enum class Mma { kM16N8K16F16, kM16N8K16BFloat16, kM16N8K8F16, kM16N8K8Tf32 };
void mma(Mma shape, float* d, const uint32_t* a, const uint32_t* b, Place place);
void load_matrices(uint32_t* registers, const void* row, int count, bool transpose, Place place);

// As late as the rules allow: the destination is poison until the wait for its group. Reads
// `source_size` bytes and fills up to 16 with zeros.
void async_copy(void* destination, const void* source, int source_size, Place place);
void async_commit();
void async_wait(int groups_left);

// Calls body(context) in every thread of the grid. Returns a cudaError_t.
int launch_grid(void (*body)(void*), void* context, dim3 grid, dim3 block, size_t shared_bytes);

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {Parameters(arguments)...}};
  const auto body = [](void* context) {
    auto* c = static_cast<Call*>(context);
    std::apply(c->kernel, c->arguments);
  };
  return launch_grid(body, &call, grid, block, shared_bytes);
}

template <typename T, typename Change>
CUEMU_UNCHECKED T read_modify_write(T* address, Place place, Change change) {
  atomic_access(address, sizeof(T), place);
  const T old = *address;
  *address = change(old);
  return old;
}

template <typename T>
T shuffled(uint32_t mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  shuffle(mask, &value, sizeof value, source, place);
  return value;
}

}  // namespace cuemu

#define threadIdx (::cuemu::thread_index())
#define blockIdx (::cuemu::block_index())
#define blockDim (::cuemu::block_dimensions())
#define gridDim (::cuemu::grid_dimensions())
#define CUEMU_PLACE ::cuemu::Place place = ::cuemu::Place::here()

constexpr int warpSize = 32;

inline void __syncthreads(CUEMU_PLACE) { cuemu::block_barrier(place); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, CUEMU_PLACE) {
  cuemu::warp_barrier(mask, place);
}
inline void __threadfence() {}  // one thread at a time: all order is program order
inline void __threadfence_block() {}

// Segments of `width` lanes, as PTX defines shfl: xor may read an earlier segment, not a later one.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, CUEMU_PLACE) {
  const int first = cuemu::lane_index() & ~(width - 1);
  return cuemu::shuffled(mask, value, first | (source & (width - 1)), place);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, CUEMU_PLACE) {
  const int lane = cuemu::lane_index(), source = lane ^ (bits & 31);
  return cuemu::shuffled(mask, value, source <= (lane | (width - 1)) ? source : lane, place);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, CUEMU_PLACE) {
  const int lane = cuemu::lane_index(), source = lane + static_cast<int>(delta & 31);
  return cuemu::shuffled(mask, value, source <= (lane | (width - 1)) ? source : lane, place);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, CUEMU_PLACE) {
  const int lane = cuemu::lane_index(), source = lane - static_cast<int>(delta & 31);
  return cuemu::shuffled(mask, value, source >= (lane & ~(width - 1)) ? source : lane, place);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, CUEMU_PLACE) {
  return cuemu::ballot(mask, predicate != 0, place);
}
inline int __any_sync(uint32_t mask, int predicate, CUEMU_PLACE) {
  return cuemu::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, CUEMU_PLACE) {
  return cuemu::ballot(mask, predicate != 0, place) == mask;
}

// Only for the types that CUDA has.
#define CUEMU_ATOMIC(name, T, result)                                                         \
  CUEMU_UNCHECKED inline T name(T* address, T value, CUEMU_PLACE) {                           \
    return cuemu::read_modify_write(                                                          \
        address, place, [&]([[maybe_unused]] T old) CUEMU_UNCHECKED -> T { return result; }); \
  }
CUEMU_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + value))
CUEMU_ATOMIC(atomicAdd, unsigned, old + value)
CUEMU_ATOMIC(atomicAdd, unsigned long long, old + value)
CUEMU_ATOMIC(atomicAdd, float, old + value)
CUEMU_ATOMIC(atomicAdd, double, old + value)
CUEMU_ATOMIC(atomicAdd, __half, __hadd(old, value))
CUEMU_ATOMIC(atomicAdd, __half2, __hadd2(old, value))
CUEMU_ATOMIC(atomicAdd, __nv_bfloat16, __hadd(old, value))
CUEMU_ATOMIC(atomicAdd, __nv_bfloat162, __hadd2(old, value))
CUEMU_ATOMIC(atomicMax, int, old < value ? value : old)
CUEMU_ATOMIC(atomicMax, unsigned, old < value ? value : old)
CUEMU_ATOMIC(atomicMax, unsigned long long, old < value ? value : old)
CUEMU_ATOMIC(atomicMin, int, value < old ? value : old)
CUEMU_ATOMIC(atomicMin, unsigned, value < old ? value : old)
CUEMU_ATOMIC(atomicMin, unsigned long long, value < old ? value : old)
CUEMU_ATOMIC(atomicExch, int, value)
CUEMU_ATOMIC(atomicExch, unsigned, value)
CUEMU_ATOMIC(atomicExch, float, value)
#undef CUEMU_ATOMIC
CUEMU_UNCHECKED inline int atomicCAS(int* address, int expected, int value, CUEMU_PLACE) {
  return cuemu::read_modify_write(
      address, place, [&](int old) CUEMU_UNCHECKED { return old == expected ? value : old; });
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline long long __float2ll_rn(float x) { return static_cast<long long>(std::nearbyint(x)); }
inline long long __double2ll_rn(double x) { return static_cast<long long>(std::nearbyint(x)); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename To, typename From>
To cuemu_bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int x) { return cuemu_bits_as<float>(x); }
inline int __float_as_int(float x) { return cuemu_bits_as<int>(x); }
inline float __uint_as_float(uint32_t x) { return cuemu_bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return cuemu_bits_as<uint32_t>(x); }
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }  // of a number and NaN, the number
inline float max(float a, float b) { return std::fmax(a, b); }
