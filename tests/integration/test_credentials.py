"""Passwords that change: asked for at each attempt, off the network thread, and never shown."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import ClosedError, ConfigError, ConnectError, ConnectRefusedError, MQTTClient, aio
from tests.support import ScriptedBroker, eventually, packet
from tests.support.packet import PacketType
from tests.support.port import free_port
from tests.support.wait import connect_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support import ScriptedConnection

QUICK = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 0.5}
SECRET = "hunter2"
BAD_USER_OR_PASSWORD = {packet.V311: 4, packet.V5: 0x86}


def passwords_seen(broker: ScriptedBroker) -> list[bytes | None]:
    return [packet.read_connect(connect).password for connect in broker.received(PacketType.CONNECT)]


def lets_in(*passwords: str) -> Callable[[ScriptedConnection], None]:
    """A broker's script: serve whoever has one of these passwords, refuse the others."""

    def play(connection: ScriptedConnection) -> None:
        connect = packet.read_connect(connection.expect(PacketType.CONNECT))
        connection.level = connect.level
        known = connect.password in [password.encode() for password in passwords]
        code = 0 if known else BAD_USER_OR_PASSWORD[connect.level]
        connection.send(packet.connack(code, level=connect.level))
        if known:
            connection.serve()

    return play


def tokens(*tokens: str) -> Callable[[], tuple[str, str]]:
    """A token service: gives one after the other, the last for ever."""
    left = list(tokens)
    return lambda: ("me", left.pop(0) if len(left) > 1 else left[0])


def hang_up(connection: ScriptedConnection) -> None:
    connection.accept()


def stay(connection: ScriptedConnection) -> None:
    connection.accept()
    connection.serve()


# -- asking -----------------------------------------------------------------------------------------


def test_the_callable_is_asked_before_each_attempt(make_client) -> None:
    """A token from the last connection is never used for the next."""
    with ScriptedBroker(hang_up, hang_up, stay) as broker:
        make_client(broker.url, credentials=tokens("a", "b", "c")).connect()
        eventually(lambda: passwords_seen(broker) == [b"a", b"b", b"c"])


def test_an_attempt_at_several_brokers_asks_once(make_client) -> None:
    """What is slow to answer has half of the time of them all."""
    asked: list[None] = []

    def ask() -> tuple[str, str]:
        asked.append(None)
        return "me", "a"

    with ScriptedBroker(lets_in("a")) as broker:
        make_client(f"mqtt://localhost:{free_port()},{broker.url}", credentials=ask).connect()
        assert passwords_seen(broker) == [b"a"]
    assert len(asked) == 1


async def test_a_coroutine_function_is_awaited_on_the_loop_of_the_client() -> None:
    asked: list[object] = []

    async def fetch() -> tuple[str, str]:
        await asyncio.sleep(0)
        asked.append(asyncio.get_running_loop())
        return "me", SECRET

    with ScriptedBroker(lets_in(SECRET)) as broker:
        async with aio.MQTTClient(broker.url, "fetch", credentials=fetch):
            assert asked == [asyncio.get_running_loop()]


async def test_a_plain_function_does_not_run_on_the_loop() -> None:
    """It may block, and the loop goes on."""
    asked: list[str] = []

    def fetch() -> tuple[str, str]:
        asked.append(threading.current_thread().name)
        return "me", SECRET

    with ScriptedBroker(lets_in(SECRET)) as broker:
        async with aio.MQTTClient(broker.url, "fetch", credentials=fetch):
            assert asked == ["tars-mqtt/fetch/credentials"]


def test_the_threaded_client_refuses_a_coroutine_function() -> None:
    async def fetch() -> tuple[str, str]:
        return "me", SECRET

    with pytest.raises(ConfigError, match=r"credentials is a coroutine function: use tars_mqtt\.aio"):
        MQTTClient("mqtt://localhost", "c", credentials=fetch)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_token_may_come_without_a_user_name(protocol) -> None:
    with (
        ScriptedBroker(lets_in(SECRET)) as broker,
        MQTTClient(broker.url, "c", protocol=protocol, credentials=lambda: (None, SECRET)),
    ):
        (connect,) = broker.received(PacketType.CONNECT)
        assert packet.read_connect(connect).password == SECRET.encode()


# -- it fails ---------------------------------------------------------------------------------------


def test_a_callable_that_raises_is_reported_and_asked_again(make_client, caplog) -> None:
    """As a broker that is not there. What it raised may quote a token, so its words stay out of the log."""
    outcomes = [OSError(f"https://tokens/?secret={SECRET}"), SystemExit(1), ("me", SECRET)]

    def ask() -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with ScriptedBroker(lets_in(SECRET)) as broker:
        make_client(broker.url, credentials=ask).connect()
    assert "the credentials callable failed: OSError; next attempt in" in caplog.text
    assert "the credentials callable failed: SystemExit; next attempt in" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "is a NoneType, and not a tuple of user name and password"),
        (SECRET, "is a str, and not a tuple"),
        (("me", SECRET, "more"), "is a tuple, and not a tuple"),
        (("me", SECRET.encode()), "has a password that must be a str"),
        (("me\0" + SECRET, ""), "has a user name that must not contain the character U+0000"),
        (("me", SECRET * 10_000), "has a password that must be at most 65,535 bytes long"),
    ],
)
def test_an_answer_that_is_none_is_named_and_not_quoted(answer, problem, caplog) -> None:
    client = MQTTClient(f"mqtt://localhost:{free_port()}", "c", credentials=lambda: answer, **QUICK)
    told = connect_error(client, f"what the credentials callable returned {problem}")
    assert SECRET not in told + caplog.text


