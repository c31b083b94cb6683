// pool_concat, and the convolutions whose kernel is 1 x 1: pointwise_conv, and pool_concat_conv,
// which pools into the rows that it multiplies. Backward pools again instead of keeping what was
// pooled or which tap won: the input must be kept anyway, for the gradient of the weight.
#include "common/parallel.h"
#include "pyramid_spatial_attention/pool.h"

namespace mafnet {
namespace {

// Pixels of a product: the rows and sums of 128 channels stay in the second cache.
constexpr int kBlock = 96;

// The rows that the weight multiplies: input pixels, or pooled ones.
template <typename A>
class Features {
 public:
  Features(const PyramidConvParams& p, bool pooled, int columns)
      : p_(p), pooled_(pooled), reader_(p, pooled ? columns : 0) {}

  int channels() const { return pooled_ ? 2 * p_.channels : p_.channels; }

  // Of output pixels x ... x + count - 1, in buffer or where they lie; `columns` elements of each
  // are read.
  Row<A> read(int64_t n, int y, int x, int count, int columns, A* buffer, int64_t stride) {
    if (!pooled_) {
      return rows_of(p_.input, n, y, x, count, p_.width, p_.channels, columns, buffer, stride);
    }
    pool(n, y, x, count, buffer, stride, Store{});
    return {buffer, stride};
  }

  // The pooled ones to where `to` is, by put(to, vector).
  template <typename To, typename Put>
  void pool(int64_t n, int y, int x, int count, To* to, int64_t stride, const Put& put) {
    const auto run = [&](const auto& rows) {
      pool_row<A>(rows, x, count, p_.width, p_.channels, to, stride, put);
    };
    if constexpr (sizeof(A) == 4) {
      if (lies_as<BFloat16>(p_.input)) {
        return run(reader_.template read<BFloat16>(n, y, x, count));
      }
    }
    run(reader_.template read<A>(n, y, x, count));
  }

 private:
  const PyramidConvParams& p_;
  bool pooled_;
  PoolReader<A> reader_;
};

template <typename A>
void forward(const PyramidConvParams& p, bool pooled) {
  const int depth = pooled ? 2 * p.channels : p.channels;
  const int row = padded_columns(depth), out = padded_columns(p.out_channels);
  Product<A> product(depth, p.out_channels, p.dtype);
  product.load({p.weight, p.dtype, 0, 1, depth}, depth, p.out_channels, 0, 0);
  product.pack();
  Buffer<A> bias(out);
  load_bias(p.bias, p.dtype, p.out_channels, bias.data());
  const int64_t pixels = int64_t{p.out_height} * p.out_width;
  prepare(p.output, p.batch, p.out_channels * pixels);

  const A slope = static_cast<A>(p.negative_slope);
  const int64_t per_row = divide_up(p.out_width, kBlock);
  const bool direct = !pooled && product.in_bf16() && lies_as<BFloat16>(p.input);
  parallel_for(0, p.batch * p.out_height * per_row, 1, [&](int64_t begin, int64_t end) {
    Features<A> features(p, pooled, kBlock);
    Buffer<A> rows(size_t{padded_rows(kBlock)} * row), sums(size_t{padded_rows(kBlock)} * out);
    Buffer<uint16_t> scratch(product.scratch(kBlock), false);
    for (int64_t task = begin; task < end; ++task) {
      const int x = static_cast<int>(task % per_row) * kBlock;
      const int y = static_cast<int>(task / per_row % p.out_height);
      const int64_t n = task / per_row / p.out_height;
      const int count = std::min(kBlock, p.out_width - x);
      if (direct) {
        product.set(pixel_at<BFloat16>(p.input, n, y, x), p.input.stride[3], count, sums.data(),
                    out, scratch.data());
      } else {
        const Row<A> read = features.read(n, y, x, count, depth, rows.data(), row);
        product.set(read.data, read.stride, count, sums.data(), out, scratch.data());
      }
      write_activated(sums.data(), out, count, p.out_channels, bias.data(), slope, p.output, n, y,
                      x);
    }
  });
}

// Adds up the gradient of the input of pooling, rows from top to bottom, whatever the order of the
// threads: a row of input between two rows of output gets the upper one's part first.
template <typename A>
class Unpooler {
 public:
  explicit Unpooler(const PyramidConvParams& p)
      : p_(p),
        size_(int64_t{p.width} * p.channels),
        reader_(p, p.out_width),
        rows_{Buffer<A>(size_), Buffer<A>(size_), Buffer<A>(size_)} {}

  // Before the first output row, and wherever the next is not the one below.
  void start() { carried_ = false; }

