"""Kernels of a few instructions for the tests: their text around a body, and a run of it in the interpreter."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .interpreter import Counts, Interpreter
from .memory import GlobalMemory
from .parser import Module
from .problems import ProblemList
from .ptx import BYTES_OF_TYPE
from .registers import Array


DECLARATIONS = """
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>;
    .reg .f32 %f<32>;
    .reg .b64 %d<32>;
    .reg .f64 %fd<16>;
"""


class MicroKernel:
    """
    A kernel whose parameters are the addresses of arrays.

    Args:
        body (`str`):
            PTX after the declarations of [`DECLARATIONS`]. Each array gives a register of its name, such as `%out`,
            with its address, and one with `_of_thread` with that of the thread's own element.
        arrays (`Mapping[str, Array]`):
            Arrays of one element per thread, or more. Those of `read_only` may not be written, and `unwritten` ones
            count as not initialised.
        shared_bytes (`int`, *optional*, defaults to `0`):
            Size of the shared variable `shared`.
        threads (`int`), blocks (`int`), *optional*:
            Shape of the launch.
    """

    def __init__(
        self,
        body: str,
        arrays: Mapping[str, Array],
        read_only: Sequence[str] = (),
        unwritten: Sequence[str] = ("out",),
        shared_bytes: int = 0,
        threads: int = 32,
        blocks: int = 1,
        declarations: str = "",
    ) -> None:
        self.arrays, self.threads, self.blocks = arrays, threads, blocks
        self.problems, self.memory = ProblemList(), GlobalMemory()
        for name, array in arrays.items():
            is_written = name not in unwritten
            self.memory.register(name, array.ctypes.data, array.nbytes, name not in read_only, is_written)
        self.kernel = Module(self._text(body, shared_bytes, declarations))["micro_kernel"]

    def _text(self, body: str, shared_bytes: int, declarations: str) -> str:
        parameters = ",\n".join(f".param .u64 address_of_{name}" for name in self.arrays)
        registers = "\n".join(f".reg .b64 %{name}, %{name}_of_thread;" for name in self.arrays)
        prelude = ["mov.u32 %r60, %ctaid.x;", "mov.u32 %r61, %ntid.x;", "mov.u32 %r62, %tid.x;"]
        prelude += ["mad.lo.u32 %r63, %r60, %r61, %r62;"]
        for name, array in self.arrays.items():
            prelude.append(f"ld.param.u64 %{name}, [address_of_{name}];")
            prelude.append(f"mad.wide.u32 %{name}_of_thread, %r63, {array.itemsize}, %{name};")
        shared = f".shared .align 16 .b8 shared[{shared_bytes}];" if shared_bytes else ""
        lines = [f".version 9.0\n.target sm_80\n{shared}\n.visible .entry micro_kernel({parameters})\n{{"]
        return "\n".join([*lines, DECLARATIONS, registers, declarations, *prelude, body, "}\n"])

    def run(self, block_order: int | None = None) -> Counts:
        addresses = [array.ctypes.data for array in self.arrays.values()]
        parameters = struct.pack(f"<{len(addresses)}Q", *addresses)
        interpreter = Interpreter(self.memory, self.problems)
        shape = (self.blocks, 1, 1), (self.threads, 1, 1)
        return interpreter.launch(self.kernel, *shape, 0, parameters, block_order)

    @property
    def checks(self) -> list[str]:
        """The checks that found something."""
        return [problem.check for problem in self.problems]


_REGISTER_CLASS = {"8": "%h", "16": "%h", "32": "%r", "64": "%d"}


def evaluate(text: str, sources: Sequence[tuple[str, Sequence[int]]], result_type: str) -> list[int]:
    """
    What an instruction gives for many operands.

    Args:
        text (`str`):
            Instructions with `{d}` for the result and `{a}`, `{b}`, `{c}` for the sources.
        sources (`Sequence[tuple[str, Sequence[int]]]`):
            Of each source its type and its values, as bits.
        result_type (`str`):
            Type of the result.

    Returns:
        `list[int]`: the results, as bits.
    """
    count = len(sources[0][1])
    threads = -(-count // 32) * 32
    arrays: dict[str, Array] = {"out": np.zeros(threads, f"u{BYTES_OF_TYPE[result_type]}")}
    loads, names = [], {}
    for i, (type_name, values) in enumerate(sources):
        padded = [*values, *[values[0]] * (threads - count)]
        arrays[f"in{i}"] = np.array(padded, f"u{BYTES_OF_TYPE[type_name]}")
        names["abc"[i]] = _register(type_name, 1 + i)
        loads.append(f"ld.global.b{8 * BYTES_OF_TYPE[type_name]} {names['abc'[i]]}, [%in{i}_of_thread];")
    names["d"] = _register(result_type, 10)
    store = f"st.global.b{8 * BYTES_OF_TYPE[result_type]} [%out_of_thread], {names['d']};"
    body = "\n".join([*loads, text.format(**names), store, "ret;"])
    kernel = MicroKernel(body, arrays, threads=min(threads, 256), blocks=-(-threads // 256))
    if threads > 256 and threads % 256:
        raise ValueError(f"{count} operands do not fill blocks of 256 threads. Give up to 256, or a multiple.")
    kernel.run()
    assert not kernel.problems, kernel.problems
    return [int(value) for value in arrays["out"][:count]]


def _register(type_name: str, number: int) -> str:
    return f"{_REGISTER_CLASS[str(8 * BYTES_OF_TYPE[type_name])]}{number}"


def evaluate_pairs(
    text: str, type_name: str, edges: Sequence[int], result_type: str = ""
) -> dict[tuple[int, int], int]:
    """The same for all pairs of some values."""
    pairs = [(a, b) for a in edges for b in edges]
    while len(pairs) % 256:
        pairs.append(pairs[0])
    sources = [(type_name, [pair[i] for pair in pairs]) for i in (0, 1)]
    return dict(zip(pairs, evaluate(text, sources, result_type or type_name), strict=True))


Definition = Callable[..., int]
