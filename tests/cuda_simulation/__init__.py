"""
Runs the compiled CUDA code without a GPU: an interpreter for the PTX that nvcc emits, with the checks of a sanitizer.

    torch operator -> host code -> nvcc's launch stub -> native/cudart.cpp -> launch.py -> execution.py

    build.py, native/        compile kernels to PTX and host code for CPU tensors; a stand-in for libcudart
    launch.py, run.py        what host code asks of the card, and launches: `simulate()` is the way in
    card.py                  the cards and their limits
    ptx.py, parser.py        instructions with typed operands, from the text that nvcc emits
    control_flow.py          basic blocks, and registers that may be read before they are written
    interpreter.py           a launch as batches of thread blocks
    execution.py             a batch: which threads run what; code_blocks.py, barriers.py, lanes.py
    registers.py             one array per register, one element per thread
    decoding.py              from an instruction to a function over such arrays, by the definitions in
                             integer_arithmetic.py, bit_operations.py, selection.py, float_arithmetic.py,
                             conversion.py, number_formats.py, warp.py, tensor_core.py, load_store.py, atomics.py
                             and async_copy.py
    memory.py, accesses.py   buffers and shared memory, and accesses to them
    shadow.py, ordering.py   who touched which bytes when, and what is ordered: races, unwritten bytes
    problems.py              what the checks found
    micro_kernel.py, exact_rounding.py  for the tests beside them: kernels of a few lines, IEEE 754 by fractions

Left out: time, warpgroup and TMA instructions, calls of functions that are not inlined, textures, memory fences
weaker than a barrier, and all that ptxas does. What passes here is "checked at PTX level", not "ran on a GPU".
"""
