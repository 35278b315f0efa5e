"""Shutting down: in time, whatever state the broker is in, and nothing is left."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from tars_mqtt import ClosedError, ConnectError, ConnectionState, ConnectRefusedError, MQTTClient
from tars_mqtt._core import shutdown, transport
from tests.support import FaultProxy, LeakCheck, PacketType, ScriptedBroker, ScriptedConnection, eventually
from tests.support import packet as mqtt
from tests.support.packet import Packet
from tests.support.port import HOST, free_port
from tests.support.thread import in_thread
from tests.support.traffic import numbers

SLACK = 1.5
"""Seconds that a busy machine may take on top of the promised time."""


@pytest.fixture
def leak_check(make_client):
    """Made when the test begins, behind the client's loop and before the client."""
    return LeakCheck()


def shut_down_in_time(client, timeout: float) -> float:
    """Shut down, check that the time was kept, and return how long it took."""
    started = time.monotonic()
    client.shutdown(timeout=timeout)
    duration = time.monotonic() - started
    assert duration < timeout + SLACK
    assert client.state is ConnectionState.CLOSED
    return duration


def resumes(connection: ScriptedConnection) -> None:
    """A broker that has the session still."""
    connection.accept(session_present=True)
    connection.serve()


# -- a broker that answers ----------------------------------------------------------------------


def test_shutdown_flushes_says_goodbye_and_leaves_nothing(make_client, broker, leak_check):
    client = make_client(broker.url)
    client.connect()
    receipts = [client.submit_event("a", "n", number, qos=1 + number % 2) for number in range(200)]
    shut_down_in_time(client, 10)
    leak_check.assert_clean()
    for receipt in receipts:
        assert receipt.result(0) == receipt.envelope_id
    eventually(lambda: "Received DISCONNECT" in broker.log)
    assert client.stats().dropped == {}
    assert client.stats().queued == 0


@pytest.mark.parametrize("leave", ["disconnect", "shutdown"])
def test_who_leaves_hands_qos_0_to_the_network(make_client, broker, leave):
    """More of it than is written at a time."""
    received = []
    other = make_client(broker.url)
    other.subscribe("a", received.append)
    other.connect()
    client = make_client(broker.url)
    client.connect()
    for number in range(2000):
        client.publish("a", b"%d" % number * 100)
    getattr(client, leave)()
    eventually(lambda: len(received) == 2000)
    assert client.stats().dropped == {}


