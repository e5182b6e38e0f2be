// What host code asks of torch about the device, answered with CPU memory: csrc/cuda/device.cpp for the tests.
#include "cuda/device.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstddef>
#include <cstring>

int cuda_simulation_add_buffer(void* address, size_t num_bytes, int is_written);

namespace lmopt {
namespace cuda {
namespace {

// Between allocations, so that no stray access meets another buffer; also what the largest vector load needs.
constexpr int64_t kGuardBytes = 256;
constexpr int kPoison = 0xff;  // NaN in every floating-point type, -1 in the others

}  // namespace

using torch::stable::Tensor;

OnDevice::OnDevice(const Tensor&) : guard_(nullptr) {}

OnDevice::~OnDevice() {}

Tensor new_device_tensor(
    const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, torch::headeronly::ScalarType type,
    const Tensor& like) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto type_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int64_t num_elements = 1;
  for (size_t axis = 0; axis < sizes.size(); ++axis) num_elements += (sizes[axis] - 1) * strides[axis];
  for (const int64_t size : sizes) num_elements = size == 0 ? 0 : num_elements;
  // Counted in elements of any size: at least kGuardBytes on each side.
  const int64_t flat_size = num_elements + 2 * kGuardBytes, flat_stride = 1;
  AtenTensorHandle flat = nullptr, view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &flat_size, &flat_stride, type_code, device_type, -1, &flat));
  const Tensor owner(flat);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      flat, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), kGuardBytes, &view));
  const Tensor tensor(view);
  const size_t element_bytes = owner.element_size();
  std::memset(owner.mutable_data_ptr(), kPoison, flat_size * element_bytes);
  STD_TORCH_CHECK(
      cuda_simulation_add_buffer(tensor.mutable_data_ptr(), num_elements * element_bytes, false) == 0,
      "An operator of the CUDA simulation was called outside `with simulate(...)`. Call it inside.");
  return tensor;
}

Tensor make_contiguous_on_device(const Tensor& tensor, torch::headeronly::ScalarType type) {
  if (tensor.is_contiguous() && tensor.scalar_type() == type) return tensor;
  const Tensor copy = torch::stable::contiguous(torch::stable::to(tensor, type));
  STD_TORCH_CHECK(
      cuda_simulation_add_buffer(copy.mutable_data_ptr(), copy.numel() * copy.element_size(), true) == 0,
      "An operator of the CUDA simulation was called outside `with simulate(...)`. Call it inside.");
  return copy;
}

void* current_stream(const Tensor&) {
  return nullptr;
}

}  // namespace cuda
}  // namespace lmopt
