"""Every optimizer of the registry equals its reference, whatever carries the step out, and keeps torch's manners."""

import ast
import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from optimizer_cases import (
    CASES,
    MODIFIERS,
    Twin,
    build_optimizer,
    random_parameters,
    set_random_gradients,
)

from hf_lmopt.build_extension import ExtensionUnavailable, load_extension
from hf_lmopt.optim import OPTIMIZERS, SGD, AdamW, Lion, MomentumOptimizer


# NAdamW's product of momenta is kept in float32, as in torch.
FLOAT64_TOLERANCE = dict.fromkeys(CASES, 1e-12) | {"nadamw": 1e-7, "nadamw_fast": 1e-7}


@pytest.fixture(scope="module")
def needs_extension() -> None:
    try:
        load_extension()
    except ExtensionUnavailable as error:
        pytest.skip(str(error))


def test_every_elementwise_optimizer_of_the_registry_has_a_case() -> None:
    elementwise = {name for name, spec in OPTIMIZERS.items() if spec.is_fused}
    assert {optimizer for optimizer, _ in CASES.values()} == elementwise


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["single", "foreach"])
def test_every_step_equals_the_reference_in_float64(name: str, implementation: str) -> None:
    for options in MODIFIERS.values():
        parameters = random_parameters()
        optimizer = build_optimizer(name, parameters, implementation=implementation, **options)
        twin = Twin(optimizer)
        for step in range(8):
            set_random_gradients(parameters, step)
            optimizer.step()
            twin.step()
            assert twin.largest_error() < FLOAT64_TOLERANCE[name], (options, step)


def errors_beside(name: str, dtype: torch.dtype, implementation: str, options: dict[str, Any]) -> list[float]:
    """The largest error of each of six steps against the reference in float64, which starts from the same numbers."""
    parameters = random_parameters(dtype=dtype)
    optimizer = build_optimizer(name, parameters, implementation=implementation, **options)
    twin, errors = Twin(optimizer), []
    for step in range(6):
        set_random_gradients(parameters, step)
        optimizer.step()
        twin.step()
        errors.append(twin.largest_error())
    return errors


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("needs_extension")
def test_the_fused_step_is_as_exact_as_torch_in_every_precision(name: str, dtype: torch.dtype) -> None:
    rounding = torch.finfo(dtype).eps * 4  # of numbers up to 4
    for options in MODIFIERS.values():
        in_torch = errors_beside(name, dtype, "foreach", options)
        fused = errors_beside(name, dtype, "fused", options)
        for step, (ours, theirs) in enumerate(zip(fused, in_torch, strict=True)):
            assert ours <= 2 * theirs + rounding, (options, step)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_parameters_have_float32_state_and_the_error_of_rounding_alone(name: str) -> None:
    parameters = random_parameters(dtype=torch.bfloat16)
    optimizer = build_optimizer(name, parameters, implementation="foreach")
    for step in range(3):
        before = Twin(optimizer)
        before.states = {p: copy.deepcopy(optimizer.state[p]) for p in parameters}
        set_random_gradients(parameters, step)
        optimizer.step()
    for state in optimizer.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())
    # A step below half a unit in the last place is lost by a bfloat16 parameter, but not by its state.
    errors = errors_beside(name, torch.bfloat16, "foreach", {})
    assert errors[0] <= torch.finfo(torch.bfloat16).eps * 4