@pytest.mark.parametrize("owed", [False, True])
def test_the_broker_is_awaited_where_it_may_still_send(make_client, monkeypatch, owed):
    """Else the goodbye would be torn down with the connection."""
    monkeypatch.setattr(transport, "_LAST_WORDS_TIME", 60.0)
    gone = threading.Event()

    def never_hang_up(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.serve(instead=lambda packet: packet.type == PacketType.DISCONNECT and outlast(connection))

    def outlast(connection: ScriptedConnection) -> bool:
        assert gone.wait(0.3 if owed else 10) is not owed
        connection.close()
        return True

    with ScriptedBroker(never_hang_up) as broker:
        client = make_client(broker.url, shutdown_timeout=60)
        if owed:
            client.subscribe("a", print)
        client.connect()
        client.publish_event("b", "n", 1)
        client.shutdown()
        gone.set()
        assert broker.wait_for(PacketType.DISCONNECT)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_was_just_published_through_paho_itself_leaves_with_the_goodbye(make_client, broker, protocol):
    """It lies with paho until the network thread has it written; and its answers are still to come then."""
    received = []
    other = make_client(broker.url)
    other.subscribe("a/+", received.append)
    other.connect()
    for number in range(10):
        client = make_client(broker.url, protocol=protocol)
        client.connect()
        direct = getattr(client, "unwrapped", client)._engine.client
        for _ in range(20):
            direct.publish(f"a/{number}", b"x" * 1000, qos=1)
        client.shutdown()
    eventually(lambda: len(received) == 200)


def test_qos_0_that_leaves_with_the_goodbye_is_not_called_lost(make_client):
    """The broker begins to read when the client is about to go."""
    seen: list[PacketType] = []

    def play(connection) -> None:
        connection.accept()
        time.sleep(0.3)
        while PacketType.DISCONNECT not in seen:
            seen.append(connection.read().type)

    with ScriptedBroker(play) as broker:
        client = make_client(broker.url)
        client.connect()
        client.publish("a", b"x" * 16_000_000)
        client.shutdown()
        eventually(lambda: PacketType.DISCONNECT in seen)
    assert seen == [PacketType.PUBLISH, PacketType.DISCONNECT]
    assert client.stats().dropped == {}


def test_shutdown_lets_handlers_finish_and_acknowledges_what_they_did(make_client, broker):
    """What they publish on the way out goes out as well."""
    started = threading.Event()
    client = make_client(broker.url, "me")

    def handler(payload) -> None:
        started.set()
        time.sleep(0.3)
        client.publish("done", payload, qos=1)

    client.subscribe("work", handler, 1)
    client.connect()
    client.publish("work", b"x", qos=1)
    assert started.wait(5)
    client.shutdown()
    assert client.stats().handled == 1
    eventually(lambda: "Received PUBACK from me" in broker.log)
    assert "PUBLISH from me (d0, q1, r0, m16385, 'done'" in broker.log.partition("Received PUBACK from me")[0]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_message_that_is_not_done_in_time_brings_back_no_other(make_client, broker, protocol):
    """Those behind it were handled: to have them again would be the price of one that hangs."""
    release = threading.Event()
    handled: list[bytes] = []
    again: list[bytes] = []
    client = make_client(broker.url, "me", protocol=protocol)
    client.subscribe("slow", lambda _: release.wait(20), 1)
    client.subscribe("quick", handled.append, 2)
    client.connect()
    client.publish("slow", b"slow", qos=1)
    for number in range(9):
        client.publish("quick", b"%d" % number, qos=1 + number % 2)
    eventually(lambda: len(handled) == 9)
    client.shutdown(timeout=0.5)
    release.set()
    client = make_client(broker.url, "me", protocol=protocol)
    for topic in ("slow", "quick", "end"):
        client.subscribe(topic, again.append, 2)
    client.connect()
    client.publish("end", b"end", qos=1)
    eventually(lambda: b"end" in again)
    assert again == [b"slow", b"end"]


def test_a_question_to_the_user_that_hangs_does_not_hold_up_a_shutdown(broker):
    """It is asked on the timer's thread, where a time limit was exceeded."""
    asked, release = threading.Event(), threading.Event()

    def retry_on(error: BaseException) -> bool:
        asked.set()
        return release.wait(20)

    client = MQTTClient(broker.url, "me")
    client.subscribe("a", lambda _: release.wait(20), 1, handler_timeout=0.1, retries=1, retry_on=retry_on)
    client.connect()
    client.publish("a", b"", qos=1)
    assert asked.wait(5)
    try:
        shut_down_in_time(client, 1.0)
    finally:
        release.set()


def test_a_worker_that_goes_strands_no_job_of_its_group(make_client, broker):
    """Those that the broker has set aside for it are handled by it, all others by the rest of the group."""
    handled: list[bytes] = []

    def handle(payload: bytes) -> None:
        time.sleep(0.005)
        handled.append(payload)

    workers = [make_client(broker.url, f"worker-{number}", drain_shared=True) for number in range(3)]
    for worker in workers:
        worker.subscribe("$share/group/jobs", handle, 1)
        worker.connect()
    boss = make_client(broker.url, "boss")
    boss.connect()
    for number in range(600):
        boss.submit_event("jobs", "job", number, qos=1)
        if number in (200, 400):
            workers.pop().shutdown(timeout=20)
        time.sleep(0.001)
    eventually(lambda: sorted(numbers(handled)) == list(range(600)))
    again = make_client(broker.url, "worker-2", drain_shared=True)
    again.subscribe("$share/group/jobs", handle, 1)
    again.connect()
    again.shutdown()
    assert len(handled) == 600


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_a_broker_sends_for_each_acknowledgement_of_a_worker_that_goes_is_handled(make_client, protocol):
    """It may go on with what it has for us [MQTT-3.10.4-4]; the filter is asked for again in the next life."""
    handled: list[bytes] = []

    def script(connection: ScriptedConnection) -> None:
        def instead(packet: Packet) -> None:
            if packet.type == PacketType.SUBSCRIBE and b"jobs" in packet.body:
                connection.send(mqtt.publish("jobs", b"1", qos=1, packet_id=1, level=connection.level))
            elif packet.type == PacketType.PUBACK and packet.packet_id < 5:
                number = packet.packet_id + 1
                connection.send(
                    mqtt.publish("jobs", b"%d" % number, qos=1, packet_id=number, level=connection.level)
                )

        connection.accept()
        connection.serve(instead)

    def handle(payload: bytes) -> None:
        time.sleep(0.1)
        handled.append(payload)

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol=protocol, drain_shared=True)
        client.subscribe("$share/group/jobs", handle, 1)
        client.subscribe("news", print)
        client.connect()
        client.shutdown()
        assert handled == [b"1", b"2", b"3", b"4", b"5"]
        level = mqtt.V5 if protocol == "5" else mqtt.V311
        for packet in broker.received(PacketType.UNSUBSCRIBE):
            assert mqtt.read_unsubscribe(packet, level) == ["$share/group/jobs"]
        broker.wait_for(PacketType.PUBACK, 5)
        client.connect()
        assert len(broker.received(PacketType.SUBSCRIBE)) == 4


def test_a_worker_that_goes_while_its_broker_is_away_does_not_join_its_group_again(make_client):
    """Its session may be there still: the filter is left on the next connection, if there is one in time."""

    def hangs_up(connection: ScriptedConnection) -> None:
        def instead(packet: Packet) -> bool:
            if packet.type == PacketType.UNSUBSCRIBE:
                connection.close()
            return packet.type == PacketType.PUBLISH

        connection.accept()
        connection.serve(instead)

    with ScriptedBroker(hangs_up, resumes) as broker:
        client = make_client(broker.url, "worker", drain_shared=True)
        client.subscribe("$share/group/jobs", print, 1)
        client.connect()
        receipt = client.submit_event("a", "n", 1, qos=1)
        client.shutdown()
        receipt.result(0)
        assert len(broker.received(PacketType.UNSUBSCRIBE)) >= 2
        assert len(broker.received(PacketType.SUBSCRIBE)) == 1


