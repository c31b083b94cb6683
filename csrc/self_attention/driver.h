// How the work of self_attention is cut up and shared out, whatever computes a block.
//
// An Engine packs blocks of kKeys keys with their values, and kQueries queries, into the order that
// its matrix products read, and multiplies them. Problems are packed in groups that fit the
// outermost cache, or one by one where they are large, so that memory is O(L). Who adds what, and
// in which order, follows from the shapes alone: the bits are the same for any number of threads.
#pragma once

#include <cstddef>

#include "common/parallel.h"
#include "common/vectors.h"
#include "self_attention/tokens.h"

namespace mafnet {

constexpr int64_t kPackedBytes = 8 << 20;

// Sums of grad_query that parts of the keys make side by side, so that few problems occupy many
// cores too; less where they would take more than kPartialBytes, or where a part would have a
// single block, for which fresh memory costs a tenth of the products.
constexpr int64_t kParts = 32;
constexpr int64_t kPartialBytes = 48 << 20;

// The blocks of the problems first .. first + count.
struct Group {
  int64_t first, count, key_blocks, query_blocks;
};

template <typename Engine>
Group make_group(const SelfAttentionParams& p, int64_t bytes_of_problem) {
  Group group{};
  group.key_blocks = (most_tokens(p, p.keys) + Engine::kKeys - 1) / Engine::kKeys;
  group.query_blocks = (most_tokens(p, p.queries) + Engine::kQueries - 1) / Engine::kQueries;
  const int64_t fit = kPackedBytes / std::max<int64_t>(bytes_of_problem, 1);
  group.count = std::max<int64_t>(1, std::min(fit, count_problems(p)));
  return group;
}

// Calls body(problem, slot, first token, count) for every block of size `block` of a group of
// problems, in parallel. slot counts blocks; those past the end of a smaller problem are left out.
template <typename Body>
void for_blocks(const SelfAttentionParams& p, const Group& group, int64_t blocks, int block,
                bool of_keys, const Body& body) {
  parallel_for(0, group.count * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const Problem problem = make_problem(p, group.first + slot / blocks);
      const int64_t first = slot % blocks * block;
      const int64_t left = (of_keys ? problem.keys : problem.queries) - first;
      if (left > 0) {
        body(problem, slot, first, static_cast<int>(std::min<int64_t>(left, block)));
      }
    }
  });
}

template <typename Engine>
void run_forward(const SelfAttentionParams& p) {
  const Engine engine(p);
  const size_t key_bytes = engine.key_bytes();
  Group group = make_group<Engine>(
      p, (most_tokens(p, p.keys) / Engine::kKeys + 1) * static_cast<int64_t>(key_bytes));
  Buffer<std::byte> keys(group.count * group.key_blocks * key_bytes, false);
  const int64_t problems = count_problems(p), stride = group.count;
  for (; group.first < problems; group.first += stride) {
    group.count = std::min(stride, problems - group.first);
    for_blocks(p, group, group.key_blocks, Engine::kKeys, true,
               [&](const Problem& problem, int64_t slot, int64_t first, int count) {
                 engine.pack_keys(problem, first, count, keys.data() + slot * key_bytes);
               });
    parallel_for(0, group.count * group.query_blocks, 1, [&](int64_t begin, int64_t end) {
      typename Engine::Scratch scratch(engine);
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t member = slot / group.query_blocks;
        const Problem problem = make_problem(p, group.first + member);
        const int64_t first = slot % group.query_blocks * Engine::kQueries;
        const int64_t count = std::min<int64_t>(problem.queries - first, Engine::kQueries);
        if (count <= 0) continue;
        engine.start(problem, first, static_cast<int>(count), scratch);
        for (int64_t k = 0; k < problem.keys; k += Engine::kKeys) {
          const int64_t block = member * group.key_blocks + k / Engine::kKeys;
          const int64_t left = std::min<int64_t>(problem.keys - k, Engine::kKeys);
          engine.attend(keys.data() + block * key_bytes, static_cast<int>(left), scratch);
        }
        engine.finish(problem, first, scratch);
      }
    });
  }
}

// How many parts of each problem are worked on at once: the fewest that occupy the threads as well
// as all would. Their sums of grad_query then are few, and lie in caches; fresh memory is dear.
inline int64_t parts_at_once(int64_t problems, int64_t parts) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t threads = num_threads();
  int64_t at_once = 1;
  while (at_once < parts && ceil_div(parts, at_once) * ceil_div(problems * at_once, threads) >
                                ceil_div(problems * parts, threads)) {
    ++at_once;
  }
  return at_once;
}

