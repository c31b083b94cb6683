// Vector types of the CPU kernels of modulated_deform_conv2d, and the choice of their width.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/dtype.h"
#include "common/simd.h"

// Wide vectors pass between functions here only where those are inlined: there is no ABI to warn
// of.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mafnet {

template <SimdLevel L>
struct Level {
  static constexpr SimdLevel kLevel = L;
  static constexpr int kBytes = L == SimdLevel::kAvx512 ? 64 : L == SimdLevel::kAvx2 ? 32 : 16;
  // Of a tile of a matrix product: 6 x 4 sums of 32 registers, or 6 x 2 of 16.
  static constexpr int kTileVectors = L == SimdLevel::kAvx512 ? 4 : 2;
};

// Calls body(Level<...>{}), compiled for that level. Where with_simd of common/simd.h leaves the
// width to the compiler, tiles and chunks here are cut to it. A is the accumulators' type: double,
// which serves accuracy and not speed, has the baseline alone.
template <typename A, typename Body>
void with_level(const Body& body) {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<A, double>) {
    const SimdLevel level = simd_level();
    if (level >= SimdLevel::kAvx512) {
      return run_avx512([&]() MAFNET_INLINE_LAMBDA { body(Level<SimdLevel::kAvx512>{}); });
    }
    if (level == SimdLevel::kAvx2) {
      return run_avx2([&]() MAFNET_INLINE_LAMBDA { body(Level<SimdLevel::kAvx2>{}); });
    }
  }
#endif
  body(Level<SimdLevel::kBaseline>{});
}

template <typename A, int kLanes>
struct Lanes {
  typedef A Vector __attribute__((vector_size(kLanes * sizeof(A))));
};
template <typename A, int kLanes>
using VectorOf = typename Lanes<A, kLanes>::Vector;

