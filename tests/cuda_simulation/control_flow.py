"""Basic blocks of a kernel, and the reads of registers that some path reaches without a write."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

from .ptx import Address, Instruction, Kernel, Negated, Operand, PtxError, Register, Symbol, Vector


# These end a block: the threads that ran it together may part, or wait.
BRANCHES = ("bra", "brx")
EXITS = ("ret", "exit", "trap")
BARRIERS = ("bar", "barrier")
_WITHOUT_RESULT = (
    "st",
    "red",
    "cp",
    "bra",
    "brx",
    "bar",
    "barrier",
    "ret",
    "exit",
    "trap",
    "membar",
    "fence",
    "prefetch",
)


@dataclass
class BasicBlock:
    """Instructions `[begin, end)`, and where the threads may be afterwards."""

    begin: int
    end: int
    successors: list[int] = field(default_factory=list)


def ends_block(instruction: Instruction) -> bool:
    """Whether threads may part or wait here; `bar.warp` only orders a warp's own lanes."""
    if instruction.root in BARRIERS:
        return instruction.modifiers[0] != "warp"
    return instruction.root in BRANCHES + EXITS


@functools.lru_cache(maxsize=256)
def find_blocks(kernel: Kernel) -> dict[int, BasicBlock]:
    """The basic blocks by the position of their first instruction."""
    code = kernel.instructions
    if not code or code[-1].root not in (*EXITS, "bra") or code[-1].predicate is not None:
        raise PtxError(f"{kernel.name} does not end with ret, exit or bra. The PTX is cut off; compile it anew.")
    begins = {0, *kernel.labels.values()} | {i + 1 for i, instruction in enumerate(code) if ends_block(instruction)}
    ordered = sorted(begin for begin in begins if begin < len(code))
    blocks = {begin: BasicBlock(begin, end) for begin, end in zip(ordered, [*ordered[1:], len(code)], strict=True)}
    for block in blocks.values():
        block.successors = list(_successors(kernel, block))
    return blocks


def targets_of(kernel: Kernel, instruction: Instruction) -> list[int]:
    """Positions that a branch may go to, in the order of its table."""
    last = instruction.operands[-1]
    assert isinstance(last, Symbol)
    names = kernel.branch_targets[last.name] if instruction.root == "brx" else [last.name]
    return [kernel.labels[name] for name in names]


def _successors(kernel: Kernel, block: BasicBlock) -> Iterator[int]:
    last = kernel.instructions[block.end - 1]
    if last.root in BRANCHES:
        yield from targets_of(kernel, last)
    if last.root not in BRANCHES + EXITS or last.predicate is not None:
        yield block.end


def registers_read(instruction: Instruction) -> set[str]:
    """Names of the registers that an instruction reads, its predicate included."""
    sources = list(instruction.operands[1 if _has_result(instruction) else 0 :])
    if instruction.predicate is not None:
        sources.append(instruction.predicate)
    if instruction.operands and isinstance(instruction.operands[0], Address):
        sources.append(instruction.operands[0])
    return {name for source in sources for name in _names(source)}


def registers_written(instruction: Instruction) -> set[str]:
    return set(_names(instruction.operands[0])) if _has_result(instruction) else set()


def _has_result(instruction: Instruction) -> bool:
    if instruction.root in BARRIERS:
        return "red" in instruction.modifiers
    return bool(instruction.operands) and instruction.root not in _WITHOUT_RESULT


def _names(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Negated):
        yield operand.register.name
    elif isinstance(operand, Address):
        yield from _names(operand.base)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _names(item)


@functools.lru_cache(maxsize=256)
def find_doubtful_reads(kernel: Kernel) -> dict[int, set[str]]:
    """
    Reads that not every path to them has written before: the registers by the position of the reading instruction.

    Only these need a check at run time. A write under a predicate counts as none.
    """
    blocks = find_blocks(kernel)
    bits = {name: 1 << i for i, name in enumerate(kernel.registers)}  # a set of registers is one integer
    writes = [_as_bits(bits, registers_written(i)) if i.predicate is None else 0 for i in kernel.instructions]
    written_before = _written_on_every_path(blocks, writes)
    doubtful: dict[int, set[str]] = {}
    for block in blocks.values():
        written = written_before[block.begin] or 0
        for position in range(block.begin, block.end):
            names = registers_read(kernel.instructions[position])
            if _as_bits(bits, names) & ~written:
                doubtful[position] = {name for name in names if bits.get(name, 0) & ~written}
            written |= writes[position]
    return doubtful


def _as_bits(bits: dict[str, int], names: set[str]) -> int:
    result = 0
    for name in names:
        result |= bits.get(name, 0)
    return result


def _written_on_every_path(blocks: dict[int, BasicBlock], writes: list[int]) -> dict[int, int | None]:
    """For each block the registers written on every path to it; None where no path leads."""
    writes_of = {b.begin: functools.reduce(operator.or_, writes[b.begin : b.end], 0) for b in blocks.values()}
    before: dict[int, int | None] = dict.fromkeys(blocks)
    before[0] = 0
    to_visit = [0]
    while to_visit:
        begin = to_visit.pop()
        after = (before[begin] or 0) | writes_of[begin]
        for successor in blocks[begin].successors:
            known = before.get(successor)
            reduced = after if known is None else known & after
            if reduced != known:
                before[successor] = reduced
                to_visit.append(successor)
    return before
