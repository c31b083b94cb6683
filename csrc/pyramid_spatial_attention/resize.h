// Bilinear resizing along one axis, half-pixel centres: which inputs make an output, and which
// outputs an input goes to. Arithmetic as in PyTorch's, in the accumulators' type.
#pragma once

#include <vector>

#include "pyramid_spatial_attention/products.h"

namespace mafnet {

// weight * source[at], a term of a sum.
template <typename A>
struct Term {
  int at;
  A weight;
};

// The terms of every element, one after another.
template <typename A>
class TermLists {
 public:
  TermLists() : begin_{0} {}
  void add(int at, A weight) {
    if (weight != A{0}) terms_.push_back({at, weight});  // 0 * infinity must not contribute
  }
  void finish() { begin_.push_back(static_cast<int>(terms_.size())); }
  const Term<A>* begin(int i) const { return terms_.data() + begin_[i]; }
  const Term<A>* end(int i) const { return terms_.data() + begin_[i + 1]; }
  int count(int i) const { return begin_[i + 1] - begin_[i]; }

 private:
  std::vector<Term<A>> terms_;
  std::vector<int> begin_;
};

// Output element i of `outputs` is made of one or two of `inputs`.
template <typename A>
TermLists<A> resize_terms(int inputs, int outputs) {
  TermLists<A> lists;
  const A scale = static_cast<A>(inputs) / static_cast<A>(outputs);
  for (int i = 0; i < outputs; ++i) {
    const A position = std::max((static_cast<A>(i) + A{0.5}) * scale - A{0.5}, A{0});
    const int low = std::min(static_cast<int>(position), inputs - 1);
    const A fraction = std::min(position - static_cast<A>(low), A{1});
    if (low + 1 < inputs) {
      lists.add(low, A{1} - fraction);
      lists.add(low + 1, fraction);
    } else {
      lists.add(low, A{1});
    }
    lists.finish();
  }
  return lists;
}

// For each of `inputs` elements, where `lists` uses it: the transposed matrix.
template <typename A>
TermLists<A> transposed(const TermLists<A>& lists, int inputs, int outputs) {
  std::vector<std::vector<Term<A>>> uses(static_cast<size_t>(inputs));
  for (int i = 0; i < outputs; ++i) {
    for (const Term<A>* t = lists.begin(i); t != lists.end(i); ++t) {
      uses[t->at].push_back({i, t->weight});
    }
  }
  TermLists<A> result;
  for (const auto& of_one : uses) {
    for (const Term<A>& use : of_one) result.add(use.at, use.weight);
    result.finish();
  }
  return result;
}

// A term whose source has been looked up.
template <typename A, typename T = A>
struct Part {
  const T* from;
  A weight;
};

template <typename L, int kParts, typename A>
MAFNET_INLINE void combine_some(const Part<A>* parts, int count, A* sums, bool add) {
  Part<A> own[kParts];  // which no store of a vector can change
  std::copy_n(parts, kParts, own);
  for_channels<L, A>(count, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    V sum = own[0].weight * load<V>(own[0].from + c);
#pragma GCC unroll 6
    for (int i = 1; i < kParts; ++i) sum += own[i].weight * load<V>(own[i].from + c);
    store<V>(sums + c, add ? load<V>(sums + c) + sum : sum);
  });
}

// sums[0 ... count - 1] = the weighted sum of the parts, in their order; zeros without a part.
template <typename L, typename A>
MAFNET_INLINE void combine(const Part<A>* parts, int number, int count, A* sums) {
  if (number == 0) return std::fill_n(sums, count, A{0}), void();
  for (int first = 0; first < number; first += 6) {
    const Part<A>* some = parts + first;
    const bool add = first > 0;
    switch (std::min(number - first, 6)) {
      case 1:
        combine_some<L, 1>(some, count, sums, add);
        break;
      case 2:
        combine_some<L, 2>(some, count, sums, add);
        break;
      case 3:
        combine_some<L, 3>(some, count, sums, add);
        break;
      case 4:
        combine_some<L, 4>(some, count, sums, add);
        break;
      case 5:
        combine_some<L, 5>(some, count, sums, add);
        break;
      default:
        combine_some<L, 6>(some, count, sums, add);
    }
  }
}

}  // namespace mafnet
