// self_attention with its products in bfloat16 (tiles.h): the formulas of cpu_float.cpp, turned
// round. Scores are computed as key x query, so that a vector holds the scores of 16 queries with
// one key: largest scores, sums, lse and delta are vectors, and weights leave their registers in
// the order that the next product reads.
#include "common/gemm_bf16.h"
#include "common/parallel.h"
#include "self_attention/driver.h"
#include "self_attention/engines.h"
#include "self_attention/tile_weights.h"
#include "self_attention/tiles.h"

#if defined(MAFNET_HAS_BF16)

#include <atomic>
#include <cmath>

namespace mafnet {
namespace {

int tiles_of(int count, int size) { return (count + size - 1) / size; }

template <int kPieces, bool kBackward>
class TileEngine {
 public:
  using Sum = float;
  // 32 queries at a time, whose scores and weights for 128 keys stay in the first cache. Packed
  // floats of thousands of tokens do not fit the second cache: each block of keys that is fetched
  // serves 512 queries, and in the backward each block of queries 512 keys.
  static constexpr int kQueries = kBackward ? 128 : 512, kKeys = 128, kTogether = 32;
  static constexpr int kKeyBlocks = 4;

  explicit TileEngine(const SelfAttentionParams& params)
      : p_(params),
        score_plan_(params.depth, kPieces),
        value_plan_(params.value_depth, kPieces),
        token_steps_(token_steps(kKeys / kTileDepth, kPieces)),
        depth_(tiles_of(params.depth, kTile)),
        value_depth_(tiles_of(params.value_depth, kTile)) {}

  struct Scratch {
    explicit Scratch(const TileEngine& e)
        : numbers(std::max(kKeys, kQueries) * kTile * std::max(e.depth_, e.value_depth_)),
          query(e.score_plan_.tiles * kQueryTiles * kTileFactors),
          score(kKeys * kTogether),
          grad_score(kBackward ? kKeys * kTogether : 0),
          weight_b(kWeights),
          weight_a(kBackward ? kWeights : 0),
          grad_score_a(kBackward ? kWeights : 0),
          out(e.value_depth_ * kTile * kQueries),
          grad_key(kBackward ? kKeyBlocks * e.depth_ * kTile * kKeys : 0),
          grad_value(kBackward ? kKeyBlocks * e.value_depth_ * kTile * kKeys : 0) {}

    static constexpr int kWeights = kKeys * (kBackward ? kQueries : kTogether) * kPieces;
    Buffer<float> numbers;
    Buffer<uint16_t> query;
    Buffer<float> score, grad_score;
    Buffer<uint16_t> weight_b, weight_a, grad_score_a;  // weight_b: grad_score in the backward
    Buffer<float> out;                                  // tiles [query][depth]
    Buffer<float> grad_key, grad_value;                 // tiles [depth][key]
    alignas(64) float largest[kQueries], sum[kQueries];
    int queries = 0;
    TileRegisters registers;
  };

  // key as A, value^T as A over tokens; for the backward key and value as A, key^T over tokens.
  size_t key_bytes() const {
    const int of_tokens = (kBackward ? depth_ : value_depth_) * kTokenTiles;
    const int values = kBackward ? value_plan_.tiles * kKeyTiles : 0;
    return sizeof(uint16_t) * kTileFactors * (score_plan_.tiles * kKeyTiles + values + of_tokens);
  }

  void pack_keys(const Problem& problem, int64_t first, int count, std::byte* to) const {
    std::memset(to, 0, key_bytes());
    auto* key = reinterpret_cast<uint16_t*>(to);
    uint16_t* value = key + score_plan_.tiles * kKeyTiles * kTileFactors;
    Buffer<float> numbers(kKeys * kTile * std::max(depth_, value_depth_), false);
    float* rows = numbers.data();
    read_tokens(p_.dtype, p_.key, problem, first, count, p_.depth, rows, p_.depth, 1);
    pack_a(rows, p_.depth, count, score_plan_, p_.depth, key);
    if constexpr (kBackward) {
      uint16_t* turned = value + value_plan_.tiles * kKeyTiles * kTileFactors;
      read_tokens(p_.dtype, p_.key, problem, first, count, p_.depth, rows, 1, kKeys);
      pack_a_tokens(rows, kKeys, p_.depth, count, kPieces, kTokenTiles, turned);
      read_tokens(p_.dtype, p_.value, problem, first, count, p_.value_depth, rows, p_.value_depth,
                  1);
      pack_a(rows, p_.value_depth, count, value_plan_, p_.value_depth, value);
    } else {
      read_tokens(p_.dtype, p_.value, problem, first, count, p_.value_depth, rows, 1, kKeys);
      pack_a_tokens(rows, kKeys, p_.value_depth, count, kPieces, kTokenTiles, value);
    }
  }

