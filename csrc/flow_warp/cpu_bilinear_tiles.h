// Loads and stores of part of a vector, and tiles of 16 pixels that are turned from planes into
// pixels. See cpu_bilinear_kernels.h.
namespace mafnet {
namespace {

template <typename T>
MAFNET_KERNEL MAFNET_INLINE void put(T* output, Vec value, bool around_caches) {
  if (around_caches) {
    stream(output, value);
  } else {
    store(output, value);
  }
}

// Stores the first lanes of a vector.
template <typename T>
MAFNET_KERNEL void store_first(T* output, Vec value, int lanes) {
  T all[kLanes];
  store(all, value);
  std::memcpy(output, all, static_cast<size_t>(lanes) * sizeof(T));
}

template <typename T>
MAFNET_KERNEL Vec load_first(const T* p, int lanes) {
  T all[kLanes] = {};
  std::memcpy(static_cast<void*>(all), p, static_cast<size_t>(lanes) * sizeof(T));
  return load(all);
}

// Interleaving the first half of the vectors with the second moves one bit of the number of the
// vector into the number of the lane; once for each bit exchanges the two.
MAFNET_KERNEL MAFNET_INLINE void transpose(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes; bit *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// pixels[i][c] = plane c of planes at pixel i; the channels that are missing are zeros. Fetches a
// tile at `later` into the L2 cache.
template <typename T>
MAFNET_KERNEL void read_tile(const T* planes, int64_t plane, int64_t channels, int count,
                             const T* later, float* __restrict__ pixels) {
  for (int64_t c = 0; c < kTileChannels; c += kLanes) {
    for (int i = 0; i < count; i += kLanes) {
      const T* source = planes + c * plane + i;
      Vec v[kLanes];
      if (c + kLanes <= channels && i + kLanes <= count) {
#pragma GCC unroll 16
        for (int u = 0; u < kLanes; ++u) {
          v[u] = load(source + u * plane);
          __builtin_prefetch(later + (c + u) * plane + i, 0, 2);
        }
      } else {
        for (int u = 0; u < kLanes; ++u) {
          v[u] = c + u < channels ? load_first(source + u * plane, std::min(kLanes, count - i))
                                  : broadcast(0);
        }
      }
      transpose(v);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) store(pixels + (i + k) * kTileChannels + c, v[k]);
    }
  }
}

}  // namespace
}  // namespace mafnet
