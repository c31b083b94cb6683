#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace mafnet {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void share_range(int64_t begin, int64_t end, int64_t grain, const void* context,
                 void (*body)(const void*, int64_t, int64_t)) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t from, int64_t to) { body(context, from, to); });
}

}  // namespace mafnet
