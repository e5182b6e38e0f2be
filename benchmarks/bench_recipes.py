"""
Training speed of the recipes with the compiled attention beside torch's `sdpa`.

    GOMP_CPU_AFFINITY="0 1" python benchmarks/bench_recipes.py        # nothing else may run

Each recipe runs as it is, a few steps, by turns with `--attn lmopt` and `--attn sdpa`; samples per second are those
that the Trainer logs, medians over the rounds. The losses of both are kept beside them. Writes
`benchmarks/results/recipes.json`; the last line printed is the summary.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from hf_lmopt.checkpointing import write_json
from hf_lmopt.publishing import run_facts


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"
SEED = 42
COMMON = [
    "--seed",
    str(SEED),
    "--optimizer",
    "adamw",
    "--eval_strategy",
    "no",
    "--save_strategy",
    "no",
    "--bf16",
    "--use_cpu",
]
RUNS = {
    "pretrain_causal_lm, blocks of 1024": ["pretrain_causal_lm.py", "--block_size", "1024", "--max_steps", "24"],
    "finetune_classifier, padded batches": ["finetune_classifier.py", "--max_steps", "60"],
}
IMPLEMENTATIONS = ("lmopt", "sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = {name: compare(name, command, args.rounds) for name, command in RUNS.items()}
    args.output.parent.mkdir(exist_ok=True)
    write_json(args.output, {"recipes": results, **run_facts(SEED)})
    print(json.dumps({name: round(row["speed_over_sdpa"], 2) for name, row in results.items()}))


def compare(name: str, command: list[str], rounds: int) -> dict[str, Any]:
    """By turns; the first of each also builds and fills caches, and does not count."""
    runs: dict[str, list[dict[str, float]]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    for _ in range(rounds + 1):
        for implementation, found in runs.items():
            found.append(run([*command, *COMMON, "--attn", implementation]))
    speeds = {each: median(run["samples_per_second"] for run in found[1:]) for each, found in runs.items()}
    row = {
        "command": " ".join([*command, *COMMON]),
        "samples_per_second": speeds,
        "speed_over_sdpa": speeds["lmopt"] / speeds["sdpa"],
        "training_loss": {each: found[-1]["loss"] for each, found in runs.items()},
    }
    print(f"{name}: {row['speed_over_sdpa']:.2f} times the speed with sdpa; losses {row['training_loss']}", flush=True)
    return row


def run(command: list[str]) -> dict[str, float]:
    """Until it has trained: the evaluation after that is left out."""
    with tempfile.TemporaryDirectory() as folder:
        whole = [sys.executable, str(ROOT / "recipes" / command[0]), *command[1:], "--output_dir", folder]
        with subprocess.Popen(
            whole, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        ) as process:
            for line in process.stdout or []:
                if found := re.search(r"'train_samples_per_second': '([\d.]+)'.*'train_loss': '([\d.]+)'", line):
                    process.kill()
                    return {"samples_per_second": float(found[1]), "loss": float(found[2])}
    raise RuntimeError(f"{' '.join(command)} ended without a speed. Run it by hand to see why.")


if __name__ == "__main__":
    main()
