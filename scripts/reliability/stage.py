"""A broker, two networks that break, and the processes between them."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import attrs

from reliability import contender, journal
from reliability.account import Account, Mended
from reliability.fault import Fault
from reliability.worker import Job
from tests.support import Broker, FaultProxy
from tests.support import packet as mqtt

if TYPE_CHECKING:
    from tests.support.proxy import Direction

_BROKER = ("max_queued_messages 0",)
"""It shall drop nothing: what it drops, no client can deliver."""
_KEEPALIVE = 2
_PATIENCE = 60.0
_STANDSTILL = 15.0
_MOMENT = 0.2
"""Seconds in which events gather, for a fault to have something to lose."""


@attrs.frozen(kw_only=True)
class Cast:
    """Who takes part."""

    client: str
    publishers: int = 1
    subscribers: int = 1
    rate: float = 150.0
    dedupe: str = "durable"
    """``durable``, ``memory`` or ``none``."""

    @property
    def ours(self) -> bool:
        return self.client in contender.OURS


class Process:
    """A worker, which may be killed and started again; its journal and its outbox stay."""

    def __init__(self, cast: Cast, role: str, number: int, url: str, directory: Path) -> None:
        self.name = f"{role}-{number}"
        self.book = directory / f"{self.name}.journal"
        self._log = directory / f"{self.name}.log"
        settings: dict[str, Any] = {"keepalive": _KEEPALIVE}
        if cast.ours:
            settings["ours"] = _settings(cast, role, directory / f"{self.name}.db")
        self._job = Job(
            role, cast.client, url, f"soak-{self.name}", number, str(self.book), cast.rate, settings
        )
        self._said: list[str] = []
        self._process: subprocess.Popen[str]

    def start(self) -> None:
        self._said = []
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "reliability.worker", json.dumps(self._job._asdict())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._listen, args=(self._process, self._said), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen[str], said: list[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            said.extend(line.strip() for line in process.stdout)
        said.append("ended")

    def wait_for(self, word: str) -> None:
        """Wait until it says so.

        Raises:
            StageError: It ended before, or takes too long.
        """
        deadline = time.monotonic() + _PATIENCE
        while word not in self._said:
            if "ended" in self._said or time.monotonic() > deadline:
                raise StageError(f"{self.name} did not get {word}: it said {self._said}\n{self.log_tail()}")
            time.sleep(0.005)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write("stop\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Ask it to stop, and kill it if it does not."""
        if not hasattr(self, "_process"):
            return
        self.ask_to_stop()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _settings(cast: Cast, role: str, outbox: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"session_expiry": 3600, "connect_timeout": 3.0}
    if role == "publisher":
        return settings | {"outbox": str(outbox)}
    if cast.dedupe != "none":
        settings |= {"dedupe_ttl": 24 * 3600.0, "dedupe_max_entries": 1_000_000}
    if cast.dedupe == "durable":
        settings |= {"outbox": str(outbox), "dedupe_durable": True}
    return settings


class StageError(Exception):
    """The run cannot go on; the message says why."""


