// Tokens of self_attention between tensors and blocks.
#include "common/pixels.h"
#include "common/vectors.h"
#include "self_attention/tokens.h"

namespace mafnet {
namespace {

// Calls body(i, count, offset) for runs of tokens i .. i + count that lie at one stride, the first
// of them at `offset` in the tensor.
template <typename Body>
MAFNET_INLINE void for_runs(const Tokens& tokens, const Problem& problem, int64_t first, int count,
                            const Body& body) {
  const int64_t base = problem.n * tokens.stride[0] + problem.head * tokens.stride[1];
  for (int i = 0; i < count;) {
    const int64_t row = (first + i) / problem.columns, column = (first + i) % problem.columns;
    const int run = static_cast<int>(std::min<int64_t>(count - i, problem.columns - column));
    const int64_t token = problem.first + row * problem.stride + column;
    body(i, run, base + token * tokens.stride[2]);
    i += run;
  }
}

// Calls body(i, d) for all i and d, with that inside whose stride is smaller; `constant` tells
// whether it is 1, so that such loops become vector loads.
template <typename Copy>
MAFNET_INLINE void for_elements(int count, int depth, int64_t token_stride, int64_t depth_stride,
                                const Copy& copy) {
  if (token_stride == 1) {
    for (int d = 0; d < depth; ++d) {
      for (int i = 0; i < count; ++i) copy(i, d, i + d * depth_stride);
    }
  } else if (depth_stride == 1) {
    for (int i = 0; i < count; ++i) {
      for (int d = 0; d < depth; ++d) copy(i, d, i * token_stride + d);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      for (int d = 0; d < depth; ++d) copy(i, d, i * token_stride + d * depth_stride);
    }
  }
}

// to[j * to_row + i] = from[i * from_row + j], for a square of a vector's numbers aside.
template <typename L, typename From, typename To>
MAFNET_INLINE void turn_square(const From* from, int64_t from_row, To* to, int64_t to_row) {
  constexpr int kSide = L::kBytes / sizeof(float);
  using V = VectorOf<float, kSide>;
  V rows[kSide];
  for (int i = 0; i < kSide; ++i) {
    float numbers[kSide];
    for (int j = 0; j < kSide; ++j) numbers[j] = static_cast<float>(from[i * from_row + j]);
    rows[i] = load<V>(numbers);
  }
  transpose(rows);
  for (int i = 0; i < kSide; ++i) {
    float numbers[kSide];
    store(numbers, rows[i]);
    for (int j = 0; j < kSide; ++j) to[i * to_row + j] = static_cast<To>(numbers[j]);
  }
}

// to[j * to_row + i] = from[i * from_row + j], for j < columns and i < rows: one side of the copy
// would jump about, so that it goes by squares.
template <typename L, typename From, typename To>
MAFNET_INLINE void turn(const From* from, int64_t from_row, int rows, int columns, To* to,
                        int64_t to_row) {
  constexpr int kSide = L::kBytes / sizeof(float);
  for (int i = 0; i < rows; i += kSide) {
    for (int j = 0; j < columns; j += kSide) {
      const From* source = from + i * from_row + j;
      To* target = to + j * to_row + i;
      if (i + kSide <= rows && j + kSide <= columns) {
        turn_square<L>(source, from_row, target, to_row);
        continue;
      }
      for (int y = 0; y < std::min(kSide, rows - i); ++y) {
        for (int x = 0; x < std::min(kSide, columns - j); ++x) {
          target[x * to_row + y] = static_cast<To>(source[y * from_row + x]);
        }
      }
    }
  }
}

}  // namespace

Problem make_problem(const SelfAttentionParams& p, int64_t index) {
  Problem problem{};
  const int64_t nx = windows_along(p.width, p.window), ny = windows_along(p.height, p.window);
  const int64_t x = index % nx * p.window, y = index / nx % ny * p.window;
  const int64_t image = index / (nx * ny);
  problem.head = image % p.heads;
  problem.n = image / p.heads;
  if (p.window > 0) {
    problem.columns = std::min(p.window, p.width - x);
    problem.queries = problem.keys = problem.columns * std::min(p.window, p.height - y);
    problem.first = y * p.width + x;
    problem.stride = p.width;
  } else {
    problem.queries = p.queries;
    problem.keys = p.keys;
    problem.columns = std::max<int64_t>(std::max(p.queries, p.keys), 1);
  }
  return problem;
}

template <typename A>
void read_tokens(Dtype dtype, const Tokens& from, const Problem& problem, int64_t first, int count,
                 int depth, A* to, int64_t row, int64_t column) {
  with_dtype<A>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* data = static_cast<const T*>(from.data);
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for_runs(from, problem, first, count, [&](int i, int run, int64_t at) MAFNET_INLINE_LAMBDA {
        const T* source = data + at;
        A* target = to + i * row;
        if constexpr (std::is_same_v<A, float>) {
          if (from.stride[3] == 1 && row == 1) {
            return turn<decltype(level)>(source, from.stride[2], run, depth, target, column);
          }
        }
        const auto copy = [&](int j, int d, int64_t element) MAFNET_INLINE_LAMBDA {
          target[j * row + d * column] = static_cast<A>(source[element]);
        };
        for_elements(run, depth, from.stride[2], from.stride[3], copy);
      });
    });
  });
}

template <typename A>
void write_tokens(Dtype dtype, const Tokens& to, const Problem& problem, int64_t first, int count,
                  int depth, const A* from, int64_t row, int64_t column, A factor) {
  with_dtype<A>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* data = static_cast<T*>(to.data);
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for_runs(to, problem, first, count, [&](int i, int run, int64_t at) MAFNET_INLINE_LAMBDA {
        T* target = data + at;
        const A* source = from + i * row;
        if constexpr (std::is_same_v<A, float>) {
          if (to.stride[3] == 1 && row == 1 && factor == 1) {
            return turn<decltype(level)>(source, column, depth, run, target, to.stride[2]);
          }
        }
        const auto copy = [&](int j, int d, int64_t element) MAFNET_INLINE_LAMBDA {
          target[element] = static_cast<T>(source[j * row + d * column] * factor);
        };
        for_elements(run, depth, to.stride[2], to.stride[3], copy);
      });
    });
  });
}

template void read_tokens(Dtype, const Tokens&, const Problem&, int64_t, int, int, float*, int64_t,
                          int64_t);
template void read_tokens(Dtype, const Tokens&, const Problem&, int64_t, int, int, double*, int64_t,
                          int64_t);
template void write_tokens(Dtype, const Tokens&, const Problem&, int64_t, int, int, const float*,
                           int64_t, int64_t, float);
template void write_tokens(Dtype, const Tokens&, const Problem&, int64_t, int, int, const double*,
                           int64_t, int64_t, double);

}  // namespace mafnet
