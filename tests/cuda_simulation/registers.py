"""
The registers of a batch of threads: one matrix per width, a row per register, a column per thread.

Registers that appear together in a vector operand get adjacent rows where that is possible, so that the fragments of
`mma` and the results of `ldmatrix` are one slice each.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx import BYTES_OF_TYPE, Immediate, Kernel, Operand, PtxError, Register, Vector


Array = NDArray[Any]  # of the type that an instruction reads it as

DTYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    "f32": np.float32,
    "f64": np.float64,
    **dict.fromkeys(("f16", "bf16", "b16", "u16"), np.uint16),  # NumPy's float16 would be slow
    **dict.fromkeys(("f16x2", "bf16x2", "tf32", "b32", "u32"), np.uint32),
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    **{f"s{bits}": dtype for bits, dtype in ((8, np.int8), (16, np.int16), (32, np.int32), (64, np.int64))},
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_POISON = 0xA5  # repeated, so that an unwritten register is an unlikely number


def integer_limits(type_name: str) -> tuple[int, int]:
    """The smallest and the largest number of an integer type."""
    bits = 8 * BYTES_OF_TYPE[type_name]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type_name[0] == "s" else (0, (1 << bits) - 1)


class RegisterFile:
    """
    Registers of all threads of a batch.

    Args:
        kernel (`Kernel`):
            Whose registers they are.
        num_threads (`int`):
            Threads of the batch.
        special (`dict[str, Array]`):
            Values of the read-only registers, such as `%tid.x`, one per thread.
    """

    def __init__(self, kernel: Kernel, num_threads: int, special: dict[str, Array]) -> None:
        self.num_threads, self.special, self._types = num_threads, special, kernel.registers
        self._row: dict[str, int] = {}
        counts: dict[type[np.generic], int] = {}
        for name in _in_order_of_vectors(kernel):
            width = self._width(name)
            self._row[name] = counts.get(width, 0)
            counts[width] = self._row[name] + 1
        self._matrices = {width: self._new_matrix(width, count) for width, count in counts.items()}

    def _new_matrix(self, width: type[np.generic], num_rows: int) -> Array:
        if width is np.bool_:
            return np.zeros((num_rows, self.num_threads), np.bool_)
        return np.full((num_rows, self.num_threads * np.dtype(width).itemsize), _POISON, np.uint8).view(width)

    def _width(self, name: str) -> type[np.generic]:
        type_name = self._types[name]
        return np.bool_ if type_name == "pred" else _UNSIGNED[BYTES_OF_TYPE[type_name]]

    @property
    def num_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._matrices.values())

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def row(self, name: str) -> Array:
        """The whole register, as unsigned integers or booleans: a view that stays current."""
        if name in self.special:
            return self.special[name]
        if name not in self._row:
            raise PtxError(f"The register {name!r} is not declared, and it is no special register known here.")
        return self._matrices[self._width(name)][self._row[name]]

    def read(self, operand: Operand, type_name: str) -> Array:
        """
        The values of an operand, of shape `(num_threads,)`, or a scalar for a literal.

        A register wider than the type gives its low bytes. A view, so that it can be taken once and read often.
        """
        dtype = DTYPES[type_name]
        if isinstance(operand, Immediate):
            return parse_literal(operand.text, type_name)  # type: ignore[return-value]
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} cannot be read as a value of type {type_name}. A register or literal can.")
        row = self.row(operand.name)
        itemsize = np.dtype(dtype).itemsize
        if row.dtype == dtype or row.itemsize == itemsize:
            return row.view(dtype)
        if row.itemsize < itemsize:
            raise PtxError(f"The register {operand.name} of {row.itemsize} bytes is too narrow for {type_name}.")
        return row.view(dtype)[:: row.itemsize // itemsize]

    def group(self, vector: Vector) -> Array | None:
        """The registers of a vector as one slice of shape `(len, num_threads)`; None where they are not adjacent."""
        names = [item.name for item in vector.items if isinstance(item, Register) and item.name in self._row]
        rows = [self._row[name] for name in names]
        if len(names) < len(vector.items) or rows != list(range(rows[0], rows[0] + len(rows))):
            return None
        return self._matrices[self._width(names[0])][rows[0] : rows[0] + len(rows)]


def _in_order_of_vectors(kernel: Kernel) -> dict[str, None]:
    """All registers, those of vector results first, then those of vector sources, each once."""
    vectors = [operand for i in kernel.instructions for operand in i.operands[:1] if isinstance(operand, Vector)]
    vectors += [operand for i in kernel.instructions for operand in i.operands[1:] if isinstance(operand, Vector)]
    in_vectors = (item.name for v in vectors for item in v.items if isinstance(item, Register))
    order = dict.fromkeys(name for name in in_vectors if name in kernel.registers)
    return order | dict.fromkeys(kernel.registers)


def parse_literal(text: str, type_name: str) -> np.generic:
    """The value of a literal as a NumPy scalar of a type; `0f3F800000` has the bits of a float32."""
    dtype = np.dtype(DTYPES[type_name])
    if text[:2] in ("0f", "0F", "0d", "0D"):
        single = text[1] in "fF"
        bits = bytes.fromhex(text[2:])
        if len(bits) == dtype.itemsize:  # also where the type is .b32
            return np.frombuffer(bits[::-1], dtype)[0]
        return dtype.type(struct.unpack(">f" if single else ">d", bits)[0])
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "f":
        return dtype.type(value)
    if dtype.kind == "b":
        return np.bool_(value)
    bits = (value % (1 << 8 * dtype.itemsize)).to_bytes(dtype.itemsize, "little")
    return np.frombuffer(bits, dtype)[0]
