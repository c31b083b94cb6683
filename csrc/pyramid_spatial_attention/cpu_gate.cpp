// spatial_gate: the product that makes the feature, the sigmoid and the sum, block by block.
// Backward makes the feature again instead of keeping it.
#include "pyramid_spatial_attention/gate_blocks.h"

namespace mafnet {
namespace {

// T is A, or BFloat16 where all images lie so.
template <typename A, typename T>
void forward(const SpatialGateParams& p) {
  const Gate<A> gate(p);
  const bool around = prepare(p.output, p.batch, int64_t{p.channels} * p.height * p.width);
  parallel_for(0, p.batch * p.height * gate.per_row, 1, [&](int64_t begin, int64_t end) {
    Block<A> block(gate);
    for (int64_t index = begin; index < end; ++index) {
      block.start(p, gate, index);
      const Row<T> mask = block.template read_mask<T>(p, gate, p.channels);
      const Row<T> input = block.template read<T>(p.input, p, gate, block.values);
      A* features = block.features.data();
      const A scale = gate.scale, slope = gate.slope, *bias = gate.bias.data();
      const int row = gate.row, channels = p.channels, count = block.count;
      const bool from_feature = p.from_feature;
      gate.product.set(mask.data, mask.stride, count, features, row, block.scratch.data());
      const auto write = [&](auto* out, int64_t out_stride, const auto& put) {
        for_rows<A>(count, channels, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          const V feature = leaky_relu(load<V>(features + i * row + c) + load<V>(bias + c), slope);
          const V from = from_feature ? feature : load_stored<V>(mask.data + i * mask.stride + c);
          const V in = load_stored<V>(input.data + i * input.stride + c);
          put(out + i * out_stride + c, V(in * sigmoid_for<T>(from, scale) + feature));
        });
      };
      if (lies_as<T>(p.output)) {
        T* out = pixel_at<T>(p.output, block.n, block.y, block.x);
        if (around) {
          write(out, p.output.stride[3], StoreAround{});
        } else {
          write(out, p.output.stride[3], Store{});
        }
      } else {
        write(features, row, Store{});
        write_row(features, row, count, channels, p.output, block.n, block.y, block.x);
      }
    }
  });
}

// Whether the channels of an image are planes whose pixels lie side by side.
template <typename Pointer>
bool is_planar(const ImageOf<Pointer>& image) {
  return image.stride[3] == 1 && image.stride[1] != 1;
}

// Pixels of a block, and those of them that are multiplied together. A block is long, as each plane
// is a page of its own for the TLB; 64 channels of it and of their features are 256 kB. Rows of a
// block lie a line further apart, or the 64 that a product reads would share few sets of the cache.
constexpr int kPlaneBlock = 512, kPlaneRow = kPlaneBlock + 16, kPanel = 128;

// Channels of a block, each side by side.
template <typename A>
struct Planes {
  A* data;
  int64_t stride;
};

// The same for planes: channels are the rows of the product and pixels its columns, so that nothing
// is transposed. An element sums up in the same order.
template <typename A>
void forward_planes(const SpatialGateParams& p) {
  const int channels = p.channels;
  const size_t rows = padded_rows(channels);
  Buffer<A> weight(rows * channels), bias(channels);
  gather_pixels({p.weight, p.dtype, 0, channels, 1}, channels, channels, weight.data(), channels);
  load_bias(p.bias, p.dtype, channels, bias.data());
  const bool around = prepare(p.output, p.batch, int64_t{channels} * p.height * p.width);
  // Rows of the image that follow each other are one.
  const bool joined =
      p.input.stride[2] == p.width && p.mask.stride[2] == p.width && p.output.stride[2] == p.width;
  const int64_t lines = joined ? 1 : p.height, length = int64_t{p.width} * (joined ? p.height : 1);
  const int64_t per_line = divide_up(length, kPlaneBlock);
  parallel_for(0, p.batch * lines * per_line, 1, [&](int64_t begin, int64_t end) {
    const size_t size = rows * kPlaneRow;
    Buffer<A> masks(size), features(size), inputs(p.input.dtype == kDense<A> ? 0 : size, false);
    const A scale = static_cast<A>(p.scale), slope = static_cast<A>(p.negative_slope);
    const bool from_feature = p.from_feature;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t x = index % per_line * kPlaneBlock, y = index / per_line % lines;
      const int64_t n = index / per_line / lines;
      const int count = static_cast<int>(std::min<int64_t>(kPlaneBlock, length - x));
      const auto copy = [&](const Source& image, A* to) {
        const int64_t first = element_at(image, n, y, x);
        gather_pixels({image.data, image.dtype, first, image.stride[1], 1}, channels, count, to,
                      kPlaneRow);
      };
      copy(p.mask, masks.data());  // products read what pads the last of their columns
      Planes<const A> input{inputs.data(), kPlaneRow};
      if (p.input.dtype == kDense<A>) {
        const A* image = static_cast<const A*>(p.input.data);
        input = {image + element_at(p.input, n, y, x), p.input.stride[1]};
      } else {
        copy(p.input, inputs.data());
      }
      for (int c = 0; c < channels; ++c) {
        std::fill_n(features.data() + c * kPlaneRow, count, bias.data()[c]);
      }
      for (int i = 0; i < count; i += kPanel) {
        multiply(Matrix<A>{weight.data(), channels, 1}, masks.data() + i, kPlaneRow, channels,
                 channels, padded_columns(std::min(kPanel, count - i)), features.data() + i,
                 kPlaneRow, true);
      }
      const bool dense = p.output.dtype == kDense<A>;
      const int64_t first = element_at(p.output, n, y, x);
      Planes<A> out{features.data(), kPlaneRow};
      if (dense) out = {static_cast<A*>(p.output.data) + first, p.output.stride[1]};
      const A *mask = masks.data(), *made = features.data();
      const auto write = [&](const auto& put) {
        for_rows<A>(channels, count, [=](auto type, int c, int i) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          const V feature = leaky_relu(load<V>(made + c * kPlaneRow + i), slope);
          const V from = from_feature ? feature : load<V>(mask + c * kPlaneRow + i);
          const V in = load<V>(input.data + c * input.stride + i);
          put(out.data + c * out.stride + i, V(in * sigmoid(from, scale) + feature));
        });
      };
      if (dense && around) {
        write(StoreAround{});
      } else {
        write(Store{});
      }
      if (!dense) {
        scatter_pixels(made, kPlaneRow, channels, count,
                       {p.output.data, p.output.dtype, first, p.output.stride[1], 1});
      }
    }
  });
}

