// Torch side of self_attention on the CPU: check, allocate, fill params, launch. Tensors come in
// any layout. On CUDA the raw ops are Triton kernels (mafnet_ops/self_attention_triton.py).
#include <tuple>
#include <vector>

#include "common/backend.h"
#include "self_attention/params.h"

namespace mafnet::self_attention_binding {
namespace {

constexpr const char* kOp = "self_attention";

void check_tensor(const char* argument, const Tensor& tensor, const Tensor& query,
                  std::array<int64_t, 4> shape) {
  check_shape(kOp, argument, tensor, shape);
  check_same_device(kOp, argument, tensor, query);
  MAFNET_CHECK(tensor.scalar_type() == query.scalar_type(), kOp, argument, "the dtype of query",
               torch::headeronly::toString(tensor.scalar_type()));
}

Tokens tokens_of(const Tensor& tensor) {
  Tokens tokens;
  tokens.data = const_cast<void*>(tensor.const_data_ptr());
  copy_strides(tensor, tokens.stride);
  return tokens;
}

// Dense, with tokens side by side where those of `like` are; the fake kernels in Python follow the
// same rule.
Tensor empty_like_tokens(const Tensor& like, std::array<int64_t, 4> shape) {
  const auto [batch, heads, length, depth] = shape;
  const bool side_by_side = like.stride(2) == 1 && like.stride(3) != 1;
  if (!side_by_side) {
    return empty_on(like, shape, like.scalar_type(), MemoryFormat::Contiguous);
  }
  using torch::stable::detail::from;
  const std::vector<int64_t> sizes(shape.begin(), shape.end());
  const std::vector<int64_t> strides{heads * depth * length, depth * length, 1, length};
  std::array<StableIValue, 7> stack{from(like),         from(sizes),        from(strides),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

SelfAttentionParams make_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                double scale, const std::vector<int64_t>& window) {
  check_dims(kOp, "query", query, 4);
  check_dims(kOp, "key", key, 4);
  check_dims(kOp, "value", value, 4);
  SelfAttentionParams p{};
  p.dtype = dtype_of(kOp, "query", query);
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(2);
  p.keys = key.size(2);
  p.depth = extent_of(kOp, "query", query, 3);
  p.value_depth = extent_of(kOp, "value", value, 3);
  p.scale = scale;
  MAFNET_CHECK(p.depth > 0, kOp, "query", "D_qk of at least 1", "shape " + shape_of(query));
  check_tensor("key", key, query, {p.batch, p.heads, p.keys, p.depth});
  check_tensor("value", value, query, {p.batch, p.heads, p.keys, p.value_depth});
  if (!window.empty()) {
    MAFNET_CHECK(window.size() == 3 && window[0] > 0 && window[1] > 0 && window[2] > 0 &&
                     window[1] <= p.queries && window[1] * window[2] == p.queries &&
                     p.queries == p.keys,
                 kOp, "window", "(window, H, W) with H * W queries and as many keys",
                 std::to_string(window.size()) + " numbers and shape " + shape_of(query));
    p.window = window[0];
    p.height = window[1];
    p.width = window[2];
  }
  p.query = tokens_of(query);
  p.key = tokens_of(key);
  p.value = tokens_of(value);
  return p;
}

ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> self_attention_forward(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, double scale,
                                                  std::vector<int64_t> window) {
  SelfAttentionParams p = make_params(query, key, value, scale, window);
  DeviceScope scope(query);
  Tensor out = empty_like_tokens(value, {p.batch, p.heads, p.queries, p.value_depth});
  const std::array<int64_t, 3> shape{p.batch, p.heads, p.queries};
  Tensor lse = torch::stable::empty({shape.data(), shape.size()}, lse_dtype(query), std::nullopt,
                                    query.device(), std::nullopt, std::nullopt);
  p.out = tokens_of(out);
  p.lse = lse.mutable_data_ptr();
  check_launch(kOp, launch_self_attention_forward(p, scope.stream()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> self_attention_backward(const Tensor& grad_out,
                                                           const Tensor& query, const Tensor& key,
                                                           const Tensor& value, const Tensor& out,
                                                           const Tensor& lse, double scale,
                                                           std::vector<int64_t> window,
                                                           bool /*deterministic: it always is*/) {
  SelfAttentionParams p = make_params(query, key, value, scale, window);
  const std::array<int64_t, 4> shape{p.batch, p.heads, p.queries, p.value_depth};
  check_tensor("grad_out", grad_out, query, shape);
  check_tensor("out", out, query, shape);
  MAFNET_CHECK(lse.dim() == 3 && lse.size(0) == p.batch && lse.size(1) == p.heads &&
                   lse.size(2) == p.queries && lse.scalar_type() == lse_dtype(query),
               kOp, "lse", "that of the forward", "shape " + shape_of(lse));
  check_same_device(kOp, "lse", lse, query);
  DeviceScope scope(query);
  const Tensor dense_lse = torch::stable::contiguous(lse, MemoryFormat::Contiguous);
  Tensor grad_query = empty_like_tokens(query, {p.batch, p.heads, p.queries, p.depth});
  Tensor grad_key = empty_like_tokens(key, {p.batch, p.heads, p.keys, p.depth});
  Tensor grad_value = empty_like_tokens(value, {p.batch, p.heads, p.keys, p.value_depth});
  p.lse = const_cast<void*>(dense_lse.const_data_ptr());
  p.out = tokens_of(out);
  p.grad_out = tokens_of(grad_out);
  p.grad_query = tokens_of(grad_query);
  p.grad_key = tokens_of(grad_key);
  p.grad_value = tokens_of(grad_value);
  check_launch(kOp, launch_self_attention_backward(p, scope.stream()));
  return {grad_query, grad_key, grad_value};
}

}  // namespace

MAFNET_LIBRARY_IMPL(module) {
  module.impl("self_attention_forward", TORCH_BOX(&self_attention_forward));
  module.impl("self_attention_backward", TORCH_BOX(&self_attention_backward));
}

}  // namespace mafnet::self_attention_binding
