"""Atomic operations on global memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .accesses import parts_of, report_conflict
from .decoding import Step, assigned, data_type, executes
from .load_store import address_of
from .ptx import BYTES_OF_TYPE, Instruction
from .registers import DTYPES, Array
from .shadow import Conflict


if TYPE_CHECKING:
    from .execution import Batch

_ATOMICS: dict[str, Callable[..., object]] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
    "cas": lambda old, expected, value: value if old == expected else old,
}


@executes("atom", "red", modifiers=f"{' '.join(_ATOMICS)} global relaxed gpu cta sys acq_rel")
def decode_atomic(batch: Batch, instruction: Instruction) -> Step:
    """In global memory, one lane after the other. An atomic counts as ordered with every other access."""
    operation = next(_ATOMICS[m] for m in instruction.modifiers if m in _ATOMICS)
    type_name = data_type(instruction)
    operands = instruction.operands if instruction.root == "red" else instruction.operands[1:]
    addresses = address_of(batch, operands[0])
    sources = [batch.registers.read(operand, type_name) for operand in operands[1:]]
    num_bytes = BYTES_OF_TYPE[type_name]
    old = np.zeros(batch.num_threads, DTYPES[type_name])

    def run() -> Array:
        wanted = batch.lanes.select(addresses())
        for buffer, _, offsets, lanes in parts_of(batch, instruction, wanted, num_bytes, "atomic"):
            if buffer.shadow is None:
                conflict = Conflict(0, "memory", "which is read-only")
                report_conflict(batch, instruction, conflict, "atomic", lanes, buffer.origin + offsets)
                continue
            elements = buffer.bytes.view(DTYPES[type_name])
            for lane, at in zip(lanes, offsets // num_bytes, strict=True):
                old[lane] = elements[at]
                elements[at] = operation(elements[at], *(s if s.ndim == 0 else s[lane] for s in sources))
        return old

    if instruction.root == "red":
        return Step(run, run)
    return assigned(batch, instruction.operands[0], run, type_name)
