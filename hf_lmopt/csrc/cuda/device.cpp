#include "cuda/device.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

// Torch 2.13 has a stable way to the stream; older ones have this function, in the library of a CUDA build alone and
// declared only there. It is weak, so that a torch without CUDA loads this library, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);

namespace lmopt {
namespace cuda {

using torch::stable::Tensor;

OnDevice::OnDevice(const Tensor& tensor) : guard_(nullptr) {
  DeviceGuardHandle guard = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(tensor.get_device_index(), &guard));
  guard_ = guard;
}

OnDevice::~OnDevice() {
  aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_));
}

Tensor new_device_tensor(
    const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, torch::headeronly::ScalarType type,
    const Tensor& like) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto type_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type_code, device_type,
      like.get_device_index(), &tensor));
  return Tensor(tensor);
}

Tensor make_contiguous_on_device(const Tensor& tensor, torch::headeronly::ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(tensor, type));
}

void* current_stream(const Tensor& like) {
  STD_TORCH_CHECK(
      &aoti_torch_get_current_cuda_stream != nullptr, "The tensors are on a CUDA device, and this torch is built ",
      "without CUDA. A build with it is needed. Install one from pytorch.org.");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return stream;
}

}  // namespace cuda
}  // namespace lmopt
