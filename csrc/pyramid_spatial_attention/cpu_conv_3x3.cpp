// resize_conv at the size of its input: a plain 3 x 3 convolution.
//
// Three pixels that follow each other in a row are the taps of one output pixel, and lie side by
// side: the product reads each row as a matrix whose rows overlap, so that nothing is copied per
// tap. In backward the gradients of the outputs lie so, for both products. In fp32 and of enough
// channels, pairs of rows take fewer products, see winograd.h.
#include "common/parallel.h"
#include "pyramid_spatial_attention/products.h"
#include "pyramid_spatial_attention/winograd.h"

namespace mafnet {
namespace {

constexpr int kStrip = 96;  // columns of a task: four rows of 128 channels fit the second cache
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
  Windows(int height, int width, int stride)
      : height_(height),
        width_(width),
        stride_(stride),
        size_(int64_t{padded_rows(kStrip) + 2} * stride),
        rows_(static_cast<size_t>(5 * size_)) {}

  void start(const Task& task) {
    x_ = task.x;
    count_ = task.count;
    std::fill_n(held_, 4, -1);
  }

  bool has(int y) const { return y >= 0 && y < height_; }

  // Row y from pixel x - 1 on, of an even number of pixels; read(y, x, count, to) gives what is not
  // held. Four rows are.
  template <typename Read>
  const A* row(int y, const Read& read) {
    if (!has(y)) return rows_.data() + 4 * size_;
    A* row = rows_.data() + y % 4 * size_;
    if (held_[y % 4] == y) return row;
    held_[y % 4] = y;
    const int first = std::max(x_ - 1, 0), end = std::min(x_ + count_ + 1, width_);
    A* inside = row + int64_t{first - x_ + 1} * stride_;
    std::fill(row, inside, A{0});
    read(y, first, end - first, inside);
    std::fill(inside + int64_t{end - first} * stride_,
              row + int64_t{round_up(count_, 2) + 2} * stride_, A{0});
    return row;
  }

 private:
  int height_, width_, stride_;
  int64_t size_;
  Buffer<A> rows_;  // the last one is zero
  int x_ = 0, count_ = 0;
  int held_[4] = {-1, -1, -1, -1};
};

// The weight: of the rows above, at and below a pixel a matrix each (3 taps by channels, columns).
template <typename A>
class Kernel {
 public:
  // Of `inputs` channels in rows of pixels that have room for `channels`.
  Kernel(int inputs, int channels, int columns, Dtype dtype)
      : inputs_(inputs),
        channels_(channels),
        rows_{{3 * channels, columns, dtype},
              {3 * channels, columns, dtype},
              {3 * channels, columns, dtype}},
        in_pairs_(sizeof(A) == 4 && !rows_[0].in_bf16() && Winograd::serves(inputs)),
        pairs_(in_pairs_ ? channels : 0, in_pairs_ ? rows_[0].columns() : 0) {}

  int channels() const { return channels_; }
  int columns() const { return rows_[0].columns(); }
  const Product<A>& row(int i) const { return rows_[i]; }
  // Whether pairs of rows have a product of their own.
  bool in_pairs() const { return in_pairs_; }
  const Winograd& pairs() const { return pairs_; }

  // Taps from top left to bottom right, of count columns.
  void load(int tap, const Elements<const void*>& from, int count) {
    rows_[tap / 3].load(from, inputs_, count, tap % 3 * channels_, 0);
  }
  // Call once after the last load.
  void pack() {
    if constexpr (sizeof(A) == 4) {
      const float* taps[9];
      for (int tap = 0; tap < 9; ++tap) taps[tap] = rows_[tap / 3].row(tap % 3 * channels_);
      if (in_pairs_) pairs_.load(taps);
    }
    for (Product<A>& row : rows_) row.pack();
  }

 private:
  int inputs_, channels_;
  Product<A> rows_[3];
  bool in_pairs_;
  Winograd pairs_;
};

// Sums of the tasks of a thread.
template <typename A>
class Sums {
 public:
  explicit Sums(const Kernel<A>& kernel)
      : kernel_(kernel),
        columns_(kernel.columns()),
        sums_(size_t{3} * padded_rows(kStrip) * columns_),
        packed_(kernel.row(0).scratch(kStrip), false),
        tiles_(kernel.in_pairs() ? kernel.pairs().scratch(kStrip / 2) : 0, false) {}

  // Of the last run.
  A* row(int i) { return sums_.data() + int64_t{i} * padded_rows(kStrip) * columns_; }

  // Of rows y and, if `rows` is 2, y + 1.
  template <typename Read>
  void run(Windows<A>& windows, const Read& read, int y, int rows, int count) {
    if constexpr (sizeof(A) == 4) {
      if (kernel_.in_pairs()) return run_pair(windows, read, y, rows, count);
    }
    for (int r = 0; r < rows; ++r) run_row(windows, read, y + r, count, row(r));
  }

 private:
  template <typename Read>
  void run_row(Windows<A>& windows, const Read& read, int y, int count, A* sums) {
    kernel_.row(1).set(windows.row(y, read), kernel_.channels(), count, sums, columns_,
                       packed_.data());
    for (int i : {0, 2}) {
      if (!windows.has(y + i - 1)) continue;
      kernel_.row(i).add(windows.row(y + i - 1, read), kernel_.channels(), count, sums, columns_,
                         packed_.data());
    }
  }

