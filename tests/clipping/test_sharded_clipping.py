"""Sharded gradients (FSDP2's DTensor) are clipped as whole ones are, in two processes."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hf_lmopt.clipping import CLIP_STRATEGIES, Clipper, StepGradients, clip_global_norm_


# Shape, layer, axes of a unit, and where it lies: on a mesh of one dimension, on one of two, or whole (None).
TENSORS: list[tuple[tuple[int, ...], str, tuple[int, ...], Any]] = [
    ((6, 4), "layers.0", (1,), ("line", [Shard(0)])),
    ((5, 3), "layers.0", (1,), ("line", [Shard(0)])),  # 5 rows do not split evenly
    ((1, 3), "layers.0", (), ("line", [Shard(0)])),  # nothing on the second process
    ((4, 6), "layers.1", (0,), ("line", [Shard(0)])),  # every unit is split
    ((4, 6), "layers.1", (1,), ("line", [Shard(1)])),
    ((8,), "layers.1", (), ("line", [Shard(0)])),
    ((3, 2), "layers.1", (1,), ("line", [Replicate()])),
    ((6, 2), "embeddings", (1,), ("grid", [Replicate(), Shard(0)])),
    ((2, 6), "head", (1,), ("grid", [Replicate(), Shard(1)])),
    ((3, 3), "head", (1,), None),
]
STRATEGIES: dict[str, dict[str, Any]] = {name: {} for name in CLIP_STRATEGIES} | {
    "quantile": {"quantile": 0.5},
    "zscore": {"warmup_steps": 2},
    "global_norm": {"norm_type": "inf"},
    "per_group": {"norm_type": 1.0},
}
SCALES = (0.3, 0.35, 10.0, 1e25, 0.2)


def tensors(scale: float, seed: int, meshes: dict[str, DeviceMesh] | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    whole = [scale * torch.randn(shape, generator=generator) for shape, *_ in TENSORS]
    places = [place for *_, place in TENSORS]
    return [
        distribute_tensor(value, meshes[place[0]], place[1]) if meshes and place else value
        for value, place in zip(whole, places, strict=True)
    ]


def as_whole(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [value.full_tensor() if isinstance(value, DTensor) else value for value in values]


def run(name: str, meshes: dict[str, DeviceMesh] | None) -> list[dict[str, Any]]:
    """What each of a few steps of different sizes gives, the last but one with a NaN in one shard."""
    clipper = Clipper(name, 1.0, STRATEGIES[name])
    _, layers, axes, _ = zip(*TENSORS, strict=True)
    outcomes = []
    for step, scale in enumerate((*SCALES, math.nan, 5.0)):
        gradients = tensors(1.0 if math.isnan(scale) else scale, step, meshes)
        if math.isnan(scale):
            local = gradients[0].to_local() if isinstance(gradients[0], DTensor) else gradients[0]
            if meshes is None or dist.get_rank() == 1:
                local[-1, -1] = math.nan
        groups = [index % 2 for index in range(len(TENSORS))]
        result = clipper.clip_(StepGradients(tensors(1.0, 100, meshes), gradients, layers, groups, fan_in_axes=axes))
        outcomes.append(
            {
                "norm": float(result.norm),
                "coefficient": float(result.coefficient),
                "is_finite": result.is_finite,
                "clipped_share": result.clipped_share,
                "gradients": as_whole(gradients),
            }
        )
    return outcomes


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    meshes = {
        "line": init_device_mesh("cpu", (2,)),
        "grid": init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")),
    }
    assert [isinstance(tensor, DTensor) for tensor in tensors(1.0, 0, meshes)] == [True] * 9 + [False]
    partial = DTensor.from_local(torch.ones(2), meshes["line"], [Partial()])
    with pytest.raises(ValueError, match=r"holds a summand.*Only a sharded or replicated.*redistribute"):
        clip_global_norm_([partial], 1.0)
    results = {name: run(name, meshes) for name in STRATEGIES}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_sharded_gradient_is_clipped_as_the_whole_one(
    name: str, sharded: list[dict[str, list[dict[str, Any]]]]
) -> None:
    for here, there, whole in zip(sharded[0][name], sharded[1][name], run(name, None), strict=True):
        assert here["is_finite"] == there["is_finite"] == whole["is_finite"]
        assert here["clipped_share"] == there["clipped_share"] == whole["clipped_share"]
        assert here["coefficient"] == there["coefficient"] == pytest.approx(whole["coefficient"], rel=1e-5)
        if whole["is_finite"]:
            assert here["norm"] == there["norm"] == pytest.approx(whole["norm"], rel=1e-5)
        for ours, theirs, reference in zip(here["gradients"], there["gradients"], whole["gradients"], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0, equal_nan=True)
            torch.testing.assert_close(theirs, reference, rtol=1e-5, atol=0, equal_nan=True)


def test_the_steps_are_clipped_measured_and_refused_as_they_should() -> None:
    for name in STRATEGIES:
        outcomes = run(name, None)
        assert all(0 < outcome["coefficient"] <= 1 for outcome in outcomes)
        assert [outcome["is_finite"] for outcome in outcomes] == [True] * 5 + [False, True]
        assert (outcomes[2]["coefficient"] < 1) == (name != "none")
