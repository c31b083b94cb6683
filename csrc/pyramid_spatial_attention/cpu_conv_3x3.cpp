// resize_conv at the size of its input: a plain 3 x 3 convolution.
//
// Three pixels that follow each other in a row are the taps of one output pixel, and lie side by
// side: the product reads each row as a matrix whose rows overlap, so that nothing is copied per
// tap. In backward the gradients of the outputs lie so, for both products.
#include "common/parallel.h"
#include "pyramid_spatial_attention/products.h"

namespace mafnet {
namespace {

constexpr int kStrip = 96;  // columns of a task: three rows of 128 channels fit the second cache
constexpr int kBand = 8;    // and its rows, which share all but two of the rows that they read

// The tasks of a convolution: strips of bands of images.
struct Cut {
  explicit Cut(const PyramidConvParams& p)
      : height(p.height),
        width(p.width),
        strips(divide_up(p.width, kStrip)),
        bands(divide_up(p.height, kBand)),
        strip(static_cast<int>(divide_up(p.width, strips))),
        tasks(p.batch * strips * bands) {}

  int height, width;
  int64_t strips, bands;
  int strip;
  int64_t tasks;
};

struct Task {
  Task(const Cut& cut, int64_t index)
      : n(index / cut.bands / cut.strips),
        begin(static_cast<int>(index % cut.bands) * kBand),
        end(std::min(begin + kBand, cut.height)),
        x(static_cast<int>(index / cut.bands % cut.strips) * cut.strip),
        count(std::min(cut.width - x, cut.strip)) {}

  int64_t n;
  int begin, end, x, count;  // rows, first column, columns
};

// The rows of a task with a pixel more on either side, zero outside the image.
template <typename A>
class Windows {
 public:
  Windows(int width, int stride)
      : width_(width),
        stride_(stride),
        size_(int64_t{padded_rows(kStrip) + 2} * stride),
        rows_(static_cast<size_t>(3 * size_)) {}

  void start(const Task& task) {
    x_ = task.x;
    count_ = task.count;
    std::fill_n(held_, 3, -1);
  }

  // Row y from pixel x - 1 on; read(y, x, count, to) gives what is not held.
  template <typename Read>
  const A* row(int y, const Read& read) {
    A* row = rows_.data() + y % 3 * size_;
    if (held_[y % 3] == y) return row;
    held_[y % 3] = y;
    const int first = std::max(x_ - 1, 0), end = std::min(x_ + count_ + 1, width_);
    A* inside = row + int64_t{first - x_ + 1} * stride_;
    std::fill(row, inside, A{0});
    read(y, first, end - first, inside);
    std::fill(inside + int64_t{end - first} * stride_, row + int64_t{count_ + 2} * stride_, A{0});
    return row;
  }