@pytest.mark.parametrize("implementation", ["single", "foreach", "auto"])
def test_every_option_of_a_group_is_honoured_for_that_group(implementation: str) -> None:
    one, two, three = random_parameters(((4,), (5,), (6,)))
    groups = [
        {"params": [one], "lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.2},
        {"params": [two], "decay_form": "l2", "weight_decay": 0.3, "cautious": True},
        {"params": [three], "lr": torch.tensor(0.01, dtype=torch.float64), "eps": 0.1},
    ]
    optimizer = build_optimizer("adamw", groups, implementation=implementation)
    twin = Twin(optimizer)
    for step in range(4):
        set_random_gradients([one, two, three], step)
        optimizer.step()
        twin.step()
    assert twin.largest_error() < 1e-8  # a tensor of one number is float32 by then


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_is_a_learning_rate_and_a_scheduler_may_change_it(name: str) -> None:
    parameters, twins = random_parameters(), random_parameters()
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer, reference = build_optimizer(name, parameters, lr=lr), build_optimizer(name, twins, lr=0.05)
    for step in range(4):
        for each in (parameters, twins):
            set_random_gradients(each, step)
        optimizer.step()
        reference.step()
        lr.mul_(0.5)
        reference.param_groups[0]["lr"] *= 0.5
    for ours, theirs in zip(parameters, twins, strict=True):
        assert torch.equal(ours, theirs)


# Of all, but the variants of one rule; Muon's step goes the same way through `torch.compile`.
@pytest.mark.parametrize(
    "name", ["sgd_momentum", "lion", "adamw", "nadamw", "ademamix_warmup", "adan", "adopt", "mars"]
)
def test_a_compiled_step_is_the_same_and_a_new_lr_needs_no_new_code(name: str) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    parameters, twins = random_parameters(dtype=torch.float32), random_parameters(dtype=torch.float32)
    optimizer = build_optimizer(name, parameters, lr=torch.tensor(0.05), cautious=True, weight_decay=0.1)
    reference = build_optimizer(name, twins, lr=torch.tensor(0.05), cautious=True, weight_decay=0.1)
    compiled_step = torch.compile(optimizer.step, backend=count, fullgraph=True)
    for step in range(6):
        for each in (parameters, twins):
            set_random_gradients(each, step)
        compiled_step()
        reference.step()
        for each in (optimizer, reference):
            each.param_groups[0]["lr"].mul_(0.7)
    assert len(graphs) == 2  # one that makes the state, one for all steps after it
    for ours, theirs in zip(parameters, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lion", "nadamw"])
def test_inductor_compiles_the_step(name: str) -> None:
    torch.compiler.reset()
    parameters, twins = random_parameters(((6, 5),), torch.float32), random_parameters(((6, 5),), torch.float32)
    optimizer = build_optimizer(name, parameters, lr=torch.tensor(0.05))
    reference = build_optimizer(name, twins, lr=0.05)
    compiled_step = torch.compile(optimizer.step)
    for step in range(4):
        for each in (parameters, twins):
            set_random_gradients(each, step)
        compiled_step()
        reference.step()
    torch.testing.assert_close(parameters[0], twins[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["auto", "foreach", "single"])
def test_empty_and_non_contiguous_parameters_are_stepped_like_others(implementation: str) -> None:
    for name in CASES:
        (dense,) = random_parameters(((6, 4),), torch.float32)
        strided = torch.nn.Parameter(dense.detach().t().contiguous().t())
        sliced = torch.nn.Parameter(torch.zeros(6, 8)[:, ::2].copy_(dense.detach()))
        empty = torch.nn.Parameter(torch.zeros(0, 3))
        assert not strided.is_contiguous()
        assert not sliced.is_contiguous()
        optimizer = build_optimizer(name, [strided, dense, empty, sliced], implementation=implementation)
        for step in range(3):
            set_random_gradients([dense, empty], step)
            strided.grad = dense.grad.clone()
            sliced.grad = dense.grad.t().contiguous().t()
            optimizer.step()
        torch.testing.assert_close(strided, dense, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sliced, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_not_touched_and_missing_ones_skip_their_parameter(name: str) -> None:
    for implementation in ("auto", "single"):
        moved, still = random_parameters(((300,), (5,)), torch.float32)
        before = still.detach().clone()
        optimizer = build_optimizer(
            name, [moved, still], implementation=implementation, weight_decay=0.1, decay_form="l2", cautious=True
        )
        for step in range(2):
            set_random_gradients([moved], step)
            gradient = moved.grad.clone()
            optimizer.step()
            assert torch.equal(moved.grad, gradient)
        assert torch.equal(still, before)
        assert still not in optimizer.state


def test_a_parameter_that_joins_late_has_a_step_count_of_its_own() -> None:
    early, late = random_parameters(((4,), (4,)), seed=1)
    alone = torch.nn.Parameter(late.detach().clone())
    optimizer, reference = build_optimizer("adamw", [early, late]), build_optimizer("adamw", [alone])
    for step in range(6):
        set_random_gradients([early], step)
        if step >= 3:
            set_random_gradients([late], step)
            alone.grad = late.grad.clone()
            reference.step()
        optimizer.step()
    assert torch.equal(late, alone)


def test_the_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    (parameter,) = random_parameters(((3,),))
    optimizer = build_optimizer("lion", [parameter])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert parameter.grad is not None


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_resume_from_a_state_dict_is_exact_to_the_bit(name: str, dtype: torch.dtype, state_bits: int) -> None:
    shapes = ((70, 64), (5,))
    parameters = random_parameters(shapes, dtype)
    optimizer = build_optimizer(name, parameters, state_bits=state_bits)
    for step in range(3):
        set_random_gradients(parameters, step)
        optimizer.step()
    again = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = build_optimizer(name, again, state_bits=state_bits)
    file = pickle.dumps(optimizer.state_dict())
    resumed.load_state_dict(pickle.loads(file))
    for step in range(3, 6):
        for each in (parameters, again):
            set_random_gradients(each, step)
        optimizer.step()
        resumed.step()
    for ours, theirs in zip(again, parameters, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "mars"])
def test_copies_and_pickles_go_on_alike(name: str, copied_by: Any) -> None:
    parameters = random_parameters(dtype=torch.float32)
    optimizer = build_optimizer(name, parameters)
    set_random_gradients(parameters, 0)
    optimizer.step()
    copied = copied_by(optimizer)
    for each in (optimizer, copied):
        for group in each.param_groups:
            set_random_gradients(group["params"], 1)
        each.step()
    for ours, theirs in zip(copied.param_groups[0]["params"], parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_sparse_gradients_and_complex_parameters_are_refused() -> None:
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"Lion was given a sparse gradient.*dense ones only.*sparse=False"):
        Lion(embedding.parameters()).step()
    with pytest.raises(TypeError, match=r"type torch.complex64.*view_as_real"):
        Lion([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


# What was given; what the message must say.
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "lr": ("lion", {"lr": -1e-3}, r"Lion, parameter group 0: lr=-0.001 is outside \[0, inf\).*Use a value such as"),
    "infinite lr": ("lion", {"lr": float("inf")}, "lr=inf is outside"),
    "nan": ("adamw", {"eps": float("nan")}, "eps=nan is outside"),
    "lr of two numbers": ("lion", {"lr": torch.ones(2)}, "is no number"),
    "text": ("lion", {"lr": "fast"}, "lr='fast' is no number.*use a value such as"),
    "beta": ("lion", {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 is outside \[0, 1\).*such as 0.99"),
    "one beta": ("adamw", {"betas": (0.9,)}, r"betas=\(0.9,\) is not allowed. It takes 2 numbers"),
    "tensor beta": ("lion", {"betas": (torch.tensor(0.9), 0.99)}, r"betas\[0\]=tensor.* is no number"),
    "momentum": ("sgd", {"momentum": 1.5}, r"momentum=1.5 is outside \[0, 1\)"),
    "nesterov": ("sgd", {"nesterov": True}, "nesterov=True with momentum=0.0.*set momentum=0.9"),
    "form": ("sgd", {"momentum_form": "nag"}, r"momentum_form='nag' is outside the choices \['torch', 'velocity'\]"),
    "nu": ("qhm", {"nu": 1.5}, r"nu=1.5 is outside \[0, 1\]"),
    "decay": ("adan", {"weight_decay": -0.1}, "weight_decay=-0.1 is outside"),
    "decay form": ("adan", {"decay_form": "L2"}, r"decay_form='L2' is outside the choices \['decoupled', 'l2'\]"),
    "bits": ("lion", {"state_bits": 4}, r"state_bits=4 is outside the choices \[8, 32\]"),
    "implementation": ("lion", {"implementation": "cuda"}, "implementation='cuda' is outside the choices"),
    "cautious": ("lion", {"cautious": 1}, "cautious=1 is outside the choices"),
    "warmup": ("ademamix", {"alpha_warmup": 0}, "alpha_warmup=0 is outside the whole numbers from 1 on"),
    "beta warmup": ("ademamix", {"betas": (0.0, 0.9, 0.99), "beta3_warmup": 5}, r"rises from.*\(0.9, 0.999, 0.9999\)"),
    "unknown": ("lion", {"momentum": 0.9}, r"Lion was given \['momentum'\].*correct or remove"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyperparameters_are_refused_at_construction(name: str) -> None:
    optimizer, options, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        OPTIMIZERS[optimizer].load_class()([torch.nn.Parameter(torch.zeros(1))], **options)


def test_a_bad_group_is_refused_and_not_added() -> None:
    optimizer = Lion([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="Lion, parameter group 1: lr=-1 is outside"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("decay_form", ["decoupled", "l2"])
def test_adamw_nadamw_and_sgd_equal_those_of_torch(decay_form: str) -> None:
    pairs: list[tuple[str, dict[str, Any], type, dict[str, Any]]] = [
        ("adamw", {}, torch.optim.AdamW if decay_form == "decoupled" else torch.optim.Adam, {}),
        ("nadamw", {}, torch.optim.NAdam, {"decoupled_weight_decay": decay_form == "decoupled"}),
    ]
    if decay_form == "l2":  # torch's SGD has no other form
        settings = ({}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True})
        pairs += [("sgd", options, torch.optim.SGD, options) for options in settings]
    for name, options, torch_class, torch_options in pairs:
        parameters, twins = random_parameters(), random_parameters()
        optimizer = build_optimizer(name, parameters, weight_decay=0.1, decay_form=decay_form, **options)
        reference = torch_class(twins, lr=0.05, weight_decay=0.1, **torch_options)
        for step in range(6):
            for each in (parameters, twins):
                set_random_gradients(each, step)
            optimizer.step()
            reference.step()
        for ours, theirs in zip(parameters, twins, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def run_sgd(momentum_form: str, rates: list[float], **options: Any) -> torch.Tensor:
    (parameter,) = random_parameters(((6,),))
    optimizer = SGD([parameter], lr=1.0, momentum=0.9, momentum_form=momentum_form, **options)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        set_random_gradients([parameter], step)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}])
def test_the_two_forms_of_momentum_are_one_under_a_constant_rate_and_differ_under_a_schedule(
    options: dict[str, Any],
) -> None:
    constant, falling = [0.1] * 5, [0.1, 0.08, 0.06, 0.04, 0.02]
    torch.testing.assert_close(run_sgd("torch", constant, **options), run_sgd("velocity", constant, **options))
    difference = run_sgd("torch", falling, **options) - run_sgd("velocity", falling, **options)
    assert difference.abs().max() > 1e-2


def test_no_momentum_keeps_no_buffer() -> None:
    (parameter,) = random_parameters(((5000,),), torch.float32)
    optimizer = SGD([parameter])
    set_random_gradients([parameter], 0)
    optimizer.step()
    assert set(optimizer.state[parameter]) == {"step"}


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
@pytest.mark.parametrize("name", ["adamw", "nadamw", "qhadam", "ademamix", "adan", "adopt", "mars_unclipped"])
def test_8_bit_state_never_makes_a_step_of_any_size(name: str, implementation: str) -> None:
    """Half of each block has gradients a thousand times smaller: rounded to 0, its second moment would divide by 0."""
    scales = torch.where(torch.arange(8192) % 2 == 0, 1.0, 1e-3)
    parameter = torch.nn.Parameter(torch.zeros(8192))
    optimizer = build_optimizer(name, [parameter], lr=1.0, state_bits=8, implementation=implementation)
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for _ in range(60):
        before = parameter.detach().clone()
        parameter.grad = scales * torch.randn(8192, generator=generator)
        optimizer.step()
        largest = max(largest, float((parameter.detach() - before).abs().max()))
    assert largest < 8  # in 32 bits at most 5, AdEMAMix's with its two averages


def test_8_bit_state_follows_that_of_32_bits() -> None:
    for name in CASES:
        if name in ("sgd", "signsgd"):
            continue
        whole, short = random_parameters(((80, 64),), torch.float32), random_parameters(((80, 64),), torch.float32)
        optimizers = build_optimizer(name, whole), build_optimizer(name, short, state_bits=8)
        start = whole[0].detach().clone()
        for step in range(6):
            for each, optimizer in zip((whole, short), optimizers, strict=True):
                set_random_gradients(each, step)
                optimizer.step()
        error = (short[0] - whole[0]).norm() / (whole[0] - start).norm()
        assert 0 < float(error.detach()) < 0.15, name


@pytest.mark.parametrize("implementation", ["auto", "foreach", "single"])
def test_the_count_of_a_cautious_step_is_exact_for_large_tensors(implementation: str) -> None:
    """A float32 sum of ones stands still at 2^24 = 16.8 million."""
    parameter = torch.nn.Parameter(torch.zeros(20_000_000))
    optimizer = build_optimizer("signum", [parameter], lr=1.0, cautious=True, implementation=implementation)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(parameter.detach()[0]) == pytest.approx(-1, rel=1e-6)


def test_state_of_another_method_or_precision_is_refused() -> None:
    def stepped(optimizer_class: Any, **options: Any) -> Any:
        (parameter,) = random_parameters(((80, 64),), torch.float32)
        optimizer = optimizer_class([parameter], lr=0.1, **options)
        set_random_gradients([parameter], 0)
        optimizer.step()
        return optimizer

    adamw = stepped(AdamW)
    for other, message in (
        (stepped(Lion), "that of lion in 32 bits, and this optimizer is adamw in 32 bits"),
        (stepped(AdamW, state_bits=8), "that of adamw in 8 bits"),
        (stepped(torch.optim.RMSprop), "that of an optimizer with state called square_avg, step"),
        (stepped(torch.optim.Adam, amsgrad=True), "state called exp_avg, exp_avg_sq, max_exp_avg_sq, step"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw.load_state_dict(other.state_dict())


def test_adamw_goes_on_with_the_state_of_torchs_and_keeps_its_own_implementation() -> None:
    parameters, twins = random_parameters(), random_parameters()
    theirs = torch.optim.AdamW(twins, lr=0.05, weight_decay=0.1)
    set_random_gradients(twins, 0)
    theirs.step()
    ours = build_optimizer("adamw", parameters, implementation="single")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["implementation"] == "single"
    for parameter, twin in zip(parameters, twins, strict=True):
        parameter.data.copy_(twin)
    for each, optimizer in ((parameters, ours), (twins, theirs)):
        set_random_gradients(each, 1)
        optimizer.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)
    other = build_optimizer("adamw", random_parameters(), implementation="foreach")
    other.load_state_dict(ours.state_dict())
    assert other.param_groups[0]["implementation"] == "foreach"


def test_a_fused_step_that_cannot_be_is_refused_and_not_replaced() -> None:
    (parameter,) = random_parameters(((3,),))
    optimizer = AdamW([{"params": [parameter]}])
    optimizer.param_groups[0]["implementation"] = "fused"
    set_random_gradients([parameter], 0)
    with pytest.raises(RuntimeError, match=r"implementation='fused' cannot step.*float64.*Use implementation='auto'"):
        optimizer.step()


def test_docstrings_name_every_hyperparameter_with_its_default() -> None:
    for spec in OPTIMIZERS.values():
        optimizer_class = spec.load_class()
        if not issubclass(optimizer_class, MomentumOptimizer):
            continue
        documentation = " ".join(inspect.getdoc(optimizer_class).split())
        for name, default in spec.defaults.items():
            assert f"{name} (`" in documentation, (spec.name, name)
            said = documentation.split(f" {name} (`", 1)[1].split("):", 1)[0]
            if default is None:
                assert said.endswith("*optional*")
            else:
                assert ast.literal_eval(said.split("defaults to `", 1)[1].rstrip("`")) == default, (spec.name, name)
