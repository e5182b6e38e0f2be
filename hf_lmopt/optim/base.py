"""
`MomentumOptimizer`: what the optimizers of this package have in common.

A subclass names its rule (`rules.py`) and turns its hyperparameters and the step count into the rule's coefficients.
Here is the rest: groups and their checks, state in the right precision, weight decay, cautious masking, 8-bit state,
and the choice of what carries a step out:

| implementation | what runs |
|---|---|
| `"fused"` | one pass over parameter, gradient and states in the compiled extension (`fused.py`) |
| `"foreach"` | `torch._foreach_*` over all parameters of a group at once (`torch_step.py`) |
| `"single"` | torch, one parameter at a time; what `torch.compile` sees (`torch_step.py`) |

Left out: sparse and complex parameters, and gradients through the step itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from . import fused, torch_step
from .batch import Batch, Decay, full_precision, traits
from .hyperparameters import (
    DECAY_FORMS,
    FLAG,
    IMPLEMENTATIONS,
    NON_NEGATIVE,
    Allowed,
    Choice,
    DecayForm,
    Implementation,
    check_hyperparameters,
)
from .quantized_state import QuantizedState, check_8bit_available, is_large_enough
from .rules import Number, Rule


# Of all optimizers, beside their own.
COMMON_RANGES: dict[str, Allowed] = {
    "lr": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "decay_form": Choice(DECAY_FORMS),
    "cautious": FLAG,
    "state_bits": Choice((8, 32)),
    "implementation": Choice(IMPLEMENTATIONS),
}


class Modifiers(TypedDict, total=False):
    """The options that every optimizer takes; see [`MomentumOptimizer`]."""

    decay_form: DecayForm
    cautious: bool
    state_bits: int
    implementation: Implementation


MODIFIER_DEFAULTS = Modifiers(decay_form="decoupled", cautious=False, state_bits=32, implementation="auto")


class MomentumOptimizer(torch.optim.Optimizer):
    """
    Base of the optimizers. Not built itself; a subclass sets `RULE` and `RANGES` and has `coefficients`.

    State lies in `self.state[parameter]`: `step` (a float32 tensor without dimensions, on the CPU), and for each state
    of the rule a tensor shaped like the parameter, in float32 for bfloat16 and float16 parameters, or with
    `state_bits=8` uint8 codes and beside them `<name>_absmax`, the float32 maxima of blocks of 256.

    Args:
        params (`Iterable`):
            Parameters, `(name, parameter)` pairs, or group dictionaries; a group may set any option for itself.
        defaults (`dict`):
            The subclass's own hyperparameters.
        decay_form (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"` shrinks parameters by `lr * weight_decay` beside the step (Loshchilov and Hutter 2019),
            `"l2"` adds `weight_decay * p` to the gradient.
        cautious (`bool`, *optional*, defaults to `False`):
            Whether to take only the part of a step whose sign the gradient shares; see [`mask_disagreement_`].
        state_bits (`int`, *optional*, defaults to `32`):
            `8` keeps the states of parameters from 4,096 numbers on in 8 bits; needs bitsandbytes.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"fused"`, `"foreach"` or `"single"`; `"auto"` takes fused where it can run, else foreach.

    Raises:
        ValueError: if a hyperparameter is outside its range; the message names the group.
        TypeError: for complex or integer parameters.
    """

    RULE: ClassVar[Rule]
    RANGES: ClassVar[Mapping[str, Allowed]]
    # Numbers kept per parameter beside the tensors, with their values before the first step.
    INITIAL_SCALARS: ClassVar[Mapping[str, float]] = {"step": 0.0}
    # Whether the first moment's bias is corrected by the first of `betas`.
    CORRECTS_FIRST_MOMENT: ClassVar[bool] = False

    def __init__(self, params: Any, defaults: dict[str, Any], modifiers: Modifiers) -> None:
        if unknown := sorted(set(modifiers) - set(MODIFIER_DEFAULTS)):
            raise TypeError(
                f"{type(self).__name__} was given {unknown}. It takes {[*defaults, *MODIFIER_DEFAULTS]}: correct or "
                "remove them."
            )
        algorithm = type(self).__name__.lower()
        super().__init__(params, {**defaults, **MODIFIER_DEFAULTS, **modifiers, "algorithm": algorithm})

    # ---- What a subclass says ----

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """The rule that a group follows."""
        return self.RULE

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Refuses hyperparameters that are allowed one by one, but not together."""

    def coefficients(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        """The rule's coefficients at this step, in the rule's order; `scalars["step"]` is 1 at the first."""
        raise NotImplementedError

    def momentum_key(self, group: Mapping[str, Any]) -> str:
        """The hyperparameter that holds the group's momentum, `"betas"` for its first entry."""
        return "betas" if "betas" in group else "momentum"

    def advance(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> dict[str, Number]:
        """The scalars of this step, from those of the last."""
        advanced = {"step": scalars["step"] + 1}
        if "beta1_product" in scalars:
            advanced["beta1_product"] = scalars["beta1_product"] * group["betas"][0]
        return advanced

    def first_moment_correction(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> Number:
        """What a first moment is divided by: 1 - beta1^t, under a momentum schedule 1 - the product of its betas."""
        return 1 - scalars.get("beta1_product", group["betas"][0] ** scalars["step"])

    def decay(self, group: Mapping[str, Any], scalars: Mapping[str, Number]) -> Decay:
        """Weight decay at this step."""
        if group["decay_form"] == "l2":
            return Decay(l2=group["weight_decay"])
        return Decay(before=1 - as_number(group["lr"]) * group["weight_decay"])

    # ---- Groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and checks it; see [`torch.optim.Optimizer.add_param_group`]."""
        super().add_param_group(param_group)
        try:
            self._check_newest_group()
        except Exception:
            self.param_groups.pop()
            raise

    def _check_newest_group(self) -> None:
        name, group, index = type(self).__name__, self.param_groups[-1], len(self.param_groups) - 1
        check_hyperparameters(name, {**COMMON_RANGES, **self.RANGES}, group, self._good_values(), index)
        self.check_group(group)
        for parameter in group["params"]:
            _check_parameter(name, parameter)
        if group["state_bits"] == 8:
            check_8bit_available(name, group["params"])
        if group["implementation"] == "fused":
            fused.require()

    def _good_values(self) -> dict[str, Any]:
        """The default of every option, as advice."""
        signature = inspect.signature(type(self)).parameters
        return {**self.defaults, **{name: item.default for name, item in signature.items()}, **MODIFIER_DEFAULTS}

    # ---- The step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Performs one step.

        Args:
            closure (`Callable`, *optional*):
                Computes the loss again and returns it.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for batch in self._batches(group):
                self._step_batch(group, batch)
        return loss

    def _step_batch(self, group: dict[str, Any], batch: Batch) -> None:
        coefficients = self.coefficients(group, batch.scalars)
        decay = self.decay(group, batch.scalars)
        implementation = group["implementation"]
        if torch.compiler.is_compiling():
            implementation = "single"
        elif implementation in ("auto", "fused"):
            reason = fused.why_not(batch.rule, batch.parameters[0], batch.gradients[0].dtype)
            if reason is None:
                fused.step_(batch, coefficients, decay, group["cautious"])
                return
            if implementation == "fused" and batch.rule.is_elementwise:
                raise RuntimeError(
                    f"{type(self).__name__}: implementation='fused' cannot step parameters such as one of shape "
                    f"{tuple(batch.parameters[0].shape)}: {reason}. Use implementation='auto' or 'foreach' for them."
                )
            implementation = "foreach"
        torch_step.step_(batch, coefficients, decay, group["cautious"], one_by_one=implementation == "single")

    def _batches(self, group: dict[str, Any]) -> Iterable[Batch]:
        """The parameters of a group that have a gradient, with their states, sorted into batches."""
        rule, scalar_names = self.rule_of(group), self._scalar_names(group)
        compiling = torch.compiler.is_compiling()
        batches: dict[tuple[Any, ...], Batch] = {}
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = self._prepared_state(parameter, gradient, group, rule, scalar_names)
            states = [QuantizedState.find(state, name, kind) for name, kind in rule.states.items()]
            # Numbers under torch.compile are tensors, which tell nothing apart: there each parameter is a batch.
            last = [len(batches)] if compiling else [state[name].item() for name in scalar_names]
            shape = () if rule.is_elementwise else parameter.shape
            key = (*traits(parameter, gradient), *map(type, states), *last, shape)
            if key not in batches:
                batches[key] = Batch(rule, [], [], [[] for _ in states], self._advanced(group, state, scalar_names))
            batches[key].append(parameter, gradient, states)
            _set_scalars(state, batches[key].scalars)
        return batches.values()

    def _scalar_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        is_scheduled = self.CORRECTS_FIRST_MOMENT and "betas" in group.get("initial_momentum", {})
        return (*self.INITIAL_SCALARS, "beta1_product") if is_scheduled else tuple(self.INITIAL_SCALARS)

    def _prepared_state(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Mapping[str, Any],
        rule: Rule,
        scalar_names: Iterable[str],
    ) -> dict[str, Any]:
        """The state of a parameter, made at its first step."""
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} was given a sparse gradient of shape {tuple(parameter.shape)}; it takes dense "
                "ones only. Build the embedding with sparse=False."
            )
        state = self.state[parameter]
        for name in scalar_names:
            if name not in state:  # float32: torch.compile loses changes of a float64 one
                state[name] = torch.tensor(self._initial_scalar(name, group, state))
        for name, kind in rule.states.items():
            if name not in state:
                zeros = torch.zeros_like(
                    parameter, dtype=full_precision(parameter), memory_format=torch.preserve_format
                )
                in_8_bits = group["state_bits"] == 8 and kind != "exact" and is_large_enough(parameter)
                state.update(QuantizedState.of(zeros, kind).tensors(name) if in_8_bits else {name: zeros})
        return state

    def _initial_scalar(self, name: str, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        if name == "beta1_product":  # of the steps before the schedule
            return group["initial_momentum"]["betas"][0] ** float(state["step"])
        return self.INITIAL_SCALARS[name]

    def _advanced(self, group: Mapping[str, Any], state: dict[str, Any], names: Iterable[str]) -> dict[str, Number]:
        """The scalars of this step. In float64, since 1 - beta2 ** step loses half its digits in float32."""
        compiling = torch.compiler.is_compiling()
        last = {name: state[name].double() if compiling else state[name].item() for name in names}
        return self.advance(group, last)

    # ---- State dicts ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Loads what `state_dict()` returned; see [`torch.optim.Optimizer.load_state_dict`].

        torch would cast all state to the type of its parameter; here float32 state of bfloat16 parameters and 8-bit
        codes keep theirs. A momentum that a schedule had moved is back at its own value, for the schedule to move on;
        `implementation` stays as it is here.

        Raises:
            ValueError: if the state is of another method or precision.
        """
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            _check_same_method(saved, group, state_dict["state"])
        implementations = [group["implementation"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        for group, implementation in zip(self.param_groups, implementations, strict=True):
            own_momentum = group.pop("initial_momentum", {})
            group.update({**self.defaults, **group, **own_momentum, "implementation": implementation})
        ids = (index for group in state_dict["param_groups"] for index in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                on_cpu = name in (*self.INITIAL_SCALARS, "beta1_product")
                self.state[parameter][name] = value.clone() if on_cpu else value.to(parameter.device, copy=True)


def _set_scalars(state: Mapping[str, Tensor], scalars: Mapping[str, Number]) -> None:
    for name, value in scalars.items():
        if isinstance(value, Tensor):
            state[name].copy_(value)
        else:
            state[name].fill_(value)


def _check_same_method(saved: Mapping[str, Any], group: Mapping[str, Any], states: Mapping[int, Any]) -> None:
    before, now = method_of(saved, states), method_of(group, {})
    if before is not None and before != now:
        raise ValueError(
            f"The state is that of {before}, and this optimizer is {now}. State cannot be carried over: load it into "
            "the optimizer that it is from, or start anew."
        )


def method_of(group: Mapping[str, Any], states: Mapping[int, Any]) -> str | None:
    """
    The method that a group of a state dict belongs to, and the precision of its state.

    Args:
        group (`Mapping`):
            A parameter group. One of this package says its `algorithm`; another's is known by the state it has.
        states (`Mapping`):
            The state dict's `state`.

    Returns:
        `str`: such as `"adamw in 32 bits"`; `None` for a group of another package that has no state.
    """
    if "algorithm" in group:
        return f"{group['algorithm']} in {group['state_bits']} bits"
    names = {name for index in group["params"] for name in states.get(index, {})}
    if "train_mode" in group:
        return "a schedule-free optimizer"
    if names == {"step", "exp_avg", "exp_avg_sq"} and all("alpha" not in key for key in group):
        return "adamw in 32 bits"  # torch's, whose state has the meaning of ours
    return f"an optimizer with state called {', '.join(sorted(names))}" if names else None


def as_number(value: float | Tensor) -> Number:
    """A hyperparameter as a float; a tensor stays one under `torch.compile`, so that a new value needs no new code."""
    return value if torch.compiler.is_compiling() else float(value)


def _check_parameter(optimizer_name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        raise TypeError(
            f"{optimizer_name} was given a parameter of type {parameter.dtype}. It steps real floating point numbers: "
            "split complex parameters by torch.view_as_real, and leave quantized weights frozen."
        )
