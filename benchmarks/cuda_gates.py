"""
Gates on the machine code of the CUDA kernels: what a card would run, read without a card.

    pip install -e '.[test]'                                 # nvdisasm; nvcc must be there
    python benchmarks/cuda_gates.py                          # all architectures of a wheel
    python benchmarks/cuda_gates.py --archs 75,80            # what CI checks

Every kernel, for each architecture:

- no spills, no stack, no load or store of local memory;
- in its main loop exactly the instructions of the tensor cores that its tiles demand (HMMA), factors read by ldmatrix
  (LDSM), and from sm_80 on asynchronous copies (LDGSTS);
- registers and shared memory that let a multiprocessor hold the blocks that the design wants (`kernel_table.py`).

Beside it, of each kernel and head size in float16, the bank conflicts that the interpreter of the tests counts in
shared memory (`tests/cuda_simulation`), for sm_75 and sm_80. Writes `results/cuda_gates.json` and `.md`; the exit
status is 1 if a gate is failed. The last line printed is a summary in JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kernel_table import (
    EMPTY,
    HEAD_SIZE_REASONS,
    LIMITS,
    OTHER_REASONS,
    REASONS,
    KernelName,
    Tiles,
    base_name,
    blocks_per_multiprocessor,
    count_main_loop,
    intended_blocks,
    parse_name,
    read_tiles,
)
from machine_code import MachineKernel, compile_kernels

from hf_lmopt.checkpointing import write_json
from hf_lmopt.cuda_architectures import COMPILED
from hf_lmopt.extension_sources import SOURCE_DIR
from hf_lmopt.publishing import run_facts


HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cuda_gates.json"
NUM_JOBS = 2
INTRODUCTION = (
    "Made by `python benchmarks/cuda_gates.py`. Read from the machine code; nothing was run on a card. Numbers of "
    "instructions are those of a main loop's body, of registers those of a thread. float16 on all architectures, "
    "bfloat16 from sm_80 on, as Turing has no products of it."
)
CONFLICT_COUNTS = ("requests", "conflicts_in_loops", "conflicts_elsewhere")
COLUMNS = {
    "architecture": "sm",
    "kernel": "kernel",
    "type": "type",
    "head_size": "head size",
    "tiles": "rows x inner",
    "registers": "registers",
    "shared_bytes": "shared bytes",
    "blocks": "blocks",
    "intended_blocks": "intended",
    "products": "HMMA",
    "demanded_products": "demanded",
    "matrix_loads": "LDSM",
    "async_copies": "LDGSTS",
    "spill_bytes": "spills",
    "local_accesses": "LDL, STL",
    "failures": "failed",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", default=",".join(map(str, COMPILED)), help="Architectures, with commas between them."
    )
    parser.add_argument("--no_conflicts", action="store_true", help="Leave the bank conflicts out.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    architectures = [int(name) for name in args.archs.split(",")]
    started = time.monotonic()
    tiles_of = read_tiles()
    rows = [check_kernel(kernel, architecture, tiles_of) for kernel, architecture in compile_all(architectures)]
    conflicts = [] if args.no_conflicts else count_conflicts(architectures)
    results = {"kernels": rows, "bank_conflicts": conflicts, **run_facts(0)}
    args.output.parent.mkdir(exist_ok=True)
    write_json(args.output, results)
    args.output.with_suffix(".md").write_text(describe(rows, conflicts))
    failed = [row for row in (*rows, *conflicts) if row["failures"]]
    for row in failed:
        print(
            f"sm_{row['architecture']} {row['kernel']} {row['type']} {row['head_size']}: {'; '.join(row['failures'])}"
        )
    summary = {"kernels": len(rows), "failed": len(failed), "seconds": round(time.monotonic() - started)}
    print(json.dumps({"output": args.output.name, **summary}))
    return 1 if failed else 0


def compile_all(architectures: Iterable[int]) -> list[tuple[MachineKernel, int]]:
    """All kernels of the package, by architecture."""
    sources = sorted((SOURCE_DIR / "cuda").rglob("*.cu"))
    jobs = [(source, architecture) for architecture in architectures for source in sources]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_JOBS) as pool:
        found = pool.map(lambda job: compile_kernels(job[0], str(job[1]), Path(folder)), jobs)
        return [(kernel, job[1]) for job, kernels in zip(jobs, found, strict=True) for kernel in kernels]


def check_kernel(
    kernel: MachineKernel, architecture: int, tiles_of: dict[tuple[str, int, int], Tiles]
) -> dict[str, Any]:
    """
    The row of a kernel.

    Args:
        kernel (`MachineKernel`):
            As compiled.
        architecture (`int`):
            For which, 80 for sm_80.
        tiles_of (`dict`):
            Tiles by kind, architecture and head size, of [`read_tiles`].

    Returns:
        `dict[str, Any]`: `failures` names the gates that are failed, with what was found.
    """
    name, counts = parse_name(kernel.name), kernel.counts
    row: dict[str, Any] = {
        "architecture": architecture,
        "kernel": name.kind if name else base_name(kernel.name),
        "type": name.type if name else "",
        "head_size": name.head_size if name else "",
        "registers": kernel.registers,
        "shared_bytes": kernel.static_shared_bytes,
        "spill_bytes": kernel.spill_bytes,
        "stack_bytes": kernel.stack_bytes,
        "local_accesses": counts["LDL"] + counts["STL"],
    }
    row["failures"] = [
        f"{row[key]} {what}"
        for key, what in (
            ("spill_bytes", "bytes spilled"),
            ("stack_bytes", "bytes of stack"),
            ("local_accesses", "accesses to local memory"),
        )
        if row[key]
    ]
    if name is None:
        if row["kernel"] not in OTHER_REASONS:
            row["failures"].append("it has no reason in kernel_table.py")
        return {**row, "reason": OTHER_REASONS.get(row["kernel"], "")}
    tiles = tiles_of.get((name.kind, architecture, name.head_size))
    if tiles is None or not counts["STG"]:  # it writes nothing
        return {**row, "reason": EMPTY}
    row["reason"] = f"{REASONS[name.kind]}; {HEAD_SIZE_REASONS[name.head_size]}"
    return check_tiles(row, kernel, name, architecture, tiles)


def check_tiles(
    row: dict[str, Any], kernel: MachineKernel, name: KernelName, architecture: int, tiles: Tiles
) -> dict[str, Any]:
    """What the tiles of a kernel with products demand, beside what is there."""
    loop = count_main_loop(kernel)
    shared = kernel.static_shared_bytes + tiles.shared_bytes
    found: dict[str, Any] = {
        "tiles": f"{tiles.num_rows} x {tiles.num_inner}",
        "shared_bytes": shared,
        "blocks": blocks_per_multiprocessor(kernel.registers, tiles.num_warps, shared, LIMITS[architecture]),
        "intended_blocks": intended_blocks(name, architecture),
        "products": loop["HMMA"],
        "demanded_products": name.num_products(tiles, architecture),
        "matrix_loads": loop["LDSM"],
        "async_copies": loop["LDGSTS"],
    }
    failures = [*row["failures"]]
    if found["products"] != found["demanded_products"]:
        failures.append(f"{found['products']} products in the main loop, {found['demanded_products']} are needed")
    if found["blocks"] < found["intended_blocks"]:
        failures.append(f"{found['blocks']} blocks fit, {found['intended_blocks']} are intended")
    if not found["matrix_loads"]:
        failures.append("no LDSM in the main loop")
    if (found["async_copies"] > 0) != (architecture >= 80):
        failures.append(f"{found['async_copies']} LDGSTS in the main loop")
    return {**row, **found, "failures": failures}


def count_conflicts(architectures: Iterable[int]) -> list[dict[str, Any]]:
    """Bank conflicts of each kernel in float16, of small calls that fill two steps, by the tests' interpreter."""
    from bank_conflicts import count_bank_conflicts

    return [
        row for architecture in architectures if architecture in (75, 80) for row in count_bank_conflicts(architecture)
    ]


