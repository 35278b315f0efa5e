"""A mosquitto for one measurement, so that none finds the sessions and queues of the one before."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_START_TIME = 10.0

# As mosquitto comes, but that it drops nothing, and does not limit what clients may leave unacknowledged.
_CONFIG = """\
listener {port} 127.0.0.1
allow_anonymous true
log_type error
max_queued_messages 0
max_inflight_messages 0
"""


def find_mosquitto() -> str:
    """The path of mosquitto's binary.

    Raises:
        FileNotFoundError: There is none.
    """
    given = os.environ.get("MQTT_TEST_BROKER", "mosquitto")
    found = shutil.which(
        given, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])
    )
    if found is None:
        raise FileNotFoundError(
            f"{given} is not the binary of mosquitto: install it, or set MQTT_TEST_BROKER"
        )
    return found


class Broker:
    """One mosquitto on a free port, with *options* for its configuration; a context manager."""

    def __init__(self, mosquitto: str, options: Sequence[str] = ()) -> None:
        self.port = _free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="tars-mqtt-bench-"))
        config = self.directory / "mosquitto.conf"
        lines = [_CONFIG.format(port=self.port), *options]
        if os.geteuid() == 0:
            lines.append("user root")
        config.write_text("\n".join([*lines, ""]))
        self._process = subprocess.Popen(
            [mosquitto, "-c", config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _START_TIME
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self._end()
                    raise
                time.sleep(0.005)
            else:
                return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay open, nobody answers."""
        self._process.send_signal(signal.SIGSTOP)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