@pytest.mark.parametrize(("qos", "fails"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("beside", ["nothing", "cut", "frozen", "news"])
def test_a_worker_that_goes_handles_all_that_was_set_aside_for_it(
    make_client, broker, monkeypatch, qos, fails, beside
):
    """Each acknowledgement, of whatever kind, brings the next; and a busy subscription beside it is no matter."""
    monkeypatch.setattr(shutdown, "_OWING_TIME", 0.2)
    handled: set[bytes] = set()

    def handle(payload: bytes) -> None:
        time.sleep(0.01)
        handled.add(payload)
        if fails:
            raise RuntimeError

    with FaultProxy(broker.url) as proxy:
        proxy.latency(0.02)
        worker = make_client(proxy.url, "worker", drain_shared=True, max_pending=16)
        worker.subscribe("$share/group/jobs", handle, qos, dead_letter="dead")
        worker.subscribe("news", lambda payload: time.sleep(0.001), 1)
        worker.connect()
        boss = make_client(broker.url, "boss")
        boss.connect()
        for number in range(100):
            boss.submit_event("jobs", "job", number, qos=qos)
            if beside == "news":  # which take up places in the window, too
                boss.submit_event("news", "news", number, qos=1)
        boss.publish("jobs", b"last", qos=qos)
        over = threading.Event()

        def tell() -> None:
            while beside == "news" and not over.wait(0.002):
                boss.publish("news", b"", qos=1)

        telling = in_thread(tell)
        closing = in_thread(worker.shutdown, 50)
        if beside == "cut":
            eventually(lambda: len(handled) > 10)
            proxy.cut()
        elif beside == "frozen":
            eventually(lambda: len(handled) > 10)
            broker.freeze()
            time.sleep(1.0)
            broker.thaw()
        closing.result(30)
        over.set()
        telling.result(10)
    assert len(handled) == 101
    heir = make_client(broker.url, "worker")
    heir.subscribe("$share/group/jobs", handle, qos)
    heir.connect()
    boss.publish("jobs", b"new", qos=1)
    eventually(lambda: b"new" in handled)
    assert len(handled) == 102


def test_a_worker_that_joined_its_group_in_the_last_moment_joins_it_again(make_client):
    """The answer to a SUBSCRIBE may come behind the UNSUBSCRIBE."""
    may_end = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        late: list[Packet] = []

        def instead(packet: Packet) -> bool:
            if packet.type == PacketType.SUBSCRIBE and len(broker.received(PacketType.SUBSCRIBE)) == 2:
                late.append(packet)
                return True
            if packet.type == PacketType.UNSUBSCRIBE:
                for each in late:
                    connection.answer(each)
                late.clear()
            return False

        connection.accept(session_present=connection.number > 1)
        connection.serve(instead)

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, "worker", drain_shared=True)
        client.subscribe("busy", lambda payload: may_end.wait(20))
        client.connect()
        joining = in_thread(client.subscribe, "$share/group/jobs", print, 1)
        broker.wait_for(PacketType.SUBSCRIBE, 2)
        client.shutdown()
        joining.result(10)
        client.connect()
        assert [packet for packet in broker.received(PacketType.SUBSCRIBE)[2:] if b"$share" in packet.body]


def test_a_connect_that_finds_a_connection_takes_nothing_from_a_shutdown(make_client, broker, monkeypatch):
    """It comes between the call for the shutdown, and its first step."""
    client = make_client(broker.url)
    client.connect()
    life = getattr(client, "unwrapped", client)._engine.life
    begin = life._begin

    def overtaken(*args: object) -> object:
        begun = begin(*args)
        life.asked_to_end()
        return begun

    monkeypatch.setattr(life, "_begin", overtaken)
    with pytest.raises(ClosedError, match="shut down while it connected"):
        client.connect()
    client.publish("a", b"1", qos=1, timeout=10)
    assert client.stats().connections == 1


def test_shutdown_ends_an_iteration(make_client, shared_broker, unique):
    client = make_client(shared_broker.url)
    client.connect()
    messages = client.messages(unique)
    client.publish(unique, b"one", qos=1)
    ending = in_thread(lambda: [message.payload for message in messages])
    eventually(lambda: client.stats().messages_in == 1 or ending.done() or client.publish(unique, b"one"))
    client.shutdown()
    assert set(ending.result(5)) == {b"one"}


# -- a broker that does not -----------------------------------------------------------------------


def freeze(broker, proxy) -> None:
    broker.freeze()


def kill(broker, proxy) -> None:
    broker.kill()


def blackhole(broker, proxy) -> None:
    proxy.stall()


@pytest.mark.parametrize("trouble", [freeze, kill, blackhole])
@pytest.mark.parametrize("timeout", [1.0, 0.0])
def test_shutdown_keeps_to_its_time_when_nobody_answers(
    make_client, broker, leak_check, caplog, trouble, timeout
):
    """What could not be flushed is counted and logged, and its receipts fail."""
    with FaultProxy(broker.url) as proxy:
        check = LeakCheck()
        client = make_client(proxy.url, enable_health=True, reconnect_min_delay=0.1)
        client.subscribe("a", print, 1)
        client.connect()
        eventually(lambda: client.stats().acknowledged == 1)
        trouble(broker, proxy)
        receipts = [client.submit_event("a", "n", number, qos=1) for number in range(10)]
        duration = shut_down_in_time(client, timeout)
        if broker.running:
            broker.thaw()
        proxy.cut()
        check.assert_clean()
    assert duration > 0.5 * timeout  # it did try
    for receipt in receipts:
        with pytest.raises(ClosedError, match="before the broker acknowledged"):
            receipt.result(0)
    assert client.stats().dropped["shutdown"] >= 10
    assert "did not acknowledge" in caplog.text


def test_shutdown_of_an_idle_client_does_not_wait_for_a_dead_broker(make_client, broker, leak_check):
    """With nothing to flush there is nothing to wait for."""
    client = make_client(broker.url, enable_health=True)
    client.connect()
    eventually(lambda: client.stats().acknowledged == 1)
    broker.kill()
    eventually(lambda: not client.connected)
    assert shut_down_in_time(client, 20) < 5.0
    leak_check.assert_clean()


def test_shutdown_in_the_middle_of_a_reconnect_that_nobody_answers(make_client, broker, leak_check):
    with FaultProxy(broker.url) as proxy:
        check = LeakCheck()
        client = make_client(proxy.url)
        client.connect()
        proxy.stall()
        proxy.cut()
        eventually(lambda: proxy.connections >= 2)
        assert shut_down_in_time(client, 20) < 5.0
        proxy.cut()
        check.assert_clean()


# -- handlers that do not return ------------------------------------------------------------------


def test_a_handler_that_does_not_return_is_named_and_left_behind(make_client, shared_broker, unique, caplog):
    release, started = threading.Event(), threading.Event()

    def stuck(payload) -> None:
        started.set()
        release.wait(30)

    client = make_client(shared_broker.url)
    client.subscribe(unique, stuck, 1)
    client.connect()
    client.publish(unique, b"", qos=1)
    assert started.wait(5)
    try:
        shut_down_in_time(client, 0.5)
        assert "handlers still run" in caplog.text
    finally:
        release.set()


def test_shutdown_from_a_handler(make_client, broker, leak_check):
    """It is finished first, as all others are: otherwise the command would come back at each start."""
    client = make_client(broker.url, "me", shutdown_timeout=30)
    returned = []

    def handler(payload) -> None:
        client.shutdown()
        client.publish("stopping", b"", qos=1)
        returned.append(client.state)

    client.subscribe("stop", handler, 1)
    client.connect()
    client.publish("stop", b"", qos=1)
    eventually(lambda: client.state is ConnectionState.CLOSED)
    assert returned[0] is not ConnectionState.CLOSED
    eventually(lambda: "Received DISCONNECT from me" in broker.log)
    assert "Received PUBACK from me" in broker.log
    assert "'stopping'" in broker.log
    leak_check.assert_clean()


def test_run_waits_for_a_shutdown_that_a_handler_has_asked_for(make_client, broker):
    """As long as the handler allows, which knows what is still to be done."""
    client = make_client(broker.url, "me", shutdown_timeout=0.01)

    def stop(payload) -> None:
        client.shutdown(timeout=30)
        time.sleep(0.5)

    client.subscribe("stop", stop, 1)
    running = in_thread(client.run)
    client.wait_connected(10)
    client.publish("stop", b"", qos=1)
    running.result(20)
    assert client.state is ConnectionState.CLOSED
    assert "Received PUBACK from me" in broker.log


def test_run_gives_a_shutdown_the_time_that_its_caller_has(make_client, broker):
    """What the settings allow is for signals."""
    client = make_client(broker.url, "me", shutdown_timeout=0.01)
    begun = threading.Event()

    def slow(payload) -> None:
        begun.set()
        time.sleep(0.5)

    client.subscribe("slow", slow, 1)
    running = in_thread(client.run)
    client.wait_connected(10)
    client.publish("slow", b"", qos=1)
    assert begun.wait(5)
    client.shutdown(timeout=30)
    running.result(20)
    assert client.stats().handled == 1
    assert "Received PUBACK from me" in broker.log


def test_who_has_less_time_hurries_a_shutdown_that_is_under_way(make_client, broker, leak_check):
    client = make_client(broker.url)
    begun = threading.Event()

    def stop(payload) -> None:
        broker.freeze()
        client.submit_event("a", "n", 1, qos=1)
        client.shutdown(timeout=None)
        begun.set()

    client.subscribe("stop", stop)
    client.connect()
    client.publish("stop", b"")
    assert begun.wait(10)
    shut_down_in_time(client, 1)
    leak_check.assert_clean()
    broker.thaw()


def test_a_shutdown_that_comes_late_leaves_the_next_life_alone(make_client, broker):
    """It was asked for in the one before, by a handler for instance, and got its thread only now."""
    client = make_client(broker.url)
    life = getattr(client, "unwrapped", client)._engine.life
    client.connect()
    earlier = life.lives
    client.shutdown()
    client.connect()
    life.shutdown(10, None, earlier)
    assert client.connected


def test_handlers_that_shut_down_share_one_shutdown(make_client, broker):
    client = make_client(broker.url, workers=4)
    all_there = threading.Event()
    most = 0

    def handler(payload) -> None:
        nonlocal most
        all_there.wait(20)
        client.shutdown(20)
        most = max(most, threading.active_count())

    before = threading.active_count()
    client.subscribe("a", handler, 1, order_by="topic")
    client.connect()
    for _ in range(200):
        client.submit_event("a", "n", 1, qos=1)
    eventually(lambda: client.stats().pending == 200)
    all_there.set()
    eventually(lambda: client.state is ConnectionState.CLOSED)
    assert most < before + 30


def test_a_handler_with_less_time_hurries_a_shutdown_that_is_under_way(make_client, broker):
    client = make_client(broker.url)
    in_work, hurried = threading.Event(), threading.Event()

    def handler(payload) -> None:
        in_work.set()
        eventually(lambda: client.state is ConnectionState.CLOSING)
        client.shutdown(timeout=0.2)
        hurried.wait(20)

    client.subscribe("a", handler)
    client.connect()
    client.publish("a", b"")
    assert in_work.wait(10)
    try:
        assert shut_down_in_time(client, 15) < 10
    finally:
        hurried.set()


def test_the_end_of_one_shutdown_is_no_matter_of_the_next_life(make_client, broker, monkeypatch):
    """Neither its time, nor that it has not returned yet."""
    client = make_client(broker.url)
    life = getattr(client, "unwrapped", client)._engine.life
    closed, may_return = threading.Event(), threading.Event()
    shutdown = life._shutdown

    def slow_to_return() -> None:
        monkeypatch.setattr(life, "_shutdown", shutdown)
        shutdown()
        closed.set()
        may_return.wait(20)

    monkeypatch.setattr(life, "_shutdown", slow_to_return)
    ended = []

    def handler(payload) -> None:
        time.sleep(0.5)
        ended.append(client.state)

    client.subscribe("a", handler)
    client.connect()
    first = in_thread(client.shutdown, 0)
    assert closed.wait(10)
    client.connect()
    client.connect()
    client.publish("a", b"")
    eventually(lambda: client.stats().pending == 1)
    second = in_thread(client.shutdown, 10)
    eventually(lambda: len(life.deadlines._deadlines) > 0)
    may_return.set()
    first.result(10)
    second.result(10)
    assert ended == [ConnectionState.CLOSING]
    assert client.state is ConnectionState.CLOSED


@pytest.mark.parametrize("how", ["connect gives up", "disconnect"])
def test_who_goes_takes_nothing_from_a_shutdown_that_is_under_way(make_client, broker, how):
    """It may still bring out what is queued, if the broker comes back in time."""
    client = make_client(broker.url)
    if how == "disconnect":
        client.connect()
        broker.kill()
        eventually(lambda: not client.connected)
    else:
        broker.terminate()
        connecting = in_thread(client.connect, 1)
        eventually(lambda: client.stats().last_error)
    receipt = client.submit_event("a", "n", 1, qos=1)
    closing = in_thread(client.shutdown, 25)
    eventually(lambda: client.state is ConnectionState.CLOSING)
    if how == "disconnect":
        client.disconnect()
    else:
        with pytest.raises(ConnectError):
            connecting.result(20)
    broker.start()
    closing.result(30)
    receipt.result(0)


def test_a_refusal_for_good_ends_the_wait_of_a_shutdown(make_client):
    """Nothing will leave any more."""
    refuse = threading.Event()

    def script(connection: ScriptedConnection) -> None:
        refuse.wait(20)
        connection.accept(0x87)

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol="5")
        connecting = in_thread(client.connect, 30)
        eventually(lambda: broker.connections)
        client.submit_event("a", "n", 1, qos=1)
        closing = in_thread(client.shutdown, 30)
        # A `connect` that had not got to waiting by then is overtaken, and the shutdown over at once.
        eventually(lambda: client.state in (ConnectionState.CLOSING, ConnectionState.CLOSED))
        refuse.set()
        closing.result(10)
        with pytest.raises((ConnectRefusedError, ClosedError)):
            connecting.result(10)


