"""Runs launches block by block in batches, and keeps decoded batches for later launches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .execution import Batch, Dimensions, Shape, Traffic
from .memory import GlobalMemory
from .problems import ProblemList
from .ptx import Kernel
from .registers import Array
from .shadow import FROM_HOST, LARGEST_CELL


# Beyond this the registers leave the caches, and a batch takes longer than two halves.
MAX_THREADS_PER_BATCH = 2048
MAX_CACHED_BYTES = 512 << 20


@dataclass
class Counts:
    """What a launch did: executions by opcode and by position, and memory traffic by line."""

    executions: dict[int, int] = field(default_factory=dict)
    traffic: dict[int, Traffic] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        executions, traffic = batch.take_counts()
        for position, warps in executions.items():
            self.executions[position] = self.executions.get(position, 0) + warps
        for line, counts in traffic.items():
            total = self.traffic.setdefault(line, Traffic())
            total.requests += counts.requests
            total.bank_conflicts += counts.bank_conflicts
            total.sectors += counts.sectors


class BatchCache:
    """Batches that have been decoded, for the next launch of the same kernel and shape, and variables of modules."""

    def __init__(self) -> None:
        self._batches: dict[tuple[int, Shape], Batch] = {}
        self._variables: dict[int, tuple[Kernel, dict[str, Array]]] = {}

    def batch(self, kernel: Kernel, shape: Shape) -> Batch:
        key = (id(kernel), shape)
        batch = self._batches.pop(key, None)
        if batch is None:
            addresses = {name: array.ctypes.data for name, array in self.variables(kernel).items()}
            batch = Batch(kernel, shape, addresses)
            num_bytes = sum(known.num_bytes for known in self._batches.values()) + batch.num_bytes
            while self._batches and num_bytes > MAX_CACHED_BYTES:
                num_bytes -= self._batches.pop(next(iter(self._batches))).num_bytes
        self._batches[key] = batch  # the one used last stands last
        return batch

    def variables(self, kernel: Kernel) -> dict[str, Array]:
        """Variables in constant and global memory, with the values that the PTX gives them."""
        if id(kernel) not in self._variables:
            arrays = {}
            for variable in kernel.variables.values():
                if variable.space in ("const", "global") and variable.size:
                    whole = np.zeros(variable.size + LARGEST_CELL, np.uint8)
                    arrays[variable.name] = array = whole[-whole.ctypes.data % LARGEST_CELL :][: variable.size]
                    array[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
            self._variables[id(kernel)] = kernel, arrays
        return self._variables[id(kernel)][1]


class Interpreter:
    """
    Runs launches.

    Args:
        memory (`GlobalMemory`):
            Buffers that kernels may touch.
        problems (`ProblemList`):
            Takes what the checks find.
        cache (`BatchCache`, *optional*):
            Decoded batches of earlier launches.
    """

    def __init__(self, memory: GlobalMemory, problems: ProblemList, cache: BatchCache | None = None) -> None:
        self.memory, self.problems = memory, problems
        self.now = FROM_HOST
        self._cache = cache or BatchCache()

    def launch(
        self,
        kernel: Kernel,
        grid: Dimensions,
        block: Dimensions,
        dynamic_shared_bytes: int,
        parameters: bytes,
        block_order: int | None = None,
    ) -> Counts:
        """Runs all blocks of a launch, in an order drawn with the seed `block_order` if that is given."""
        for name, array in self._cache.variables(kernel).items():
            if not self.memory.has(array.ctypes.data):
                is_writable = kernel.variables[name].space == "global"
                self.memory.register(name, array.ctypes.data, array.size, is_writable)
        num_blocks, threads = int(np.prod(grid)), int(np.prod(block))
        order = np.arange(num_blocks)
        if block_order is not None:
            order = np.random.default_rng(block_order).permutation(num_blocks)
        size = max(1, MAX_THREADS_PER_BATCH // threads)
        counts, latest = Counts(), self.now
        # Few shapes, so that decoded batches serve again.
        room = min(size, 1 << (num_blocks - 1).bit_length())
        for begin in range(0, num_blocks, size):
            blocks = order[begin : begin + size]
            batch = self._cache.batch(kernel, Shape(room, block, dynamic_shared_bytes))
            batch.memory, batch.problems = self.memory, self.problems
            batch.start(parameters, grid, blocks, begin * threads, self.now)
            with np.errstate(all="ignore"):
                batch.run()
            latest = max(latest, batch.ordering.now)
            counts.add(batch)
        self.now = latest + 1
        return counts
