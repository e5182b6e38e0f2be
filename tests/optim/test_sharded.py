"""Sharded parameters (FSDP2's DTensor) step as whole ones do, in two processes."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from optimizer_cases import set_random_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_lmopt.optim import OPTIMIZERS


SHAPES = ((6, 4), (5, 3), (8,))  # 5 rows do not split evenly
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lion": {"weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1, "decay_form": "l2"},
    "nadamw": {},
    "qhadam": {"nus": (0.6, 0.8)},
    "ademamix": {},
    "adan": {"weight_decay": 0.1},
    "adopt": {},
    "mars": {"gamma": 0.1},  # its norm is over the whole tensor
    "adamw cautious": {"cautious": True},  # so is its count
    "muon": {},
}


def parameters(rank: int | None) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if rank is None:
        return [torch.nn.Parameter(value) for value in values]
    mesh = init_device_mesh("cpu", (2,))
    return [torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]


def run(name: str, rank: int | None) -> list[torch.Tensor]:
    each, twins = parameters(rank), parameters(None)
    groups: Any = each
    if name == "muon":
        groups = [{"params": each[:2]}, {"params": each[2:], "algorithm": "adamw"}]
    optimizer = OPTIMIZERS[name.split()[0]].load_class()(groups, lr=0.05, **SETTINGS[name])
    for step in range(4):
        set_random_gradients(twins, step)
        for parameter, twin in zip(each, twins, strict=True):
            parameter.grad = twin.grad
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(twin.grad, parameter.device_mesh, parameter.placements)
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in each]


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    assert all(isinstance(parameter, DTensor) for parameter in parameters(rank))
    with pytest.raises(ValueError, match=r"state_bits=8 with sharded parameters.*Use state_bits=32"):
        OPTIMIZERS["lion"].load_class()(parameters(rank), state_bits=8)
    results = {name: run(name, rank) for name in SETTINGS}
    if rank == 0:
        torch.save({name: [value.detach() for value in values] for name, values in results.items()}, f"{folder}/r.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(folder)), nprocs=2)
    return torch.load(folder / "r.pt", weights_only=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sharded_step_is_that_of_the_whole_parameter(name: str, sharded: dict[str, list[torch.Tensor]]) -> None:
    for ours, whole in zip(sharded[name], run(name, None), strict=True):
        tolerance = 2e-3 if name == "muon" else 1e-6  # Muon's steps are rounded to bfloat16
        torch.testing.assert_close(ours, whole, rtol=0, atol=tolerance)