def test_a_disconnect_beside_a_shutdown_costs_no_acknowledgement(make_client, broker):
    """The handler ends in time, and its message does not come again."""
    may_end, handled = threading.Event(), []

    def handler(payload: bytes) -> None:
        handled.append(payload)
        may_end.wait(20)

    client = make_client(broker.url, "worker")
    client.subscribe("a", handler, 1)
    client.connect()
    client.publish("a", b"1", qos=1)
    eventually(lambda: handled)
    closing = in_thread(client.shutdown, 20)
    eventually(lambda: client.state is ConnectionState.CLOSING)
    client.disconnect()
    may_end.set()
    closing.result(20)
    client.connect()
    client.publish("a", b"2", qos=1)
    eventually(lambda: b"2" in handled)
    assert handled == [b"1", b"2"]


def test_a_connect_that_waits_for_others_is_overtaken_by_a_shutdown(make_client, broker, monkeypatch):
    client = make_client(broker.url)
    client.connect()
    life = getattr(client, "unwrapped", client)._engine.life
    leave, inside, may_leave = life._session.thread.leave, threading.Event(), threading.Event()

    def slow(*args: float) -> bool:
        inside.set()
        may_leave.wait(20)
        return leave(*args)

    monkeypatch.setattr(life._session.thread, "leave", slow)
    leaving = in_thread(client.disconnect)
    assert inside.wait(10)
    latest_end = life.latest_end
    connecting = in_thread(life.begin, 20, latest_end)
    closing = in_thread(client.shutdown, 0)
    eventually(lambda: life.latest_end is not latest_end)
    may_leave.set()
    leaving.result(20)
    closing.result(20)
    with pytest.raises(ClosedError):
        connecting.result(20)
    eventually(lambda: client.state is ConnectionState.CLOSED)


