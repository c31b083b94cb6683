// PyTorch's threads for kernels on the CPU, without its headers: they take a second of every file.
#pragma once

#include <cstdint>

namespace mafnet {

int num_threads();

// Calls body(context, from, to) for ranges that make up begin .. end, of at least grain if there
// are several, on as many threads.
void share_range(int64_t begin, int64_t end, int64_t grain, const void* context,
                 void (*body)(const void*, int64_t, int64_t));

// body(from, to) likewise.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  share_range(begin, end, grain, &body, [](const void* context, int64_t from, int64_t to) {
    (*static_cast<const Body*>(context))(from, to);
  });
}

}  // namespace mafnet
