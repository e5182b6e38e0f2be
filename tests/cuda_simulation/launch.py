"""
Operators on a simulated card: takes in what nvcc's launch stubs do, and runs it in the interpreter.

    library = load_simulation()
    with simulate(SimulatedCard("sm_80"), inputs={"query": query, ...}) as run:
        output, logsumexp = torch.ops.lmopt_cuda_simulation.attention_forward(query, ...)
    assert not run.problems

Tensors are CPU tensors. Those that host code allocates are writable and count as unwritten; `inputs` are read-only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from .build import ARCHITECTURES, Edit, build
from .card import SimulatedCard
from .run import SUCCESS, UNKNOWN_ERROR, Run, SimulationLibrary


GUARD_ELEMENTS = 4096


@functools.cache
def load_simulation() -> SimulationLibrary:
    """Builds what is not in the cache and loads it: the operators are in `torch.ops.lmopt_cuda_simulation`."""
    built = build()
    torch.ops.load_library(built.library)
    return SimulationLibrary(ctypes.CDLL(str(built.library)), built.ptx)


@functools.cache
def with_bug(*edits: Edit, architectures: tuple[str, ...] = ARCHITECTURES) -> SimulationLibrary:
    """The same operators with other kernels: compiled from sources in which texts are replaced; see [`build`]."""
    return SimulationLibrary(load_simulation().handle, build(edits, architectures).ptx)


@contextlib.contextmanager
def simulate(
    card: SimulatedCard,
    inputs: Mapping[str, torch.Tensor | None] | Sequence[torch.Tensor | None] = (),
    inplace: Mapping[str, torch.Tensor | None] | Sequence[torch.Tensor | None] = (),
    block_order: int | None = None,
    library: SimulationLibrary | None = None,
) -> Iterator[Run]:
    """
    Lets operators of `torch.ops.lmopt_cuda_simulation` run on a simulated card.

    Args:
        card (`SimulatedCard`):
            Which card.
        inputs (`Mapping` or `Sequence`, *optional*):
            Tensors that kernels may read, by name; None is passed over. A view counts from its first to its last byte.
            See [`between_guards`] for accesses just outside.
        inplace (`Mapping` or `Sequence`, *optional*):
            Tensors that kernels may read and write.
        block_order (`int`, *optional*):
            Seed of the order in which blocks run; without it they run in order.
        library (`SimulationLibrary`, *optional*, defaults to [`load_simulation`]):
            Which kernels; see [`with_bug`].

    Yields:
        [`Run`]: with the problems found and the counts.

    Raises:
        PtxError: if a kernel has an instruction that the interpreter does not know, in place of torch's error.
    """
    run = Run(card, library or load_simulation(), block_order)
    for tensors, writable in ((inputs, False), (inplace, True)):
        named = tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)
        for name, tensor in named:
            if tensor is not None and tensor.numel():
                kind = "inplace" if writable else "input"
                label = name if isinstance(name, str) else f"{kind} {name}"
                run.memory.register(label, tensor.data_ptr(), extent(tensor), writable)
    callbacks = _callbacks(run)
    run.library.handle.cuda_simulation_set_callbacks(ctypes.byref(callbacks))
    try:
        yield run
    finally:
        run.library.handle.cuda_simulation_set_callbacks(None)
        if run.exception is not None:
            raise run.exception


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a view."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def between_guards(tensor: torch.Tensor) -> torch.Tensor:
    """
    A copy with the same strides that lies far from every other tensor.

    Torch places small tensors side by side, where a stray access to one can meet another and go unnoticed.
    """
    num_elements = extent(tensor) // tensor.element_size()
    whole = torch.zeros(num_elements + 2 * GUARD_ELEMENTS, dtype=tensor.dtype)
    whole[GUARD_ELEMENTS : GUARD_ELEMENTS + num_elements] = tensor.as_strided((num_elements,), (1,))
    return whole.as_strided(tensor.shape, tensor.stride(), GUARD_ELEMENTS)


_Int, _Size, _Pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_Unsigned = ctypes.POINTER(ctypes.c_uint)
_LAUNCH = ctypes.CFUNCTYPE(_Int, ctypes.c_char_p, _Unsigned, _Unsigned, _Size, _Size, ctypes.POINTER(_Pointer))
_SET_ATTRIBUTE = ctypes.CFUNCTYPE(_Int, ctypes.c_char_p, _Int, _Int)
_GET_DEVICE_ATTRIBUTE = ctypes.CFUNCTYPE(_Int, _Int, ctypes.POINTER(_Int))
_SET_MEMORY = ctypes.CFUNCTYPE(_Int, _Pointer, _Int, _Size)
_ADD_BUFFER = ctypes.CFUNCTYPE(_Int, _Pointer, _Size, _Int)


class _Callbacks(ctypes.Structure):
    _fields_ = [
        ("launch", _LAUNCH),
        ("set_attribute", _SET_ATTRIBUTE),
        ("get_device_attribute", _GET_DEVICE_ATTRIBUTE),
        ("set_memory", _SET_MEMORY),
        ("add_buffer", _ADD_BUFFER),
    ]


def _callbacks(run: Run) -> _Callbacks:
    """C functions that ask the run. An exception is kept for `simulate` to raise: it cannot cross C code."""

    def guarded(function):  # type: ignore[no-untyped-def]
        @functools.wraps(function)
        def call(*arguments):  # type: ignore[no-untyped-def]
            try:
                return function(*arguments)
            except BaseException as error:
                run.exception = run.exception or error
                return UNKNOWN_ERROR

        return call

    @_LAUNCH
    @guarded
    def launch(name, grid, block, dynamic, allowed, arguments):  # type: ignore[no-untyped-def]
        return run.launch(name.decode(), tuple(grid[:3]), tuple(block[:3]), dynamic, allowed, _Arguments(arguments))

    @_GET_DEVICE_ATTRIBUTE
    @guarded
    def get_device_attribute(attribute, value):  # type: ignore[no-untyped-def]
        value[0] = run.device_attribute(attribute)
        return SUCCESS

    @_SET_ATTRIBUTE
    @guarded
    def set_attribute(name, attribute, value):  # type: ignore[no-untyped-def]
        return run.set_attribute(name.decode(), attribute, value)

    set_memory, add_buffer = _SET_MEMORY(guarded(run.set_memory)), _ADD_BUFFER(guarded(run.add_buffer))
    return _Callbacks(launch, set_attribute, get_device_attribute, set_memory, add_buffer)


class _Arguments:
    """The pointers to a launch's arguments, as many as are asked for."""

    def __init__(self, pointers) -> None:  # type: ignore[no-untyped-def]
        self._pointers = pointers

    def __iter__(self) -> Iterator[int]:
        position = 0
        while True:
            yield self._pointers[position]
            position += 1