template <typename A, typename T>
void backward(const SpatialGateParams& p) {
  const Gate<A> gate(p);
  const int row = gate.row, channels = p.channels;
  const bool need_weight = p.grad_weight != nullptr || p.grad_bias != nullptr;
  Product<A> product(channels, channels, p.dtype);
  product.load({p.weight, p.dtype, 0, channels, 1}, channels, channels, 0, 0);
  product.pack();
  const int64_t elements = int64_t{channels} * p.height * p.width;
  if (p.grad_input.data != nullptr) prepare(p.grad_input, p.batch, elements);
  if (p.grad_mask.data != nullptr) prepare(p.grad_mask, p.batch, elements);
  const int64_t blocks = p.batch * p.height * gate.per_row;
  const int64_t chunks = std::clamp<int64_t>(blocks / 16, 1, kMostChunks);
  const int64_t per_chunk = divide_up(blocks, chunks);
  Partials<A> partials(static_cast<int>(chunks), channels, row, row, need_weight);

  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Block<A> block(gate);
    Buffer<A> outputs(block.size), to_inputs(block.size), to_masks(block.size);
    PixelProduct<A> by_pixels(kBlock, channels, row, p.dtype);
    for (int64_t index = begin * per_chunk; index < std::min(blocks, end * per_chunk); ++index) {
      block.start(p, gate, index);
      const int64_t n = block.n;
      const int y = block.y, x = block.x, count = block.count;
      const Row<T> mask = block.template read_mask<T>(p, gate, need_weight ? row : channels);
      const Row<T> input = block.template read<T>(p.input, p, gate, block.values);
      const Row<T> grad = block.template read<T>(p.grad_output, p, gate, outputs);
      A *features = block.features.data(), *to_mask = to_masks.data();
      gate.product.set(mask.data, mask.stride, count, features, row, block.scratch.data());
      const A scale = gate.scale, slope = gate.slope, *bias = gate.bias.data();
      const bool from_feature = p.from_feature;
      // features become the gradients of what the activation got.
      const auto write = [&](auto* to_input, int64_t to_stride) {
        for_rows<A>(count, channels, [=](auto type, int i, int c) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          const int at = i * row + c;
          // What the next block reads.
          __builtin_prefetch(mask.data + (i + kBlock) * mask.stride + c, 0, 2);
          __builtin_prefetch(input.data + (i + kBlock) * input.stride + c, 0, 2);
          __builtin_prefetch(grad.data + (i + kBlock) * grad.stride + c, 0, 2);
          const V in = load_stored<V>(input.data + i * input.stride + c);
          const V g = load_stored<V>(grad.data + i * grad.stride + c);
          const V before = load<V>(features + at) + load<V>(bias + c);
          const V feature = leaky_relu(before, slope);
          const V from = from_feature ? feature : load_stored<V>(mask.data + i * mask.stride + c);
          const V gated = sigmoid_for<T>(from, A{1});
          if (to_input != nullptr) store_stored<V>(to_input + i * to_stride + c, g * gated * scale);
          const V to_gate = g * in * scale * (gated * (A{1} - gated));
          const V to_feature = from_feature ? g + to_gate : g, small = slope * to_feature;
          store<V>(features + at, (before > V{}) ? to_feature : small);
          store<V>(to_mask + at, from_feature ? V{} : to_gate);
        });
      };
      if (p.grad_input.data == nullptr || lies_as<T>(p.grad_input)) {
        T* to = p.grad_input.data == nullptr ? nullptr : pixel_at<T>(p.grad_input, n, y, x);
        write(to, p.grad_input.stride[3]);
      } else {
        write(to_inputs.data(), row);
        write_row(to_inputs.data(), row, count, channels, p.grad_input, n, y, x);
      }
      for (int i = 0; i < count; ++i) {  // what pads the channels
        std::fill(features + i * row + channels, features + (i + 1) * row, A{0});
      }
      if (need_weight) {
        const int64_t chunk = index / per_chunk;
        by_pixels.set_left(features, row, count);
        by_pixels.add(mask.data, mask.stride, row, partials.weight(chunk), row);
        add_rows(features, row, count, row, partials.bias(chunk));
      }
      if (p.grad_mask.data != nullptr) {
        product.add(features, row, count, to_mask, row, block.scratch.data());
        write_row(to_mask, row, count, channels, p.grad_mask, n, y, x);
      }
    }
  });
  partials.reduce();
  if (p.grad_weight != nullptr) {
    scatter_pixels(partials.weight(0), row, channels, channels,
                   {p.grad_weight, p.dtype, 0, channels, 1});
  }
  if (p.grad_bias != nullptr) {
    scatter_pixels(partials.bias(0), row, 1, channels, {p.grad_bias, p.dtype, 0, 0, 1});
  }
}

