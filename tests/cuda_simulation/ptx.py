"""What PTX consists of: kernels, variables, and instructions with typed operands. `parser.py` makes them of a text."""

from __future__ import annotations

from dataclasses import dataclass, field


class PtxError(Exception):
    """PTX that the interpreter does not know, or that is not valid; the message has the line."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal as it is written: `12`, `0xffU`, `0f3F800000` (bits of a float32) or `0d...` (of a float64)."""

    text: str


@dataclass(frozen=True)
class Symbol:
    """The name of a variable or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or `p|q` where an instruction has two results."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Negated:
    register: Register


Operand = Register | Immediate | Symbol | Address | Vector | Negated


@dataclass(frozen=True)
class Instruction:
    """
    One instruction.

    Attributes:
        root (`str`): the first part of the opcode, such as `"mma"`.
        modifiers (`tuple[str, ...]`): the others, in order; a type is the last, or the last two.
        operands (`tuple[Operand, ...]`): results first.
        predicate (`Register | Negated | None`): lanes for which it is false skip the instruction.
        line (`int`): in the PTX text, from 1.
        text (`str`): as written, in one line.
    """

    root: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | Negated | None
    line: int
    text: str

    @property
    def opcode(self) -> str:
        return ".".join((self.root, *self.modifiers))


@dataclass(frozen=True)
class Variable:
    """A variable in a state space; `size` in bytes is None for `extern`, whose size a launch gives."""

    name: str
    space: str
    align: int
    size: int | None
    initial: bytes = b""


@dataclass(eq=False)
class Kernel:
    """An entry point; `registers` maps names to types, `labels` and `branch_targets` to positions in the code."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # offset in the parameter space
    parameter_sizes: list[tuple[int, int]] = field(default_factory=list)  # (offset, size), in order
    parameter_bytes: int = 0
    variables: dict[str, Variable] = field(default_factory=dict)
    max_threads: int | None = None
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)


BYTES_OF_TYPE = {"pred": 1, "b128": 16} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)
}
BYTES_OF_TYPE |= {"bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4}
