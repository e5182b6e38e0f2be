// All that host code of csrc/cuda/ asks of torch about the device: which one is current, memory and the stream.
//
// device.cpp answers over the stable ABI. The tests, which run kernels without a GPU, link answers of their own.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace lmopt {
namespace cuda {

// Makes the device of a tensor current while it lives; kernels are launched, and attributes asked, on that one.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  void* guard_;
};

// Uninitialised, on the device of `like`, from torch's allocator. Memory that is given back while kernels of the
// current stream still read it is safe, since torch hands it out again in the order of that stream.
torch::stable::Tensor new_device_tensor(
    const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides,
    torch::headeronly::ScalarType type,
    const torch::stable::Tensor& like);

// The tensor itself if it is contiguous and of that type, else a copy, made on the current stream.
torch::stable::Tensor make_contiguous_on_device(
    const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type);

// The stream that torch works on, on the device of `like`: a cudaStream_t.
void* current_stream(const torch::stable::Tensor& like);

}  // namespace cuda
}  // namespace lmopt
