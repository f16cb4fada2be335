// The device, the current stream and the outcome of launches.
#pragma once

#include <cuda_runtime.h>

#include "check.h"

// Weak: a torch without CUDA has no such symbol, and the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace shadowkv {

inline void check_cuda(cudaError_t error, const char* op) {
  SHADOWKV_CHECK(error == cudaSuccess, op, cudaGetErrorString(error));
}

/// Makes a tensor's device current while it lives, and knows torch's stream there.
class Device {
 public:
  Device(const Tensor& tensor, const char* op, const char* name)
      : op_(op), index_(tensor.get_device_index()) {
    SHADOWKV_CHECK(tensor.is_cuda(), op, name, " must be on a GPU");
    check_cuda(cudaGetDevice(&before_), op);
    if (before_ != index_) check_cuda(cudaSetDevice(index_), op);
    void* stream = nullptr;
    SHADOWKV_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                       aoti_torch_get_current_cuda_stream(index_, &stream) == 0,
                   op, "torch has no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~Device() {
    if (before_ != index_) cudaSetDevice(before_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }

  int processors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), op_);
    return count;
  }

  /// Bytes of shared memory that a block may have at most.
  size_t most_shared() const {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), op_);
    return static_cast<size_t>(bytes);
  }

  /// Architecture (80, 90) for which the code of a kernel that this GPU takes was written.
  template <typename Kernel>
  int architecture(Kernel kernel) const {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), op_);
    return attributes.ptxVersion;
  }

  void check_launch() const { check_cuda(cudaGetLastError(), op_); }

  /// Let a kernel use that many bytes of dynamic shared memory (over 48 KiB only on request), and run
  /// where as much of a processor's memory is shared as can be: it is divided anew only when nothing
  /// runs there, so that kernels of other divisions would wait for each other.
  template <typename Kernel>
  void allow_shared(Kernel kernel, size_t bytes) const {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               op_);
    if (bytes > 48 * 1024) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)),
                 op_);
    }
  }

 private:
  const char* op_;
  int index_;
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace shadowkv