  // Adds output row y, and writes the rows of input that are complete; with `closing` only the one
  // above y, which the last row before began.
  void add(int64_t n, int y, const A* grad_features, int64_t stride, bool closing) {
    Buffer<A>*above = &rows_[first_ % 3], *centre = &rows_[(first_ + 1) % 3],
    *below = &rows_[(first_ + 2) % 3];
    if (!carried_) above->resize(size_);
    centre->resize(size_);
    below->resize(size_);
    const int rows[3] = {2 * y - 1, 2 * y, 2 * y + 1};
    Buffer<A>* buffers[3] = {above, centre, below};
    PoolRows<A*> grads{{nullptr, nullptr, nullptr}, p_.channels, 0};
    for (int dy = 0; dy < 3; ++dy) {
      if (rows[dy] >= 0 && rows[dy] < p_.height) grads.at[dy] = buffers[dy]->data();
    }
    unpool_row(reader_.template read<A>(n, y, 0, p_.out_width), grads, p_.out_width, p_.width,
               p_.channels, grad_features, stride);
    if (carried_) write(n, rows[0], *above);
    if (!closing) {
      write(n, rows[1], *centre);
      if (y == p_.out_height - 1 && rows[2] < p_.height) write(n, rows[2], *below);
    }
    carried_ = true;
    first_ += 2;
  }

 private:
  void write(int64_t n, int row, const Buffer<A>& from) {
    write_row(from.data(), p_.channels, p_.width, p_.channels, p_.grad_input, n, row, 0);
  }

  const PyramidConvParams& p_;
  int64_t size_;
  PoolReader<A> reader_;
  Buffer<A> rows_[3];
  int first_ = 0;
  bool carried_ = false;
};

template <typename A>
void backward(const PyramidConvParams& p, bool pooled) {
  const int depth = pooled ? 2 * p.channels : p.channels;
  const int row = padded_columns(depth), out = padded_columns(p.out_channels);
  const bool need_weight = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool need_input = p.grad_input.data != nullptr;
  Product<A> product(p.out_channels, depth, p.dtype);
  product.load({p.weight, p.dtype, 0, depth, 1}, p.out_channels, depth, 0, 0);
  product.pack();
  if (need_input) {
    prepare(p.grad_input, p.batch, int64_t{p.channels} * p.height * p.width);
  }
  // A row at a time where pooling carries rows over, else blocks: then rows may be very long.
  const int block = pooled ? p.out_width : std::min(kBlock, p.out_width);
  const int64_t per_row = divide_up(p.out_width, block);
  const int64_t rows = p.batch * p.out_height * per_row;
  const int64_t chunks = std::clamp<int64_t>(rows * block / 2048, 1, kMostChunks);
  Partials<A> partials(static_cast<int>(chunks), p.out_channels, row, out, need_weight);
  const A slope = static_cast<A>(p.negative_slope);
  const Source result = as_source(p.output);
  // Whole vectors of pixels are read, which those of other numbers of channels would run over.
  const bool direct = !pooled && product.in_bf16() && lies_as<BFloat16>(p.input) && depth == row;

  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Features<A> features(p, pooled, block);
    const size_t pad = padded_rows(block);
    // The product for the weight reads a tile of rows beyond the last gradient.
    Buffer<A> pixels(pad * row), grads(pad * out + kRowPad), results(pad * out), inputs(pad * row);
    Buffer<uint16_t> scratch(product.scratch(block), false);
    PixelProduct<A> by_pixels(block, p.out_channels, row, p.dtype);
    Unpooler<A> unpooler(p);
    const auto read_grads = [&](int64_t n, int y, int x, int count) {
      read_gradients(p.grad_output, result, n, y, x, count, p.out_channels, slope, grads.data(),
                     out, results.data());
    };
    const auto to_input = [&](int64_t n, int y, int x, int count, bool closing) {
      product.set(grads.data(), out, count, inputs.data(), row, scratch.data());
      if (pooled) {
        unpooler.add(n, y, inputs.data(), row, closing);
      } else {
        write_row(inputs.data(), row, count, p.channels, p.grad_input, n, y, x);
      }
    };
    const int64_t per_chunk = divide_up(rows, chunks);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t stop = std::min(rows, (chunk + 1) * per_chunk);
      unpooler.start();
      for (int64_t r = chunk * per_chunk; r < stop; ++r) {
        const int x = static_cast<int>(r % per_row) * block;
        const int y = static_cast<int>(r / per_row % p.out_height);
        const int64_t n = r / per_row / p.out_height;
        const int count = std::min(block, p.out_width - x);
        if (y == 0) unpooler.start();
        read_grads(n, y, x, count);
        if (need_weight) {
          by_pixels.set_left(grads.data(), out, count);
          if (direct) {
            by_pixels.add(pixel_at<BFloat16>(p.input, n, y, x), p.input.stride[3], row,
                          partials.weight(chunk), row);
          } else {
            const Row<A> read = features.read(n, y, x, count, row, pixels.data(), row);
            by_pixels.add(read.data, read.stride, row, partials.weight(chunk), row);
          }
          add_rows(grads.data(), out, count, out, partials.bias(chunk));
        }
        if (!need_input) continue;
        to_input(n, y, x, count, false);
        if (pooled && r + 1 == stop && y + 1 < p.out_height) {
          read_grads(n, y + 1, 0, p.out_width);
          to_input(n, y + 1, 0, p.out_width, true);
        }
      }
    }
  });
  partials.reduce();
  if (p.grad_weight != nullptr) {
    scatter_pixels(partials.weight(0), row, p.out_channels, depth,
                   {p.grad_weight, p.dtype, 0, depth, 1});
  }
  if (p.grad_bias != nullptr) {
    scatter_pixels(partials.bias(0), out, 1, p.out_channels, {p.grad_bias, p.dtype, 0, 0, 1});
  }
}

