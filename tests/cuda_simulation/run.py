"""
What happens on a simulated card: its answers to host code, its launches, and what they did.

Errors have the numbers of CUDA, so that host code meets what it would meet on a card.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .card import SimulatedCard
from .execution import Dimensions
from .interpreter import BatchCache, Counts, Interpreter
from .memory import GlobalMemory
from .parser import Module
from .problems import ProblemList
from .ptx import Kernel


SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, INVALID_DEVICE_FUNCTION, TOO_MANY_RESOURCES = 0, 1, 9, 98, 701
UNKNOWN_ERROR = 999
MAX_GRID, MAX_BLOCK, MAX_THREADS = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024
MAX_DYNAMIC_SHARED_BYTES = 8  # cudaFuncAttribute
PREFERRED_SHARED_CARVEOUT = 9
# cudaDeviceAttr
MULTIPROCESSOR_COUNT, CAPABILITY_MAJOR, CAPABILITY_MINOR, SHARED_BYTES_OPT_IN = 16, 75, 76, 97


class Launch(NamedTuple):
    """One launch: the kernel's mangled name and its shape, with what it did."""

    kernel: Kernel
    grid: Dimensions
    block: Dimensions
    dynamic_shared_bytes: int
    counts: Counts


class InstructionTraffic(NamedTuple):
    """
    Memory traffic of one instruction over all launches of a run.

    Attributes:
        kernel, line, text: which instruction.
        requests: how often a warp executed it.
        bank_conflicts: passes over the banks of shared memory beyond the first of each request.
        sectors: sectors of 32 bytes of global memory.
    """

    kernel: str
    line: int
    text: str
    requests: int
    bank_conflicts: int
    sectors: int


@dataclass
class SimulationLibrary:
    """The loaded host code, and the PTX of its kernels by architecture."""

    handle: ctypes.CDLL
    ptx: dict[str, list[Path]]
    cache: BatchCache = field(default_factory=BatchCache)
    _modules: dict[str, dict[str, Module]] = field(default_factory=dict)

    def kernel(self, architecture: str, name: str) -> Kernel | None:
        """A kernel by its mangled name, whose hashes of unnamed namespaces do not matter."""
        if architecture not in self._modules:
            modules = [Module(path.read_text()) for path in self.ptx[architecture]]
            self._modules[architecture] = {stable_name(kernel): module for module in modules for kernel in module}
        module = self._modules[architecture].get(stable_name(name))
        if module is None:
            return None
        return next(module[kernel] for kernel in module if stable_name(kernel) == stable_name(name))


def stable_name(name: str) -> str:
    """A mangled name without the hashes that an edit of the source changes."""
    return re.sub(r"_GLOBAL__N__[0-9a-f]{8}_(\d+_\w+?_cu)_[0-9a-f]{8}", r"_GLOBAL__N__\1", name)


