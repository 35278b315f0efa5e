"""A Python program in a process of its own: to kill, to signal, to fork, to run out of descriptors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.wait import eventually

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PRELUDE = """
import sys, time


def say(*words):
    # In one piece: several threads may speak at once.
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()


"""


class Program:
    """Runs *source*; it has ``sys``, ``time`` and ``say``, and imports what this process can import.

    Args:
        source: May be indented as a whole.
        arguments: ``sys.argv[1:]`` of the program.
    """

    def __init__(self, source: str, *arguments: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="tars-mqtt-program-")
        path = Path(self._directory.name) / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(source))
        self._said: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(path), *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name="program-output", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.kill()
        self._process.wait(10)
        self._reader.join(10)
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._process.stdout.close()
        self._process.stdin.close()
        self._directory.cleanup()
        if error is not None:
            error.add_note(f"the program said:\n{self.output}")

    @property
    def output(self) -> str:
        """All it has said so far, its errors included."""
        return "".join(self._said)

    def wait_for(self, words: str, timeout: float = 20.0) -> None:
        """Wait until it has said so."""

        def said_or_ended() -> bool:
            return words in self.output or self._process.poll() is not None

        eventually(said_or_ended, timeout, lambda: f"the program says {words!r}: {self.output}")
        self._reader.join(0 if self._process.poll() is None else 10)
        assert words in self.output, f"the program ended without {words!r}: {self.output}"

    def wait(self, timeout: float = 20.0) -> int:
        """Wait for its end and return its exit code."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program does not end: {self.output}") from None
        self._reader.join(10)
        return code

    def say(self, words: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