// T is A, or BFloat16 where the output lies so.
template <typename A, typename T>
void pool_forward(const PyramidConvParams& p) {
  const int channels = 2 * p.channels;
  const bool around = prepare(p.output, p.batch, int64_t{channels} * p.out_height * p.out_width);
  parallel_for(0, p.batch * p.out_height, 1, [&](int64_t begin, int64_t end) {
    Features<A> features(p, true, kBlock);
    Buffer<A> rows(static_cast<size_t>(kBlock) * channels, false);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / p.out_height;
      const int y = static_cast<int>(r % p.out_height);
      for (int x = 0; x < p.out_width; x += kBlock) {
        const int count = std::min(kBlock, p.out_width - x);
        if (lies_as<T>(p.output)) {
          T* to = pixel_at<T>(p.output, n, y, x);
          const int64_t stride = p.output.stride[3];
          if (around) {
            features.pool(n, y, x, count, to, stride, StoreAround{});
          } else {
            features.pool(n, y, x, count, to, stride, Store{});
          }
        } else {
          features.read(n, y, x, count, channels, rows.data(), channels);
          write_row(rows.data(), channels, count, channels, p.output, n, y, x);
        }
      }
    }
  });
}

template <typename A>
void pool_backward(const PyramidConvParams& p) {
  const int channels = 2 * p.channels;
  // No sum depends on how rows are shared out here, so that the threads may decide.
  const int64_t rows = p.batch * p.out_height;
  parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    Unpooler<A> unpooler(p);
    Buffer<A> buffer(static_cast<size_t>(p.out_width) * channels, false);
    for (int64_t r = begin; r < end; ++r) {
      const int y = static_cast<int>(r % p.out_height);
      const auto add = [&](int64_t n, int at, bool closing) {
        const Row<A> grad =
            read_row(p.grad_output, n, at, 0, p.out_width, channels, buffer.data(), channels);
        unpooler.add(n, at, grad.data, grad.stride, closing);
      };
      if (y == 0 || r == begin) unpooler.start();
      add(r / p.out_height, y, false);
      if (r + 1 == end && y + 1 < p.out_height) add(r / p.out_height, y + 1, true);
    }
  });
}

bool is_empty(const PyramidConvParams& p) { return p.batch * p.out_height * p.out_width == 0; }

}  // namespace

int launch_pointwise_conv_forward(const PyramidConvParams& p, void*) {
  if (is_empty(p)) return 0;
  return with_accumulator(p.dtype, [&](auto a) { forward<decltype(a)>(p, false); });
}

int launch_pointwise_conv_backward(const PyramidConvParams& p, void*) {
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a)>(p, false); });
}

int launch_pool_concat_forward(const PyramidConvParams& p, void*) {
  if (is_empty(p)) return 0;
  if (lies_as<BFloat16>(p.output)) return pool_forward<float, BFloat16>(p), 0;
  return with_accumulator(p.dtype, [&](auto a) { pool_forward<decltype(a), decltype(a)>(p); });
}

int launch_pool_concat_backward(const PyramidConvParams& p, void*) {
  if (is_empty(p)) return 0;
  return with_accumulator(p.dtype, [&](auto a) { pool_backward<decltype(a)>(p); });
}

int launch_pool_concat_conv_forward(const PyramidConvParams& p, void*) {
  if (is_empty(p)) return 0;
  return with_accumulator(p.dtype, [&](auto a) { forward<decltype(a)>(p, true); });
}

int launch_pool_concat_conv_backward(const PyramidConvParams& p, void*) {
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a)>(p, true); });
}

}  // namespace mafnet
