"""Carries out the checks of a selftest one after the other, writes what they find, and says it in short."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from ..build_extension import ExtensionUnavailable, LoadedExtension, load_extension, plan_library
from . import attention_checks, model_check, optimizer_checks, sanitizer, speed_checks
from .device import SelfTestUnavailable, require_device
from .report import CRASHED, FAILED, Check, Report, carry_out
from .summary import describe_machine, describe_record, describe_result


DEFAULT_OUTPUT = "selftest.json"


def run_selftest(
    device_type: str = "cuda", output: str | os.PathLike[str] = DEFAULT_OUTPUT, is_quick: bool = False
) -> bool:
    """
    Tests the compiled extension on a device of this machine.

    Args:
        device_type (`str`, *optional*, defaults to `"cuda"`):
            `"cuda"`, the current card, or `"cpu"`.
        output (`str` or `os.PathLike`, *optional*, defaults to `"selftest.json"`):
            The report, written after every check; one that is there is replaced.
        is_quick (`bool`, *optional*, defaults to `False`):
            Whether to take few cases, time nothing and leave compute-sanitizer out.

    Returns:
        `bool`: whether every check passed or had a reason to be skipped.

    Raises:
        SelfTestUnavailable: if the device is not there or no kernels can be had for it.
    """
    device = require_device(device_type)
    report = Report(Path(output), device, is_quick)
    report.add_extension(_require_extension(report), device)
    print(describe_machine(report.content), flush=True)
    report.end(_carry_out_all(_build_checks(device, is_quick), report, device))
    print(describe_result(report.content, str(output)), flush=True)
    return report.content["has_passed"]


def _require_extension(report: Report) -> LoadedExtension:
    """Builds it if it must; why it cannot be had is in the report, too."""
    try:
        if plan_library().origin is None:
            print("Building the extension, which takes minutes.", flush=True)
        return load_extension()
    except (ExtensionUnavailable, RuntimeError) as error:
        report.end(str(error))
        raise SelfTestUnavailable(str(error)) from error


def _build_checks(device: torch.device, is_quick: bool) -> Iterator[Check]:
    parts = (attention_checks, model_check, optimizer_checks, speed_checks, sanitizer)
    return chain.from_iterable(part.build_checks(device, is_quick) for part in parts)


def _carry_out_all(checks: Iterator[Check], report: Report, device: torch.device) -> str | None:
    """Why checks are missing at the end; `None` if none are."""
    for check in checks:
        record = carry_out(check)
        report.add(record)
        if text := describe_record(record):
            print(text, flush=True)
        if record["status"] in (CRASHED, FAILED) and (reason := _why_device_is_lost(device)):
            return f"after {check.group} {check.name}: {reason}"
    return None


def _why_device_is_lost(device: torch.device) -> str | None:
    """A fault on a CUDA device makes every later call of the process fail."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:  # whatever is left of the device
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None