def test_a_callable_that_hangs_is_an_error_in_time(make_client) -> None:
    """The first connect says who is to blame; the network thread goes on, and asks nobody twice at once."""
    released = threading.Event()
    running: list[int] = []

    def ask() -> tuple[str, str]:
        running.append(1)
        released.wait(30)
        return "me", SECRET

    client = make_client(f"mqtt://localhost:{free_port()}", "hung", credentials=ask, connect_timeout=0.4)
    try:
        with pytest.raises(ConnectError, match=r"the credentials callable did not return within 0\.2 s"):
            client.connect(timeout=2)
        assert len(running) == 1
        hung = [thread for thread in threading.enumerate() if thread.name == "tars-mqtt/hung/credentials"]
        assert len(hung) == 1
    finally:
        released.set()


def test_a_callable_that_hangs_does_not_hold_up_a_shutdown(make_client) -> None:
    released, asked = threading.Event(), threading.Event()

    def ask() -> tuple[str, str]:
        asked.set()
        released.wait(30)
        return "me", SECRET

    client = make_client(f"mqtt://localhost:{free_port()}", credentials=ask, connect_timeout=40)
    connecting = threading.Thread(target=lambda: raises_closed(client.connect))
    connecting.start()
    try:
        assert asked.wait(10)
        started = time.monotonic()
        client.shutdown(timeout=10)
        assert time.monotonic() - started < 8
    finally:
        released.set()
        connecting.join(10)


def raises_closed(call: Callable[[], object]) -> None:
    with pytest.raises(ClosedError):
        call()


async def test_a_coroutine_that_hangs_is_cancelled() -> None:
    ended = asyncio.Event()

    async def ask() -> tuple[str, str]:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return "me", SECRET

    client = aio.MQTTClient(f"mqtt://localhost:{free_port()}", "c", credentials=ask, connect_timeout=0.4)
    with pytest.raises(ConnectError, match="the credentials callable did not return"):
        await client.connect(timeout=2)
    await asyncio.wait_for(ended.wait(), 10)


# -- refused ----------------------------------------------------------------------------------------


def test_a_refused_token_raises_from_the_first_connect(make_client) -> None:
    with ScriptedBroker(lets_in("good")) as broker:
        client = make_client(broker.url, credentials=tokens("bad", "good"))
        with pytest.raises(ConnectRefusedError):
            client.connect()


def test_a_token_refused_later_is_replaced_soon(make_client) -> None:
    """It may have run out on the way: the next one is asked for after a short delay, not after the longest."""
    with ScriptedBroker(hang_up, lets_in("b")) as broker:
        client = make_client(broker.url, credentials=tokens("first", "a", "b"), reconnect_max_delay=3600.0)
        client.connect()
        eventually(lambda: passwords_seen(broker) == [b"first", b"a", b"b"] and client.connected)


@pytest.mark.parametrize("source", ["callable", "file"])
def test_a_password_that_changes_under_traffic_loses_nothing(
    make_client, make_broker, tmp_path: Path, source, caplog
) -> None:
    """The broker takes a new password and throws us out, again and again; every message arrives."""
    current = [f"{SECRET}-0"]
    file = tmp_path / "password"
    file.write_text(current[0])
    broker = make_broker(users={"me": current[0]})
    settings: dict[str, Any] = {"username": "me", "password_file": file}
    if source == "callable":
        settings = {"credentials": lambda: ("me", current[0])}
    client = make_client(broker.url, dedupe_ttl=60, dedupe_max_entries=10_000, **settings)
    arrived: list[bytes] = []
    sent: list[bytes] = []
    stop = threading.Event()
    client.subscribe("numbers", arrived.append, 1)
    client.connect()

    def publish() -> None:
        while not stop.is_set():
            sent.append(str(len(sent)).encode())
            client.publish("numbers", sent[-1], qos=1)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for number in range(1, 5):
            current[0] = f"{SECRET}-{number}"
            file.write_text(current[0])
            broker.set_users({"me": current[0]})
            eventually(lambda number=number: client.stats().reconnects >= number and client.connected)
            before = len(sent)
            eventually(lambda before=before: len(sent) > before + 5)
    finally:
        stop.set()
        publisher.join(20)
    eventually(lambda: set(arrived) == set(sent), message=lambda: f"{set(sent) - set(arrived)} arrive")
    assert SECRET not in caplog.text + repr(client.config) + repr(client)
