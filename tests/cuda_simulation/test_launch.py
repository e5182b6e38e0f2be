"""The chain from a torch operator to the PTX of its kernel, and what the simulated card refuses."""

import ctypes

import pytest
import torch

from hf_lmopt.cuda_toolkit import find_nvcc

from .card import SimulatedCard
from .launch import between_guards, extent, load_simulation, simulate, with_bug
from .parser import Module
from .ptx import PtxError
from .run import (
    INVALID_CONFIGURATION,
    INVALID_VALUE,
    SUCCESS,
    TOO_MANY_RESOURCES,
    Run,
    SimulationLibrary,
    stable_name,
)


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc compiles the kernels")
KERNEL = ".entry k(.param .u32 x)\n.maxntid 256, 1, 1\n{ .shared .align 4 .b8 tile[1024]; .reg .b32 %r1; ret; }"


def a_run(architecture: str) -> Run:
    library = SimulationLibrary(ctypes.CDLL(None), {}, _modules={architecture: {"k": Module(KERNEL)}})
    return Run(SimulatedCard(architecture), library, None)


def test_cards_answer_with_their_own_limits() -> None:
    turing, ampere = SimulatedCard("sm_75"), SimulatedCard("sm_80")
    assert (turing.compute_capability, turing.max_shared_bytes, turing.num_multiprocessors) == ((7, 5), 65536, 40)
    assert (ampere.compute_capability, ampere.max_shared_bytes, ampere.num_multiprocessors) == ((8, 0), 166912, 108)
    with pytest.raises(ValueError, match=r"SimulatedCard\('sm_70'\) is not known. Choose one of \['sm_75', 'sm_80'\]"):
        SimulatedCard("sm_70")


@pytest.mark.parametrize(
    ("grid", "block", "dynamic", "allowed", "error"),
    [
        ((1, 1, 1), (256, 1, 1), 0, 49152, SUCCESS),
        ((2**31 - 1, 65535, 65535), (1, 1, 1), 0, 49152, None),
        ((0, 1, 1), (32, 1, 1), 0, 49152, INVALID_CONFIGURATION),
        ((1, 65536, 1), (32, 1, 1), 0, 49152, INVALID_CONFIGURATION),
        ((1, 1, 65536), (32, 1, 1), 0, 49152, INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 33, 1), 0, 49152, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), 0, 49152, INVALID_CONFIGURATION),
        ((1, 1, 1), (512, 1, 1), 0, 49152, TOO_MANY_RESOURCES),
        ((1, 1, 1), (32, 1, 1), 49153, 49152, INVALID_VALUE),
        ((1, 1, 1), (32, 1, 1), 64512, 64512, SUCCESS),
        ((1, 1, 1), (32, 1, 1), 64513, 65536, INVALID_VALUE),
    ],
)
def test_launches_beyond_the_limits_get_the_errors_of_cuda(
    grid: tuple, block: tuple, dynamic: int, allowed: int, error: int | None
) -> None:
    run = a_run("sm_75")
    if error is None:
        assert run._check_launch(Module(KERNEL)["k"], grid, block, dynamic, allowed) == SUCCESS
    else:
        assert run.launch("k", grid, block, dynamic, allowed, [ctypes.addressof(ctypes.c_uint(3))]) == error
        assert len(run.launches) == (error == SUCCESS)


def test_more_shared_memory_than_the_card_has_cannot_be_asked_for() -> None:
    maximum, carveout = 8, 9
    assert a_run("sm_75").set_attribute("k", maximum, 65536 - 1024) == SUCCESS
    assert a_run("sm_75").set_attribute("k", maximum, 65536 - 1023) == INVALID_VALUE
    assert a_run("sm_80").set_attribute("k", maximum, 65536) == SUCCESS
    assert a_run("sm_80").set_attribute("k", carveout, 100) == SUCCESS


