// The independent problems that attention falls apart into, and their tokens between the layouts
// and dtypes of tensors and blocks of accumulators.
#pragma once

#include <algorithm>
#include <cstdint>

#include "self_attention/params.h"

namespace mafnet {

// Every query of a problem sees every key of it: one head of one sample, or one window of that.
struct Problem {
  int64_t n, head;
  int64_t queries, keys;
  // Token i lies at first + i / columns * stride + i % columns.
  int64_t first, columns, stride;
};

inline int64_t windows_along(int64_t size, int64_t window) {
  return window > 0 ? (size - 1) / window + 1 : 1;
}

inline int64_t count_problems(const SelfAttentionParams& p) {
  return p.batch * p.heads * windows_along(p.height, p.window) * windows_along(p.width, p.window);
}

// Of the largest problem.
inline int64_t most_tokens(const SelfAttentionParams& p, int64_t tokens) {
  return p.window > 0 ? std::min(p.window, p.height) * std::min(p.window, p.width) : tokens;
}

Problem make_problem(const SelfAttentionParams& p, int64_t index);

// to[i * row + d * column] = token first + i, element d.
template <typename A>
void read_tokens(Dtype dtype, const Tokens& from, const Problem& problem, int64_t first, int count,
                 int depth, A* to, int64_t row, int64_t column);

// Token first + i, element d = from[i * row + d * column] * factor.
template <typename A>
void write_tokens(Dtype dtype, const Tokens& to, const Problem& problem, int64_t first, int count,
                  int depth, const A* from, int64_t row, int64_t column, A factor);

}  // namespace mafnet
