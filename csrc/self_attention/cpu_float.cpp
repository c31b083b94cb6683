// self_attention with sums and products in float or double, on the vectors of any CPU:
// out = sum_k exp(s_k - m) v_k / sum_k exp(s_k - m), s = q k^T scale, with m the largest score so
// far; when a block of keys brings a larger one, the sums before it shrink by exp(m - m').
//
// Backward, from the lse of the forward: p = exp(s - lse), grad_v = p^T grad_out,
// ds = p (grad_out v^T - rowsum(grad_out out)), grad_q = ds k scale, grad_k = ds^T q scale.
//
// The matrix products are those of modulated_deform_conv2d: tiles of sums in registers over blocks
// that lie in the second cache.
#include "common/gemm.h"
#include "self_attention/driver.h"
#include "self_attention/engines.h"
#include "self_attention/exp.h"

namespace mafnet {
namespace {

// A block of keys with their values: key^T [depth][kKeys], value [kKeys][value_depth]; for the
// backward also key [kKeys][depth] and value^T [value_depth][kKeys].
template <typename A>
struct KeyBlock {
  A *key_t, *value, *key, *value_t;
};

// A block of queries in the backward: query [kQueries][depth], grad_out [kQueries][value_depth],
// lse and rowsum(grad_out * out) [kQueries].
template <typename A>
struct QueryBlock {
  A *query, *grad_out, *lse, *delta;
};

template <typename A, bool kBackward>
class FloatEngine {
 public:
  using Sum = A;
  // Multiples of every tile height of gemm.h, so that no product leaves its block. 48 x 192 scores
  // are 36 kB of a first cache.
  static constexpr int kQueries = (kBackward ? 4 : 2) * kRowPad, kKeys = 8 * kRowPad;
  static constexpr int kKeyBlocks = 2;

  explicit FloatEngine(const SelfAttentionParams& params)
      : p_(params),
        depth_(round_up(params.depth, kColumnPad)),
        value_depth_(round_up(params.value_depth, kColumnPad)),
        scale_(static_cast<A>(std::abs(params.scale))),
        sign_(params.scale < 0 ? A(-1) : A(1)) {}

  struct Scratch {
    explicit Scratch(const FloatEngine& e)
        : query(kQueries * e.depth_),
          score(kQueries * kKeys),
          grad_score(kBackward ? kQueries * kKeys : 0),
          out(kQueries * e.value_depth_),
          grad_key(kBackward ? kKeyBlocks * kKeys * e.depth_ : 0),
          grad_value(kBackward ? kKeyBlocks * kKeys * e.value_depth_ : 0) {}
    Buffer<A> query, score, grad_score, out, grad_key, grad_value;
    A largest[kQueries], sum[kQueries];
    int queries = 0;
    bool all_keys = false;
  };

  size_t key_bytes() const {
    const int row = p_.depth + value_depth_ + (kBackward ? depth_ + p_.value_depth : 0);
    return sizeof(A) * kKeys * row;
  }

  void pack_keys(const Problem& problem, int64_t first, int count, std::byte* to) const {
    std::memset(to, 0, key_bytes());
    const KeyBlock<A> k = keys_at(to);
    read_tokens(p_.dtype, p_.key, problem, first, count, p_.depth, k.key_t, 1, kKeys);
    read_tokens(p_.dtype, p_.value, problem, first, count, p_.value_depth, k.value, value_depth_,
                1);
    if constexpr (!kBackward) return;
    read_tokens(p_.dtype, p_.key, problem, first, count, p_.depth, k.key, depth_, 1);
    read_tokens(p_.dtype, p_.value, problem, first, count, p_.value_depth, k.value_t, 1, kKeys);
  }

  // ------------------------------------------------------------------------------------- forward

  void start(const Problem& problem, int64_t first, int count, Scratch& s) const {
    s.queries = count;
    read_query(problem, first, count, s.query.data());
    std::fill_n(s.out.data(), s.out.size(), A(0));
    std::fill_n(s.largest, kQueries, -std::numeric_limits<A>::infinity());
    std::fill_n(s.sum, kQueries, A(0));
  }

  void attend(const std::byte* packed, int count, Scratch& s) const {
    const KeyBlock<A> k = keys_at(const_cast<std::byte*>(packed));
    A* score = s.score.data();
    const int padded = round_up(count, kColumnPad);
    multiply({s.query.data(), depth_, 1}, k.key_t, kKeys, s.queries, p_.depth, padded, score, kKeys,
             false);
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for (int q = 0; q < s.queries; ++q) {
        A* row = score + q * kKeys;
        std::fill(row + count, row + padded, -std::numeric_limits<A>::infinity());
        take_row<decltype(level)>(row, padded, s.out.data() + q * value_depth_, s.largest[q],
                                  s.sum[q]);
      }
    });
    multiply({score, kKeys, 1}, k.value, value_depth_, s.queries, count, value_depth_, s.out.data(),
             value_depth_, true);
  }

