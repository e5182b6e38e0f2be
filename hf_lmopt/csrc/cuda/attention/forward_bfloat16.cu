#include "cuda/attention/forward_launch.cuh"

namespace lmopt {
namespace cuda {
namespace bfloat16 {

int launch_forward(const DeviceCall& call, const SplitKeys* split, const Card& card, void* stream) {
  return launch_forward_of<BFloat16>(call, split, card, stream);
}

}  // namespace bfloat16
}  // namespace cuda
}  // namespace lmopt
