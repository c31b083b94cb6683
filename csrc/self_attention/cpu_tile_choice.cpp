// Which calls of self_attention are served by products in bfloat16.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/gemm_bf16.h"
#include "common/parallel.h"
#include "common/vectors.h"
#include "self_attention/engines.h"
#include "self_attention/tiles.h"
#include "self_attention/tokens.h"

namespace mafnet {

#if defined(MAFNET_HAS_BF16)

namespace {

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

#else

bool tiles_serve(const SelfAttentionParams&) { return false; }

#endif

}  // namespace mafnet