  // ------------------------------------------------------------------------------------- forward

  void start(const Problem& problem, int64_t first, int count, Scratch& s) const {
    s.queries = count;
    pack_query(problem, first, count, s.numbers.data(), s.query.data());
    std::fill_n(s.out.data(), s.out.size(), 0.0f);
    std::fill_n(s.largest, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(s.sum, kQueries, 0.0f);
  }

  void attend(const std::byte* packed, int count, Scratch& s) const {
    const auto* key = reinterpret_cast<const uint16_t*>(packed);
    const uint16_t* value = key + score_plan_.tiles * kKeyTiles * kTileFactors;
    const int depth_tiles = tiles_of(count, kTileDepth);
    for (int q = 0; q < s.queries; q += kTogether) {
      multiply_scores(key, score_plan_, s.query.data(), q, depth_tiles, s.score.data());
      for (int n = 0; n < kTogether / kTile; ++n) {
        const int at = q + n * kTile;
        hide_keys(s.score.data() + n * kKeys * kTile, count, depth_tiles * kTileDepth);
        const WeightsOf of{s.score.data() + n * kKeys * kTile, depth_tiles * kTileDepth,
                           s.out.data() + at * value_depth_ * kTile, value_depth_ * kTile};
        take_weights<kPieces>(of, slope_, s.largest + at, s.sum + at,
                              s.weight_b.data() + n * kTileFactors,
                              kTogether / kTile * kTileFactors);
      }
      const TileMatrix a{value, kTokenTiles * kTileFactors, kTileFactors};
      const TileMatrix b{s.weight_b.data(), kTileFactors, kTogether / kTile * kTileFactors};
      const TileSums c{s.out.data() + q * value_depth_ * kTile, kTileSums,
                       value_depth_ * kTileSums};
      multiply_tiles(a, b, steps_of(depth_tiles), value_depth_, kTogether / kTile, c, true);
    }
  }

  void finish(const Problem& problem, int64_t first, Scratch& s) const {
    float* flat = s.numbers.data();  // [depth][kQueries]
    for (int q = 0; q < s.queries; ++q) {
      const float* out = s.out.data() + q / kTile * value_depth_ * kTileSums + q % kTile;
      // Where there are keys, a sum of 0 is that of scores of -inf alone, whose softmax is NaN.
      const float inverse = problem.keys > 0 ? 1 / s.sum[q] : 0.0f;
      for (int d = 0; d < p_.value_depth; ++d) flat[d * kQueries + q] = out[d * kTile] * inverse;
      const float log = std::log(s.sum[q]);
      s.sum[q] = std::isinf(log) ? log : s.largest[q] * scale_ + log;
    }
    write_tokens(Dtype::kFloat32, lse_tokens(), problem, first, s.queries, 1, s.sum, 1, 1, 1.0f);
    write_tokens(p_.dtype, p_.out, problem, first, s.queries, p_.value_depth, flat, 1, kQueries,
                 1.0f);
  }

  // ------------------------------------------------------------------------------------ backward

  // query and grad_out as B, both as B over tokens, lse and rowsum(grad_out * out).
  size_t query_bytes() const {
    const int tiles = (score_plan_.tiles + value_plan_.tiles) * kQueryTiles +
                      (depth_ + value_depth_) * kTokenTiles;
    return sizeof(uint16_t) * kTileFactors * tiles + sizeof(float) * 2 * kQueries;
  }
  int64_t grad_query_size() const { return int64_t{kQueries} * depth_ * kTile; }

  void pack_queries(const Problem& problem, int64_t first, int count, std::byte* to) const {
    std::memset(to, 0, query_bytes());
    const QueryBlock block = queries_at(to);
    const int row = kTile * std::max(depth_, value_depth_);
    Buffer<float> numbers(kQueries * row), out(kQueries * row, false);
    float* rows = numbers.data();
    pack_query(problem, first, count, rows, block.query);
    numbers.resize(numbers.size());
    read_query(problem, first, count, rows, depth_ * kTile, 1);
    pack_b_tokens(rows, depth_ * kTile, count, depth_ * kTile, kPieces, block.query_tokens);
    numbers.resize(numbers.size());
    read_tokens(p_.dtype, p_.grad_out, problem, first, count, p_.value_depth, rows, 1, kQueries);
    pack_b(rows, kQueries, kQueries, value_plan_, p_.value_depth, block.grad_out);
    read_tokens(p_.dtype, p_.out, problem, first, count, p_.value_depth, out.data(), 1, kQueries);
    for (int d = 0; d < p_.value_depth; ++d) {
      for (int i = 0; i < count; ++i) {
        block.delta[i] += rows[d * kQueries + i] * out.data()[d * kQueries + i];
      }
    }
    read_tokens(Dtype::kFloat32, lse_tokens(), problem, first, count, 1, block.lse, 1, 1);
    numbers.resize(numbers.size());
    read_tokens(p_.dtype, p_.grad_out, problem, first, count, p_.value_depth, rows,
                value_depth_ * kTile, 1);
    pack_b_tokens(rows, value_depth_ * kTile, count, value_depth_ * kTile, kPieces,
                  block.grad_out_tokens);
  }

  void start_keys(const Problem&, Scratch& s) const {
    std::fill_n(s.grad_key.data(), s.grad_key.size(), 0.0f);
    std::fill_n(s.grad_value.data(), s.grad_value.size(), 0.0f);
  }

  void differentiate(const std::byte* packed, int keys, const std::byte* query, int queries,
                     float* grad_query, int slot, Scratch& s) const {
    const auto* key = reinterpret_cast<const uint16_t*>(packed);
    const uint16_t* value = key + score_plan_.tiles * kKeyTiles * kTileFactors;
    const uint16_t* turned = value + value_plan_.tiles * kKeyTiles * kTileFactors;
    const QueryBlock block = queries_at(const_cast<std::byte*>(query));
    const int depth_tiles = tiles_of(keys, kTileDepth);
    const int query_tiles = tiles_of(queries, kTogether);  // pairs of them
    for (int i = 0; i < query_tiles; ++i) {
      multiply_scores(key, score_plan_, block.query, i * kTogether, depth_tiles, s.score.data());
      multiply_scores(value, value_plan_, block.grad_out, i * kTogether, depth_tiles,
                      s.grad_score.data());
      for (int n = 0; n < kTogether / kTile; ++n) {
        hide_keys(s.score.data() + n * kKeys * kTile, keys, depth_tiles * kTileDepth);
      }
      const GradientsOf of{s.score.data(),
                           s.grad_score.data(),
                           kKeys * kTile,
                           depth_tiles * kTileDepth,
                           slope_,
                           block.lse + i * kTogether,
                           block.delta + i * kTogether};
      take_gradients<kPieces>(
          of, s.weight_a.data() + i * kPieces * kTileFactors,
          s.grad_score_a.data() + i * kPieces * kTileFactors, kTokenTiles * kTileFactors,
          s.weight_b.data() + i * kTogether / kTile * kTileFactors, kQueryTiles * kTileFactors);
    }
    const Steps along_queries = steps_of(query_tiles);
    const TileMatrix weight{s.weight_a.data(), kTokenTiles * kTileFactors, kTileFactors};
    const TileMatrix grad_score{s.grad_score_a.data(), kTokenTiles * kTileFactors, kTileFactors};
    multiply_tiles(weight, {block.grad_out_tokens, kTileFactors, value_depth_ * kTileFactors},
                   along_queries, 2 * depth_tiles, value_depth_,
                   {grad_value_of(s, slot), kTileSums, kKeyTiles * kTileSums}, true);
    multiply_tiles(grad_score, {block.query_tokens, kTileFactors, depth_ * kTileFactors},
                   along_queries, 2 * depth_tiles, depth_,
                   {grad_key_of(s, slot), kTileSums, kKeyTiles * kTileSums}, true);
    multiply_tiles({turned, kTokenTiles * kTileFactors, kTileFactors},
                   {s.weight_b.data(), kTileFactors, kQueryTiles * kTileFactors},
                   steps_of(depth_tiles), depth_, 2 * query_tiles,
                   {grad_query, kQueryTiles * kTileSums, kTileSums}, true);
  }

  void finish_keys(const Problem& problem, int64_t first, int count, int slot, Scratch& s) const {
    // Tiles [depth][key] are rows of 16 numbers: key + 128 * (depth / 16), then depth % 16.
    write_tiles(p_.grad_key, problem, first, count, p_.depth, grad_key_of(s, slot), scale_, s);
    write_tiles(p_.grad_value, problem, first, count, p_.value_depth, grad_value_of(s, slot), 1, s);
  }

  // Tiles [depth][query] of depth x query are lines of 16 queries.
  void write_grad_query(const Problem& problem, int64_t first, int count, const float* sum) const {
    Buffer<float> flat(kQueries * depth_ * kTile, false);
    for (int d = 0; d < p_.depth; ++d) {
      for (int q = 0; q < count; ++q) {
        const int64_t tile = d / kTile * kQueryTiles + q / kTile;
        flat.data()[d * kQueries + q] = sum[tile * kTileSums + d % kTile * kTile + q % kTile];
      }
    }
    write_tokens(p_.dtype, p_.grad_query, problem, first, count, p_.depth, flat.data(), 1, kQueries,
                 static_cast<float>(p_.scale));
  }

 private:
  static constexpr int kKeyTiles = kKeys / kTile, kQueryTiles = kQueries / kTile;
  static constexpr int kTokenTiles = kKeys / kTileDepth * kPieces;
  static_assert(!kBackward || kKeys == kQueries, "one list of steps serves both");

  float* grad_key_of(Scratch& s, int slot) const {
    return s.grad_key.data() + slot * depth_ * kTile * kKeys;
  }
  float* grad_value_of(Scratch& s, int slot) const {
    return s.grad_value.data() + slot * value_depth_ * kTile * kKeys;
  }

  struct QueryBlock {
    uint16_t *query, *grad_out, *query_tokens, *grad_out_tokens;
    float *lse, *delta;
  };

  QueryBlock queries_at(std::byte* bytes) const {
    QueryBlock q{};
    q.query = reinterpret_cast<uint16_t*>(bytes);
    q.grad_out = q.query + score_plan_.tiles * kQueryTiles * kTileFactors;
    q.query_tokens = q.grad_out + value_plan_.tiles * kQueryTiles * kTileFactors;
    q.grad_out_tokens = q.query_tokens + depth_ * kTokenTiles * kTileFactors;
    q.lse = reinterpret_cast<float*>(q.grad_out_tokens + value_depth_ * kTokenTiles * kTileFactors);
    q.delta = q.lse + kQueries;
    return q;
  }

  Tokens lse_tokens() const { return {p_.lse, {p_.heads * p_.queries, p_.queries, 1, 1}}; }

  Steps steps_of(int depth_tiles) const {
    const int count = static_cast<int>(token_steps_.size()) / (kKeys / kTileDepth) * depth_tiles;
    return {token_steps_.data(), count, count * kTileDepth};
  }

  // With the sign of the scale, which then is positive: the largest score has the largest weight.
  void read_query(const Problem& problem, int64_t first, int count, float* to, int64_t row,
                  int64_t column) const {
    read_tokens(p_.dtype, p_.query, problem, first, count, p_.depth, to, row, column);
    if (p_.scale >= 0) return;
    for (int d = 0; d < p_.depth; ++d) {
      for (int i = 0; i < count; ++i) to[i * row + d * column] *= -1;
    }
  }

  void pack_query(const Problem& problem, int64_t first, int count, float* numbers,
                  uint16_t* to) const {
    std::fill_n(numbers, kQueries * p_.depth, 0.0f);
    read_query(problem, first, count, numbers, 1, kQueries);
    pack_b(numbers, kQueries, kQueries, score_plan_, p_.depth, to);
  }

  // 32 queries from `first` on with all keys, as lines of 16 queries for each key.
  void multiply_scores(const uint16_t* key, const DepthPlan& plan, const uint16_t* query, int first,
                       int depth_tiles, float* score) const {
    const TileMatrix a{key, plan.tiles * kTileFactors, kTileFactors};
    const TileMatrix b{query + first / kTile * kTileFactors, kTileFactors,
                       kQueryTiles * kTileFactors};
    const Steps steps{plan.steps.data(), static_cast<int>(plan.steps.size()), plan.factors};
    multiply_tiles(a, b, steps, 2 * depth_tiles, kTogether / kTile,
                   {score, kTileSums, kKeys * kTile}, false);
  }

  static void hide_keys(float* score, int count, int padded) {
    std::fill(score + count * kTile, score + padded * kTile,
              -std::numeric_limits<float>::infinity());
  }

  void write_tiles(const Tokens& to, const Problem& problem, int64_t first, int count, int depth,
                   const float* sums, float factor, Scratch& s) const {
    float* flat = s.numbers.data();
    for (int i = 0; i < count; ++i) {
      for (int d = 0; d < depth; ++d) {
        flat[i * depth + d] = sums[(d / kTile * kKeys + i) * kTile + d % kTile];
      }
    }
    write_tokens(p_.dtype, to, problem, first, count, depth, flat, depth, 1, factor);
  }

  const SelfAttentionParams& p_;
  const DepthPlan score_plan_, value_plan_;
  const std::vector<Step> token_steps_;
  const int depth_, value_depth_;  // tiles of 16
  const float scale_ = static_cast<float>(std::abs(p_.scale));
  // Not 0, so that scores of -inf, which stand for keys past the end, keep the weight 0.
  const float slope_ = std::max(scale_, std::numeric_limits<float>::min());
};

// The largest magnitude among the numbers of a tensor, NaN where there is one.
float largest_of(const SelfAttentionParams& p, const Tokens& tokens, int64_t count, int depth) {
  constexpr int kBlock = 256;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  SelfAttentionParams whole{};  // no windows
  whole.heads = p.heads;
  whole.queries = whole.keys = count;
  std::atomic<uint32_t> largest{0};  // bits: those of NaN are larger than all
  parallel_for(0, p.batch * p.heads * blocks, 8, [&](int64_t begin, int64_t end) {
    Buffer<float> numbers(static_cast<size_t>(kBlock) * depth, false);
    uint32_t most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock;
      const int here = static_cast<int>(std::min<int64_t>(kBlock, count - first));
      read_tokens(p.dtype, tokens, make_problem(whole, i / blocks), first, here, depth,
                  numbers.data(), depth, 1);
      with_simd([&]() MAFNET_INLINE_LAMBDA {
        for (int64_t j = 0; j < int64_t{here} * depth; ++j) {
          uint32_t bits;
          std::memcpy(&bits, numbers.data() + j, sizeof(bits));
          most = std::max(most, bits & 0x7fffffff);
        }
      });
    }
    uint32_t seen = largest.load();
    while (most > seen && !largest.compare_exchange_weak(seen, most)) {
    }
  });
  const uint32_t bits = largest;
  float most;
  std::memcpy(&most, &bits, sizeof(most));
  return most;
}

// Whether pieces of bfloat16 hold all digits of numbers up to `most`: pieces of infinity are NaN,
// and small ones are flushed to 0.
bool in_range(float most) { return most == 0 || (most >= 0x1p-50f && most <= 0x1p36f); }

// Whether no piece of a gradient is flushed: it is a product of these, the numbers at the other end
// and a weight, of which 24 digits are to stay above 2^-126.
bool gradient_in_range(float value, float grad_out, float other) {
  const double most = double{value} * grad_out * other;
  return most == 0 || most >= 0x1p-80;
}

// A product takes 32 keys and 32 queries, needed or not.
constexpr int64_t kFewTokens = 24;

}  // namespace

bool tiles_serve(const SelfAttentionParams& p) {
  if (!has_bf16_products() || p.dtype == Dtype::kFloat64) return false;
  if (std::min(most_tokens(p, p.queries), most_tokens(p, p.keys)) < kFewTokens) return false;
  if (p.value_depth == 0) return false;
  // A bfloat16 is its only piece, whatever it is.
  if (p.dtype == Dtype::kBFloat16) return true;
  // Four or six products of pieces are dearer than one in float, unless by tile registers.
  if (!has_tile_registers()) return false;
  const float query = largest_of(p, p.query, p.queries, p.depth);
  const float key = largest_of(p, p.key, p.keys, p.depth);
  const float value = largest_of(p, p.value, p.keys, p.value_depth);
  if (!in_range(query) || !in_range(key) || !in_range(value)) return false;
  if (p.grad_out.data == nullptr) return true;
  const float grad_out = largest_of(p, p.grad_out, p.queries, p.value_depth);
  return in_range(grad_out) && gradient_in_range(value, grad_out, query) &&
         gradient_in_range(value, grad_out, key);
}

void self_attention_forward_tiles(const SelfAttentionParams& p) {
  if (p.dtype == Dtype::kBFloat16) return run_forward<TileEngine<1, false>>(p);
  if (p.dtype == Dtype::kFloat16) return run_forward<TileEngine<2, false>>(p);
  run_forward<TileEngine<3, false>>(p);
}

void self_attention_backward_tiles(const SelfAttentionParams& p) {
  if (p.dtype == Dtype::kBFloat16) return run_backward<TileEngine<1, true>>(p);
  if (p.dtype == Dtype::kFloat16) return run_backward<TileEngine<2, true>>(p);
  run_backward<TileEngine<3, true>>(p);
}

#else

namespace mafnet {

bool tiles_serve(const SelfAttentionParams&) { return false; }
void self_attention_forward_tiles(const SelfAttentionParams&) {}
void self_attention_backward_tiles(const SelfAttentionParams&) {}

#endif

}  // namespace mafnet
