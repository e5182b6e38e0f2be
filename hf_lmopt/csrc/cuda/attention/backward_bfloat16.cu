#include "cuda/attention/backward_launch.cuh"

namespace lmopt {
namespace cuda {
namespace bfloat16 {

int launch_backward(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  return launch_backward_of<BFloat16>(call, gradients, card, stream);
}

int launch_bias_gradient(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  return launch_bias_gradient_of<BFloat16>(call, gradients, card, stream);
}

}  // namespace bfloat16
}  // namespace cuda
}  // namespace lmopt
