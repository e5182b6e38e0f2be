"""
How long a kernel would take on a card, predicted from its machine code; nothing is measured.

What a warp executes in one step of its main loop is counted on the plain way through the machine code (no softcap,
bias, dropout or mask: `machine_loops.py`). Each pipe of a multiprocessor (tensor cores, special functions,
multipliers, integer units, issue, shared memory, second cache) is busy for known cycles (`gpu_cards.py`). With W warps
for each scheduler, a step of all of them takes

    optimistic     W m                    m: the busiest pipe for one warp; all others hide behind it
    pessimistic    W m + (s - m)          s: all pipes of one warp one after the other, with barriers and latency of
                                          the first ldmatrix; as W warps hide all but one of each other

and of a whole call, blocks of threads take places on the multiprocessors in their order (the tail counts), each with
a beginning and an end of a few latencies of DRAM. Steps that a causal mask cuts count once (optimistic) or twice.
The slower of that and of the bytes that DRAM must move is the time. Conflicts are none (`cuda_gates.py`).

FLOPs are those of the literature: 4 D for each pair of query and key that is seen forward, 10 D backward. This
backward pass multiplies 7 times where 5 are counted, for gradients without atomics: 71 % of the peak is its ceiling.
The sizes are those of Dao 2023, "FlashAttention-2" (https://arxiv.org/abs/2307.08691): 16,384 tokens, 2048 wide.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

from gpu_cards import GpuCard, pipe_cycles
from single_kernel import SingleKernel


NUM_TOKENS, WIDTH = 16_384, 2048
BARRIER_CYCLES, MATRIX_LOAD_LATENCY = 30, 33
MAX_DECODING_BLOCKS = 4  # kSplitBlocksPerMultiprocessor of launch.cu


@dataclass(frozen=True)
class Range:
    """Of a prediction: `low` by the pessimistic rule, `high` by the optimistic one, or cycles the other way round."""

    low: float
    high: float


@dataclass(frozen=True)
class StepModel:
    """
    One step of all blocks that a multiprocessor holds.

    Attributes:
        kernel (`SingleKernel`): which.
        card (`GpuCard`): where.
        blocks (`int`): at a time.
    """

    kernel: SingleKernel
    card: GpuCard
    blocks: int

    @property
    def warps_per_scheduler(self) -> float:
        return self.blocks * self.kernel.tiles.num_warps / 4

    def limits(self) -> dict[str, float]:
        """Cycles of each pipe for a step of all these blocks."""
        of_warp = pipe_cycles(self.kernel.step, self.card)
        cycles = {pipe: used * self.warps_per_scheduler for pipe, used in of_warp.items()}
        cycles["shared"] *= 4  # all schedulers share it
        bytes_of_step = 2 * self.kernel.tiles.num_inner * self.kernel.name.head_size * 2
        cycles["second cache"] = self.blocks * bytes_of_step / self.card.l2_bytes
        return cycles

    def cycles(self) -> Range:
        """From optimistic to pessimistic."""
        largest = max(self.limits().values())
        of_warp = pipe_cycles(self.kernel.step, self.card)
        num_barriers = sum(count for opcode, count in self.kernel.step.items() if opcode.startswith("BAR"))
        alone = sum(of_warp.values()) - of_warp["issue"] + self._only_issued()
        alone += num_barriers * BARRIER_CYCLES + 2 * MATRIX_LOAD_LATENCY
        return Range(largest, largest + max(0.0, alone - largest / max(1.0, self.warps_per_scheduler)))

    def tensor_share(self) -> Range:
        """Of the time that the tensor cores are busy."""
        cycles, busy = self.cycles(), self.limits()["tensor"]
        return Range(busy / cycles.high, busy / cycles.low)

    def _only_issued(self) -> float:
        """Branches and the like, which occupy no other pipe."""
        used = pipe_cycles(self.kernel.step, self.card)
        num_in_pipes = (
            (used["multiply"] + used["logic"]) / 2 + used["special"] / 8 + used["tensor"] / self.card.product_cycles
        )
        return max(0.0, used["issue"] - num_in_pipes)


def predict_seconds(kernel: SingleKernel, card: GpuCard, length: int, is_causal: bool) -> Range:
    """Of one kernel over all heads of the tokens."""
    num_heads, batch = WIDTH // kernel.name.head_size, NUM_TOKENS // length
    tiles, rows_are_keys = (
        kernel.tiles,
        kernel.name.kind in ("key gradient", "value gradient", "key and value gradients"),
    )
    num_row_blocks = -(-length // tiles.num_rows)
    num_blocks = num_row_blocks * num_heads * batch
    blocks = max(1, min(kernel.blocks, -(-num_blocks // card.num_multiprocessors)))
    step = StepModel(kernel, card, blocks).cycles()
    places = card.num_multiprocessors * blocks

    def total(cycles_of_step: float, num_latencies: int, cut_steps_count: int) -> float:
        work = []
        for row_block in range(num_row_blocks):
            num_steps, num_cut = _steps(row_block, tiles.num_rows, tiles.num_inner, length, is_causal, rows_are_keys)
            steps = num_steps + (cut_steps_count - 1) * num_cut
            work.append(steps * cycles_of_step + num_latencies * card.dram_latency)
        work.sort(reverse=True)  # the longest rows of a head come first
        return _makespan(work * (num_heads * batch), places) / (card.clock_ghz * 1e9)

    bytes_moved = 4 * NUM_TOKENS * WIDTH * 2 * (2 if "gradient" in kernel.name.kind else 1)
    by_dram = bytes_moved / (card.dram_gbs * 1e9)
    return Range(max(total(step.low, 1, 1), by_dram), max(total(step.high, 3, 2), by_dram / card.dram_share))


def _steps(
    row_block: int, num_rows: int, num_inner: int, length: int, is_causal: bool, rows_are_keys: bool
) -> tuple[int, int]:
    """Steps of a block, and how many of them a causal mask cuts."""
    num_all = -(-length // num_inner)
    if not is_causal:
        return num_all, 0
    first, end = row_block * num_rows, min(length, (row_block + 1) * num_rows)
    num_cut = max(1, -(-(end - first) // num_inner))
    return (num_all - first // num_inner if rows_are_keys else -(-end // num_inner)), num_cut


def _makespan(work: list[float], places: int) -> float:
    """When the last piece is done, if each goes to the place that is free first."""
    free = [0.0] * places
    for amount in work:
        heapq.heapreplace(free, free[0] + amount)
    return max(free)


def predict_share(kernels: list[SingleKernel], card: GpuCard, length: int, is_causal: bool) -> Range:
    """Of the tensor cores' peak, in the literature's FLOPs: of a forward pass, or of a backward pass's kernels."""
    is_backward = "gradient" in kernels[0].name.kind
    pairs = NUM_TOKENS * length * (0.5 if is_causal else 1.0)
    flops = (10 if is_backward else 4) * pairs * WIDTH
    parts = [predict_seconds(kernel, card, length, is_causal) for kernel in kernels]
    # Delta of each query, which the memory limits.
    prepare = 2 * NUM_TOKENS * WIDTH * 2 / (card.dram_gbs * 1e9 * card.dram_share) if is_backward else 0.0
    best, worst = sum(part.low for part in parts) + prepare, sum(part.high for part in parts) + prepare
    return Range(flops / worst / (card.peak_tflops * 1e12), flops / best / (card.peak_tflops * 1e12))


def predict_decoding(kernel: SingleKernel, card: GpuCard) -> dict[str, Any]:
    """
    Share of DRAM's bandwidth for one query and a long cache, with the four blocks of a warp that a launch makes.

    Each step waits for its keys and for its values, so that a block moves the bytes of a step in two latencies and the
    time of its instructions: one after the other (pessimistic), or hidden in the wait (optimistic).
    """
    blocks = min(MAX_DECODING_BLOCKS, kernel.blocks)
    bytes_of_step = blocks * 2 * kernel.tiles.num_inner * kernel.name.head_size * 2
    cycles = StepModel(kernel, card, blocks).cycles()
    per_cycle = card.dram_gbs / card.clock_ghz / card.num_multiprocessors  # of a multiprocessor
    waits = 2 * card.dram_latency
    low = bytes_of_step / (waits + cycles.high) / per_cycle
    high = bytes_of_step / max(waits, cycles.low) / per_cycle
    return {
        "blocks": blocks,
        "low": min(low, card.dram_share),
        "high": min(high, card.dram_share),
        "unbounded_low": low,
    }