  void finish(const Problem& problem, int64_t first, Scratch& s) const {
    for (int q = 0; q < s.queries; ++q) {
      A* out = s.out.data() + q * value_depth_;
      // Where there are keys, a sum of 0 is that of scores of -inf alone, whose softmax is NaN.
      const A inverse = problem.keys > 0 ? 1 / s.sum[q] : A(0);
      for (int d = 0; d < p_.value_depth; ++d) out[d] *= inverse;
      const A log = std::log(s.sum[q]);
      s.sum[q] = std::isinf(log) ? log : s.largest[q] * scale_ + log;
    }
    write_tokens(kLseDtype, lse_tokens(), problem, first, s.queries, 1, s.sum, 1, 1, A(1));
    write_tokens(p_.dtype, p_.out, problem, first, s.queries, p_.value_depth, s.out.data(),
                 value_depth_, 1, A(1));
  }

  // ------------------------------------------------------------------------------------ backward

  size_t query_bytes() const { return sizeof(A) * kQueries * (depth_ + value_depth_ + 2); }
  int64_t grad_query_size() const { return int64_t{kQueries} * depth_; }

  void pack_queries(const Problem& problem, int64_t first, int count, std::byte* to) const {
    std::memset(to, 0, query_bytes());
    const QueryBlock<A> q = queries_at(to);
    read_query(problem, first, count, q.query);
    read_tokens(p_.dtype, p_.grad_out, problem, first, count, p_.value_depth, q.grad_out,
                value_depth_, 1);
    read_tokens(kLseDtype, lse_tokens(), problem, first, count, 1, q.lse, 1, 1);
    Buffer<A> out(static_cast<size_t>(count) * p_.value_depth, false);
    read_tokens(p_.dtype, p_.out, problem, first, count, p_.value_depth, out.data(), p_.value_depth,
                1);
    for (int i = 0; i < count; ++i) {
      A sum = 0;
      for (int d = 0; d < p_.value_depth; ++d) {
        sum += q.grad_out[i * value_depth_ + d] * out.data()[i * p_.value_depth + d];
      }
      q.delta[i] = sum;
    }
  }

  void start_keys(const Problem& problem, Scratch& s) const {
    s.all_keys = problem.keys <= kKeys;
    std::fill_n(s.grad_key.data(), s.grad_key.size(), A(0));
    std::fill_n(s.grad_value.data(), s.grad_value.size(), A(0));
  }

