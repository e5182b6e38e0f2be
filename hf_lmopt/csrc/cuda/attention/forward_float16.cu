#include "cuda/attention/forward_launch.cuh"

namespace lmopt {
namespace cuda {
namespace float16 {

int launch_forward(const DeviceCall& call, const SplitKeys* split, const Card& card, void* stream) {
  return launch_forward_of<Half>(call, split, card, stream);
}

}  // namespace float16
}  // namespace cuda
}  // namespace lmopt
