// The types of numbers that kernels take.
#pragma once

namespace lmopt {

enum class ElementType { float32, bfloat16, float16 };

}  // namespace lmopt
