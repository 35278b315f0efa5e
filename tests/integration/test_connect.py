"""Connecting: when it returns, what it says when it does not work out, and what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time

import pytest

from tars_mqtt import (
    ClosedError,
    ConnectError,
    ConnectionState,
    ConnectRefusedError,
    MQTTClient,
    MQTTClientConfig,
    NotConnectedError,
    SubscribeError,
)
from tars_mqtt._core.life import Attempt
from tests.support import (
    LeakCheck,
    PacketType,
    ScriptedBroker,
    accept_and_leave,
    accept_and_serve,
    eventually,
)
from tests.support import packet as mqtt
from tests.support.port import HOST, free_port
from tests.support.thread import in_thread
from tests.support.wait import connect_error

BAD_PASSWORD = 0x86
NOT_AUTHORISED = 0x87


def refuse(code: int):
    return lambda connection: connection.accept(code)


# -- it works out -------------------------------------------------------------------------------


def test_connect_returns_when_every_subscription_is_acknowledged(make_client):
    """Not before: what is published right after connect() reaches our own handlers."""
    may_answer = threading.Event()

    def script(connection) -> None:
        connection.accept()
        requests = [connection.expect(PacketType.SUBSCRIBE) for _ in range(2)]
        may_answer.wait(10)
        for request in requests:
            connection.answer(request)
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url)
        client.subscribe("one", print)
        client.subscribe("two/#", print, 1)
        connecting = in_thread(client.connect)
        broker.wait_for(PacketType.SUBSCRIBE, 2)
        assert not connecting.done()
        assert not client.connected
        assert client.state is ConnectionState.CONNECTING
        may_answer.set()
        connecting.result(5)
        assert client.connected
        client.shutdown()


def test_connect_waits_for_a_broker_that_starts_later(make_client, broker):
    broker.terminate()
    client = make_client(broker.url)
    connecting = in_thread(client.connect)
    eventually(lambda: client.stats().last_error)
    time.sleep(0.8)  # some attempts fail
    assert not connecting.done()
    broker.start()
    connecting.result(5)
    assert client.connected


def test_connect_on_a_connected_client_returns_at_once(make_client, broker):
    client = make_client(broker.url)
    client.connect()
    client.connect()
    assert client.connected
    assert broker.log.count("Sending CONNACK") == 1


def test_many_threads_may_connect_at_once(make_client, broker):
    """They share one connection, and all come back when it is there."""
    client = make_client(broker.url)
    for outcome in [in_thread(client.connect) for _ in range(8)]:
        outcome.result(5)
    assert client.connected
    assert broker.log.count("Sending CONNACK") == 1


def test_with_connects_on_enter_and_shuts_down_on_exit(make_client, broker):
    client = make_client(broker.url)
    with client as entered:
        assert entered is client
        assert client.state is ConnectionState.CONNECTED
    assert client.state is ConnectionState.CLOSED
    eventually(lambda: "Received DISCONNECT" in broker.log)


def test_wait_connected_says_whether_the_connection_came_in_time(make_client, broker):
    client = make_client(broker.url)
    assert client.wait_connected(0) is False
    assert client.wait_connected(0.05) is False
    waiting = in_thread(client.wait_connected, 5)
    client.connect()
    assert waiting.result(5) is True
    assert client.wait_connected(0) is True


# -- nobody answers -----------------------------------------------------------------------------


def test_an_unreachable_broker_is_a_connect_error_in_time_that_says_where_why_and_what_to_do(make_client):
    port = free_port()
    check = LeakCheck()
    client = make_client(f"mqtt://{HOST}:{port}")
    started = time.monotonic()
    with pytest.raises(ConnectError) as caught:
        client.connect(timeout=0.5)
    assert 0.5 <= time.monotonic() - started < 2.0
    message = str(caught.value)
    assert f"{HOST}:{port}" in message
    assert "connection refused" in message
    assert "check mqtt_url" in message
    assert not isinstance(caught.value, ConnectRefusedError)
    assert client.state is ConnectionState.DISCONNECTED
    check.assert_clean()


def test_the_connect_timeout_of_the_settings_counts_unless_another_is_given(make_client):
    client = make_client(f"mqtt://{HOST}:{free_port()}", connect_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(ConnectError, match=r"within 0\.3 s"):
        client.connect()
    assert time.monotonic() - started < 2.0


def test_connect_after_a_failed_connect_works(make_client, broker):
    broker.terminate()
    client = make_client(broker.url)
    with pytest.raises(ConnectError):
        client.connect(timeout=0.2)
    broker.start()
    client.connect()
    assert client.connected


def test_several_brokers_are_tried_in_turn(make_client, shared_broker):
    client = make_client(f"mqtt://{HOST}:{free_port()},{shared_broker.url}")
    client.connect()
    assert client.connected


def test_a_failed_connect_in_with_leaves_nothing_running(make_client):
    check = LeakCheck()
    client = make_client(f"mqtt://{HOST}:{free_port()}", connect_timeout=0.2)
    with pytest.raises(ConnectError), client:
        pytest.fail("the body must not run")
    assert client.state is ConnectionState.CLOSED
    check.assert_clean()


def test_a_name_server_that_does_not_answer_keeps_nobody_waiting(make_client, monkeypatch):
    """Name resolution has no time-out of its own: connect() keeps to its own all the same."""
    answer = threading.Event()

    def getaddrinfo(*args, **kwargs):
        answer.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    client = make_client("mqtt://broker.example:1883")
    started = time.monotonic()
    try:
        with pytest.raises(ConnectError, match=r"broker\.example"):
            client.connect(timeout=0.3)
        assert time.monotonic() - started < 2.5
    finally:
        answer.set()


def test_a_network_thread_that_is_late_to_end_is_waited_for_by_the_next_connect(
    make_client, broker, monkeypatch
):
    """It is not taken for a connection under way; until it has ended, nothing can start."""
    answer = threading.Event()
    resolve = socket.getaddrinfo

    def getaddrinfo(*args, **kwargs):
        answer.wait(30)
        return resolve(*args, **kwargs)

    client = make_client(f"mqtt://localhost:{broker.port}")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        with pytest.raises(ConnectError, match="no connection to"):
            client.connect(timeout=0.1)
        with pytest.raises(ConnectError, match=r"still busy leaving .* call connect\(\) again"):
            client.connect(timeout=0.1)
        connecting = in_thread(client.connect, 30)
        answer.set()
        connecting.result(30)
    assert client.connected


def test_who_has_waited_long_enough_takes_nothing_from_those_who_wait_on(make_client):
    client = make_client(f"mqtt://{HOST}:{free_port()}")
    patient = in_thread(client.connect, 2)
    eventually(lambda: client.state is ConnectionState.CONNECTING)
    with pytest.raises(ConnectError, match="The client keeps trying"):
        client.connect(timeout=0.2)
    with pytest.raises(ConnectError, match=r"within 2 s((?!keeps trying).)*$"):
        patient.result(30)
    assert client.state is ConnectionState.DISCONNECTED


def test_a_connect_behind_a_slow_disconnect_takes_its_own_time_and_no_more(make_client, broker):
    client = make_client(broker.url, shutdown_timeout=1.0)
    client.connect()
    broker.freeze()
    client.submit_event("a", "n", "x" * 20_000_000, qos=1)  # more than the socket takes
    leaving = in_thread(client.disconnect)
    session = getattr(client, "unwrapped", client)._engine._session
    eventually(lambda: session.thread.leaving)
    started = time.monotonic()
    with pytest.raises(ConnectError):
        client.connect(timeout=2.0)
    assert time.monotonic() - started < 2.9, "not the wait for the other, and then its time"
    leaving.result(30)
    broker.thaw()


@pytest.mark.parametrize("fails", ["thread", "descriptor"])
def test_a_client_that_cannot_start_says_so_and_can_be_started_later(make_client, broker, monkeypatch, fails):
    def no_thread(thread):
        if thread.name.endswith("/network"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def no_descriptor():
        raise OSError(errno.EMFILE, "Too many open files")

    start = threading.Thread.start
    client = make_client(broker.url)
    with monkeypatch.context() as patch:
        if fails == "thread":
            patch.setattr(threading.Thread, "start", no_thread)
        else:
            patch.setattr(selectors, "DefaultSelector", no_descriptor)
            if make_client.colour == "aio":
                pytest.skip("its loop needs one, too")
        for _ in range(2):
            with pytest.raises(ConnectError, match=r"cannot start: (can't|.*Too many)"):
                client.connect()
            assert client.state is ConnectionState.DISCONNECTED
            with pytest.raises(NotConnectedError):
                client.submit_event("a", "n", 1, qos=1)
    client.connect()
    client.publish_event("a", "n", 1, qos=1)


def held_start(life, monkeypatch) -> tuple[threading.Event, threading.Event]:
    """The next start waits under its lock; the events tell that it does, and let it go on."""
    preparing, go_on = threading.Event(), threading.Event()

    def prepare():
        preparing.set()
        go_on.wait(30)

    monkeypatch.setattr(life, "_prepare", prepare)
    return preparing, go_on


def test_a_connect_that_a_hasty_shutdown_overtakes_leaves_nothing_running(make_client, broker, monkeypatch):
    """The shutdown had no time to wait until the other had started what it would have had to stop."""
    client = make_client(broker.url)
    engine = getattr(client, "unwrapped", client)._engine
    preparing, go_on = held_start(engine.life, monkeypatch)
    connecting = in_thread(client.connect)
    assert preparing.wait(30)
    client.shutdown(timeout=0.05)
    assert client.state is ConnectionState.CLOSED
    go_on.set()
    with pytest.raises(ClosedError):
        connecting.result(30)
    assert client.state is ConnectionState.CLOSED
    assert not engine._session.thread.running
    monkeypatch.undo()
    client.connect()


def test_who_connects_after_a_hasty_shutdown_has_a_connection_of_his_own(make_client, broker, monkeypatch):
    """The one that it overtook takes it away from nobody."""
    client = make_client(broker.url)
    engine = getattr(client, "unwrapped", client)._engine
    preparing, go_on = held_start(engine.life, monkeypatch)
    overtaken = in_thread(engine.life.connect, 30)
    assert preparing.wait(30)
    client.shutdown(timeout=0.05)
    later = in_thread(engine.life.connect, 30)
    time.sleep(0.05)
    monkeypatch.undo()
    go_on.set()
    with pytest.raises(ClosedError):
        overtaken.result(30)
    with contextlib.suppress(ClosedError):  # while the first one's start is being undone
        later.result(30)
    eventually(lambda: engine.life._shutting_down.locked() is False)
    client.connect()
    client.publish_event("a", "n", 1, qos=1)


def test_who_connects_while_a_shutdown_ends_what_it_overtook_is_refused(make_client, broker, monkeypatch):
    """The overtaken one says that it connects, and is no way in: nobody would end what begins there."""
    client = make_client(broker.url)
    engine = getattr(client, "unwrapped", client)._engine
    preparing, go_on = held_start(engine.life, monkeypatch)
    abandon = engine._outbound.abandon
    abandoning, may_go_on = threading.Event(), threading.Event()

    def slow_abandon() -> int:
        abandoning.set()
        assert may_go_on.wait(30)
        return abandon()

    monkeypatch.setattr(engine._outbound, "abandon", slow_abandon)
    overtaken = in_thread(engine.life.connect, 30)
    assert preparing.wait(30)
    later = in_thread(engine.life.connect, 30)
    closing = in_thread(engine.life.shutdown, 0.05, None)
    assert abandoning.wait(30)
    go_on.set()
    with pytest.raises(ClosedError, match="is being shut down"):
        later.result(30)
    may_go_on.set()
    closing.result(30)
    with pytest.raises(ClosedError):
        overtaken.result(30)
    assert client.state is ConnectionState.CLOSED
    assert not engine._session.thread.running


def test_a_signal_calls_off_the_wait_for_the_next_connection_too(make_client, broker):
    client = make_client(broker.url)
    client.connect()
    engine = getattr(client, "unwrapped", client)._engine
    broker.kill()
    eventually(lambda: client.state is ConnectionState.RECONNECTING)
    waiting = in_thread(client.connect, None)
    eventually(lambda: engine.life._attempts)
    engine.life.call_off()
    with pytest.raises(ClosedError):
        waiting.result(30)


def test_who_gives_up_a_connection_that_has_come_about_takes_it_from_nobody(make_client, broker):
    client = make_client(broker.url)
    life = getattr(client, "unwrapped", client)._engine.life
    client.connect()
    attempt = Attempt(
        life._first, starts=True, life=life.lives
    )  # waited for beside the other, a moment too short
    assert not life.give_up(attempt)
    assert client.connected
    life._state.set(ConnectionState.DISCONNECTED)
    with pytest.raises(ClosedError):
        life.check_not_left()
    for state in (ConnectionState.RECONNECTING, ConnectionState.CONNECTED):
        life._state.set(state)
        life.check_not_left()


def test_whoever_is_called_off_between_two_looks_does_not_sleep_through_the_delay(make_client, monkeypatch):
    client = make_client(f"mqtt://{HOST}:{free_port()}", reconnect_min_delay=60, reconnect_max_delay=60)
    session = getattr(client, "unwrapped", client)._engine._session
    acknowledge, armed = session.transport.acknowledge_wake, [True]

    def call_off_and_acknowledge():
        if session._backoff.attempt and armed:
            armed.clear()
            session.thread.interrupt()
        acknowledge()

    monkeypatch.setattr(session.transport, "acknowledge_wake", call_off_and_acknowledge)
    monkeypatch.setattr(session._backoff, "_uniform", lambda least, most: most)
    with pytest.raises(ClosedError):
        client.connect(timeout=50)


def test_a_host_without_an_address_is_named_with_the_reason(make_client, monkeypatch):
    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    client = make_client("mqtt://broker.example:1883")
    connect_error(client, "'broker.example': name or service not known")


def test_a_broker_that_takes_the_connection_and_says_nothing_is_a_connect_error(make_client):
    """CONNACK never comes: in time, with that reason."""
    with ScriptedBroker(lambda connection: connection.hold()) as broker:
        client = make_client(broker.url, connect_timeout=0.4, protocol="5")
        started = time.monotonic()
        with pytest.raises(ConnectError, match="did not answer"):
            client.connect(timeout=1.0)
        assert time.monotonic() - started < 3.0


def test_what_is_no_mqtt_broker_is_a_connect_error(make_client):
    """A web server for instance; nothing of what it says escapes as another error."""

    def http(connection) -> None:
        connection.read()
        connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with ScriptedBroker(http) as broker:
        client = make_client(broker.url)
        with pytest.raises(ConnectError, match="no connection to"):
            client.connect(timeout=0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.publish_event("a", "b", {}),
        lambda client: client.submit_event("a", "b", {}, qos=1),
        lambda client: client.publish("a", b"", qos=2),
    ],
)
def test_publishing_before_connect_says_what_to_do(make_client, call):
    client = make_client("mqtt://127.0.0.1")
    with pytest.raises(NotConnectedError, match=r"call connect\(\) first"):
        call(client)


# -- the broker says no -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1", "auto"])
def test_a_wrong_password_is_refused_at_once(make_client, make_broker, protocol):
    """Waiting would not cure it: connect() raises long before its time is up, and nothing stays behind."""
    broker = make_broker(users={"me": "s3cret"})
    check = LeakCheck()
    client = make_client(broker.url, username="me", password="wr0ng", protocol=protocol)
    started = time.monotonic()
    with pytest.raises(ConnectRefusedError) as caught:
        client.connect(timeout=20)
    assert time.monotonic() - started < 5.0
    error = caught.value
    assert not error.retriable
    assert error.code in (NOT_AUTHORISED, 5)
    assert error.reason == "not authorized"
    assert "check client_id, username, password" in str(error)
    assert "wr0ng" not in f"{error!r} {client!r}"
    assert client.state is ConnectionState.DISCONNECTED
    check.assert_clean()


def test_the_right_password_from_the_url_is_accepted(make_client, make_broker):
    broker = make_broker(users={"me": "s3/cr@t"})
    client = make_client(broker.url.replace("://", "://me:s3%2Fcr%40t@"))
    client.connect()
    assert client.connected
    assert "s3/cr@t" not in repr(client)


def test_a_refusal_that_time_may_cure_is_retried_until_the_time_is_up(make_client):
    """A broker that is only just starting says "server unavailable": connect() keeps trying."""
    busy = 0x88
    with ScriptedBroker(refuse(busy), refuse(busy), accept_and_serve) as broker:
        client = make_client(broker.url)
        client.connect()
        assert client.connected
        client.shutdown()
    with ScriptedBroker(refuse(busy)) as broker:
        client = make_client(broker.url)
        connect_error(client, "server unavailable")


def test_a_later_refusal_is_retried_at_the_longest_delay_with_an_error_log(make_client, caplog):
    """The service goes on trying: an operator may mend the broker's rules any time."""
    with ScriptedBroker(accept_and_leave, refuse(BAD_PASSWORD), accept_and_serve) as broker:
        client = make_client(broker.url, reconnect_max_delay=1.0)
        client.connect()
        eventually(lambda: client.stats().reconnects == 1)
        client.shutdown()
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "tars_mqtt.session"
    assert "bad user name or password" in record.getMessage()
    assert record.delay >= 0.5  # the early delays of an outage are drawn from 0 to 0.2 s
    assert record.client_id == client.config.client_id


