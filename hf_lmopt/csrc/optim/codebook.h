// A table of 256 ascending values in [-1, 1] that 8-bit states are stored by, prepared for a search without branches.
#pragma once

namespace lmopt {

struct Codebook {
  alignas(64) float values[256];
  // The midpoints between neighbouring values as a balanced search tree: the children of node i are 2i and 2i + 1, the
  // root is node 1. Eight steps down, to the right where the value is larger, end at node 256 + nearest code. In a table
  // that begins with 0, only 0 itself ends there.
  alignas(64) float tree[256];
  bool is_valid;  // whether the values ascend within [-1, 1]

  Codebook() : is_valid(false) {}  // for a state that needs none
  explicit Codebook(const float* ascending_values);
};

}  // namespace lmopt
