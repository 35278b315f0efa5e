"""A mosquitto of the test's own, to start, stop, kill and freeze."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tests.support.port import HOST, address_of, free_port, is_listening
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Self

DOCKER_PREFIX = "docker:"


class BrokerMissing(Exception):
    """There is no broker on this machine, or none that a test may harm."""


@cache
def find_broker() -> str:
    """What ``scripts/broker`` found: a URL, the path of a mosquitto, or ``docker:`` and an image.

    Raises:
        BrokerMissing: It found nothing; the error says what to do.
    """
    if found := os.environ.get("MQTT_TEST_BROKER"):
        return found
    script = Path(__file__).parents[2] / "scripts" / "broker"
    search = subprocess.run([script, "find"], capture_output=True, text=True, check=False)
    if search.returncode != 0:
        raise BrokerMissing(search.stderr.strip())
    return search.stdout.strip()


class RemoteBroker:
    """A running broker that is not ours: tests use it, and leave it as it is."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host, self.port = address_of(url)


class Broker:
    """One mosquitto on a port and in a directory of its own; both stay the same when it is restarted.

    Args:
        config: Lines for ``mosquitto.conf``, ``max_inflight_messages 1`` for instance.
        persistence: Keep sessions and messages on disk. A change is written right after it was acknowledged:
            a kill cannot take it back once a later packet has been answered.
        users: Names and passwords; then nobody else is let in.
        mosquitto: What ``find_broker`` gives.
        verbose: Log every packet. Off for long runs, whose log would grow without end.
    """

    def __init__(
        self,
        config: Iterable[str] = (),
        *,
        persistence: bool = False,
        users: Mapping[str, str] | None = None,
        mosquitto: str | None = None,
        verbose: bool = True,
    ) -> None:
        mosquitto = mosquitto or find_broker()
        if "://" in mosquitto:
            raise BrokerMissing("the broker of MQTT_TEST_URL is not ours to stop, kill or configure")
        self.directory = Path(tempfile.mkdtemp(prefix="tars-mqtt-broker-"))
        self.host = HOST
        self.port = free_port()
        self.url = f"mqtt://{self.host}:{self.port}"
        self._config = tuple(config)
        self._persistence = persistence
        self._verbose = verbose
        self._users = dict(users or {})
        self._log_path = self.directory / "mosquitto.log"
        self._engine: _Engine = (
            _Container(mosquitto.removeprefix(DOCKER_PREFIX), self.directory, self.port)
            if mosquitto.startswith(DOCKER_PREFIX)
            else _Process(mosquitto)
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._engine.running

    @property
    def log(self) -> str:
        """Everything mosquitto has said, over all its starts; every packet included where it is verbose."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def start(self) -> None:
        """Start it and return when it listens."""
        assert not self.running, "the broker is running already"
        path = self._write_config()
        said = len(self.log)
        with self._log_path.open("ab") as log:
            self._engine.start([*["-v"] * self._verbose, "-c", str(path)], log.fileno())

        def listens_or_died() -> bool:
            # A connection alone proves nothing: docker accepts one before mosquitto does.
            said_so = " running" in self.log[said:]
            return not self.running or (said_so and is_listening(self.host, self.port))

        eventually(listens_or_died, 30, lambda: f"mosquitto listens on {self.port}:\n{self.log}")
        if not self.running:
            raise AssertionError(f"mosquitto did not start:\n{self.log}")

    def kill(self) -> None:
        """End it as ``kill -9`` does: no goodbye, no last write."""
        self._end_by(signal.SIGKILL)

    def terminate(self) -> None:
        """End it in good order: it disconnects its clients and writes its state."""
        self._end_by(signal.SIGTERM)

    def restart(self) -> None:
        """Terminate and start it again, at the same address."""
        self.terminate()
        self.start()

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay open, the kernel takes new ones, nobody answers."""
        self._engine.freeze()

    def thaw(self) -> None:
        self._engine.thaw()

    def set_users(self, users: Mapping[str, str]) -> None:
        """Let in these users from now on; mosquitto throws out whoever is connected with another password."""
        self._users = dict(users)
        self._write_passwords()
        said = self.log.count("Reloading config")
        self._engine.reload()
        eventually(lambda: self.log.count("Reloading config") > said, message="mosquitto reads its passwords")

    def close(self) -> None:
        """Kill it if need be, and remove its directory. May be called twice."""
        if self.running:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end_by(self, number: signal.Signals) -> None:
        """Send the signal until it ends.

        mosquitto 2.0.11 forgets a SIGTERM that comes between its line " running" and its main loop: about one
        in six of those that are sent when the line is there.
        """
        assert self.running, "the broker is not running"

        def ends() -> bool:
            self._engine.signal(number)
            return self._engine.wait(1)

        eventually(ends, message=lambda: f"mosquitto ends by {number.name}:\n{self.log}")

    def _write_config(self) -> Path:
        lines = [
            f"listener {self.port} {self._engine.bind_address}".rstrip(),
            f"allow_anonymous {'false' if self._users else 'true'}",
            "log_dest stderr",
        ]
        if os.geteuid() == 0:
            # mosquitto would become another user, who may not write here.
            lines.append("user root")
        if self._users:
            lines.append(f"password_file {self._write_passwords()}")
        if self._persistence:
            lines += ["persistence true", f"persistence_location {self.directory}/"]
            lines += ["autosave_on_changes true", "autosave_interval 1"]
        path = self.directory / "mosquitto.conf"
        path.write_text("\n".join([*lines, *self._config, ""]))
        return path

    def _write_passwords(self) -> Path:
        path = self.directory / "passwords"
        path.write_text("".join(map(_password_line, self._users, self._users.values())))
        path.chmod(0o600)
        return path


class _Engine(Protocol):
    """Where a mosquitto runs."""

    bind_address: str

    @property
    def running(self) -> bool: ...
    def start(self, arguments: list[str], log: int) -> None: ...
    def signal(self, number: signal.Signals) -> None: ...  # which may find it ended
    def wait(self, timeout: float) -> bool: ...  # whether it has ended
    def reload(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...


class _Process:
    """A mosquitto of this machine."""

    bind_address = HOST

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, arguments: list[str], log: int) -> None:
        self._process = subprocess.Popen(
            [self._binary, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def signal(self, number: signal.Signals) -> None:
        process = self._started_process()
        process.send_signal(number)
        if number == signal.SIGTERM:
            # A frozen process takes the signal when it is thawed, and not before.
            process.send_signal(signal.SIGCONT)

    def wait(self, timeout: float) -> bool:
        return self._process is None or _ended(self._process, timeout)

    def reload(self) -> None:
        self._running_process().send_signal(signal.SIGHUP)

    def freeze(self) -> None:
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        self._running_process().send_signal(signal.SIGCONT)

    def _started_process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the broker was never started"
        return self._process

    def _running_process(self) -> subprocess.Popen[bytes]:
        process = self._started_process()
        assert process.poll() is None, "the broker is not running"
        return process


class _Container:
    """A mosquitto in docker, where the machine has none. Slower to start, otherwise the same."""

    bind_address = ""  # every address of the container: docker hands on this machine's port only

    def __init__(self, image: str, directory: Path, port: int) -> None:
        self._run = (
            "docker run --rm "
            f"--user {os.getuid()}:{os.getgid()} -p {HOST}:{port}:{port} -v {directory}:{directory} "
        ).split()
        self._image = image
        self._name = ""
        self._client: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._client is not None and self._client.poll() is None

    def start(self, arguments: list[str], log: int) -> None:
        self._name = f"tars-mqtt-{uuid.uuid4().hex[:12]}"
        command = [*self._run, "--name", self._name, self._image, "mosquitto", *arguments]
        self._client = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            self._docker("kill", f"--signal={number.name}")

    def wait(self, timeout: float) -> bool:
        return self._client is None or _ended(self._client, timeout)

    def reload(self) -> None:
        self._docker("kill", "--signal=SIGHUP")

    def freeze(self) -> None:
        self._docker("pause")

    def thaw(self) -> None:
        self._docker("unpause")

    def _docker(self, *arguments: str) -> None:
        subprocess.run(["docker", *arguments, self._name], check=True, capture_output=True)


def _ended(process: subprocess.Popen[bytes], timeout: float) -> bool:
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        return False
    return True


def _password_line(name: str, password: str) -> str:
    """One line of mosquitto's password file: PBKDF2 with SHA-512."""
    rounds, salt = 101, os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds)
    return f"{name}:$7${rounds}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}\n"