def test_the_password_file_is_read_at_each_attempt(make_client, tmp_path):
    """Whoever changes the password need not restart the service."""
    file = tmp_path / "password"
    file.write_text("old\n")

    def change_the_password(connection) -> None:
        connection.accept()
        file.write_text("new\n")

    with ScriptedBroker(change_the_password, accept_and_serve) as broker:
        client = make_client(broker.url, username="me", password_file=file)
        client.connect()
        connects = [mqtt.read_connect(packet) for packet in broker.wait_for(PacketType.CONNECT, 2)]
        client.shutdown()
    assert [(connect.username, connect.password) for connect in connects] == [("me", b"old"), ("me", b"new")]


def test_a_password_file_that_is_not_there_is_no_reason_to_wait(make_client, tmp_path):
    client = make_client(f"mqtt://{HOST}:{free_port()}", username="me", password_file=tmp_path / "missing")
    started = time.monotonic()
    with pytest.raises(ValueError, match="password_file"):
        client.connect(timeout=20)
    assert time.monotonic() - started < 5.0


def test_a_refused_subscription_is_named_and_the_client_is_connected(make_client):
    def script(connection) -> None:
        connection.accept()

        def instead(packet) -> bool:
            if packet.type != PacketType.SUBSCRIBE:
                return False
            request = mqtt.read_subscribe(packet, connection.level)
            ((name, _),) = request.filters
            code = NOT_AUTHORISED if name == "secret/#" else 0
            connection.send(mqtt.suback(request.packet_id, [code], level=connection.level))
            return True

        connection.serve(instead)

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url)
        client.subscribe("secret/#", print)
        client.subscribe("open/#", print)
        with pytest.raises(SubscribeError, match="'secret/#'") as caught:
            client.connect()
        ((name, reason),) = caught.value.refused
        assert (name, reason.lower()) == ("secret/#", "not authorized")
        assert client.connected
        client.shutdown()


