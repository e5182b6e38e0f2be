"""
The support matrix of the compiled attention: which types and features each generation of devices has.

One table, [`GENERATIONS`]. The operator's checks, `--attn auto`, `hf-lmopt doctor` and the README go by it;
`python -m hf_lmopt.attention.support` prints it for the README.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


FEATURES = (
    "causal",
    "windows",
    "masks",
    "bias",
    "softcap",
    "sinks",
    "dropout",
    "packing",
    "grouped heads",
    "decoding",
)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
CHECKED_AT_PTX_LEVEL = "checked at PTX level"  # until a GPU has run it


@dataclass(frozen=True)
class Generation:
    """
    Devices that the same kernels serve in the same types.

    Attributes:
        name (`str`): what it is called.
        lowest_capability (`int`): the compute capability, without the dot, from which on a card belongs to it; 0 for
            CPUs.
        devices (`str`): examples.
        dtypes (`tuple[torch.dtype, ...]`): what query, key and value may be.
        features (`tuple[str, ...]`): in all these types, forward and backward.
        evidence (`str`): how it was checked.
    """

    name: str
    lowest_capability: int
    devices: str
    dtypes: tuple[torch.dtype, ...]
    features: tuple[str, ...] = FEATURES
    evidence: str = CHECKED_AT_PTX_LEVEL

    @property
    def label(self) -> str:
        """`"Turing (sm_75)"`."""
        return f"{self.name} (sm_{self.lowest_capability})" if self.lowest_capability else self.name


CPU = Generation("CPU", 0, "x86-64 with AVX-512, AVX2 or neither", TYPES, evidence="tested")
# From the oldest to the newest.
GENERATIONS = (
    CPU,
    Generation("Turing", 75, "T4, RTX 20xx", (torch.float16,)),
    Generation("Ampere", 80, "A100, A10, RTX 30xx", HALF_TYPES),
    Generation("Ada", 89, "L4, L40, RTX 40xx", HALF_TYPES),
    Generation("Hopper", 90, "H100, H200", HALF_TYPES),
    Generation("Blackwell", 100, "B200, RTX 50xx", HALF_TYPES),
)


def generation_of(capability: int) -> Generation:
    """The generation of a card by its compute capability without the dot; those to come count as the newest."""
    return max(
        (generation for generation in GENERATIONS if generation.lowest_capability <= capability),
        key=lambda generation: generation.lowest_capability,
    )


def why_no_type(generation: Generation, dtype: torch.dtype) -> str | None:
    """Why tensors of a type are not served, with the ways out; `None` if they are."""
    if dtype in generation.dtypes:
        return None
    names = [name_of_type(allowed) for allowed in generation.dtypes]
    allowed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    where = "" if generation is CPU else f" on {generation.label}"
    reason = f"the compiled attention takes {allowed}{where}, and no {name_of_type(dtype)}"
    if generation is CPU or dtype not in TYPES:
        return reason
    return f"{reason}: load the model in {names[-1]}, or run it under torch.autocast to {' or '.join(names)}"


def name_of_type(dtype: torch.dtype) -> str:
    """`"float16"`."""
    return str(dtype).removeprefix("torch.")


def describe_features(generation: Generation) -> str:
    """`"all"`, or `"all but"` what is missing."""
    missing = [feature for feature in FEATURES if feature not in generation.features]
    return f"all but {', '.join(missing)}" if missing else "all"


def build_table() -> str:
    """The Markdown table of the README, a line per generation."""
    lines = [
        f"| the compiled attention on | {' | '.join(map(name_of_type, TYPES))} | features | evidence |",
        f"|---|{'---|' * (len(TYPES) + 2)}",
    ]
    for generation in GENERATIONS:
        types = " | ".join("yes" if dtype in generation.dtypes else "no" for dtype in TYPES)
        name = f"{generation.label}: {generation.devices}"
        lines.append(f"| {name} | {types} | {describe_features(generation)} | {generation.evidence} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(build_table())
