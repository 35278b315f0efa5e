"""What a process did, line by line, in a file that its death does not take back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

BEGUN, TRIED, ACCEPTED, ACKNOWLEDGED, HANDLED = "begun", "tried", "accepted", "acknowledged", "handled"


class Writer:
    """Writes each line with one call of the system: what it returned from stays, whatever kills the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.write(BEGUN)

    def write(self, what: str, *numbers: int) -> None:
        line = " ".join([what, *map(str, numbers), f"{time.monotonic():.4f}"])
        os.write(self._file, line.encode() + b"\n")


class Reader:
    """Reads what has been added since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> Iterator[tuple[str, list[int], float]]:
        """What, its numbers, and when, on the monotonic clock that all processes share."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                what, *numbers, moment = line.decode().split()
                yield what, list(map(int, numbers)), float(moment)


def last_tried(path: Path) -> int:
    """The last number of a journal, -1 if there is none."""
    return max((numbers[0] for what, numbers, _ in Reader(path).lines() if what == TRIED), default=-1)