template <typename V, typename A>
MAFNET_INLINE V load(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V, typename A>
MAFNET_INLINE void store(A* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}

// b where it is larger (smaller), else a: a NaN in b is passed over, one in a stays. In one
// instruction, where GCC makes two of the comparison.
#if defined(__x86_64__)
#define MAFNET_MINMAX(name, instruction, sign)                            \
  template <typename V>                                                   \
  MAFNET_INLINE V name(const V& a, const V& b) {                          \
    V result = a;                                                         \
    if constexpr (std::is_same_v<V, VectorOf<float, 16>>) {               \
      asm("v" instruction " %1, %2, %0" : "=v"(result) : "v"(a), "v"(b)); \
    } else if constexpr (std::is_same_v<V, VectorOf<float, 8>>) {         \
      asm("v" instruction " %1, %2, %0" : "=x"(result) : "x"(a), "x"(b)); \
    } else {                                                              \
      result = (b sign a) ? b : a;                                        \
    }                                                                     \
    return result;                                                        \
  }
#else
#define MAFNET_MINMAX(name, instruction, sign)   \
  template <typename V>                          \
  MAFNET_INLINE V name(const V& a, const V& b) { \
    return (b sign a) ? b : a;                   \
  }
#endif
MAFNET_MINMAX(larger_of, "maxps", >)
MAFNET_MINMAX(smaller_of, "minps", <)
#undef MAFNET_MINMAX

// Calls body(Type<V>{}, c) for the channels c, c + 1, ... that one vector V holds, the widest
// first; what is left goes one by one, with A for V.
template <typename L, typename A, typename Body>
MAFNET_INLINE void for_channels(int channels, const Body& body) {
  constexpr int kWidest = L::kBytes / sizeof(A);
  int c = 0;
  for (; c + kWidest <= channels; c += kWidest) body(Type<VectorOf<A, kWidest>>{}, c);
  if constexpr (kWidest >= 16) {
    if (c + 8 <= channels) {
      body(Type<VectorOf<A, 8>>{}, c);
      c += 8;
    }
  }
  if constexpr (kWidest >= 8) {
    if (c + 4 <= channels) {
      body(Type<VectorOf<A, 4>>{}, c);
      c += 4;
    }
  }
  for (; c < channels; ++c) body(Type<A>{}, c);
}

// Calls body(channels) with channels a compile-time constant where it is one of the usual numbers
// of channels per offset group, so that their loops unroll.
template <typename Body>
MAFNET_INLINE void with_channels(int channels, const Body& body) {
  switch (channels) {
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    case 16:
      return body(std::integral_constant<int, 16>{});
    default:
      return body(channels);
  }
}

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The sums of a, b, c and d as one vector.
template <typename A, typename V>
MAFNET_INLINE VectorOf<A, 4> sums_of(const V& a, const V& b, const V& c, const V& d) {
  if constexpr (std::is_same_v<V, A>) {
    return VectorOf<A, 4>{a, b, c, d};
  } else {
    constexpr int kLanes = sizeof(V) / sizeof(A);
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    if constexpr (kLanes == 16) {
      const auto half = [](const V& v) MAFNET_INLINE_LAMBDA {
        return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
      };
      return sums_of<A>(half(a), half(b), half(c), half(d));
    } else if constexpr (kLanes == 8) {
      // Neighbours of two vectors, within each half of a register.
      const auto pairs = [](const V& u, const V& v) MAFNET_INLINE_LAMBDA {
        return __builtin_shufflevector(u, v, 0, 2, 8, 10, 4, 6, 12, 14) +
               __builtin_shufflevector(u, v, 1, 3, 9, 11, 5, 7, 13, 15);
      };
      const V all = pairs(pairs(a, b), pairs(c, d));
      return __builtin_shufflevector(all, all, 0, 1, 2, 3) +
             __builtin_shufflevector(all, all, 4, 5, 6, 7);
    } else if constexpr (kLanes == 4) {
      const auto pairs = [](const V& u, const V& v) MAFNET_INLINE_LAMBDA {
        return __builtin_shufflevector(u, v, 0, 2, 4, 6) +
               __builtin_shufflevector(u, v, 1, 3, 5, 7);
      };
      return pairs(pairs(a, b), pairs(c, d));
    }
#endif
#endif
    VectorOf<A, 4> sums{};
    for (int i = 0; i < kLanes; ++i) sums += VectorOf<A, 4>{a[i], b[i], c[i], d[i]};
    return sums;
  }
}

// op(op(a, b), ...) over the numbers of a vector, in halves; op takes vectors and numbers.
template <typename A, typename V, typename Op>
MAFNET_INLINE A fold(const V& v, const Op& op) {
  constexpr int kLanes = sizeof(V) / sizeof(A);
  if constexpr (std::is_same_v<V, A>) {
    return v;
  } else if constexpr (kLanes == 2) {
    return op(A(v[0]), A(v[1]));
  } else {
    VectorOf<A, kLanes / 2> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return fold<A>(op(halves[0], halves[1]), op);
  }
}

// Rows and columns of N vectors of N numbers change places. Where the compiler has no shuffles,
// number by number.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MAFNET_HAS_SHUFFLES
// Blocks of kSize x kSize that lie beside the diagonal of blocks twice as large change places.
template <int kSize, typename V, int N, int... I>
MAFNET_INLINE void swap_blocks(V (&rows)[N], std::integer_sequence<int, I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (i & kSize) continue;
    const V upper = rows[i], lower = rows[i + kSize];
    rows[i] = __builtin_shufflevector(upper, lower, (I & kSize ? N + I - kSize : I)...);
    rows[i + kSize] = __builtin_shufflevector(upper, lower, (I & kSize ? N + I : I + kSize)...);
  }
}
#endif
#endif

template <typename V, int N>
MAFNET_INLINE void transpose(V (&rows)[N]) {
  static_assert(N == 4 || N == 8 || N == 16);
#if defined(MAFNET_HAS_SHUFFLES)
  constexpr std::make_integer_sequence<int, N> kColumns;
  swap_blocks<1>(rows, kColumns);
  swap_blocks<2>(rows, kColumns);
  if constexpr (N >= 8) swap_blocks<4>(rows, kColumns);
  if constexpr (N >= 16) swap_blocks<8>(rows, kColumns);
#else
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < i; ++j) std::swap(rows[i][j], rows[j][i]);
  }
#endif
}

// Memory that begins on a cache line; zeroed unless told otherwise. What is large lies on huge
// pages where the system lets it: samples jump about, and with small pages they miss the TLB.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size, bool zeroed = true) { resize(size, zeroed); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, alignment_); }

  // What was in it is lost.
  void resize(size_t size, bool zeroed = true) {
    const size_t bytes = size * sizeof(T);
    if (bytes > capacity_) {
      ::operator delete(data_, alignment_);
      data_ = nullptr;  // should the next line throw
      alignment_ = std::align_val_t{bytes < kHugePage ? 64 : kHugePage};
      data_ = static_cast<T*>(::operator new(bytes, alignment_));
      capacity_ = bytes;
#if defined(__linux__)
      if (bytes >= kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    size_ = size;
    if (zeroed) std::memset(static_cast<void*>(data_), 0, bytes);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;
  size_t size_ = 0, capacity_ = 0;
  std::align_val_t alignment_{64};
  T* data_ = nullptr;
};

}  // namespace mafnet
