#include "cuda/attention/backward_launch.cuh"

namespace lmopt {
namespace cuda {
namespace float16 {

int launch_backward(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  return launch_backward_of<Half>(call, gradients, card, stream);
}

int launch_bias_gradient(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  return launch_bias_gradient_of<Half>(call, gradients, card, stream);
}

}  // namespace float16
}  // namespace cuda
}  // namespace lmopt
