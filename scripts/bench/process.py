"""The processes of a measurement, which talk in lines."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

_LINES_OF_ERROR = 12


class MeasurementError(Exception):
    """A process did not do what it was started for; the message holds what it said."""


class Process:
    """A process that is ended after a time, or with the block; a context manager."""

    def __init__(
        self, command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name = " ".join(command)
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the block
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            bufsize=1,
            env=environment,
        )
        self._timer = threading.Timer(timeout, self._process.kill)
        self._timer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def hear(self) -> str:
        """The next line.

        Raises:
            MeasurementError: There is none, since it ended, or did not make it in time.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            last = "".join(self._said.readlines()[-_LINES_OF_ERROR:])
            status = self._process.returncode
            ended = "was not done in time" if status == -signal.SIGKILL else f"ended with status {status}"
            raise MeasurementError(f"{self._name} {ended}\n{last}")
        return line.rstrip("\n")

    def wait_ready(self) -> None:
        line = self.hear()
        if line != "ready":
            raise MeasurementError(f"{self._name} said {line!r}")
