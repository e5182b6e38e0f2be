"""
The loops of a kernel's machine code, and the way through the one that does the work.

A loop is what a branch back to a block that dominates it closes (Aho et al., "Compilers", 9.6). The main loop is the
innermost one that holds all products of the tensor cores.

The plain way through it is that of a call without softcap, bias, dropout and mask, whose rows are aligned: of all
ways, the one with most products, most copies of 16 bytes, fewest loads of single numbers and reciprocals (which the
features alone need), most exponentials and, of those, fewest instructions.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from machine_code import Instruction


_ENDS = ("EXIT", "RET")
_BRANCHES = ("BRA", "JMP")


@dataclass(frozen=True)
class Block:
    """Instructions from `first` to before `end`, which are executed one after the other."""

    first: int
    end: int
    successors: tuple[int, ...]  # numbers of blocks


class FlowGraph:
    """
    The blocks of a kernel and which of them follow each other.

    Args:
        instructions (`tuple[Instruction, ...]`):
            Of one kernel, in order.
    """

    def __init__(self, instructions: tuple[Instruction, ...]) -> None:
        self.instructions = instructions
        self.blocks = _split(instructions)
        self._predecessors: dict[int, list[int]] = defaultdict(list)
        for number, block in enumerate(self.blocks):
            for successor in block.successors:
                self._predecessors[successor].append(number)
        self._order = self._reverse_postorder()
        self._dominators = self._find_dominators()

    def instructions_of(self, block: int) -> tuple[Instruction, ...]:
        return self.instructions[self.blocks[block].first : self.blocks[block].end]

    def loops(self) -> dict[int, set[int]]:
        """The blocks of each loop, by its first."""
        found: dict[int, set[int]] = defaultdict(set)
        for number in self._order:
            for head in self.blocks[number].successors:
                if self._dominates(head, number):
                    found[head] |= self._body(head, number)
        return dict(found)

    def main_loop(self, name: str = "HMMA") -> tuple[int, set[int]] | None:
        """First block and blocks of the smallest loop that has most instructions of this name; `None` without any."""

        def count(body: set[int]) -> int:
            return sum(instruction.name == name for block in body for instruction in self.instructions_of(block))

        loops = [(head, body) for head, body in self.loops().items() if count(body)]
        return max(loops, key=lambda loop: (count(loop[1]), -len(loop[1])), default=None)

    def plain_way(self, head: int, body: set[int]) -> list[tuple[int, bool]]:
        """Blocks from the head back to it, each with whether it lies in a loop of its own."""
        inner = set().union(
            *(other for start, other in self.loops().items() if start in body - {head} and other < body)
        )
        order = [block for block in self._order if block in body]
        place = {block: number for number, block in enumerate(order)}
        best: dict[int, tuple[tuple[int, ...], int | None]] = {head: (_merits(self.instructions_of(head)), None)}
        for block in order:
            if block not in best:
                continue
            for successor in self.blocks[block].successors:
                if place.get(successor, -1) <= place[block]:
                    continue
                merits = tuple(map(sum, zip(best[block][0], _merits(self.instructions_of(successor)), strict=True)))
                if successor not in best or merits > best[successor][0]:
                    best[successor] = merits, block
        ends = [block for block in order if head in self.blocks[block].successors and block in best]
        at: int | None = max(ends, key=lambda block: best[block][0])
        way = []
        while at is not None:
            way.append((at, at in inner))
            at = best[at][1]
        return way[::-1]

    def _reverse_postorder(self) -> list[int]:
        order, seen, stack = [], {0}, [(0, iter(self.blocks[0].successors))]
        while stack:
            number, successors = stack[-1]
            for successor in successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                order.append(number)
                stack.pop()
        return order[::-1]

    def _find_dominators(self) -> dict[int, int]:
        """Of each block the nearest that all ways to it pass (Cooper, Harvey and Kennedy 2001)."""
        place = {block: number for number, block in enumerate(self._order)}
        nearest = {0: 0}

        def meet(a: int, b: int) -> int:
            while a != b:
                a, b = (nearest[a], b) if place[a] > place[b] else (a, nearest[b])
            return a

        changes = True
        while changes:
            changes = False
            for block in self._order[1:]:
                known = [before for before in self._predecessors[block] if before in nearest]
                found = known[0]
                for before in known[1:]:
                    found = meet(found, before)
                changes |= nearest.get(block) != found
                nearest[block] = found
        return nearest

    def _dominates(self, above: int, block: int) -> bool:
        while block not in (above, 0):
            block = self._dominators[block]
        return block == above

    def _body(self, head: int, end: int) -> set[int]:
        body, todo = {head, end}, [end] if end != head else []
        while todo:
            for before in self._predecessors[todo.pop()]:
                if before not in body:
                    body.add(before)
                    todo.append(before)
        return body


def _merits(instructions: tuple[Instruction, ...]) -> tuple[int, ...]:
    """By which ways through the main loop are compared, the first that differs decides."""
    names = [instruction.name for instruction in instructions]
    wide = [instruction for instruction in instructions if ".128" in instruction.opcode]
    # An asynchronous copy counts more than the pair that takes its place where rows are not aligned.
    copies = 4 * names.count("LDGSTS") + sum(instruction.name in ("LDG", "STS") for instruction in wide)
    single_loads = names.count("LDG") - sum(instruction.name == "LDG" for instruction in wide)
    exponentials = sum(instruction.opcode.startswith("MUFU.EX2") for instruction in instructions)
    features = single_loads + sum(instruction.opcode.startswith("MUFU.RCP") for instruction in instructions)
    return names.count("HMMA"), copies, -features, exponentials, -len(instructions)


def _split(instructions: tuple[Instruction, ...]) -> list[Block]:
    starts = {0, len(instructions)}
    for number, instruction in enumerate(instructions):
        if instruction.name in _BRANCHES or instruction.name in _ENDS:
            starts |= {number + 1} | ({instruction.target} if instruction.target is not None else set())
    edges = sorted(start for start in starts if start <= len(instructions))
    number_of = {first: number for number, first in enumerate(edges[:-1])}

    def successors(end: int) -> Iterator[int]:
        last = instructions[end - 1]
        # A branch of its own for lanes that have drifted apart (BRA.DIV) is not the plain way, but a way.
        is_sure = (
            not last.predicate and not last.operands.startswith(("P", "UP", "!P", "!UP")) and "DIV" not in last.opcode
        )
        if last.name in _BRANCHES and last.target is not None:
            yield number_of[last.target]
        if end < len(instructions) and not (is_sure and last.name in (*_BRANCHES, *_ENDS)):
            yield number_of[end]

    return [Block(first, end, tuple(dict.fromkeys(successors(end)))) for first, end in itertools.pairwise(edges)]
