"""
`LMOptArguments`: the training arguments of this plugin, beside those of transformers.

The fields and their checks, nothing else. Every field is a command-line flag through `HfArgumentParser` and a key in
its YAML and JSON files. A combination that cannot work raises here, before a model is loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from .accumulation import LOSS_REDUCTIONS
from .clipping import CLIP_STRATEGIES, check_clip_options
from .optim.hyperparameters import DECAY_FORMS
from .optim.registry import choose_optimizer, find_optimizer
from .param_groups import check_param_group_options


NONFINITE_POLICIES = ("skip_step", "raise", "drop_micro_batch")
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
# Options that shape the parameter groups, by the names build_param_groups gives them.
PARAM_GROUP_FIELDS = (
    "layer_lr_decay",
    "head_lr_multiplier",
    "lr_multipliers",
    "lora_plus_ratio",
    "decay_embeddings",
)


@dataclass
class LMOptArgumentsMixin:
    """
    The fields alone, to be put in front of another arguments class, with `@dataclass` on the result:

    ```python
    @dataclass
    class MyArguments(LMOptArgumentsMixin, SFTConfig): ...
    ```

    Args:
        optimizer (`str`, *optional*):
            Name of an optimizer of this package; `hf-lmopt optimizers` lists them. `None` leaves transformers' `optim`
            in charge.
        optimizer_kwargs (`dict` or `str`, *optional*):
            Further arguments of `optimizer`. On the command line JSON or `key=value,key=value`.
        decay_form (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"` shrinks the weights beside the step, `"l2"` adds the penalty to the gradient. The second
            needs `optimizer`.
        layer_lr_decay (`float`, *optional*, defaults to `1.0`):
            Factor in (0, 1] on the learning rate per layer towards the input: head and final norm x1, last block x d,
            ..., embeddings deepest. A weight tied to the embedding takes the embedding's rate.
        head_lr_multiplier (`float`, *optional*, defaults to `1.0`):
            Factor on the learning rate of the head: what lies outside the pretrained body.
        lr_multipliers (`dict` or `str`, *optional*):
            Ordered `{pattern: factor}`; the first pattern that `re.search` finds in a parameter's name wins. A
            pattern that wins nowhere raises.
        lora_plus_ratio (`float`, *optional*, defaults to `1.0`):
            Factor on the learning rate of LoRA's B matrices (LoRA+, Hayou et al. 2024,
            https://arxiv.org/abs/2402.12354).
        decay_embeddings (`bool`, *optional*, defaults to `True`):
            Whether embeddings have weight decay. Norms, biases and other vectors never do.
        clip_strategy (`str`, *optional*, defaults to `"global_norm"`):
            How the gradient of an optimizer step is clipped: `"global_norm"`, `"per_layer"`, `"per_group"` and
            `"value"`, whose threshold is `max_grad_norm` (0 with the first only measures); `"adaptive"`, `"quantile"`
            and `"zscore"`, which find their own; or `"none"`.
        clip_kwargs (`dict` or `str`, *optional*):
            Further options of the strategy, such as `norm_type` for `"global_norm"`.
        micro_batch_clip_norm (`float`, *optional*):
            Threshold for the norm of each micro-batch's own gradient, that of its own mean loss, before it is added
            to the window's. Takes one more buffer of the gradients' size.
        accumulation_dtype (`str`, *optional*):
            `"float32"` keeps the gradients of bfloat16 and float16 parameters in float32 while they are added up.
            Optimizers of this package take them as they are; for others they are rounded once, before the clip.
        nonfinite_gradients (`str`, *optional*, defaults to `"skip_step"`):
            What to do with a gradient that has an inf or a NaN: `"skip_step"` with a warning; `"raise"`; or
            `"drop_micro_batch"`, which leaves out the micro-batch that it comes from and takes the window's mean over
            the rest (one more buffer of the gradients' size). A skipped step advances `global_step` but not the
            scheduler. An overflow under fp16 scaling never raises.
        loss_reduction (`str`, *optional*):
            What the mean loss of an accumulation window is over: `"examples"`, `"tokens"` (labels other than -100) or
            `"shifted_tokens"` (without each row's first label). By default the kind of labels decides, and the model
            is asked once whether it shifts them.

    Raises:
        ValueError: for a value or a combination that cannot work; the message says what to do.
    """

    optimizer: str | None = field(
        default=None, metadata={"help": "Optimizer of this package by name; None leaves `optim` in charge."}
    )
    optimizer_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `optimizer`: JSON, or key=value,key=value."}
    )
    decay_form: Literal["decoupled", "l2"] = field(
        default="decoupled", metadata={"help": "Weight decay beside the step, or as an L2 penalty in the gradient."}
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={"help": "Learning-rate factor in (0, 1] per layer towards the input; 1 gives all layers one rate."},
    )
    head_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning-rate factor of the head, on top of everything else."}
    )
    lr_multipliers: dict | str | None = field(
        default=None,
        metadata={"help": "Ordered name patterns and their learning-rate factors, as JSON: '{\"regex\": factor}'."},
    )
    lora_plus_ratio: float = field(
        default=1.0, metadata={"help": "Learning-rate factor of LoRA's B matrices (LoRA+); 16 is the paper's advice."}
    )
    decay_embeddings: bool = field(default=True, metadata={"help": "Whether embeddings have weight decay."})
    clip_strategy: str = field(
        default="global_norm",
        metadata={"help": f"How gradients are clipped: {', '.join(CLIP_STRATEGIES)}. Threshold: max_grad_norm."},
    )
    clip_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further options of the clipping strategy: JSON, or key=value,key=value."}
    )
    micro_batch_clip_norm: float | None = field(
        default=None, metadata={"help": "Clip each micro-batch's own gradient to this norm before it is added."}
    )
    accumulation_dtype: Literal["float32"] | None = field(
        default=None, metadata={"help": "'float32' adds up the gradients of 16-bit parameters in float32."}
    )
    nonfinite_gradients: Literal["skip_step", "raise", "drop_micro_batch"] = field(
        default="skip_step", metadata={"help": "What to do when a gradient holds an inf or a NaN."}
    )
    loss_reduction: Literal["examples", "tokens", "shifted_tokens"] | None = field(
        default=None,
        metadata={"help": "What the mean loss of an accumulation window is over; None asks the labels and the model."},
    )

    def __post_init__(self) -> None:
        for name in ("optimizer_kwargs", "lr_multipliers", "clip_kwargs"):
            setattr(self, name, parse_mapping(name, getattr(self, name)))
        for name in ("layer_lr_decay", "head_lr_multiplier", "lora_plus_ratio"):
            setattr(self, name, float(getattr(self, name)))
        _check_choice("decay_form", self.decay_form, DECAY_FORMS)
        _check_choice("nonfinite_gradients", self.nonfinite_gradients, NONFINITE_POLICIES)
        if self.loss_reduction is not None:
            _check_choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        if self.accumulation_dtype is not None:
            _check_choice("accumulation_dtype", self.accumulation_dtype, ("float32",))
        if self.micro_batch_clip_norm is not None and not self.micro_batch_clip_norm > 0:
            raise ValueError(
                f"micro_batch_clip_norm={self.micro_batch_clip_norm} is no threshold. It must be above 0: set it to "
                "1.0, or leave it out."
            )
        super().__post_init__()  # type: ignore[misc]
        _check_optimizer(self)
        _check_trainer_arguments(self)
        check_param_group_options(**self.param_group_options())

    def param_group_options(self) -> dict[str, Any]:
        """The options of [`build_param_groups`], without `lr` and `weight_decay`."""
        return {name: getattr(self, name) for name in PARAM_GROUP_FIELDS}

    def adam_kwargs(self) -> dict[str, Any]:
        """`betas` and `eps` as transformers' arguments have them, for the optimizers that read them."""
        adam: Any = self  # fields of TrainingArguments
        return {"betas": (adam.adam_beta1, adam.adam_beta2), "eps": adam.adam_epsilon}

    def changed_param_group_options(self) -> list[str]:
        """Names of the options that would change the parameter groups of a stock Trainer."""
        defaults = {item.name: item.default for item in fields(LMOptArgumentsMixin)}
        return [name for name in PARAM_GROUP_FIELDS if getattr(self, name) not in (defaults[name], {})]


@dataclass
class LMOptArguments(LMOptArgumentsMixin, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the fields of [`LMOptArgumentsMixin`]."""


def _check_optimizer(args: Any) -> None:
    """One optimizer, and no option without the optimizer that would read it."""
    if args.optimizer is not None:
        choose_optimizer(args.optimizer, args.optimizer_kwargs, args.decay_form, args.adam_kwargs())
        _check_unread_options(args)
        if args.optim != type(args).__dataclass_fields__["optim"].default:
            raise ValueError(
                f"optimizer={args.optimizer!r} and optim={str(args.optim)!r} both name an optimizer. Only one can "
                "step: leave one of them out."
            )
        is_constant = args.lr_scheduler_type.value in CONSTANT_SCHEDULES
        if find_optimizer(args.optimizer).has_averaged_weights and not is_constant:
            raise ValueError(
                f"optimizer={args.optimizer!r} with lr_scheduler_type={args.lr_scheduler_type.value!r}: its averaging "
                f"takes the place of a schedule, and a rate that falls would weight the average wrongly. Set "
                f"lr_scheduler_type to one of {list(CONSTANT_SCHEDULES)}."
            )
    elif args.optimizer_kwargs:
        raise ValueError(
            f"optimizer_kwargs={args.optimizer_kwargs} was given without an optimizer. It belongs to one of this "
            "package: set optimizer, or use optim_args for transformers' own."
        )
    elif args.decay_form != "decoupled":
        raise ValueError(
            f"decay_form={args.decay_form!r} was given without an optimizer, and transformers' optim decides its own "
            "form of decay. Set optimizer='adamw' or 'sgd'."
        )


def _check_unread_options(args: Any) -> None:
    """Options of transformers' optimizers that the chosen one would not read."""
    names = ["optim_args"]
    if not find_optimizer(args.optimizer).reads_adam_arguments:
        names += ["adam_beta1", "adam_beta2", "adam_epsilon"]
    for name in names:
        value = getattr(args, name)
        if value != type(args).__dataclass_fields__[name].default:
            raise ValueError(
                f"{name}={value!r} was given, and optimizer={args.optimizer!r} does not read it. Its options go into "
                "optimizer_kwargs: put it there by its own name, or leave it out."
            )


def _check_trainer_arguments(args: Any) -> None:
    """Arguments of transformers that contradict what this package promises."""
    if not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False asks for a mean per process, but the gradient here is that of the "
            "mean over all processes. Leave it at True, or use the stock Trainer."
        )
    if args.max_grad_norm is None or not args.max_grad_norm >= 0:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} is no threshold. It must be 0 (measure only) or more: set it to 1.0, "
            "or to 0."
        )
    default = type(args).__dataclass_fields__["max_grad_norm"].default
    check_clip_options(args.clip_strategy, args.clip_kwargs, args.max_grad_norm, default)
    if args.deepspeed is not None:
        raise ValueError(
            "deepspeed was given, but DeepSpeed scales and clips gradients inside its engine, out of reach of this "
            "package. Use DDP or FSDP2, or the stock Trainer."
        )


def parse_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    Reads a mapping as the command line gives it: JSON, or `key=value,key=value` with JSON values.

    Raises:
        ValueError: if the text is neither.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: _parse_value(item) if isinstance(item, str) else item for key, item in value.items()}
    try:
        if value.lstrip().startswith("{"):
            return json.loads(value)
        pairs = (item.rpartition("=") for item in re.split(r",(?![^\[]*\])", value))  # not at the commas of a list
        return {key.strip(): _parse_value(text.strip()) for key, equals, text in pairs if _is_pair(key, equals)}
    except ValueError as error:
        raise ValueError(
            f"{name}={value!r} cannot be read ({error}). It takes a dictionary: JSON such as '{{\"key\": 0.5}}', or "
            "key=0.5,other=true."
        ) from None


def _is_pair(key: str, equals: str) -> bool:
    if not (equals and key.strip()):
        raise ValueError("a part has no key=value form")
    return True


def _parse_value(text: str) -> Any:
    """A JSON value, or the text itself; YAML leaves numbers such as 1e-6 as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known. It must be one of {list(allowed)}: choose one of them.")
