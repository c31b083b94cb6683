// What differs between the two libraries that every binding.cpp is compiled into: _C and _C_cuda.
#pragma once

#include "common/checks.h"

#if defined(MAFNET_CUDA_LIBRARY)

#include <cuda_runtime_api.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#define MAFNET_LIBRARY_IMPL(module) STABLE_TORCH_LIBRARY_IMPL(mafnet_ops, CUDA, module)

namespace mafnet {

constexpr bool kIsCuda = true;

// Makes the tensor's device current for its lifetime and knows torch's current stream on it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(const char* op, int status) {
  STD_TORCH_CHECK(status == 0, op,
                  ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace mafnet

#else

#define MAFNET_LIBRARY_IMPL(module) STABLE_TORCH_LIBRARY_IMPL(mafnet_ops, CPU, module)

namespace mafnet {

constexpr bool kIsCuda = false;

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  void* stream() const { return nullptr; }
};

inline void check_launch(const char* op, int status) {
  STD_TORCH_CHECK(status == 0, op, ": CPU kernel failed with status ", status);
}

}  // namespace mafnet

#endif