class Stage:
    """Starts everybody, performs faults, and keeps the account; a context manager."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast
        self.account = Account()
        self.directory = Path(tempfile.mkdtemp(prefix="tars-mqtt-soak-"))
        self._resources = contextlib.ExitStack()
        self._broker = self._resources.enter_context(Broker(_BROKER, persistence=True, verbose=False))
        self._links = {
            role: self._resources.enter_context(FaultProxy(self._broker.url))
            for role in ("publisher", "subscriber")
        }
        self._processes = {
            role: [
                Process(cast, role, number, self._links[role].url, self.directory) for number in range(count)
            ]
            for role, count in (("subscriber", cast.subscribers), ("publisher", cast.publishers))
        }
        self._readers = {
            process.name: journal.Reader(process.book)
            for each in self._processes.values()
            for process in each
        }

    def __enter__(self) -> Self:
        try:
            for processes in self._processes.values():
                for process in processes:
                    process.start()
                for process in processes:
                    process.wait_for("ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._mend_links()
        for process in (*self._processes["publisher"], *self._processes["subscriber"]):
            process.end()
        self._resources.close()

    # -- faults -------------------------------------------------------------------------------

    def perform(self, fault: Fault) -> None:
        """Break, wait, mend."""
        perform: Callable[[Fault], float | None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        mended = perform(fault)
        self.account.mended.append(Mended(fault.kind, mended or time.monotonic()))

    def _kill_broker(self, fault: Fault) -> None:
        self._settle_broker()
        self._broker.kill()
        self._mend_links()
        self._cut_all()
        time.sleep(fault.lasts)
        self._broker.start()

    def _settle_broker(self) -> None:
        """Have the broker save what it acknowledged: what it forgets when killed, no client can deliver.

        Nothing more reaches it, and when it has answered a few pings, it has been through its loop as often.
        """
        for link in self._links.values():
            link.stall("to_broker")
        with socket.create_connection((self._broker.host, self._broker.port), 10) as stream:
            for packet in (mqtt.connect("soak-settle"), *[mqtt.pingreq()] * 5):
                stream.sendall(packet)
                stream.recv(64)
                time.sleep(0.02)

    def _cut_all(self) -> None:
        for link in self._links.values():
            link.cut()

    def _restart_broker(self, fault: Fault) -> None:
        self._broker.terminate()
        time.sleep(fault.lasts)
        self._broker.start()

    def _freeze_broker(self, fault: Fault) -> None:
        self._broker.freeze()
        time.sleep(fault.lasts)
        self._broker.thaw()

    def _refuse(self, fault: Fault) -> None:
        links = self._of(fault)
        for link in links:
            link.refuse()
            link.cut()
        time.sleep(fault.lasts)
        for link in links:
            link.accept()

    def _reset(self, fault: Fault) -> None:
        for link in self._of(fault):
            link.cut()

    def _hang_up(self, fault: Fault) -> None:
        for link in self._of(fault):
            link.hang_up()

    def _half_close(self, fault: Fault) -> None:
        for link in self._of(fault):
            link.half_close(_one_way(fault))

    def _cut(self, fault: Fault) -> None:
        for link in self._of(fault):
            direction = _one_way(fault)
            link.cut_after(link.passed(direction) + fault.number % 1000, direction)
        time.sleep(fault.lasts)

    def _blackhole(self, fault: Fault) -> None:
        self._for_a_while(fault, lambda link: link.stall(fault.direction))

    def _slices(self, fault: Fault) -> None:
        self._for_a_while(fault, lambda link: link.slice(1))

    def _latency(self, fault: Fault) -> None:
        self._for_a_while(fault, lambda link: link.latency(0.1))

    def _throttle(self, fault: Fault) -> None:
        self._for_a_while(fault, lambda link: link.bandwidth(64_000))

    def _kill_publisher(self, fault: Fault) -> None:
        """With events in its outbox: for a moment nothing it sends gets through."""
        link = self._links["publisher"]
        link.stall("to_broker")
        time.sleep(_MOMENT)
        process = self._of_role("publisher", fault)
        process.kill()
        link.cut()
        _mend(link)
        self._start_again(process, fault)

    def _kill_subscriber(self, fault: Fault) -> None:
        """In the middle of its work: with acknowledgements on the way, or with many events just come."""
        process, link = self._of_role("subscriber", fault), self._links["subscriber"]
        if fault.number % 2:
            link.stall("to_broker")
            time.sleep(_MOMENT)
        else:
            process.freeze()
            time.sleep(_MOMENT)
            process.thaw()
            time.sleep(fault.number % 10 / 1000)
        process.kill()
        link.cut()
        _mend(link)
        self._start_again(process, fault)

    def _start_again(self, process: Process, fault: Fault) -> None:
        time.sleep(fault.lasts)
        process.start()
        process.wait_for("ready")

    def _of_role(self, role: str, fault: Fault) -> Process:
        processes = self._processes[role]
        return processes[fault.number % len(processes)]

    def _for_a_while(self, fault: Fault, spoil: Callable[[FaultProxy], None]) -> None:
        links = self._of(fault)
        for link in links:
            spoil(link)
        time.sleep(fault.lasts)
        for link in links:
            _mend(link)

    def _of(self, fault: Fault) -> list[FaultProxy]:
        return [self._links[role] for role in fault.links]

    def _mend_links(self) -> None:
        for link in self._links.values():
            _mend(link)

    # -- the end ------------------------------------------------------------------------------

    def read(self) -> Account:
        """Enter into the account what the journals have."""
        for number, process in enumerate(self._processes["publisher"]):
            self.account.sent[number].add(self._readers[process.name].lines())
        for number, process in enumerate(self._processes["subscriber"]):
            self.account.heard[number].add(self._readers[process.name].lines())
        return self.account

    def finish(self) -> Account:
        """Have the publishers stop, and wait until all is handled, or nothing more comes."""
        for process in self._processes["publisher"]:
            process.ask_to_stop()
        for process in self._processes["publisher"]:
            process.wait_for("stopped")
        handled, since = -1, time.monotonic()
        while self.read().missing("accepted") and time.monotonic() < since + _STANDSTILL:
            if handled != self.account.handled:
                handled, since = self.account.handled, time.monotonic()
            time.sleep(0.1)
        return self.account


def _one_way(fault: Fault) -> Direction:
    return fault.direction or "to_client"


def _mend(link: FaultProxy) -> None:
    link.latency(0)
    link.bandwidth(0)
    link.slice(0)
    link.resume()
    link.accept()
