// The launches of the kernels of attention. `stream` is a cudaStream_t; each returns a cudaError_t, 0 for success.
#pragma once

#include "cuda/attention/call.h"
#include "cuda/attention/shapes.h"

namespace lmopt {
namespace cuda {

// The card that is current, and the code that it runs.
struct Card {
  int compute_capability;  // 75 for 7.5
  int code_architecture;   // that the kernels in use were compiled for, of those that the library has
  int num_multiprocessors;

  Generation generation() const { return generation_of(code_architecture); }
};

int find_card(Card& card);

// Number of parts into which decoding splits the keys, or 0 where the forward pass does without.
int choose_num_splits(const DeviceCall& call, const Card& card);

int launch_forward(const DeviceCall& call, const Card& card, void* stream);
int launch_forward_split(const DeviceCall& call, const SplitKeys& split, const Card& card, void* stream);
// Joins the parts of a split forward pass into the call's results.
int launch_combine(const DeviceCall& call, const SplitKeys& split, void* stream);

// For the backward pass: origins and deltas; then each gradient.
int launch_prepare_backward(const DeviceCall& call, const DeviceGradients& gradients, void* stream);
int launch_backward(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream);
int launch_bias_gradient(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream);
int launch_sinks_gradient(const DeviceCall& call, const DeviceGradients& gradients, void* stream);

const char* describe_error(int error);

// The two types are compiled apart, as they take the longest.
namespace float16 {
int launch_forward(const DeviceCall& call, const SplitKeys* split, const Card& card, void* stream);
int launch_backward(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream);
int launch_bias_gradient(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream);
}  // namespace float16

namespace bfloat16 {
int launch_forward(const DeviceCall& call, const SplitKeys* split, const Card& card, void* stream);
int launch_backward(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream);
int launch_bias_gradient(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream);
}  // namespace bfloat16

}  // namespace cuda
}  // namespace lmopt
