"""Loads, stores and atomics in the state spaces param, shared, global, const and local, and addresses between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .accesses import CARRIERS, load_global, load_shared, poisoned_rows, store_global, store_shared
from .decoding import Step, computed, data_type, executes, items_of, result_view
from .ptx import BYTES_OF_TYPE, Address, Instruction, Operand, PtxError, Register, Symbol
from .registers import DTYPES, Array, parse_literal
from .shadow import Integers


if TYPE_CHECKING:
    from .execution import Batch

# Where shared, local and parameter space lie among generic addresses.
WINDOWS = {"shared": 1 << 60, "local": 1 << 61, "param": 1 << 62}
_CACHE_HINTS = (
    "nc relaxed weak volatile ca cg cs lu wb wt L1 L2 no_allocate evict_first evict_last 64B 128B 256B gpu cta sys"
)
_SPACES = "param shared global const local cta"


@executes("ld", "ldu", modifiers=f"{_SPACES} v2 v4 {_CACHE_HINTS}")
def decode_load(batch: Batch, instruction: Instruction) -> Step:
    type_name = data_type(instruction)
    results = items_of(instruction.operands[0])
    outs = [result_view(batch, operand, type_name) for operand in results]
    space = space_of(instruction)
    address = instruction.operands[1]
    if space == "param" and isinstance(address, Address) and isinstance(address.base, Symbol):
        return _load_parameter(batch, address, outs, type_name)
    load = _LOADS[space]
    num_bytes = BYTES_OF_TYPE[type_name] * len(outs)
    addresses = address_of(batch, address)

    def run() -> None:
        lanes = batch.lanes
        rows = load(batch, instruction, addresses(), num_bytes)
        values = rows.view(DTYPES[type_name]).reshape(len(rows), len(outs))
        for i, out in enumerate(outs):
            if lanes.is_everyone:
                np.copyto(out, values[:, i], casting="unsafe")
            else:
                out[lanes.index] = values[:, i]

    return Step(run, run)


def _load_parameter(batch: Batch, address: Address, outs: list[Array], type_name: str) -> Step:
    """A load at a known place: the same value for every thread, which the next launch may change."""
    assert isinstance(address.base, Symbol)
    size = BYTES_OF_TYPE[type_name]
    offset = batch.addresses[address.base.name] + address.offset
    source = batch.parameters[offset : offset + size * len(outs)].view(DTYPES[type_name])
    copies = [partial(np.copyto, out, source[i : i + 1], casting="unsafe") for i, out in enumerate(outs)]

    def unmasked() -> None:
        for copy in copies:
            copy()

    def masked() -> None:
        for copy in copies:
            copy(where=batch.lanes.mask)

    return Step(unmasked, masked)


@executes("st", modifiers=f"{_SPACES} v2 v4 {_CACHE_HINTS}")
def decode_store(batch: Batch, instruction: Instruction) -> Step:
    type_name = data_type(instruction)
    sources = [batch.registers.read(operand, type_name) for operand in items_of(instruction.operands[1])]
    store = _STORES[space_of(instruction)]
    num_bytes = BYTES_OF_TYPE[type_name] * len(sources)
    addresses = address_of(batch, instruction.operands[0])

    def run() -> None:
        lanes = batch.lanes
        values = np.empty((np.count_nonzero(lanes.mask), len(sources)), DTYPES[type_name])
        for i, source in enumerate(sources):
            values[:, i] = source if source.ndim == 0 else lanes.select(source)
        store(batch, instruction, addresses(), num_bytes, values.view(CARRIERS[num_bytes]).ravel())

    return Step(run, run)


def space_of(instruction: Instruction) -> str:
    return next((m for m in instruction.modifiers if m in ("param", "shared", "global", "const", "local")), "generic")


def address_of(batch: Batch, operand: Operand) -> Callable[[], Array]:
    """A function that gives each thread's address."""
    if not isinstance(operand, Address):
        raise PtxError(f"{operand} is no address. [base+offset] is expected")
    if isinstance(operand.base, Register):
        row = batch.registers.row(operand.base.name)
        if operand.offset == 0:
            return lambda: row
        offset = parse_literal(str(operand.offset), f"u{8 * row.itemsize}")
        return lambda: row + offset
    base = batch.addresses[operand.base.name] if isinstance(operand.base, Symbol) else int(operand.base.text, 0)
    constant = np.full(batch.num_threads, base + operand.offset, np.uint64)
    return lambda: constant


