"""
What a Trainer holds, so that a trial run can be undone in place.

Kept are the values of trained parameters, buffers and gradients, the optimizer's state, the scaler, the random
generators of Python, numpy and torch, and the attributes of the Trainer, of its modules and of the objects that it
refers to: arguments, state, control, accelerator, scheduler, collator. Every object stays the one that it was; what is
in it is put back.

Left out: frozen parameters, which no step changes; the items of data sets; callbacks, which a trial run goes without.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


# Objects of these, and of this package, are looked into wherever they are found; others only at the Trainer itself.
TRANSPARENT = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
DATASET_NAMES = ("train_dataset", "eval_dataset")


@contextmanager
def trainer_kept(trainer: Any) -> Iterator[None]:
    """
    After the block, also after an error in it, the Trainer is what it was, to the bit.

    Takes host memory for trained parameters, buffers and, where there is one already, the optimizer's state. An object
    of one's own that the Trainer reaches only through another one's attributes is not looked into.

    Args:
        trainer (`~transformers.Trainer`):
            A Trainer that is not in the middle of a step.
    """
    snapshot = Snapshot()
    snapshot.keep_random_state(trainer.args.device)
    snapshot.keep_trainer(trainer)
    try:
        yield
    finally:
        snapshot.restore()


class Snapshot:
    """What to put back, each thing noted once."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._noted: dict[int, Any] = {}  # refers to them, so that no id is given away

    def restore(self) -> None:
        """Puts everything back, containers before what was in them."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def keep_trainer(self, trainer: Any) -> None:
        """Notes a Trainer, its model, and the objects that it refers to."""
        for rebound in (trainer, trainer.callback_handler):
            self._keep_container(vars(rebound))
        for dataset in (getattr(trainer, name, None) for name in DATASET_NAMES):
            self._keep_dataset(dataset)
        for value in vars(trainer).values():
            self.keep(value)
            self._keep_attributes(value)
        self._keep_attributes(trainer.accelerator.gradient_state)
        self._keep_model(trainer.model)

    def keep_random_state(self, device: torch.device) -> None:
        """Notes the global generators: of Python, of numpy, and of torch on the host and on the device."""
        python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._undo += [
            lambda: random.setstate(python),
            lambda: np.random.set_state(numpy),
            lambda: torch.set_rng_state(host),
        ]
        if device.type != "cpu":
            module = torch.get_device_module(device)
            suffix = "_all" if hasattr(module, "get_rng_state_all") else ""
            on_device = getattr(module, f"get_rng_state{suffix}")()
            self._undo.append(lambda: getattr(module, f"set_rng_state{suffix}")(on_device))

    def keep(self, value: Any) -> None:
        """Notes what a container holds, a tensor, a generator, or an object whose attributes count."""
        if isinstance(value, (dict, list, set, deque)):
            if self._keep_container(value):
                for item in value.values() if isinstance(value, dict) else value:
                    self.keep(item)
        elif isinstance(value, tuple):
            for item in value:
                self.keep(item)
        elif isinstance(value, torch.Tensor):
            self._keep_tensor(value)
        elif isinstance(value, TRANSPARENT) or type(value).__module__.startswith("hf_lmopt."):
            self._keep_attributes(value)
        else:
            self._keep_generator(value)

    # ---- Kinds of values ----

    def _is_new(self, value: Any) -> bool:
        is_new = id(value) not in self._noted
        self._noted[id(value)] = value
        return is_new

    def _keep_container(self, container: Any) -> bool:
        """Notes which items it has, not what is in them; false if it was noted before."""
        if not self._is_new(container):
            return False
        items = container.copy()

        def put_back() -> None:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(items)

        self._undo.append(put_back)
        return True

    def _keep_attributes(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, (types.ModuleType, nn.Module)):
            self.keep(attributes)

    def _keep_dataset(self, dataset: Any) -> None:
        """Its attributes and generators; the items may be many."""
        attributes = getattr(dataset, "__dict__", {})
        self._keep_container(attributes)
        self._is_new(dataset)
        for value in attributes.values():
            self._keep_generator(value)

    def _keep_model(self, model: nn.Module) -> None:
        for module in model.modules():
            self.keep(vars(module))
        for name in ("config", "generation_config"):
            self._keep_attributes(getattr(model, name, None))

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        if not self._is_new(tensor):
            return
        if isinstance(tensor, nn.Parameter):
            if not tensor.requires_grad:
                return
            self._keep_parameter(tensor)
        memory = _without_repeats(tensor.detach())
        values = memory.to("cpu", copy=True)
        self._undo.append(lambda: memory.copy_(values))

    def _keep_parameter(self, parameter: nn.Parameter) -> None:
        """Its memory, which a Trainer may move, and its gradient."""
        memory, gradient, dtype = parameter.detach(), parameter.grad, parameter.grad_dtype
        if gradient is not None:
            self._keep_tensor(gradient)

        def put_back() -> None:
            parameter.data = memory
            parameter.requires_grad_(True)
            parameter.grad = None
            parameter.grad_dtype = dtype
            parameter.grad = gradient

        self._undo.append(put_back)

    def _keep_generator(self, value: Any) -> None:
        """Notes the state of a generator of random numbers; anything else is left alone."""
        for kind, get, put_back in GENERATORS:
            if isinstance(value, kind) and self._is_new(value):
                state = get(value)
                self._undo.append(lambda put_back=put_back, state=state: put_back(value, state))  # type: ignore[misc]


GENERATORS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]], ...] = (
    (random.Random, random.Random.getstate, random.Random.setstate),
    (torch.Generator, lambda generator: generator.get_state(), lambda generator, state: generator.set_state(state)),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    (
        np.random.Generator,
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
)


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """Each element once, of a tensor that was expanded: what lies twice at one place cannot be written."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
