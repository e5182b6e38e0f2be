import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_lmopt import LMOptArguments, LMOptArgumentsMixin


# Each field with a value other than its default, as the command line writes it and as Python holds it.
VALUES: dict[str, tuple[str, Any]] = {
    "optimizer": ("adamw", "adamw"),
    "optimizer_kwargs": ("betas=[0.9,0.95],cautious=true", {"betas": [0.9, 0.95], "cautious": True}),
    "decay_form": ("l2", "l2"),
    "layer_lr_decay": ("0.9", 0.9),
    "head_lr_multiplier": ("25e-1", 2.5),
    "lr_multipliers": ('{"layer\\\\.[01]\\\\.": 0.1, "bias": 2}', {"layer\\.[01]\\.": 0.1, "bias": 2}),
    "lora_plus_ratio": ("16", 16.0),
    "decay_embeddings": ("False", False),
    "clip_strategy": ("global_norm", "global_norm"),
    "clip_kwargs": ("norm_type=1.0", {"norm_type": 1.0}),
    "nonfinite_gradients": ("raise", "raise"),
    "micro_batch_clip_norm": ("0.5", 0.5),
    "accumulation_dtype": ("float32", "float32"),
    "loss_reduction": ("examples", "examples"),
}


@dataclass
class Seq2SeqArguments(LMOptArgumentsMixin, Seq2SeqTrainingArguments):
    """As a user combines the mixin with arguments of another Trainer."""


def check(args: Any) -> None:
    assert {name: getattr(args, name) for name in VALUES} == {name: value for name, (_, value) in VALUES.items()}


def test_every_field_has_a_help_text_and_a_value_in_these_tests() -> None:
    for field in fields(LMOptArgumentsMixin):
        assert field.metadata["help"]
        assert field.name in VALUES
        assert f"{field.name} (`" in LMOptArgumentsMixin.__doc__


@pytest.mark.parametrize("arguments_class", [LMOptArguments, Seq2SeqArguments])
def test_every_field_parses_from_the_command_line_yaml_and_json(arguments_class: type, tmp_path: Path) -> None:
    parser = HfArgumentParser(arguments_class)
    flags = [part for name, (text, _) in VALUES.items() for part in (f"--{name}", text)]
    (from_flags,) = parser.parse_args_into_dataclasses(["--output_dir", "out", *flags], look_for_args_file=False)
    check(from_flags)
    values = {"output_dir": "out"} | {name: value for name, (_, value) in VALUES.items()}
    path = tmp_path / "args.json"
    path.write_text(json.dumps(values))
    check(parser.parse_json_file(path)[0])
    path.write_text(json.dumps(values | {"head_lr_multiplier": "25e-1"}))
    check(parser.parse_yaml_file(path)[0])  # JSON is YAML, in which 1e-06 is text
    again = arguments_class(**{name: from_flags.to_dict()[name] for name in VALUES}, output_dir="out")
    check(again)


def test_sft_config_takes_the_mixin() -> None:
    trl = pytest.importorskip("trl")

    @dataclass
    class Arguments(LMOptArgumentsMixin, trl.SFTConfig):
        pass

    assert Arguments(output_dir="out", layer_lr_decay=0.9, bf16=False).layer_lr_decay == 0.9


def test_output_dir_stays_the_first_positional_argument_and_defaults_are_stock() -> None:
    args, stock = LMOptArguments("out"), TrainingArguments("out")
    assert args.output_dir == "out"
    assert args.changed_param_group_options() == []
    for field in fields(TrainingArguments):
        if field.init and field.name != "logging_dir":
            assert getattr(args, field.name) == getattr(stock, field.name), field.name


# What was given; what the message must say: the value, what is allowed, what to do.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layer_lr_decay": ({"layer_lr_decay": 1.3}, r"layer_lr_decay=1.3 is outside \(0, 1\].*Use a value such as 0.9"),
    "layer_lr_decay_zero": ({"layer_lr_decay": 0.0}, r"layer_lr_decay=0.0 is outside \(0, 1\]"),
    "head": ({"head_lr_multiplier": 0.0}, "head_lr_multiplier=0.0 is not allowed.*above 0"),
    "pattern": ({"lr_multipliers": {"(": 1.0}}, "no regular expression.*Escape"),
    "mapping": ({"lr_multipliers": "layer"}, "lr_multipliers='layer' cannot be read.*It takes a dictionary"),
    "json": ({"clip_kwargs": '{"norm_type": '}, "clip_kwargs=.*cannot be read"),
    "strategy": ({"clip_strategy": "norm"}, r"clip_strategy='norm' is not known.*\['global_norm', .*'none'\].*choose"),
    "clip_kwargs": ({"clip_kwargs": {"percentile": 10}}, r"clip_kwargs has \['percentile'\].*takes \['norm_type'\]"),
    "policy": ({"nonfinite_gradients": "ignore"}, "nonfinite_gradients='ignore' is not known.*'skip_step', 'raise'"),
    "reduction": ({"loss_reduction": "sum"}, "loss_reduction='sum' is not known.*'examples', 'tokens'"),
    "form": ({"decay_form": "L2"}, "decay_form='L2' is not known"),
    "two optimizers": ({"optimizer": "adamw", "optim": "adafactor"}, "both name an optimizer.*leave one"),
    "optimizer": ({"optimizer": "adanw"}, "optimizer='adanw' is unknown.*Did you mean .*adamw"),
    "unknown optimizer": ({"optimizer": "zzz"}, "optimizer='zzz' is unknown. There are adamw, adan,.*Use one of"),
    "kwargs alone": ({"optimizer_kwargs": {"eps": 1}}, "without an optimizer.*set optimizer"),
    "kwargs": ({"optimizer": "adamw", "optimizer_kwargs": {"momentum": 1}}, r"has \['momentum'\].*takes.*Correct"),
    "lr in kwargs": ({"optimizer": "adamw", "optimizer_kwargs": {"lr": 1}}, r"has \['lr'\].*belong to the Trainer"),
    "form alone": ({"decay_form": "l2"}, "decay_form='l2' was given without an optimizer"),
    "no such form": (
        {"optimizer": "schedule_free_sgd", "decay_form": "l2", "lr_scheduler_type": "constant"},
        "decay_form='l2' does not exist.*Set decay_form='decoupled'",
    ),
    "value": ({"optimizer": "lion", "optimizer_kwargs": "betas=[0.9,1]"}, r"betas\[1\]=1 is outside \[0, 1\)"),
    "unread": (
        {"optimizer": "lion", "adam_beta2": 0.5},
        "adam_beta2=0.5 was given, and optimizer='lion' does not read",
    ),
    "optim_args": ({"optimizer": "adamw", "optim_args": "foo=1"}, "optim_args='foo=1' was given.*optimizer_kwargs"),
    "adam": ({"optimizer": "adamw", "adam_beta1": 1.5}, r"betas\[0\]=1.5 is outside"),
    "schedule": ({"optimizer": "schedule_free_adamw"}, "lr_scheduler_type='linear'.*Set lr_scheduler_type to one of"),
    "average": ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False.*Leave it at True"),
    "threshold": ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is no threshold.*0 .measure only. or more"),
    "nan threshold": ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed|deepspeed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises_at_construction(name: str) -> None:
    given, message = BAD[name]
    with pytest.raises((ValueError, ImportError), match=message):
        LMOptArguments("out", **given)