@pytest.mark.parametrize("end", ["run", "with"])
def test_a_reader_and_the_shutdown_of_a_handler_do_not_wait_for_each_other(broker, end):
    """Who leaves the block, or serves, reads no more."""
    with MQTTClient(broker.url, "me") as client:
        incoming = client.messages("data", 1)
        client.subscribe("end", lambda payload: client.shutdown(timeout=30))
        for number in range(5):
            client.publish("data", b"%d" % number, qos=1)
        assert incoming.next(10).payload == b"0"
        started = time.monotonic()
        if end == "run":
            threading.Timer(0.5, client.publish, ("end", b"")).start()
            client.run()
        else:
            client.publish("end", b"", qos=1)
    assert time.monotonic() - started < 15
    assert client.state is ConnectionState.CLOSED


def test_a_signal_at_the_end_of_run_is_no_matter_of_the_next_connect(make_client, broker, monkeypatch):
    client = make_client(broker.url)
    life = getattr(client, "unwrapped", client)._engine.life
    forget_signals = life.forget_signals

    def signal_and_forget() -> None:
        life.call_off()
        forget_signals()

    serving = in_thread(client.run)
    eventually(lambda: client.connected)
    monkeypatch.setattr(life, "forget_signals", signal_and_forget)
    client.shutdown()
    serving.result(20)
    client.connect()