# -- what is said at connecting -----------------------------------------------------------------


def test_connect_tells_the_broker_what_the_settings_say(make_client):
    with ScriptedBroker(accept_and_serve) as broker:
        client = make_client(
            broker.url, "sensor-7", keepalive=17, session_expiry=90, username="me", password="s3cret"
        )
        client.connect()
        connect = mqtt.read_connect(broker.wait_for(PacketType.CONNECT)[0])
        client.shutdown()
    assert (connect.level, connect.client_id, connect.keepalive) == (5, "sensor-7", 17)
    assert (connect.username, connect.password) == ("me", b"s3cret")
    assert connect.clean is False
    assert connect.properties[mqtt.Property.SESSION_EXPIRY_INTERVAL] == [90]
    assert connect.will is None


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_session_expiry_of_zero_is_a_clean_session(make_client, protocol):
    with ScriptedBroker(accept_and_serve) as broker:
        client = make_client(broker.url, session_expiry=0, protocol=protocol)
        client.connect()
        connect = mqtt.read_connect(broker.wait_for(PacketType.CONNECT)[0])
        client.shutdown()
    assert connect.clean is True
    assert mqtt.Property.SESSION_EXPIRY_INTERVAL not in connect.properties


def test_a_client_from_a_configuration_connects_to_the_same_broker(make_client, shared_broker, unique):
    client = make_client(shared_broker.url, unique)
    assert client.config == MQTTClientConfig(
        shared_broker.url, unique, reconnect_min_delay=0.1, reconnect_max_delay=0.5
    )
    client.connect()


