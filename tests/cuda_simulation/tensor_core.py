"""
Tensor-core instructions: `mma.sync` with float32 sums, and `ldmatrix`.

Products of half-precision numbers are exact in float64 and their sums nearly so; a result is rounded to float32 once
per `mma`. Cards add with a few more bits than float32 and truncate, in an order of their own, so their results differ
in the last bits. Fragment layouts are those of the PTX manual, written as reshapes: with `g` the lane's group of four
and `t` its place in it, `A` is `[i0, g, i1, t, half]`, `B` is `[i, t, half, g]`, `C` and `D` are `[i1, g, t, i0]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .accesses import load_shared, poisoned_rows
from .decoding import Step, executes, items_of
from .load_store import address_of
from .number_formats import TO_DOUBLE, Doubles
from .ordering import LANES
from .ptx import Instruction, Operand, PtxError, Register, Vector
from .registers import Array
from .warp import check_whole_warps


if TYPE_CHECKING:
    from .execution import Batch

GROUPS, PLACES = 8, 4  # a warp as groups of lanes
# (shape, type of A and B): those that exist with float32 sums, on sm_75 and sm_80.
_SHAPES = {("m16n8k8", "f16"), ("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "bf16")}


@executes("mma", modifiers="sync aligned row col m16n8k8 m16n8k16")
def decode_mma(batch: Batch, instruction: Instruction) -> Step:
    """`D = A * B + C` for each warp, with A of shape 16 x k, B of k x 8, and float32 C and D of 16 x 8."""
    _, _, shape, *layouts_and_types = instruction.modifiers
    d_type, a_type, b_type, c_type = layouts_and_types[2:]
    if (shape, a_type) not in _SHAPES or b_type != a_type or (c_type, d_type) != ("f32", "f32"):
        raise PtxError(f"mma is simulated for {sorted(_SHAPES)} with float32 sums")
    halves = 2 if shape == "m16n8k16" else 1
    a, load_a = _matrix(batch, instruction, 1, a_type, (halves, 2), (2, 1, 3, 0, 4), 16)
    b, load_b = _matrix(batch, instruction, 2, a_type, (halves,), (1, 2, 0, 3), 8)
    b = b.transpose(0, 2, 1)
    read_c = _fragment(batch, instruction.operands[3], "f32")
    write_d = _writer(batch, instruction.operands[0])

    def product() -> Array:
        load_a()
        load_b()
        sums = np.matmul(a, b).reshape(-1, 2, GROUPS, PLACES, 2).transpose(1, 4, 0, 2, 3)
        c = read_c().reshape(2, 2, -1, GROUPS, PLACES)
        return (sums + c).reshape(4, -1)

    def unmasked() -> None:
        check_whole_warps(batch, instruction)
        write_d(product(), None)

    def masked() -> None:
        check_whole_warps(batch, instruction)
        write_d(product(), batch.lanes.mask)

    return Step(unmasked, masked)


def _fragment(batch: Batch, operand: Operand, type_name: str) -> Callable[[], Array]:
    """A function that gives the registers of a fragment, of shape `(registers, threads)`."""
    assert isinstance(operand, Vector)
    group = batch.registers.group(operand)
    if group is not None:
        fixed = group.view(np.float32 if type_name == "f32" else group.dtype)
        return lambda: fixed
    rows = [np.broadcast_to(batch.registers.read(item, type_name), batch.num_threads) for item in items_of(operand)]
    return lambda: np.stack(rows)


def _matrix(
    batch: Batch,
    instruction: Instruction,
    position: int,
    type_name: str,
    registers: tuple[int, ...],
    order: tuple[int, ...],
    num_rows: int,
) -> tuple[Doubles, Callable[[], None]]:
    """
    A fragment as matrices of shape `(warps, num_rows, k)`, and the function that fills them.

    Instructions of a basic block often share a fragment, and the first of them fills it for all.
    """
    operand = instruction.operands[position]
    assert isinstance(operand, Vector)
    names = tuple(item.name for item in operand.items if isinstance(item, Register))
    key = (type_name, str(num_rows), *names)
    if len(names) == len(operand.items) and key in batch.code.matrices:
        return batch.code.matrices[key], lambda: None
    read, widen = _fragment(batch, operand, "b32"), TO_DOUBLE[type_name]
    shape = (*registers, batch.num_warps, GROUPS, PLACES)
    pairs = np.empty([shape[axis] for axis in order], np.uint32)
    halves = pairs.reshape(-1).view(np.uint16)
    matrix = np.empty((batch.num_warps, num_rows, halves.size // num_rows // batch.num_warps))
    if instruction.predicate is None:
        batch.code.matrices[key] = matrix
    flat = matrix.reshape(-1)

    def fill() -> None:
        np.copyto(pairs, read().reshape(shape).transpose(order))
        np.copyto(flat, widen(halves))

    return matrix, fill


def _writer(batch: Batch, operand: Operand) -> Callable[[Array, Array | None], None]:
    """A function that writes values of shape `(registers, threads)` into a vector of registers, under a mask."""
    assert isinstance(operand, Vector)
    group = batch.registers.group(operand)
    rows = [batch.registers.row(item.name) for item in operand.items]  # type: ignore[union-attr]

    def write(values: Array, mask: Array | None) -> None:
        where = True if mask is None else mask
        if group is not None:
            out = group.view(np.float32) if values.dtype.kind == "f" else group
            np.copyto(out, values, where=where, casting="same_kind")
            return
        for row, value in zip(rows, values, strict=True):
            out = row.view(np.float32) if values.dtype.kind == "f" else row
            np.copyto(out, value, where=where, casting="same_kind")

    return write


@executes("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared cta")
def decode_ldmatrix(batch: Batch, instruction: Instruction) -> Step:
    """
    Loads 8 x 8 matrices of 16-bit elements; lane `8 i + r` gives the address of row `r` of matrix `i`.

    A row has 16 bytes. Each lane gets two neighbours of a row, or of a column with `.trans`.
    """
    num_matrices = next(int(m[1]) for m in instruction.modifiers if m in ("x1", "x2", "x4"))
    addresses = address_of(batch, instruction.operands[1])
    write = _writer(batch, instruction.operands[0])
    transposed = "trans" in instruction.modifiers
    has_address = batch.lane < 8 * num_matrices
    lanes_with_address = batch.make_lanes(has_address)
    rows = poisoned_rows(batch.num_threads, 16)

    def load() -> Array:
        everyone = batch.lanes
        whole = everyone.is_everyone
        batch.lanes = lanes_with_address if whole else batch.make_lanes(everyone.mask & has_address)
        rows[batch.lanes.index] = load_shared(batch, instruction, addresses(), 16, by_whole_warp=True)
        batch.lanes = everyone
        matrices = rows.reshape(-1, LANES)[:, : 8 * num_matrices].reshape(-1, num_matrices, 8)
        elements = np.ascontiguousarray(matrices).view(np.uint16).reshape(-1, num_matrices, 8, 8)
        if transposed:
            elements = np.ascontiguousarray(elements.transpose(0, 1, 3, 2))
        pairs = elements.view(np.uint32).reshape(-1, num_matrices, LANES)
        return pairs.transpose(1, 0, 2).reshape(num_matrices, -1)

    def unmasked() -> None:
        check_whole_warps(batch, instruction)
        write(load(), None)

    def masked() -> None:
        check_whole_warps(batch, instruction)
        write(load(), batch.lanes.mask)

    return Step(unmasked, masked)