class Run:
    """
    What happened on a simulated card.

    Attributes:
        problems (`ProblemList`): what the checks found, empty if all is well.
        launches (`list[Launch]`): launches in order.
    """

    def __init__(self, card: SimulatedCard, library: SimulationLibrary, block_order: int | None) -> None:
        self.card, self.library, self.block_order = card, library, block_order
        self.memory, self.problems = GlobalMemory(), ProblemList()
        self.launches: list[Launch] = []
        self.exception: BaseException | None = None
        self._interpreter = Interpreter(self.memory, self.problems, library.cache)
        self._num_allocations = 0

    @property
    def counts(self) -> Counter[str]:
        """Instructions executed by warps, by opcode."""
        counter: Counter[str] = Counter()
        for launch in self.launches:
            for position, warps in launch.counts.executions.items():
                counter[launch.kernel.instructions[position].opcode] += warps
        return counter

    def traffic(self) -> list[InstructionTraffic]:
        """Memory traffic by instruction, in the order of launches and lines."""
        found = []
        for launch in self.launches:
            texts = {instruction.line: instruction.text for instruction in launch.kernel.instructions}
            for line, traffic in sorted(launch.counts.traffic.items()):
                numbers = (traffic.requests, traffic.bank_conflicts, traffic.sectors)
                found.append(InstructionTraffic(launch.kernel.name, line, texts[line], *numbers))
        return found

    def bank_conflicts(self) -> list[InstructionTraffic]:
        """The instructions on shared memory that had bank conflicts."""
        return [traffic for traffic in self.traffic() if traffic.bank_conflicts]

    def sectors(self) -> list[InstructionTraffic]:
        """The instructions on global memory."""
        return [traffic for traffic in self.traffic() if traffic.sectors]

    # -- what native/cudart.cpp asks ----------------------------------------------------------------------------------

    def launch(
        self, name: str, grid: Dimensions, block: Dimensions, dynamic: int, allowed: int, arguments: Sequence[int]
    ) -> int:
        kernel = self.library.kernel(self.card.architecture, name)
        if kernel is None:
            return INVALID_DEVICE_FUNCTION
        if error := self._check_launch(kernel, grid, block, dynamic, allowed):
            return error
        parameters = bytearray(kernel.parameter_bytes)
        for (offset, size), argument in zip(kernel.parameter_sizes, arguments, strict=False):
            parameters[offset : offset + size] = ctypes.string_at(argument, size)
        counts = self._interpreter.launch(kernel, grid, block, dynamic, bytes(parameters), self.block_order)
        self.launches.append(Launch(kernel, grid, block, dynamic, counts))
        return SUCCESS

    def _check_launch(self, kernel: Kernel, grid: Dimensions, block: Dimensions, dynamic: int, allowed: int) -> int:
        """The error that CUDA gives for a launch that the card cannot do."""
        if any(not 1 <= size <= limit for size, limit in zip((*grid, *block), (*MAX_GRID, *MAX_BLOCK), strict=True)):
            return INVALID_CONFIGURATION
        num_threads = block[0] * block[1] * block[2]
        if num_threads > MAX_THREADS:
            return INVALID_CONFIGURATION
        if kernel.max_threads is not None and num_threads > kernel.max_threads:
            return TOO_MANY_RESOURCES
        static = sum(v.size or 0 for v in kernel.variables.values() if v.space == "shared")
        if dynamic > allowed or static + dynamic > self.card.max_shared_bytes:
            return INVALID_VALUE
        return SUCCESS

    def set_attribute(self, name: str, attribute: int, value: int) -> int:
        if attribute == PREFERRED_SHARED_CARVEOUT:
            return SUCCESS
        kernel = self.library.kernel(self.card.architecture, name)
        if kernel is None:
            return INVALID_DEVICE_FUNCTION
        static = sum(v.size or 0 for v in kernel.variables.values() if v.space == "shared")
        is_allowed = attribute == MAX_DYNAMIC_SHARED_BYTES and 0 <= value <= self.card.max_shared_bytes - static
        return SUCCESS if is_allowed else INVALID_VALUE

    def device_attribute(self, attribute: int) -> int:
        major, minor = self.card.compute_capability
        answers = {
            CAPABILITY_MAJOR: major,
            CAPABILITY_MINOR: minor,
            SHARED_BYTES_OPT_IN: self.card.max_shared_bytes,
            MULTIPROCESSOR_COUNT: self.card.num_multiprocessors,
        }
        if attribute not in answers:
            raise KeyError(
                f"Host code asks for cudaDeviceAttr {attribute}. Only {list(answers)} are simulated. Add it."
            )
        return answers[attribute]

    def set_memory(self, address: int, value: int, num_bytes: int) -> int:
        buffer = self.memory.buffer_before(address)
        if buffer is None or not buffer.contains(address, address + num_bytes) or buffer.shadow is None:
            return INVALID_VALUE
        ctypes.memset(address, value, num_bytes)
        buffer.shadow.initialise(address - buffer.origin, num_bytes)
        return SUCCESS

    def add_buffer(self, address: int | None, num_bytes: int, is_written: int) -> int:
        if not address:
            return SUCCESS  # of no bytes
        self._num_allocations += 1
        self.memory.forget_within(address, num_bytes)  # tensors that torch has freed
        self.memory.register(
            f"allocation {self._num_allocations}", address, num_bytes, True, is_initialised=bool(is_written)
        )
        return SUCCESS