  void differentiate(const std::byte* key, int keys, const std::byte* query, int queries,
                     A* grad_query, int slot, Scratch& s) const {
    const KeyBlock<A> k = keys_at(const_cast<std::byte*>(key));
    const QueryBlock<A> q = queries_at(const_cast<std::byte*>(query));
    const int padded = round_up(keys, kColumnPad);
    A *score = s.score.data(), *grad_score = s.grad_score.data();
    multiply({q.query, depth_, 1}, k.key_t, kKeys, queries, p_.depth, padded, score, kKeys, false);
    multiply({q.grad_out, value_depth_, 1}, k.value_t, kKeys, queries, p_.value_depth, padded,
             grad_score, kKeys, false);
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for (int i = 0; i < queries; ++i) {
        take_gradients<decltype(level)>(score + i * kKeys, grad_score + i * kKeys, keys, q.lse[i],
                                        s.all_keys ? nullptr : q.delta + i);
      }
    });
    multiply({score, 1, kKeys}, q.grad_out, value_depth_, keys, queries, value_depth_,
             grad_value_of(s, slot), value_depth_, true);
    multiply({grad_score, 1, kKeys}, q.query, depth_, keys, queries, depth_, grad_key_of(s, slot),
             depth_, true);
    multiply({grad_score, kKeys, 1}, k.key, depth_, queries, keys, depth_, grad_query, depth_,
             true);
  }

  void finish_keys(const Problem& problem, int64_t first, int count, int slot, Scratch& s) const {
    write_tokens(p_.dtype, p_.grad_key, problem, first, count, p_.depth, grad_key_of(s, slot),
                 depth_, 1, scale_);
    write_tokens(p_.dtype, p_.grad_value, problem, first, count, p_.value_depth,
                 grad_value_of(s, slot), value_depth_, 1, A(1));
  }

  void write_grad_query(const Problem& problem, int64_t first, int count, const A* sum) const {
    write_tokens(p_.dtype, p_.grad_query, problem, first, count, p_.depth, sum, depth_, 1,
                 sign_ * scale_);
  }

 private:
  static constexpr Dtype kLseDtype = std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32;

  A* grad_key_of(Scratch& s, int slot) const { return s.grad_key.data() + slot * kKeys * depth_; }
  A* grad_value_of(Scratch& s, int slot) const {
    return s.grad_value.data() + slot * kKeys * value_depth_;
  }

  Tokens lse_tokens() const { return {p_.lse, {p_.heads * p_.queries, p_.queries, 1, 1}}; }

  KeyBlock<A> keys_at(std::byte* bytes) const {
    KeyBlock<A> k{};
    k.key_t = reinterpret_cast<A*>(bytes);
    k.value = k.key_t + kKeys * p_.depth;
    k.key = k.value + kKeys * value_depth_;
    k.value_t = k.key + kKeys * depth_;
    return k;
  }

  QueryBlock<A> queries_at(std::byte* bytes) const {
    QueryBlock<A> q{};
    q.query = reinterpret_cast<A*>(bytes);
    q.grad_out = q.query + kQueries * depth_;
    q.lse = q.grad_out + kQueries * value_depth_;
    q.delta = q.lse + kQueries;
    return q;
  }

  // With the sign of the scale, which then is positive: the largest score has the largest weight.
  void read_query(const Problem& problem, int64_t first, int count, A* to) const {
    read_tokens(p_.dtype, p_.query, problem, first, count, p_.depth, to, depth_, 1);
    if (sign_ > 0) return;
    for (int64_t i = 0; i < int64_t{count} * depth_; ++i) to[i] = -to[i];
  }

  // Turns a row of scores into weights, adds them to `sum`, and shrinks what there was before where
  // the largest score grew.
  template <typename L>
  MAFNET_INLINE void take_row(A* row, int count, A* out, A& largest, A& sum) const {
    using V = WideOf<L, A>;
    constexpr int kLanes = sizeof(V) / sizeof(A);
    V most = load<V>(row);
    for (int j = kLanes; j < count; j += kLanes) {
      const V x = load<V>(row + j);
      most = larger_of(most, x);
    }
    const A now =
        std::max(largest, fold<A>(most, [](const auto& a, const auto& b)
                                            MAFNET_INLINE_LAMBDA { return a < b ? b : a; }));
    // Scores of -inf have the weight 0, also while there is no other.
    const A base = std::isinf(now) && now < 0 ? A(0) : now;
    const A factor = slope_ * kPowerFactor<A>;
    if (now != largest) {
      const A shrink = largest == -std::numeric_limits<A>::infinity()
                           ? A(0)
                           : std::exp((largest - base) * slope_);
      for (int d = 0; d < value_depth_; ++d) out[d] *= shrink;
      sum *= shrink;
      largest = now;
    }
    V total{};
    for (int j = 0; j < count; j += kLanes) {
      const V weight = power(V((load<V>(row + j) - base) * factor));
      store(row + j, weight);
      total += weight;
    }
    sum += fold<A>(total, [](const auto& a, const auto& b) MAFNET_INLINE_LAMBDA { return a + b; });
  }

  // Turns a row of scores into weights, and the gradients of the weights into those of the scores.
  // Where the row holds all keys, delta is not given: summed up from the weights it does not have
  // the rounding of the stored out, which few keys do not average away.
  template <typename L>
  MAFNET_INLINE void take_gradients(A* row, A* grad, int keys, A lse, const A* delta) const {
    using V = WideOf<L, A>;
    constexpr int kLanes = sizeof(V) / sizeof(A);
    const int padded = round_up(keys, kColumnPad);
    for (int j = 0; j < padded; j += kLanes) {
      store(row + j, V(power(V((load<V>(row + j) * scale_ - lse) * kPowerFactor<A>))));
    }
    std::fill(row + keys, row + padded, A(0));
    A mean = 0;
    if (delta != nullptr) {
      mean = *delta;
    } else {
      for (int j = 0; j < keys; ++j) mean += row[j] * grad[j];
    }
    for (int j = 0; j < padded; j += kLanes) {
      store(grad + j, V(load<V>(row + j) * (load<V>(grad + j) - mean)));
    }
  }

  const SelfAttentionParams& p_;
  const int depth_, value_depth_;
  const A scale_, sign_;
  // Not 0, so that scores of -inf, which stand for keys past the end, keep the weight 0.
  const A slope_ = std::max(scale_, std::numeric_limits<A>::min());
};

}  // namespace

void self_attention_forward_float(const SelfAttentionParams& p) {
  if (p.dtype == Dtype::kFloat64) return run_forward<FloatEngine<double, false>>(p);
  run_forward<FloatEngine<float, false>>(p);
}

void self_attention_backward_float(const SelfAttentionParams& p) {
  if (p.dtype == Dtype::kFloat64) return run_backward<FloatEngine<double, true>>(p);
  run_backward<FloatEngine<float, true>>(p);
}

}  // namespace mafnet