  template <typename Read>
  void run_pair(Windows<A>& windows, const Read& read, int y, int rows, int count) {
    const A* pixels[4] = {windows.row(y - 1, read), windows.row(y, read), windows.row(y + 1, read),
                          windows.row(y + 2, read)};
    A* const sums[2] = {row(0), row(1)};
    if (kernel_.pairs().sum(pixels, (count + 1) / 2, sums, tiles_.data())) return;
    for (int r = 0; r < rows; ++r) {
      run_row(windows, read, y + r, count, row(2));
      for (int64_t i = 0; i < int64_t{count} * columns_; ++i) {
        if (!(std::abs(sums[r][i]) <= std::numeric_limits<A>::max())) sums[r][i] = row(2)[i];
      }
    }
  }

  const Kernel<A>& kernel_;
  int columns_;
  Buffer<A> sums_;
  Buffer<uint16_t> packed_;
  Buffer<A> tiles_;
};

template <typename A>
void forward(const PyramidConvParams& p) {
  Kernel<A> kernel(p.channels, p.channels, p.out_channels, p.dtype);
  for (int tap = 0; tap < 9; ++tap) {
    kernel.load(tap, {p.weight, p.dtype, tap, 9, int64_t{9} * p.channels}, p.out_channels);
  }
  kernel.pack();
  const int out = kernel.columns();
  Buffer<A> bias(out);
  load_bias(p.bias, p.dtype, p.out_channels, bias.data());
  prepare(p.output, p.batch, int64_t{p.out_channels} * p.out_height * p.out_width);
  const A slope = static_cast<A>(p.negative_slope);
  const Cut cut(p);
  parallel_for(0, cut.tasks, 1, [&](int64_t from, int64_t to) {
    Windows<A> windows(p.height, p.width, p.channels);
    Sums<A> sums(kernel);
    for (int64_t index = from; index < to; ++index) {
      const Task task(cut, index);
      windows.start(task);
      const auto read = [&](int y, int x, int count, A* pixels) {
        copy_row(p.input, task.n, y, x, count, p.channels, pixels, p.channels);
      };
      for (int y = task.begin; y < task.end; y += 2) {
        const int rows = std::min(2, task.end - y);
        sums.run(windows, read, y, rows, task.count);
        for (int r = 0; r < rows; ++r) {
          write_activated(sums.row(r), out, task.count, p.out_channels, bias.data(), slope,
                          p.output, task.n, y + r, task.x);
        }
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
  // The gradient around a pixel meets the taps from the last to the first.
  Kernel<A> kernel(p.out_channels, out, p.channels, p.dtype);
  for (int tap = 0; tap < 9; ++tap) {
    kernel.load(8 - tap, {p.weight, p.dtype, tap, int64_t{9} * p.channels, 9}, p.channels);
  }
  kernel.pack();
  if (need_input) prepare(p.grad_input, p.batch, int64_t{p.channels} * p.height * p.width);
  const A slope = static_cast<A>(p.negative_slope);
  const Source result = as_source(p.output);
  const Cut cut(p);
  const int64_t chunks = std::clamp<int64_t>(cut.tasks, 1, kMostChunks);
  const int64_t per_chunk = divide_up(cut.tasks, chunks);
  Partials<A> partials(static_cast<int>(chunks), p.channels, row, out, need_weight);
  parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    Windows<A> windows(p.height, p.width, out);
    const size_t most = padded_rows(kStrip);
    Buffer<A> pixels(most * depth + kRowPad), results((most + 2) * out);
    Sums<A> sums(kernel);
    PixelProduct<A> by_pixels(kStrip, p.channels, 3 * out, p.dtype);
    for (int64_t index = from * per_chunk; index < std::min(cut.tasks, to * per_chunk); ++index) {
      const Task task(cut, index);
      windows.start(task);
      const auto read = [&](int y, int x, int count, A* grads) {
        read_gradients(p.grad_output, result, task.n, y, x, count, p.out_channels, slope, grads,
                       out, results.data());
      };
      for (int y = task.begin; y < task.end; y += 2) {
        const int rows = std::min(2, task.end - y);
        for (int at = y; need_weight && at < y + rows; ++at) {
          copy_row(p.input, task.n, at, task.x, task.count, p.channels, pixels.data(), depth);
          by_pixels.set_left(pixels.data(), depth, task.count);
          add_rows(windows.row(at, read) + out, out, task.count, out,
                   partials.bias(index / per_chunk));
          for (int i = 0; i < 3; ++i) {
            if (!windows.has(at + i - 1)) continue;
            by_pixels.add(windows.row(at + i - 1, read), out, 3 * out,
                          partials.weight(index / per_chunk) + 3 * i * out, row);
          }
        }
        if (need_input) sums.run(windows, read, y, rows, task.count);
        for (int r = 0; need_input && r < rows; ++r) {
          write_row(sums.row(r), depth, task.count, p.channels, p.grad_input, task.n, y + r,
                    task.x);
        }
      }
    }
  });
  partials.reduce();
  for (int tap = 0; p.grad_weight != nullptr && tap < 9; ++tap) {
    scatter_pixels(partials.weight(0) + (8 - tap) * out, row, p.channels, p.out_channels,
                   {p.grad_weight, p.dtype, tap, 9, int64_t{9} * p.channels});
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