// Products in bfloat16 want pixels as rows.
bool in_bf16(const SpatialGateParams& p) {
  return p.dtype == Dtype::kBFloat16 && has_bf16_products();
}

// Whether all images may be read and written where they lie, whole vectors of bfloat16 at a time.
bool all_bf16(const SpatialGateParams& p) {
  const auto fits = [](const auto& image) {
    return image.data == nullptr || lies_as<BFloat16>(image);
  };
  return in_bf16(p) && p.channels % kColumnPad == 0 && fits(p.input) && fits(p.mask) &&
         fits(p.output) && fits(p.grad_output) && fits(p.grad_input);
}

}  // namespace

int launch_spatial_gate_forward(const SpatialGateParams& p, void*) {
  if (gate_forward_beside(p)) return 0;
  if (all_bf16(p)) return forward<float, BFloat16>(p), 0;
  const bool planes = !in_bf16(p) && is_planar(p.input) && is_planar(p.mask) && is_planar(p.output);
  return with_accumulator(p.dtype, [&](auto a) {
    using A = decltype(a);
    planes ? forward_planes<A>(p) : forward<A, A>(p);
  });
}

int launch_spatial_gate_backward(const SpatialGateParams& p, void*) {
  if (all_bf16(p)) return backward<float, BFloat16>(p), 0;
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a), decltype(a)>(p); });
}

}  // namespace mafnet