def test_run_ends_its_own_life_and_not_the_next(broker, monkeypatch):
    """Somebody may connect as soon as the one is over."""
    client = MQTTClient(broker.url, "me")
    await_aside, closed, connected = client._engine.life.await_aside, threading.Event(), threading.Event()

    def late(hurried) -> None:
        await_aside(hurried)
        closed.set()
        connected.wait(20)

    monkeypatch.setattr(client._engine.life, "await_aside", late)
    serving = in_thread(client.run)
    eventually(lambda: client.connected)
    client.shutdown()
    assert closed.wait(10)
    client.connect()
    connected.set()
    serving.result(20)
    assert client.connected
    client.shutdown()


def test_a_client_that_is_closed_may_connect(make_client, broker, caplog):
    """Even where the line in the log that says so takes its time."""
    client = make_client(broker.url)
    connected = threading.Event()

    def slow(record: logging.LogRecord) -> bool:
        return record.getMessage() != "shut down" or connected.wait(20)

    caplog.set_level(logging.INFO, "tars_mqtt.session")
    logger = logging.getLogger("tars_mqtt.session")
    logger.addFilter(slow)
    try:
        client.connect()
        closing = in_thread(client.shutdown)
        eventually(lambda: client.state is ConnectionState.CLOSED)
        client.connect(timeout=10)
    finally:
        connected.set()
        logger.removeFilter(slow)
    closing.result(10)
    assert client.connected


def test_a_handler_that_shuts_down_and_fails_with_retries_left_gives_its_message_back(make_client, broker):
    """It is not acknowledged: the broker delivers it to the next session."""
    client = make_client(broker.url, "me", session_expiry=60)
    handled = []

    def handler(payload) -> None:
        handled.append(payload)
        if len(handled) == 1:
            client.shutdown(timeout=1)
            raise OSError("the disk is full")

    client.subscribe("work", handler, 1, retries=3, retry_delay=60)
    client.connect()
    client.publish("work", b"", qos=1)
    eventually(lambda: client.state is ConnectionState.CLOSED)
    client.connect()
    eventually(lambda: len(handled) >= 2)


def test_shutdown_from_a_handler_while_another_thread_shuts_down(make_client, broker, leak_check):
    """The two do not wait for each other."""
    started, go_on = threading.Event(), threading.Event()
    client = make_client(broker.url, shutdown_timeout=10)

    def handler(payload) -> None:
        started.set()
        go_on.wait(10)
        client.shutdown()

    client.subscribe("stop", handler, 1)
    client.connect()
    client.publish("stop", b"", qos=1)
    assert started.wait(5)
    ending = in_thread(client.shutdown)
    eventually(lambda: client.state is ConnectionState.CLOSING)
    go_on.set()
    ending.result(5)
    assert client.state is ConnectionState.CLOSED
    leak_check.assert_clean()


# -- at any time ----------------------------------------------------------------------------------


def test_shutdown_twice_and_before_any_connect(make_client, broker, leak_check):
    client = make_client(broker.url)
    for _ in range(2):
        assert shut_down_in_time(client, 5) < 2.0
    client.connect()
    for _ in range(2):
        assert shut_down_in_time(client, 5) < 2.0
    leak_check.assert_clean()
    eventually(lambda: broker.log.count("Received DISCONNECT") == 1)


def test_a_client_that_is_never_used_holds_nothing(make_client, leak_check):
    make_client("mqtt://127.0.0.1")
    assert leak_check.leaks() == []


def test_a_disconnect_whose_goodbye_is_overtaken_leaves_the_next_connection_alone(make_client, proxy):
    """And raises nothing, though its goodbye is taken back."""
    slow = {"reconnect_min_delay": 30, "reconnect_max_delay": 30}
    client = make_client(proxy.url, enable_health=True, max_inflight=1, **slow)
    client.connect()
    eventually(lambda: client.stats().acknowledged == 1)
    proxy.stall()
    client.submit_event("x", "n", 1, qos=1)  # the window is full: the goodbye waits
    eventually(lambda: client.stats().inflight == 1)
    leaving = in_thread(client.disconnect)
    eventually(lambda: client.stats().queued == 2)
    proxy.refuse()
    proxy.cut()
    eventually(lambda: not client.connected)
    proxy.resume()
    proxy.accept()
    client.disconnect()
    client.connect()
    leaving.result(15)
    assert client.connected


