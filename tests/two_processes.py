"""Runs a script of the tests in two gloo processes, and ends each of them cleanly."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


TESTS = Path(__file__).parent


def run_in_two_processes(script: str, folder: Path) -> Path:
    """Runs `tests/<script> FOLDER` under torchrun, one thread each; returns the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [*command, str(TESTS / script), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def main(write: Callable[[str], None]) -> None:
    """
    What such a script does: writes into the folder it was given, and leaves.

    Without the interpreter's own end, in which gloo's threads may outlive what they use and abort the process.
    """
    gc.freeze()
    write(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