def _private_place(
    batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int, size: int
) -> tuple[Integers, Integers]:
    """Offsets in a small space, with those out of bounds reported and moved to 0, and the active threads."""
    wanted = batch.lanes.select(addresses).astype(np.int64)
    bad = (wanted < 0) | (wanted + num_bytes > size)
    if bad.any():
        thread = int(batch.lanes.index[np.flatnonzero(bad)[0]])
        place = f"{int(wanted[bad][0])}, outside the {size} bytes of its space"
        batch.report("memory", instruction, thread, f"access to {num_bytes} bytes at {place}")
    return np.where(bad, 0, wanted), batch.lanes.index


def _load_local(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int) -> Array:
    offsets, threads = _private_place(batch, instruction, addresses, num_bytes, batch.local_bytes)
    rows = batch.local[threads[:, None], offsets[:, None] + np.arange(num_bytes)]
    return np.ascontiguousarray(rows).view(CARRIERS[num_bytes]).ravel()


def _store_local(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int, values: Array) -> None:
    offsets, threads = _private_place(batch, instruction, addresses, num_bytes, batch.local_bytes)
    rows = values.view(np.uint8).reshape(-1, num_bytes)
    batch.local[threads[:, None], offsets[:, None] + np.arange(num_bytes)] = rows


def _load_parameters(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int) -> Array:
    offsets, _ = _private_place(batch, instruction, addresses, num_bytes, batch.kernel.parameter_bytes)
    rows = batch.parameters[offsets[:, None] + np.arange(num_bytes)]
    return np.ascontiguousarray(rows).view(CARRIERS[num_bytes]).ravel()


def _by_window(batch: Batch, addresses: Array):  # type: ignore[no-untyped-def]
    """For each space among the active lanes' generic addresses: its name, and the lanes' addresses in it."""
    everyone, windows = batch.lanes, list(WINDOWS)
    space = np.searchsorted(np.array(list(WINDOWS.values()), np.uint64), addresses, "right")
    for number in np.unique(everyone.select(space)):
        name = windows[number - 1] if number else "global"
        chosen = everyone.mask & (space == number)
        batch.lanes = batch.make_lanes(chosen)
        yield name, addresses - np.uint64(WINDOWS.get(name, 0)), chosen[everyone.mask]
    batch.lanes = everyone


def _load_generic(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int) -> Array:
    rows = poisoned_rows(len(batch.lanes.index), num_bytes)
    for name, within, chosen in _by_window(batch, addresses):
        rows[chosen] = _LOADS[name](batch, instruction, within, num_bytes)
    return rows


def _store_generic(batch: Batch, instruction: Instruction, addresses: Array, num_bytes: int, values: Array) -> None:
    for name, within, chosen in _by_window(batch, addresses):
        _STORES[name](batch, instruction, within, num_bytes, values[chosen])


_LOADS: dict[str, Callable[..., Array]] = {
    "global": load_global,
    "const": load_global,
    "shared": load_shared,
    "local": _load_local,
    "param": _load_parameters,
    "generic": _load_generic,
}
_STORES: dict[str, Callable[..., None]] = {
    "global": store_global,
    "shared": store_shared,
    "local": _store_local,
    "generic": _store_generic,
}


@executes("cvta", modifiers="to global shared local const param")
def decode_address_conversion(batch: Batch, instruction: Instruction) -> Step:
    """Between a space and generic addresses; global and constant addresses are the same in both."""
    space = space_of(instruction)
    operand = instruction.operands[1]
    type_name = data_type(instruction)
    source = value_or_address(batch, operand, type_name)
    window = np.uint64(WINDOWS.get(space, 0))
    if "to" in instruction.modifiers:
        return computed(batch, instruction, lambda: source - window, type_name)
    return computed(batch, instruction, lambda: source + window, type_name)


def value_or_address(batch: Batch, operand: Operand, type_name: str) -> Array:
    """The values of an operand that may name a variable."""
    if isinstance(operand, Symbol):
        if operand.name not in batch.addresses:
            raise PtxError(f"the variable {operand.name!r} is not known")
        return np.full(batch.num_threads, batch.addresses[operand.name], DTYPES[type_name])
    return batch.registers.read(operand, type_name)