def test_connect_during_an_outage_waits_for_the_connection(make_client, broker):
    """And gives up alone: the client goes on trying."""
    client = make_client(broker.url)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    with pytest.raises(ConnectError, match="The client keeps trying"):
        client.connect(timeout=0.3)
    broker.start()
    client.connect(timeout=10)
    assert client.connected


def test_connect_and_disconnect_at_once_leave_a_client_that_works(broker, monkeypatch):
    """The end of the old connection does not refuse the messages of the new one."""
    with MQTTClient(broker.url, "me") as client:
        thread, connecting = client._engine._session.thread, []
        leave = thread.leave

        def leave_slowly(timeout):
            monkeypatch.undo()
            ended = leave(timeout)
            connecting.append(in_thread(client.connect))
            time.sleep(0.3)  # the other thread goes as far as it is let
            return ended

        monkeypatch.setattr(thread, "leave", leave_slowly)
        client.disconnect()
        connecting[0].result(10)
        client.publish("a", "x", qos=1)


def test_wait_connected_ends_with_a_shutdown(make_client):
    client = make_client(f"mqtt://{HOST}:{free_port()}")
    waiting = in_thread(client.wait_connected)
    time.sleep(0.1)  # it waits by now, or will find the client shut down
    client.shutdown()
    assert waiting.result(5) is False


def test_connect_returns_for_a_first_connection_that_is_lost_at_once(make_client):
    """It came, and what becomes of it later is the reconnect's business."""

    def take_over(connection):
        connection.accept()
        connection.send(mqtt.disconnect(0x8E))

    with ScriptedBroker(take_over) as broker:
        for _ in range(10):
            client = make_client(broker.url, reconnect_max_delay=60, reconnect_min_delay=30)
            client.connect(timeout=10)
            client.shutdown()


def test_a_connect_that_is_called_off_while_it_starts_ends(make_client, monkeypatch):
    """A signal may come between the start of the network thread and whatever could be interrupted."""
    client = make_client(f"mqtt://{HOST}:{free_port()}")
    engine = getattr(client, "unwrapped", client)._engine
    start = engine._session.start

    def start_and_be_called_off(wanted_by):
        first = start(wanted_by)
        engine.life.call_off()
        return first

    monkeypatch.setattr(engine._session, "start", start_and_be_called_off)
    with pytest.raises(ClosedError):
        client.connect(timeout=20)
