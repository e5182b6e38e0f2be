"""
Every kernel that is compiled, why it is, its tiles (from `csrc/cuda/attention/shapes.h`) and how many blocks of it a
multiprocessor should hold at a time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from machine_code import MachineKernel
from machine_loops import FlowGraph

from hf_lmopt.compilers import find_compiler
from hf_lmopt.extension_sources import SOURCE_DIR


TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16"}
GRADIENTS = ("query gradient", "key gradient", "value gradient", "key and value gradients")
REASONS = {
    "forward": "output and logsumexp",
    "decoding": "up to 16 queries: all heads that share keys in one block, and the keys split among blocks",
    "query gradient": "sums over keys, so that no sum is shared between blocks",
    "key and value gradients": "sums over queries; both from the same scores",
    "key gradient": "the sums of key and value do not fit into the registers together",
    "value gradient": "the sums of key and value do not fit into the registers together",
    "bias gradient": "sums over all that share an entry of the bias",
}
HEAD_SIZE_REASONS = {
    32: "small models, and heads filled up from 8 on",
    64: "GPT-2, BERT and most small models",
    96: "Phi-3, and heads of 72 and 80; at 128 a third would be zeros",
    128: "Llama, Qwen, Mistral",
    256: "Gemma; registers and shared memory set its tiles",
}
OTHER_REASONS = {
    "combine_kernel": "joins the parts of decoding",
    "prepare_backward_kernel": "delta of each query",
    "sinks_gradient_kernel": "the gradient of sinks, in one order",
    "intervals_kernel": "which keys a query sees, from rules",
    "seen_keys_kernel": "which keys are seen, from rules",
    "map_kernel": "the block map of a boolean mask",
    "seen_keys_of_map_kernel": "which keys are seen, from a map",
    "seeing_queries_kernel": "which queries see anything, from a map",
    "sum_blocks_kernel": "a norm or a count, before a step that needs it",
    "correction_scales_kernel": "the norm of MARS's correction",
    "cautious_scales_kernel": "the scale of cautious updates",
    "fused_step_kernel": "one for each rule and type: the state stays in registers",
}
EMPTY = "no code: the products or the separate sums do not exist on this architecture"
_ATTENTION = re.compile(
    r"(attention_forward|attention_backward|bias_gradient)_kernelI(6__half|13__nv_bfloat16)Li(\d+)E"
    r"(?:Lb([01])E)?(?:LNS\w*?GradientOfE(\d)E)?"
)
# Blocks of threads that a multiprocessor is to hold at a time, by kernel and head size; a block of four warps has one
# for each scheduler.
#
#   forward      2: while one block waits for keys, exponentiates or begins, the other multiplies. A third would leave
#                168 registers a thread, and no room for tiles of 32 rows a warp, which halve the loads of factors.
#   decoding     4, as many as choose_num_splits() makes: what counts is how many bytes are on their way.
#   gradients    2, for the same reason as forward.
#   256          1: the sums of a row take 128 registers of a thread, and the tiles most of the shared memory.
INTENDED_BLOCKS = {
    "forward": {32: 2, 64: 2, 96: 2, 128: 2, 256: 1},
    "decoding": {32: 4, 64: 4, 96: 4, 128: 4, 256: 3},
    "query gradient": {32: 2, 64: 2, 96: 2, 128: 2, 256: 1},
    "key and value gradients": {32: 2, 64: 2, 96: 2, 128: 2},
    "key gradient": {96: 2, 128: 2, 256: 1},
    "value gradient": {96: 2, 128: 2, 256: 1},
    "bias gradient": {32: 2, 64: 2, 96: 2, 128: 2, 256: 1},
}
# Where shared memory has no room for as many: of 64 KB on Turing, of 100 KB on sm_120.
FEWER_BLOCKS = {
    75: {
        **{(kind, size): 1 for kind in ("forward", "query gradient", "bias gradient") for size in (96, 128)},
        ("key and value gradients", 96): 1,
        ("key gradient", 128): 1,
        ("value gradient", 128): 1,
        ("decoding", 256): 2,
    },
    120: {
        **{(kind, 128): 1 for kind in ("query gradient", "key gradient", "value gradient")},
        ("decoding", 96): 3,
        ("decoding", 128): 2,
        ("decoding", 256): 2,
    },
}
_SHAPES_PROGRAM = """
#include <cstdio>
#include "cuda/attention/shapes.h"
using namespace lmopt::cuda;
void print(const char* kind, int architecture, int size, int warps, int tiles, int inner, int stages, int shared) {
  std::printf("%s,%d,%d,%d,%d,%d,%d,%d\\n", kind, architecture, size, warps, tiles, inner, stages, shared);
}
int main() {
  const int architectures[] = {75, 80, 90, 100, 120};
  const char* kinds[] = {"query gradient", "key gradient", "value gradient", "key and value gradients"};
  for (int a : architectures) for (int size : kHeadSizes) {
    const Generation generation = generation_of(a);
    for (int splits = 0; splits < 2; ++splits) {
      const ForwardShape s = forward_shape(size, generation, splits);
      const char* kind = splits ? "decoding" : "forward";
      print(kind, a, size, s.num_warps, s.tiles_per_warp, s.num_keys, 1, s.shared_bytes(size));
    }
    for (int of = 0; of < 4; ++of) {
      const BackwardShape s = backward_shape(static_cast<GradientOf>(of), size, generation);
      if (uses_gradient_kernel(static_cast<GradientOf>(of), size, generation))
        print(kinds[of], a, size, s.num_warps, s.tiles_per_warp, s.num_inner_rows, s.num_stages, s.shared_bytes(size));
    }
    const BackwardShape s = bias_gradient_shape(size, generation);
    const char* kind = "bias gradient";
    print(kind, a, size, s.num_warps, s.tiles_per_warp, s.num_inner_rows, s.num_stages, s.shared_bytes(size));
  }
}
"""


@dataclass(frozen=True)
class Tiles:
    """What a block of threads works on: `num_rows` rows that stay, `num_inner` that pass by in each step."""

    num_warps: int
    tiles_per_warp: int  # of 16 rows
    num_inner: int
    num_stages: int
    shared_bytes: int

    @property
    def num_rows(self) -> int:
        return 16 * self.tiles_per_warp * self.num_warps


@dataclass(frozen=True)
class KernelName:
    """What an attention kernel is compiled for."""

    kind: str
    type: str
    head_size: int

    def num_products(self, tiles: Tiles, architecture: int) -> int:
        """
        Instructions of the tensor cores that a warp needs for a step, by the shapes alone.

        A tile of 16 rows, `num_inner` rows passing by and a head size of D are `num_inner / 8 * D / 16` products of
        16 x 8 x 16 for each matrix product; Turing's are half as deep.
        """
        matrix_products = {"key and value gradients": 4, "query gradient": 3, "key gradient": 3}.get(self.kind, 2)
        halves = 2 if architecture < 80 else 1
        return matrix_products * tiles.tiles_per_warp * (tiles.num_inner // 8) * (self.head_size // 16) * halves


@dataclass(frozen=True)
class Card:
    """Limits of a multiprocessor (CUDA programming guide, technical specifications per compute capability)."""

    shared_bytes: int
    max_warps: int
    max_blocks: int
    reserved_bytes: int  # of shared memory, by the system for each block


LIMITS = {
    75: Card(64 << 10, 32, 16, 0),
    80: Card(164 << 10, 64, 32, 1 << 10),
    90: Card(228 << 10, 64, 32, 1 << 10),
    100: Card(228 << 10, 64, 32, 1 << 10),
    120: Card(100 << 10, 48, 24, 1 << 10),
}
REGISTERS_OF_SCHEDULER, REGISTER_UNIT = 16384, 256  # of which each multiprocessor has four


def blocks_per_multiprocessor(registers: int, num_warps: int, shared_bytes: int, card: Card) -> int:
    """How many blocks of threads fit at a time, by registers, shared memory and warps."""
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = 4 * (REGISTERS_OF_SCHEDULER // of_warp) // num_warps
    by_shared = card.shared_bytes // (shared_bytes + card.reserved_bytes) if shared_bytes else card.max_blocks
    return min(by_registers, by_shared, card.max_warps // num_warps, card.max_blocks)


def intended_blocks(name: KernelName, architecture: int) -> int:
    """How many the design wants."""
    fewer = FEWER_BLOCKS.get(architecture, {})
    return fewer.get((name.kind, name.head_size), INTENDED_BLOCKS[name.kind][name.head_size])


def parse_name(mangled: str) -> KernelName | None:
    """`None` for a kernel without products."""
    found = _ATTENTION.search(mangled)
    if found is None:
        return None
    kernel, type_name, head_size, splits, of = found.groups()
    kinds = {"attention_forward": "decoding" if splits == "1" else "forward", "bias_gradient": "bias gradient"}
    return KernelName(kinds.get(kernel) or GRADIENTS[int(of or 0)], TYPES[type_name], int(head_size))


def base_name(mangled: str) -> str:
    """The name of a kernel without products, such as `"map_kernel"`; all of it if it is not in the table."""
    return next((name for name in OTHER_REASONS if f"{len(name)}{name}" in mangled), mangled)


def read_tiles(source_dir: Path = SOURCE_DIR) -> dict[tuple[str, int, int], Tiles]:
    """The tiles by kind, architecture and head size, as the compiler sees them."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "tiles.cpp"), Path(folder, "tiles")
        source.write_text(_SHAPES_PROGRAM)
        command = [*find_compiler(), "-std=c++17", f"-I{source_dir}", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = (line.split(",") for line in lines)
    return {(kind, int(a), int(size)): Tiles(*map(int, numbers)) for kind, a, size, *numbers in rows}


def count_main_loop(kernel: MachineKernel) -> Counter[str]:
    """Instructions in the body of the main loop, by name; none where there is no loop with products."""
    graph = FlowGraph(kernel.instructions)
    found = graph.main_loop()
    if found is None:
        return Counter()
    return Counter(x.name for block in found[1] for x in graph.instructions_of(block))
