"""What a selftest prints: the machine, what went wrong as it happens, a row per timing, and counts at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .contenders import OURS
from .report import FAILED, PASSED, SKIPPED, Record
from .speed_checks import GROUP as SPEED


MAX_LINES_OF_MESSAGE = 12


def describe_machine(content: dict[str, Any]) -> str:
    """The first lines, from the content of a report."""
    device, extension = content["device"], content["extension"]
    name = device.get("name", content["machine"]["cpu"])
    capability = f" (sm_{device['capability']})" if "capability" in device else ""
    return (
        f"{name}{capability}, torch {content['versions']['torch']}\n"
        f"extension {extension['origin']}, runs {extension['device_runs']}"
    )


def describe_record(record: Record) -> str | None:
    """What is worth a line of a check at once; `None` for one that passed and has no timing."""
    if record["group"] == SPEED and record["status"] == PASSED:
        return _describe_row(record)
    if record["status"] == PASSED:
        return None
    text = record["message"].strip()
    if record["status"] not in (FAILED, SKIPPED):  # a traceback, whose end says most
        text = "\n".join(text.splitlines()[-MAX_LINES_OF_MESSAGE:])
    return f"{record['status']}: {record['group']} {record['name']}: {text}"


def describe_result(content: dict[str, Any], path: str) -> str:
    """The last lines."""
    lines = [_count(group, content["checks"]) for group in dict.fromkeys(each["group"] for each in content["checks"])]
    if content["ended_early"]:
        lines.append(f"ended early, {content['ended_early']}")
    verdict = "passed" if content["has_passed"] else "FAILED"
    return "\n".join([*lines, f"selftest {verdict}; the report to send back is {path}"])


def _describe_row(record: Record) -> str:
    figures = record["figures"]
    milliseconds = figures["milliseconds"]
    others = ", ".join(
        f"{name} {value / milliseconds[OURS]:.2f}" for name, value in milliseconds.items() if name != OURS
    )
    return (
        f"{record['name']}: {milliseconds[OURS]:.3f} ms, {figures['tflops']:.2f} TFLOP/s, "
        f"{figures['share_of_roofline']:.0%} of the roofline; times as long: {others or 'none runs'}"
    )


def _count(group: str, records: Iterable[Record]) -> str:
    of_group = [record for record in records if record["group"] == group]
    counts = {status: [record["status"] for record in of_group].count(status) for status in _statuses(of_group)}
    worst = [ratio for record in of_group if (ratio := _largest_ratio(record["figures"])) is not None]
    error = f"; largest error {max(worst):.2f} of what is allowed" if worst else ""
    return f"{group:12} {', '.join(f'{number} {status}' for status, number in counts.items())}{error}"


def _statuses(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["status"] for record in records))


def _largest_ratio(figures: dict[str, Any]) -> float | None:
    """Of errors to what is allowed, over the results of a check."""
    ratios = [
        each["error"] / each["allowed"]
        for each in figures.values()
        if isinstance(each, dict) and each.get("allowed", 0) > 0
    ]
    return max(ratios, default=None)