def test_names_of_kernels_survive_an_edit_of_their_file() -> None:
    name = "_ZN5lmopt4cuda46_GLOBAL__N__5fbd7a4e_13_fused_step_cu_d26cc43b17fused_step_kernelEvT_"
    other = name.replace("5fbd7a4e", "00000000").replace("d26cc43b", "11111111")
    assert stable_name(name) == stable_name(other) != name


def test_the_extent_of_a_view_ends_with_its_last_element() -> None:
    whole = torch.zeros(10, 8, dtype=torch.bfloat16)
    assert extent(whole) == 160
    assert extent(whole[:, :3]) == (9 * 8 + 3) * 2
    assert extent(whole.t()[2:4]) == (9 * 8 + 2) * 2


def test_a_copy_between_guards_has_the_same_strides_and_values() -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    for view in (whole, whole[1:, :, ::2], whole.transpose(0, 2), whole[:, :1].expand(3, 4, 5), whole[0, 0, 0]):
        copy = between_guards(view)
        assert torch.equal(copy, view)
        assert copy.stride() == view.stride()
        assert copy.data_ptr() - copy.untyped_storage().data_ptr() == 4096 * 4


def run_step(parameter: torch.Tensor, gradient: torch.Tensor, architecture: str, **options: object) -> Run:
    """Gradient descent by the fused step, in place."""
    with simulate(SimulatedCard(architecture), {"gradient": gradient}, {"parameter": parameter}, **options) as run:  # type: ignore[arg-type]
        torch.ops.lmopt_cuda_simulation.fused_step_(
            "plain_gradient", [parameter], [gradient], [], [], [], [0.5], 0.0, 1.0, 1.0, False
        )
    return run


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
def test_an_operator_runs_down_to_its_ptx(architecture: str) -> None:
    load_simulation()
    parameter, gradient = torch.arange(3000.0), torch.ones(3000)
    run = run_step(parameter, gradient, architecture)
    assert not run.problems
    assert torch.equal(parameter, torch.arange(3000.0) - 0.5)
    assert [(launch.grid, launch.block) for launch in run.launches] == [((3, 1, 1), (256, 1, 1))]
    assert run.counts["st.global.f32"] > 0
    assert sum(traffic.sectors for traffic in run.sectors()) >= 3 * 3000 * 4 // 32


@needs_nvcc
def test_a_tensor_that_was_not_named_is_out_of_bounds() -> None:
    load_simulation()
    parameter, gradient = torch.zeros(64), torch.ones(64)
    with simulate(SimulatedCard("sm_80"), inplace=[parameter]) as run:
        torch.ops.lmopt_cuda_simulation.fused_step_(
            "plain_gradient", [parameter], [gradient], [], [], [], [0.5], 0.0, 1.0, 1.0, False
        )
    assert "memory" in [problem.check for problem in run.problems]


@needs_nvcc
def test_a_bug_in_the_kernel_runs_under_the_same_operator() -> None:
    buggy = with_bug(("cuda/fused_step.cu", "(left < kBlock ? left : kBlock)", "(left > kBlock ? left : kBlock)"))
    parameter, gradient = torch.zeros(1500), torch.ones(1500)
    run = run_step(parameter, gradient, "sm_80", library=buggy)
    assert "memory" in [problem.check for problem in run.problems]
    assert not run_step(torch.zeros(1500), gradient, "sm_80").problems


@needs_nvcc
def test_an_exception_of_the_interpreter_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    load_simulation()

    def fail(*arguments: object) -> None:
        raise PtxError("line 3: the opcode 'warble' is not known")

    monkeypatch.setattr("cuda_simulation.interpreter.Interpreter.launch", fail)
    with pytest.raises(PtxError, match="warble"):
        run_step(torch.zeros(64), torch.ones(64), "sm_80")


@needs_nvcc
def test_operators_outside_a_simulation_fail() -> None:
    load_simulation()
    with pytest.raises(RuntimeError, match="unknown error of the simulation"):
        torch.ops.lmopt_cuda_simulation.fused_step_(
            "plain_gradient", [torch.zeros(4)], [torch.zeros(4)], [], [], [], [0.5], 0.0, 1.0, 1.0, False
        )
