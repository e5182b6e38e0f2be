"""What the checks of a simulated launch found, each under the name of its check."""

from __future__ import annotations

from typing import NamedTuple


# Names of the checks, with what each finds.
CHECKS = {
    "memory": "an access outside every buffer, or a write to a read-only one",
    "alignment": "an address that is no multiple of the access's size",
    "initialisation": "a read of bytes or of a register that nothing has written",
    "race": "two threads touch the same bytes, one of them writes, and nothing orders the two",
    "barrier": "a barrier that not all threads reach, or a warp-wide instruction without its whole warp",
    "async_copy": "bytes of an asynchronous copy touched before it is waited for, or a copy never waited for",
}


class Problem(NamedTuple):
    check: str
    message: str


class ProblemList(list[Problem]):
    """Problems in the order in which they were found, the first of each check and instruction alone."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str, int]] = set()

    def add(self, check: str, kernel: str, line: int, message: str) -> None:
        """Adds a problem of the instruction at a line, unless that check has already complained there."""
        if check not in CHECKS:
            raise KeyError(f"{check!r} is no check. There are {list(CHECKS)}.")
        if (check, kernel, line) not in self._seen:
            self._seen.add((check, kernel, line))
            self.append(Problem(check, f"{kernel}: {message}"))
