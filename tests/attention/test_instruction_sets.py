"""The kernels that this processor would not choose, against the reference, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_lmopt.attention.ops import load_operators


load_operators()
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")
BEST = "avx512_bf16" if torch.ops.lmopt.cpu_has_avx512_bf16() else torch.ops.lmopt.cpu_capability()


@pytest.mark.skipif("HF_LMOPT_CPU_CAPABILITY" in os.environ, reason="this is the run with a lower instruction set")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[:-1])
def test_lower_instruction_sets_are_within_twice_the_error_of_plain_pytorch_too(instruction_set: str) -> None:
    if INSTRUCTION_SETS.index(instruction_set) >= INSTRUCTION_SETS.index(BEST):
        pytest.skip("no lower than what this processor has")
    cases = "within_twice_the_error or number_of_threads or chance"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-x", "-k", cases, str(Path(__file__).parent / "test_ops.py")],
        env=os.environ | {"HF_LMOPT_CPU_CAPABILITY": instruction_set},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_instruction_set_that_is_none_is_refused_with_those_that_are() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from hf_lmopt.attention.ops import load_operators; load_operators()"],
        env=os.environ | {"HF_LMOPT_CPU_CAPABILITY": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "avx1024" in result.stderr
    assert "portable, avx2, avx512, avx512_bf16" in result.stderr
