// self_attention with its products in bfloat16 (tiles.h): the formulas of cpu_float.cpp, turned
// round. Scores are computed as key x query, so that a vector holds the scores of 16 queries with
// one key: largest scores, sums, lse and delta are vectors, and weights leave their registers in
// the order that the next product reads.
#include "self_attention/driver.h"
#include "self_attention/engines.h"
#include "self_attention/tile_weights.h"
#include "self_attention/tiles.h"
#include "self_attention/vector_products.h"

#if defined(MAFNET_HAS_BF16)

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
  static constexpr int kHalves = kTogether / kTile;
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
          score(2 * kKeys * kTogether),
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
    if constexpr (kPieces == 1) {
      if (!has_tile_registers()) return attend_by_vectors(packed, count, s);
    }
    const auto* key = reinterpret_cast<const uint16_t*>(packed);
    const int depth_tiles = tiles_of(count, kTileDepth);
    for (int q = 0; q < s.queries; q += kTogether) {
      multiply_scores(key, score_plan_, s.query.data(), q, depth_tiles, score_of(s, q));
      for (int n = 0; n < kHalves; ++n) {
        hide_keys(score_of(s, q) + n * kKeys * kTile, count, depth_tiles * kTileDepth);
        take_weights<kPieces>(weights_of(s, q, n, depth_tiles), slope_);
      }
      multiply_tiles(value_of(key), weight_of(s), steps_of(depth_tiles), value_depth_, kHalves,
                     out_of(s, q), true);
    }
  }

  // The same, with the weights of some queries beside the scores of the next ones, and the largest
  // of these beside the sums of the former.
  MAFNET_TARGET_BF16 void attend_by_vectors(const std::byte* packed, int count, Scratch& s) const {
    const auto* key = reinterpret_cast<const uint16_t*>(packed);
    const int depth_tiles = tiles_of(count, kTileDepth);
    InTurn<Largest, kHalves> largest;
    InTurn<Weights<kPieces>, kHalves> weights;
    NothingBeside nothing;
    take_scores(key, count, 0, nothing, largest, s);
    for (int q = 0; q < s.queries; q += kTogether) {
      largest.rest();
      for (int n = 0; n < kHalves; ++n) {
        weights.work[n].begin(weights_of(s, q, n, depth_tiles), largest.work[n].get(), slope_);
      }
      weights.at = 0;
      if (q + kTogether < s.queries) {
        take_scores(key, count, q + kTogether, weights, largest, s);
      }
      weights.rest();
      for (auto& each : weights.work) each.end();
      multiply_tiles_beside(value_of(key), weight_of(s), steps_of(depth_tiles), value_depth_,
                            kHalves, out_of(s, q), true, largest);
    }
  }

  void finish(const Problem& problem, int64_t first, Scratch& s) const {
    float* flat = s.numbers.data();  // [depth][kQueries]
    for (int q = 0; q < s.queries; q += kTile) {
      float inverse[kTile];
      for (int i = 0; i < kTile; ++i) {
        // Where there are keys, a sum of 0 is that of scores of -inf alone, whose softmax is NaN.
        inverse[i] = problem.keys > 0 ? 1 / s.sum[q + i] : 0.0f;
        const float log = std::log(s.sum[q + i]);
        s.sum[q + i] = std::isinf(log) ? log : s.largest[q + i] * scale_ + log;
      }
      const float* out = s.out.data() + q * value_depth_ * kTile;
      for (int d = 0; d < p_.value_depth; ++d) {
        for (int i = 0; i < kTile; ++i)
          flat[d * kQueries + q + i] = out[d * kTile + i] * inverse[i];
      }
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
      for (int n = 0; n < kHalves; ++n) {
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
          s.weight_b.data() + i * kHalves * kTileFactors, kQueryTiles * kTileFactors);
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

  static Steps steps_of(const DepthPlan& plan) {
    return {plan.steps.data(), static_cast<int>(plan.steps.size()), plan.factors};
  }
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
    multiply_tiles(a, query_of(query, first), steps_of(plan), 2 * depth_tiles, kHalves,
                   {score, kTileSums, kKeys * kTile}, false);
  }

  // Of the queries from q on; those of the next ones have another place.
  static float* score_of(Scratch& s, int q) {
    return s.score.data() + q / kTogether % 2 * kKeys * kTogether;
  }
  TileMatrix query_of(const uint16_t* query, int q) const {
    return {query + q / kTile * kTileFactors, kTileFactors, kQueryTiles * kTileFactors};
  }
  TileMatrix value_of(const uint16_t* key) const {
    return {key + score_plan_.tiles * kKeyTiles * kTileFactors, kTokenTiles * kTileFactors,
            kTileFactors};
  }
  static TileMatrix weight_of(const Scratch& s) {
    return {s.weight_b.data(), kTileFactors, kHalves * kTileFactors};
  }
  TileSums out_of(Scratch& s, int q) const {
    return {s.out.data() + q * value_depth_ * kTile, kTileSums, value_depth_ * kTileSums};
  }

  // n: which 16 of the queries from q on.
  WeightsOf weights_of(Scratch& s, int q, int n, int depth_tiles) const {
    const int at = q + n * kTile;
    return {score_of(s, q) + n * kKeys * kTile,
            depth_tiles * kTileDepth,
            s.out.data() + at * value_depth_ * kTile,
            value_depth_ * kTile,
            s.largest + at,
            s.sum + at,
            s.weight_b.data() + n * kTileFactors,
            kHalves * kTileFactors};
  }

  // Scores of the queries from q on, of which `largest` is to be taken, with other work beside.
  template <typename Beside>
  MAFNET_TARGET_BF16 void take_scores(const uint16_t* key, int count, int q, Beside& beside,
                                      InTurn<Largest, kHalves>& largest, Scratch& s) const {
    const int depth_tiles = tiles_of(count, kTileDepth);
    float* score = score_of(s, q);
    multiply_tiles_beside({key, score_plan_.tiles * kTileFactors, kTileFactors},
                          query_of(s.query.data(), q), steps_of(score_plan_), 2 * depth_tiles,
                          kHalves, {score, kTileSums, kKeys * kTile}, false, beside);
    for (int n = 0; n < kHalves; ++n) {
      hide_keys(score + n * kKeys * kTile, count, depth_tiles * kTileDepth);
      largest.work[n].begin(weights_of(s, q, n, depth_tiles));
    }
    largest.at = 0;
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

}  // namespace

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

void self_attention_forward_tiles(const SelfAttentionParams&) {}
void self_attention_backward_tiles(const SelfAttentionParams&) {}

#endif

}  // namespace mafnet
