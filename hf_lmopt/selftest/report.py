"""
The report of a selftest: what the machine is, and of each check whether it passed, its figures and its message.

It is written after every check, beside and then renamed, so that whatever ends a process early, a crash of the driver
too, costs the check at which it happened and no other.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..build_extension import LoadedExtension
from ..checkpointing import write_json
from ..cuda_support import code_for_device
from ..publishing.results import run_facts
from .device import describe_device


FORMAT = 1
SEED = 0
PASSED, FAILED, CRASHED, SKIPPED = "passed", "failed", "crashed", "skipped"

Figures = dict[str, Any]
Record = dict[str, Any]


class CheckFailed(Exception):  # noqa: N818 - it says what is the case
    """A result is not what it should be."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class CheckSkipped(Exception):  # noqa: N818 - it says what is the case
    """A check cannot be made here, for the reason in the message."""


@dataclass(frozen=True)
class Check:
    """
    One check.

    Attributes:
        group (`str`): what it belongs to, such as `"attention"`.
        name (`str`): unique in its group.
        run (`Callable`): carries it out and returns figures for the report; raises [`CheckFailed`] or
            [`CheckSkipped`], and anything else counts as a crash.
    """

    group: str
    name: str
    run: Callable[[], Figures]


def carry_out(check: Check) -> Record:
    """Runs a check; whatever it raises is caught and recorded."""
    begin = time.perf_counter()
    status, message, figures = PASSED, None, {}
    try:
        figures = check.run()
    except CheckSkipped as error:
        status, message = SKIPPED, str(error)
    except CheckFailed as error:
        status, message, figures = FAILED, str(error), error.figures
    except Exception:  # the next check may still pass
        status, message = CRASHED, traceback.format_exc(limit=-6)
    return {
        "group": check.group,
        "name": check.name,
        "status": status,
        "seconds": round(time.perf_counter() - begin, 3),
        **({"message": message} if message else {}),
        "figures": figures,
    }


class Report:
    """
    What a selftest has found so far, in memory and in its file.

    Args:
        path (`Path`):
            The JSON file; one that is there is replaced.
        device (`torch.device`):
            What is tested.
        is_quick (`bool`):
            Whether checks are left out.
    """

    def __init__(self, path: Path, device: torch.device, is_quick: bool) -> None:
        self.path = path
        self.records: list[Record] = []
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "is_complete": False,
            "has_passed": False,
            "is_quick": is_quick,
            "ended_early": None,
            "device": describe_device(device),
            "extension": None,
            **run_facts(SEED),
            "checks": self.records,
        }
        self.write()

    @property
    def has_passed(self) -> bool:
        return all(record["status"] in (PASSED, SKIPPED) for record in self.records)

    def add_extension(self, extension: LoadedExtension, device: torch.device) -> None:
        self.content["extension"] = {
            "origin": extension.origin,
            "library": extension.path.name,
            "cpu_capability": extension.cpu_capability,
            "cuda_architectures": list(extension.cuda_architectures),
            "device_runs": code_for_device(device) if device.type == "cuda" else extension.cpu_capability,
        }
        self.write()

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.write()

    def end(self, reason: str | None = None) -> None:
        """The last word; `reason` is why checks are missing, if they are."""
        self.content["is_complete"] = reason is None
        self.content["has_passed"] = reason is None and self.has_passed
        self.content["ended_early"] = reason
        self.content["finished_at"] = run_facts(SEED)["finished_at"]
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content)
