"""What the model of `gpu_model.py` knows of a card: rates of its pipes, from NVIDIA's documents and measurements."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuCard:
    """
    A card. Cycles are those of a multiprocessor, which has four schedulers; each issues one instruction a cycle.

    Attributes:
        architecture (`int`): of the code that it runs.
        num_multiprocessors, clock_ghz, dram_gbs: of the data sheet, at the boost clock.
        product_cycles (`int`): of a scheduler's tensor core, for one HMMA of this architecture.
        l2_bytes (`float`): that a multiprocessor gets from the second cache in a cycle.
        dram_latency (`int`): cycles.
        dram_share (`float`): of the bandwidth that a plain copy reaches.
    """

    name: str
    architecture: int
    num_multiprocessors: int
    clock_ghz: float
    dram_gbs: float
    product_cycles: int
    l2_bytes: float
    dram_latency: int
    dram_share: float

    @property
    def peak_tflops(self) -> float:
        flops = 2 * 16 * 8 * (16 if self.architecture >= 80 else 8)
        return 4 * flops / self.product_cycles * self.num_multiprocessors * self.clock_ghz / 1000


# A100: "NVIDIA A100 Tensor Core GPU Architecture" (312 TFLOPs, 5120 bytes of L2 a cycle). T4: "NVIDIA Turing GPU
# Architecture" (65 TFLOPs with float32 sums), Jia et al. 2019 (https://arxiv.org/abs/1903.07486) for L2 and latency.
# A T4 of 70 W holds its boost clock for short only: shares of the peak at the clock that it has are what counts.
CARDS = {
    "A100": GpuCard("A100 80 GB SXM", 80, 108, 1.41, 2039, 8, 5120 / 108, 600, 0.9),
    "T4": GpuCard("T4", 75, 40, 1.59, 320, 8, 800 / 40, 500, 0.75),
}

# Cycles of a scheduler's pipe for the 32 lanes of a warp: 16 lanes a cycle for float32 and integers, 4 for special
# functions and conversions (CUDA programming guide, throughput of arithmetic instructions: 64 and 16 a cycle and
# multiprocessor for 7.5 and 8.0).
_SPECIAL = re.compile(r"MUFU|I2F|F2I|F2F\b|F2F\.|POPC|FLO")
_MULTIPLIERS = re.compile(r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2")
_NO_PIPE = re.compile(r"BRA|BSSY|BSYNC|BMOV|BAR|DEPBAR|LDGDEPBAR|NOP|WARPSYNC|CALL|EXIT|S2R|U[A-Z]|R2UR|LDG\b|LDG\.")


def pipe_cycles(step: Counter[str], card: GpuCard) -> dict[str, float]:
    """
    Cycles that one warp's instructions occupy each pipe for.

    Args:
        step (`Counter[str]`):
            Instructions by opcode.
        card (`GpuCard`):
            On which.

    Returns:
        `dict[str, float]`: of the tensor cores, special functions, multipliers, integer and logic units and issue, of
        one scheduler; `shared` of the shared memory, which all four share, 128 bytes a cycle.
    """
    cycles = dict.fromkeys(("tensor", "special", "multiply", "logic", "issue", "shared"), 0.0)
    for opcode, count in step.items():
        cycles["issue"] += count
        if opcode.startswith("HMMA"):
            cycles["tensor"] += card.product_cycles * count
        elif shared := shared_cycles(opcode):
            cycles["shared"] += shared * count
        elif _SPECIAL.match(opcode):
            cycles["special"] += 8 * count
        elif _MULTIPLIERS.match(opcode):
            cycles["multiply"] += 2 * count
        elif not _NO_PIPE.match(opcode):
            cycles["logic"] += 2 * count
    return cycles


def shared_cycles(opcode: str) -> int:
    """Cycles of the shared memory for one instruction of a warp without conflicts; 0 for all others."""
    name = opcode.partition(".")[0]
    if name == "LDSM":
        return 4 if ".4" in opcode else 2
    if name in ("LDS", "STS", "LDGSTS"):
        return 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    return 1 if name == "SHFL" else 0