// Each part of a problem's keys is one task: it walks over all queries, adds up the gradients of
// its keys and values block by block, and its share of grad_query; the shares are added in order.
template <typename Engine>
void run_backward(const SelfAttentionParams& p) {
  const Engine engine(p);
  const size_t key_bytes = engine.key_bytes(), query_bytes = engine.query_bytes();
  const int64_t most_keys = most_tokens(p, p.keys), most_queries = most_tokens(p, p.queries);
  Group group = make_group<Engine>(
      p, (most_keys / Engine::kKeys + 1) * static_cast<int64_t>(key_bytes) +
             (most_queries / Engine::kQueries + 1) * static_cast<int64_t>(query_bytes));
  const int64_t share = group.query_blocks * engine.grad_query_size();
  const int64_t room = kPartialBytes / (4 * std::max<int64_t>(share * group.count, 1));
  const int64_t wanted =
      std::min(kParts / std::min(group.count, kParts), (group.key_blocks + 1) / 2);
  const int64_t parts = std::max<int64_t>(1, std::min(room, wanted));
  const int64_t per_part = (group.key_blocks + parts - 1) / parts;
  Buffer<std::byte> keys(group.count * group.key_blocks * key_bytes, false);
  Buffer<std::byte> queries(group.count * group.query_blocks * query_bytes, false);
  const int64_t at_once = parts_at_once(group.count, parts);
  // Of each problem the sum, which the first part begins, and the shares of the others.
  const int64_t sums_size = std::min(parts, 1 + at_once) * share;
  const auto share_of = [&](int64_t part) {
    return part == 0 ? 0 : (1 + (part - 1) % at_once) * share;
  };
  Buffer<typename Engine::Sum> sums(group.count * sums_size, false);
  const int64_t problems = count_problems(p), stride = group.count;
  for (; group.first < problems; group.first += stride) {
    group.count = std::min(stride, problems - group.first);
    for_blocks(p, group, group.key_blocks, Engine::kKeys, true,
               [&](const Problem& problem, int64_t slot, int64_t first, int count) {
                 engine.pack_keys(problem, first, count, keys.data() + slot * key_bytes);
               });
    for_blocks(p, group, group.query_blocks, Engine::kQueries, false,
               [&](const Problem& problem, int64_t slot, int64_t first, int count) {
                 engine.pack_queries(problem, first, count, queries.data() + slot * query_bytes);
               });
    for (int64_t done = 0; done < parts; done += at_once) {
      const int64_t now = std::min(at_once, parts - done);
      parallel_for(0, group.count * now, 1, [&](int64_t begin, int64_t end) {
        typename Engine::Scratch scratch(engine);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t member = task / now, part = done + task % now;
          const Problem problem = make_problem(p, group.first + member);
          auto* grad_query = sums.data() + member * sums_size + share_of(part);
          std::fill_n(grad_query, share, typename Engine::Sum{});
          const int64_t stop = std::min((part + 1) * per_part * Engine::kKeys, problem.keys);
          const int64_t begin_keys = part * per_part * Engine::kKeys;
          for (int64_t k = begin_keys; k < stop; k += Engine::kKeyBlocks * Engine::kKeys) {
            const auto for_key_blocks = [&](const auto& body) {
              for (int i = 0; i < Engine::kKeyBlocks && k + i * Engine::kKeys < stop; ++i) {
                const int64_t at = k + i * Engine::kKeys;
                body(at, static_cast<int>(std::min<int64_t>(problem.keys - at, Engine::kKeys)), i);
              }
            };
            engine.start_keys(problem, scratch);
            for (int64_t q = 0; q < problem.queries; q += Engine::kQueries) {
              const int64_t block = q / Engine::kQueries;
              const std::byte* query =
                  queries.data() + (member * group.query_blocks + block) * query_bytes;
              const auto left = std::min<int64_t>(problem.queries - q, Engine::kQueries);
              for_key_blocks([&](int64_t at, int count, int i) {
                const int64_t place = member * group.key_blocks + at / Engine::kKeys;
                engine.differentiate(keys.data() + place * key_bytes, count, query,
                                     static_cast<int>(left),
                                     grad_query + block * engine.grad_query_size(), i, scratch);
              });
            }
            for_key_blocks([&](int64_t at, int count, int i) {
              engine.finish_keys(problem, at, count, i, scratch);
            });
          }
        }
      });
      for_blocks(p, group, group.query_blocks, Engine::kQueries, false,
                 [&](const Problem& problem, int64_t slot, int64_t first, int count) {
                   const int64_t size = engine.grad_query_size();
                   auto* sum = sums.data() + slot / group.query_blocks * sums_size +
                               slot % group.query_blocks * size;
                   for (int64_t part = std::max<int64_t>(done, 1); part < done + now; ++part) {
                     const auto* more = sum + share_of(part);
                     for (int64_t i = 0; i < size; ++i) sum[i] += more[i];
                   }
                   if (done + now == parts) engine.write_grad_query(problem, first, count, sum);
                 });
    }
  }
}

}  // namespace mafnet
