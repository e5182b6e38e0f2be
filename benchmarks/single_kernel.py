"""One attention kernel, compiled alone, with the tiles of `shapes.h` or with others in their place."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kernel_table import GRADIENTS, LIMITS, KernelName, Tiles, blocks_per_multiprocessor, read_tiles
from machine_code import Instruction, MachineKernel, compile_kernels
from machine_loops import FlowGraph

from hf_lmopt.extension_sources import SOURCE_DIR


_TYPES = {"float16": "Half", "bfloat16": "BFloat16"}
_HEADERS = "".join(f'#include "cuda/attention/{name}.cuh"\n' for name in ("forward", "backward", "bias_gradient"))
_EXCHANGED = {
    "forward": "constexpr ForwardShape forward_shape(int head_size, Generation generation, bool splits_keys) {\n",
    "backward": "constexpr BackwardShape backward_shape(GradientOf of, int head_size, Generation generation) {\n",
}


@dataclass(frozen=True)
class SingleKernel:
    """
    A kernel and what a warp executes in one step of its main loop.

    Attributes:
        name (`KernelName`): what it is.
        architecture (`int`): 80 for sm_80.
        tiles (`Tiles`): what a block works on.
        code (`MachineKernel`): registers, spills and instructions.
        step (`Counter[str]`): instructions by opcode, on the plain way through the main loop (`machine_loops.py`).
    """

    name: KernelName
    architecture: int
    tiles: Tiles
    code: MachineKernel
    step: Counter[str]

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at a time."""
        shared = self.code.static_shared_bytes + self.tiles.shared_bytes
        return blocks_per_multiprocessor(self.code.registers, self.tiles.num_warps, shared, LIMITS[self.architecture])


def compile_single(
    name: KernelName, architecture: int, numbers: tuple[int, ...] | None = None, source_dir: Path = SOURCE_DIR
) -> SingleKernel:
    """
    Compiles one kernel.

    Args:
        name (`KernelName`):
            Which.
        architecture (`int`):
            80 for sm_80.
        numbers (`tuple[int, ...]`, *optional*):
            Its `ForwardShape` or `BackwardShape`, in place of that of `shapes.h`.
        source_dir (`Path`, *optional*, defaults to the package's `csrc`):
            The sources.

    Raises:
        RuntimeError: if that does not compile, as tiles may be too small for the threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources = source_dir if numbers is None else _exchange_tiles(name, numbers, source_dir, Path(folder))
        source = Path(folder, "single.cu")
        source.write_text(f"{_HEADERS}namespace lmopt {{ namespace cuda {{\n{_instantiation(name)}\n}} }}\n")
        (code,) = compile_kernels(source, str(architecture), Path(folder), sources)
        tiles = read_tiles(sources)[name.kind, architecture, name.head_size]
    return SingleKernel(name, architecture, tiles, code, count_step(code, name, tiles))


def count_step(code: MachineKernel, name: KernelName, tiles: Tiles) -> Counter[str]:
    """Instructions of a warp in one step, by opcode; loops that copy are passed as often as the tiles demand."""
    graph = FlowGraph(code.instructions)
    found = graph.main_loop()
    if found is None:
        return Counter()
    straight: Counter[str] = Counter()
    copying: Counter[str] = Counter()
    for block, is_inner in graph.plain_way(*found):
        instructions = graph.instructions_of(block)
        (copying if is_inner and _copies(instructions) else straight).update(x.opcode for x in instructions)
    copies = 2 * tiles.num_inner * name.head_size * 2 // 16 // (32 * tiles.num_warps)  # of two tiles, by each thread
    written = sum(count for opcode, count in copying.items() if opcode.startswith(("LDGSTS", "STS")))
    passes = max(1, copies // written) if written else 1
    return straight + Counter({opcode: passes * count for opcode, count in copying.items()})


def _copies(instructions: tuple[Instruction, ...]) -> bool:
    return any(x.name == "LDGSTS" or (x.name == "STS" and ".128" in x.opcode) for x in instructions)


def _instantiation(name: KernelName) -> str:
    element, size = _TYPES[name.type], name.head_size
    if name.kind in ("forward", "decoding"):
        splits = "true" if name.kind == "decoding" else "false"
        kernel, second = f"attention_forward_kernel<{element}, {size}, {splits}>", "SplitKeys"
    elif name.kind == "bias gradient":
        kernel, second = f"bias_gradient_kernel<{element}, {size}>", "DeviceGradients"
    else:
        of = GRADIENTS.index(name.kind)
        kernel = f"attention_backward_kernel<{element}, {size}, static_cast<GradientOf>({of})>"
        second = "DeviceGradients"
    return f"template __global__ void {kernel}(const DeviceCall, const {second});"


def _exchange_tiles(name: KernelName, numbers: tuple[int, ...], source_dir: Path, folder: Path) -> Path:
    """A copy of the sources in which one shape is another."""
    sources = folder / "csrc"
    shutil.copytree(source_dir, sources)
    header = sources / "cuda" / "attention" / "shapes.h"
    function = _EXCHANGED["forward" if name.kind in ("forward", "decoding") else "backward"]
    splits = {"forward": " && !splits_keys", "decoding": " && splits_keys"}.get(name.kind, "")
    line = f"  if (head_size == {name.head_size}{splits}) return {{{', '.join(map(str, numbers))}}};\n"
    text = header.read_text()
    if function not in text:
        raise RuntimeError(f"shapes.h has no {re.sub('[{]', '', function).strip()}; single_kernel.py must follow it.")
    header.write_text(text.replace(function, function + line))
    return sources