def test_shutdown_while_connect_waits_ends_both(make_client, leak_check):
    """connect() does not sit out its time, and says why it ended."""
    client = make_client(f"mqtt://{HOST}:{free_port()}")
    connecting = in_thread(client.connect, timeout=20)
    eventually(lambda: client.stats().last_error)
    assert shut_down_in_time(client, 10) < 5.0
    with pytest.raises(ClosedError, match="shut down"):
        connecting.result(5)
    assert client.state is ConnectionState.CLOSED
    leak_check.assert_clean()


def test_shutdown_while_the_broker_thinks_about_connect(make_client, leak_check):
    with ScriptedBroker(lambda connection: connection.hold()) as broker:
        client = make_client(broker.url)
        connecting = in_thread(client.connect, timeout=20)
        broker.wait_for(PacketType.CONNECT)
        assert shut_down_in_time(client, 10) < 5.0
        with pytest.raises(ClosedError, match="shut down"):
            connecting.result(5)


def test_shutdown_from_several_threads_at_once(make_client, broker, leak_check):
    client = make_client(broker.url)
    client.connect()
    receipts = [client.submit_event("a", "n", number, qos=1) for number in range(100)]
    for outcome in [in_thread(client.shutdown) for _ in range(8)]:
        outcome.result(10)
    assert client.state is ConnectionState.CLOSED
    assert all(receipt.exception(0) is None for receipt in receipts)
    leak_check.assert_clean()


def test_shutdown_while_others_publish(make_client, broker, leak_check):
    """Each message was acknowledged, or its publisher was told; nobody hangs."""
    client = make_client(broker.url)
    client.connect()
    published = []

    def publish() -> int:
        count = 0
        while True:
            try:
                client.publish("a", b"", qos=1, timeout=10)
            except ClosedError:
                return count
            count += 1
            published.append(None)

    publishers = [in_thread(publish) for _ in range(4)]
    eventually(lambda: len(published) > 20)
    client.shutdown()
    assert sum(publisher.result(5) for publisher in publishers) == client.stats().acknowledged
    leak_check.assert_clean()


def test_after_shutdown_calls_say_what_to_do(make_client, broker):
    client = make_client(broker.url, enable_health=True)
    client.connect()
    client.shutdown()
    for call in (
        lambda: client.publish("a", b""),
        lambda: client.publish("a", b"", qos=1),
        lambda: client.publish_event("a", "b", None),
        lambda: client.submit_event("a", "b", None, qos=2),
        lambda: client.publish_health(True),
    ):
        with pytest.raises(ClosedError, match=r"call connect\(\) to use it again"):
            call()


def test_an_error_in_the_with_body_shuts_down_and_passes_through(make_client, broker, leak_check):
    client = make_client(broker.url)
    with pytest.raises(LookupError, match="mine"), client:
        raise LookupError("mine")
    assert client.state is ConnectionState.CLOSED
    leak_check.assert_clean()


def test_wait_connected_gives_up_when_the_client_is_shut_down(make_client):
    client = make_client(f"mqtt://{HOST}:{free_port()}")
    client.shutdown()
    assert client.wait_connected(0.1) is False


# -- and then connect again ---------------------------------------------------------------------


def test_the_subscription_of_a_handler_left_behind_works_again_after_connect(
    make_client, shared_broker, unique
):
    """In order and one at a time, also when the old call returns at last."""
    release, seen, running = threading.Event(), [], []

    def handler(payload) -> None:
        if payload == b"stuck":
            seen.append(payload)
            release.wait()
            return
        running.append(payload)
        time.sleep(0.01)
        assert len(running) == 1
        running.remove(payload)
        seen.append(payload)

    client = make_client(shared_broker.url)
    client.subscribe(unique, handler)
    client.connect()
    client.publish(unique, "stuck")
    eventually(lambda: seen)
    shut_down_in_time(client, 0.5)
    client.connect()
    release.set()
    time.sleep(0.2)  # the old call returns: nothing tells when
    expected = [b"%d" % number for number in range(10)]
    for payload in expected:
        client.publish(unique, payload)
        eventually(lambda payload=payload: payload in seen)
    for payload in expected:
        client.publish(unique, payload)
    eventually(lambda: seen == [b"stuck", *expected, *expected])


@pytest.mark.parametrize("order_by", [None, "topic"])
def test_what_waits_for_a_retry_is_counted_and_given_up(make_client, shared_broker, unique, order_by):
    """Its subscription and its key go on after a connect, and the next shutdown does not wait for it."""
    attempts = []

    def handler(payload) -> None:
        attempts.append(payload)
        if payload == b"bad":
            raise ValueError("bad")

    client = make_client(shared_broker.url)
    client.subscribe(unique, handler, retries=3, retry_delay=60, order_by=order_by)
    client.connect()
    client.publish(unique, "bad")
    eventually(lambda: client.stats().handler_retries)
    shut_down_in_time(client, 0.5)
    assert client.stats().dropped == {"shutdown": 1}
    assert client.stats().pending == 0
    client.connect()
    client.publish(unique, "good")
    eventually(lambda: attempts == [b"bad", b"good"])
    assert shut_down_in_time(client, 10) < 5


