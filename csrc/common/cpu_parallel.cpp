#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace mafnet {
namespace {

// Stores around the caches are not in the order of others: whoever learns that a range is done
// must find them.
void order_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void share_range(int64_t begin, int64_t end, int64_t grain, const void* context,
                 void (*body)(const void*, int64_t, int64_t)) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    body(context, from, to);
    order_stores();
  });
}

}  // namespace mafnet