 private:
  int width_, stride_;
  int64_t size_;
  Buffer<A> rows_;
  int x_ = 0, count_ = 0;
  int held_[3] = {-1, -1, -1};
};

template <typename A>
void forward(const PyramidConvParams& p) {
  const int out = padded_columns(p.out_channels), depth = 3 * p.channels;
  Product<A> products[3] = {{depth, p.out_channels, p.dtype},
                            {depth, p.out_channels, p.dtype},
                            {depth, p.out_channels, p.dtype}};
  for (int tap = 0; tap < 9; ++tap) {
    products[tap / 3].load({p.weight, p.dtype, tap, 9, int64_t{9} * p.channels}, p.channels,
                           p.out_channels, tap % 3 * p.channels, 0);
  }
  for (Product<A>& product : products) product.pack();
  Buffer<A> bias(out);
  load_bias(p.bias, p.dtype, p.out_channels, bias.data());
  prepare(p.output, p.batch, int64_t{p.out_channels} * p.out_height * p.out_width);
  const A slope = static_cast<A>(p.negative_slope);
  const Cut cut(p);
  parallel_for(0, cut.tasks, 1, [&](int64_t from, int64_t to) {
    Windows<A> windows(p.width, p.channels);
    Buffer<A> sums(size_t{padded_rows(kStrip)} * out);
    Buffer<uint16_t> scratch(products[0].scratch(kStrip), false);
    for (int64_t index = from; index < to; ++index) {
      const Task task(cut, index);
      windows.start(task);
      const auto read = [&](int y, int x, int count, A* pixels) {
        copy_row(p.input, task.n, y, x, count, p.channels, pixels, p.channels);
      };
      for (int y = task.begin; y < task.end; ++y) {
        std::fill_n(sums.data(), int64_t{task.count} * out, A{0});
        for (int ky = 0; ky < 3; ++ky) {
          const int row = y + ky - 1;
          if (row < 0 || row >= p.height) continue;
          products[ky].add(windows.row(row, read), p.channels, task.count, sums.data(), out,
                           scratch.data());
        }
        write_activated(sums.data(), out, task.count, p.out_channels, bias.data(), slope, p.output,
                        task.n, y, task.x);
      }
    }
  });
}

template <typename A>
void backward(const PyramidConvParams& p) {
  const int depth = padded_columns(p.channels), out = padded_columns(p.out_channels);
  const int row = 9 * out;
  const bool need_weight = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool need_input = p.grad_input.data != nullptr;
  Product<A> products[3] = {{3 * out, p.channels, p.dtype},
                            {3 * out, p.channels, p.dtype},
                            {3 * out, p.channels, p.dtype}};
  for (int tap = 0; tap < 9; ++tap) {  // from the last column to the first
    products[tap / 3].load({p.weight, p.dtype, tap, int64_t{9} * p.channels, 9}, p.out_channels,
                           p.channels, (2 - tap % 3) * out, 0);
  }
  for (Product<A>& product : products) product.pack();
  if (need_input) prepare(p.grad_input, p.batch, int64_t{p.channels} * p.height * p.width);
  const A slope = static_cast<A>(p.negative_slope);
  const Source result = as_source(p.output);
  const Cut cut(p);
  const int64_t chunks = std::clamp<int64_t>(cut.tasks, 1, kMostChunks);
  const int64_t per_chunk = divide_up(cut.tasks, chunks);
  Partials<A> partials(static_cast<int>(chunks), p.channels, row, out, need_weight);
  parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    Windows<A> windows(p.width, out);
    const size_t rows = padded_rows(kStrip);
    Buffer<A> pixels(rows * depth + kRowPad), inputs(rows * depth), results((rows + 2) * out);
    Buffer<uint16_t> scratch(products[0].scratch(kStrip), false);
    PixelProduct<A> by_pixels(kStrip, p.channels, 3 * out, p.dtype);
    for (int64_t index = from * per_chunk; index < std::min(cut.tasks, to * per_chunk); ++index) {
      const Task task(cut, index);
      windows.start(task);
      const auto read = [&](int y, int x, int count, A* grads) {
        read_gradients(p.grad_output, result, task.n, y, x, count, p.out_channels, slope, grads,
                       out, results.data());
      };
      for (int y = task.begin; y < task.end; ++y) {
        if (need_weight) {
          copy_row(p.input, task.n, y, task.x, task.count, p.channels, pixels.data(), depth);
          by_pixels.set_left(pixels.data(), depth, task.count);
          add_rows(windows.row(y, read) + out, out, task.count, out,
                   partials.bias(index / per_chunk));
        }
        std::fill_n(inputs.data(), int64_t{task.count} * depth, A{0});
        for (int ky = 0; ky < 3; ++ky) {
          const int below = y - ky + 1;
          if (below < 0 || below >= p.height) continue;
          const A* grads = windows.row(below, read);
          if (need_weight) {
            by_pixels.add(grads, out, 3 * out, partials.weight(index / per_chunk) + 3 * ky * out,
                          row);
          }
          if (need_input) {
            products[ky].add(grads, out, task.count, inputs.data(), depth, scratch.data());
          }
        }
        if (need_input) {
          write_row(inputs.data(), depth, task.count, p.channels, p.grad_input, task.n, y, task.x);
        }
      }
    }
  });
  partials.reduce();
  for (int tap = 0; p.grad_weight != nullptr && tap < 9; ++tap) {
    scatter_pixels(partials.weight(0) + (3 * (tap / 3) + 2 - tap % 3) * out, row, p.channels,
                   p.out_channels, {p.grad_weight, p.dtype, tap, 9, int64_t{9} * p.channels});
  }
  if (p.grad_bias != nullptr) {
    scatter_pixels(partials.bias(0), out, 1, p.out_channels, {p.grad_bias, p.dtype, 0, 0, 1});
  }
}

}  // namespace

int launch_conv_3x3_forward(const PyramidConvParams& p) {
  return with_accumulator(p.dtype, [&](auto a) { forward<decltype(a)>(p); });
}

int launch_conv_3x3_backward(const PyramidConvParams& p) {
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a)>(p); });
}

}  // namespace mafnet