def test_a_handler_that_fails_after_the_shutdown_starts_nothing(
    make_client, shared_broker, unique, leak_check
):
    """No thread to try it again."""
    release, started = threading.Event(), threading.Event()

    def handler(_) -> None:
        started.set()
        release.wait()
        raise ValueError("late")

    client = make_client(shared_broker.url)
    client.subscribe(unique, handler, retries=3, retry_delay=0.01)
    client.connect()
    client.publish(unique, "x")
    assert started.wait(5)
    client.shutdown(timeout=0.5)
    release.set()
    eventually(lambda: client.stats().handler_failures)
    leak_check.assert_clean()


def test_a_handler_that_shuts_another_client_down_lets_its_handlers_finish(
    make_client, shared_broker, unique
):
    one, other = make_client(shared_broker.url), make_client(shared_broker.url)
    started, order = threading.Event(), []

    def slow(_) -> None:
        started.set()
        time.sleep(0.5)
        order.append("handled")

    def end_other(_) -> None:
        other.shutdown()
        order.append("shut down")

    one.subscribe(f"{unique}/end", end_other)
    other.subscribe(f"{unique}/work", slow)
    one.connect()
    other.connect()
    other.publish(f"{unique}/work", "x")
    assert started.wait(5)
    one.publish(f"{unique}/end", "x")
    eventually(lambda: order == ["handled", "shut down"])


def test_copies_for_other_subscriptions_are_no_debt_to_a_group(make_client, broker):
    """MQTT 5 tells them apart: a busy topic that both want does not keep a worker from going."""
    worker = make_client(broker.url, "worker", protocol="5", drain_shared=True, workers=16)
    for topic_filter in ("$share/group/a/#", "a/#"):  # several of each are in work at any time
        worker.subscribe(topic_filter, lambda payload: time.sleep(0.05), 1, concurrency=8)
    worker.connect()
    boss = make_client(broker.url, "boss")
    boss.connect()
    over = threading.Event()

    def tell() -> None:
        while not over.wait(0.01):
            boss.submit("a/b", b"", qos=1)

    telling = in_thread(tell)
    eventually(lambda: worker.stats().handled > 10)
    duration = shut_down_in_time(worker, 20)
    over.set()
    telling.result(10)
    assert duration < 10


def test_a_filter_is_left_for_good_however_often_it_came_and_went(make_client):
    """The answer to one UNSUBSCRIBE says nothing of the next, which the connection may lose."""

    def loses_the_second(connection: ScriptedConnection) -> None:
        asked: list[Packet] = []

        def instead(packet: Packet) -> bool:
            if packet.type == PacketType.UNSUBSCRIBE:
                asked.append(packet)
                if len(asked) == 2:
                    connection.answer(asked[0])
                    connection.close()
            return packet.type == PacketType.UNSUBSCRIBE

        connection.accept()
        connection.serve(instead)

    with ScriptedBroker(loses_the_second, resumes) as broker:
        client = make_client(broker.url)
        client.connect()
        for timeout in (0.05, 5):
            client.subscribe("a", print, 1).unsubscribe(timeout=timeout)
        broker.wait_for(PacketType.UNSUBSCRIBE, 3)
        client.shutdown()


# -- iterators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, "", "$share/group/"], ids=["no drain", "drain", "shared"])
def test_shutdown_does_not_wait_for_what_nobody_reads(make_client, shared_broker, unique, group):
    """Neither for the message in the hands of its caller, nor for those behind it."""
    client = make_client(shared_broker.url, drain_shared=group is not None)
    client.subscribe("$share/group/jobs", print, 1)
    client.connect()
    messages = client.messages((group or "") + unique, 1).__enter__()
    for _ in range(3):
        client.publish(unique, "x", qos=1)
    next(messages)
    eventually(lambda: client.stats().messages_in == 3)
    assert shut_down_in_time(client, 10) < 5


def test_shutdown_lets_a_reader_finish_what_it_has(broker):
    """What it asks for next tells that the last one is done: it is acknowledged."""
    client = MQTTClient(broker.url, "me")
    client.connect()
    messages = client.messages("a", 1)
    taken = threading.Event()

    def read() -> list[bytes]:
        payloads = []
        for message in messages:
            taken.set()
            time.sleep(0.2)
            payloads.append(message.payload)
        return payloads

    reading = in_thread(read)
    for number in range(3):
        client.publish("a", b"%d" % number, qos=1)
    assert taken.wait(5)
    client.shutdown()
    assert reading.result(5) == [b"0", b"1", b"2"]
    eventually(lambda: broker.log.count("Received PUBACK from me") == 3)


def test_an_iteration_that_a_shutdown_ended_takes_nothing_any_more(make_client, broker):
    """Its filter is given back at the next connect: nothing waits for a reader who has gone."""
    client = make_client(broker.url, "me")
    client.connect()
    messages = client.messages("a", 1).__enter__()
    client.shutdown()
    client.connect()
    eventually(lambda: "Received UNSUBSCRIBE from me" in broker.log)
    client.publish("a", "x", qos=1)
    assert list(messages) == []
    assert client.stats().pending == 0