def describe(rows: list[dict[str, Any]], conflicts: list[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    with_products = [row for row in rows if "products" in row]
    reasons = {(row["kernel"], row["head_size"]): row["reason"] for row in with_products}
    sections = {
        "Kernels with products": _table(COLUMNS, with_products),
        "Why each is compiled": _table(
            {"kernel": "kernel", "head_size": "head size", "reason": "reason"},
            [{"kernel": kernel, "head_size": size, "reason": reason} for (kernel, size), reason in reasons.items()],
        ),
        "Kernels without products": _table(
            {
                "architecture": "sm",
                "kernel": "kernel",
                "instantiations": "instantiations",
                "registers": "registers at most",
                "spill_bytes": "spills",
                "local_accesses": "LDL, STL",
                "reason": "reason",
            },
            _join_instantiations([row for row in rows if "products" not in row and row["reason"] != EMPTY]),
        ),
        "Bank conflicts, by the interpreter of the tests": _table(
            {key: key.replace("_", " ") for key in ("architecture", "kernel", "head_size", *CONFLICT_COUNTS)},
            conflicts,
        ),
    }
    text = "".join(f"\n## {title}\n\n{table}" for title, table in sections.items())
    return f"# Gates on the machine code\n\n{INTRODUCTION}\n{text}"


def _join_instantiations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all instantiations of a kernel, with the largest numbers."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["kernel"]), []).append(row)
    numbers = ("registers", "spill_bytes", "local_accesses")
    return [
        {**group[0], "instantiations": len(group), **{key: max(row[key] for row in group) for key in numbers}}
        for group in groups.values()
    ]


def _table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[_cell(row.get(key, "")) for key in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
